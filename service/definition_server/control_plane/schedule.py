"""Arithmetic on time: back-off, crash loops, heartbeats. Nothing here reads a clock: time is an argument, in
seconds.
"""

from __future__ import annotations


class Backoff:
    """Exponential delays, which double from ``first`` up to ``most``. The caller calls `reset` after a success."""

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._next = first

    def next(self) -> float:
        """The delay before the next attempt; the delay of the next call is twice as long."""
        delay = self._next
        self._next = min(self._most, delay * 2)
        return delay

    def reset(self) -> None:
        """Begin from ``first`` again."""
        self._next = self._first


class CrashLoop:
    """Detects a crash loop: ``limit`` workers in a row that ran for less than ``stable`` seconds each."""

    def __init__(self, limit: int, stable: float) -> None:
        self._limit = limit
        self._stable = stable
        self._short_runs = 0

    def ended(self, ran: float) -> None:
        """Note that a worker ended by itself after ``ran`` seconds."""
        self._short_runs = self._short_runs + 1 if ran < self._stable else 0

    def runs(self, seconds: float) -> None:
        """Note that the current worker has run ``seconds`` so far."""
        if seconds >= self._stable:
            self._short_runs = 0

    @property
    def looping(self) -> bool:
        """Whether this is a crash loop."""
        return self._short_runs >= self._limit


class Heartbeat:
    """Decides whether a worker hangs: it does if its beat has not changed for ``timeout`` seconds of *our* observation.

    Only time during which the observer itself was running counts: after the machine was suspended or the master
    stopped, one late observation must not count as a hang of every worker.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._beat: int | None = None
        self._still = 0.0
        self._observed_at: float | None = None

    def hangs(self, beat: int, now: float) -> bool:
        """Observe ``beat`` at ``now``. Returns True if the beat has not changed for too long."""
        if beat != self._beat or self._observed_at is None:
            self._still = 0.0
        else:
            self._still += min(now - self._observed_at, self._timeout / 4)
        self._beat, self._observed_at = beat, now
        return self._still >= self._timeout
