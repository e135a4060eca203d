"""Arithmetic of waiting: back-off, crash loops, heartbeats. No clock of its own: time is an argument (seconds)."""

from __future__ import annotations


class Backoff:
    """Exponential delays, from ``first`` doubling to ``most``; `reset` after a success."""

    def __init__(self, first: float, most: float) -> None:
        self._first = first
        self._most = most
        self._next = first

    def next(self) -> float:
        """The delay before the next attempt; each call doubles the one after."""
        delay = self._next
        self._next = min(self._most, delay * 2)
        return delay

    def reset(self) -> None:
        """Begin from ``first`` again."""
        self._next = self._first


class CrashLoop:
    """Tells a crash loop (``limit`` workers in a row that lived less than ``stable`` seconds) from a chance death."""

    def __init__(self, limit: int, stable: float) -> None:
        self._limit = limit
        self._stable = stable
        self._short_lives = 0

    def ended(self, lived: float) -> None:
        """A worker ended unasked after ``lived`` seconds."""
        self._short_lives = self._short_lives + 1 if lived < self._stable else 0

    def lives(self, seconds: float) -> None:
        """The present worker has lived ``seconds`` so far."""
        if seconds >= self._stable:
            self._short_lives = 0

    @property
    def looping(self) -> bool:
        """Whether this is a crash loop."""
        return self._short_lives >= self._limit


class Heartbeat:
    """Judges whether a worker hangs: its beat has not changed for ``timeout`` seconds of *our* watching.

    Only time during which the watcher itself was awake counts: after a suspended machine or a stopped master, one
    late look must not condemn every worker at once.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._beat: int | None = None
        self._still = 0.0
        self._looked: float | None = None

    def hangs(self, beat: int, now: float) -> bool:
        """Look at ``beat`` at ``now``; True where the worker has stood still too long."""
        if beat != self._beat or self._looked is None:
            self._still = 0.0
        else:
            self._still += min(now - self._looked, self._timeout / 4)
        self._beat, self._looked = beat, now
        return self._still >= self._timeout
