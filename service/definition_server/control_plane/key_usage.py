"""Records when each API key was last presented, as workers report it. This shows which keys are in use.

Workers know the digests of the keys, but not their ids. A report names digests. The master adds the time from its own
clock, and ignores a digest that it has not sent to the workers. So a compromised worker can make an unused key look
used, but cannot make a used key look unused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256

from definition_server.ipc.messages import Keys


class KeyUsage:
    """The accepted keys by id, and their last use. May be read from any thread."""

    def __init__(self, keys: Mapping[str, str], clock: Callable[[], float] = time.time) -> None:
        """``keys``: id → key. ``clock``: seconds since the epoch."""
        self._clock = clock
        self._last_used: dict[str, float] = {}
        self._digests: dict[str, str] = {}
        self.replace(keys)

    def replace(self, keys: Mapping[str, str]) -> None:
        """Accept ``keys`` from now on. A key that was accepted before keeps its time of last use, even if its id has
        changed.
        """
        self._digests = {key_id: sha256(key.encode()).hexdigest() for key_id, key in keys.items()}
        accepted = set(self._digests.values())
        self._last_used = {digest: at for digest, at in self._last_used.items() if digest in accepted}

    @property
    def message(self) -> Keys:
        """The keys, as workers get them."""
        return Keys(tuple(self._digests.values()))

    def used(self, digests: Iterable[str]) -> None:
        """Note that the keys with these digests were presented about a second ago, or later."""
        now = self._clock()
        self._last_used |= dict.fromkeys(set(digests) & set(self._digests.values()), now)

    def last_used(self) -> dict[str, float]:
        """Id → last use, in seconds since the epoch; 0 if the key was not used since the start of the master, or since
        it was added.
        """
        last_used = self._last_used
        return {key_id: last_used.get(digest, 0.0) for key_id, digest in self._digests.items()}
