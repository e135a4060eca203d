"""The budget of octets that a connection writes in one turn; the streams with something to send share it."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import HANDLED, Peer
from tests.support.h2_wire import headers, request_block, window_update

FRAME = 16_384


def sending(*octets: int, window: int = 2**24) -> Peer:
    """A client with one call for each number; the handler has queued that number of octets, and nothing is read yet."""
    peer = Peer(reads=False).send(window_update(0, window))
    for number, length in enumerate(octets):
        stream = 2 * number + 1
        peer.send(headers(stream, request_block(HANDLED)), window_update(stream, 2**24))
        peer.connection.send_initial_metadata(peer.calls[stream], ())
        peer.connection.send_message(peer.calls[stream], bytes(length))
    return peer


@pytest.mark.parametrize("budget", [1, FRAME, 3 * FRAME, 262_144])
@pytest.mark.parametrize("octets", [(1_000_000,), (400_000, 400_000, 400_000)])
def test_a_turn_exceeds_its_budget_by_less_than_a_frame_per_stream(octets: tuple[int, ...], budget: int) -> None:
    peer = sending(*octets)
    written = b"".join(peer.connection.data_to_send(budget))
    peer.replies.feed(written)
    data = sum(len(result.body) for result in peer.replies.streams.values())
    assert budget <= data < budget + FRAME * (len(octets) + 1)
    peer.connection.check_invariants()


def test_streams_share_the_budget_of_a_turn_evenly() -> None:
    peer = sending(400_000, 400_000, 400_000)
    peer.replies.feed(b"".join(peer.connection.data_to_send(262_144)))
    sent = [len(peer.result(stream).body) for stream in (1, 3, 5)]
    assert min(sent) >= 65_536
    assert max(sent) - min(sent) <= 65_536 + FRAME


@pytest.mark.parametrize("window", [1, FRAME, 5 * FRAME + 7])
def test_no_more_is_written_than_the_connection_window_allows(window: int) -> None:
    peer = sending(400_000, 400_000, window=window)
    for _ in range(10):
        peer.replies.feed(b"".join(peer.connection.data_to_send(262_144)))
    assert sum(len(peer.result(stream).body) for stream in (1, 3)) == 65_535 + window
    peer.connection.check_invariants()


def test_all_queued_octets_arrive_in_the_end() -> None:
    peer = sending(400_000, 7, 100_000)
    for stream in (1, 3, 5):
        peer.connection.send_status(peer.calls[stream], 0, "")
    peer.read()
    assert [len(peer.result(stream).messages[0]) for stream in (1, 3, 5)] == [400_000, 7, 100_000]
    assert all(peer.result(stream).ended for stream in (1, 3, 5))
