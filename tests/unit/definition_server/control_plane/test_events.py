"""Events and their times. A change of a state is an event; a state that continues is not an event."""

from __future__ import annotations

import pytest
from tests.support.fakes import FakeClock
from tests.support.logs import LogLines, logged

from definition_server.control_plane.events import Event, EventKind, Events
from definition_server.observability.reasons import Reason

BEGINS, ENDS = EventKind.STORE_FAILED, EventKind.STORED_AGAIN
FAILED, HANGS = Reason.DISK_FAILED, Reason.DISK_HANGS


class Bench:
    """Events with two clocks: the wall clock, which may be set, and a monotonic clock."""

    def __init__(self) -> None:
        self.clock, self.now = FakeClock(5000.0), FakeClock(100.0)
        self.events = Events(self.clock, self.now)

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.now.advance(seconds)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_an_event_is_noted_when_a_state_begins_changes_its_reason_or_ends(bench: Bench) -> None:
    lasted = []
    for on, reason in ((False, None), (True, FAILED), (True, FAILED), (True, HANGS), (False, None), (False, None)):
        lasted.append(bench.events.level(BEGINS, ENDS, on=on, reason=reason))
        bench.advance(1.5)
    assert lasted == [None, None, None, None, 4.5, None]
    assert bench.events.last() == (
        Event(5006.0, ENDS, HANGS, 4.5), Event(5004.5, BEGINS, HANGS), Event(5001.5, BEGINS, FAILED),
    )  # fmt: skip


def test_the_duration_of_a_state_that_begins_again_starts_at_zero(bench: Bench) -> None:
    for on in (True, False, True, False):
        bench.events.level(BEGINS, ENDS, on=on)
        bench.advance(2.0)
    assert [event.after_seconds for event in bench.events.last()] == [2.0, None, 2.0, None]


def test_durations_do_not_change_if_the_wall_clock_is_set_back(bench: Bench) -> None:
    bench.events.level(BEGINS, ENDS, on=True)
    bench.clock.advance(-3600.0)
    bench.now.advance(7.0)
    assert bench.events.level(BEGINS, ENDS, on=False) == 7.0
    assert [event.at for event in bench.events.last()] == [1400.0, 5000.0]


def test_a_duration_is_kept_in_milliseconds_and_logged_in_tenths_of_a_second(bench: Bench, logs: LogLines) -> None:
    bench.events.sync_ended(FAILED, read=False)
    bench.events.serving(False, before=True)
    bench.now.advance(4.56789)
    bench.events.sync_ended(None, read=True)
    bench.events.serving(True, before=True)
    assert [event.after_seconds for event in bench.events.last()][:2] == [4.568, 4.568]
    for message in ("Table read again", "Serves again"):
        (line,) = logged(logs, message, log_level="info")
        assert (line["after"], line["after_seconds"]) == ("5 s", 4.6)


def test_states_of_two_kinds_are_independent(bench: Bench) -> None:
    bench.events.level(BEGINS, ENDS, on=True, reason=FAILED)
    bench.events.level(EventKind.PINNED, EventKind.PIN_ENDED, on=True)
    bench.events.level(EventKind.PINNED, EventKind.PIN_ENDED, on=False)
    assert bench.events.level(BEGINS, ENDS, on=False) is not None
    assert [event.kind for event in bench.events.last()] == [ENDS, EventKind.PIN_ENDED, EventKind.PINNED, BEGINS]


def test_latest_returns_the_newest_event_of_a_kind(bench: Bench) -> None:
    assert bench.events.latest(BEGINS) is None
    for reason in (FAILED, HANGS):
        bench.events.level(BEGINS, ENDS, on=True, reason=reason)
        bench.advance(1.0)
    bench.events.level(BEGINS, ENDS, on=False)
    assert bench.events.latest(BEGINS) == Event(5001.0, BEGINS, HANGS)
    assert bench.events.latest(EventKind.PINNED) is None


@pytest.mark.parametrize(
    ("before", "serves", "events"), [(False, False, 0), (False, True, 0), (True, True, 0), (True, False, 1)]
)
def test_only_a_server_that_served_before_notes_that_it_stops_serving(
    bench: Bench, before: bool, serves: bool, events: int
) -> None:
    bench.events.serving(serves, before=before)
    assert len(bench.events.last()) == events
