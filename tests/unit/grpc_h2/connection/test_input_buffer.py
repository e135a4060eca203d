"""The buffer for octets that have arrived: no octet is lost, and none is processed twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.connection.input_buffer import InputBuffer
from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frames import PREFACE


@given(st.lists(st.tuples(st.binary(max_size=8), st.integers(0, 12), st.booleans()), max_size=20))
def test_octets_are_taken_in_the_order_of_their_arrival(steps: list[tuple[bytes, int, bool]]) -> None:
    buffer, came, taken = InputBuffer(), b"", b""
    for data, take, backlog in steps:
        buffer.add(data)
        came += data
        assert buffer.backlog
        held, position = buffer.held, buffer.position
        end = min(len(held), position + take)
        taken += held[position:end]
        buffer.keep(held, end, backlog=backlog)
        assert buffer.backlog is backlog
        assert buffer.held[buffer.position :] == came[len(taken) :]
        buffer.check_invariants()
    assert came.startswith(taken)


def test_a_cleared_buffer_holds_nothing() -> None:
    buffer = InputBuffer()
    buffer.keep(b"abcdef", 3, backlog=True)
    assert (buffer.held, buffer.position, buffer.backlog) == (b"abcdef", 3, True)
    buffer.clear()
    assert (buffer.held, buffer.position, buffer.backlog) == (b"", 0, False)


@pytest.mark.parametrize("cut", range(1, len(PREFACE) + 1))
def test_a_preface_is_taken_when_it_is_complete(cut: int) -> None:
    buffer = InputBuffer()
    buffer.add(PREFACE[:cut])
    if cut < len(PREFACE):
        assert buffer.take_preface() is False
        assert not buffer.backlog, "nothing can be done without more octets"
        buffer.add(PREFACE[cut:] + b"frame")
    else:
        buffer.add(b"frame")
    assert buffer.take_preface() is True
    assert buffer.held == b"frame"


@pytest.mark.parametrize("wrong", [b"X", PREFACE[:5] + b"X", PREFACE[:-1] + b"X"])
def test_a_wrong_preface_is_a_protocol_error(wrong: bytes) -> None:
    buffer = InputBuffer()
    buffer.add(wrong)
    with pytest.raises(ConnectionFault, match="no HTTP/2 preface") as fault:
        buffer.take_preface()
    assert fault.value.code is ErrorCode.PROTOCOL_ERROR
