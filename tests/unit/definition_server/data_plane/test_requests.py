"""Requests are read as the protobuf library reads them."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from hypothesis import example, given
from hypothesis import strategies as st

from definition_server.catalog.wire import WireError, read_varint, varint
from definition_server.data_plane.requests import check_empty, text_of
from definition_server.rpc import avap_pb2

numbers = st.sampled_from((1, 2, 3, 15, 16, 2**29 - 1))
sizes = st.one_of(st.integers(0, 300), st.sampled_from((2**31 - 1, 2**32, 2**64 - 1)))


def tag(number: int, kind: int) -> bytes:
    return varint(number << 3 | kind)


@st.composite
def fields(draw: st.DrawFn) -> bytes:
    """One field of any wire type, whole or damaged."""
    number, kind = draw(numbers), draw(st.integers(0, 7))
    if kind == 0:
        return tag(number, kind) + varint(draw(sizes))
    if kind == 2:
        content = draw(st.one_of(st.binary(max_size=20), st.text(max_size=20).map(str.encode)))
        size = draw(st.one_of(st.just(len(content)), sizes))
        return tag(number, kind) + varint(size) + content
    if kind == 3:
        inside = b"".join(draw(st.lists(fields(), max_size=2)))
        return tag(number, kind) + inside + tag(draw(st.one_of(st.just(number), numbers)), 4)
    return tag(number, kind) + draw(st.binary(min_size=4, max_size=8))


def stops_at_number_0(request: bytes) -> bool:
    """Whether our reader refuses ``request`` for a field of number 0, which is illegal, but which the library skips."""
    try:
        check_empty(request)
    except WireError as error:
        text, _, position = str(error).rpartition(" ")
        return text == "no tag at" and read_varint(request, int(position))[0] < 8
    return False


messages = st.lists(fields(), max_size=4).map(b"".join).filter(lambda request: not stops_at_number_0(request))


def by_the_library(kind: type, request: bytes) -> object:
    try:
        return kind.FromString(request)
    except DecodeError:
        return None


def ours(request: bytes) -> bytes | None:
    try:
        return text_of(request)
    except WireError:
        return None


@given(messages)
@example(b"")
@example(b"\x0a\x02if\x0a\x04else")
@example(b"\x0a\x01\xff")
@example(b"\x0a\x03\xed\xa0\x80")
@example(b"\x0a\x81\x80\x80\x80\x80\x00a")
@example(b"\x1b" * 100 + b"\x1c" * 100)
@example(b"\x1b" * 101 + b"\x1c" * 101)
@example(b"\x10" + b"\xff" * 9 + b"\x01")
@example(b"\x10" + b"\xff" * 10 + b"\x01")
def test_a_text_is_read_and_refused_as_by_the_protobuf_library(request: bytes) -> None:
    for kind, name in ((avap_pb2.CommandRequest, "name"), (health_pb2.HealthCheckRequest, "service")):
        message = by_the_library(kind, request)
        expected = None if message is None else getattr(message, name).encode()
        assert ours(request) == expected


@given(messages)
def test_an_empty_message_is_accepted_and_refused_as_by_the_protobuf_library(request: bytes) -> None:
    refused = by_the_library(avap_pb2.Empty, request) is None
    if refused:
        with pytest.raises(WireError):
            check_empty(request)
    else:
        check_empty(request)


@pytest.mark.parametrize("request_", [b"\x00\x01", b"\x02\x00", b"\x0b\x00\x01\x0c"])
def test_field_number_0_is_refused_everywhere(request_: bytes) -> None:
    for read in (text_of, check_empty):
        with pytest.raises(WireError):
            read(request_)
