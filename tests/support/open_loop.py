"""The schedule of an open-loop load: calls leave when they are due, answered or not.

Latency counts from the instant at which a call was due, so a stall of the server or of the load itself shows in every
call that was due meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

_CALLS_BETWEEN_YIELDS = 50


@dataclass(frozen=True, slots=True)
class Due:
    """A call that is due now."""

    number: int
    """Counts from 0."""
    instant: float
    """When it was due (``time.monotonic``)."""
    behind: float
    """Seconds that the schedule was behind when the call came up; 0 where it had to be waited for."""


async def open_loop(rate: float, stopped: Callable[[], bool]) -> AsyncIterator[Due]:
    """Each call of a schedule with ``rate`` calls a second when it is due, until ``stopped``."""
    started, number = time.monotonic(), 0
    while not stopped():
        instant = started + number / rate
        behind = time.monotonic() - instant
        if behind < 0:
            await asyncio.sleep(-behind)
            if stopped():
                return
        elif number % _CALLS_BETWEEN_YIELDS == 0:
            await asyncio.sleep(0)  # behind, yet the answers of earlier calls must be seen
        yield Due(number, instant, max(0.0, behind))
        number += 1
