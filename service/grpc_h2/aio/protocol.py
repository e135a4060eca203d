"""A `Connection` on an event loop: an asyncio protocol that reads, writes, keeps time, and leaves in order.

**Theory of operation.** All decisions are the connection's; the shell carries octets and events. Whatever happens
(octets, a handler's message, a timer) ends in one `_settle`: write what may go, hand out events, stop or go on
reading. What handlers send within one turn of the loop is written together (`wake`).

**Fairness.** A turn is bounded on both sides: ``backlog`` says that input is left over, a full budget that output is.
Either is taken up when the `FairScheduler` says so, behind the work of other connections; meanwhile nothing is read.

**Time.** Ten thousand idle connections must cost nothing, and a busy one no clock arithmetic per packet. So an idle
connection has one timer at its next deadline; traffic may bring that forward, and asks for a second look within
`Host.timer_slack` seconds, once, however much traffic there is.

**Leaving.** After the last GOAWAY the shell flushes, half-closes, and reads on, for `LINGER` seconds and
`_LINGER_OCTETS` octets at the most: closing a socket with unread input makes the kernel send RST, which may destroy
the GOAWAY on its way (RFC 9113 section 5.4.1). Who was cut off for flooding us, and still does, is not read: its
GOAWAY has `_LINGER_PAUSE` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import random
from array import array
from collections.abc import Mapping
from fcntl import ioctl
from termios import FIONREAD
from time import perf_counter
from typing import Any, Protocol, cast

from grpc_h2.aio.rate_limited_log import RateLimitedLog
from grpc_h2.aio.scheduler import FairScheduler
from grpc_h2.aio.tls import peer_identity
from grpc_h2.connection.connection import Connection
from grpc_h2.connection.events import (
    CallCancelled,
    CallStarted,
    ConnectionClosing,
    Event,
    HalfClosed,
    MessageReceived,
)
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream
from grpc_h2.static.routes import Router
from grpc_h2.wire.errors import ErrorCode

LINGER = 1.0
"""Seconds that we read on after the last GOAWAY."""
_LINGER_OCTETS = 2 * 1024 * 1024
"""Octets that we read on for; what an honest client has under way is within the windows we gave it."""
_LINGER_OCTETS_OF_A_FLOOD = 64 * 1024
"""The same for who was told to calm down."""
_LINGER_PAUSE = 0.01
"""Seconds between the last GOAWAY and the first read of what is thrown away, and between two reads."""
_FREED_AT_ONCE = 32
"""Streams of a connection that has ended: some 50 µs."""
_LARGE = 16 * 1024
"""Octets in one read that are more than a client has to say who waits for answers."""


class Host(Protocol):
    """What a shell needs of its server."""

    complaints: RateLimitedLog
    doors: Router
    limits: Limits
    timer_slack: float
    """Seconds by which a deadline may be noticed late once traffic has brought it forward."""
    turns: FairScheduler

    def connected(self, shell: Http2Protocol) -> None:
        """The connection begins."""

    def disconnected(self, shell: Http2Protocol) -> None:
        """The connection is gone, its calls have been told."""

    def call_started(self, shell: Http2Protocol, stream: Stream) -> None:
        """A call needs a handler. Set ``stream.call``, or end the call."""

    def answered(self, answer_ids: list[int], seconds: float) -> None:
        """A batch of ready answers was written ``seconds`` after its requests were read. The list is not kept."""


class Http2Protocol(asyncio.Protocol):
    """One connection. Made by the protocol factory of a listening socket."""

    __slots__ = (
        "_brisk",
        "_heard",
        "_host",
        "_linger_octets",
        "_lingering",
        "_loop",
        "_queued",
        "_reading",
        "_timer",
        "_timer_at",
        "_transport",
        "_waking",
        "closing",
        "connection",
        "established",
    )

    _transport: asyncio.Transport
    connection: Connection

    def __init__(self, host: Host, loop: asyncio.AbstractEventLoop) -> None:
        self._host = host
        self._loop = loop
        self._reading = True
        self._waking = False
        self._queued = False
        self._brisk = False
        self._heard = 0
        self._linger_octets = _LINGER_OCTETS
        self._lingering = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.closing = False
        """The last GOAWAY is out, or the transport is gone."""
        self.established = False
        """`connection_made` has come, so `connection_lost` will."""

    # -- what the transport says ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.connection = Connection(self._host.doors, self._host.limits, self._loop.time(), random.uniform(-1, 1))
        self.established = True
        self._host.connected(self)
        tls = transport.get_extra_info("ssl_object")
        # RFC 9113 section 3.2: "Implementations that support HTTP/2 over TLS MUST use protocol negotiation in TLS".
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._host.complaints.tell(self._loop.time(), logging.INFO, "A client did not negotiate h2", self._name)
            self.closing = True
            self._transport.abort()
            return
        self._settle()
        self._set_timer(self.connection.next_deadline())

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if not self.closing:
            if len(data) > _LARGE:
                self.connection.hold(data, self._loop.time())
                self._go_on_later()
                self._read_on(False)
                return
            begun = perf_counter()  # the loop's own clock may stand still within a turn, and count in milliseconds
            connection = self.connection
            answer = connection.answer_one(data, self._loop.time())
            if answer is None:
                self._receive(data)
                return
            self._transport.write(answer)
            self._host.answered(connection.answered, perf_counter() - begun)
            connection.answered.clear()
            if not self._brisk:
                self._look_soon()
            return
        self._heard += len(data)
        self._hear_on_later()

    def eof_received(self) -> None:
        """The peer has shut its side: as in every gRPC implementation, it is gone (the transport closes itself)."""

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self.closing = True
        self._set_timer(None)
        self._dispatch(self.connection.connection_lost())
        self._host.disconnected(self)
        self._free_some()

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        self.connection.pause_writing(self._loop.time())

    def resume_writing(self) -> None:
        """The transport's buffer has room."""
        self.connection.resume_writing(self._loop.time())
        self._settle()
        if not self.closing and self.connection.backlog:
            self._go_on_later()

    # -- what the server and its calls say ------------------------------------------------------------------------

    def wake(self) -> None:
        """Something may have to be written: do it in the next turn of the loop, once."""
        if not self._waking and not self._transport.is_closing():
            self._waking = True
            self._loop.call_soon(self._turn)

    def drain(self) -> None:
        """Serve the calls that the client has begun, take no more, and leave."""
        self.connection.drain(self._loop.time())
        self._settle()
        self._look_soon()

    def close(self, code: int = ErrorCode.NO_ERROR, reason: str = "") -> None:
        """Leave now: running calls end as cancelled; GOAWAY is flushed."""
        self.connection.close(code, reason)
        self._settle()

    def abort(self) -> None:
        """Drop the transport; nothing more is written."""
        self._transport.abort()

    def _name(self) -> str:
        return self.peer

    @property
    def peer(self) -> str:
        """The peer's address as gRPC writes it: ``ipv4:127.0.0.1:50051``, ``ipv6:%5B::1%5D:50051``."""
        address = self._transport.get_extra_info("peername")
        if not isinstance(address, tuple) or len(address) < 2:
            return "unix:"
        host, port = address[:2]
        return f"ipv6:%5B{host}%5D:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def auth_context(self) -> Mapping[str, list[bytes]]:
        """What TLS knows of the peer, in gRPC's words; empty without TLS."""
        tls: Any = self._transport.get_extra_info("ssl_object")
        return {} if tls is None else peer_identity(tls)

    # -- one turn -------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        self._waking = False
        if not self._transport.is_closing():
            self._settle()
            self._look_soon()

    def _go_on_later(self) -> None:
        """Input or output is left over: take it up behind other connections."""
        if not self._queued:
            self._queued = True
            self._host.turns.join(self._loop, self._go_on)

    def _go_on(self) -> None:
        self._queued = False
        if self._transport.is_closing():
            return
        if self.connection.backlog and self.connection.wants_read:
            self._receive(b"")
        else:
            self._settle()
            self._look_soon()

    def _receive(self, data: bytes) -> None:
        connection = self.connection
        begun = perf_counter()  # the loop's own clock may stand still within a turn, and count in milliseconds
        events = connection.receive_data(data, self._loop.time())
        if events:
            self._dispatch(events)
        self._settle()
        if connection.answered:
            self._host.answered(connection.answered, perf_counter() - begun)
            connection.answered.clear()
        if connection.backlog and not self.closing:
            self._go_on_later()
        if not self._brisk:
            self._look_soon()

    def _settle(self) -> None:
        """Write what may go, hand out what that brings about, and decide whether to read on."""
        connection, transport = self.connection, self._transport
        if transport.is_closing():
            return
        pieces = connection.data_to_send()
        if pieces:
            if len(pieces) == 1:
                transport.write(pieces[0])
                size = len(pieces[0])
            else:
                transport.writelines(pieces)
                size = sum(map(len, pieces))
            if size >= connection.limits.octets_per_turn:
                self._go_on_later()
        if connection.eventful:
            self._dispatch(connection.take_events())
            self.wake()  # a handler's call may have been ended at once
        if connection.terminated:
            self._leave()
            return
        self._read_on(not connection.backlog and connection.wants_read)

    def _read_on(self, reading: bool) -> None:
        if reading is not self._reading:
            self._reading = reading
            (self._transport.resume_reading if reading else self._transport.pause_reading)()

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ConnectionClosing):
                self._tell_closing(event)
                continue
            stream = event.stream
            if isinstance(event, CallStarted):
                self._host.call_started(self, stream)
            elif stream.call is None:  # refused at its start
                if isinstance(event, MessageReceived):
                    self.connection.consumed(stream, len(event.message))
            elif isinstance(event, MessageReceived):
                stream.call.message_received(event.message)
            elif isinstance(event, HalfClosed):
                stream.call.half_closed()
            elif isinstance(event, CallCancelled):
                stream.call.peer_cancelled()
            else:
                stream.call.writable()

    def _tell_closing(self, event: ConnectionClosing) -> None:
        tell, now = self._host.complaints.tell, self._loop.time()
        if event.code == ErrorCode.ENHANCE_YOUR_CALM:
            self._linger_octets = _LINGER_OCTETS_OF_A_FLOOD
            tell(now, logging.WARNING, "A client was cut off", self._name, error=event.reason)
        elif event.code != ErrorCode.NO_ERROR:
            tell(now, logging.INFO, "A client broke the protocol", self._name, error=event.reason)

    # -- time -----------------------------------------------------------------------------------------------------

    def _look_soon(self) -> None:
        """Traffic may have brought a deadline forward."""
        if self._brisk or self.closing:
            return
        self._brisk = True
        soon = self._loop.time() + self._host.timer_slack
        if self._timer is None or soon < self._timer_at:
            self._set_timer(soon)

    def _set_timer(self, instant: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if instant is not None and not self.closing:
            self._timer_at = instant
            self._timer = self._loop.call_at(instant, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._brisk = False
        events = self.connection.tick(self._loop.time())
        if events:
            self._dispatch(events)
        self._settle()
        if not self.closing:
            self._set_timer(self.connection.next_deadline())

    # -- leaving --------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """Flush, then half-close, then hear the peer out. Called again when the transport's buffer has emptied."""
        transport = self._transport
        if not self.closing:
            self._set_timer(None)
            self.closing = True
            self._free_some()
        if self._lingering:
            return
        if transport.get_write_buffer_size() or not self.connection.wants_read:
            self._flush_first()
            return
        self._lingering = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(LINGER, transport.close)
        self._hear_on_later()
        if self._linger_octets == _LINGER_OCTETS:  # a flood's connection may have to be cut: first see whether it ends
            self._half_close()

    def _flush_first(self) -> None:
        """Leave once the last octet has: `resume_writing` tells."""
        transport = self._transport
        transport.set_write_buffer_limits(0)
        self._read_on(True)
        if self._timer is None:
            stalled = self._loop.time() + self.connection.limits.stall_timeout
            self._timer = self._loop.call_at(stalled, transport.abort)

    def _half_close(self) -> None:
        # TLS has no half-close in asyncio: there the client hears of the end when it closes, or when we do.
        if self._transport.can_write_eof():
            try:
                self._transport.write_eof()
            except OSError:  # the peer was faster: the socket is not connected any more
                self._transport.abort()

    def _free_some(self) -> None:
        forgotten = self.connection.forgotten
        for _ in range(min(_FREED_AT_ONCE, len(forgotten))):
            forgotten.popitem()
        if forgotten:
            self._host.turns.join(self._loop, self._free_some)

    def _hear_on_later(self) -> None:
        # libuv takes up to 32 reads of 250 kB from one socket before it looks at the next: not from this one.
        self._read_on(False)
        self._loop.call_later(_LINGER_PAUSE, self._host.turns.join, self._loop, self._hear_on)

    def _hear_on(self) -> bool:
        """Read what has come, behind which the end may come at once: the last turn of its slice."""
        transport = self._transport
        if transport.is_closing():
            return False
        if self._heard + _unread(transport) > self._linger_octets:
            transport.abort()
            return True
        if self._linger_octets != _LINGER_OCTETS and not self._heard:
            self._half_close()
        self._read_on(True)
        return True


def _unread(transport: asyncio.BaseTransport) -> int:
    """Octets that the kernel holds for us (FIONREAD, tcp(7))."""
    held = array("i", [0])
    sock = transport.get_extra_info("socket")
    if sock is not None:  # asyncio allows transports without
        ioctl(sock.fileno(), FIONREAD, held)
    return held[0]
