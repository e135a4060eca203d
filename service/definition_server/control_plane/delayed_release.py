"""Holds a replaced snapshot until the workers have released it.

The process that releases a snapshot last frees its memory: some 15 ms of work for 200 MB. In a worker this work would
delay calls (docs/decisions/0013-answers-before-the-swap.md), so the master holds the snapshot for longer than the
workers do.

When the master releases it, nothing else in the master may refer to the snapshot. But a sync cycle that failed may
leave references: the frames of its exception refer to the snapshot, and the frames and the exception refer to each
other. Only the garbage collector releases such a reference cycle, and it rarely runs in a process that is mostly idle;
so the collector is called here.
"""

from __future__ import annotations

import asyncio
import gc
from functools import partial

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.ipc.handover import HOLD_SECONDS


class DelayedRelease:
    """Holds one snapshot at a time, so that publications in quick succession do not accumulate in memory."""

    def __init__(self, background: Background) -> None:
        self._background = background
        self._held: list[Snapshot] = []
        self._timer: asyncio.TimerHandle | None = None

    def take(self, snapshot: Snapshot) -> None:
        """Release the previous snapshot now, and ``snapshot`` after `HOLD_SECONDS` in the background thread."""
        self._release()
        self._held = [snapshot]
        self._timer = asyncio.get_running_loop().call_later(HOLD_SECONDS, self._release)

    def close(self) -> None:
        """Release the held snapshot at once."""
        if self._timer is not None:
            self._timer.cancel()
        self._held = []

    def _release(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._background.soon(partial(_clear, self._held))


def _clear(held: list[Snapshot]) -> None:
    held.clear()
    gc.collect()  # short: `cli.lasting_imports` has frozen the master's modules (otherwise 20 ms)
