"""Processes received octets: the preface, then frame by frame. Each frame is judged by its shape and by the state of
its stream.

A turn (one call of `Inbound.work`) is bounded by `Limits.answers_per_turn` and its neighbours, so that other
connections are served in between; if a turn ends early, `InputBuffer.backlog` is true.
"""

from __future__ import annotations

from math import inf
from typing import Final

from grpc_h2.connection.abuse import FRAME_WORK, Abuse
from grpc_h2.connection.bodies import Bodies
from grpc_h2.connection.calls import Calls
from grpc_h2.connection.closing import DRAIN_PING, Closing
from grpc_h2.connection.fast_path import FastPath, Opened, Refused
from grpc_h2.connection.flow_control import FlowControl
from grpc_h2.connection.headers import Headers
from grpc_h2.connection.input_buffer import InputBuffer
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.outbound import Outbound
from grpc_h2.connection.state import ConnectionState, Lifecycle, StreamState, StreamStatus
from grpc_h2.connection.stream import Stream
from grpc_h2.connection.streams import Streams
from grpc_h2.connection.timers import Timers
from grpc_h2.rpc.requests import check_trailers
from grpc_h2.static.routes import Router
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault
from grpc_h2.wire.frame_parsing import (
    LONGEST_SHORT_BLOCK,
    check_shape,
    depends_on_itself,
    unpadded,
    without_priority,
)
from grpc_h2.wire.hpack import Field

KEEPALIVE_PING: Final = b"keepaliv"
_STREAMS_PER_GLITCH: Final = 64
"""The number of open streams for which a change of the initial window counts as one glitch. Such a change concerns
every open stream."""
_AWAITS_PREFACE: Final = ConnectionState.AWAITS_PREFACE
_AWAITS_SETTINGS: Final = ConnectionState.AWAITS_SETTINGS
_LEAVING: Final = ConnectionState.LEAVING
_HALF_CLOSED_REMOTE: Final = StreamState.HALF_CLOSED_REMOTE
_NEVER_OPEN: Final = (StreamStatus.IDLE, StreamStatus.SKIPPED)


