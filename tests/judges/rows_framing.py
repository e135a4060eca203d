"""Cases about framing, streams, settings, windows and HPACK: RFC 9113 and RFC 7541, as octets.

The demanded answer of a case has the form of `outcome.outcome`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests.support import h2_wire as wire

UNARY, HANG, COLLECT, META = (f"/judges.Rows/{name}".encode() for name in ("Unary", "Hang", "Collect", "Meta"))
MESSAGE = wire.grpc_message(b"world")
LAST_WORD = wire.data(1, MESSAGE, end_stream=True)


@dataclass(frozen=True)
class Row:
    """One case. ``row`` is an id of docs/requirements.md. The outcomes of ``streams`` are compared."""

    row: str
    name: str
    octets: bytes
    says: str | tuple[str, ...]
    streams: tuple[int, ...] = (1,)
    hello: bytes = wire.HELLO
    body: bool = False

    @property
    def demanded(self) -> tuple[str, ...]:
        """The answers that the requirement allows; there are several if it leaves a choice."""
        return (self.says,) if isinstance(self.says, str) else self.says

    def __str__(self) -> str:
        return f"{self.row} {self.name}"


def hanging(stream: int = 1) -> bytes:
    """A whole call that is never answered."""
    return wire.call(stream, HANG)


def half(stream: int = 1, path: bytes = UNARY) -> bytes:
    """HEADERS of a call whose message is still to come."""
    return wire.headers(stream, wire.request_block(path))


def with_block(*before: bytes, after: bytes = b"") -> bytes:
    """A call whose header block has these octets before and after the fields."""
    return wire.headers(1, b"".join(before) + wire.request_block(UNARY) + after) + LAST_WORD


P, FC, FS, SC, CE = (
    f"C:{code}_ERROR" if code != "STREAM_CLOSED" else f"C:{code}"
    for code in ("PROTOCOL", "FLOW_CONTROL", "FRAME_SIZE", "STREAM_CLOSED", "COMPRESSION")
)
BLOCK = wire.request_block(UNARY)
CUT = len(BLOCK) // 2

FRAMING = (
    Row("A1", "HTTP/1.1 instead of the preface", b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", (P, "closed"), hello=b""),
    Row("A1", "HEADERS before SETTINGS", wire.call(1, UNARY), P, hello=wire.PREFACE),
    Row("A2", "a frame of 16,385 octets, judged by its header", half() + wire.frame(0, 0, 1, length=16385), FS),
    Row("A3", "RST_STREAM of 3 octets", hanging() + wire.frame(wire.RST_STREAM, 0, 1, b"abc"), FS),
    Row("A3", "PING of 7 octets", wire.frame(wire.PING, payload=b"1234567"), FS),
    Row("A3", "WINDOW_UPDATE of 3 octets", wire.frame(wire.WINDOW_UPDATE, payload=b"abc"), FS),
    Row("A3", "SETTINGS of 5 octets", wire.frame(wire.SETTINGS, payload=b"12345"), FS),
    Row("A3", "SETTINGS ACK with a payload", wire.frame(wire.SETTINGS, wire.ACK, payload=b"123456"), FS),
    Row("A3", "GOAWAY of 7 octets", wire.frame(wire.GOAWAY, payload=b"1234567"), FS),
    Row("A3", "PRIORITY of 4 octets", hanging() + wire.frame(wire.PRIORITY, 0, 1, b"1234"), "S:FRAME_SIZE_ERROR"),
    Row("A4", "DATA on stream 0", wire.data(0, MESSAGE), P),
    Row("A4", "HEADERS on stream 0", wire.headers(0, BLOCK), P),
    Row("A4", "PRIORITY on stream 0", wire.priority(0, 1), P),
    Row("A4", "RST_STREAM on stream 0", wire.rst_stream(0), P),
    Row("A4", "CONTINUATION on stream 0", wire.continuation(0, BLOCK, end_headers=True), P),
    Row("A4", "SETTINGS on a stream", wire.frame(wire.SETTINGS, 0, 1), P),
    Row("A4", "PING on a stream", wire.frame(wire.PING, 0, 1, b"12345678"), P),
    Row("A4", "GOAWAY on a stream", wire.frame(wire.GOAWAY, 0, 1, bytes(8)), P),
    Row("A4", "PUSH_PROMISE", hanging() + wire.frame(wire.PUSH_PROMISE, wire.END_HEADERS, 1, bytes(4) + BLOCK), P),
    Row("A5", "a frame of unknown type", wire.frame(0x42, 0xFF, 1, b"what") + wire.call(1, UNARY), "T:0"),
    Row("A5", "an unknown setting", wire.settings((0x99, 7)) + wire.call(1, UNARY), "T:0"),
    Row("A5", "unknown flags", wire.frame(wire.HEADERS, 0x54, 1, BLOCK) + LAST_WORD, "T:0"),
    Row("A5", "the reserved bit", wire.frame(wire.HEADERS, 4, 1 << 31 | 1, BLOCK) + LAST_WORD, "T:0"),
    Row("A5", "an unknown type inside a header block", wire.headers(1, BLOCK[:CUT], end_headers=False)
        + wire.frame(0x42) + wire.continuation(1, BLOCK[CUT:], end_headers=True) + LAST_WORD, P),
    Row("A6", "padded HEADERS", wire.headers(1, BLOCK, pad=9) + LAST_WORD, "T:0"),
    Row("A6", "HEADERS with priority", wire.headers(1, BLOCK, depends=0) + LAST_WORD, "T:0"),
    Row("A6", "HEADERS with padding and priority", wire.headers(1, BLOCK, pad=9, depends=0) + LAST_WORD, "T:0"),
    Row("A6", "padded DATA", half() + wire.data(1, MESSAGE, end_stream=True, pad=200), "T:0"),
    Row("A6", "more padding than HEADERS", wire.frame(wire.HEADERS, 0xC, 1, b"\xff" + BLOCK[:50]), P),
    Row("A6", "more padding than DATA", half() + wire.frame(wire.DATA, 0x8, 1, b"\x09abc"), P),
    Row("A7", "a block in three pieces", wire.headers(1, BLOCK[:CUT], end_headers=False)
        + wire.continuation(1, BLOCK[CUT:-1]) + wire.continuation(1, BLOCK[-1:], end_headers=True) + LAST_WORD, "T:0"),
    Row("A7", "DATA inside a header block", wire.headers(1, BLOCK, end_headers=False) + LAST_WORD, P),
    Row("A7", "PING inside a header block", wire.headers(1, BLOCK, end_headers=False) + wire.ping(), P),
    Row("A7", "CONTINUATION of another stream", wire.headers(1, BLOCK[:CUT], end_headers=False)
        + wire.continuation(3, BLOCK[CUT:], end_headers=True), P),
    Row("A7", "CONTINUATION of nothing", hanging() + wire.continuation(1, b"", end_headers=True), P),
    Row("A8", "PRIORITY on idle streams", wire.priority(3) + wire.priority(5, 3) + wire.call(1, UNARY), "T:0"),
    Row("A8", "a stream that depends on itself", hanging() + wire.priority(1, 1), "S:PROTOCOL_ERROR"),
    Row("A9", "ACK of a PING that was not sent", wire.ping(ack=True) + wire.call(1, UNARY), "T:0"),
    Row("A10", "an even stream", wire.headers(2, BLOCK, end_stream=True), P, streams=(2,)),
    Row("A10", "a lower stream than before", hanging(5) + wire.call(3, UNARY), P, streams=(3,)),
    Row("A11", "DATA on an idle stream", wire.data(1, MESSAGE), P),
    Row("A11", "RST_STREAM on an idle stream", wire.rst_stream(1), P),
    Row("A11", "WINDOW_UPDATE on an idle stream", wire.window_update(1, 9), P),
    Row("A12", "DATA after END_STREAM", hanging() + wire.data(1, MESSAGE), ("S:STREAM_CLOSED", SC)),
    Row("A12", "HEADERS after END_STREAM", hanging() + wire.headers(1, BLOCK, end_stream=True),
        ("S:STREAM_CLOSED", SC)),
    Row("A12", "what may come late", hanging() + wire.rst_stream(1) + wire.window_update(1, 9) + wire.priority(1)
        + wire.rst_stream(1) + wire.call(3, UNARY), "T:0", streams=(3,)),
    Row("A13", "what was on its way when we reset a stream", wire.headers(1, wire.request_block(UNARY, (b"X", b"1")))
        + wire.data(1, MESSAGE) + wire.headers(1, wire.inserting(b"x-a", b"1"), end_stream=True)
        + wire.headers(3, wire.request_block(META) + wire.indexed(62)) + wire.data(3, MESSAGE, end_stream=True),
        'S:PROTOCOL_ERROR, T:0 [["x-a", "1"]]', streams=(1, 3), body=True),
    Row("A14", "call 300 of a connection", b"".join(map(hanging, range(1, 600, 2))),
        "S:REFUSED_STREAM; then S:REFUSED_STREAM", streams=(599,)),
    Row("A15", "trailers", wire.headers(1, wire.request_block(COLLECT)) + wire.data(1, MESSAGE)
        + wire.headers(1, wire.block([(b"x-a", b"1")]), end_stream=True), "T:0"),
    Row("A15", "trailers without END_STREAM", half(1, COLLECT) + wire.headers(1, wire.block([(b"x-a", b"1")])),
        "S:PROTOCOL_ERROR"),
    Row("A15", "trailers with a pseudo-header", half(1, COLLECT)
        + wire.headers(1, wire.block([(b":path", b"/a")]), end_stream=True), "S:PROTOCOL_ERROR"),
    Row("A16", "ACK of SETTINGS that were not sent", wire.SETTINGS_ACK * 9, P),
    Row("A17", "ENABLE_PUSH 2", wire.settings((wire.ENABLE_PUSH, 2)), P),
    Row("A17", "MAX_FRAME_SIZE 16,383", wire.settings((wire.MAX_FRAME_SIZE, 16383)), P),
    Row("A17", "MAX_FRAME_SIZE 2^24", wire.settings((wire.MAX_FRAME_SIZE, 1 << 24)), P),
    Row("A17", "INITIAL_WINDOW_SIZE 2^31", wire.settings((wire.INITIAL_WINDOW_SIZE, 1 << 31)), FC),
    Row("A18", "a header table of no octets", wire.settings((wire.HEADER_TABLE_SIZE, 0)) + wire.call(1, UNARY), "T:0"),
    Row("A19", "a window of nothing that grows", wire.settings((wire.INITIAL_WINDOW_SIZE, 0)) + wire.call(1, UNARY)
        + wire.settings((wire.INITIAL_WINDOW_SIZE, 99)), "T:0"),
    Row("A19", "a window that grows beyond 2^31-1", hanging() + wire.window_update(1, (1 << 31) - 1 - 65535)
        + wire.settings((wire.INITIAL_WINDOW_SIZE, 65536)), FC),
    Row("A20", "a window of 3 octets that is raised", wire.settings((wire.INITIAL_WINDOW_SIZE, 3)) + wire.call(1, UNARY)
        + wire.window_update(1, 3) + wire.window_update(1, 3) + wire.window_update(1, 3), "T:0"),
    Row("A21", "WINDOW_UPDATE of 0 on a stream", hanging() + wire.window_update(1, 0), "S:PROTOCOL_ERROR"),
    Row("A21", "WINDOW_UPDATE of 0", wire.window_update(0, 0), P),
    Row("A21", "a stream's window beyond 2^31-1", hanging() + wire.window_update(1, (1 << 31) - 1),
        "S:FLOW_CONTROL_ERROR"),
    Row("A21", "the connection's window beyond 2^31-1", wire.window_update(0, (1 << 31) - 1), FC),
    Row("A23", "index 0", with_block(after=b"\x80"), CE),
    Row("A23", "an index past the table", with_block(after=wire.indexed(99)), CE),
    Row("A23", "a name's index past the table", with_block(after=wire.integer(99, 4) + wire.string(b"a")), CE),
    Row("A23", "a number without end", with_block(after=b"\xff" * 12 + b"\x01"), CE),
    Row("A23", "a string longer than its block", with_block(after=b"\x00\x01a\x7e"), CE),
    Row("A24", "Huffman padding of more than 7 bits", with_block(after=b"\x00\x01a\x82\x1f\xff"), CE),
    Row("A24", "Huffman padding of zeros", with_block(after=b"\x00\x01a\x81\x18"), CE),
    Row("A24", "Huffman code with EOS", with_block(after=b"\x00\x01a\x84\xff\xff\xff\xff"), CE),
    Row("A25", "two size updates before the fields", with_block(wire.size_update(0), wire.size_update(4096)), "T:0"),
    Row("A25", "a size update after a field", with_block(after=wire.size_update(0)), CE),
    Row("A25", "a size update beyond what was offered", with_block(wire.size_update(4097)), CE),
    Row("A26", "an entry larger than the table", with_block(after=wire.inserting(b"x-a", bytes(b"v" * 5000))), "T:0"),
    Row("A26", "a value by the index of an evicted entry", wire.headers(1, wire.request_block(META)
        + wire.inserting(b"x-a", b"v" * 4000) + b"\x7e" + wire.string(b"w" * 60) + wire.indexed(62)) + LAST_WORD,
        "T:0"),
    Row("A27", "a refused call leaves the table in step", wire.headers(1, wire.request_block(UNARY, (b"X", b"1"))
        + wire.inserting(b"x-a", b"1"), end_stream=True) + wire.headers(3, wire.request_block(META)
        + wire.indexed(62)) + wire.data(3, MESSAGE, end_stream=True),
        'S:PROTOCOL_ERROR, T:0 [["x-a", "1"]]', streams=(1, 3), body=True),
)  # fmt: skip
