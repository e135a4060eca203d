"""Checks whether the master's event loop runs, for ``/livez``."""

from __future__ import annotations

import asyncio
import time

from definition_server.control_plane.supervisor import TICK_SECONDS

_STUCK_SECONDS = 30.0


class LoopWatch:
    """Notes when the event loop last ran. `problem` may be called from any thread."""

    def __init__(self) -> None:
        self._ran_at = time.monotonic()

    async def run(self) -> None:
        """Note periodically that the loop runs. Never returns."""
        while True:
            self._ran_at = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)

    def problem(self) -> str | None:
        """A sentence with the time for which the loop has not run; None if the loop runs."""
        silent = time.monotonic() - self._ran_at
        return None if silent < _STUCK_SECONDS else f"the master's event loop has not run for {silent:.0f} s"
