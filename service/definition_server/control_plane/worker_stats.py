"""The counters of the workers, checked for plausibility by the master.

Only the worker writes its stats page. A worker that was taken over, or whose memory is damaged, may write anything.
Each reading is compared with the previous one (`judge`). The first implausible reading is a fault: from then on the
worker's last plausible reading is used, and the supervisor replaces the worker. So a worker cannot change the counters
of other workers, and can change its own only to values that a worker could have counted.

`FleetStats` sums over all workers, including those that have ended, so that a counter never decreases.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from definition_server.ipc.stats import BUCKETS, METHODS, REFUSALS, STATUSES, SlotReading, StatsPage

MOST_REQUESTS_PER_SECOND = 20_000_000
"""The most calls per second of one worker: some two hundred times the rate that one CPU allows."""

MOST_CONNECTIONS = 2_000_000
"""The most connections of one worker: above the largest MAX_CONNECTIONS and the kernel's ``fs.nr_open`` (1,048,576)."""

_MOST_SECONDS_PER_REQUEST = 86_400
_TOLERANCE_SECONDS = 1.0
"""A page is read word by word while its worker writes, so the times of its values may differ by so many seconds."""


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """The counts of several workers together."""

    requests: dict[str, int]
    """Status → requests."""
    latency: dict[str, tuple[int, ...]]
    """Method → requests in each bucket, without those in lower buckets."""
    latency_sum_seconds: dict[str, float]
    refused: dict[str, int]
    """Reason → connections refused or closed."""
    lines_dropped: int
    """Number of log lines that were dropped."""


def judge(before: SlotReading, after: SlotReading, *, pid: int, elapsed: float) -> str | None:
    """The reason why the reading ``after`` is implausible; None if it is plausible.

    Args:
        before: The last plausible reading.
        after: The new one.
        pid: The worker's process id. The page has 0 until the worker has begun.
        elapsed: Seconds between the two.
    """
    if after.pid not in (pid, before.pid):
        return "the process id is that of another process"
    if after.heartbeat_ns < before.heartbeat_ns:  # by the worker's own clock, which may differ from ours
        return "the heartbeat goes back"
    if after.generation < before.generation:
        return "the generation goes back"
    if after.connections > MOST_CONNECTIONS:
        return f"{after.connections} connections"
    most = int(MOST_REQUESTS_PER_SECOND * (elapsed + _TOLERANCE_SECONDS))
    if not 0 <= after.opened - before.opened <= most:
        return "the count of accepted connections goes back, or leaps"
    if not all(0 <= after.refused[reason] - before.refused[reason] <= most for reason in REFUSALS):
        return "a count of refused connections goes back, or leaps"
    if not 0 <= after.lines_dropped - before.lines_dropped <= most:
        return "the count of dropped log lines goes back, or leaps"
    growth = [after.requests[status] - before.requests[status] for status in STATUSES]
    for method in METHODS:
        growth += (new - old for old, new in zip(before.latency[method], after.latency[method], strict=True))
    if not all(0 <= grown <= most for grown in growth):
        return "a count of requests goes back, or leaps"
    for method in METHODS:
        grown = after.latency_sum_seconds[method] - before.latency_sum_seconds[method]
        answered = sum(after.latency[method]) - sum(before.latency[method])
        if not 0 <= grown <= _MOST_SECONDS_PER_REQUEST * (answered + 1):
            return "the time of the requests goes back, or leaps"
    return None


class WorkerStats:
    """One worker's page and its last plausible reading. May be used from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Creates the page.

        Raises:
            OSError: if memory or descriptors are exhausted.
        """
        self.page = StatsPage()
        self.fault: str | None = None
        """The reason why a reading was implausible; None if there was no such reading. If it is set, the page is not
        read any more.
        """
        self._clock = clock
        self._pid = 0
        self._reading = self.page.read()
        self._read_at = self._beat_at = clock()
        self._lock = threading.Lock()
        self._closed = False

    def belongs_to(self, pid: int) -> None:
        """The process that the page was given to."""
        self._pid = pid

    def read(self) -> SlotReading:
        """The last plausible reading. Reads the page, unless there is a fault."""
        with self._lock:
            if self.fault is None and not self._closed:
                self._read_again()
            return self._reading

    @property
    def heartbeat_age_seconds(self) -> float:
        """Seconds since the last reading that found a new heartbeat, or since the page was made."""
        return max(0.0, self._clock() - self._beat_at)

    def _read_again(self) -> None:
        reading = self.page.read()
        now = self._clock()
        self.fault = judge(self._reading, reading, pid=self._pid, elapsed=now - self._read_at)
        if self.fault is None:
            if reading.heartbeat_ns != self._reading.heartbeat_ns:
                self._beat_at = now
            self._reading, self._read_at = reading, now

    def close(self) -> SlotReading:
        """Close the page. Returns its last plausible reading."""
        last = self.read()
        with self._lock:
            if not self._closed:
                self._closed = True
                self.page.close()
        return last


class FleetStats:
    """The pages of all living workers, and the counts of those that have ended. May be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._living: set[WorkerStats] = set()
        self._ended = _sum(())

    def open(self) -> WorkerStats:
        """A page for the next worker.

        Raises:
            OSError: if memory or descriptors are exhausted.
        """
        stats = WorkerStats()
        with self._lock:
            self._living.add(stats)
        return stats

    def retire(self, stats: WorkerStats) -> None:
        """Keep the counts of the worker of ``stats``, which has ended, and close its page."""
        with self._lock:
            if stats in self._living:
                self._living.remove(stats)
                self._ended = _sum((self._ended, _counts(stats.close())))

    def requests(self) -> RequestCounts:
        """The counts of all workers since the start."""
        with self._lock:
            return _sum((self._ended, *(_counts(stats.read()) for stats in self._living)))


def _counts(reading: SlotReading) -> RequestCounts:
    return RequestCounts(
        reading.requests, reading.latency, reading.latency_sum_seconds, reading.refused, reading.lines_dropped
    )


def _sum(counts: Iterable[RequestCounts]) -> RequestCounts:
    parts = tuple(counts)
    return RequestCounts(
        requests={status: sum(part.requests[status] for part in parts) for status in STATUSES},
        latency={
            method: tuple(sum(part.latency[method][bucket] for part in parts) for bucket in range(BUCKETS))
            for method in METHODS
        },
        latency_sum_seconds={method: sum(part.latency_sum_seconds[method] for part in parts) for method in METHODS},
        refused={reason: sum(part.refused[reason] for part in parts) for reason in REFUSALS},
        lines_dropped=sum(part.lines_dropped for part in parts),
    )
