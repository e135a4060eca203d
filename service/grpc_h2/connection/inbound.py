"""Octets in: preface, frames, and the turn that bounds how much is done before other connections are looked at."""

from __future__ import annotations

from math import inf

from grpc_h2.connection.core import FRAME_WORK
from grpc_h2.connection.events import (
    Event,
)
from grpc_h2.connection.exchanges import Exchanges
from grpc_h2.connection.flow_control import grown
from grpc_h2.connection.streams import StreamStatus
from grpc_h2.static.routes import UNKNOWN_LENGTH
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault
from grpc_h2.wire.frame_parsing import (
    LONGEST_SHORT_BLOCK,
    BlockAssembly,
    check_shape,
    depends_on_itself,
    unpadded,
    without_priority,
)

DRAIN_PING = b"draining"
KEEPALIVE_PING = b"keepaliv"
_STREAMS_PER_GLITCH = 64
"""A change of the initial window touches every open stream."""
_IN_FLIGHT_GLITCH = 0.25
"""An honest client may have a window's worth of frames under way when its stream is reset."""


class Inbound(Exchanges):
    """Octets in: the turn, and every frame."""

    __slots__ = ()

    # -- input --------------------------------------------------------------------------------------------------------

    def hold(self, data: bytes, now: float) -> None:
        """Keep ``data``, octets that the peer has sent, for the next `receive_data`: until then it is ``backlog``."""
        self._lifetime.read_at = now
        self._lifetime.asked_at = inf
        self._held = self._held[self._position :] + data if self._held else data
        self._position = 0
        self.backlog = True

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Work through ``data``, octets that the peer has sent, at instant ``now``. Raises nothing."""
        self._now = now
        if data:
            self.hold(data, now)
        if self._epoch != self._doors.epoch:
            self._memo.clear()
            self._epoch = self._doors.epoch
        self.backlog = False
        if self.terminated:
            self._held = b""  # after the last GOAWAY the peer is heard out, not listened to (section 5.4.1)
        else:
            self._answers_most = len(self.answered) + self.limits.answers_per_turn
            self._calls_left = self.limits.calls_per_turn
            self._work_left = self.limits.work_per_turn
            try:
                self._work()
            except ConnectionFault as fault:
                self.close(fault.code, fault.reason)
        return self.take_events()

    def _work(self) -> None:
        """Work through what is held, until it ends, a frame is incomplete, or the turn is spent."""
        if self._expect_preface and not self._take_preface():
            return
        data, position = self._held, self._position
        end = len(data)
        out = self._sender.out
        while not self.terminated:
            if self._may_answer():
                position = self._answer_batch(data, position, end)
                if position == end:
                    break
            undecoded = self._assembly is not None and self._assembly.whole is not None
            if end - position < frames.HEADER_LENGTH and not undecoded:
                break
            spent = self._calls_left <= 0 or self._work_left <= 0 or len(out) > self.limits.replies_per_turn
            if self.backlog or spent:
                self.backlog = True
                break
            if undecoded:
                self._go_on_decoding()
                continue
            high, low, kind, flags, stream_id = frames.HEADER.unpack_from(data, position)
            length = high << 16 | low
            if length > frames.DEFAULT_FRAME_SIZE:  # judged before any of it is held (section 4.2)
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"a frame of {length} octets")
            self._work_left -= FRAME_WORK
            begin = position + frames.HEADER_LENGTH
            if begin + length > end:
                break
            position = begin + length
            self._frame(kind, flags, stream_id & frames.LARGEST_STREAM_ID, data[begin:position])
        if position == end:
            self._held, self._position = b"", 0
        elif self.backlog:
            self._held, self._position = data, position
        else:
            self._held, self._position = data[position:], 0

    def _take_preface(self) -> bool:
        wanted = frames.PREFACE
        if not wanted.startswith(self._held[: len(wanted)]):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no HTTP/2 preface")
        if len(self._held) < len(wanted):
            return False
        self._held = self._held[len(wanted) :]
        self._expect_preface = False
        return True

    # -- frames of streams --------------------------------------------------------------------------------------------

    def _frame(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """One frame, whatever it is."""
        if self._assembly is not None:
            self._continue_block(self._assembly, kind, flags, stream_id, payload)
            return
        if not self._lifetime.introduced:
            if kind != frames.SETTINGS or flags & frames.ACK:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "the preface was not followed by SETTINGS")
            self._lifetime.introduced = True
        try:
            check_shape(kind, flags, stream_id, len(payload))
            if kind == frames.DATA:
                self._data(flags, stream_id, payload)
            elif kind == frames.HEADERS:
                self._headers(flags, stream_id, payload)
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
                self._glitch("PRIORITY frames")
                if depends_on_itself(stream_id, payload):
                    raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")
            else:  # GOAWAY (the peer will open no more streams: nothing to do), and types that nobody knows yet
                self._glitch("frames without effect")
        except StreamFault as fault:
            self._refuse(stream_id, fault)

    def _headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        fragment, self_dependent = without_priority(flags, stream_id, unpadded(flags, payload))
        end_stream = bool(flags & frames.END_STREAM)
        whole = bool(flags & frames.END_HEADERS)
        if whole and len(fragment) <= LONGEST_SHORT_BLOCK:
            self._block(stream_id, fragment, end_stream=end_stream, self_dependent=self_dependent)
            return
        self._assembly = BlockAssembly(
            self.limits, stream_id, fragment, end_stream=end_stream, self_dependent=self_dependent
        )
        if whole:
            self._assembly.end()
        else:
            self._lifetime.block_at = self._now

    def _continue_block(self, assembly: BlockAssembly, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        assembly.add(kind, stream_id, payload)
        if not payload and not flags & frames.END_HEADERS:
            self._glitch("empty CONTINUATION frames")
        if flags & frames.END_HEADERS:
            assembly.end()
            self._lifetime.block_at = inf

    def _go_on_decoding(self) -> None:
        """Some more of a long header block; once it is through, what it is about."""
        assembly = self._assembly
        assert assembly is not None
        assert assembly.whole is not None
        if not self._decode_ahead(assembly.whole):
            return
        self._assembly = None
        try:
            self._block(
                assembly.stream_id,
                assembly.whole,
                end_stream=assembly.end_stream,
                self_dependent=assembly.self_dependent,
            )
        except StreamFault as fault:
            self._refuse(assembly.stream_id, fault)

    def _block(self, stream_id: int, block: bytes, *, end_stream: bool, self_dependent: bool) -> None:
        """A whole header block. Whatever becomes of it, it is decoded (section 4.3)."""
        stream = self._find(stream_id)
        if stream is not None:
            self._trailers(stream, self._decode(block), end_stream=end_stream)
            return
        standing = self._streams.standing(stream_id)
        if standing is StreamStatus.SKIPPED:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} is opened after a higher one")
        if standing is not StreamStatus.IDLE:
            self._decode(block)
            if standing is StreamStatus.CLOSED:
                raise ConnectionFault(ErrorCode.STREAM_CLOSED, "HEADERS on a closed stream")
            self._glitch("frames on streams that were reset", _IN_FLIGHT_GLITCH)
            return
        self._streams.use(stream_id)
        self._window_updates += 2  # whatever becomes of it: C-core sends two for every call
        if self._refused_above is not None:
            self._decode(block)
            self._streams.note_reset(stream_id)  # its client knows from GOAWAY; what follows is dropped
            return
        if len(self._streams) + self._zombies >= self.limits.max_concurrent_streams:
            self._decode(block)
            raise StreamFault(ErrorCode.REFUSED_STREAM, "too many streams at once")
        # No longer one is remembered, and to look for 16 kB takes 3 µs.
        # One that came in parts has been decoded already, and its fields are used, or the next block would get them.
        known = self._memo.get(block) if self._ahead is None and len(block) <= LONGEST_SHORT_BLOCK else None
        route = known or self._learn(block)
        if self_dependent:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a stream depends on itself")
        self._open(stream_id, route, end_stream=end_stream)

    def _data(self, flags: int, stream_id: int, payload: bytes) -> None:
        size = len(payload)
        stream = self._find(stream_id)
        content = unpadded(flags, payload)
        if stream is None:
            standing = self._streams.standing(stream_id)
            if standing in (StreamStatus.IDLE, StreamStatus.SKIPPED):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is idle")
            self._take_in(size, size)
            if standing is StreamStatus.CLOSED:
                raise StreamFault(ErrorCode.STREAM_CLOSED, "DATA on a closed stream")
            self._glitch("frames on streams that were reset", _IN_FLIGHT_GLITCH)
            return
        end_stream = bool(flags & frames.END_STREAM)
        if not content and not end_stream:
            self._glitch("empty DATA frames")
        if stream.half_closed:
            self._take_in(size, size)
            raise StreamFault(ErrorCode.STREAM_CLOSED, "DATA after END_STREAM")
        stream.receive_window -= size
        if stream.receive_window < 0:
            self._take_in(size, size)
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the stream's window")
        if stream.body_left != UNKNOWN_LENGTH:
            stream.body_left -= len(content)
            if stream.body_left < 0:
                self._take_in(size, size)
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "more DATA than content-length says")
        stream.half_closed = end_stream
        self._feed(stream, content, size)
        if end_stream and stream_id in self._streams.open:
            self._end_of_request(stream)

    def _rst_stream(self, stream_id: int, code: int) -> None:
        stream = self._find(stream_id)
        if stream is None and self._streams.standing(stream_id) in (StreamStatus.IDLE, StreamStatus.SKIPPED):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which is idle")
        self._glitch("resets")  # CVE-2023-44487
        if stream is not None:
            self._abandon(stream, code)

    def _window_update(self, stream_id: int, increment: int) -> None:
        self._window_updates -= 1
        if self._window_updates < 0:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many WINDOW_UPDATE frames")
        if stream_id == 0:
            if increment == 0:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._sender.grow(increment)
            return
        streams = self._streams
        if stream_id in streams.pending and increment:
            added = streams.pending_windows.get(stream_id, 0) + increment
            if grown(self._sender.initial_window, added) is not None:
                streams.pending_windows[stream_id] = added
                return
        stream = self._find(stream_id)
        if stream is None:
            if streams.standing(stream_id) in (StreamStatus.IDLE, StreamStatus.SKIPPED):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {stream_id}, which is idle")
            return  # legal for a while on a closed stream (section 5.1)
        if increment == 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
        self._sender.grow_stream(stream, increment)

    # -- the connection's own frames ----------------------------------------------------------------------------------

    def _settings(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if not self._settings_unacked:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS ACK without SETTINGS")
            self._settings_unacked -= 1
            return
        if len(payload) > self.limits.max_settings_entries * frames.SETTING.size:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many entries in SETTINGS")
        self._glitch("SETTINGS frames", 1 + len(self._streams.open) / _STREAMS_PER_GLITCH)
        window = self._sender.initial_window
        for key, value in frames.SETTING.iter_unpack(payload):
            if key == frames.HEADER_TABLE_SIZE:
                self._sender.allow_table(value)
            elif key == frames.ENABLE_PUSH and value > 1:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH of {value}")
            elif key == frames.INITIAL_WINDOW_SIZE:
                if value > frames.LARGEST_WINDOW:
                    raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, f"INITIAL_WINDOW_SIZE of {value}")
                window = value  # the last one counts; applying each would let one frame walk all streams many times
            elif key == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value <= frames.LARGEST_FRAME_SIZE:
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE of {value}")
                self._sender.max_frame = value
        self._sender.change_initial_window(window, self._streams.open)
        self._sender.out.append(frames.SETTINGS_ACK)

    def _ping(self, flags: int, payload: bytes) -> None:
        if flags & frames.ACK:
            if payload == DRAIN_PING and self._lifetime.draining_at != inf:
                self._final_goaway()
            elif payload != KEEPALIVE_PING:
                self._glitch("answers to no PING")
            return
        if self._pings.abused(self._now, idle=not len(self._streams)):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too_many_pings")
        self._sender.out.append(frames.ping(payload, ack=True))
