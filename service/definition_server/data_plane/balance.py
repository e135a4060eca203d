"""Which worker takes the next connection: the one that holds the fewest.

gRPC clients open few connections and keep them for hours, so whoever accepts one has a share of the load for as long.
All workers watch one listening socket, inherited from the master; the kernel wakes any of them. Before it accepts, a
worker reads the others' connection counts from the stats page and leaves the connection to those that hold fewer. No
process stands between, nothing is locked, and nothing is read or written for a request.

**Rules.** Let *least* be the fewest connections that any other worker holds which accepts, has room, and whose heart
beats (`FRESH_SECONDS`).

1. A worker with no more than *least* accepts. Equals race, and the kernel gives each connection to one of them; so
   connections opened one after the other never lie more than one apart.
2. Whoever holds more looks again after `retry_seconds`. If no worker at all has accepted for `PATIENCE_SECONDS` of such
   looking, the one that should does not (it hangs, and its heart has not been missed yet): then anybody accepts.
3. In a storm rule 1 would hand out a connection per worker and look. Once connections have been waiting without a
   break for `STORM_SECONDS`, a worker may hold a sixteenth more than *least*: a storm is taken in at a geometric
   rate, and up to 16 connections a worker nothing is different.
4. A worker that is full accepts nothing. Where all are, connections wait in the kernel's queue for one to end.

A count read may be older than a connection just accepted elsewhere. It then says too little, which costs the reader
one more look, or belongs to the reader itself, which knows its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from definition_server.ipc.stats import StatsPage
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

FRESH_SECONDS = 1.0
"""Four beats of a worker's heart."""
PATIENCE_SECONDS = 0.05
STORM_SECONDS = 0.01
_LENIENCE = 16
_RETRY_SECONDS = 0.001
"""What a connection waits at most for the least loaded worker if that was not looking: a millisecond."""
_RETRY_FULL_SECONDS = 0.1
_BREAK_SECONDS = 0.02
"""Looks further apart than this belong to different storms: in between, nothing was waiting."""


class Gate:
    """One worker's decision, on slot ``number`` of ``page``. ``limit``: the most connections to hold, 0 for any."""

    def __init__(
        self, page: StatsPage, number: int, *, limit: int = 0, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._slot = page.slot(number)
        self._others = [page.slot(other) for other in range(page.slots) if other != number]
        self._limit = limit
        self._clock = clock
        self._connections = 0
        self._opened_by_others = 0
        self._looked = self._waiting_since = 0
        self._stuck_since: int | None = None
        """Since when connections wait and nobody accepts; None where the last one was accepted here."""
        self._told_full = False

    @property
    def connections(self) -> int:
        """Connections held."""
        return self._connections

    @property
    def full(self) -> bool:
        """Whether no further connection may be held."""
        return 0 < self._limit <= self._connections

    @property
    def retry_seconds(self) -> float:
        """When to ask again after a refusal, if the connection still waits then."""
        return _RETRY_FULL_SECONDS if self.full else _RETRY_SECONDS

    def start(self) -> None:
        """From now on this worker counts among those that accept."""
        self._slot.open_gate()

    def stop(self) -> None:
        """From now on connections are left to the others."""
        self._slot.close_gate()

    def may_accept(self) -> bool:
        """Whether to accept the connection that waits. Ask for each one."""
        if self.full:
            self._tell_full()
            return False
        now = self._clock()
        least, opened = self._look_around(now)
        if now - self._looked > _BREAK_SECONDS * 1e9:
            self._waiting_since = now
        if self._stuck_since is None or opened != self._opened_by_others:
            self._stuck_since = now
        self._looked, self._opened_by_others = now, opened
        if least is None or self._connections <= least:
            return True
        if now - self._waiting_since > STORM_SECONDS * 1e9 and self._connections <= least + least // _LENIENCE:
            return True
        return now - self._stuck_since > PATIENCE_SECONDS * 1e9

    def opened(self) -> None:
        """A connection was accepted."""
        self._connections += 1
        self._stuck_since = None
        self._slot.connected(self._connections, 1)

    def closed(self) -> None:
        """A connection is gone."""
        self._connections -= 1
        self._told_full = False
        self._slot.connected(self._connections, 0)

    def _look_around(self, now: int) -> tuple[int | None, int]:
        """The fewest connections of another worker that would accept, if any would, and all ever opened by others."""
        least, total = None, 0
        for slot in self._others:
            accepting, connections, opened, beat = slot.load()
            total += opened
            if not accepting or now - beat > FRESH_SECONDS * 1e9 or 0 < self._limit <= connections:
                continue
            if least is None or connections < least:
                least = connections
        return least, total

    def _tell_full(self) -> None:
        if not self._told_full:
            self._told_full = True
            log.warning("Connections wait: MAX_CONNECTIONS is reached", connections=self._connections)
