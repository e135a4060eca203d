"""The schedule of an open-loop load: calls are sent when they are due, whether or not earlier ones are answered.

Latency is measured from the instant at which a call was due, so a stall of the server or of the load itself lengthens
the latency of every call that was due during the stall.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

_CALLS_BETWEEN_YIELDS = 50


@dataclass(frozen=True, slots=True)
class Due:
    """The number and the due time of a call that is due now."""

    number: int
    """Counts from 0."""
    instant: float
    """When it was due (``time.monotonic``)."""
    behind: float
    """Seconds by which the call is late; 0 if it is on time."""


async def open_loop(rate: float, stopped: Callable[[], bool]) -> AsyncIterator[Due]:
    """Yields each call of a schedule of ``rate`` calls a second when the call is due, until ``stopped``."""
    started, number = time.monotonic(), 0
    while not stopped():
        instant = started + number / rate
        behind = time.monotonic() - instant
        if behind < 0:
            await asyncio.sleep(-behind)
            if stopped():
                return
        elif number % _CALLS_BETWEEN_YIELDS == 0:
            await asyncio.sleep(0)  # the call is late, but the answers of earlier calls must be processed
        yield Due(number, instant, max(0.0, behind))
        number += 1
