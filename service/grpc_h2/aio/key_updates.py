"""A limit on the KeyUpdates of a TLS peer that has not proved its right to be served (RFC 8446, section 4.6.3).

A KeyUpdate has 27 octets and takes 14 to 30 µs of CPU time, because it needs new keys and a KeyUpdate in return.
OpenSSL does not limit their number. An honest peer sends one after 2^24 records or so. `piecewise_tls` bounds the time
for which other connections wait for KeyUpdates. This module prevents a peer without that right from using the core for
KeyUpdates.

KeyUpdates are counted until the peer has proved its right. After more than `MOST` the connection is ended, and octets
that have arrived and are not processed yet are thrown away. The message callback of the module `ssl` counts them. It is
meant for debugging and has no public name; if a version of Python has no such callback, nothing is counted. The
callback is removed from the connection of a client, because it takes time with each TLS message.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Any, Final

from grpc_h2.aio.piecewise_tls import PiecewiseTls

MOST: Final = 4
"""The number of KeyUpdates allowed on one connection."""

_HANDSHAKE: Final = 22
"""The ContentType of handshake messages (RFC 8446, section 5.1)."""
_KEY_UPDATE: Final = 24
"""The HandshakeType of a KeyUpdate (RFC 8446, section 4)."""


class KeyUpdates:
    """Counts the KeyUpdates of one connection, from the creation of this object until `release`, which also ends a
    reference cycle."""

    __slots__ = ("_before", "_on_flood", "_tls", "count")

    def __init__(self, tls: ssl.SSLObject, on_flood: Callable[[], None]) -> None:
        """``on_flood`` is called once there are too many KeyUpdates, while the octets that have arrived are being
        processed."""
        self.count = 0
        self._tls = tls
        self._on_flood = on_flood
        self._before = tls.context
        tls._grpc_h2_key_updates = self  # type: ignore[attr-defined]
        tls.context = _watching

    def note(self) -> None:
        """One more KeyUpdate has arrived, and is about to be processed."""
        self.count += 1
        if self.count > MOST:
            if isinstance(self._tls, PiecewiseTls):
                self._tls.discard()
            if self.count == MOST + 1:
                self._on_flood()

    def release(self) -> None:
        """Stop counting."""
        self._tls.context = self._before
        self._tls._grpc_h2_key_updates = None  # type: ignore[attr-defined]


def _on_message(tls: Any, direction: str, version: int, content: int, kind: int, octets: bytes) -> None:
    if content == _HANDSHAKE and kind == _KEY_UPDATE and direction == "read":
        watch = getattr(tls, "_grpc_h2_key_updates", None)
        if watch is not None:
            watch.note()


def _context() -> ssl.SSLContext:
    """A context that replaces the connection's own context while its KeyUpdates are counted."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if hasattr(context, "_msg_callback"):
        # This bypasses the property of `ssl`, which makes three enum members for each message and each record and takes
        # 1.7 µs.
        super(ssl.SSLContext, ssl.SSLContext)._msg_callback.__set__(context, _on_message)  # type: ignore[misc]
    return context


_watching = _context()
