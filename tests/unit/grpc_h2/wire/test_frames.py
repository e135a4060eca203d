"""Frames that the engine makes: a header block is divided into frames that the peer accepts."""

from __future__ import annotations

import pytest

from grpc_h2.wire import frames


@pytest.mark.requirement("A43")
@pytest.mark.parametrize("end_stream", [False, True], ids=["open", "ended"])
@pytest.mark.parametrize(
    ("octets", "lengths"),
    [(0, [0]), (9, [9]), (10, [10]), (11, [10, 1]), (20, [10, 10]), (21, [10, 10, 1]), (30, [10, 10, 10])],
)
def test_a_block_longer_than_a_frame_continues_in_continuations_and_only_the_last_ends_it(
    octets: int, lengths: list[int], end_stream: bool
) -> None:
    block = bytes(range(octets))
    made = frames.headers(7, block, end_stream=end_stream, max_frame=10)
    found = []
    while made:
        high, low, kind, flags, stream_id = frames.HEADER.unpack_from(made)
        end = frames.HEADER_LENGTH + (high << 16 | low)
        found.append((kind, flags, stream_id, made[frames.HEADER_LENGTH : end]))
        made = made[end:]
    assert [len(content) for *_, content in found] == lengths
    assert b"".join(content for *_, content in found) == block
    assert [kind for kind, *_ in found] == [frames.HEADERS] + [frames.CONTINUATION] * (len(lengths) - 1)
    last = len(lengths) - 1
    for number, (_, flags, stream_id, _) in enumerate(found):
        expected = (frames.END_STREAM if end_stream and number == 0 else 0) | (
            frames.END_HEADERS if number == last else 0
        )
        assert (flags, stream_id) == (expected, 7)
