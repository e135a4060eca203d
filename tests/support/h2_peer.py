"""A client in memory: it feeds a sans-IO `Connection`, and judges every octet that comes back (RFC 9113)."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import hpack
from tests.support.h2_wire import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADER_TABLE_SIZE,
    HEADERS,
    HELLO,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    Feed,
    Frame,
    call,
    ping,
    split_frames,
    whole,
)

from definition_server.http2.connection import Connection
from definition_server.http2.doors import Answer, Doors, Metadata
from definition_server.http2.events import (
    CallCancelled,
    CallStarted,
    ConnectionClosing,
    Event,
    HalfClosed,
    MessageReceived,
)
from definition_server.http2.limits import Limits
from definition_server.http2.stream import Stream

STATIC = b"/t.S/Get"
REFUSING = b"/t.S/Missing"
GUARDED = b"/t.S/Guarded"
HANDLED = b"/t.S/Handled"
ANSWER = b"a definition"

_LEGAL_TYPES = (DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION)


class Keys:
    """Whom the guarded door lets in; `asked` counts how often it looked."""

    def __init__(self, *valid: str) -> None:
        self.valid = set(valid)
        self.asked = 0

    def authorize(self, metadata: Metadata) -> Answer | None:
        self.asked += 1
        if any(name == "authorization" and value in self.valid for name, value in metadata):
            return None
        return Answer.failure(16, "who are you?", tally=16)


def some_doors(keys: Keys | None = None) -> Doors:
    """Static doors: one that answers, one that fails, one that asks for a key. Any other path is a handler's."""
    doors = Doors()
    answer = Answer.unary(ANSWER, tally=1)
    doors.add_static_unary(
        STATIC.decode(), lambda message: Answer.unary(message, tally=2) if message != b"world" else answer
    )
    doors.add_static_unary(REFUSING.decode(), lambda message: Answer.failure(5, "no such thing", tally=3))
    doors.add_static_unary(GUARDED.decode(), lambda message: answer, (keys or Keys("Bearer k1")).authorize)
    return doors


@dataclass
class Result:
    """What the server sent on one stream."""

    headers: list[tuple[bytes, bytes]] | None = None
    trailers: list[tuple[bytes, bytes]] | None = None
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None
    """Code of RST_STREAM."""

    def _value(self, name: bytes) -> bytes | None:
        return next((value for key, value in [*(self.trailers or ()), *(self.headers or ())] if key == name), None)

    @property
    def status(self) -> int | None:
        """grpc-status."""
        value = self._value(b"grpc-status")
        assert value is None or value == b"0" or not value.startswith(b"0"), value
        return None if value is None else int(value)

    @property
    def text(self) -> bytes:
        """grpc-message as it came."""
        return self._value(b"grpc-message") or b""

    @property
    def http_status(self) -> int | None:
        value = self._value(b":status")
        return None if value is None else int(value)

    @property
    def messages(self) -> list[bytes]:
        """The whole messages; the rest must be nothing."""
        found, body = [], bytes(self.body)
        while body:
            size = int.from_bytes(body[1:5], "big")
            assert body[0] in (0, 1)
            assert len(body) >= 5 + size, "a message was cut"
            found.append(body[5 : 5 + size])
            body = body[5 + size :]
        return found


