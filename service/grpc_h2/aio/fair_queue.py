"""A queue of work that is taken in turn from the networks that it belongs to.

**Theory of operation.** One peer may have hundreds of connections, each with work that waits. In a plain queue a peer
with one connection waits for all of it. Here each network (`admission.network_of`) has a queue of its own, first come,
first served, and `FairQueue.take` goes round the networks: a piece of work waits for its predecessors of the same
network, and for one piece of each other network per predecessor and itself.

A network that comes new to the queue does not even wait for a whole round: networks that have not been served yet and
those that have take turns. Neither kind can make the other wait for more than every second piece, so an attacker with
many networks does not lock out those that wait already. As in the flow queues of RFC 8290 section 4.2, a network whose
work is done keeps its place in the round until its turn comes, so it does not count as new when it comes back with its
next piece of work.
Where nothing waits any more, all are new again, so what is stored is bounded by the work that waits and one round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Work = Callable[[], object]


class FairQueue:
    """Work that waits, by network. No clock, no loop."""

    __slots__ = ("_new", "_served", "_served_next", "_size", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Work]] = {}
        """Network → its work, for each network that is in one of the two rounds."""
        self._new: deque[str] = deque()
        """Networks that have not been served since they came."""
        self._served: deque[str] = deque()
        """Networks that have been, the one that was served last at the end; some may have no work left."""
        self._served_next = False
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, network: str, work: Work) -> None:
        """``work`` of that network waits from now on."""
        self._size += 1
        waiting = self._waiting.get(network)
        if waiting is None:
            self._waiting[network] = deque((work,))
            self._new.append(network)
        else:
            waiting.append(work)

    def take(self) -> Work:
        """The next piece of work, which waits no longer. Raises IndexError where none waits."""
        if not self._size:
            raise IndexError("nothing waits")
        network = self._next()
        work = self._waiting[network].popleft()
        self._size -= 1
        if self._size:
            self._served.append(network)
        else:
            self._waiting.clear()
            self._new.clear()
            self._served.clear()
        return work

    def _next(self) -> str:
        """Take the network out of its round whose turn it is: one that has work."""
        from_served, self._served_next = self._served_next, not self._served_next
        while self._served and (from_served or not self._new):
            network = self._served.popleft()
            if self._waiting[network]:
                return network
            del self._waiting[network]
        return self._new.popleft()
