"""Reaps the processes that the first process of a container inherits.

A process whose parent has ended becomes a child of PID 1, which is the master in a container without an init process
(``docker run`` without ``--init``). An operator's ``exec`` may leave such processes. When one has ended, only its
parent can remove it, and until then it takes a place in the container's process table.
"""

from __future__ import annotations

import asyncio
import os

PAUSE_SECONDS = 1.0


async def reap_orphans(pause: float = PAUSE_SECONDS) -> None:
    """Reap every ended child for which nothing waits, at most one every ``pause`` seconds. Never returns.

    The children that the master has started need not be known here: asyncio reaps them at once, so a process that is
    still there one pause after it was first seen is not one of them.
    """
    suspect = 0
    while True:
        await asyncio.sleep(pause)
        suspect = _reap_one(suspect)


def _reap_one(suspect: int) -> int:
    """Reap ``suspect`` if it is still there. Returns the next ended child; 0 if there is none."""
    try:
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if dead.si_pid != suspect:
                return dead.si_pid
            os.waitpid(suspect, os.WNOHANG)
    except ChildProcessError:  # this process has no child
        pass
    return 0
