"""Which connections a server holds: its limits, and which connection makes room for a new one.

**Theory of operation.** The rights of a connection depend on the trust that its peer has proved (`Trust`). A peer that
has proved its right to be served (by a call with a known key) is a client, and its connection is never closed to make
room. All other peers are strangers. An attacker can open as many connections as a stranger as it likes, so connections
of strangers are closed to make room:

- A peer address holds `Admission.max_per_peer` connections at most. Further ones are refused.
- If the server is full, a new connection takes the place of the stranger that has been idle for the longest time.
- If no stranger has been idle for `_IDLE_SECONDS`, the new connection gets one of the `RESERVE` places above the
  limit: a probe connects, makes its call and leaves. A connection of the reserve whose peer has proved nothing after
  `RESERVE_SECONDS` is closed.
- If the reserve is full too, the stranger that has been idle for the longest time is closed, even if that time is
  short. If no stranger is left, the client that has held a place of the reserve for the longest time is drained: it
  gets a GOAWAY, its calls are finished, and it connects elsewhere or again. So a probe is always accepted.
- A stranger that makes no call which the server admits is drained after `first_call_timeout` seconds, and closed after
  the same time again. An honest client that connected before it had a call connects again for its next call.

All instants are in seconds of the loop's clock.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from enum import IntEnum
from itertools import islice
from math import inf
from typing import Protocol

RESERVE = 64
"""The number of places above the limit. The kubelet, a service mesh and a load balancer each make one probe at a
time."""
RESERVE_SECONDS = 2.0
"""Seconds for which a connection may hold a place of the reserve although its peer has proved nothing. The kubelet's
probes and gRPC clients send their first call with the connection, or a round trip later."""
_IDLE_SECONDS = 1.0
_EXAMINED = 64
"""The number of strangers that are compared to find the stranger that is idle for the longest time. They are the first
of a queue that is roughly in that order. The comparison takes 30 µs."""
_SWEEP_SECONDS = 1.0
_KNOWN_NETWORKS = 4096
"""The number of clients' networks that are remembered. They take some 500 kB."""


class Trust(IntEnum):
    """The trust that the peer of a connection has proved so far."""

    STRANGER = 0
    PROBE = 1
    """The peer has made a call that needs no key and is known to be harmless: a health check."""
    CLIENT = 2
    """The peer has made a call that the server has authorised."""


class Refusal(IntEnum):
    """Why a connection is refused or closed although nothing that it sent is wrong."""

    PEER_LIMIT = 0
    """The peer's address holds too many connections."""
    FULL = 1
    """The server has no room, not even in the reserve."""
    EVICTED = 2
    """The connection was closed to make room for a new one."""
    NO_CALL = 3
    """The connection made no call that the server admits within `first_call_timeout`."""


REASONS = {
    Refusal.PEER_LIMIT: "too many connections from this address",
    Refusal.FULL: "the server holds as many connections as it can",
    Refusal.EVICTED: "the server needs the place of this idle connection",
    Refusal.NO_CALL: "no authorised call in time",
}
"""The text for the peer (in GOAWAY) and for the operator."""


class Held(Protocol):
    """The part of a connection that `Admission` uses."""

    @property
    def trust(self) -> Trust:
        """What the peer has proved so far."""

    @property
    def active_at(self) -> float:
        """The instant at which the peer last sent something; -inf if it has sent nothing."""

    def drain(self) -> None:
        """Finish the calls, and close."""

    def dismiss(self, refusal: Refusal) -> None:
        """Close now, and give the reason to the peer and in the log."""


Informed = Callable[[Refusal], None]


