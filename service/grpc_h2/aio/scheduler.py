"""Deferred work, a time slice of it in each iteration of the event loop: above all what connections have left to do.

**Theory of operation.** A connection does a bounded amount of work when it is read. But an attacker has as many
connections as it likes: if each of them continued in every iteration of the loop, all other connections would wait for
all of them. So a connection that has more to do (input that is not processed yet, or output beyond its budget) defers
that to this scheduler. Deferred work is done first come, first served, for about `TIME_SLICE` seconds; then the loop
polls its sockets. Connections with deferred work thus share what is left of the core. Connections without it wait for
one time slice at most. Where the loop was busy with other things in the same iteration (reads, new connections,
timers), the time slice is put off by one iteration, so that its length does not add to theirs: see `BUSY_LIMIT`.

Work of the server that belongs to no connection, and would delay calls if it were done at once, is deferred here too:
`FairScheduler.spread` divides it into steps.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter

TIME_SLICE = 0.00003
"""Seconds of deferred work in one iteration of the loop. The piece of work during which it ends is not interrupted."""

BUSY_LIMIT = 0.00006
"""Limit of the seconds that the loop has spent on other work since the last time slice. Above it, the next time slice
is put off by one iteration, so that the loop polls its sockets first. It is never put off twice in succession."""


class FairScheduler:
    """The queue of deferred work of one event loop."""

    __slots__ = ("_last_slice_end", "_put_off", "_scheduled", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._scheduled = False
        self._last_slice_end = 0.0
        self._put_off = False

    def defer(self, loop: asyncio.AbstractEventLoop, work: Callable[[], object]) -> None:
        """Call ``work`` once, after the work that is deferred already.

        If it returns a true value, the time slice ends: the work that it has begun continues in the next iteration of
        the loop, and no other deferred work may run before that.
        """
        self._waiting.append(work)
        if not self._scheduled:
            self._scheduled = True
            self._last_slice_end = perf_counter()
            loop.call_soon(self._run_slice, loop)

    async def spread(self, steps: Iterable[object]) -> None:
        """Go through ``steps``, each a few microseconds of work, a time slice at a time. Raises what a step raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        remaining = iter(steps)

        def work() -> None:
            if done.done():  # the task that awaits it was cancelled
                return
            end = perf_counter() + TIME_SLICE
            try:
                for _ in remaining:
                    if perf_counter() >= end:
                        self.defer(loop, work)
                        return
            except Exception as error:  # noqa: BLE001 - it is raised where `spread` is awaited
                done.set_exception(error)
            else:
                done.set_result(None)

        self.defer(loop, work)
        await done

    def _run_slice(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, now = self._waiting, perf_counter()
        if now - self._last_slice_end > BUSY_LIMIT and not self._put_off:
            self._put_off = True
            loop.call_soon(self._run_slice, loop)
            return
        self._put_off = False
        end = now + TIME_SLICE
        try:
            # Work that is deferred again meanwhile runs in the next iteration of the loop at the earliest.
            for _ in range(len(waiting)):
                if waiting.popleft()() or perf_counter() >= end:
                    break
        finally:
            self._scheduled = bool(waiting)
            if waiting:
                self._last_slice_end = perf_counter()
                loop.call_soon(self._run_slice, loop)
