"""Decrypts TLS records piece by piece, for a time slice in each iteration of the event loop.

**Theory of operation.** An event loop reads up to 256 kB of a TLS connection at a time and has OpenSSL process all of
these octets before it does other work. A record may have as few as 22 octets, so one read may bring 11,000 records.
They take 5 ms if each record holds one octet, and 120 ms if each is a KeyUpdate (RFC 8446, section 4.6.3), which needs
new keys and an answer. The limits of HTTP/2 apply only after decryption.

So the octets that the loop has read are handed to OpenSSL `PIECE` octets at a time, for about `TIME_SLICE` seconds. The
rest stays in the buffer into which the loop writes, and the loop stops reading the socket when that buffer is too full.
`PiecewiseTls.on_more` is called: the protocol stops reading, and continues in its next time slice of the scheduler.

A handshake is not divided: OpenSSL limits its messages. The input of a connection that closes is thrown away without
decryption (`tls_transport`).
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from time import perf_counter
from typing import Any, Final

PIECE: Final = 1024
"""Octets of a piece. A piece holds at most 38 KeyUpdates, which take some 0.5 ms, as long as a handshake."""
TIME_SLICE: Final = 0.0001
"""Seconds of decryption at a time. The piece during which they end is not interrupted."""


class PiecewiseTls(ssl.SSLObject):
    """A connection of a `ServerContext`."""

    on_more: Callable[[], None] | None = None
    """Called when a time slice is over and more octets have arrived: `read` has to be called again, in a later time
    slice. While this attribute is None, the input is not divided."""

    _arrived: ssl.MemoryBIO
    """The buffer into which the transport writes."""
    _piece: ssl.MemoryBIO
    """The buffer from which OpenSSL reads."""
    _slice_end = 0.0
    """The end of the present time slice; 0 outside a time slice of several pieces."""

    def read(self, len: int = 1024, buffer: Any = None) -> Any:  # noqa: A002 - the name that it has in `ssl`
        """See `ssl.SSLObject.read`."""
        while True:
            # A check before the call is cheaper than OpenSSL's SSLWantReadError.
            arrived = self._arrived.pending
            if arrived and not self._piece.pending:
                if arrived > PIECE or self._slice_end:
                    self._take_piece()
                else:  # the usual case: one piece is enough
                    self._piece.write(self._arrived.read())
            try:
                return self._sslobj.read(len) if buffer is None else self._sslobj.read(len, buffer)  # type: ignore[attr-defined]
            except ssl.SSLWantReadError:
                if not self._arrived.pending:
                    raise

    def pending(self) -> int:
        """See `ssl.SSLObject.pending`. The result is above 0 if `read` may return octets: uvloop checks this before it
        reads."""
        return self._sslobj.pending() + self._piece.pending  # type: ignore[attr-defined, no-any-return]

    def do_handshake(self) -> None:
        """See `ssl.SSLObject.do_handshake`. Takes only the octets that the handshake needs, and the rest of the last
        piece."""
        while True:
            try:
                super().do_handshake()
                return
            except ssl.SSLWantReadError:
                if not self._arrived.pending:
                    raise
                self._piece.write(self._arrived.read(PIECE))

    def discard(self) -> None:
        """Throw away the octets that have arrived and are not processed yet. The connection cannot be used any more."""
        self._arrived.read()
        self._piece.read()

    def _take_piece(self) -> None:
        """Give the next piece to OpenSSL, unless the piece is left for a later time slice."""
        on_more = self.on_more
        if on_more is None:
            self._piece.write(self._arrived.read())
            return
        if self._slice_end and perf_counter() >= self._slice_end:
            self._slice_end = 0.0
            on_more()
            raise ssl.SSLWantReadError
        self._piece.write(self._arrived.read(PIECE))
        if not self._arrived.pending:
            self._slice_end = 0.0
        elif not self._slice_end:
            self._slice_end = perf_counter() + TIME_SLICE


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
