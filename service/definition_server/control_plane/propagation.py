"""How long a change takes from the table to the last worker: an upper bound that needs no clock of the database.

A change that a cycle reads was committed after the last check that did not have it had begun. So the time from the
start of that check until every worker has acknowledged the new catalogue is at least the true delay, and exceeds it by
less than the interval of the checks. The first publication after a start has no earlier check, and no sample; neither
has one that an operator causes (`accept`, a pin, its end), whose time says nothing about the server.

Judged are the workers that serve. A worker that ends, drains or is replaced meanwhile is not awaited any more; one that
starts gets the newest catalogue first.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 900.0, 3600.0)
"""Upper bounds of the histogram's buckets, in seconds. The alert is at 120: a sample contains the interval (60)."""
_MOST_WAITING = 64
"""Publications that wait for acknowledgements. A worker acknowledges the newest, and all before with it."""


@dataclass(slots=True)
class _Measurement:
    """A published change that not every worker has acknowledged."""

    generation: int
    origin: float
    waiting: set[Hashable]
    acknowledged: bool = False


@dataclass(frozen=True, slots=True)
class Distribution:
    """A histogram; ``counts`` has one bucket more than `BOUNDS`, and is not cumulated."""

    counts: tuple[int, ...]
    sum_seconds: float


@dataclass(slots=True)
class Propagation:
    """Measures published changes. For the event loop's thread; `distribution` may be read from any other.

    ``now`` returns seconds of the clock by which cycles and acknowledgements are timed.
    """

    now: Callable[[], float]
    last_seconds: float | None = None
    """The newest sample."""
    _counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    _sum: float = 0.0
    _check: float | None = None
    """Start of the check under way."""
    _previous: float | None = None
    """Start of the last check that has ended, and so did not have what the next one finds."""
    _changed: bool = False
    _measurements: deque[_Measurement] = field(default_factory=lambda: deque(maxlen=_MOST_WAITING))

    def check_begins(self) -> None:
        """A cycle is about to ask the database."""
        self._check, self._changed = self.now(), False

    def change_read(self) -> None:
        """The check has found a change, and read it. A publication until the end of the check is that change."""
        self._changed = True

    def check_ends(self, *, read: bool) -> None:
        """The cycle is over. Not ``read``: the database did not answer, so the check found nothing out."""
        if read and self._check is not None:
            self._previous = self._check
        self._check, self._changed = None, False

    def published(self, generation: int, workers: Iterable[Hashable]) -> None:
        """A catalogue is published, and ``workers`` serve an earlier one."""
        if self._changed and self._previous is not None:
            self._measurements.append(_Measurement(generation, self._previous, set(workers)))

    def acknowledged(self, worker: Hashable, generation: int) -> None:
        """``worker`` serves ``generation``."""
        for measurement in self._measurements:
            if generation >= measurement.generation:
                measurement.waiting.discard(worker)
                measurement.acknowledged = True
        self._finish()

    def gone(self, worker: Hashable) -> None:
        """``worker`` ended or drains: it serves no new call."""
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
