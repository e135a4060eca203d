"""The master uses only counts that a worker could have reached, and a worker cannot change the counts of others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.control_plane.worker_stats import FleetStats, WorkerStats, judge
from definition_server.ipc.stats import METHODS, SLOT_SIZE, Slot, Word, map_own, unshared_slot

PID = 4711
MOST = 20_000_000
"""The most that a count may grow in a second. A reading may be above this by one second more."""


class Clock:
    """A clock in seconds; the test advances it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """A page with the master's object for it and the object through which the worker writes it."""

    def __init__(self, stats: WorkerStats, clock: Clock) -> None:
        self.stats = stats
        stats.belongs_to(PID)
        self.clock = clock
        self.slot = map_own(os.dup(stats.page.descriptor))
        self.slot.start(PID, int(clock() * 1e9))

    def write(self, word: int, value: int) -> None:
        """The counts of a hostile worker."""
        self.slot._words[word] = value


@pytest.fixture
def worker() -> Iterator[Worker]:
    clock = Clock()
    stats = WorkerStats(clock)
    yield Worker(stats, clock)
    stats.close()


def honest_work(slot: Slot, clock: Clock) -> None:
    slot.count(0, 0, 60_000)
    slot.count_many(1, 3, 500, 1_000_000)
    slot.connected(7, 9)
    slot.lines_dropped(11)
    slot.serve(3, 30, bytes(range(32)))
    slot.beat(int(clock() * 1e9))


def test_honest_counts_are_read(worker: Worker) -> None:
    assert worker.stats.read().requests["200"] == 0
    honest_work(worker.slot, worker.clock)
    reading = worker.stats.read()
    assert reading == worker.slot.read()
    assert worker.stats.fault is None


