"""Waiting without fixed sleeps: poll to a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_SECONDS = 0.02
DEADLINE_SECONDS = 30.0


def until(what: Callable[[], T], told: str | Callable[[], str], *, seconds: float = DEADLINE_SECONDS) -> T:
    """Call ``what`` until its result is truthy. Returns that result.

    Raises:
        AssertionError: after ``seconds``, saying ``told``.
    """
    deadline = time.monotonic() + seconds
    while True:
        answer = what()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {told if isinstance(told, str) else told()}")
        time.sleep(POLL_SECONDS)
