"""Finds the connections whose peers read nothing while the server stops, so that they do not delay the stop.

While the server serves, a peer may leave its answer unread for `Limits.stall_timeout`. During a stop the time is
shorter: a rolling update or an operator waits for the end of the stop, and should not wait for a peer that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

STALL_SECONDS = 5.0
"""A peer that reads no octet for so many seconds is stalled. The time is longer than a lost packet or a pause of a
client takes, and shorter than the grace period of a stop."""


class Reader(Protocol):
    """The part of a connection that `StalledPeers` uses."""

    @property
    def unread(self) -> int:
        """Octets that the peer has not taken."""


R = TypeVar("R", bound=Reader)


class StalledPeers:
    """The unread octets of each peer, and the instant since which the peer has not read. This class does not read a
    clock."""

    def __init__(self) -> None:
        self._seen: dict[Reader, tuple[int, float]] = {}

    def check(self, connections: Iterable[R], now: float) -> Iterator[R | None]:
        """Yields, for each of ``connections``, the connection if its peer has read nothing for `STALL_SECONDS`, else
        None. Call it repeatedly with all remaining connections."""
        before, self._seen = self._seen, {}
        for connection in connections:
            unread = connection.unread
            octets, since = before.get(connection, (unread, now))
            if octets != unread:
                since = now
            if unread:
                self._seen[connection] = unread, since
            yield connection if unread and now - since >= STALL_SECONDS else None
