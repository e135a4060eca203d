"""The proof of the served catalogue, on a real sync cycle: failures, refusals and recoveries are remembered with their
times, and freshness depends on the checks and not on the wall clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest
from tests.support.fakes import FakeClock, FakeSource
from tests.support.logs import captured_logs, logged
from tests.support.snapshots import row

from definition_server.control_plane.events import REMEMBERED, EventKind, Events, duration
from definition_server.control_plane.freshness import RestartReason, Stale
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.sync import Outcome, Synchronizer
from definition_server.control_plane.sync_state import PinState, SyncState
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def down() -> SourceError:
    """A new exception each time, because a raised exception refers to the frames that it passed, and so to their
    catalogues."""
    return SourceError("no route", Reason.DATABASE_UNREACHABLE)


class Bench:
    """A synchronizer over a fake table, with its proof and the clocks of both."""

    def __init__(self) -> None:
        self.source = FakeSource(*(row(f"c{number}", id=number) for number in range(20)))
        self.publisher = Publisher()
        self.clock, self.now = FakeClock(), FakeClock(1000.0)
        self.synchronizer = Synchronizer(self.source, self.publisher, clock=self.clock)
        self.proof = Proof(self.synchronizer.state, interval=60.0, stores=False, clock=self.clock, now=self.now)
        self.synchronizer.observer = self.proof

    async def cycle(self) -> Outcome:
        outcome = await self.synchronizer.cycle(lambda _: 60.0)
        self.tick()
        return outcome

    def tick(self) -> bool:
        published = self.publisher.current is not None
        return self.proof.tick(published=published, serving=published)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.now.advance(seconds)

    def kinds(self) -> list[EventKind]:
        """The events, the oldest first."""
        return [event.kind for event in reversed(self.proof.events.last())]

    def close(self) -> None:
        self.synchronizer.close()
        self.publisher.close()


@pytest.fixture
def bench() -> Iterator[Bench]:
    with closing(Bench()) as bench:
        yield bench


async def test_a_failure_is_remembered_after_the_recovery_which_is_logged(bench: Bench) -> None:
    await bench.cycle()
    began = bench.clock()
    for _ in range(3):
        bench.source.fail(down())
        await bench.cycle()
        bench.advance(60.0)
    with captured_logs() as lines:
        await bench.cycle()
    assert logged(lines, "Table read again")[0]["after"] == "3 min"
    assert bench.synchronizer.state.last_error is None
    ended, failed = bench.proof.events.last()
    assert (failed.kind, failed.reason, failed.at) == (EventKind.SYNC_FAILED, Reason.DATABASE_UNREACHABLE, began)
    assert (ended.kind, ended.after_seconds) == (EventKind.TABLE_READ_AGAIN, 180.0)
    assert bench.proof.events.latest(EventKind.SYNC_FAILED) == failed


async def test_another_reason_of_a_lasting_failure_is_an_event(bench: Bench) -> None:
    for reason in (Reason.DATABASE_UNREACHABLE, Reason.DATABASE_UNREACHABLE, Reason.TABLE_MISSING):
        bench.source.fail(SourceError("no", reason))
        await bench.cycle()
    assert bench.kinds() == [EventKind.SYNC_FAILED] * 2


async def test_the_server_is_stale_while_a_catalogue_is_held(bench: Bench) -> None:
    rows = bench.source.rows
    await bench.cycle()
    assert bench.tick()
    bench.source.replace(*rows[:1])
    assert await bench.cycle() is Outcome.HELD
    assert not bench.tick()
    assert bench.proof.verdict().stale is Stale.CATALOGUE_HELD
    assert bench.proof.verdict().restart.reason is RestartReason.HELD_NOT_STORED
    bench.source.replace(*rows)
    await bench.cycle()
    assert bench.tick()
    assert bench.kinds() == [EventKind.CATALOGUE_HELD, EventKind.CATALOGUE_RELEASED]


async def test_a_catalogue_is_stale_after_two_intervals_without_a_check_at_any_wall_clock_time(
    bench: Bench,
) -> None:
    assert not bench.tick()
    await bench.cycle()
    bench.clock.advance(-7200.0)
    assert bench.tick()
    bench.clock.advance(36000.0)
    bench.now.advance(120.0)
    assert bench.tick()
    bench.source.fail(down())
    await bench.cycle()
    bench.now.advance(0.1)
    assert not bench.tick()
    assert bench.proof.verdict().stale is Stale.CHECK_LATE
    assert bench.proof.verdict().restart.reason is RestartReason.NO_SOURCE
    await bench.cycle()
    assert bench.tick()


async def test_a_change_that_a_cycle_reads_is_measured_from_the_check_before_it(bench: Bench) -> None:
    propagation = bench.proof.propagation
    bench.publisher.on_publish(lambda publication: propagation.published(publication.snapshot.generation, ["worker"]))
    await bench.cycle()
    bench.advance(60.0)
    bench.source.replace(*bench.source.rows[1:])
    await bench.cycle()
    bench.advance(2.0)
    propagation.acknowledged("worker", 2)
    assert propagation.last_seconds == 62.0


async def test_each_change_between_fresh_and_stale_is_logged_once_and_nothing_at_the_start(bench: Bench) -> None:
    with captured_logs() as lines:
        for _ in range(2):
            bench.tick()
        await bench.cycle()
        bench.tick()
        bench.now.advance(120.1)
        for _ in range(2):
            bench.tick()
        await bench.cycle()
        bench.tick()
    late, fresh = (
        ("The served catalogue may be out of date", Stale.CHECK_LATE),
        ("The served catalogue is up to date", None),
    )
    told = [(line["event"], line.get("reason")) for line in lines if line["event"].startswith("The served catalogue")]
    assert told == [fresh, late, fresh]


async def test_a_state_that_changes_between_two_cycles_is_noted_by_the_next_tick(bench: Bench) -> None:
    await bench.cycle()
    bench.synchronizer.state.pin = PinState("ab" * 32, None, "command")
    bench.tick()
    assert bench.kinds() == [EventKind.PINNED]
    bench.synchronizer.state.pin = None
    bench.tick()
    assert bench.kinds() == [EventKind.PINNED, EventKind.PIN_ENDED]


async def test_the_time_of_the_next_attempt_is_known(bench: Bench) -> None:
    await bench.cycle()
    assert bench.proof.next_attempt == bench.clock() + 60.0


def test_serving_again_is_logged_and_remembered_once_the_server_has_served() -> None:
    clock = FakeClock()
    proof = Proof(SyncState(), interval=60.0, stores=True, clock=clock, now=clock)
    with captured_logs() as lines:
        for serving in (False, True, False, False, True):
            proof.tick(published=True, serving=serving)
            clock.advance(2.0)
    assert [line["after"] for line in logged(lines, "Serves again")] == ["4 s"]
    assert [event.kind for event in proof.events.last()] == [EventKind.SERVES_AGAIN, EventKind.SERVES_NOTHING]


def test_only_the_last_fifty_events_are_remembered() -> None:
    clock = FakeClock()
    events = Events(clock, clock)
    for number in range(200):
        events.sync_ended(None if number % 2 else Reason.TABLE_MISSING, read=bool(number % 2))
    assert len(events.last()) == REMEMBERED
    assert events.last()[0].kind is EventKind.TABLE_READ_AGAIN


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.4, "3 s"),
        (89, "89 s"),
        (90, "2 min"),
        (180, "3 min"),
        (5399, "90 min"),
        (5400, "2 h"),
        (7200, "2 h"),
        (172799, "48 h"),
        (172800, "2 days"),
        (864000, "10 days"),
    ],
)
def test_a_duration_has_a_readable_unit(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_directory_storing_is_off() -> None:
    assert Proof(SyncState(), interval=60, stores=False).store == "off"
    assert Proof(SyncState(), interval=60, stores=True).store == "stored"
