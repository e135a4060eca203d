"""HTTP/2 at the level of octets, for tests: builders of frames and header blocks, legal and illegal.

Nothing here shares code with the engine under test: frames are built by hand (RFC 9113 section 4.1), header blocks
from the octets of RFC 7541 section 6. `tests.support.h2_replies` checks the frames of the server.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pytest
from tests.support.wire import (  # this module also provides the names below
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    frame,
    integer,
    settings,
    window_update,
)
from tests.support.wire import message as grpc_message

__all__ = ["PUSH_PROMISE", "WINDOW_UPDATE", "window_update"]

PADDED = 0x8
PRIORITISED = 0x20

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM = 11

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)

LARGEST_WINDOW = 2**31 - 1

Fields = Iterable[tuple[bytes, bytes]]


# --- frames ----------------------------------------------------------------------------------------------------------


SETTINGS_ACK = frame(SETTINGS, ACK)
HELLO = PREFACE + settings()


def padded(payload: bytes, pad: int) -> bytes:
    return bytes((pad,)) + payload + bytes(pad)


def headers(
    stream: int,
    block: bytes,
    *,
    end_stream: bool = False,
    end_headers: bool = True,
    pad: int | None = None,
    depends: int | None = None,
) -> bytes:
    """A HEADERS frame with `pad` octets of padding, and with PRIORITY fields if `depends` names a stream."""
    flags = END_STREAM * end_stream | END_HEADERS * end_headers
    if depends is not None:
        flags |= PRIORITISED
        block = depends.to_bytes(4, "big") + b"\x0f" + block
    if pad is not None:
        flags |= PADDED
        block = padded(block, pad)
    return frame(HEADERS, flags, stream, block)


def continuation(stream: int, block: bytes, *, end_headers: bool = False) -> bytes:
    return frame(CONTINUATION, END_HEADERS * end_headers, stream, block)


def data(stream: int, payload: bytes = b"", *, end_stream: bool = False, pad: int | None = None) -> bytes:
    flags = END_STREAM * end_stream
    if pad is not None:
        flags |= PADDED
        payload = padded(payload, pad)
    return frame(DATA, flags, stream, payload)


def priority(stream: int, depends: int = 0, weight: int = 15) -> bytes:
    return frame(PRIORITY, 0, stream, depends.to_bytes(4, "big") + bytes((weight,)))


def rst_stream(stream: int, code: int = CANCEL) -> bytes:
    return frame(RST_STREAM, 0, stream, code.to_bytes(4, "big"))


def ping(payload: bytes = b"12345678", *, ack: bool = False) -> bytes:
    return frame(PING, ACK * ack, 0, payload)


def goaway(last: int = 0, code: int = NO_ERROR, text: bytes = b"") -> bytes:
    return frame(GOAWAY, 0, 0, last.to_bytes(4, "big") + code.to_bytes(4, "big") + text)


# --- header blocks ---------------------------------------------------------------------------------------------------


def string(value: bytes) -> bytes:
    """A string literal without Huffman coding."""
    return integer(len(value), 7) + value


def indexed(index: int) -> bytes:
    return integer(index, 7, 0x80)


def plain(name: bytes, value: bytes) -> bytes:
    """A literal without indexing: it neither reads nor changes the dynamic table."""
    return b"\x00" + string(name) + string(value)


def inserting(name: bytes, value: bytes) -> bytes:
    """A literal with incremental indexing: it becomes entry 62."""
    return b"\x40" + string(name) + string(value)


def size_update(size: int) -> bytes:
    return integer(size, 5, 0x20)


def block(fields: Fields) -> bytes:
    return b"".join(plain(name, value) for name, value in fields)


def request_fields(
    path: bytes = b"/t.S/Get", *extra: tuple[bytes, bytes], **replaced: bytes | None
) -> list[tuple[bytes, bytes]]:
    """The fields of a gRPC request. `replaced` names fields with _ for - and without the colon; the value None omits a
    field."""
    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": path,
        b":authority": b"localhost",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"user-agent": b"test/1",
        b"authorization": b"Bearer k1",
    }
    for key, value in replaced.items():
        name = key.encode().replace(b"_", b"-")
        name = b":" + name if b":" + name in fields else name
        if value is None:
            del fields[name]
        else:
            fields[name] = value
    return [*fields.items(), *extra]


def request_block(path: bytes = b"/t.S/Get", *extra: tuple[bytes, bytes], **replaced: bytes | None) -> bytes:
    return block(request_fields(path, *extra, **replaced))


def call(stream: int, path: bytes = b"/t.S/Get", message: bytes = b"world") -> bytes:
    """A whole unary call: HEADERS, DATA and END_STREAM."""
    return headers(stream, request_block(path)) + data(stream, grpc_message(message), end_stream=True)


# --- reading frames --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    kind: int
    flags: int
    stream: int
    payload: bytes

    @property
    def words(self) -> tuple[int, ...]:
        """The payload as 32-bit numbers."""
        return tuple(int.from_bytes(self.payload[at : at + 4], "big") for at in range(0, len(self.payload) // 4 * 4, 4))


def split_frames(octets: bytes) -> tuple[list[Frame], bytes]:
    """The whole frames of `octets`, and the rest."""
    frames, at = [], 0
    while at + 9 <= len(octets):
        end = at + 9 + int.from_bytes(octets[at : at + 3], "big")
        if end > len(octets):
            break
        stream = int.from_bytes(octets[at + 5 : at + 9], "big") & 0x7FFFFFFF
        frames.append(Frame(octets[at + 3], octets[at + 4], stream, octets[at + 9 : end]))
        at = end
    return frames, octets[at:]


# --- three ways of feeding -------------------------------------------------------------------------------------------

Feed = Callable[[bytes], Iterator[bytes]]


def whole(octets: bytes) -> Iterator[bytes]:
    yield octets


def bytewise(octets: bytes) -> Iterator[bytes]:
    for at in range(len(octets)):
        yield octets[at : at + 1]


def chunks(octets: bytes) -> Iterator[bytes]:
    """Cuts octets into pieces of random sizes, which are the same in each run."""
    draw = random.Random(len(octets))
    at = 0
    while at < len(octets):
        size = draw.choice((1, 2, 3, 8, 9, 10, 17, 64, 300))
        yield octets[at : at + size]
        at += size


FEEDS: tuple[Feed, ...] = (whole, bytewise, chunks)
three_ways = pytest.mark.parametrize(
    "feed",
    [whole, bytewise, pytest.param(chunks, marks=pytest.mark.thorough)],
    ids=lambda feed: feed.__name__,
)
