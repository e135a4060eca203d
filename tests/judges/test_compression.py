"""Compression on the wire. The tests examine the frames, because no client library shows compression."""

from __future__ import annotations

import gzip

import pytest
from tests.judges.messages import message_class
from tests.judges.outcome import exchange
from tests.support import h2_wire as wire

SERVICE = b"/grpc.testing.TestService/"
GZIP = (b"grpc-accept-encoding", b"identity, gzip")


def call(method: bytes, request: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    headers = wire.headers(1, wire.request_block(SERVICE + method, *extra))
    return headers + wire.data(1, wire.grpc_message(request), end_stream=True)


def messages(body: bytes) -> list[tuple[int, bytes]]:
    """Flag and octets of each message."""
    found = []
    while body:
        end = 5 + int.from_bytes(body[1:5], "big")
        found.append((body[0], body[5:end]))
        body = body[end:]
    return found


def unary(compressed: bool) -> bytes:
    wanted = message_class("BoolValue")(value=compressed)
    request: bytes = message_class("SimpleRequest")(response_size=9000, response_compressed=wanted).SerializeToString()
    return request


def test_an_answer_is_compressed_when_the_servicer_requests_it(native: int) -> None:
    # This is not tested on grpcio, because grpc.aio 1.85.1 ignores set_compression in a unary handler.
    fields, body = exchange(native, call(b"UnaryCall", unary(True), GZIP))
    [(flag, octets)] = messages(body)
    assert (fields[b"grpc-status"], fields[b"grpc-encoding"], flag) == (b"0", b"gzip", 1)
    answer = message_class("SimpleResponse").FromString(gzip.decompress(octets))
    assert answer.payload.body == bytes(9000)


@pytest.mark.parametrize(
    ("compressed", "accepted"), [(False, (GZIP,)), (True, ())], ids=["not wanted", "not understood by the client"]
)
def test_an_answer_is_not_compressed(
    every_transport: int, compressed: bool, accepted: tuple[tuple[bytes, bytes], ...]
) -> None:
    fields, body = exchange(every_transport, call(b"UnaryCall", unary(compressed), *accepted))
    [(flag, octets)] = messages(body)
    assert (fields[b"grpc-status"], flag) == (b"0", 0)
    assert message_class("SimpleResponse").FromString(octets).payload.body == bytes(9000)


def test_one_message_of_a_compressed_stream_can_stay_plain(every_transport: int) -> None:
    compressed, parameters = message_class("BoolValue"), message_class("ResponseParameters")
    request = message_class("StreamingOutputCallRequest")(
        response_parameters=[
            parameters(size=3000, compressed=compressed(value=True)),
            parameters(size=4000, compressed=compressed(value=False)),
        ]
    )
    fields, body = exchange(every_transport, call(b"StreamingOutputCall", request.SerializeToString(), GZIP))
    assert fields[b"grpc-status"] == b"0"
    first, second = messages(body)
    assert (first[0], second[0]) == (1, 0)
    answer = message_class("StreamingOutputCallResponse")
    assert answer.FromString(gzip.decompress(first[1])).payload.body == bytes(3000)
    assert answer.FromString(second[1]).payload.body == bytes(4000)
