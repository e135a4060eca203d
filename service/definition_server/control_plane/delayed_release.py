"""The catalogue that was served until just now, held for two seconds more.

Whoever lets go of a snapshot last frees its memory: some 15 ms of work for 200 MB. That must not be a worker, whose
calls would wait (docs/decisions/0013-answers-before-the-swap.md), so the master holds on for longer than they do.

Then nothing else in the master may hold it. A cycle that failed while it was served may: the exception's frames know
what was served, and they and the exception know each other. That is for the garbage collector, which has no reason to
come soon in a process that does next to nothing; so it is called.
"""

from __future__ import annotations

import asyncio
import gc
from functools import partial

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background

HELD_SECONDS = 2.0
"""A worker takes up to a second to prepare its answers and lets go half a second after the swap."""


class DelayedRelease:
    """Holds one snapshot at a time: publications in quick succession must not pile up in memory."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._held: list[Snapshot] = []
        self._timer: asyncio.TimerHandle | None = None

    def take(self, snapshot: Snapshot) -> None:
        """Hold ``snapshot``, then free it in the background thread; one that is held already is freed now."""
        self._free()
        self._held = [snapshot]
        self._timer = asyncio.get_running_loop().call_later(HELD_SECONDS, self._free)

    def close(self) -> None:
        """Hold nothing any more."""
        if self._timer is not None:
            self._timer.cancel()
        self._held = []

    def _free(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._background.soon(partial(_release, self._held))


def _release(held: list[Snapshot]) -> None:
    held.clear()
    gc.collect()  # some 20 ms, measured with all modules of the master loaded
