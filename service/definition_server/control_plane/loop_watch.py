"""Checks whether the master's event loop runs, for ``/livez``, and logs a long pause."""

from __future__ import annotations

import asyncio
import time

from definition_server.control_plane.supervisor import TICK_SECONDS
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

_STUCK_SECONDS = 30.0
_LONG_PAUSE_SECONDS = 5.0
"""The shortest pause that is logged: a machine that is only busy makes no such pause."""


class LoopWatch:
    """Notes when the event loop last ran. `problem` may be called from any thread."""

    def __init__(self) -> None:
        self._ran_at = time.monotonic()

    async def run(self) -> None:
        """Note periodically that the loop runs, and log a long pause when it is over. Never returns."""
        self._ran_at = time.monotonic()  # the time of the start is no pause
        while True:
            now = time.monotonic()
            paused, self._ran_at = now - self._ran_at, now
            if paused >= _LONG_PAUSE_SECONDS:
                log.warning(
                    "The master did not run",
                    seconds=round(paused, 1),
                    effect="meanwhile no change was published, and no worker replaced; the workers served on",
                    remedy="look for a process that stopped the master, and for a lack of CPU or memory",
                )
            await asyncio.sleep(TICK_SECONDS)

    def problem(self) -> str | None:
        """A sentence with the time for which the loop has not run; None if the loop runs."""
        silent = time.monotonic() - self._ran_at
        return None if silent < _STUCK_SECONDS else f"the master's event loop has not run for {silent:.0f} s"
