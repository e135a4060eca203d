"""Work that can wait, a little of it in each turn of the event loop: above all what connections have left over.

A turn of a connection is bounded, but an attacker has as many connections as it likes: if each had a turn in every
turn of the loop, everybody else would wait for all of them. So what is left over, input not worked through or output
beyond the budget, is taken up here: first come, first served, for about `SLICE` seconds, then the loop looks at its
sockets. Those that have leftovers share what is left of the core; those that have none wait for one slice at the most,
and not also for what else the loop had to do in that turn (reads, new connections, timers): see `BUSY`.

What a server has to do beside its connections, and all at once would hold up calls, queues here too
(`FairScheduler.spread`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from time import perf_counter

SLICE = 0.00003
"""Seconds of leftover work in one turn of the loop; the connection's turn during which it ends is not cut short."""

BUSY = 0.00006
"""Seconds that the loop may have spent otherwise since the last slice; where it was more, the next one lets the loop
look at its sockets first. Once: those who wait here must not wait for ever."""


class FairScheduler:
    """What waits for a turn in one loop."""

    __slots__ = ("_gave_way", "_left_at", "_scheduled", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._scheduled = False
        self._left_at = 0.0
        self._gave_way = False

    def join(self, loop: asyncio.AbstractEventLoop, turn: Callable[[], object]) -> None:
        """Have ``turn`` called once, behind those that wait already. If it returns something true it is the last one of
        its slice: what it has begun goes on in the loop's next turn, behind nobody's back."""
        self._waiting.append(turn)
        if not self._scheduled:
            self._scheduled = True
            self._left_at = perf_counter()
            loop.call_soon(self._take, loop)

    async def spread(self, steps: Iterable[object]) -> None:
        """Go through ``steps``, each a few microseconds of work, a slice at a time. Raises what a step raises."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        remaining = iter(steps)

        def turn() -> None:
            if done.done():  # nobody waits for it any more: the task was cancelled
                return
            end = perf_counter() + SLICE
            try:
                for _ in remaining:
                    if perf_counter() >= end:
                        self.join(loop, turn)
                        return
            except Exception as error:  # noqa: BLE001 - it belongs to who waits
                done.set_exception(error)
            else:
                done.set_result(None)

        self.join(loop, turn)
        await done

    def _take(self, loop: asyncio.AbstractEventLoop) -> None:
        waiting, now = self._waiting, perf_counter()
        if now - self._left_at > BUSY and not self._gave_way:
            self._gave_way = True
            loop.call_soon(self._take, loop)
            return
        self._gave_way = False
        end = now + SLICE
        try:
            # Who joins again during this has its next turn in the next turn of the loop.
            for _ in range(len(waiting)):
                if waiting.popleft()() or perf_counter() >= end:
                    break
        finally:
            self._scheduled = bool(waiting)
            if waiting:
                self._left_at = perf_counter()
                loop.call_soon(self._take, loop)
