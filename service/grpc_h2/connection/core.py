"""The ground floor of a connection: its state, and the few ways in which streams and connections end.

Three floors make a `Connection` (``connection.py`` tells the theory): `Core` here, `Exchanges` (``exchanges.py``) on
top of it, `Inbound` (``inbound.py``) on top of that. Each calls only downwards.
"""

from __future__ import annotations

import random
from math import inf

from grpc_h2.connection.abuse import PingPolicy
from grpc_h2.connection.events import (
    CallCancelled,
    ConnectionClosing,
    Event,
)
from grpc_h2.connection.flow_control import ReceiveWindow
from grpc_h2.connection.headers import BlockAssembly
from grpc_h2.connection.limits import LeakyBucket, Limits
from grpc_h2.connection.outbound import Piece, Sender
from grpc_h2.connection.stream import Stream
from grpc_h2.connection.streams import Streams, StreamStatus
from grpc_h2.connection.timers import Lifetime
from grpc_h2.rpc.faults import CallFault, HttpFault
from grpc_h2.rpc.responses import http_block, initial_block, trailers_block, trailers_only_block
from grpc_h2.static.answers import StaticAnswer
from grpc_h2.static.routes import Route, Router
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault
from grpc_h2.wire.hpack import Decoder, Field

PREFIX = 5
"""Octets before each message on the wire."""
MESSAGE_OVERHEAD = 128
"""What a message costs beside its octets while it waits to be read: objects, mainly. Empty messages are not free."""

FRAME_WORK = 4
BLOCK_WORK = 3
STREAM_WORK = 12
OCTETS_OF_BLOCK_PER_WORK = 8
OCTETS_OF_MESSAGE_PER_WORK = 256
"""What input costs, in units of about a microsecond: `Limits.work_per_turn`."""


