"""Finds the connections whose peers read nothing while the server stops, so that they do not hold the stop.

A peer that leaves its answer unread has `Limits.stall_timeout` for that as long as the server serves. A stop has less
time: a rolling update or an operator waits for its end, and should not wait for a peer that is gone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

STALL_SECONDS = 5.0
"""Without a single octet read: longer than a lost packet or a client's pause takes, shorter than a stop's grace."""


class Reader(Protocol):
    """A connection, as `StalledPeers` sees it."""

    @property
    def unread(self) -> int:
        """Octets that the peer has not taken."""


R = TypeVar("R", bound=Reader)


class StalledPeers:
    """The unread octets of each peer, and the instant since which it has not read. No clock of its own."""

    def __init__(self) -> None:
        self._seen: dict[Reader, tuple[int, float]] = {}

    def check(self, connections: Iterable[R], now: float) -> Iterator[R | None]:
        """One step for each of ``connections``: those whose peers have read nothing for `STALL_SECONDS`, None for each
        other one. To be called again and again with all that are left."""
        before, self._seen = self._seen, {}
        for connection in connections:
            unread = connection.unread
            octets, since = before.get(connection, (unread, now))
            if octets != unread:
                since = now
            if unread:
                self._seen[connection] = unread, since
            yield connection if unread and now - since >= STALL_SECONDS else None
