"""Sampling of calls: one of every so many calls is noted, and the master exports it as a span
(`observability.tracing`).

A worker without sampling does not use this module's code: its transport counts directly on the stats page. With
sampling, the transport counts on a `CallSampling`, which passes the counts on to the page and makes one comparison for
each batch of calls. A worker has no network access for an export, so it sends the noted calls to the master over the
control socket.
"""

from __future__ import annotations

from collections import deque
from time import time_ns

from definition_server.ipc.messages import CallsSampled
from definition_server.ipc.stats import Slot

MOST_NOTED = 50
"""The most calls in one report, so that its message fits into a datagram. Further calls are left out."""


class CallSampling:
    """Counts on ``slot``, and notes one of ``every`` calls."""

    def __init__(self, slot: Slot, every: int) -> None:
        self._slot = slot
        self._every = every
        self._left = every
        self._noted: deque[tuple[int, int, int, int]] = deque()

    def count(self, method: int, status: int, elapsed_ns: int) -> None:
        """See `Slot.count`."""
        self.count_many(method, status, 1, elapsed_ns)

    def count_many(self, method: int, status: int, number: int, elapsed_ns: int) -> None:
        """See `Slot.count_many`."""
        self._slot.count_many(method, status, number, elapsed_ns)
        self._left -= number
        if self._left <= 0:
            self._left = self._every
            if len(self._noted) < MOST_NOTED:
                self._noted.append((method, status, time_ns(), elapsed_ns))

    def take(self) -> CallsSampled | None:
        """The calls that were noted since the last report; None if there are none."""
        if not self._noted:
            return None
        methods, statuses, ended, elapsed = zip(*self._noted, strict=True)
        self._noted.clear()
        return CallsSampled(methods, statuses, ended, elapsed)
