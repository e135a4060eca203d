"""A header block in several frames: it accepts only its own continuations, up to a number and a length."""

from __future__ import annotations

import pytest

from grpc_h2.connection.headers import BlockAssembly
from grpc_h2.connection.limits import Limits
from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frames import CONTINUATION, DATA, HEADERS

LIMITS = Limits(max_continuations=3, max_header_block=16_384, max_header_list=16_384)


def begun(fragment: bytes = b"begin") -> BlockAssembly:
    return BlockAssembly(LIMITS, 5, fragment, end_stream=True, self_dependent=False)


def test_a_block_consists_of_its_fragments_in_order() -> None:
    assembly = begun()
    assert (assembly.octets, assembly.whole) == (5, None)
    for fragment in (b"-one", b"", b"-two"):
        assembly.take(CONTINUATION, 5, fragment)
    assert assembly.octets == 13
    assembly.end()
    assert assembly.whole == b"begin-one-two"
    assert (assembly.stream_id, assembly.end_stream, assembly.self_dependent) == (5, True, False)


@pytest.mark.parametrize(("kind", "stream"), [(HEADERS, 5), (DATA, 5), (CONTINUATION, 3), (CONTINUATION, 7), (77, 5)])
def test_any_other_frame_inside_a_block_is_a_protocol_error(kind: int, stream: int) -> None:
    with pytest.raises(ConnectionFault, match="a frame inside a header block") as fault:
        begun().take(kind, stream, b"x")
    assert fault.value.code is ErrorCode.PROTOCOL_ERROR


def test_one_continuation_beyond_the_limit_ends_the_connection() -> None:
    assembly = begun()
    for _ in range(3):
        assembly.take(CONTINUATION, 5, b"x")
    with pytest.raises(ConnectionFault, match="in too many CONTINUATION frames") as fault:
        assembly.take(CONTINUATION, 5, b"x")
    assert fault.value.code is ErrorCode.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(("more", "fits"), [(16_379, True), (16_380, False)])
def test_a_block_one_octet_beyond_the_limit_ends_the_connection(more: int, fits: bool) -> None:
    assembly = begun()
    if fits:
        assembly.take(CONTINUATION, 5, bytes(more))
        assert assembly.octets == 16_384
        return
    with pytest.raises(ConnectionFault, match="a header block too long") as fault:
        assembly.take(CONTINUATION, 5, bytes(more))
    assert fault.value.code is ErrorCode.ENHANCE_YOUR_CALM