class Inbound:
    """The receiving half of a connection."""

    __slots__ = (
        "_abuse",
        "_answered",
        "_bodies",
        "_buffer",
        "_calls",
        "_closing",
        "_fast_path",
        "_flow",
        "_headers",
        "_lifecycle",
        "_limits",
        "_outbound",
        "_router",
        "_settings_unacked",
        "_streams",
        "_timers",
        "_unread",
    )

    def __init__(
        self,
        limits: Limits,
        router: Router,
        lifecycle: Lifecycle,
        buffer: InputBuffer,
        timers: Timers,
        abuse: Abuse,
        flow: FlowControl,
        streams: Streams,
        outbound: Outbound,
        headers: Headers,
        bodies: Bodies,
        fast_path: FastPath,
        closing: Closing,
        calls: Calls,
        answered: list[int],
    ) -> None:
        self._limits = limits
        self._router = router
        self._lifecycle = lifecycle
        self._buffer = buffer
        self._timers = timers
        self._abuse = abuse
        self._flow = flow
        self._streams = streams
        self._outbound = outbound
        self._headers = headers
        self._bodies = bodies
        self._fast_path = fast_path
        self._closing = closing
        self._calls = calls
        self._answered = answered
        self._settings_unacked = 1
        self._unread: tuple[Stream, bool] | None = None
        """The stream whose last DATA frame holds more messages, and whether that frame ends the stream."""

    def work(self, data: bytes) -> None:
        """Process the octets that are held, and then ``data``, until they end, a frame is incomplete, or the turn's
        budget is used up.

        Raises:
            ConnectionFault: if the peer broke the connection's rules.
        """
        buffer, lifecycle, headers, abuse = self._buffer, self._lifecycle, self._headers, self._abuse
        fast_path, outbound, limits, answered = self._fast_path, self._outbound, self._limits, self._answered
        if headers.router_epoch != self._router.epoch:
            self._judge_anew()
        if abuse.work_left != limits.work_per_turn:  # a call with a handler also counts as work
            abuse.begin_turn()
        position = 0
        if buffer.held or lifecycle.state is _AWAITS_PREFACE:
            if data:
                buffer.add(data)
            if lifecycle.state is _AWAITS_PREFACE:
                if not buffer.take_preface():
                    return
                lifecycle.enter(_AWAITS_SETTINGS)
            data, position = buffer.held, buffer.position
        end, backlog = len(data), False
        most = len(answered) + limits.answers_per_turn
        while not lifecycle.closed:
            assembly = headers.assembly
            undecoded = self._unread is not None or (assembly is not None and assembly.whole is not None)
            if end - position < frames.HEADER_LENGTH and not undecoded:
                break
            # Only DATA (0) and HEADERS (1) can belong to a known call.
            if assembly is None and not undecoded and data[position + 3] <= frames.HEADERS and lifecycle.accepting:
                position, backlog, left = fast_path.answer_batch(data, position, end, most - len(answered))
                if left is not None:
                    self._take_up(left)
                if backlog or end - position < frames.HEADER_LENGTH:
                    break
            if abuse.calls_left <= 0 or abuse.work_left <= 0 or len(outbound.out) > limits.replies_per_turn:
                backlog = True
                break
            if undecoded:
                self._go_on()
                continue
            high, low, kind, flags, stream_id = frames.HEADER.unpack_from(data, position)
            length = high << 16 | low
            if length > frames.DEFAULT_FRAME_SIZE:  # a frame is judged before any of its octets are held (section 4.2)
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} octets")
            abuse.spend(FRAME_WORK)
            begin = position + frames.HEADER_LENGTH
            if begin + length > end:
                break
            position = begin + length
            self._frame(kind, flags, stream_id & frames.LARGEST_STREAM_ID, data[begin:position])
        if not backlog and not lifecycle.closed and self._calls.refusing(headers.refuses):
            backlog = self._calls.answer_refused()
        if lifecycle.closed:
            buffer.clear()
        elif position < end or backlog or buffer.backlog:
            buffer.keep(data, position, backlog=backlog)

    def _take_up(self, left: Opened | Refused) -> None:
        """Continue with a stream that the fast path could not answer."""
        if isinstance(left, Opened):
            self._calls.open(left)
        else:
            self._closing.refuse(left.stream_id, left.fault)

    # -- frames of streams ----------------------------------------------------------------------------------------

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """Process one frame of any type."""
        if self._headers.assembly is not None:
            self._continue_block(kind, flags, stream_id, payload)
            return
        if self._lifecycle.state is _AWAITS_SETTINGS:
            if kind != frames.SETTINGS or flags & frames.ACK:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the preface was not followed by SETTINGS")
            self._lifecycle.enter(ConnectionState.OPEN)
        try:
            check_shape(kind, flags, stream_id, len(payload))
            if kind == frames.DATA:
                self._data(flags, stream_id, payload)
            elif kind == frames.HEADERS:
                self._begin_block(flags, stream_id, payload)
            elif kind == frames.WINDOW_UPDATE:
                self._window_update(stream_id, frames.LONG.unpack(payload)[0] & frames.LARGEST_WINDOW)
            elif kind == frames.PING:
                self._ping(flags, payload)
            elif kind == frames.SETTINGS:
                self._settings(flags, payload)
            elif kind == frames.RST_STREAM:
                self._rst_stream(stream_id, frames.LONG.unpack(payload)[0])
            elif kind == frames.CONTINUATION:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION outside a header block")
            elif kind == frames.PRIORITY:
                self._abuse.glitch("PRIORITY frames")
                if depends_on_itself(stream_id, payload):
                    raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")
            else:  # GOAWAY (no work, because the peer will open no more streams) and unknown types
                self._abuse.glitch("frames without effect")
        except StreamFault as fault:
            self._closing.refuse(stream_id, fault)

    def _begin_block(self, flags: int, stream_id: int, payload: bytes) -> None:
        fragment, self_dependent = without_priority(flags, stream_id, unpadded(flags, payload))
        end_stream = bool(flags & frames.END_STREAM)
        whole = bool(flags & frames.END_HEADERS)
        if whole and len(fragment) <= LONGEST_SHORT_BLOCK:
            self._block(stream_id, fragment, end_stream=end_stream, self_dependent=self_dependent)
            return
        self._headers.begin(stream_id, fragment, end_stream=end_stream, self_dependent=self_dependent, whole=whole)
        if not whole:
            self._timers.block_begun()

    def _continue_block(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        assembly = self._headers.assembly
        assert assembly is not None
        assembly.take(kind, stream_id, payload)
        if not payload and not flags & frames.END_HEADERS:
            self._abuse.glitch("empty CONTINUATION frames")
        if flags & frames.END_HEADERS:
            assembly.end()
            self._timers.block_ended()

    def _judge_anew(self) -> None:
        """The server's authorizations have changed: judge calls whose bodies have not arrived by the new
        authorizations."""
        self._headers.refresh()
        if self._fast_path.pending:
            self._fast_path.judge_anew()
            self._headers.note_refusals()
        self._calls.judge_anew(self._router)

    def _go_on(self) -> None:
        """Process another piece of a long header block, or of a DATA frame with many messages."""
        if self._unread is not None:
            stream, end_stream = self._unread
            self._unread = None
            self._read(stream, b"", 0, end_stream=end_stream)
            return
        done = self._headers.end_assembly()
        if done is None:
            return
        assert done.whole is not None
        try:
            self._block(done.stream_id, done.whole, end_stream=done.end_stream, self_dependent=done.self_dependent)
        except StreamFault as fault:
            self._closing.refuse(done.stream_id, fault)

    def _block(self, stream_id: int, block: bytes, *, end_stream: bool, self_dependent: bool) -> None:
        """Process a whole header block. It is decoded even if its stream is refused (section 4.3)."""
        streams, headers = self._streams, self._headers
        stream = self._calls.find(stream_id)
        if stream is not None:
            self._trailers(stream, headers.decode(block), end_stream=end_stream)
            return
        status = streams.status(stream_id)
        if status is StreamStatus.SKIPPED:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} is opened after a higher one")
        if status is not StreamStatus.IDLE:
            headers.decode(block)
            if status is StreamStatus.CLOSED:
                raise ConnectionFault(ErrorCode.STREAM_CLOSED, "HEADERS on a closed stream")
            self._abuse.late_frame(streams.opened)
            self._closing.rest_received(stream_id, end_stream=end_stream)
            return
        streams.use(stream_id)
        self._abuse.stream_opened()
        if self._lifecycle.state is _LEAVING:
            headers.decode(block)
            streams.note_reset(stream_id)  # GOAWAY has announced the refusal to the client; later frames are dropped
            return
        if self._calls.open_streams + streams.zombies >= self._limits.max_concurrent_streams:
            headers.decode(block)
            raise StreamFault(ErrorCode.REFUSED_STREAM, "too many streams at once")
        route = headers.route(block)
        if self_dependent:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")
        seconds = headers.timeouts.get(block)
        until = inf if seconds is None else self._timers.now + seconds
        self._calls.open(Opened(stream_id, route, until=until), end_stream=end_stream)

    def _trailers(self, stream: Stream, fields: tuple[Field, ...], *, end_stream: bool) -> None:
        if stream.state is _HALF_CLOSED_REMOTE:
            raise StreamFault(ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
        if not end_stream:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a second HEADERS without END_STREAM")
        check_trailers(fields)
        self._calls.end_of_request(stream)

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        stream = self._streams.open.get(stream_id) or self._calls.find(stream_id)
        content = unpadded(flags, payload) if flags & frames.PADDED else payload
        status = None if stream is not None else self._streams.status(stream_id)
        if status in _NEVER_OPEN:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is idle")
        self._flow.receive(size)
        if stream is None:
            self._outbound.give_back(size)
            if status is StreamStatus.CLOSED:
                raise StreamFault(ErrorCode.STREAM_CLOSED, "DATA on a closed stream")
            self._abuse.late_frame(self._streams.opened)
            self._closing.rest_received(stream_id, size, end_stream=bool(flags & frames.END_STREAM))
            return
        end_stream = bool(flags & frames.END_STREAM)
        if not content and not end_stream:
            self._abuse.glitch("empty DATA frames")
        try:
            stream.receive(size, len(content), end_stream=end_stream)
        except StreamFault:
            self._outbound.give_back(size)
            raise
        self._read(stream, content, size, end_stream=end_stream)

    def _read(self, stream: Stream, content: bytes, size: int, *, end_stream: bool) -> None:
        """Read messages from ``content`` of a DATA frame of ``size`` octets, and from the octets that the reader still
        holds."""
        if stream.id not in self._streams.open:  # the stream has ended since the frame arrived
            return
        try:
            self._calls.act_on(stream, self._bodies.feed(stream, content, size))
            if stream.id not in self._streams.open:
                return
            if stream.reader is not None and stream.reader.more:
                self._unread = stream, end_stream
            elif end_stream:
                self._calls.judge_request(stream)
        except StreamFault as fault:
            self._closing.refuse(stream.id, fault)

    def _rst_stream(self, stream_id: int, code: int) -> None:
        stream = self._calls.find(stream_id)
        if stream is None and self._streams.status(stream_id) in _NEVER_OPEN:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which is idle")
        if stream is None:  # the answer has crossed with this frame, so the reset wastes no work
            self._abuse.late_frame(self._streams.opened)
            self._closing.rest_received(stream_id, end_stream=True)
            return
        self._abuse.glitch("resets")  # CVE-2023-44487
        self._closing.abandon(stream, code)

    def _window_update(self, stream_id: int, increment: int) -> None:
        self._abuse.window_update()
        if stream_id == 0:
            if increment == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._flow.grow(increment)
            return
        if self._fast_path.grow_window(stream_id, increment):
            return
        stream = self._calls.find(stream_id)
        if stream is None:
            if self._streams.status(stream_id) in _NEVER_OPEN:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {stream_id}, which is idle")
            return  # on a closed stream such a frame is legal for a while (section 5.1)
        if increment == 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        if not stream.grow_send_window(increment):
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "the stream's window passes 2^31 - 1")
        self._outbound.reconsider(stream)

    # -- the connection's own frames ------------------------------------------------------------------------------

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if not self._settings_unacked:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS ACK without SETTINGS")
            self._settings_unacked -= 1
            return
        if len(payload) > self._limits.max_settings_entries * frames.SETTING.size:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many entries in SETTINGS")
        self._abuse.glitch("SETTINGS frames", 1 + len(self._streams.open) / _STREAMS_PER_GLITCH)
        window = self._flow.initial_send_window
        for key, value in frames.SETTING.iter_unpack(payload):
            if key == frames.HEADER_TABLE_SIZE:
                self._outbound.allow_table(value)
            elif key == frames.ENABLE_PUSH and value > 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH of {value}")
            elif key == frames.INITIAL_WINDOW_SIZE:
                if value > frames.LARGEST_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}")
                # Only the last value of a setting is applied: if each value were applied, one frame could cause many
                # walks over all streams.
                window = value
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value <= frames.LARGEST_FRAME_SIZE:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")
                self._outbound.allow_frames(value)
        self._change_initial_window(window)
        self._outbound.control(frames.SETTINGS_ACK)

    def _change_initial_window(self, size: int) -> None:
        shift = self._flow.change_initial(size)
        if not shift:
            return
        fit = self._fast_path.windows_fit(size)
        for stream in self._streams.open.values():
            fit = fit and stream.grow_send_window(shift)
            self._outbound.reconsider(stream)
        if not fit:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS makes a stream's window too large")

    def _ping(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload == DRAIN_PING and self._lifecycle.state is ConnectionState.DRAINING:
                self._closing.final_goaway()
            elif payload != KEEPALIVE_PING:
                self._abuse.glitch("answers to no PING")
            return
        self._abuse.ping()
        self._outbound.control(frames.ping(payload, ack=True))
