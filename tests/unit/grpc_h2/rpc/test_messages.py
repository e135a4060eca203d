"""Splitting DATA into gRPC messages: the result does not depend on the pieces, and limits apply before octets are
kept."""

from __future__ import annotations

import gc
import gzip
import time
import tracemalloc
import zlib
from contextlib import suppress
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.rpc.faults import CallFault
from grpc_h2.rpc.messages import (
    MessageReader,
    compress_gzip,
    decompress,
    frame_message,
    message_prefix,
    plain_message,
)
from grpc_h2.rpc.status import StatusCode

MIB = 1024 * 1024


def prefixed(payload: bytes, flag: int = 0) -> bytes:
    return bytes([flag]) + len(payload).to_bytes(4, "big") + payload


def status_of(data: bytes, encoding: str = "identity", limit: int = 4 * MIB) -> int:
    """The status of the fault, which must be the same for every division of the octets."""
    statuses = set()
    for pieces in ([data], [data[i : i + 1] for i in range(len(data))], [data + b"\0\0\0\0\1z"]):
        reader = MessageReader(limit, encoding)
        with pytest.raises(CallFault) as raised:
            list(map(reader.feed, pieces))
        assert reader.buffered == 0
        for again in (lambda reader=reader: reader.feed(b""), reader.finish):
            with pytest.raises(CallFault) as repeated:
                again()
            assert (repeated.value.status, repeated.value.message) == (raised.value.status, raised.value.message)
        statuses.add(raised.value.status)
    assert len(statuses) == 1
    return statuses.pop()


@pytest.mark.requirement("A40")
@given(st.lists(st.binary(max_size=40), max_size=6), st.data())
def test_messages_that_are_not_aligned_with_pieces_arrive_whole(messages: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(prefixed, messages))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    edges = [0, *cuts, len(stream)]
    random = [stream[a:b] for a, b in pairwise(edges)]
    for pieces in ([stream], [stream[i : i + 1] for i in range(len(stream))], random):
        for kind in (bytes, bytearray, memoryview):
            reader = MessageReader()
            taken = [message for piece in pieces for message in reader.feed(kind(piece))]
            assert taken == messages
            assert all(type(message) is bytes for message in taken)
            assert reader.buffered == 0
            reader.finish()


@pytest.mark.requirement("A40")
@given(st.binary(max_size=20), st.binary(max_size=20), st.data())
def test_a_request_that_ends_within_a_message_fails_with_internal(
    first: bytes, second: bytes, data: st.DataObject
) -> None:
    cut = data.draw(st.integers(1, 4 + len(second)))
    reader = MessageReader()
    assert reader.feed(prefixed(first) + prefixed(second)[:cut]) == [first]
    assert reader.buffered == cut
    with pytest.raises(CallFault) as raised:
        reader.finish()
    assert raised.value.status == 13


def test_a_request_without_octets_ends_without_a_fault() -> None:
    reader = MessageReader()
    assert reader.feed(b"") == []
    reader.finish()


@pytest.mark.requirement("A38")
@pytest.mark.parametrize("encoding", ["snappy", "GZIP", "x" * 5000])
def test_an_unknown_encoding_fails_only_a_compressed_message(encoding: str) -> None:
    assert status_of(prefixed(b"x", flag=1), encoding) == 12
    assert MessageReader(encoding=encoding).feed(prefixed(b"plain")) == [b"plain"]


@pytest.mark.requirement("A38")
def test_a_compressed_message_without_an_encoding_fails_with_internal() -> None:
    assert status_of(prefixed(gzip.compress(b"x"), flag=1)) == 13


@pytest.mark.requirement("A38")
@pytest.mark.parametrize("flag", [2, 3, 0x80, 0xFF])
def test_a_message_flag_above_1_fails_with_internal(flag: int) -> None:
    assert status_of(prefixed(b"x", flag), "gzip") == 13


