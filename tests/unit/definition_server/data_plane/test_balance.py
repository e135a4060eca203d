"""The worker with the fewest connections accepts the next one, by the counts on the stats pages. No connection waits
long for a worker that does not accept.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.logs import captured_logs, logged
from tests.support.stats import Pages

from definition_server.data_plane.balance import (
    DOUBT_SECONDS,
    PATIENCE_SECONDS,
    Balancer,
)
from definition_server.ipc.stats import Room
from grpc_h2 import Refusal


class Clock:
    """A clock in nanoseconds; the test advances it."""

    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)


class Fleet:
    """Workers on one page, all with a recent heartbeat unless a test stops it."""

    def __init__(self, workers: int, *, limit: int = 0) -> None:
        self.clock = Clock()
        self.page = Pages(workers)
        self.balancers = [Balancer(self.page.slot(number), limit=limit, clock=self.clock) for number in range(workers)]
        for number, balancer in enumerate(self.balancers):
            for other in set(range(workers)) - {number}:
                balancer.add(other, self.page.slot(other))
        self.hung: set[int] = set()
        self.ahead: dict[int, int] = {}
        """Nanoseconds by which the clock of a worker differs from that of the others."""
        for balancer in self.balancers:
            balancer.start()
        self.beat()

    def beat(self) -> None:
        for number in set(range(len(self.balancers))) - self.hung:
            self.page.slot(number).beat(self.clock.now + self.ahead.get(number, 0))
        for number in set(range(len(self.balancers))) - self.hung:
            self.balancers[number].note_heartbeats()

    def hold(self, *connections: int) -> None:
        for balancer, count in zip(self.balancers, connections, strict=True):
            while balancer.connections < count:
                balancer.opened()

    @property
    def held(self) -> list[int]:
        return [balancer.connections for balancer in self.balancers]

    def connect(self, order: list[int]) -> int | None:
        """A connection arrives, and the workers ask in ``order`` whether they may accept it. Returns the number of the
        worker that does."""
        for number in order:
            if number not in self.hung and self.balancers[number].may_accept():
                self.balancers[number].opened()
                return number
        return None


@pytest.fixture
def fleet() -> Fleet:
    return Fleet(4)


@given(st.integers(1, 8), st.integers(0, 200), st.randoms(use_true_random=False))
def test_consecutive_connections_keep_the_counts_within_one(
    workers: int, connections: int, chance: random.Random
) -> None:
    fleet = Fleet(workers)
    for _ in range(connections):
        order = list(range(workers))
        chance.shuffle(order)
        fleet.clock.advance(chance.choice((0.0, 0.0005, 0.03, 5.0)))
        fleet.beat()
        assert fleet.connect(order) is not None
        assert max(fleet.held) - min(fleet.held) <= 1


def test_a_worker_with_more_connections_leaves_the_next_to_the_others(fleet: Fleet) -> None:
    fleet.hold(2, 1, 2, 3)
    assert [balancer.may_accept() for balancer in fleet.balancers] == [False, True, False, False]


def test_a_worker_accepts_again_when_one_of_its_connections_ends(fleet: Fleet) -> None:
    fleet.hold(2, 2, 2, 2)
    fleet.balancers[3].closed()
    assert [balancer.may_accept() for balancer in fleet.balancers] == [False, False, False, True]


def test_a_worker_alone_always_accepts() -> None:
    fleet = Fleet(1)
    fleet.hold(1000)
    assert fleet.balancers[0].may_accept()


def test_a_worker_that_has_not_started_or_has_stopped_is_not_waited_for(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    fleet.balancers[1].stop()
    assert [balancer.may_accept() for balancer in (fleet.balancers[0], fleet.balancers[2])] == [True, False]
    fleet.balancers[1].start()
    assert not fleet.balancers[0].may_accept()


def test_a_worker_that_the_master_declares_dead_is_not_waited_for(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    fleet.balancers[0].remove(1)
    assert fleet.balancers[0].may_accept()


@pytest.mark.parametrize("ahead", [-(10**9), 10**17], ids=["behind", "ahead"])
def test_a_worker_with_a_clock_of_its_own_is_waited_for_as_long_as_its_heartbeat_changes(
    fleet: Fleet, ahead: int
) -> None:
    fleet.hold(5, 0, 7, 6)
    fleet.ahead = {1: ahead}
    fleet.clock.advance(100)
    fleet.beat()
    assert not fleet.balancers[0].may_accept()
    fleet.hung = {1}
    fleet.clock.advance(1.01)
    fleet.beat()
    assert fleet.balancers[0].may_accept()


def test_a_worker_without_a_recent_heartbeat_is_not_waited_for(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    fleet.hung = {1}
    fleet.clock.advance(1.01)
    fleet.beat()
    assert [fleet.balancers[number].may_accept() for number in (0, 2, 3)] == [True, False, False]


def look_on(fleet: Fleet, number: int, seconds: float) -> float | None:
    """Worker ``number`` asks every millisecond. Returns the seconds until it may accept; None if that takes longer than
    ``seconds``."""
    for millisecond in range(int(seconds * 1000)):
        if fleet.balancers[number].may_accept():
            return millisecond / 1000
        fleet.clock.advance(0.001)
    return None


def test_a_worker_that_has_just_hung_is_waited_for_only_briefly(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    waited = look_on(fleet, 0, 0.5)
    assert waited == pytest.approx(PATIENCE_SECONDS, abs=0.002)
    fleet.balancers[0].opened()
    assert look_on(fleet, 0, 0.5) == 0, "for a while, the others do not wait for the worker again"
    fleet.balancers[0].opened()
    fleet.clock.advance(DOUBT_SECONDS)
    fleet.beat()
    assert look_on(fleet, 0, 0.5) == pytest.approx(PATIENCE_SECONDS, abs=0.002), "then they do"


def test_a_worker_that_counts_connections_and_accepts_none_cannot_delay_a_connection_for_ever(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    asked = 0
    while not fleet.balancers[0].may_accept():
        fleet.page.slot(1).connected(0, 1)
        fleet.clock.advance(0.001)
        fleet.beat()
        asked += 1
    assert asked == pytest.approx(1000, abs=2), "the worker asked once a millisecond for a second"


def test_patience_does_not_run_out_while_other_workers_accept(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    for _ in range(5):
        assert look_on(fleet, 0, PATIENCE_SECONDS * 0.9) is None
        fleet.balancers[1].opened()
        fleet.balancers[1].closed()


def test_patience_does_not_run_out_while_no_connection_waits(fleet: Fleet) -> None:
    fleet.hold(1, 0, 0, 0)
    for _ in range(10):
        assert not fleet.balancers[0].may_accept()
        fleet.balancers[1].opened()
        fleet.balancers[1].closed()
        fleet.clock.advance(1000)
        fleet.beat()


def test_patience_does_not_begin_at_the_last_connection_accepted_here(fleet: Fleet) -> None:
    fleet.hold(1, 1, 1, 1)
    assert fleet.balancers[0].may_accept()
    fleet.balancers[0].opened()
    fleet.clock.advance(1000)
    fleet.beat()
    assert not fleet.balancers[0].may_accept()


def test_in_a_storm_a_worker_may_be_ahead_by_a_sixteenth(fleet: Fleet) -> None:
    fleet.hold(1000, 1000, 1000, 1000)
    assert fleet.balancers[0].may_accept()
    fleet.balancers[0].opened()
    assert not fleet.balancers[0].may_accept(), "not at once"
    taken = 0
    while taken < 200:
        fleet.clock.advance(0.001)
        fleet.balancers[1].opened()  # the queue moves, so patience plays no part
        fleet.balancers[1].closed()
        if not fleet.balancers[0].may_accept():
            if fleet.clock.now - 10**12 > 0.02 * 1e9:
                break
            continue
        fleet.balancers[0].opened()
        taken += 1
    assert 1000 + 1000 // 16 - 2 <= fleet.balancers[0].connections <= 1000 + 1000 // 16 + 1


def test_a_storm_does_not_change_the_balance_among_few_connections(fleet: Fleet) -> None:
    fleet.hold(16, 15, 15, 15)
    for _ in range(100):
        fleet.clock.advance(0.001)
        fleet.balancers[1].opened()
        fleet.balancers[1].closed()
        assert not fleet.balancers[0].may_accept()


def test_a_full_worker_leaves_connections_to_those_with_room_and_logs_that_once() -> None:
    fleet = Fleet(2, limit=3)
    fleet.hold(3, 3)
    fleet.balancers[1].closed()
    with captured_logs() as lines:
        assert [fleet.balancers[0].may_accept() for _ in range(3)] == [False] * 3
        assert fleet.balancers[1].may_accept()
        fleet.balancers[1].opened()
        assert fleet.balancers[1].may_accept(), "no worker has room, so the server makes some"
        assert fleet.balancers[0].may_accept()
        fleet.balancers[0].closed()
        assert fleet.balancers[0].may_accept()
    assert len(logged(lines, "MAX_CONNECTIONS is reached", connections=3)) == 2


def test_a_limit_that_is_reached_repeatedly_is_logged_every_ten_seconds() -> None:
    fleet = Fleet(1, limit=3)
    fleet.hold(3)
    with captured_logs() as lines:
        for _ in range(1000):
            assert fleet.balancers[0].may_accept()
            fleet.balancers[0].closed()
            fleet.balancers[0].opened()
            fleet.clock.advance(0.011)
    assert len(logged(lines, "MAX_CONNECTIONS is reached", connections=3)) == 2


def test_the_room_of_a_worker_and_its_refusals_are_on_the_stats_page() -> None:
    fleet = Fleet(1, limit=2)
    (balancer,) = fleet.balancers
    seen = []

    def note() -> None:
        seen.append(fleet.page.slot(0).read().room)

    for step in (
        balancer.opened, balancer.opened, balancer.vouched, balancer.vouched, balancer.unvouched, balancer.closed,
    ):  # fmt: skip
        step()
        note()
    assert seen == [Room.FREE, Room.FULL, Room.FULL, Room.TAKEN, Room.FULL, Room.FREE]
    for refusal in (Refusal.FULL, Refusal.EVICTED, Refusal.EVICTED):
        balancer.refused(refusal)
    assert fleet.page.slot(0).read().refused == {"peer_limit": 0, "full": 1, "evicted": 2, "no_call": 0}


def test_the_counts_of_a_balancer_are_on_the_stats_page(fleet: Fleet) -> None:
    fleet.hold(3, 0, 0, 0)
    fleet.balancers[0].closed()
    reading = fleet.page.slot(0).read()
    assert (reading.accepting, reading.connections, reading.opened) == (True, 2, 3)
    fleet.balancers[0].stop()
    assert fleet.page.slot(0).read().connections == 2, "a draining worker still holds its connections"


def test_in_a_storm_a_worker_that_is_ahead_by_exactly_a_sixteenth_still_accepts(fleet: Fleet) -> None:
    fleet.hold(32, 32, 32, 32)
    assert fleet.balancers[0].may_accept()
    for _ in range(2):
        fleet.balancers[0].opened()
    while fleet.clock.now - 10**12 < 0.015 * 1e9:
        fleet.clock.advance(0.001)
        fleet.balancers[1].opened()  # the queue moves, so patience plays no part
        fleet.balancers[1].closed()
        accepts = fleet.balancers[0].may_accept()
    assert accepts
    fleet.balancers[0].opened()
    assert not fleet.balancers[0].may_accept(), "three ahead of 32 are more"


def test_a_refused_connection_is_tried_again_long_before_patience_ends(fleet: Fleet) -> None:
    assert 0 < fleet.balancers[0].retry_seconds <= PATIENCE_SECONDS / 4


def test_other_workers_are_still_waited_for_if_one_is_left_out(fleet: Fleet) -> None:
    fleet.hold(5, 0, 6, 4)
    fleet.balancers[0]._doubted[1] = fleet.clock.now + 10**9
    assert not fleet.balancers[0].may_accept()
    fleet.balancers[3].stop()
    assert fleet.balancers[0].may_accept()


def ask(fleet: Fleet, number: int, *nanoseconds: int, moves: bool = False) -> list[bool]:
    """Worker ``number`` asks at these times after the beginning; with ``moves``, another worker accepts in between."""
    answers = []
    for instant in nanoseconds:
        fleet.clock.now = 10**12 + instant
        fleet.beat()
        if moves:
            fleet.balancers[1].opened()
            fleet.balancers[1].closed()
        answers.append(fleet.balancers[number].may_accept())
    return answers


MS = 10**6


def test_a_heartbeat_is_recent_for_a_second(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    fleet.hung = {1}
    fleet.clock.advance(1.0)
    fleet.beat()
    assert not fleet.balancers[0].may_accept()
    fleet.clock.now += 1
    fleet.beat()
    assert fleet.balancers[0].may_accept()


def test_a_worker_that_does_not_accept_is_waited_for_during_fifty_milliseconds(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    assert ask(fleet, 0, 0, 15 * MS, 30 * MS, 45 * MS, 50 * MS, 50 * MS + 1) == [False] * 5 + [True]


def test_a_worker_that_did_not_accept_is_left_out_for_a_second(fleet: Fleet) -> None:
    fleet.hold(5, 0, 5, 6)
    doubted = 51 * MS
    assert ask(fleet, 0, 0, doubted) == [False, True]
    assert ask(fleet, 0, doubted + 10**9 - 1) == [True]
    fleet.balancers[0].opened()
    assert ask(fleet, 0, doubted + 10**9 - 1) == [False], "a worker with as many connections is not left out"
    fleet.balancers[2].stop()
    fleet.balancers[3].stop()
    assert ask(fleet, 0, doubted + 10**9 - 1, doubted + 10**9) == [True, False]


def test_a_worker_that_replaces_one_that_was_left_out_is_waited_for(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    assert ask(fleet, 0, 0, 51 * MS, 52 * MS) == [False, True, True]
    fleet.balancers[0].remove(1)
    fleet.balancers[0].add(1, fleet.page.slot(1))
    fleet.balancers[0].opened()
    assert ask(fleet, 0, 53 * MS) == [False]


def test_a_worker_that_leaves_every_connection_to_others_does_so_for_a_second_at_most(fleet: Fleet) -> None:
    fleet.hold(5, 0, 7, 6)
    times = [number * 10 * MS for number in range(101)]
    assert not any(ask(fleet, 0, *times, moves=True))
    assert ask(fleet, 0, 10**9 + 1, moves=True) == [True]
    fleet.balancers[0].opened()
    assert ask(fleet, 0, 10**9 + 2, moves=True) == [False], "the second begins anew"


@pytest.mark.parametrize(
    ("times", "accepts"),
    [
        ((0, 10 * MS), False),
        ((0, 10 * MS + 1), True),
        ((0, 20 * MS), True),
        ((0, 20 * MS + 1), False),
    ],
    ids=["10 ms", "longer", "20 ms", "a pause"],
)
def test_connections_for_ten_milliseconds_without_a_pause_of_twenty_are_a_storm(
    fleet: Fleet, times: tuple[int, ...], accepts: bool
) -> None:
    fleet.hold(33, 32, 32, 32)
    assert ask(fleet, 0, *times, moves=True)[-1] is accepts


def test_a_full_worker_accepts_nothing_in_a_storm_while_another_has_room() -> None:
    fleet = Fleet(2, limit=33)
    fleet.hold(33, 32)
    with captured_logs():
        assert ask(fleet, 0, 0, 15 * MS, moves=True) == [False, False]
    unlimited = Fleet(2, limit=34)
    unlimited.hold(33, 32)
    assert ask(unlimited, 0, 0, 15 * MS, moves=True) == [False, True]


def test_a_full_worker_is_not_waited_for() -> None:
    fleet = Fleet(2, limit=3)
    fleet.hold(2, 3)
    assert fleet.balancers[0].may_accept()
    fleet.balancers[1].closed()
    fleet.balancers[0].opened()
    with captured_logs():
        assert not fleet.balancers[0].may_accept()


def test_a_full_server_is_logged_again_when_ten_seconds_have_passed() -> None:
    fleet = Fleet(1, limit=1)
    fleet.hold(1)
    with captured_logs() as lines:
        ask(fleet, 0, 0, 10**10)
        assert len(logged(lines, "MAX_CONNECTIONS is reached", connections=1, clients=0)) == 1
        ask(fleet, 0, 10**10 + 1)
        assert len(logged(lines, "MAX_CONNECTIONS is reached")) == 2


def test_a_refused_connection_is_tried_again_after_a_millisecond(fleet: Fleet) -> None:
    assert fleet.balancers[0].retry_seconds == 0.001
    assert fleet.balancers[0].connections == 0


def test_connections_that_another_worker_accepted_still_count_after_it_has_stopped_accepting(fleet: Fleet) -> None:
    fleet.hold(1, 2, 3, 4)
    fleet.balancers[3].stop()
    assert fleet.balancers[0]._read_others(fleet.clock.now) == (2, 9)
    fleet.balancers[0]._doubted[1] = fleet.clock.now + 1
    assert fleet.balancers[0]._read_others(fleet.clock.now) == (3, 7)
    assert fleet.balancers[0]._read_others(fleet.clock.now + 1) == (2, 9)