class Replies:
    """Reads the server's octets and fails on the first that a client need not accept."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.streams: dict[int, Result] = {}
        self.goaways: list[tuple[int, int, bytes]] = []
        self.settings: dict[int, int] = {}
        self.pongs: list[bytes] = []
        self.settings_acks = 0
        self._rest = b""
        self._decoder = hpack.Decoder()
        self._block: tuple[int, int, bytearray] | None = None
        # What we allow the server. A smaller window or frame counts from its acknowledgement on, a larger one at once.
        self._settings_sent: deque[dict[int, int]] = deque()
        self.initial_window = 65535
        self.max_frame = 16384
        self.window = 65535
        self._granted: dict[int, int] = {}

    # -- what the client says ---------------------------------------------------------------------------------

    def note_sent(self, octets: bytes) -> None:
        """The client's own frames, for the windows they open."""
        for sent in split_frames(octets.removeprefix(PREFACE))[0]:
            if sent.kind == SETTINGS and not sent.flags & ACK:
                pairs = [sent.payload[at : at + 6] for at in range(0, len(sent.payload), 6)]
                self._settings_sent.append({int.from_bytes(p[:2], "big"): int.from_bytes(p[2:], "big") for p in pairs})
            elif sent.kind == WINDOW_UPDATE and len(sent.payload) == 4:
                increment = sent.words[0] & 0x7FFFFFFF
                if sent.stream:
                    self._granted[sent.stream] = self._granted.get(sent.stream, 0) + increment
                else:
                    self.window += increment

    def _allowed(self, setting: int, current: int) -> int:
        return max([current, *(sent.get(setting, 0) for sent in self._settings_sent)])

    def _settings_acked(self) -> None:
        self.settings_acks += 1
        assert self._settings_sent, "an acknowledgement that nobody asked for"
        acked = self._settings_sent.popleft()
        self.initial_window = acked.get(INITIAL_WINDOW_SIZE, self.initial_window)
        self.max_frame = acked.get(MAX_FRAME_SIZE, self.max_frame)
        if HEADER_TABLE_SIZE in acked:
            self._decoder.max_allowed_table_size = acked[HEADER_TABLE_SIZE]

    # -- what the server says --------------------------------------------------------------------------------

    def feed(self, octets: bytes) -> list[Frame]:
        """Take the server's octets. Returns the whole frames among them."""
        frames, self._rest = split_frames(self._rest + octets)
        for got in frames:
            self._judge(got)
            self.frames.append(got)
        return frames

    @property
    def cut(self) -> bool:
        """Whether the server stopped inside a frame or a header block."""
        return bool(self._rest) or self._block is not None

    def stream(self, stream: int) -> Result:
        return self.streams.setdefault(stream, Result())

    def _judge(self, got: Frame) -> None:
        assert got.kind in _LEGAL_TYPES, f"a server does not send frames of type {got.kind}"
        assert len(got.payload) <= self._allowed(MAX_FRAME_SIZE, self.max_frame), (
            "longer than our SETTINGS_MAX_FRAME_SIZE"
        )
        assert self.frames or (got.kind == SETTINGS and not got.flags & ACK), "SETTINGS must come first"
        if self._block is not None:
            assert got.kind == CONTINUATION, "a frame inside a header block"
            assert got.stream == self._block[0], "CONTINUATION of another stream"
        if got.kind in (DATA, HEADERS, RST_STREAM, CONTINUATION):
            assert got.stream & 1, "only the client's streams"
        elif got.kind in (SETTINGS, PING, GOAWAY):
            assert got.stream == 0
        handlers = {DATA: self._data, HEADERS: self._headers, CONTINUATION: self._continuation, RST_STREAM: self._reset}
        handlers |= {
            SETTINGS: self._settings,
            PING: self._ping,
            GOAWAY: self._goaway,
            WINDOW_UPDATE: self._window_update,
        }
        handlers[got.kind](got)

    def _data(self, got: Frame) -> None:
        result = self.stream(got.stream)
        assert result.headers is not None, "DATA before HEADERS"
        assert not result.ended, "DATA after END_STREAM"
        assert result.reset is None, "DATA after RST_STREAM"
        assert not got.flags & PADDED
        self.window -= len(got.payload)
        self._granted[got.stream] = self._granted.get(got.stream, 0) - len(got.payload)
        assert self.window >= 0, "past the connection's window"
        allowed = self._allowed(INITIAL_WINDOW_SIZE, self.initial_window) + self._granted[got.stream]
        assert allowed >= 0 or not got.payload, "past the stream's window"
        result.body += got.payload
        result.ended = bool(got.flags & END_STREAM)

    def _headers(self, got: Frame) -> None:
        assert not got.flags & PADDED
        self._block = (got.stream, got.flags & END_STREAM, bytearray(got.payload))
        self._end_block(got)

    def _continuation(self, got: Frame) -> None:
        assert self._block is not None, "CONTINUATION without HEADERS"
        self._block[2].extend(got.payload)
        self._end_block(got)

    def _end_block(self, got: Frame) -> None:
        if not got.flags & END_HEADERS:
            return
        assert self._block is not None
        stream, end_stream, block = self._block
        self._block = None
        fields = [(bytes(name), bytes(value)) for name, value in self._decoder.decode(bytes(block), raw=True)]
        result = self.stream(stream)
        assert not result.ended, "HEADERS after END_STREAM"
        assert result.reset is None, "HEADERS after RST_STREAM"
        for name, value in fields:
            assert name == name.lower()
            assert not set(value) & {0, 10, 13}
        assert sum(len(name) + len(value) + 32 for name, value in fields) <= 16384
        if result.headers is None:
            assert fields[0][0] == b":status", "a response starts with :status"
            result.headers = fields
        else:
            assert end_stream, "trailers end the stream"
            assert not any(name.startswith(b":") for name, _ in fields)
            result.trailers = fields
        result.ended = bool(end_stream)

    def _reset(self, got: Frame) -> None:
        assert len(got.payload) == 4
        result = self.stream(got.stream)
        assert result.reset is None, "one RST_STREAM for a stream"
        result.reset = got.words[0]

    def _settings(self, got: Frame) -> None:
        if got.flags & ACK:
            assert not got.payload
            self._settings_acked()
            return
        for at in range(0, len(got.payload), 6):
            key = int.from_bytes(got.payload[at : at + 2], "big")
            self.settings[key] = int.from_bytes(got.payload[at + 2 : at + 6], "big")

    def _ping(self, got: Frame) -> None:
        assert len(got.payload) == 8
        if got.flags & ACK:
            self.pongs.append(got.payload)

    def _goaway(self, got: Frame) -> None:
        last, code = got.words[:2]
        assert not self.goaways or last <= self.goaways[-1][0], "the last stream id of GOAWAY never grows"
        self.goaways.append((last, code, got.payload[8:]))

    def _window_update(self, got: Frame) -> None:
        assert len(got.payload) == 4
        assert 0 < got.words[0] < 2**31
        assert got.stream == 0 or got.stream & 1


