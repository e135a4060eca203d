"""The thread for CPU-heavy work: encoding rows, building and comparing snapshots, releasing their memory.

Meanwhile the master's event loop must run, to supervise the workers and to handle signals. Answering calls is more
important than a fresh catalogue: once a catalogue is served, this thread has a lower priority than the workers. (The
last-known-good snapshot is stored in a thread of its own, because a disk may hang: `last_known_good.py`.)
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NICENESS = 5
"""With this nice value the thread gets a third of a worker's share of a busy CPU (``sched(7)``): less than a worker,
but always some.
"""


class Background:
    """One thread that runs work in the order of its submission."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "background")
        self._priority_lowered = False

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in the thread and wait for its result."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *args, **kwargs))

    def soon(self, work: Callable[[], object]) -> None:
        """Run ``work`` in the thread, without waiting for it. ``work`` must not raise."""
        self._executor.submit(work)

    def lower_priority(self) -> None:
        """Lower the thread's priority. This is final: without privileges a priority cannot be raised again."""
        if not self._priority_lowered:
            self._priority_lowered = True
            # On Linux each thread has its own nice value (setpriority(2), "C library/kernel differences"). So this does
            # not change the value of the master's main thread, which new workers inherit.
            self._executor.submit(os.setpriority, os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)

    def close(self) -> None:
        """Accept no more work. Does not wait for work that hangs."""
        self._executor.shutdown(wait=False, cancel_futures=True)
