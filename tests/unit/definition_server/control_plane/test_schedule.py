"""Arithmetic on time: back-off grows to a limit, a crash loop is more than one crash, and only a worker that hangs is
reported as hung."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from definition_server.control_plane.schedule import Backoff, CrashLoop, Heartbeat

seconds = st.floats(0.001, 1000, allow_nan=False)


# -- Backoff ---------------------------------------------------------------------------------------------------------


@given(first=st.floats(0.01, 10), factor=st.floats(1, 100), calls=st.integers(2, 40))
def test_delays_double_from_the_first_to_the_longest_and_stay_there(first: float, factor: float, calls: int) -> None:
    most = first * factor
    backoff = Backoff(first, most)
    delays = [backoff.next() for _ in range(calls)]
    assert delays[0] == first
    assert all(later == min(most, earlier * 2) for earlier, later in pairwise(delays))


def test_a_reset_restarts_with_the_first_delay() -> None:
    backoff = Backoff(0.5, 30.0)
    before = [backoff.next() for _ in range(4)]
    backoff.reset()
    assert [backoff.next() for _ in range(4)] == before == [0.5, 1.0, 2.0, 4.0]


# -- CrashLoop -------------------------------------------------------------------------------------------------------

STABLE = 30.0


def looping_after(*lives: float) -> bool:
    loop = CrashLoop(3, STABLE)
    for lived in lives:
        loop.ended(lived)
    return loop.looping


def test_a_new_slot_is_not_in_a_crash_loop() -> None:
    assert not looping_after()


def test_as_many_short_runs_in_a_row_as_the_limit_are_a_crash_loop() -> None:
    assert looping_after(0.1, 29.9, 0.0)


def test_fewer_short_runs_are_not_a_crash_loop() -> None:
    assert not looping_after(0.1, 0.1)


def test_a_long_run_between_short_ones_resets_the_count() -> None:
    assert not looping_after(0.1, 0.1, STABLE, 0.1, 0.1)


@pytest.mark.parametrize(("seconds", "over"), [(29.9, False), (STABLE, True)])
def test_a_crash_loop_is_over_once_a_worker_has_run_long_enough(seconds: float, over: bool) -> None:
    loop = CrashLoop(2, STABLE)
    loop.ended(0.1)
    loop.ended(0.1)
    loop.runs(seconds)
    assert loop.looping is not over
    loop.ended(seconds)
    assert loop.looping is not over


@given(lives=st.lists(st.sampled_from([0.0, 29.9, STABLE, 3600.0]), max_size=30), limit=st.integers(1, 6))
def test_looping_is_true_exactly_if_the_last_runs_were_all_short(lives: list[float], limit: int) -> None:
    loop = CrashLoop(limit, STABLE)
    for number, lived in enumerate(lives, 1):
        loop.ended(lived)
        last = lives[max(0, number - limit) : number]
        assert loop.looping == (len(last) == limit and max(last) < STABLE)


# -- Heartbeat -------------------------------------------------------------------------------------------------------

TIMEOUT = 8.0
TICK = 0.25


def looks_until_it_hangs(heartbeat: Heartbeat, beat: int, start: float, *, most: int = 1000) -> float:
    """Observe the same beat once per tick. Returns the time at which the worker is reported as hung."""
    for number in range(1, most):
        now = start + number * TICK
        if heartbeat.hangs(beat, now):
            return now
    raise AssertionError("the worker never counts as hung")


def test_a_worker_with_an_unchanged_beat_is_hung_after_the_timeout_and_not_before() -> None:
    heartbeat = Heartbeat(TIMEOUT)
    assert not heartbeat.hangs(7, 100.0)
    assert looks_until_it_hangs(heartbeat, 7, 100.0) == 100.0 + TIMEOUT


def test_a_changed_beat_restarts_the_timeout() -> None:
    heartbeat = Heartbeat(TIMEOUT)
    assert not any(heartbeat.hangs(7, number * TICK) for number in range(int(TIMEOUT / TICK)))
    assert not heartbeat.hangs(8, TIMEOUT)
    assert looks_until_it_hangs(heartbeat, 8, TIMEOUT) == 2 * TIMEOUT


def test_the_first_observation_finds_no_worker_hung() -> None:
    assert not Heartbeat(TIMEOUT).hangs(0, 1e9)


def test_a_late_observation_finds_no_worker_hung() -> None:
    heartbeat = Heartbeat(TIMEOUT)
    heartbeat.hangs(7, 0.0)
    assert not heartbeat.hangs(7, 3600.0)


def test_an_observation_adds_a_quarter_of_the_timeout_at_most() -> None:
    heartbeat = Heartbeat(TIMEOUT)
    assert [heartbeat.hangs(7, number * 3600.0) for number in range(5)] == [False] * 4 + [True]


def test_after_a_late_observation_a_hung_worker_is_still_found() -> None:
    heartbeat = Heartbeat(TIMEOUT)
    heartbeat.hangs(7, 0.0)
    heartbeat.hangs(7, 3600.0)
    assert looks_until_it_hangs(heartbeat, 7, 3600.0) <= 3600.0 + TIMEOUT


@given(looks=st.lists(st.tuples(seconds, st.booleans()), max_size=60))
def test_a_worker_found_hung_has_not_beaten_for_the_timeout(looks: list[tuple[float, bool]]) -> None:
    heartbeat = Heartbeat(TIMEOUT)
    now, beat, first_seen = 0.0, 0, 0.0
    heartbeat.hangs(beat, now)
    for gap, beats in looks:
        now += gap
        if beats:
            beat, first_seen = beat + 1, now
        assert not heartbeat.hangs(beat, now) or now - first_seen >= TIMEOUT * 0.999


@given(gaps=st.lists(st.floats(0.01, TIMEOUT / 4), min_size=1, max_size=20))
def test_regular_observation_finds_every_hung_worker(gaps: list[float]) -> None:
    heartbeat = Heartbeat(TIMEOUT)
    now = 0.0
    heartbeat.hangs(7, now)
    while now < TIMEOUT * 1.001:
        for gap in gaps:
            now += gap
            hung = heartbeat.hangs(7, now)
    assert hung