class Admission:
    """The connections of one server, from accept(2) to their end."""

    def __init__(
        self,
        *,
        max_connections: int | None = None,
        max_per_peer: int | None = None,
        first_call_timeout: float = inf,
    ) -> None:
        """The limit; None: there is no limit."""
        self.max_connections = max_connections
        self.max_per_peer = max_per_peer
        self._first_call_timeout = first_call_timeout
        self._peers: dict[Held, str] = {}
        """Connection → address, of all connections that are held."""
        self._per_peer: dict[str, int] = {}
        self._strangers: OrderedDict[Held, float] = OrderedDict()
        """Connections that may be evicted → when they were last active, as far as is known; roughly in that order."""
        self._unproven: OrderedDict[Held, float] = OrderedDict()
        """Connections whose peers have proved nothing → when they are drained; in that order."""
        self._drained: OrderedDict[Held, float] = OrderedDict()
        """Connections that were drained to make room → when they are closed; the earliest first."""
        self._reserve: OrderedDict[Held, None] = OrderedDict()
        """Connections accepted above the limit, the oldest first."""
        self._known: OrderedDict[str, None] = OrderedDict()
        """Networks from which a client has connected; the network with the most recent such connection is last."""
        self._sweep_timer: asyncio.TimerHandle | None = None

    def knows(self, network: str) -> bool:
        """Whether a client has connected from that network (only the latest networks are remembered). A new connection
        from there is set up earlier than others; it has no other rights."""
        return network in self._known

    @property
    def held(self) -> int:
        """The number of connections that are held, unfinished TLS handshakes included."""
        return len(self._peers)

    @property
    def full(self) -> bool:
        """Whether the limit is reached."""
        return self.max_connections is not None and self.held >= self.max_connections

    def admit(self, connection: Held, peer: str, loop: asyncio.AbstractEventLoop) -> Refusal | None:
        """Hold ``connection`` from the address ``peer``, and make room for it; or return why it is refused."""
        peer = network_of(peer)
        count = self._per_peer.get(peer, 0)
        if self.max_per_peer is not None and count >= self.max_per_peer:
            return Refusal.PEER_LIMIT
        now = loop.time()
        if self.full:
            if not self._make_room(now):
                return Refusal.FULL
            if self.full:
                self._reserve[connection] = None
                loop.call_later(RESERVE_SECONDS, self._check_reserved, connection)
        self._per_peer[peer] = count + 1
        self._peers[connection] = peer
        self._strangers[connection] = now
        if self._first_call_timeout < inf:
            self._unproven[connection] = now + self._first_call_timeout
            if self._sweep_timer is None:
                self._sweep_timer = loop.call_later(_SWEEP_SECONDS, self._sweep, loop)
        return None

    def vouched(self, connection: Held) -> None:
        """The connection's trust has risen."""
        self._unproven.pop(connection, None)
        if connection.trust is Trust.CLIENT:
            self._strangers.pop(connection, None)
            network = self._peers.get(connection)
            if network is not None:
                self._known[network] = None
                self._known.move_to_end(network)
                if len(self._known) > _KNOWN_NETWORKS:
                    self._known.popitem(last=False)

    def gone(self, connection: Held) -> bool:
        """The connection has ended, or is going to. Returns whether it was held."""
        peer = self._peers.pop(connection, None)
        if peer is None:
            return False
        count = self._per_peer[peer] - 1
        if count:
            self._per_peer[peer] = count
        else:
            del self._per_peer[peer]
        for each in (self._strangers, self._unproven, self._drained, self._reserve):
            each.pop(connection, None)
        return True

    def stop(self) -> None:
        """Stop the timer, because no more connections are admitted."""
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
            self._sweep_timer = None

    # -- room -----------------------------------------------------------------------------------------------------

    def _make_room(self, now: float) -> bool:
        """Make room for one more connection, in the reserve if necessary. Returns False if there is no room."""
        assert self.max_connections is not None
        if self._evict(now - _IDLE_SECONDS) or self.held < self.max_connections + RESERVE or self._evict(now):
            return True
        oldest = next(iter(self._reserve), None)
        if oldest is not None:
            del self._reserve[oldest]
            oldest.drain()
        return self.held < self.max_connections + 2 * RESERVE

    def _evict(self, before: float) -> bool:
        """Close the stranger that is idle for the longest time, if it has been idle since ``before`` or longer. Returns
        whether a stranger was closed."""
        chosen, chosen_at = None, before
        moved = []
        for connection, known in islice(self._strangers.items(), _EXAMINED):
            active = connection.active_at
            if active > known:
                moved.append((connection, active))
            else:
                active = known
            if active <= chosen_at and (chosen is None or active < chosen_at):
                chosen, chosen_at = connection, active
        for connection, active in moved:
            self._strangers[connection] = active
            self._strangers.move_to_end(connection)
        if chosen is None:
            return False
        self.gone(chosen)
        chosen.dismiss(Refusal.EVICTED)
        return True

    def _check_reserved(self, connection: Held) -> None:
        if connection in self._reserve and self.full and connection.trust is Trust.STRANGER:
            self.gone(connection)
            connection.dismiss(Refusal.NO_CALL)

    # -- strangers that make no call ------------------------------------------------------------------------------

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        """Drain connections whose peers have proved nothing in time, and close connections whose drain took too long, a
        limited number at a time."""
        self._sweep_timer = None
        now, again = loop.time(), _SWEEP_SECONDS
        for waiting, act in ((self._drained, self._close), (self._unproven, self._drain)):
            for _ in range(_EXAMINED):
                first = next(iter(waiting), None)
                if first is None or waiting[first] > now:
                    break
                del waiting[first]
                act(first, now)
            else:
                again = 0.001
        if self._unproven or self._drained:
            self._sweep_timer = loop.call_later(again, self._sweep, loop)

    def _drain(self, connection: Held, now: float) -> None:
        self._drained[connection] = now + self._first_call_timeout
        connection.drain()

    def _close(self, connection: Held, _: float) -> None:
        if connection.trust is Trust.STRANGER:
            self.gone(connection)
            connection.dismiss(Refusal.NO_CALL)


def network_of(host: str) -> str:
    """The network that counts as one peer: an IPv4 address (mapped into IPv6 or not), or the /64 network of an IPv6
    address, because one machine may use every address of such a network."""
    if ":" not in host:
        return host
    if "." in host:
        return host.rpartition(":")[2]
    head, _, tail = host.partition("%")[0].partition("::")
    groups = head.split(":") if head else []
    if tail or "::" in host:
        rest = tail.split(":") if tail else []
        groups += ["0"] * (8 - len(groups) - len(rest)) + rest
    return ":".join(groups[:4])
