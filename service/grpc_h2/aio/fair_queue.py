"""A queue of work in which networks take turns.

**Theory of operation.** One peer may have hundreds of connections, each with work that waits. In a plain queue, a peer
with one connection waits for all of that work. Here each network (`admission.network_of`) has a queue of its own, first
come, first served, and `FairQueue.take` takes one piece from each network in turn. So a piece of work with n earlier
pieces of its own network waits for these n pieces, and for at most n + 1 pieces of each other network.

A network that is new in the queue does not wait for a whole round: new networks (not served yet) alternate with
networks that have been served. Each of the two kinds gets every second piece, so an attacker with many networks does
not lock out the networks that wait already. As in the flow queues of RFC 8290 section 4.2, a network whose work is done
keeps its place in the round until its turn, so the network does not count as new when its next piece of work arrives.
Once nothing waits any more, all networks count as new again. So the memory is bounded by the work that waits and one
round.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

Work = Callable[[], object]


class FairQueue:
    """The work that waits, by network. This class uses no clock and no event loop."""

    __slots__ = ("_new", "_served", "_served_next", "_size", "_waiting")

    def __init__(self) -> None:
        self._waiting: dict[str, deque[Work]] = {}
        """Network → its work, for each network that is in one of the two rounds."""
        self._new: deque[str] = deque()
        """Networks that have not been served since their first work arrived."""
        self._served: deque[str] = deque()
        """Networks that have been served; the network that was served last is at the end. Some may have no work
        left."""
        self._served_next = False
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, network: str, work: Work) -> None:
        """Add ``work`` of ``network``, which waits from now on."""
        self._size += 1
        waiting = self._waiting.get(network)
        if waiting is None:
            self._waiting[network] = deque((work,))
            self._new.append(network)
        else:
            waiting.append(work)

    def take(self) -> Work:
        """Remove and return the next piece of work. Raises IndexError if no work waits."""
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
        """Remove from its round the network whose turn it is, passing over networks without work."""
        from_served, self._served_next = self._served_next, not self._served_next
        while self._served and (from_served or not self._new):
            network = self._served.popleft()
            if self._waiting[network]:
                return network
            del self._waiting[network]
        return self._new.popleft()
