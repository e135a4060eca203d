"""Parses frames: lengths, padding, priority fields. Pure functions of a frame's header and payload."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault

LONGEST_SHORT_BLOCK = 384
"""Header blocks up to this length may use the fast path and be remembered. This length is enough for a call whose
fields are all literals. Longer blocks are decoded a piece at a time; a short block of 128 fields of three octets takes
80 µs."""
_LONGEST_SHORT_DATA = 512


def _shape(block: int) -> tuple[Callable[[bytes, int], tuple[Any, ...]], int]:
    # Stream id and block, then the first five octets and the stream id of the next frame.
    unpack = struct.Struct(f">5xI{block}s5sI").unpack_from
    return unpack, 2 * frames.HEADER_LENGTH + block


SHAPES = {
    frames.head(frames.HEADERS, frames.END_HEADERS, length): _shape(length)
    for length in range(1, LONGEST_SHORT_BLOCK + 1)
}
"""First five octets of a HEADERS frame without padding or priority → a function that unpacks the frame together with
the header of the next frame, and the length of both."""

LAST_DATA = {
    frames.head(frames.DATA, frames.END_STREAM, length): length for length in range(5, _LONGEST_SHORT_DATA + 1)
}
"""First five octets of a DATA frame that ends its stream → its length."""

_FIXED_LENGTHS = {frames.RST_STREAM: 4, frames.PING: 8, frames.WINDOW_UPDATE: 4}
_CONNECTION_FRAMES = (frames.SETTINGS, frames.PING, frames.GOAWAY)
_STREAM_FRAMES = (frames.DATA, frames.HEADERS, frames.PRIORITY, frames.RST_STREAM, frames.CONTINUATION)


def check_shape(kind: int, flags: int, stream_id: int, length: int) -> None:
    """Judge a frame by its header (RFC 9113 sections 6.1 to 6.10).

    Raises:
        ConnectionFault: FRAME_SIZE_ERROR or PROTOCOL_ERROR.
        StreamFault: FRAME_SIZE_ERROR, for PRIORITY only.
    """
    # The valid frames of ordinary calls are judged first, because the checks below take 1 µs.
    if stream_id:
        if kind <= frames.HEADERS or (kind == frames.WINDOW_UPDATE and length == 4):
            return
        if kind in _CONNECTION_FRAMES:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"frame of type {kind} on stream {stream_id}")
    elif (kind == frames.WINDOW_UPDATE and length == 4) or (kind == frames.PING and length == 8):
        return
    elif kind in _STREAM_FRAMES:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"frame of type {kind} on stream 0")
    if kind == frames.PUSH_PROMISE:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE from a client")
    if kind == frames.PRIORITY:
        if length != 5:
            raise StreamFault(ErrorCode.FRAME_SIZE_ERROR, f"PRIORITY of {length} octets")
        return
    wanted = _FIXED_LENGTHS.get(kind)
    wrong = (
        (wanted is not None and length != wanted)
        or (kind == frames.SETTINGS and (length % 6 or (flags & frames.ACK and length)))
        or (kind == frames.GOAWAY and length < 8)
    )
    if wrong:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"frame of type {kind} with {length} octets")


def unpadded(flags: int, payload: bytes) -> bytes:
    """The content of a DATA or HEADERS payload.

    Raises:
        ConnectionFault: PROTOCOL_ERROR if the padding is as long as the payload or longer (section 6.1).
    """
    if not flags & frames.PADDED:
        return payload
    if not payload:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "a padded frame without a pad length")
    padding = payload[0]
    if padding >= len(payload):
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding as long as the payload")
    return payload[1 : len(payload) - padding]


def without_priority(flags: int, stream_id: int, fragment: bytes) -> tuple[bytes, bool]:
    """A HEADERS fragment without the priority fields, and whether the stream was made to depend on itself.

    Such a dependency is a stream error (RFC 7540 section 5.3.1), which is raised only after the block has been decoded.

    Raises:
        ConnectionFault: FRAME_SIZE_ERROR if the priority fields are incomplete.
    """
    if not flags & frames.PRIORITY_FIELDS:
        return fragment, False
    if len(fragment) < 5:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS too short for its priority fields")
    return fragment[5:], depends_on_itself(stream_id, fragment)


def depends_on_itself(stream_id: int, priority: bytes) -> bool:
    """Whether the priority fields make the stream depend on itself."""
    return bool(frames.LONG.unpack_from(priority)[0] & frames.LARGEST_STREAM_ID == stream_id)
