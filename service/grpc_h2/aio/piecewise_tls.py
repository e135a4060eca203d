"""TLS records are decrypted piece by piece, a time slice of them in each iteration of the event loop.

**Theory of operation.** An event loop reads up to 256 kB of a TLS connection at a time and has OpenSSL process all of
it before it does anything else. A record may have 22 octets, so that is 11,000 records: 5 ms where each holds one
octet, and 120 ms where each is a KeyUpdate (RFC 8446, section 4.6.3), which costs new keys and an answer. Nothing of
HTTP/2's limits sees them before that.

So what the loop has read is handed to OpenSSL `PIECE` octets at a time, for about `TIME_SLICE` seconds. What is left
stays where the loop put it, which therefore stops reading the socket when that becomes too much. `PiecewiseTls.on_more`
is called: the protocol stops reading, and continues when the scheduler gives it its next turn.

A handshake is not divided: OpenSSL limits its messages. Nor is a connection that closes, which no protocol reads any
more: for it `CLOSING` seconds are the limit, and beyond them it is ended.

Both event loops make their connections by `ssl.SSLContext.wrap_bio`, and call the `ssl.SSLObject` that it returns.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

PIECE: Final = 1024
"""Octets: at most 38 KeyUpdates, some 0.5 ms, as much as a handshake."""
TIME_SLICE: Final = 0.0001
"""Seconds. The piece during which it ends is not interrupted."""
CLOSING: Final = 0.002
"""Seconds for what has arrived when a connection closes: at least a window of requests."""


class PiecewiseTls(ssl.SSLObject):
    """A connection of a `ServerContext`."""

    on_more: Callable[[], bool] | None = None
    """Called where a time slice is over and more has arrived. Returns whether the connection will be read again;
    otherwise it closes. While it is None, nothing is divided."""

    _arrived: ssl.MemoryBIO
    """Where the event loop writes."""
    _piece: ssl.MemoryBIO
    """From where OpenSSL reads."""
    _slice_end = 0.0
    """0: no time slice has begun that more than one piece belongs to."""
    _closing = False

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - the name that it has in `ssl`
        """See `ssl.SSLObject.read`."""
        while True:
            # To ask first is cheaper than OpenSSL's SSLWantReadError.
            arrived = self._arrived.pending
            if arrived and not self._piece.pending:
                if arrived > PIECE or self._slice_end:
                    self._take_piece()
                else:  # the usual case, in which nothing is divided
                    self._piece.write(self._arrived.read())
            try:
                return self._sslobj.read(len) if buffer is None else self._sslobj.read(len, buffer)  # type: ignore[attr-defined]
            except ssl.SSLWantReadError:
                if not self._arrived.pending:
                    raise

    def pending(self) -> int:
        """See `ssl.SSLObject.pending`. More than 0 where `read` may give something: uvloop asks before it reads."""
        return self._sslobj.pending() + self._piece.pending  # type: ignore[attr-defined, no-any-return]

    def do_handshake(self) -> None:
        """See `ssl.SSLObject.do_handshake`. Takes no more than the handshake needs, but for the rest of a piece."""
        while True:
            try:
                super().do_handshake()
                return
            except ssl.SSLWantReadError:
                if not self._arrived.pending:
                    raise
                self._piece.write(self._arrived.read(PIECE))

    def unwrap(self) -> None:
        """See `ssl.SSLObject.unwrap`."""
        while True:
            try:
                super().unwrap()
                return
            except ssl.SSLWantReadError:
                if not self._arrived.pending:
                    raise
                self._take_piece()

    def discard(self) -> None:
        """Throw away what has arrived and is not processed yet. The connection cannot be used any more."""
        self._arrived.read()
        self._piece.read()

    def _take_piece(self) -> None:
        """Give the next piece to OpenSSL, unless it is for a later time slice."""
        on_more = self.on_more
        if on_more is None:
            self._piece.write(self._arrived.read())
            return
        if self._slice_end and perf_counter() >= self._slice_end:
            self._end_slice(on_more)
        self._piece.write(self._arrived.read(PIECE))
        if not self._arrived.pending:
            self._slice_end = 0.0
        elif not self._slice_end:
            self._slice_end = perf_counter() + TIME_SLICE

    def _end_slice(self, on_more: Callable[[], bool]) -> None:
        """Raise what makes the event loop stop for now, or, where the connection closes, for good."""
        if self._closing:
            raise ssl.SSLError("too much has arrived on a connection that closes")
        if on_more():
            self._slice_end = 0.0
            raise ssl.SSLWantReadError
        self._closing = True
        self._slice_end = perf_counter() + CLOSING


class ServerContext(ssl.SSLContext):
    """A context whose connections decrypt piece by piece."""

    sslobject_class = PiecewiseTls

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, *more: Any, **options: Any) -> PiecewiseTls:
        """See `ssl.SSLContext.wrap_bio`."""
        piece = ssl.MemoryBIO()
        made = super().wrap_bio(piece, outgoing, *more, **options)
        assert isinstance(made, PiecewiseTls)
        made._arrived, made._piece = incoming, piece
        return made