class Peer:
    """A client of one `Connection`. What it sends arrives as `feed` cuts it; what comes back is judged at once.

    Calls of paths without a static door become `calls`; the test is their handler. A cancelled call's handler ends at
    once, unless `slow_handlers`.
    """

    def __init__(
        self,
        feed: Feed = whole,
        *,
        doors: Doors | None = None,
        limits: Limits | None = None,
        hello: bytes | None = HELLO,
        slow_handlers: bool = False,
        reads: bool = True,
        consumes: bool = True,
    ) -> None:
        self.now = 1000.0
        self.connection = Connection(doors or some_doors(), limits or Limits(), self.now)
        self.replies = Replies()
        self.events: list[Event] = []
        self.calls: dict[int, Stream] = {}
        self.received: dict[int, list[bytes]] = {}
        self.half_closed: set[int] = set()
        self.cancelled: dict[int, int] = {}
        self.closing: ConnectionClosing | None = None
        self.octets = 0
        """How much came back."""
        self.turns = 0
        self._feed = feed
        self._slow_handlers = slow_handlers
        self._reads = reads
        self._consumes = consumes
        self._probe = 2**31 - 10_001
        if hello is not None:
            self.send(hello, SETTINGS_ACK)

    # -- exchange -----------------------------------------------------------------------------------------------

    def send(self, *octets: bytes) -> Peer:
        """Send, let the connection work until it wants nothing more, and read what it answers."""
        joined = b"".join(octets)
        self.replies.note_sent(joined)
        for piece in self._feed(joined):
            self._take_events(self.connection.receive_data(piece, self.now))
            while self.connection.backlog and (self._reads or self.connection.wants_read):
                self.turns += 1
                if self._reads:
                    self.read()
                self._take_events(self.connection.receive_data(b"", self.now))
            if self._reads:
                self.read()
        return self

    def read(self, budget: int = 262144) -> None:
        """Take everything that can be sent now."""
        while pieces := self.connection.data_to_send(budget):
            octets = b"".join(pieces)
            assert octets, "nothing to send is an empty list"
            self.octets += len(octets)
            self.replies.feed(octets)

    def advance(self, seconds: float) -> None:
        """Let time pass, with a tick whenever one is due."""
        end = self.now + seconds
        for _ in range(10_000):
            due = self.connection.next_deadline()
            if due is None or due > end:
                break
            self.now = max(self.now, due)
            self._take_events(self.connection.tick(self.now))
            self.read()
        else:
            raise AssertionError("a deadline that never passes")
        self.now = end
        self._take_events(self.connection.tick(end))
        self.read()

    def _take_events(self, events: list[Event]) -> None:
        for event in events:
            self.events.append(event)
            match event:
                case CallStarted(stream):
                    assert stream.id not in self.calls
                    self.calls[stream.id] = stream
                case MessageReceived(stream, message):
                    assert stream.id not in self.half_closed
                    self.received.setdefault(stream.id, []).append(message)
                    if self._consumes:
                        self.connection.consumed(stream, len(message))
                case HalfClosed(stream):
                    self.half_closed.add(stream.id)
                case CallCancelled(stream, code):
                    assert stream.id not in self.cancelled
                    self.cancelled[stream.id] = code
                    if not self._slow_handlers:
                        self.connection.finished(stream)
                case ConnectionClosing():
                    assert self.closing is None, "a connection closes once"
                    self.closing = event

    # -- the handler's part -------------------------------------------------------------------------------------

    def answer(self, stream: int, *messages: bytes, status: int = 0, text: str = "") -> None:
        """Play the handler of a call to its end."""
        handled = self.calls[stream]
        if messages:
            self.connection.send_initial_metadata(handled, ())
        for message in messages:
            self.connection.send_message(handled, message)
        self.connection.send_status(handled, status, text)
        self.connection.finished(handled)
        self.read()

    # -- judgements ---------------------------------------------------------------------------------------------

    def result(self, stream: int) -> Result:
        return self.replies.stream(stream)

    @property
    def code(self) -> int | None:
        """The error code of the last GOAWAY."""
        return self.replies.goaways[-1][1] if self.replies.goaways else None

    def assert_answered(self, stream: int, *messages: bytes) -> None:
        """The stream had these messages (by default the static door's) and status OK."""
        result = self.result(stream)
        assert (result.status, result.reset, result.ended) == (0, None, True), (result, self.code, self.closing)
        assert result.http_status == 200
        assert result.messages == list(messages or (ANSWER,))

    def assert_answered_with(self, stream: int, status: int) -> None:
        """The stream ended with this status; the connection is not tried."""
        assert (self.result(stream).status, self.result(stream).ended) == (status, True), self.result(stream)

    def assert_answered_until_reset(self, stream: int) -> None:
        """The static answer came whole; what happened to the stream afterwards is not judged."""
        result = self.result(stream)
        assert (result.status, result.messages, result.ended) == (0, [ANSWER], True), result

    def assert_alive(self, stream: int | None = None) -> None:
        """The connection still echoes a PING and answers a new call."""
        if stream is None:
            stream = self._probe
            self._probe += 2
        self.send(ping(b"alive?!?"), call(stream))
        assert self.code is None, (self.replies.goaways, self.closing)
        assert self.replies.pongs[-1:] == [b"alive?!?"]
        self.assert_answered(stream)

    def assert_status(self, stream: int, status: int) -> None:
        """The call failed with `status` in one HEADERS frame, and the connection lives."""
        result = self.result(stream)
        assert result.status == status, (result, self.code)
        assert result.http_status == 200
        assert result.ended
        assert result.reset in (None, NO_ERROR_CODE)
        self.assert_alive()

    def assert_reset(self, stream: int, *codes: int) -> None:
        """The stream was reset with one of `codes`, no other harm was done."""
        assert self.result(stream).reset in codes, (self.result(stream), self.code, self.closing)
        self.assert_alive()

    def assert_closed(self, *codes: int) -> None:
        """The connection ended with one of `codes`, told so, and listens to nothing more."""
        assert self.code in codes, (self.replies.goaways, self.closing)
        assert self.closing is not None
        assert self.closing.code in codes
        assert self.connection.terminated
        assert not self.replies.cut
        told = len(self.replies.frames)
        self.send(ping(), call(2**31 - 3))
        assert len(self.replies.frames) == told, "a closed connection answers nothing"


NO_ERROR_CODE = 0
