"""TLS handshakes in progress. A listener allows a limited number at a time for strangers, and the same number for
addresses from which a client has connected before.

A handshake that its peer does not finish holds some 50 kB until `Limits.preface_timeout` ends it. In these ten seconds
an attacker can begin thousands of handshakes. OpenSSL and the transport allocate that memory, so no `Budget` counts it.
An honest handshake takes two round trips. So if `MOST` handshakes are in progress and one more begins, from any
network, the oldest handshake of the network that has most handshakes is ended: a peer with one handshake is not
affected by the many handshakes of another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

MOST: Final = 512
"""The most handshakes of either kind; they hold some 27 MB. A worker completes about a thousand handshakes a second, so
the oldest of `MOST` has had half a second. That is enough even if many clients behind one address connect at once over
a path of 200 ms."""


class Handshakes:
    """The handshakes in progress, by network. This class uses no clock and no event loop."""

    __slots__ = ("_count", "_most", "_networks")

    def __init__(self, most: int = MOST) -> None:
        assert most > 0
        self._most = most
        self._count = 0
        self._networks: dict[str, dict[object, Callable[[], None]]] = {}
        """Network → handshake → the function that ends it, the oldest first."""

    def __len__(self) -> int:
        return self._count

    def begin(self, handshake: object, network: str, give_way: Callable[[], None]) -> None:
        """``handshake`` begins. ``give_way`` is called, at most once, if the handshake has to make room, which may be
        during the `begin` of another handshake. After that call the handshake is no longer counted."""
        if self._count >= self._most:
            self._make_room()
        self._networks.setdefault(network, {})[handshake] = give_way
        self._count += 1

    def end(self, handshake: object, network: str) -> None:
        """The handshake is done, or has failed. No effect if the handshake has made room already."""
        begun = self._networks.get(network)
        if begun is None or begun.pop(handshake, None) is None:
            return
        self._count -= 1
        if not begun:
            del self._networks[network]

    def _make_room(self) -> None:
        network = max(self._networks, key=lambda each: len(self._networks[each]))
        handshake, give_way = next(iter(self._networks[network].items()))
        self.end(handshake, network)
        give_way()