class Core:
    """State of a connection, and how streams and the connection end."""

    __slots__ = (
        "_ahead",
        "_answers_most",
        "_assembly",
        "_calls_left",
        "_decoder",
        "_doors",
        "_epoch",
        "_events",
        "_expect_preface",
        "_glitches",
        "_held",
        "_lifetime",
        "_memo",
        "_memo_epoch",
        "_now",
        "_partial",
        "_paused",
        "_pings",
        "_position",
        "_refused_above",
        "_sender",
        "_settings_unacked",
        "_streams",
        "_unread",
        "_window",
        "_window_updates",
        "_work_left",
        "_zombies",
        "answered",
        "backlog",
        "forgotten",
        "limits",
        "open_calls",
        "terminated",
    )

    def __init__(self, doors: Router, limits: Limits, now: float) -> None:
        self.limits = limits
        self.backlog = False
        """Input is left over: call ``receive_data(b"", now)`` again soon, and read no more until then."""
        self.answered: list[int] = []
        """Tally numbers of the ready answers given; whoever reads it clears it."""
        self.open_calls = 0
        """Handlers at work, those of cancelled calls included."""
        self.forgotten: dict[int, Stream] = {}
        """Streams that were open when the connection ended, to be freed a few at a time."""
        self.terminated = False
        """The last GOAWAY is queued and no stream is left."""
        self._doors = doors
        self._epoch = doors.epoch
        self._now = now
        self._held = b""
        self._position = 0
        self._events: list[Event] = []
        self._streams = Streams()
        self._sender = Sender()
        self._decoder = Decoder(
            max_list_size=limits.max_header_list,
            max_fields=limits.max_header_fields,
            hard_list_size=limits.hard_header_list,
            hard_fields=limits.hard_header_fields,
        )
        self._memo: dict[bytes, Route] = {}
        self._memo_epoch = self._decoder.epoch
        self._assembly: BlockAssembly | None = None
        self._ahead: tuple[Field, ...] | None = None
        self._window = ReceiveWindow(limits.connection_window)
        self._partial = 0
        self._unread = 0
        self._zombies = 0
        self._lifetime = Lifetime(limits, now, random.uniform(-1, 1))
        self._pings = PingPolicy(limits)
        self._glitches = LeakyBucket(limits.glitches, limits.glitches_per_second, now)
        self._window_updates = limits.free_window_updates
        self._settings_unacked = 1
        self._paused = False
        self._refused_above: int | None = None
        self._answers_most = limits.answers_per_turn
        self._work_left = limits.work_per_turn
        self._calls_left = limits.calls_per_turn
        self._expect_preface = True
        self._sender.out.append(
            frames.settings(
                (
                    (frames.MAX_CONCURRENT_STREAMS, limits.max_concurrent_streams),
                    (frames.INITIAL_WINDOW_SIZE, limits.initial_window),
                    (frames.MAX_HEADER_LIST_SIZE, limits.max_header_list),
                )
            )
            + frames.window_update(0, limits.connection_window - frames.DEFAULT_WINDOW)
        )

    # -- what has come about ------------------------------------------------------------------------------------------

    @property
    def eventful(self) -> bool:
        """Whether `take_events` has any."""
        return bool(self._events)

    def take_events(self) -> list[Event]:
        """Events that came about otherwise than by `receive_data` or `tick`."""
        events, self._events = self._events, []
        return events

    def _glitch(self, what: str, amount: float = 1.0) -> None:
        if self._glitches.add(self._now, amount):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"too many {what}")

    @property
    def _idle(self) -> bool:
        return not len(self._streams) and not self._zombies

    @property
    def _unsent(self) -> bool:
        return self._paused or self._sender.unsent > 0

    # -- the ends of streams ------------------------------------------------------------------------------------------

    def _answer(self, stream: Stream, answer: StaticAnswer) -> None:
        """Give a ready answer the long way: under flow control."""
        self.answered.append(answer.answer_id)
        if answer.message is None:
            self._end_with(stream, answer.block)
            return
        self._sender.headers(stream, initial_block((), None), end_stream=False)
        stream.headers_sent = True
        self._queue(stream, b"\0" + len(answer.message).to_bytes(4, "big"), answer.message)
        self._end_with(stream, answer.block)

    def _answer_fault(self, stream: Stream, fault: CallFault | HttpFault) -> None:
        if isinstance(fault, CallFault):
            self._end_with(stream, trailers_only_block(fault.status, fault.message, ()))
            return
        text = fault.text.encode()
        self._sender.headers(stream, http_block(fault.status, len(text)), end_stream=False)
        self._queue(stream, text)
        self._end_with(stream, b"")

    def _fail_call(self, stream: Stream, fault: CallFault) -> None:
        """The client's messages make no call: tell it, and take the call from its handler."""
        had_handler = stream.route.method is None and not stream.closed
        self._sender.drop(stream)
        block = trailers_block if stream.headers_sent else trailers_only_block
        self._end_with(stream, block(fault.status, fault.message, ()))
        stream.cancelled = True
        if had_handler:
            self._events.append(CallCancelled(stream, ErrorCode.CANCEL))

    def _end_with(self, stream: Stream, block: bytes) -> None:
        """Queue the terminal header block (empty: END_STREAM on the last DATA frame) behind the stream's data."""
        stream.trailers = block
        self._pings.reset()
        if not stream.unsent:
            self._sender.headers(stream, block, end_stream=True)
            stream.ended = True
            self._both_ended(stream)

    def _both_ended(self, stream: Stream) -> None:
        """Our end is out. A client that still sends is told to stop (RFC 9113 section 8.1)."""
        if not stream.half_closed:
            self._sender.out.append(frames.rst_stream(stream.id, ErrorCode.NO_ERROR))
            self._streams.note_reset(stream.id)
        self._close_stream(stream)

    def _refuse(self, stream_id: int, fault: StreamFault) -> None:
        """RST_STREAM, once a stream. What provokes it is cheap for the peer and not for us: CVE-2025-8671."""
        self._glitch("frames that break a stream's rules")
        self._streams.pending.pop(stream_id, None)
        self._streams.pending_windows.pop(stream_id, None)
        stream = self._streams.open.get(stream_id)
        if stream is None and self._streams.standing(stream_id) is StreamStatus.RESET:
            return
        self._sender.out.append(frames.rst_stream(stream_id, fault.code))
        if stream_id <= self._streams.last_id:
            self._streams.note_reset(stream_id)
        if stream is not None:
            self._abandon(stream, fault.code)

    def _abandon(self, stream: Stream, code: int) -> None:
        """Nothing more can be sent on ``stream``."""
        told = not stream.closed and stream.route.method is None and stream.route.fault is None
        stream.cancelled = True
        self._sender.drop(stream)
        self._close_stream(stream)
        if told:
            self._events.append(CallCancelled(stream, code))

    def _close_stream(self, stream: Stream) -> None:
        if self._streams.open.pop(stream.id, None) is None:
            return
        self._partial -= stream.partial
        self._unread -= stream.unread
        stream.unread = 0
        stream.partial = 0
        if stream.owed:  # messages that no handler will take any more
            self._take_in(0, stream.owed)
            stream.owed = 0
        if not stream.finished:
            self._zombies += 1
        self._lifetime.idle_at = self._now
        self._leave_if_done()

    # -- the end of the connection ------------------------------------------------------------------------------------

    def _abandon_all(self) -> None:
        """Nothing more can be sent, or is listened to. Only streams whose handler is at work are ended one by one:
        the others nobody has to be told of, and to close 256 of them takes half a millisecond."""
        self.terminated = True
        for stream in [each for each in self._streams.values() if not each.finished]:
            self._abandon(stream, ErrorCode.CANCEL)
        self.forgotten = self._streams.forget() or self.forgotten
        self._sender.forget()
        self._held, self._position = b"", 0

    def close(self, code: int, reason: str) -> None:
        """GOAWAY with ``code`` and ``reason``, and the end of every stream."""
        if self.terminated:
            return
        self._abandon_all()
        last = self._streams.last_told if self._refused_above is None else self._refused_above
        self._sender.out.append(frames.goaway(last, code, reason.encode()))
        self._events.append(ConnectionClosing(code, reason))

    def _final_goaway(self) -> None:
        self._lifetime.draining_at = inf
        self._refused_above = self._streams.last_told
        self._sender.out.append(frames.goaway(self._refused_above, ErrorCode.NO_ERROR))
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self._refused_above is not None and not len(self._streams) and not self.terminated:
            self.terminated = True
            self._events.append(ConnectionClosing(ErrorCode.NO_ERROR, "drained"))

    # -- flow control -------------------------------------------------------------------------------------------------

    def _queue(self, stream: Stream, *pieces: Piece) -> None:
        if not self._sender.unsent:
            self._lifetime.progress_at = self._now  # the clock of a stall starts with the first octet queued
        self._sender.data(stream, *pieces)

    def _take_in(self, octets: int, free: int) -> None:
        """``octets`` of DATA came, ``free`` octets need not be held (any more)."""
        self._window.take(octets)
        increment = self._window.give_back(free)
        if increment:
            self._sender.out.append(frames.window_update(0, increment))

    def _credit_stream(self, stream: Stream) -> None:
        if stream.credit * 2 >= self.limits.initial_window and not stream.half_closed and not stream.closed:
            self._sender.out.append(frames.window_update(stream.id, stream.credit))
            stream.receive_window += stream.credit
            stream.credit = 0
