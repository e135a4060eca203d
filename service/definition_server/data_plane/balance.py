"""Decides which worker accepts the next connection: the worker with the fewest connections.

gRPC clients open few connections and keep them for hours, so the worker that accepts a connection serves the
connection's load for hours. All workers watch one listening socket, inherited from the master; the kernel wakes any of
them. Before it accepts, a worker reads the others' connection counts from their stats pages and leaves the connection
to workers that have fewer. This needs no additional process, no lock, and no work for each request.

**Rules.** Let *least* be the smallest number of connections of any other worker that accepts, has room, and has a
recent heartbeat. A heartbeat is recent if this process saw it change less than `FRESH_SECONDS` ago by its own clock,
because another process may have another clock.

1. A worker with at most *least* connections accepts. Workers with equal counts race, and the kernel gives each
   connection to one of them; so the counts of connections opened one after the other never differ by more than one.
2. A worker with more connections tries again after `retry_seconds`. If no worker has accepted for `PATIENCE_SECONDS`,
   the worker that should accept hangs, and its missing heartbeat has not been noticed yet. Then any worker accepts, and
   for `DOUBT_SECONDS` it leaves no connection to the workers that have fewer. A faulty worker may write any value to
   its page: if it wrongly claims to accept, it delays others by `PATIENCE_SECONDS`, once in `DOUBT_SECONDS`.
3. In a storm of connections rule 1 would accept one connection per worker and retry. Once connections have been waiting
   without a break for `STORM_SECONDS`, a worker may hold a sixteenth more than *least*: a storm is accepted at a
   geometric rate. With up to 16 connections per worker, rule 1 remains unchanged.
4. A worker that has waited for `MOST_PATIENCE_SECONDS` without a break accepts, whatever the pages of the other workers
   contain.
5. A full worker leaves connections to workers that have room. If none has room, any worker accepts: the engine then
   closes another connection, or has a few places in reserve (``grpc_h2/aio/admission.py``).

A count may be older than a connection that another worker has just accepted. The count is then too low, and the reader
needs one more retry. A worker knows its own count exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from definition_server.ipc.stats import REFUSALS, Room, Slot
from definition_server.observability.logs import get_logger
from grpc_h2 import Refusal

log = get_logger(__name__)

assert [refusal.name.lower() for refusal in Refusal] == list(REFUSALS)

FRESH_SECONDS = 1.0
"""Seconds for which a heartbeat is recent: the time of four heartbeats."""
PATIENCE_SECONDS = 0.05
MOST_PATIENCE_SECONDS = 1.0
DOUBT_SECONDS = 1.0
STORM_SECONDS = 0.01
_LENIENCE = 16
_RETRY_SECONDS = 0.001
"""Seconds after which a worker tries again. A connection waits for this time if the kernel has not woken the worker
with the fewest connections.
"""
FULL_LOGGED_SECONDS = 10.0
"""Seconds between two log lines about `MAX_CONNECTIONS`, which is reached again and again as clients connect and
disconnect."""
_BREAK_SECONDS = 0.02
"""Seconds between two decisions above which they belong to different storms, because no connection waited in between.
"""


class Balancer:
    """One worker's accept policy (`grpc_h2`), which decides by the counts of all workers on their stats pages."""

    def __init__(self, slot: Slot, *, limit: int = 0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """``slot``: this worker's own page. ``limit``: the most connections to hold, 0 for no limit."""
        self._slot = slot
        self._others: dict[int, Slot] = {}
        self._beats: dict[int, tuple[int, int]] = {}
        """Number of a worker → its last heartbeat, and the time when it was first seen here, in nanoseconds."""
        self._doubted: dict[int, int] = {}
        """Number of a worker → the time until which it is ignored, in nanoseconds."""
        self._limit = limit
        self._clock = clock
        self._connections = self._clients = 0
        self._room = Room.FREE
        self._opened_by_others = 0
        self._decided_at = self._waiting_since = 0
        self._stuck_since: int | None = None
        """The time since which connections wait and no worker accepts; None if this worker accepted the last
        connection."""
        self._refusing_since: int | None = None
        """The time since which this worker has left every connection to others."""
        self._full_logged_at: int | None = None

    def add(self, number: int, page: Slot) -> None:
        """Also leave connections to the worker with this page."""
        self._others[number] = page
        self._beats[number] = page.load()[3], self._clock()

    def remove(self, number: int) -> None:
        """Forget the worker with this number, which has ended."""
        self._others.pop(number, None)
        self._beats.pop(number, None)
        self._doubted.pop(number, None)

    @property
    def connections(self) -> int:
        """The number of connections that this worker holds."""
        return self._connections

    @property
    def full(self) -> bool:
        """Whether no further connection may be held."""
        return 0 < self._limit <= self._connections

    @property
    def retry_seconds(self) -> float:
        """Seconds until `may_accept` is to be called again after a refusal, if the connection still waits then."""
        return _RETRY_SECONDS

    def start(self) -> None:
        """Count this worker among those that accept, from now on."""
        self._slot.start_accepting()

    def stop(self) -> None:
        """Leave connections to the other workers, from now on."""
        self._slot.stop_accepting()

    def note_heartbeats(self) -> None:
        """Read the others' heartbeats. To be called several times in `FRESH_SECONDS`."""
        now = self._clock()
        for number, slot in self._others.items():
            self._beats_since(number, slot.load()[3], now)

    def may_accept(self) -> bool:
        """Whether to accept the waiting connection. To be called once for each connection."""
        now = self._clock()
        least, opened = self._read_others(now)
        if now - self._decided_at > _BREAK_SECONDS * 1e9:
            self._waiting_since = now
            self._refusing_since = None
        if self._stuck_since is None or opened != self._opened_by_others:
            self._stuck_since = now
        self._decided_at, self._opened_by_others = now, opened
        if self._refusing_since is None:
            self._refusing_since = now
        if self.full:
            self._log_full(now)
        if least is None or (self._connections <= least and not self.full):
            return True
        storm = now - self._waiting_since > STORM_SECONDS * 1e9 and not self.full
        if storm and self._connections <= least + least // _LENIENCE:
            return True
        if now - self._stuck_since > PATIENCE_SECONDS * 1e9:
            self._doubt(now)
            return True
        return now - self._refusing_since > MOST_PATIENCE_SECONDS * 1e9

    def opened(self) -> None:
        """Note that a connection was accepted."""
        self._connections += 1
        self._stuck_since = self._refusing_since = None
        self._slot.connected(self._connections, 1)
        self._note_room()

    def closed(self) -> None:
        """Note that a connection has ended."""
        self._connections -= 1
        self._slot.connected(self._connections, 0)
        self._note_room()

    def vouched(self) -> None:
        """Note that a connection has made an authorized call, so it belongs to a client."""
        self._clients += 1
        self._note_room()

    def unvouched(self) -> None:
        """Note that a client's connection has ended."""
        self._clients -= 1
        self._note_room()

    def refused(self, refusal: Refusal) -> None:
        """Note that a connection was refused or closed although its client made no mistake."""
        self._slot.refused(refusal)

    def _note_room(self) -> None:
        room = Room.FREE
        if self.full:
            room = Room.TAKEN if self._clients >= self._limit else Room.FULL
        if room is not self._room:
            self._room = room
            self._slot.set_room(room)

    def _read_others(self, now: int) -> tuple[int | None, int]:
        """The fewest connections of any other accepting worker (None if there is none), and the number of connections
        that all others have accepted so far."""
        least, total = None, 0
        for number, slot in self._others.items():
            accepting, connections, opened, beat = slot.load()
            if self._doubted.get(number, 0) > now:
                continue
            total += opened
            if not self._may_be_waited_for(number, accepting, connections, beat, now):
                continue
            if least is None or connections < least:
                least = connections
        return least, total

    def _may_be_waited_for(self, number: int, accepting: bool, connections: int, beat: int, now: int) -> bool:
        fresh = now - self._beats_since(number, beat, now) <= FRESH_SECONDS * 1e9
        return accepting and fresh and not 0 < self._limit <= connections

    def _beats_since(self, number: int, beat: int, now: int) -> int:
        """The time when the heartbeat ``beat`` of worker ``number`` was first seen here."""
        seen, since = self._beats[number]
        if seen != beat:
            since = now
            self._beats[number] = beat, now
        return since

    def _doubt(self, now: int) -> None:
        """For some time, leave no connection to the workers that have fewer connections but did not accept one."""
        for number, slot in self._others.items():
            accepting, connections, _, beat = slot.load()
            wanted = connections < self._connections
            if wanted and self._may_be_waited_for(number, accepting, connections, beat, now):
                self._doubted[number] = now + int(DOUBT_SECONDS * 1e9)

    def _log_full(self, now: int) -> None:
        if self._full_logged_at is None or now - self._full_logged_at > FULL_LOGGED_SECONDS * 1e9:
            self._full_logged_at = now
            log.warning("MAX_CONNECTIONS is reached", connections=self._connections, clients=self._clients)
