"""Runs deferred work, mostly of connections, for one time slice in each iteration of the event loop.

**Theory of operation.** A connection does a bounded amount of work when it is read. But an attacker can open as many
connections as it likes: if each of these connections continued in every iteration of the loop, every other connection
would wait for all of them. So a connection that has more to do (input that is not processed yet, or output beyond its
budget) defers that work to this scheduler. Deferred work is done first come, first served, for about `TIME_SLICE`
seconds; then the loop polls its sockets. Connections with deferred work thus share the rest of the core's time.
Connections without deferred work wait for one time slice at most. If the loop was busy with other work in the same
iteration (reads, new connections, timers), the time slice is put off by one iteration, so that its length does not add
to theirs: see `BUSY_LIMIT`.

**Shares.** An attacker without a key can also open as many connections as it likes, and each of them may send as fast
as it can. So deferred work is of four kinds, each with a queue of its own (`Share`), and time slices alternate between
the kinds that wait: every second slice belongs to new connections, and the other slices belong alternately to clients
and strangers. Even if strangers cause much work, a new connection (a probe, a client that reconnects) waits only for
other new connections, and a client only for other clients. A new connection from an address from which a client has
connected before waits for other such connections, and for few other new connections. A new connection does not even
wait for a slice to be set up and to have its first octets processed, unless earlier new connections wait
(`FairScheduler.claim`). Accepting is not deferred at all: it has its own share (`listener`).

**Networks.** Within a share, the networks of the peers take turns (`fair_queue`): an address with one connection does
not wait for all the connections of another.

Work of the server that does not belong to a connection, and would delay calls if it were done at once, is also deferred
here: `FairScheduler.spread` divides it into steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from enum import IntEnum
from time import perf_counter

from grpc_h2.aio.fair_queue import FairQueue

TIME_SLICE = 0.00003
"""Seconds of deferred work in one iteration of the loop. The piece of work during which it ends is not interrupted."""

RETURNING_SLICE = 0.0002
"""Seconds of a time slice for new connections from addresses of clients. Strangers cannot increase the number of such
connections. If strangers' handshakes make each iteration long, one piece of work in an iteration would not be enough
for 40 such connections a second."""

RETURNING_LARGE = 3
"""The most large pieces of work (`grant`) in a time slice of that kind: over TLS, each is a step of a handshake, of up
to 0.5 ms."""

BUSY_LIMIT = 0.00006
"""The limit for the seconds that the loop has spent on other work since the last time slice. Above it, the next time
slice is put off by one iteration, so that the loop polls its sockets first. A time slice is never put off twice in
succession."""

CLAIMS = 4
"""The most first reads of new connections that are processed at once in one iteration of the loop. No read is processed
at once while other new connections wait."""

SETUPS = 1
"""The most steps of setting up new connections that are done at once in one iteration of the loop, while no other new
connection waits. A step takes some 0.1 ms, and 0.5 ms if it belongs to a TLS handshake."""


class Share(IntEnum):
    """The share that a piece of deferred work belongs to."""

    ARRIVALS = 0
    """A new connection: it is set up, and its first octets are processed."""
    CLIENTS = 1
    """A connection whose peer has proved its right to be served, or work of the server itself."""
    STRANGERS = 2
    """A connection whose peer has not proved its right."""
    RETURNING = 3
    """A new connection from an address from which a client has connected before (`Admission.knows`)."""


_OF_NEW_ONES = (Share.RETURNING, Share.ARRIVALS, Share.CLIENTS, Share.STRANGERS)
_ROTA = (
    _OF_NEW_ONES,
    (Share.CLIENTS, Share.STRANGERS, Share.RETURNING, Share.ARRIVALS),
    _OF_NEW_ONES,
    (Share.STRANGERS, Share.CLIENTS, Share.RETURNING, Share.ARRIVALS),
    _OF_NEW_ONES,
    (Share.CLIENTS, Share.STRANGERS, Share.ARRIVALS, Share.RETURNING),
    (Share.ARRIVALS, Share.RETURNING, Share.STRANGERS, Share.CLIENTS),
    (Share.STRANGERS, Share.CLIENTS, Share.ARRIVALS, Share.RETURNING),
)
"""The preferences of successive time slices: a slice is given to the first kind that waits."""


class FairScheduler:
    """The queues of deferred work of one event loop."""

    __slots__ = ("_claims", "_last_slice_end", "_put_off", "_queues", "_scheduled", "_setups", "_slices")

    def __init__(self) -> None:
        self._queues = tuple(FairQueue() for _ in Share)
        self._scheduled = False
        self._last_slice_end = 0.0
        self._put_off = False
        self._slices = 0
        self._claims = self._setups = 0

    def claim(self, loop: asyncio.AbstractEventLoop, share: Share) -> bool:
        """Whether the first octets of a new connection may be processed at once: at most `CLAIMS` times in one
        iteration of the loop, and not while earlier new connections wait. Otherwise the caller defers them."""
        if self._new_ones_wait(share):
            return False
        self._renew_later(loop)
        self._claims += 1
        return self._claims <= CLAIMS

    def claim_setup(self, loop: asyncio.AbstractEventLoop, share: Share) -> bool:
        """Whether a step of setting up a new connection may be done at once. Like `claim`, but at most `SETUPS` times.
        Otherwise the caller defers the step."""
        if self._new_ones_wait(share):
            return False
        self._renew_later(loop)
        self._setups += 1
        return self._setups <= SETUPS

    def _new_ones_wait(self, share: Share) -> bool:
        """Whether new connections wait that have precedence over a connection of ``share``."""
        return bool(self._queues[Share.RETURNING] or (share is not Share.RETURNING and self._queues[Share.ARRIVALS]))

    def _renew_later(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._claims and not self._setups:
            loop.call_soon(self._renew)

    def _renew(self) -> None:
        self._claims = self._setups = 0

    def defer(
        self,
        loop: asyncio.AbstractEventLoop,
        work: Callable[[], object],
        share: Share = Share.CLIENTS,
        network: str = "",
    ) -> None:
        """Call ``work`` once, after the work of ``share`` and ``network`` that is deferred already. The networks of a
        share take turns; the server's own work has the network "".

        If ``work`` returns a true value, the time slice ends: the work that it has begun continues in the next
        iteration of the loop, and no other deferred work may run before then.
        """
        self._queues[share].put(network, work)
        if not self._scheduled:
            self._scheduled = True
            self._last_slice_end = perf_counter()
            loop.call_soon(self._run_slice, loop)

    def grant(self, loop: asyncio.AbstractEventLoop, granted: asyncio.Future[None], share: Share, network: str) -> None:
        """Grant the start of a large piece of work that awaits ``granted``: at once if `claim_setup` allows it,
        otherwise in a time slice, which ends with this work."""
        if self.claim_setup(loop, share):
            granted.set_result(None)
            return

        def work() -> bool:
            if granted.done():  # the task that awaits the future was cancelled
                return False
            granted.set_result(None)
            return True

        self.defer(loop, work, share, network)

    async def spread(self, steps: Iterable[object]) -> None:
        """Do all ``steps``, each a few microseconds of work, over several time slices. Raises the exception of a
        step."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        remaining = iter(steps)

        def work() -> None:
            if done.done():  # the task that awaits the future was cancelled
                return
            end = perf_counter() + TIME_SLICE
            try:
                for _ in remaining:
                    if perf_counter() >= end:
                        self.defer(loop, work)
                        return
            except Exception as error:  # noqa: BLE001 - it is raised where `spread` is awaited
                done.set_exception(error)
            else:
                done.set_result(None)

        self.defer(loop, work)
        await done

    def _run_slice(self, loop: asyncio.AbstractEventLoop) -> None:
        now = perf_counter()
        if now - self._last_slice_end > BUSY_LIMIT and not self._put_off:
            self._put_off = True
            loop.call_soon(self._run_slice, loop)
            return
        self._put_off = False
        self._slices += 1
        share = next(share for share in _ROTA[self._slices % len(_ROTA)] if self._queues[share])
        returning = share is Share.RETURNING
        end, large = (now + RETURNING_SLICE, RETURNING_LARGE) if returning else (now + TIME_SLICE, 1)
        waiting = self._queues[share]
        try:
            # Work that is deferred again meanwhile runs in the next iteration of the loop at the earliest.
            for _ in range(len(waiting)):
                if waiting.take()():
                    large -= 1
                if not large or perf_counter() >= end:
                    break
        finally:
            self._scheduled = any(self._queues)
            if self._scheduled:
                self._last_slice_end = perf_counter()
                loop.call_soon(self._run_slice, loop)
