"""Authentication: a call's metadata ``x-avap-auth`` must carry a known key.

The worker knows keys only as SHA-256 digests. The time of comparing digests does not depend on the length and content
of the presented key, and the worker's memory holds no key that could be read from it.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from hashlib import sha256

from definition_server.api_keys import METADATA_KEY
from definition_server.data_plane.failure import CallFailed, Status


class KeyRing:
    """The accepted keys. There are none until the master has sent them; until then no call is accepted."""

    def __init__(self, digests: Iterable[str] = ()) -> None:
        self._digests: tuple[bytes, ...] = ()
        self._used: set[int] = set()
        """The numbers, from 1, of the keys that were presented since `take_used`."""
        self._listeners: list[Callable[[], None]] = []
        self.replace(digests)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever remembered decisions become invalid, for example when the keys were replaced."""
        self._listeners.append(listener)

    def replace(self, digests: Iterable[str]) -> None:
        """Accept exactly the keys with these hex SHA-256 digests, from now on."""
        self._digests = tuple(bytes.fromhex(digest) for digest in dict.fromkeys(digests))
        self._used.clear()
        self.authorize_again()

    def authorize_again(self) -> None:
        """Invalidate remembered decisions: the keys were replaced, or a report of the keys in use is due."""
        for listener in self._listeners:
            listener()

    def take_used(self) -> tuple[str, ...]:
        """The hex digests of the keys that were presented since the last call."""
        used, self._used = self._used, set()
        return tuple(self._digests[number - 1].hex() for number in sorted(used))

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Check that a call's ``metadata`` carry exactly one key, and that this key is known.

        Two keys are refused, because proxies and libraries differ in which of them they use, and no honest client sends
        two.

        Raises:
            CallFailed: UNAUTHENTICATED.
        """
        presented = [value for key, value in metadata if key == METADATA_KEY]
        if len(presented) == 1:
            value = presented[0]
            digest = sha256(value.encode() if isinstance(value, str) else value).digest()
            # Every known key is compared, so that the time does not depend on which one matches. At most one matches.
            found = sum(
                number * hmac.compare_digest(digest, known) for number, known in enumerate(self._digests, start=1)
            )
            if found:
                self._used.add(found)
                return
        raise CallFailed(Status.UNAUTHENTICATED, "Invalid Credentials")