@pytest.mark.requirement("A38")
@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        gzip.compress(b"hello", mtime=0)[:-1],
        gzip.compress(b"hello", mtime=0)[:-8] + bytes(8),
        gzip.compress(b"hello", mtime=0) + b"x",
        gzip.compress(b"hello", mtime=0) * 2,
        zlib.compress(b"hello"),
    ],
)
def test_corrupt_cut_or_surplus_gzip_fails_with_internal(payload: bytes) -> None:
    assert status_of(prefixed(payload, flag=1), "gzip") == 13


@pytest.mark.requirement("A38", "A39")
@given(st.binary(max_size=300))
def test_any_octets_inflate_within_the_limit_or_fail(payload: bytes) -> None:
    for encoding in ("gzip", "deflate"):
        with suppress(CallFault):
            assert len(decompress(payload, encoding, 100)) <= 100


@pytest.mark.requirement("A38")
def test_compressed_and_plain_messages_in_one_stream_are_read() -> None:
    stream = prefixed(b"a") + prefixed(gzip.compress(b"b" * 500), flag=1) + prefixed(b"c")
    assert MessageReader(encoding="gzip").feed(stream) == [b"a", b"b" * 500, b"c"]
    assert MessageReader(encoding="deflate").feed(prefixed(zlib.compress(b"d"), flag=1)) == [b"d"]


@pytest.mark.requirement("A39")
def test_a_declared_length_above_the_limit_fails_when_only_the_prefix_has_arrived() -> None:
    assert MessageReader(limit=10).feed(prefixed(bytes(10))) == [bytes(10)]
    assert status_of(b"\0" + (11).to_bytes(4, "big"), limit=10) == 8
    assert status_of(b"\1" + (2**32 - 1).to_bytes(4, "big"), "gzip") == 8
    assert status_of(b"\0" + (4 * MIB + 1).to_bytes(4, "big")) == 8


@pytest.mark.requirement("A39")
def test_an_inflated_length_above_the_limit_fails_with_resource_exhausted() -> None:
    for size, fits in ((1000, True), (1001, False)):
        stream = prefixed(gzip.compress(bytes(size)), flag=1)
        if fits:
            assert MessageReader(1000, "gzip").feed(stream) == [bytes(size)]
        else:
            assert status_of(stream, "gzip", limit=1000) == 8


@pytest.mark.requirement("A39", "B-inflate-bomb")
def test_a_gzip_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = prefixed(gzip.compress(bytes(64 * MIB)), flag=1)
    tracemalloc.start()
    try:
        with pytest.raises(CallFault) as raised:
            MessageReader(MIB, "gzip").feed(bomb)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert raised.value.status == 8
    assert peak < 4 * MIB


@pytest.mark.requirement("B-tiny-data")
def test_tiny_pieces_take_linear_time_and_no_more_memory_than_the_message() -> None:
    def seconds(size: int) -> float:
        reader, started = MessageReader(), time.process_time()
        reader.feed(b"\0" + size.to_bytes(4, "big"))
        for _ in range(size - 1):
            reader.feed(b"x")
        assert reader.feed(b"x") == [b"x" * size]
        return time.process_time() - started

    small = min(seconds(20_000) for _ in range(3))
    assert min(seconds(160_000) for _ in range(2)) < 8 * small * 3  # quadratic time would be 64 times as long

    reader = MessageReader()
    tracemalloc.start()
    try:
        reader.feed(b"\0" + (MIB).to_bytes(4, "big"))
        for _ in range(100_000):
            reader.feed(b"x")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert reader.buffered == 100_005
    assert held < 200_000


@pytest.mark.requirement("B-unread-messages")
def test_a_large_buffer_is_released_with_its_message() -> None:
    reader = MessageReader()
    tracemalloc.start()
    try:
        half = bytes(2 * MIB)
        reader.feed(b"\0" + (4 * MIB).to_bytes(4, "big") + half)
        assert len(reader.feed(half)) == 1
        del half
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000


