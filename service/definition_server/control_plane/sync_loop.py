"""Runs sync cycles on a schedule, and at once when one is requested."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress

from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.schedule import Backoff
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

RESTORE_AGAIN_SECONDS = 5.0
"""Seconds between two attempts to serve the last-known-good snapshot."""


class SyncLoop:
    """Runs the cycles of a `Synchronizer` for ever."""

    def __init__(
        self,
        synchronizer: Synchronizer,
        publisher: Publisher,
        *,
        interval: float,
        patience: float,
        share: Callable[[], float] = random.random,
        lend: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            synchronizer: Runs each cycle.
            publisher: Knows whether a catalogue is served.
            interval: Seconds from the start of one cycle to the start of the next.
            patience: Seconds after which the last-known-good snapshot is served if the first cycle has not ended.
            share: Returns the share of the interval, 0 to 1, that passes after an unscheduled cycle (the first one, or
                one that was requested). The share is random, so that replicas that were started or signalled together
                do not always read the table together.
            lend: Returns a context in which descriptors are free for a cycle.
        """
        self._synchronizer = synchronizer
        self._publisher = publisher
        self._interval = interval
        self._share = share
        self._lend = lend
        self._patience = patience
        self._backoff = Backoff(first=min(0.5, interval), most=min(30.0, interval))
        self._delay = interval
        self._unscheduled = True
        self._requested = asyncio.Event()
        self._waiting: list[asyncio.Future[Outcome]] = []
        """The futures of callers that wait for the outcome of a cycle that has not begun."""
        self._next_at: float | None = None

    @property
    def seconds_to_next(self) -> float | None:
        """Seconds until the next cycle; None while one runs."""
        return None if self._next_at is None else max(0.0, self._next_at - asyncio.get_running_loop().time())

    def sync_soon(self) -> None:
        """Start the next cycle at once. It reads the table even if it has not changed."""
        self._requested.set()

    async def sync_now(self) -> Outcome:
        """Call `sync_soon`, and return the outcome of that cycle."""
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(outcome)
        self.sync_soon()
        return await outcome

    async def run(self) -> None:
        """Run cycles. Never returns."""
        first = asyncio.create_task(self._cycle())
        # In a separate task, so that a disk that hangs does not delay reading the table.
        restoring = asyncio.create_task(self._restore(first))
        try:
            await self._run_cycles(first)
        finally:
            for task in (first, restoring):
                task.cancel()
            await asyncio.gather(first, restoring, return_exceptions=True)

    async def _restore(self, first: asyncio.Task[float]) -> None:
        """Serve the last-known-good snapshot if the first cycle has not published in time.

        The attempt is repeated until something is served, because memory or descriptors may be short at this moment.
        """
        await asyncio.wait((first,), timeout=self._patience)
        problem = None
        while self._publisher.current is None:
            try:
                with self._lend():
                    await self._synchronizer.restore()
                return
            except Exception as error:
                if str(error) != problem:
                    problem = str(error)
                    bug = None if isinstance(error, OSError) else error
                    log.error("Stored catalogue not served; tried again", error=problem, exc_info=bug)
            await asyncio.sleep(RESTORE_AGAIN_SECONDS)

    async def _run_cycles(self, first: asyncio.Task[float]) -> None:
        started = await first
        while True:
            elapsed = asyncio.get_running_loop().time() - started
            with suppress(TimeoutError):
                await asyncio.wait_for(self._requested.wait(), max(0.0, self._delay - elapsed))
            self._unscheduled = self._requested.is_set()
            self._requested.clear()
            started = await self._cycle(unconditional=self._unscheduled)

    async def _cycle(self, *, unconditional: bool = False) -> float:
        """Run one cycle. Returns the time of its start (seconds of the loop's clock)."""
        started = asyncio.get_running_loop().time()
        self._next_at = None
        waiting: list[asyncio.Future[Outcome]] = []
        if unconditional:
            waiting, self._waiting = self._waiting, waiting
        with self._lend():
            outcome = await self._synchronizer.cycle(self._next_delay, unconditional=unconditional)
        self._next_at = started + self._delay
        for future in waiting:
            if not future.done():
                future.set_result(outcome)
        return started

    def _next_delay(self, outcome: Outcome) -> float:
        """Seconds until the next cycle. The time is shorter while no catalogue is served."""
        if outcome in (Outcome.FAILED, Outcome.HELD) and self._publisher.current is None:
            self._delay = self._backoff.next()
        else:
            self._delay = self._interval * (self._share() if self._unscheduled else 1)
        return self._delay
