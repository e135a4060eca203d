"""The memory that all connections of a server hold together, and the choice of a connection to end when they hold too
much.

The limits of one connection are modest, but ten thousand connections may reach them together. So each connection
reports to one `Budget` how much it holds for its peer: input, header blocks, bodies, output that waits, streams. When a
connection holds more than before and the sum is beyond the limit, the connection that holds most is ended
(`Share.evict`); it may be another connection. One connection is ended at a time: each further addition ends one more,
until the sum is within the limit. Octets that the transport of an ended connection still holds are included in the sum
until they are released, but the connection is not chosen again: otherwise it would protect all others.

The connection that holds most is found without a walk over all connections: shares are kept in classes by the binary
order of magnitude of their octets, and only members of the highest class are compared, at most `_COMPARED` of them. So
the connection that is ended holds most of all if that class is small, and otherwise at least half as much as the one
that holds most.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Final

_CLASSES: Final = 64
_COMPARED: Final = 256
"""The most shares that are compared, in some 20 µs."""


class Budget:
    """The octets that the connections of one process may hold for their peers. Not thread-safe."""

    __slots__ = ("_classes", "_ended", "evictions", "held", "limit")

    def __init__(self, limit: int) -> None:
        """``limit``: the most octets that all connections may hold together."""
        assert limit > 0
        self.limit = limit
        self.held = 0
        """The sum of the octets of all shares."""
        self.evictions = 0
        """The number of connections that were ended."""
        self._classes: list[dict[Share, None]] = [{} for _ in range(_CLASSES)]
        self._ended: dict[Share, None] = {}
        """Shares of connections that were ended and still hold octets. They belong to no class."""

    def join(self, evict: Callable[[], None]) -> Share:
        """The share of a new connection; ``evict`` ends the connection and reduces its share, before it returns.
        Only octets that its transport holds may remain."""
        return Share(self, evict)

    def moved(self, share: Share, before: int) -> None:
        """``share`` has changed; it held ``before`` octets until now."""
        octets = share.octets
        self.held += octets - before
        old, new = before.bit_length(), octets.bit_length()
        if old != new:
            if share in self._ended:
                if not octets:
                    del self._ended[share]
            else:
                self._classes[old].pop(share, None)
                if octets:
                    self._classes[new][share] = None
        if octets > before and self.held > self.limit:
            self._relieve()

    def _relieve(self) -> None:
        for members in reversed(self._classes):
            if members:
                self.evictions += 1
                share = max(islice(members, _COMPARED), key=_octets)
                del members[share]
                self._ended[share] = None
                share.evict()
                return

    def check_invariants(self) -> None:
        """Assert that the total is the sum of the shares, and that each share is in its class."""
        shares = [share for members in (*self._classes, self._ended) for share in members]
        assert self.held == sum(share.octets for share in shares)
        assert all(share.octets for share in shares)
        for order, members in enumerate(self._classes):
            assert all(share.octets.bit_length() == order for share in members)


class Share:
    """The octets that one connection holds."""

    __slots__ = ("_budget", "_evict", "octets")

    def __init__(self, budget: Budget, evict: Callable[[], None]) -> None:
        self._budget = budget
        self._evict: Callable[[], None] | None = evict
        self.octets = 0

    def hold(self, octets: int) -> None:
        """The connection holds ``octets`` now. This call may end this connection or another one."""
        before, self.octets = self.octets, octets
        self._budget.moved(self, before)

    def evict(self) -> None:
        """End the connection."""
        if self._evict is not None:
            self._evict()

    def leave(self) -> None:
        """The connection is gone."""
        self.hold(0)
        self._evict = None


def _octets(share: Share) -> int:
    return share.octets
