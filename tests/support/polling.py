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
    began = time.monotonic()
    while True:
        answer = what()
        if answer:
            return answer
        waited = time.monotonic() - began
        if waited > seconds:
            raise AssertionError(f"not within {seconds:g} s: {told if isinstance(told, str) else told()}")
        time.sleep(pause(waited))


def pause(waited: float) -> float:
    """Seconds until the next poll after ``waited`` seconds: a tenth of them, within limits. A poll often takes
    milliseconds in the test and in the server, and tests run side by side on few CPUs.
    """
    return min(MOST_POLL_SECONDS, max(POLL_SECONDS, waited / 10))
