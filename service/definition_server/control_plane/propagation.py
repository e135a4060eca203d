"""Measures how long a change takes from the table to the last worker. The result is an upper bound, so the database's
clock is not needed.

A change that a cycle reads was not found by the previous check, so it was committed after the start of that check. The
time from that start until every worker has acknowledged the new catalogue is therefore at least the true delay, and
exceeds it by less than the interval of the checks. The first publication after a start gives no sample, because there
is no earlier check. A publication that an operator causes (by accepting a catalogue, by a pin or by its end) gives no
sample either, because its delay does not depend on the server.

Only workers that serve are considered. A worker that ends, drains or is replaced is no longer awaited; a worker that
starts gets the newest catalogue first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 900.0, 3600.0)
"""Upper bounds of the histogram's buckets, in seconds. The alert fires above 120 s, because a sample contains the
interval (60 s).
"""
_MOST_WAITING = 64
"""The most publications that wait for acknowledgements. If a worker acknowledges one of them, it has acknowledged all
earlier ones.
"""


@dataclass(slots=True)
class _Measurement:
    """A published change that not every worker has acknowledged."""

    generation: int
    origin: float
    waiting: set[Hashable]
    acknowledged: bool = False


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram. ``counts`` has one bucket more than `BOUNDS`; a bucket does not contain the counts of lower
    buckets.
    """

    counts: tuple[int, ...]
    sum_seconds: float


@dataclass(slots=True)
class Propagation:
    """Measures published changes. Used in the event loop's thread; only `distribution` may be called from other
    threads.

    ``now`` returns seconds of the clock by which cycles and acknowledgements are timed.
    """

    now: Callable[[], float]
    last_seconds: float | None = None
    """The newest sample."""
    _counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    _sum: float = 0.0
    _check: float | None = None
    """Start of the present check."""
    _previous: float | None = None
    """Start of the last check that has ended. A change that the next check finds was committed after this time."""
    _changed: bool = False
    _measurements: deque[_Measurement] = field(default_factory=lambda: deque(maxlen=_MOST_WAITING))

    def check_begins(self) -> None:
        """Note that a cycle is about to query the database."""
        self._check, self._changed = self.now(), False

    def change_read(self) -> None:
        """Note that the check has found a change and read it. A publication before the end of the check publishes that
        change.
        """
        self._changed = True

    def check_ends(self, *, read: bool) -> None:
        """Note the end of the cycle. Without ``read`` the database did not answer, so the check has no result."""
        if read and self._check is not None:
            self._previous = self._check
        self._check, self._changed = None, False

    def published(self, generation: int, workers: Iterable[Hashable]) -> None:
        """Note that a catalogue is published, while ``workers`` serve an earlier one."""
        if self._changed and self._previous is not None:
            self._measurements.append(_Measurement(generation, self._previous, set(workers)))

    def acknowledged(self, worker: Hashable, generation: int) -> None:
        """Note that ``worker`` serves ``generation``."""
        for measurement in self._measurements:
            if generation >= measurement.generation:
                measurement.waiting.discard(worker)
                measurement.acknowledged = True
        self._finish()

    def gone(self, worker: Hashable) -> None:
        """Note that ``worker`` has ended or drains, so it serves no new calls."""
        for measurement in self._measurements:
            measurement.waiting.discard(worker)
        self._finish()

    def distribution(self) -> Distribution:
        """The samples so far."""
        return Distribution(tuple(self._counts), self._sum)

    def _finish(self) -> None:
        done = [each for each in self._measurements if each.acknowledged and not each.waiting]
        for measurement in done:
            self._measurements.remove(measurement)
            self._add(max(0.0, self.now() - measurement.origin))

    def _add(self, seconds: float) -> None:
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._sum += seconds
        self.last_seconds = seconds
