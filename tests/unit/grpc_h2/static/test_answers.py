"""A ready answer: its frames around the stream id, its use of the windows, and the maximum length of its metadata."""

from __future__ import annotations

import pytest
from tests.support.h2_wire import split_frames

from grpc_h2 import StaticAnswer
from grpc_h2.wire.frames import DATA, END_HEADERS, END_STREAM, HEADERS
from grpc_h2.wire.hpack import Decoder

LARGEST = 16_384
STREAM = (7).to_bytes(4, "big")


def shape(answer: StaticAnswer) -> list[tuple[int, int, int, int]]:
    """Type, flags, stream and length of each frame of the answer, sent on stream 7."""
    assert answer.pieces is not None
    frames, rest = split_frames(STREAM.join(answer.pieces))
    assert rest == b""
    return [(frame.kind, frame.flags, frame.stream, len(frame.payload)) for frame in frames]


@pytest.mark.parametrize("length", [0, 1, LARGEST - 5])
def test_an_answer_is_headers_data_and_trailers_and_its_size_is_that_of_the_message(length: int) -> None:
    answer = StaticAnswer.unary(bytes(length), 9)
    assert shape(answer) == [
        (HEADERS, END_HEADERS, 7, len(answer.headers)),
        (DATA, 0, 7, length + 5),
        (HEADERS, END_HEADERS | END_STREAM, 7, len(answer.block)),
    ]
    assert (answer.size, answer.message, answer.answer_id, answer.lasting) == (length + 5, bytes(length), 9, True)


def test_a_message_longer_than_the_smallest_maximum_frame_is_not_copied() -> None:
    message = memoryview(bytes(LARGEST - 4))
    answer = StaticAnswer.unary(message, 9)
    assert answer.pieces is None
    assert answer.message is message
    assert answer.size == LARGEST + 1
    assert len(StaticAnswer.unary(message, metadata=(("a", "b"),)).headers) > len(answer.headers)


@pytest.mark.parametrize("lasting", [True, False])
def test_a_failure_is_one_frame_and_uses_no_window(lasting: bool) -> None:
    answer = StaticAnswer.failure(5, "no such command", 3, lasting=lasting)
    assert shape(answer) == [(HEADERS, END_HEADERS | END_STREAM, 7, len(answer.block))]
    assert (answer.size, answer.message, answer.answer_id, answer.lasting) == (0, None, 3, lasting)


@pytest.mark.parametrize(("value", "octets"), [(2048 - 7, 2048), (2048 - 6, 2049)])
def test_metadata_of_more_than_two_kibibytes_is_refused(value: int, octets: int) -> None:
    # A literal field has 7 octets before its value: 1 for the type, 1 for the length of the name, 2 for the name, and 3
    # for the length of the value.
    metadata = (("ab", "~" * value),)
    for make in (
        lambda: StaticAnswer.unary(b"x", metadata=metadata),
        lambda: StaticAnswer.failure(5, "", metadata=metadata),
    ):
        if octets <= 2048:
            make()
            continue
        with pytest.raises(ValueError, match=f"has {octets} octets, and may have 2048"):
            make()


@pytest.mark.parametrize(("length", "whole"), [(400, True), (401, True), (9000, False)])
def test_a_long_error_message_is_cut_so_that_the_metadata_fits(length: int, whole: bool) -> None:
    answer = StaticAnswer.failure(5, "m" * length, metadata=(("who", "me"),))
    fields = dict(Decoder(max_list_size=1 << 20, max_fields=100).decode(answer.block))
    assert (fields[b"grpc-status"], fields[b"who"]) == (b"5", b"me")
    assert (fields[b"grpc-message"] == b"m" * length) is whole
