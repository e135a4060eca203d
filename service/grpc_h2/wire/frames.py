"""Frames of HTTP/2 (RFC 9113 sections 4.1 and 6) as octets: types, flags, and the frames that a server writes."""

from __future__ import annotations

import struct
from collections.abc import Iterable

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

END_STREAM = ACK = 0x01
END_HEADERS = 0x04
PADDED = 0x08
PRIORITY_FIELDS = 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)

HEADER_LENGTH = 9
DEFAULT_FRAME_SIZE = 2**14
LARGEST_FRAME_SIZE = 2**24 - 1
DEFAULT_WINDOW = 65_535
LARGEST_WINDOW = 2**31 - 1
LARGEST_STREAM_ID = 2**31 - 1

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

HEADER = struct.Struct(">BHBBI")
"""Length (8 high bits, 16 low bits), type, flags, reserved bit and stream id."""
SETTING = struct.Struct(">HI")
LONG = struct.Struct(">I")
TWO_LONGS = struct.Struct(">II")


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One frame."""
    length = len(payload)
    return HEADER.pack(length >> 16, length & 0xFFFF, kind, flags, stream_id) + payload


def head(kind: int, flags: int, length: int) -> bytes:
    """The first five octets of a frame: its header without the stream id."""
    return length.to_bytes(3, "big") + bytes((kind, flags))


def headers(stream_id: int, block: bytes, *, end_stream: bool, max_frame: int) -> bytes:
    """HEADERS, and CONTINUATIONs if ``block`` is longer than the peer accepts in one frame."""
    flags = END_STREAM if end_stream else 0
    length = len(block)
    if length <= max_frame:
        return HEADER.pack(length >> 16, length & 0xFFFF, HEADERS, flags | END_HEADERS, stream_id) + block
    out = [frame(HEADERS, flags, stream_id, block[:max_frame])]
    for start in range(max_frame, len(block), max_frame):
        last = start + max_frame >= len(block)
        part = block[start : start + max_frame]
        out.append(frame(CONTINUATION, END_HEADERS if last else 0, stream_id, part))
    return b"".join(out)


def rst_stream(stream_id: int, code: int) -> bytes:
    """RST_STREAM."""
    return frame(RST_STREAM, 0, stream_id, LONG.pack(code))


def settings(values: Iterable[tuple[int, int]]) -> bytes:
    """SETTINGS with (identifier, value) pairs."""
    return frame(SETTINGS, 0, 0, b"".join(SETTING.pack(key, value) for key, value in values))


SETTINGS_ACK = frame(SETTINGS, ACK, 0)


def ping(opaque: bytes, *, ack: bool) -> bytes:
    """PING or the acknowledgement of a PING; ``opaque`` has eight octets."""
    return frame(PING, ACK if ack else 0, 0, opaque)


def goaway(last_stream_id: int, code: int, debug: bytes = b"") -> bytes:
    """GOAWAY."""
    return frame(GOAWAY, 0, 0, TWO_LONGS.pack(last_stream_id, code) + debug)


def window_update(stream_id: int, increment: int) -> bytes:
    """WINDOW_UPDATE."""
    return frame(WINDOW_UPDATE, 0, stream_id, LONG.pack(increment))
