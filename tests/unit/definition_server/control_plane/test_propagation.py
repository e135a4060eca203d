"""Propagation: the measured delay of a change is at least the true delay, and exceeds it by less than an interval.

Workers that start, end or drain during the measurement do not falsify it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from definition_server.control_plane.propagation import BOUNDS, Propagation


class Clock:
    """A clock in seconds; the test sets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def propagation(clock: Clock) -> Propagation:
    return Propagation(clock)


def check(propagation: Propagation, *, read: bool = True) -> None:
    propagation.check_begins()
    propagation.check_ends(read=read)


def publish(propagation: Propagation, generation: int, *workers: str) -> None:
    propagation.check_begins()
    propagation.change_read()
    propagation.published(generation, workers)
    propagation.check_ends(read=True)


def samples(propagation: Propagation) -> int:
    return sum(propagation.distribution().counts)


def test_the_first_publication_after_a_start_has_no_sample(propagation: Propagation) -> None:
    publish(propagation, 1)
    propagation.acknowledged("a", 1)
    assert samples(propagation) == 0


def test_the_delay_is_measured_from_the_last_check_without_the_change(propagation: Propagation, clock: Clock) -> None:
    publish(propagation, 1)
    clock.now = 10.0
    check(propagation)
    clock.now = 12.0
    check(propagation, read=False)  # the database did not answer, so this check had no result
    clock.now = 20.0
    publish(propagation, 2, "a", "b")
    clock.now = 21.0
    propagation.acknowledged("a", 2)
    assert samples(propagation) == 0
    clock.now = 22.0
    propagation.acknowledged("b", 2)
    assert propagation.last_seconds == 12.0
    assert propagation.distribution().sum_seconds == 12.0
    assert propagation.distribution().counts[BOUNDS.index(20.0)] == 1


@pytest.mark.parametrize("how", ["ends", "is_new"])
def test_a_worker_that_ends_or_starts_during_a_measurement_does_not_falsify_it(
    propagation: Propagation, clock: Clock, how: str
) -> None:
    publish(propagation, 1)
    clock.now = 1.0
    publish(propagation, 2, "a", "b")
    clock.now = 2.0
    propagation.acknowledged("a", 2)
    if how == "ends":
        propagation.gone("b")
    else:
        propagation.acknowledged("c", 2)
        assert samples(propagation) == 0
        propagation.acknowledged("b", 2)
    assert propagation.last_seconds == 2.0


def test_without_any_worker_the_first_one_that_serves_a_publication_completes_its_measurement(
    propagation: Propagation, clock: Clock
) -> None:
    publish(propagation, 1)
    publish(propagation, 2, "a")
    propagation.gone("a")
    assert samples(propagation) == 0
    clock.now = 5.0
    propagation.acknowledged("b", 2)
    assert propagation.last_seconds == 5.0


def test_a_publication_is_acknowledged_together_with_a_newer_one_that_overtakes_it(
    propagation: Propagation, clock: Clock
) -> None:
    publish(propagation, 1)
    publish(propagation, 2, "a")
    clock.now = 1.0
    publish(propagation, 3, "a")
    clock.now = 2.0
    propagation.acknowledged("a", 3)
    assert samples(propagation) == 2


def test_a_publication_by_an_operator_has_no_sample(propagation: Propagation) -> None:
    publish(propagation, 1)
    propagation.published(2, ["a"])  # an accepted or pinned catalogue, between two cycles
    propagation.check_begins()
    propagation.published(3, ["a"])  # a publication by the policy file, at the beginning of a cycle
    propagation.check_ends(read=True)
    propagation.acknowledged("a", 3)
    assert samples(propagation) == 0


def changes(seed: int, failing: float) -> Iterator[tuple[float, float]]:
    """A hundred changes at random moments: (true delay, measured delay)."""
    dice, clock = random.Random(seed), Clock()
    propagation = Propagation(clock)
    publish(propagation, 1)
    generation, workers, commit = 1, ["0", "1", "2"], dice.uniform(0.0, 3.0)
    while generation <= 100:
        clock.now += 0.5  # one check in half a second
        start = clock.now
        propagation.check_begins()
        clock.now += dice.uniform(0.0, 0.05)
        failed = dice.random() < failing
        # Rows are read as of a moment between the start of the check and its end.
        if not failed and commit <= dice.uniform(start, clock.now):
            generation += 1
            propagation.change_read()
            propagation.published(generation, workers)
            for worker in dice.sample(workers, len(workers)):
                clock.now += dice.uniform(0.0, 0.02)
                if dice.random() < 0.1:  # the worker dies, and another one takes its place with the newest catalogue
                    propagation.gone(worker)
                    workers[workers.index(worker)] = worker = str(int(dice.random() * 1e9))
                propagation.acknowledged(worker, generation)
            assert propagation.last_seconds is not None
            yield clock.now - commit, propagation.last_seconds
            commit = clock.now + dice.uniform(0.0, 3.0)
        propagation.check_ends(read=not failed)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("failing", "most"), [(0.0, 1.0), (0.02, 2.0)])
def test_the_measured_delay_of_a_hundred_changes_is_an_upper_bound(seed: int, failing: float, most: float) -> None:
    """After a check that failed, the bound reaches back by one interval more."""
    found = list(changes(seed, failing))
    assert len(found) == 100
    assert all(0.0 <= measured - true <= most for true, measured in found)


def test_the_bounds_of_the_histogram_are_those_that_dashboards_and_alerts_name() -> None:
    """The bounds are stated here, because changing them changes the stored series of every Prometheus."""
    seconds = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 45, 60, 90, 120, 300, 900, 3600]
    assert list(BOUNDS) == seconds