FORGERIES = {
    "huge count": (Word.REQUESTS, 2**64 - 1),
    "count that goes back": (Word.REQUESTS, 0),
    "huge bucket": (Word.LATENCY + 3, 2**63),
    "bucket that goes back": (Word.LATENCY + 1, 0),
    "huge time": (Word.NANOSECONDS, 2**64 - 1),
    "time that goes back": (Word.NANOSECONDS + 1, 0),
    "heartbeat that goes back": (Word.HEARTBEAT, 5),
    "generation that goes back": (Word.GENERATION, 2),
    "many connections": (Word.CONNECTIONS, 2**64 - 1),
    "huge count of opened connections": (Word.OPENED, 2**64 - 1),
    "opened connections that go back": (Word.OPENED, 1),
    "huge count of dropped lines": (Word.LINES_DROPPED, 2**64 - 1),
    "dropped lines that go back": (Word.LINES_DROPPED, 10),
    "another's process id": (Word.PID, 1),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_implausible_value_is_a_fault_and_the_last_plausible_reading_stays(worker: Worker, forgery: str) -> None:
    honest_work(worker.slot, worker.clock)
    before = worker.stats.read()
    worker.write(*FORGERIES[forgery])
    assert worker.stats.read() == before
    assert worker.stats.fault is not None
    worker.slot.connected(1, 0)
    assert worker.stats.read() == before, "no later value is believed"


@given(st.binary(min_size=SLOT_SIZE, max_size=SLOT_SIZE))
def test_the_sums_stay_plausible_with_any_values_of_a_worker(octets: bytes) -> None:
    fleet = FleetStats()
    stats, honest = fleet.open(), fleet.open()
    slot = map_own(os.dup(stats.page.descriptor))
    stats.belongs_to(PID)
    map_own(os.dup(honest.page.descriptor)).count(0, 0, 1_000)
    slot._words.cast("B")[:] = octets
    counts = fleet.requests()
    assert counts.requests["200"] >= 1
    assert all(0 <= count < 10**11 for count in counts.requests.values())
    assert all(0 <= count < 10**11 for buckets in counts.latency.values() for count in buckets)
    for ended in (stats, honest):
        fleet.retire(ended)
    assert fleet.requests() == counts, "the counts of workers that have ended stay"


def test_the_counts_of_ended_workers_stay_and_are_not_counted_twice() -> None:
    fleet = FleetStats()
    for number in (1, 2, 3):
        stats = fleet.open()
        slot = map_own(os.dup(stats.page.descriptor))
        slot.count_many(0, 0, number, 1_000)
        slot.lines_dropped(number)
        fleet.retire(stats)
        fleet.retire(stats)
        assert stats.read().requests["200"] == number
    counts = fleet.requests()
    assert counts.requests["200"] == sum(counts.latency[METHODS[0]]) == counts.lines_dropped == 6


def test_a_heartbeat_by_another_clock_is_plausible_and_its_age_is_counted_from_its_last_change(worker: Worker) -> None:
    for ahead in (0, 10**18):
        worker.slot.beat(int(worker.clock() * 1e9) + ahead)
        worker.stats.read()
        worker.clock.now += 3
        worker.stats.read()
        assert worker.stats.heartbeat_age_seconds == 3
    assert worker.stats.fault is None


def test_counts_may_grow_with_the_time_between_two_readings(worker: Worker) -> None:
    worker.stats.read()
    worker.clock.now += 1000
    worker.slot.connected(7, 5_000_000)
    worker.slot.beat(int(worker.clock() * 1e9))
    worker.stats.read()
    assert worker.stats.fault is None


@pytest.mark.parametrize("seconds", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("above", [0, 1])
def test_a_leap_is_judged_by_the_time_since_the_last_plausible_reading(
    worker: Worker, seconds: float, above: int
) -> None:
    for _ in range(3):  # only the last of these readings matters
        worker.clock.now += 100
        worker.stats.read()
    worker.clock.now += seconds
    worker.slot.connected(0, int(MOST * (seconds + 1)) + above)
    worker.stats.read()
    assert (worker.stats.fault is None) is (above == 0)


def test_a_page_that_was_closed_shows_the_last_reading(worker: Worker) -> None:
    honest_work(worker.slot, worker.clock)
    last = worker.stats.close()
    assert last.requests["200"] == 1
    worker.slot.count(0, 0, 1)
    assert worker.stats.read() == worker.stats.close() == last


def test_the_age_of_a_heartbeat_is_never_negative(worker: Worker) -> None:
    worker.clock.now -= 5
    assert worker.stats.heartbeat_age_seconds == 0.0


NOTHING = unshared_slot().read()
"""A page that its worker has not written yet."""


def judged(*, before: dict[str, Any] | None = None, elapsed: float = 1.0, **after: Any) -> str | None:
    first = replace(NOTHING, pid=PID, **(before or {}))
    return judge(first, replace(first, **after), pid=PID, elapsed=elapsed)


def test_a_process_id_is_that_of_the_worker_or_zero_until_the_worker_has_begun() -> None:
    assert judge(NOTHING, replace(NOTHING, pid=PID), pid=PID, elapsed=1.0) is None
    assert judge(NOTHING, NOTHING, pid=PID, elapsed=1.0) is None
    assert judged(pid=PID + 1) == "the process id is that of another process"


def test_a_heartbeat_may_not_go_back() -> None:
    assert judged(before={"heartbeat_ns": 5}, heartbeat_ns=5) is None
    assert judged(before={"heartbeat_ns": 5}, heartbeat_ns=2**63) is None, "whichever clock wrote it"
    assert judged(before={"heartbeat_ns": 6}, heartbeat_ns=5) == "the heartbeat goes back"


LEAPS = {
    "opened": "the count of accepted connections goes back, or leaps",
    "lines_dropped": "the count of dropped log lines goes back, or leaps",
}


@pytest.mark.parametrize("name", LEAPS)
@pytest.mark.parametrize(("elapsed", "most"), [(0.0, MOST), (1.0, 2 * MOST), (2.5, 7 * MOST // 2)])
def test_a_count_may_grow_by_twenty_million_for_each_second_and_for_one_second_more(
    name: str, elapsed: float, most: int
) -> None:
    before = {name: 7}
    assert judged(before=before, elapsed=elapsed, **{name: 7 + most}) is None
    assert judged(before=before, elapsed=elapsed, **{name: 7 + most + 1}) == LEAPS[name]
    assert judged(before=before, elapsed=elapsed, **{name: 7}) is None
    assert judged(before=before, elapsed=elapsed, **{name: 6}) == LEAPS[name]


def test_counts_of_refused_connections_and_requests_have_the_same_limit() -> None:
    reason, status = next(iter(NOTHING.refused)), next(iter(NOTHING.requests))
    for growth, plausible in ((2 * MOST, True), (2 * MOST + 1, False), (-1, False)):
        found = [
            judged(before={"refused": NOTHING.refused | {reason: 9}}, refused=NOTHING.refused | {reason: 9 + growth}),
            judged(
                before={"requests": NOTHING.requests | {status: 9}}, requests=NOTHING.requests | {status: 9 + growth}
            ),
        ]
        assert found == (
            [None, None]
            if plausible
            else ["a count of refused connections goes back, or leaps", "a count of requests goes back, or leaps"]
        )
    method = METHODS[0]
    buckets = NOTHING.latency[method]
    assert judged(latency=NOTHING.latency | {method: (2 * MOST + 1, *buckets[1:])}) == (
        "a count of requests goes back, or leaps"
    )


def test_generations_do_not_go_back_and_connections_have_a_limit() -> None:
    assert judged(before={"generation": 3}, generation=3) is None
    assert judged(before={"generation": 3}, generation=2) == "the generation goes back"
    assert judged(connections=2_000_000) is None
    assert judged(connections=2_000_001) == "2000001 connections"


def test_the_time_of_requests_may_be_a_day_for_each_request_and_one_day_more() -> None:
    method = METHODS[0]
    one = {method: (1, *NOTHING.latency[method][1:])}
    sums = NOTHING.latency_sum_seconds
    day = 86_400
    assert judged(latency=NOTHING.latency | one, latency_sum_seconds=sums | {method: 2.0 * day}) is None
    leaps = "the time of the requests goes back, or leaps"
    assert judged(latency=NOTHING.latency | one, latency_sum_seconds=sums | {method: 2.0 * day + 1}) == leaps
    assert judged(before={"latency": NOTHING.latency | one}, latency_sum_seconds=sums | {method: 1.0 * day}) is None
    assert (
        judged(before={"latency": NOTHING.latency | one}, latency_sum_seconds=sums | {method: 1.0 * day + 1}) == leaps
    )
    assert judged(before={"latency_sum_seconds": sums | {method: 1.0}}, latency_sum_seconds=sums) == leaps
    assert judged(before={"latency_sum_seconds": sums | {method: 1.0}}) is None


def test_the_counts_of_several_workers_are_added_word_by_word() -> None:
    fleet = FleetStats()
    first, second = fleet.open(), fleet.open()
    for stats, factor in ((first, 1), (second, 10)):
        stats.belongs_to(PID)
        slot = map_own(os.dup(stats.page.descriptor))
        slot.start(PID, 1)
        slot.count_many(0, 0, 2 * factor, 60_000)
        slot.lines_dropped(3 * factor)
    found = fleet.requests()
    assert (found.requests["200"], sum(found.latency[METHODS[0]]), found.lines_dropped) == (22, 22, 33)
    fleet.retire(first)
    fleet.retire(first)
    assert fleet.requests() == found
    fleet.retire(second)
    assert fleet.requests() == found
    assert second.read() == second.close()