@given(st.binary(max_size=300))
def test_a_framed_message_is_read_back(message: bytes) -> None:
    assert frame_message(message) == prefixed(message)
    compressed = frame_message(message, compress=True)
    assert MessageReader(encoding="gzip").feed(compressed) == [message]
    assert gzip.decompress(compressed[5:]) == message == gzip.decompress(compress_gzip(memoryview(message)))


@pytest.mark.requirement("B-inflate-bomb")
def test_a_message_that_inflated_too_far_is_freed_without_the_garbage_collector() -> None:
    """If the reader kept the fault, it would also keep the traceback, whose frames hold 4 MiB."""
    bomb = prefixed(compress_gzip(bytes(8 * MIB)), flag=1)
    gc.disable()
    try:
        readers = []
        tracemalloc.start()
        for _ in range(8):
            reader = MessageReader(4 * MIB, "gzip")
            with suppress(CallFault):
                reader.feed(bomb)
            readers.append(reader)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        gc.enable()
    assert held < MIB


# -- bounded work ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
def test_a_piece_of_many_messages_is_cut_a_few_at_a_time_with_the_same_result(compressed: bool) -> None:
    wanted = [b"m%d" % number for number in range(600)]
    piece = b"".join(frame_message(message, compress=compressed) for message in wanted) + b"\0\0"
    reader = MessageReader(4096, "gzip")
    found = reader.feed(piece)
    while reader.more:
        assert 0 < reader.buffered < len(piece)
        more = reader.feed()
        assert 0 < len(more) <= (8 if compressed else 64)
        found += more
    assert found == wanted
    assert reader.buffered == 2


def test_the_octets_that_one_call_inflates_are_bounded() -> None:
    piece = frame_message(bytes(16_000), compress=True) * 20
    reader = MessageReader(16_384, "gzip")
    assert len(reader.feed(piece)) == 2
    assert reader.more


def test_a_second_message_of_a_unary_request_is_refused_by_its_prefix() -> None:
    reader = MessageReader(4096, unary=True)
    assert reader.feed(frame_message(b"one")) == [b"one"]
    with pytest.raises(CallFault) as caught:
        reader.feed(frame_message(bytes(1000))[:5])
    assert caught.value.status == 12
    assert reader.buffered == 0


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", None),
        (b"\0\0\0\0", None),
        (b"\0\0\0\0\0", b""),
        (b"\0\0\0\0\1x", b"x"),
        (b"\1\0\0\0\1x", None),
        (b"\0\0\0\0\1", None),
        (b"\0\0\0\0\1xy", None),
        (b"\0\0\0\1\0" + bytes(256), bytes(256)),
    ],
)
def test_a_payload_is_plain_if_it_is_one_complete_uncompressed_message(payload: bytes, message: bytes | None) -> None:
    assert plain_message(payload) == message


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_an_inflated_message_may_be_as_long_as_the_limit(encoding: str) -> None:
    payload = gzip.compress(bytes(1000)) if encoding == "gzip" else zlib.compress(bytes(1000))
    assert decompress(payload, encoding, 1000) == bytes(1000)
    with pytest.raises(CallFault, match=r"larger than max \(1000 vs. 999\)") as fault:
        decompress(payload, encoding, 999)
    assert fault.value.status == StatusCode.RESOURCE_EXHAUSTED
    for wrong in (payload[:-1], payload + b"x"):
        with pytest.raises(CallFault, match="cut, or something follows") as fault:
            decompress(wrong, encoding, 1000)
        assert fault.value.status == StatusCode.INTERNAL


def test_a_prefix_has_the_flag_and_the_length() -> None:
    assert message_prefix(0x01020304) == b"\0\1\2\3\4"
    assert message_prefix(5, True) == b"\1\0\0\0\5"
    framed = frame_message(b"x" * 100, compress=True)
    assert framed[:5] == message_prefix(len(framed) - 5, True)
    assert gzip.decompress(framed[5:]) == b"x" * 100
