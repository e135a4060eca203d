"""Checks everything that a server sends on a connection (RFC 9113), and fails on frames that a client may refuse."""

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
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITY,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    Frame,
    split_frames,
)

_LEGAL_TYPES = (DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION)


@dataclass
class Result:
    """The server's frames on one stream."""

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
        """grpc-message as it was sent, still percent-encoded."""
        return self._value(b"grpc-message") or b""

    @property
    def http_status(self) -> int | None:
        value = self._value(b":status")
        return None if value is None else int(value)

    @property
    def messages(self) -> list[bytes]:
        """The messages of the body, which must end with the last of them."""
        found, body = [], bytes(self.body)
        while body:
            size = int.from_bytes(body[1:5], "big")
            assert body[0] in (0, 1)
            assert len(body) >= 5 + size, "a message was cut"
            found.append(body[5 : 5 + size])
            body = body[5 + size :]
        return found


class Replies:
    """Reads the server's octets, and fails on the first one that a client need not accept."""

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
        # The limits that the client has set. A smaller window or frame size applies after its acknowledgement, a larger
        # one at once.
        self._settings_sent: deque[dict[int, int]] = deque()
        self.initial_window = 65535
        self.max_frame = 16384
        self.window = 65535
        self._granted: dict[int, int] = {}
        self._opened: set[int] = set()
        self._prioritised: set[int] = set()
        """Streams that had PRIORITY while they were idle. A malformed PRIORITY is answered with RST_STREAM on them,
        too."""

    # -- frames of the client ---------------------------------------------------------------------------------

    def note_sent(self, octets: bytes) -> None:
        """Note the client's own frames, for the windows and limits that they set."""
        for sent in split_frames(octets.removeprefix(PREFACE))[0]:
            if sent.kind == SETTINGS and not sent.flags & ACK:
                pairs = [sent.payload[at : at + 6] for at in range(0, len(sent.payload), 6)]
                self._settings_sent.append({int.from_bytes(p[:2], "big"): int.from_bytes(p[2:], "big") for p in pairs})
            elif sent.kind == HEADERS:
                self._opened.add(sent.stream)
            elif sent.kind == PRIORITY and sent.stream not in self._opened:
                self._prioritised.add(sent.stream)
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
        assert self._settings_sent, "an acknowledgement without SETTINGS"
        acked = self._settings_sent.popleft()
        self.initial_window = acked.get(INITIAL_WINDOW_SIZE, self.initial_window)
        self.max_frame = acked.get(MAX_FRAME_SIZE, self.max_frame)
        if HEADER_TABLE_SIZE in acked:
            self._decoder.max_allowed_table_size = acked[HEADER_TABLE_SIZE]

    # -- frames of the server --------------------------------------------------------------------------------

    def feed(self, octets: bytes) -> list[Frame]:
        """Check the server's octets. Returns the whole frames among them."""
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
            assert got.stream & 1 or got.stream in self._prioritised, "only the client's streams"
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
        if got.stream in self._prioritised:
            result.reset = None  # reset while idle, then opened
        assert result.reset is None, "HEADERS after RST_STREAM"
        for name, value in fields:
            assert name == name.lower()
            assert not set(value) & {0, 10, 13}
        if result.headers is None:
            assert fields[0][0] == b":status", "a response starts with :status"
            result.headers = fields
        else:
            assert end_stream, "trailers end the stream"
            assert sum(len(name) + len(value) + 32 for name, value in fields) < 8192, "clients refuse larger trailers"
            assert not any(name.startswith(b":") for name, _ in fields)
            result.trailers = fields
        result.ended = bool(end_stream)

    def _reset(self, got: Frame) -> None:
        assert len(got.payload) == 4
        result = self.stream(got.stream)
        assert result.reset is None or got.stream in self._prioritised, "one RST_STREAM for a stream"
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
