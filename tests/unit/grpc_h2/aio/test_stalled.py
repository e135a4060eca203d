"""Which connections are reported as stalled while a server stops."""

from __future__ import annotations

from dataclasses import dataclass

from grpc_h2.aio.stalled import STALL_SECONDS, StalledPeers


@dataclass(eq=False)
class Connection:
    unread: int


def test_a_peer_that_reads_nothing_for_the_stall_time_is_reported() -> None:
    peers, stuck = StalledPeers(), Connection(100)
    assert list(peers.check([stuck], 0.0)) == [None]
    assert list(peers.check([stuck], STALL_SECONDS - 0.1)) == [None]
    assert list(peers.check([stuck], STALL_SECONDS)) == [stuck]


def test_the_stall_time_of_a_peer_begins_again_when_it_reads_an_octet() -> None:
    peers, slow = StalledPeers(), Connection(100)
    for number in range(20):
        slow.unread -= 1
        assert list(peers.check([slow], number * (STALL_SECONDS - 0.1))) == [None]


def test_a_peer_with_nothing_to_read_is_not_stalled() -> None:
    peers, idle = StalledPeers(), Connection(0)
    for number in range(5):
        assert list(peers.check([idle], number * STALL_SECONDS)) == [None]
    idle.unread = 5
    assert list(peers.check([idle], 100.0)) == [None], "its time begins with the answer"


def test_a_connection_that_has_ended_is_forgotten() -> None:
    peers, stuck = StalledPeers(), Connection(100)
    list(peers.check([stuck], 0.0))
    list(peers.check([], 1.0))
    assert list(peers.check([stuck], STALL_SECONDS)) == [None]
