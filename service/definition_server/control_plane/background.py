"""The thread for heavy work: encoding, building, storing.

The master's event loop must turn meanwhile, to supervise and to answer signals. And where CPUs are scarce, answers
come before freshness: once a catalogue is served, this thread gives way to the workers.
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
"""A third of a worker's share of a busy CPU (``sched(7)``): behind the workers, yet never starved."""


class Background:
    """One thread; what it is given runs in the order it came."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "background")
        self._gives_way = False

    async def run(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run ``work`` in the thread and wait for its result."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *args, **kwargs))

    def soon(self, work: Callable[[], object]) -> None:
        """Run ``work`` in the thread, some time; it raises nothing."""
        self._executor.submit(work)

    def give_way(self) -> None:
        """From now on let the workers go first. Cannot be undone, as a process may not raise its priority again."""
        if not self._gives_way:
            self._gives_way = True
            # Linux keeps the nice value per thread (setpriority(2), "C library/kernel differences"), so this does not
            # touch the master's main thread, whose value new workers inherit.
            self._executor.submit(os.setpriority, os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + _NICENESS)

    def close(self) -> None:
        """Take no more work. A piece that hangs is not waited for."""
        self._executor.shutdown(wait=False, cancel_futures=True)
