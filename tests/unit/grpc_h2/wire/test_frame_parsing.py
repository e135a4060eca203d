"""The checks of a frame's header by type and stream, and the removal of padding and priority fields."""

from __future__ import annotations

import pytest

from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault
from grpc_h2.wire.frame_parsing import check_shape, depends_on_itself, unpadded, without_priority

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
UNKNOWN = 11
ACK, PADDED, WITH_PRIORITY = 0x01, 0x08, 0x20
FINE, PROTOCOL, SIZE, STREAM = "fine", "PROTOCOL_ERROR", "FRAME_SIZE_ERROR", "a stream's FRAME_SIZE_ERROR"


def judged(kind: int, stream: int, length: int, flags: int = 0) -> str:
    try:
        check_shape(kind, flags, stream, length)
    except StreamFault as fault:
        return f"a stream's {fault.code.name}"
    except ConnectionFault as fault:
        return fault.code.name
    return FINE


@pytest.mark.parametrize(
    ("kind", "on_stream", "on_connection"),
    [
        (DATA, FINE, PROTOCOL), (HEADERS, FINE, PROTOCOL), (PRIORITY, FINE, PROTOCOL), (RST_STREAM, SIZE, PROTOCOL),
        (SETTINGS, PROTOCOL, SIZE), (PUSH_PROMISE, PROTOCOL, PROTOCOL), (PING, PROTOCOL, SIZE),
        (GOAWAY, PROTOCOL, SIZE), (WINDOW_UPDATE, SIZE, SIZE), (CONTINUATION, FINE, PROTOCOL), (UNKNOWN, FINE, FINE),
    ],
)  # fmt: skip
def test_a_frame_type_is_valid_on_a_stream_on_the_connection_or_on_both(
    kind: int, on_stream: str, on_connection: str
) -> None:
    assert judged(kind, 1, 5) == on_stream
    assert judged(kind, 2**31 - 1, 5) == on_stream
    assert judged(kind, 0, 5) == on_connection


@pytest.mark.parametrize(
    ("kind", "stream", "lengths", "otherwise"),
    [
        (PRIORITY, 1, {5}, STREAM),
        (RST_STREAM, 1, {4}, SIZE),
        (WINDOW_UPDATE, 1, {4}, SIZE),
        (WINDOW_UPDATE, 0, {4}, SIZE),
        (PING, 0, {8}, SIZE),
        (SETTINGS, 0, {0, 6, 12}, SIZE),
        (GOAWAY, 0, {8, 9, 10, 11, 12, 13}, SIZE),
        (UNKNOWN, 0, set(range(14)), SIZE),
    ],
)
def test_a_wrong_length_of_a_fixed_length_frame_is_a_frame_size_error(
    kind: int, stream: int, lengths: set[int], otherwise: str
) -> None:
    for length in range(14):
        assert judged(kind, stream, length) == (FINE if length in lengths else otherwise), length


@pytest.mark.parametrize(("length", "found"), [(0, FINE), (6, SIZE), (12, SIZE), (1, SIZE)])
def test_a_settings_acknowledgement_with_content_is_a_frame_size_error(length: int, found: str) -> None:
    assert judged(SETTINGS, 0, length, ACK) == found


@pytest.mark.parametrize(
    ("payload", "content"),
    [(b"\0", b""), (b"\0abc", b"abc"), (b"\2abcde", b"abc"), (b"\3abc", b""), (b"\4abc", None), (b"\1", None)],
)
def test_padding_is_removed_and_padding_as_long_as_the_payload_is_a_protocol_error(
    payload: bytes, content: bytes | None
) -> None:
    if content is not None:
        assert unpadded(PADDED, payload) == content
        return
    with pytest.raises(ConnectionFault, match="padding as long as the payload") as fault:
        unpadded(PADDED, payload)
    assert fault.value.code is ErrorCode.PROTOCOL_ERROR


def test_padding_is_removed_only_if_the_padded_flag_is_set() -> None:
    assert unpadded(0xFF & ~PADDED, b"\2abc") == b"\2abc"
    assert unpadded(0, b"") == b""
    with pytest.raises(ConnectionFault, match="without a pad length") as fault:
        unpadded(PADDED, b"")
    assert fault.value.code is ErrorCode.FRAME_SIZE_ERROR


@pytest.mark.parametrize(
    ("stream", "named", "itself"), [(3, 3, True), (3, 0x80000003, True), (3, 5, False), (2**31 - 1, 2**32 - 1, True)]
)
def test_priority_fields_are_removed_and_a_dependency_on_the_own_stream_is_reported(
    stream: int, named: int, itself: bool
) -> None:
    fields = named.to_bytes(4, "big") + b"\x10"
    assert without_priority(WITH_PRIORITY, stream, fields + b"block") == (b"block", itself)
    assert without_priority(WITH_PRIORITY, stream, fields) == (b"", itself)
    assert without_priority(0xFF & ~WITH_PRIORITY, stream, fields) == (fields, False)
    assert depends_on_itself(stream, fields) is itself
    with pytest.raises(ConnectionFault, match="too short for its priority fields") as fault:
        without_priority(WITH_PRIORITY, stream, fields[:4])
    assert fault.value.code is ErrorCode.FRAME_SIZE_ERROR
