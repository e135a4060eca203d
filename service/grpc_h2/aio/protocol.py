"""A `Connection` on an event loop: an asyncio protocol that reads, writes, sets timers and closes.

**Theory of operation.** The connection makes all decisions; the protocol moves octets and events between it, the
transport and the server. Every cause (octets, a handler's message, a timer) ends in one `_settle`: write all output
that may be written, hand out events, stop or continue reading. Everything that handlers send within one iteration of
the event loop is written together (`wake`).

**Fairness.** The work of a connection in one iteration of the loop is bounded on both sides: ``backlog`` is true while
input is left to process, and a used-up budget means that output is left. In either case the rest is deferred to the
`FairScheduler`: it is done after the work that other connections have deferred already, and networks take turns. Until
the rest is done, nothing is read from this connection.

**Strangers.** A connection whose peer has not proved its right to be served (`Trust`) is served in the time that
clients leave: its input is not processed when it arrives, but deferred to the strangers' share of the time slices. The
first few reads of such a connection are processed at once, so that a probe and a new client are answered without delay.
When a call is authorised, the connection counts as a client's until it ends.

**Time.** Ten thousand idle connections must not need CPU time, and a busy connection must not compute deadlines for
each packet. So an idle connection has one timer, set to its next deadline. Traffic may bring a deadline forward: the
first traffic sets the timer to at most `Host.timer_slack` seconds from now, and further traffic does not set it again.

**Closing.** After the last GOAWAY the connection is flushed, half-closed and read for a while longer: see
`lingering_close`.

The clock is read here, and its times are passed to the connection: the loop's clock for deadlines, and ``perf_counter``
for the duration of a batch, because the loop's clock may not advance within an iteration, and may count in
milliseconds.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import random
from collections.abc import Mapping
from math import inf
from time import perf_counter
from typing import Any, Protocol, cast

from grpc_h2.aio.admission import REASONS, Refusal, Trust
from grpc_h2.aio.foreign import FirstOctets, Foreign
from grpc_h2.aio.key_updates import KeyUpdates
from grpc_h2.aio.lingering_close import LINGER, LingeringClose
from grpc_h2.aio.peer import peer_text
from grpc_h2.aio.piecewise_tls import PiecewiseTls
from grpc_h2.aio.rate_limited_log import RateLimitedLog
from grpc_h2.aio.scheduler import FairScheduler, Share
from grpc_h2.aio.tls import peer_identity
from grpc_h2.aio.tls_transport import Secured
from grpc_h2.connection.budget import Budget
from grpc_h2.connection.connection import Connection
from grpc_h2.connection.events import (
    AnswerCutOff,
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

_STREAMS_RELEASED_AT_ONCE = 32
"""The number of streams of an ended connection that are released at a time, in some 50 µs."""
_LARGE_READ = 16 * 1024
"""Octets above which a read is large. A client that waits for its answers sends less than this between two reads."""
_EARLY_READS = 8
"""The number of reads of a new connection that are processed as soon as they arrive. A probe of the kubelet (grpc-go)
makes four: its preface, its acknowledgement of SETTINGS, its call, an acknowledgement of PING."""


class Host(Protocol):
    """The part of the server that a protocol uses."""

    budget: Budget
    """The memory budget of connections that have made a call which the server admits."""
    strangers: Budget
    """The memory budget of connections that have made no such call."""
    client_log: RateLimitedLog
    limits: Limits
    router: Router
    scheduler: FairScheduler
    timer_slack: float
    """Seconds by which a deadline may be noticed late once traffic has brought it forward."""

    def connected(self, protocol: Http2Protocol) -> None:
        """The connection begins."""

    def disconnected(self, protocol: Http2Protocol) -> None:
        """The connection is gone, and its calls have been notified."""

    def call_started(self, protocol: Http2Protocol, stream: Stream) -> None:
        """A call needs a handler. Set ``stream.call``, or end the call."""

    def observe(self, answer_ids: list[int], seconds: float) -> None:
        """A batch of ready answers was written ``seconds`` after its requests were read. The receiver must not keep the
        list."""


class Acceptor(Protocol):
    """The listener that accepted a connection. It is informed of the connection's trust and end."""

    def vouched(self, protocol: Http2Protocol) -> None:
        """The connection's trust has risen."""

    def abandon(self, protocol: Http2Protocol) -> None:
        """End the connection, which is not established yet."""

    def dismissed(self, protocol: Http2Protocol, refusal: Refusal) -> None:
        """The connection was closed although nothing that it sent is wrong: log and count the close."""

    def closed(self, protocol: Http2Protocol) -> None:
        """The connection has ended."""


