"""The lingering close of a connection: the time between its last GOAWAY and the end of its socket.

Closing a socket with unread input makes the kernel send RST, which may destroy the GOAWAY on its way (RFC 9113 section
5.4.1). So the connection is flushed and half-closed, and then read for a while longer; the octets that arrive are
thrown away. This ends after `LINGER` seconds or `OCTETS` octets.

For a client that was disconnected because it floods us, the limit is `_OCTETS_OF_A_FLOOD` octets. Its connection is
half-closed after `_PAUSE` seconds; if more octets than that limit have arrived by then, the connection is aborted.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from fcntl import ioctl
from termios import FIONREAD

LINGER = 1.0
"""Seconds that a connection is read after its last GOAWAY."""
OCTETS = 2 * 1024 * 1024
"""The most octets that are read after the last GOAWAY. Our windows do not allow an honest client to have more in
flight."""
_OCTETS_OF_A_FLOOD = 64 * 1024
"""The most octets that are read after the last GOAWAY to a client that was disconnected with ENHANCE_YOUR_CALM."""
_PAUSE = 0.01
"""Seconds between the last GOAWAY and the first read of octets that are thrown away, and between two such reads."""


class LingeringClose:
    """Ends one connection. Start it with `proceed`; call `cancel` when the transport is gone."""

    __slots__ = ("_defer", "_flood", "_loop", "_octets_allowed", "_started", "_timer", "_transport", "octets")

    def __init__(
        self,
        transport: asyncio.Transport,
        loop: asyncio.AbstractEventLoop,
        defer: Callable[[Callable[[], object]], None],
        *,
        flood: bool,
    ) -> None:
        """``defer``: a function that defers a piece of work of this connection. ``flood``: whether the client was
        disconnected because it floods us."""
        self._transport = transport
        self._loop = loop
        self._defer = defer
        self._flood = flood
        self._octets_allowed = _OCTETS_OF_A_FLOOD if flood else OCTETS
        self._started = False
        self._timer: asyncio.TimerHandle | None = None
        self.octets = 0
        """Octets that were read and thrown away."""

    def proceed(self, *, writable: bool, stall_timeout: float) -> None:
        """Flush the transport's buffer and, once the buffer is empty, half-close and linger.

        Call it again when the buffer has emptied. ``writable``: whether the transport takes output. ``stall_timeout``:
        seconds after which a connection that cannot be flushed is aborted.
        """
        if self._started:
            return
        transport = self._transport
        if transport.get_write_buffer_size() or not writable:
            transport.set_write_buffer_limits(0)  # `resume_writing` is called when the last octet has been sent
            transport.resume_reading()
            if self._timer is None:
                self._timer = self._loop.call_later(stall_timeout, transport.abort)
            return
        self._started = True
        self.cancel()
        self._timer = self._loop.call_later(LINGER, transport.close)
        self._pause()
        if not self._flood:  # a flooding connection may have to be aborted: wait first to see whether the flood ends
            self._half_close()

    def data_received(self, size: int) -> None:
        """``size`` octets arrived, and are thrown away."""
        self.octets += size
        self._pause()

    def cancel(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def read_on(self) -> bool:
        """Continue reading. Returns True, which ends the time slice, if reading may end the connection at once."""
        transport = self._transport
        if transport.is_closing():
            return False
        if self.octets + _unread(transport) > self._octets_allowed:
            transport.abort()
            return True
        if self._flood and not self.octets:
            self._half_close()
        transport.resume_reading()
        return True

    def _pause(self) -> None:
        # libuv makes up to 32 reads of 250 kB from one socket before it serves the next. The pauses prevent that here.
        self._transport.pause_reading()
        self._loop.call_later(_PAUSE, self._defer, self.read_on)

    def _half_close(self) -> None:
        # TLS has no half-close here: a TLS client gets the end of the stream when we close.
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()
            except OSError:  # the client has closed already, so the socket is not connected any more
                self._transport.abort()


def _unread(transport: asyncio.BaseTransport) -> int:
    """Octets of the connection that wait in the kernel (FIONREAD, tcp(7))."""
    held = array("i", [0])
    sock = transport.get_extra_info("socket")
    if sock is not None:  # a transport of asyncio may have no socket
        ioctl(sock.fileno(), FIONREAD, held)
    return held[0]
