"""Reaping what the first process of a container inherits.

A process whose parent has ended becomes a child of PID 1, which is the master where nothing else is (``docker run``
without ``--init``): what an operator's ``exec`` leaves behind, for one. Nobody but its parent can remove it once it has
ended, and each one that is left takes a place in the container's process table for good.
"""

from __future__ import annotations

import asyncio
import os

PAUSE_SECONDS = 1.0


async def reap_orphans(pause: float = PAUSE_SECONDS) -> None:
    """Reap whatever has ended and is waited for by nobody, at most one every ``pause`` seconds. Never returns.

    Which children are the master's own need not be known: asyncio waits for those and reaps them at once, so what still
    lies there one pause after it was first seen is not among them.
    """
    suspect = 0
    while True:
        await asyncio.sleep(pause)
        suspect = _look(suspect)


def _look(suspect: int) -> int:
    """Reap ``suspect`` if it is still there. Returns the next one that lies there, 0 where none does."""
    try:
        while (dead := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if dead.si_pid != suspect:
                return dead.si_pid
            os.waitpid(suspect, os.WNOHANG)
    except ChildProcessError:  # no child at all
        pass
    return 0
