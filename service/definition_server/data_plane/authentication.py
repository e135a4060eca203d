"""Who may call: metadata ``x-avap-auth`` must carry a known key.

The worker knows keys only as SHA-256 digests. Comparing digests makes the comparison's time independent of the
presented key's length and content, and leaves no key in the worker's memory to be read.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterable
from hashlib import sha256

from definition_server.data_plane.failure import CallFailed, Status

METADATA_KEY = "x-avap-auth"


class KeyRing:
    """The accepted keys. Empty until the master has sent them: then nobody is let in."""

    def __init__(self, digests: Iterable[str] = ()) -> None:
        self._digests: tuple[bytes, ...] = ()
        self._listeners: list[Callable[[], None]] = []
        self.replace(digests)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call ``listener`` whenever the keys have been replaced, for whoever remembers a judgement."""
        self._listeners.append(listener)

    def replace(self, digests: Iterable[str]) -> None:
        """Accept exactly the keys with these hex SHA-256 digests from now on."""
        self._digests = tuple(bytes.fromhex(digest) for digest in digests)
        for listener in self._listeners:
            listener()

    def authenticate(self, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Let a call pass that presents one known key.

        A key presented twice is refused: which of two values a proxy or a library would have taken is anyone's
        guess, and no honest client sends two.

        Raises:
            CallFailed: UNAUTHENTICATED.
        """
        presented = [value for key, value in metadata if key == METADATA_KEY]
        if len(presented) == 1:
            value = presented[0]
            digest = sha256(value.encode() if isinstance(value, str) else value).digest()
            # Every known key is compared, so time tells nothing of which one matched.
            if sum(hmac.compare_digest(digest, known) for known in self._digests):
                return
        raise CallFailed(Status.UNAUTHENTICATED, "Invalid Credentials")
