"""The status of a stream id without an open stream, and the number of streams that a client has opened."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.connection.state import StreamStatus
from grpc_h2.connection.streams import Streams
from grpc_h2.wire.errors import ConnectionFault, ErrorCode

GAPS, RESETS = 64, 1024


def used(*ids: int) -> Streams:
    streams = Streams()
    for stream_id in ids:
        streams.use(stream_id)
    return streams


def test_an_id_without_an_open_stream_is_idle_closed_skipped_or_reset() -> None:
    streams = used(1, 3, 9)
    streams.note_reset(3)
    found = {stream_id: streams.status(stream_id).name for stream_id in range(12)}
    assert found == {
        0: "IDLE", 1: "CLOSED", 2: "IDLE", 3: "RESET", 4: "IDLE", 5: "SKIPPED", 6: "IDLE", 7: "SKIPPED", 8: "IDLE",
        9: "CLOSED", 10: "IDLE", 11: "IDLE",
    }  # fmt: skip


@given(st.lists(st.integers(0, 300).map(lambda number: 2 * number + 1), unique=True).map(sorted))
def test_skipped_ids_are_not_counted_as_opened_streams(ids: list[int]) -> None:
    streams = used(*ids)
    assert streams.opened == len(ids)
    assert streams.last_id == (ids[-1] if ids else -1)
    for stream_id in range(1, streams.last_id + 1, 2):
        if len(ids) < GAPS:
            expected = StreamStatus.CLOSED if stream_id in ids else StreamStatus.SKIPPED
            assert streams.status(stream_id) is expected
    streams.check_invariants()


@pytest.mark.parametrize("stream_id", [2, 4, 2**31 - 2])
def test_opening_a_stream_with_an_even_id_is_a_protocol_error(stream_id: int) -> None:
    with pytest.raises(ConnectionFault, match=f"opens stream {stream_id}") as fault:
        Streams().use(stream_id)
    assert fault.value.code is ErrorCode.PROTOCOL_ERROR


def test_calls_of_the_fast_path_skip_no_ids() -> None:
    streams = used(1)
    streams.use_up_to(9)
    assert (streams.opened, streams.last_id) == (5, 9)
    assert streams.status(5) is StreamStatus.CLOSED


def test_the_last_64_gaps_and_1024_resets_are_remembered() -> None:
    streams = used(*range(5, 5 + 4 * GAPS, 4))
    assert streams.status(3) is StreamStatus.SKIPPED
    streams.check_invariants()
    streams.use(5 + 4 * GAPS)
    assert streams.status(3) is StreamStatus.CLOSED, "the oldest gap is forgotten"
    assert streams.status(7) is StreamStatus.SKIPPED
    streams.check_invariants()
    streams = Streams()
    streams.use_up_to(2 * RESETS + 1)
    for number in range(RESETS):
        streams.note_reset(2 * number + 1)
    assert streams.status(1) is StreamStatus.RESET
    streams.check_invariants()
    streams.note_reset(2 * RESETS + 1)
    assert streams.status(1) is StreamStatus.CLOSED
    assert streams.status(3) is StreamStatus.RESET
    streams.check_invariants()


def test_the_stream_named_by_the_last_goaway_does_not_change() -> None:
    streams = Streams()
    assert streams.last_for_goaway == 0
    streams.use(7)
    assert streams.last_for_goaway == 7
    streams.name_last()
    streams.use(9)
    assert streams.last_for_goaway == 7
    streams = used(2**31 - 1)
    assert streams.last_for_goaway == 2**31 - 1
