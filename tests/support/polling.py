"""Waiting without fixed sleeps: poll to a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02
MOST_POLL_SECONDS = 0.1
DEADLINE_SECONDS = 30.0


def until(what: Callable[[], T], told: str | Callable[[], str], *, seconds: float = DEADLINE_SECONDS) -> T:
    """Call ``what`` until its result is truthy. Returns that result.

    Raises:
        AssertionError: after ``seconds``, saying ``told``.
    """
    wait = Wait(told, seconds)
    while not (answer := what()):
        time.sleep(wait.pause())
    return answer


class Wait:
    """A wait that ends after ``seconds``."""

    def __init__(self, told: str | Callable[[], str], seconds: float) -> None:
        self._told = told
        self._seconds = seconds
        self._began = time.monotonic()

    def pause(self) -> float:
        """Seconds until the next poll: a tenth of those that have passed, within limits. A poll often takes
        milliseconds in the test and in the server, and tests run side by side on few CPUs.

        Raises:
            AssertionError: if the time is over.
        """
        waited = time.monotonic() - self._began
        if waited > self._seconds:
            told = self._told if isinstance(self._told, str) else self._told()
            raise AssertionError(f"not within {self._seconds:g} s: {told}")
        return min(MOST_POLL_SECONDS, max(POLL_SECONDS, waited / 10))