class Http2Protocol(Secured):
    """One connection. A listener makes it for each socket that it accepts."""

    __slots__ = (
        "_acceptor",
        "_address",
        "_deferred",
        "_early_reads",
        "_flood",
        "_granted",
        "_host",
        "_key_updates",
        "_lingering_close",
        "_loop",
        "_opening",
        "_prompt",
        "_reading",
        "_tick_is_soon",
        "_timer",
        "_timer_at",
        "_transport",
        "_undecrypted",
        "_waking",
        "active_at",
        "arrival",
        "closing",
        "connection",
        "established",
        "network",
        "trust",
    )

    _transport: asyncio.Transport
    connection: Connection

    def __init__(
        self,
        host: Host,
        loop: asyncio.AbstractEventLoop,
        acceptor: Acceptor | None = None,
        address: Any = None,
        *,
        network: str = "",
        returning: bool = False,
    ) -> None:
        """
        Args:
            host: The server.
            loop: Its loop.
            acceptor: The listener.
            address: The peer's address, as returned by ``accept``; None: the transport supplies it.
            network: The peer's network (`admission.network_of`), which takes turns with other networks.
            returning: Whether a client has connected from that network before.
        """
        self._host = host
        self._loop = loop
        self._acceptor = acceptor
        self._address = address
        self._prompt = False
        """Whether octets are processed as soon as they arrive: the peer is a client, and the connection is not
        closing."""
        self._early_reads = _EARLY_READS
        self._opening: FirstOctets | None = FirstOctets()
        """Holds the first octets until it is clear whether they are HTTP/2's preface."""
        self.network = network
        """The network with which the deferred work of this connection is counted."""
        self.arrival = Share.RETURNING if returning else Share.ARRIVALS
        """The share in which the connection is set up, and its first octets are processed."""
        self.trust = Trust.STRANGER
        """What the peer has proved so far."""
        self.active_at = -inf
        """The instant at which a peer that is not a client last sent something."""
        self._reading = True
        self._waking = False
        self._deferred = False
        self._tick_is_soon = False
        self._flood = False
        self._lingering_close: LingeringClose | None = None
        self._key_updates: KeyUpdates | None = None
        self._undecrypted = False
        """Whether TLS records have arrived that wait for a time slice."""
        self._granted = False
        """Whether the content of a stranger's records is processed as soon as they are decrypted, because both belong
        to one time slice."""
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self.closing = False
        """Whether the last GOAWAY has been written, or the transport is gone."""
        self.established = False
        """Whether `connection_made` has been called, so that `connection_lost` will also be called."""

    # -- called by the transport ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.BaseProtocol`."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has another base class
        self.connection = Connection(
            self._host.router,
            self._host.limits,
            self._loop.time(),
            random.uniform(-1, 1),
            budget=self._host.strangers,
            on_eviction=self._evicted,
        )
        self.established = True
        self._host.connected(self)
        tls = transport.get_extra_info("ssl_object")
        # RFC 9113 section 3.2: "Implementations that support HTTP/2 over TLS MUST use protocol negotiation in TLS".
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._log(logging.INFO, "A client did not negotiate h2")
            self.closing = True
            self._transport.close()  # with close_notify
            return
        if tls is not None:
            self._key_updates = KeyUpdates(tls, self._on_key_updates)
            if isinstance(tls, PiecewiseTls):
                tls.on_more = self._decrypt_later
            self._granted = True
            self._settle()
        # Without TLS, our SETTINGS are not sent before the client's first octets, which may not be HTTP/2.
        self._set_timer(self.connection.next_deadline())

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._prompt:
            if len(data) > _LARGE_READ:
                self.connection.hold(data, self._loop.time())
                self._defer()
                self._set_reading(False)
                return
            begun = perf_counter()
            connection = self.connection
            answer = connection.answer_one(data, self._loop.time())
            if answer is None:
                self._receive(data)
                return
            self._transport.write(answer)
            self._host.observe(connection.answered, perf_counter() - begun)
            connection.answered.clear()
            if not self._tick_is_soon:
                self._tick_soon()
            return
        if not self.closing:
            self._stranger_received(data)
        elif self._lingering_close is not None:
            self._lingering_close.data_received(len(data))

    def eof_received(self) -> None:
        """The peer has closed its side. As in every gRPC implementation, the connection ends: the transport closes."""
        if self._transport.get_write_buffer_size():
            self._abort_after(self._host.limits.stall_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.BaseProtocol`."""
        self.closing = True
        self._prompt = False
        self._set_timer(None)
        self._count_key_updates_no_more()
        tls = self._transport.get_extra_info("ssl_object")
        if isinstance(tls, PiecewiseTls):
            tls.on_more = None  # ends a reference cycle
        if self._lingering_close is not None:
            self._lingering_close.cancel()
        self._dispatch(self.connection.connection_lost())
        self._host.disconnected(self)
        if self._acceptor is not None:
            self._acceptor.closed(self)
        self._release_streams()

    def pause_writing(self) -> None:
        """The transport's buffer is full. Nothing more is read: OpenSSL answers some records itself."""
        self.connection.pause_writing(self._loop.time(), self._transport.get_write_buffer_size())
        if not self.closing:
            self._set_reading(False)

    def resume_writing(self) -> None:
        """The transport's buffer has room."""
        if self._lingering_close is None:
            self._transport.set_write_buffer_limits()  # the default: see `_note_unread`
        self.connection.resume_writing(self._loop.time())
        self._settle()
        self._tick_soon()
        if not self.closing and self.connection.backlog:
            self._defer()

    # -- called by the server and its calls -----------------------------------------------------------------------

    def wake(self) -> None:
        """Output may have to be written: schedule one write for the next iteration of the loop."""
        if not self._waking and not self._transport.is_closing():
            self._waking = True
            self._loop.call_soon(self._woken)

    def _evicted(self) -> None:
        """The connection was ended because the server is short of memory. If the peer reads nothing, GOAWAY would not
        arrive, and the octets that wait for the peer would stay in memory, so the transport is dropped."""
        self.wake()
        if not self.connection.wants_read:
            self._loop.call_soon(self.abort)

    def drain(self) -> None:
        """Serve the calls that the client has begun, accept no more, and close. A connection that is not established
        yet drains as soon as it is established."""
        if not self.established:
            return
        self.connection.drain(self._loop.time())
        self._settle()
        self._tick_soon()

    def close(self, code: int = ErrorCode.NO_ERROR, reason: str = "") -> None:
        """Close now: running calls end as cancelled; GOAWAY is flushed."""
        self.connection.close(code, reason)
        self._settle()

    def cut_answers(self, before: float) -> None:
        """Give up answers that have waited to be read since the instant ``before`` of the loop's clock, or longer."""
        if not self.closing:
            self.connection.cut_answers(before)
            if self.connection.eventful:
                self.wake()

    @property
    def unread(self) -> int:
        """Octets that wait for the peer to read, without the octets in the kernel."""
        return self._transport.get_write_buffer_size() + self.connection.unsent if self.established else 0

    def drop_stalled(self) -> None:
        """Close without GOAWAY, because the server stops and the peer reads nothing."""
        self._log(logging.WARNING, "A client was cut off", error="it reads nothing while the server stops")
        self.abort()

    def abort(self) -> None:
        """Drop the transport; no more output is written."""
        self._transport.abort()

    def vouch(self, trust: Trust) -> None:
        """The peer has proved that it deserves ``trust``."""
        if trust <= self.trust:
            return
        if self.trust is Trust.STRANGER and self.established:
            self.connection.count_in(self._host.budget)
        self.trust = trust
        self._prompt = trust is Trust.CLIENT and not self.closing
        if trust is Trust.CLIENT:
            self._count_key_updates_no_more()
        if self._acceptor is not None:
            self._acceptor.vouched(self)

    def dismiss(self, refusal: Refusal) -> None:
        """Close now although nothing that the peer sent is wrong: GOAWAY gives the reason, and the acceptor logs it."""
        if self._acceptor is not None:
            self._acceptor.dismissed(self, refusal)
            if not self.established:
                self._acceptor.abandon(self)
                return
        if self._transport.is_closing():
            return
        if self._lingering_close is not None:  # the GOAWAY is sent, and our side of the connection is closed
            self._transport.close()
            return
        self.connection.close(ErrorCode.NO_ERROR, REASONS[refusal])
        self._dispatch([event for event in self.connection.take_events() if not isinstance(event, ConnectionClosing)])
        self._transport.writelines(self.connection.data_to_send())
        self._release_streams()
        self._transport.close()
        self._abort_after(LINGER)

    def note_refused(self, reason: str) -> None:
        """Log that a request was refused."""
        self._log(logging.INFO, "A request was refused", error=reason)

    @property
    def peer(self) -> str:
        """The peer's address as gRPC writes it: ``ipv4:127.0.0.1:50051``, ``ipv6:%5B::1%5D:50051``."""
        return peer_text(self._transport.get_extra_info("peername") if self._address is None else self._address)

    def auth_context(self) -> Mapping[str, list[bytes]]:
        """The properties of the peer that TLS has established, under gRPC's names; empty without TLS."""
        tls: Any = self._transport.get_extra_info("ssl_object")
        return {} if tls is None else peer_identity(tls)

    # -- work of one loop iteration -------------------------------------------------------------------------------

    def _woken(self) -> None:
        self._waking = False
        if not self._transport.is_closing():
            self._settle()
            self._tick_soon()

    def _defer(self) -> None:
        """Input or output is left over: defer it behind the deferred work of other connections."""
        if not self._deferred:
            self._deferred = True
            self._host.scheduler.defer(self._loop, self._do_deferred, self._share, self.network)

    @property
    def _share(self) -> Share:
        """The share that this connection's deferred work belongs to, after the first octets."""
        return Share.CLIENTS if self.trust is Trust.CLIENT else Share.STRANGERS

    def _do_deferred(self) -> None:
        self._deferred = False
        if self._transport.is_closing():
            return
        if self.connection.backlog and self.connection.wants_read:
            self._receive(b"")
            if not self._prompt:
                self._judge()
        else:
            self._settle()
            self._tick_soon()

    def _receive(self, data: bytes) -> None:
        connection = self.connection
        begun = perf_counter()
        events = connection.receive_data(data, self._loop.time())
        if events:
            self._dispatch(events)
        self._settle()
        if connection.answered:
            self._host.observe(connection.answered, perf_counter() - begun)
            connection.answered.clear()
        if connection.reports:
            self._log_reports()
        if connection.backlog and not self.closing:
            self._defer()
        if not self._tick_is_soon:
            self._tick_soon()

    # -- strangers ------------------------------------------------------------------------------------------------

    def _stranger_received(self, data: bytes) -> None:
        """Process octets of a peer that is not a client, or not yet."""
        self.active_at = self._loop.time()
        if self._opening is not None:
            found = self._opening.take(data, secure=self._transport.get_extra_info("ssl_object") is not None)
            if found is None:
                return
            self._opening = None
            if isinstance(found, Foreign):
                self._leave_foreign(found)
                return
            data = found
        host = self._host
        share = Share.STRANGERS
        granted, self._granted = self._granted, False
        if self._early_reads:
            self._early_reads -= 1
            share = self.arrival
            granted = granted or (len(data) <= _LARGE_READ and host.scheduler.claim(self._loop, share))
        if granted and len(data) <= _LARGE_READ:
            self._receive(data)
            self._judge()
            return
        self.connection.hold(data, self.active_at)
        if not self._deferred:
            self._deferred = True
            host.scheduler.defer(self._loop, self._do_deferred, share, self.network)
        self._set_reading(False)

    def _judge(self) -> None:
        """Check whether the octets that the peer has just sent have made it a client."""
        if self.connection.authorized:
            self.vouch(Trust.CLIENT)

    def _settle(self) -> None:
        """Write all output that may be written, hand out the events that this causes, and decide whether to continue
        reading."""
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
            if size >= connection.limits.octets_per_turn and connection.unsent:
                self._defer()
        if connection.eventful:
            self._dispatch(connection.take_events())
            self.wake()  # a handler may end its call at once
        if connection.terminated:
            self._leave()
            return
        self._set_reading(not connection.backlog and connection.wants_read)

    def _set_reading(self, reading: bool) -> None:
        reading = reading and not self._undecrypted
        if reading is not self._reading:
            self._reading = reading
            (self._transport.resume_reading if reading else self._transport.pause_reading)()

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ConnectionClosing):
                self._log_closing(event)
                continue
            if isinstance(event, AnswerCutOff):
                self._log(logging.WARNING, "An answer was cut off", error=event.reason)
                continue
            stream = event.stream
            if isinstance(event, CallStarted):
                self._host.call_started(self, stream)
            elif stream.call is None:  # the connection was refused at its start
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

    # -- TLS ------------------------------------------------------------------------------------------------------

    def may_decrypt(self) -> bool:
        """See `Secured.may_decrypt`: a stranger's records wait for a time slice, except those of its first reads."""
        if self._prompt:
            return True
        early = self._early_reads and not self.closing
        self._granted = bool(early) and self._host.scheduler.claim(self._loop, self.arrival)
        if not self._granted:
            self._decrypt_later()
        return self._granted

    def broke_tls(self, error: OSError) -> None:
        """See `Secured.broke_tls`."""
        self._log(logging.INFO, "A client broke the protocol", error=str(error))

    def _decrypt_later(self) -> None:
        """See `PiecewiseTls.on_more`."""
        self._undecrypted = True
        self._reading = False
        self._transport.pause_reading()
        share = self.arrival if self._early_reads and self.trust is not Trust.CLIENT else self._share
        self._host.scheduler.defer(self._loop, self._decrypt, share, self.network)

    def _decrypt(self) -> bool:
        """Continue with the TLS records that have arrived: the transport processes them when reading is resumed.
        Returns whether reading was resumed; if it was, the time slice ends."""
        self._undecrypted = False
        if self._transport.is_closing():
            return False
        if self.closing:
            self._transport.resume_reading()
            return True
        self._granted = not self._prompt
        self._set_reading(not self.connection.backlog and self.connection.wants_read)
        return self._reading

    def _count_key_updates_no_more(self) -> None:
        if self._key_updates is not None:
            self._key_updates.release()
            self._key_updates = None

    def _on_key_updates(self) -> None:
        """Too many KeyUpdates: octets were thrown away, so the connection can neither be read nor written any more."""
        self._log(logging.WARNING, "A client was cut off", error="too many KeyUpdates of TLS")
        self._loop.call_soon(self._transport.abort)

    # -- log ------------------------------------------------------------------------------------------------------

    def _log_reports(self) -> None:
        """Write the connection's reports about its peer to the log."""
        reports = self.connection.reports
        for kind, about in reports:
            if kind == "unauthorized":
                self._log(logging.INFO, "A call was not authorized", error=about)
            else:
                self.note_refused(about)
        reports.clear()

    def _log_closing(self, event: ConnectionClosing) -> None:
        if event.code == ErrorCode.ENHANCE_YOUR_CALM:
            self._flood = True
            self._log(logging.WARNING, "A client was cut off", error=event.reason)
        elif event.code != ErrorCode.NO_ERROR:
            self._log(logging.INFO, "A client broke the protocol", error=event.reason)

    def _log(self, level: int, message: str, **fields: Any) -> None:
        self._host.client_log.log(self._loop.time(), level, message, lambda: self.peer, **fields)

    # -- time -----------------------------------------------------------------------------------------------------

    def _tick_soon(self) -> None:
        """Traffic may have brought a deadline forward."""
        if self._tick_is_soon or self.closing:
            return
        self._tick_is_soon = True
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

    def _note_unread(self) -> None:
        """Notice a peer that stopped reading before the transport's buffer was full. From now on the buffer counts as
        full until it is empty, so that its octets are included in the budget, and the peer has a time limit to read
        them."""
        if self.connection.wants_read and self._transport.get_write_buffer_size():
            self._transport.set_write_buffer_limits(0)

    def _tick(self) -> None:
        self._timer = None
        self._tick_is_soon = False
        self._note_unread()
        events = self.connection.tick(self._loop.time())
        if events:
            self._dispatch(events)
        self._settle()
        if not self.closing:
            self._set_timer(self.connection.next_deadline())

    # -- closing --------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        """The connection has ended: close it. Called again when the transport's buffer is empty."""
        if not self.closing:
            self._set_timer(None)
            self.closing = True
            self._prompt = False
            self._release_streams()
        if self._lingering_close is None:
            defer = functools.partial(self._host.scheduler.defer, self._loop, share=self._share, network=self.network)
            self._lingering_close = LingeringClose(self._transport, self._loop, defer, flood=self._flood)
        # Answers to a flood would stay in memory until the peer reads them.
        stall_timeout = min(LINGER, self._host.limits.stall_timeout) if self._flood else self._host.limits.stall_timeout
        self._lingering_close.proceed(writable=self.connection.wants_read, stall_timeout=stall_timeout)

    def _abort_after(self, seconds: float) -> None:
        """Set a limit for the transport, which closes as soon as its buffer is empty: after ``seconds`` it is aborted
        if the peer reads nothing."""
        self._set_timer(None)
        self.closing = True
        self._prompt = False
        self._timer = self._loop.call_later(seconds, self._give_up)

    def _give_up(self) -> None:
        if self._transport.get_write_buffer_size():
            reason = "it reads nothing, and its connection is to close"
            self._log(logging.WARNING, "A client was cut off", error=reason)
        self.abort()

    def _leave_foreign(self, foreign: Foreign) -> None:
        """The peer speaks another protocol: answer in that protocol, or by GOAWAY, and close."""
        self._log(logging.INFO, "A client does not speak HTTP/2", received=foreign.name)
        self.connection.close(ErrorCode.PROTOCOL_ERROR, f"{foreign.name} is not spoken here")
        self.connection.take_events()
        pieces = self.connection.data_to_send()
        self._transport.writelines([foreign.answer] if foreign.answer else pieces)
        self._leave()

    def _release_streams(self) -> None:
        """Release the streams that were open when the connection ended, a few at a time."""
        released = self.connection.released
        for _ in range(min(_STREAMS_RELEASED_AT_ONCE, len(released))):
            released.popitem()
        if released:
            self._host.scheduler.defer(self._loop, self._release_streams, self._share, self.network)
