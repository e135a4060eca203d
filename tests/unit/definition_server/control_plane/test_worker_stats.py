"""The master believes what a worker could have counted, and nothing else; the counts of other workers never change."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.control_plane.worker_stats import FleetStats, WorkerStats
from definition_server.ipc.stats import METHODS, SLOT_SIZE, Slot, Word, map_own

PID = 4711


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Worker:
    """A page as the master sees it, and as its worker writes it."""

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
    "huge bucket": (Word.BUCKETS + 3, 2**63),
    "bucket that goes back": (Word.BUCKETS + 1, 0),
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
def test_whatever_a_worker_writes_the_sums_stay_plausible(octets: bytes) -> None:
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
