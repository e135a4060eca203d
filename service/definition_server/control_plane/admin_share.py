"""Limits the CPU time of the admin port's thread that one network may use, with a leaky bucket for each network.

A page costs milliseconds, so one client could keep the thread busy, and keep the interpreter from running the master's
loop. A network that has used more than `BURST_SECONDS` beyond its share waits until its bucket has drained. Other
networks do not wait.
"""

from __future__ import annotations

from collections import OrderedDict

SHARE = 0.25
"""The share of one core that a network may use all the time. Three Prometheus servers that scrape each second, and a
browser, use less.
"""
BURST_SECONDS = 1.0
"""The CPU time that a network may use at once: some hundred pages."""
_NETWORKS = 1024
"""So many networks are remembered, in some 200 octets each. The one that was charged least recently is forgotten first.
"""


class CpuShares:
    """The buckets. This class reads no clock: callers pass ``now``, which is monotonic, in seconds."""

    def __init__(self) -> None:
        self._used: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """Network → CPU seconds in its bucket, and the time of that level. The network that was charged last is at the
        end.
        """

    def charge(self, network: str, cpu_seconds: float, now: float) -> None:
        """Add the CPU ``seconds`` that ``network`` has used."""
        self._used[network] = (self._level(network, now) + cpu_seconds, now)
        self._used.move_to_end(network)
        if len(self._used) > _NETWORKS:
            self._used.popitem(last=False)

    def wait(self, network: str, now: float) -> float:
        """Seconds until ``network`` may use more; 0 if it may use more at once."""
        return max(0.0, (self._level(network, now) - BURST_SECONDS) / SHARE)

    def _level(self, network: str, now: float) -> float:
        used, at = self._used.get(network, (0.0, now))
        return max(0.0, used - SHARE * (now - at))
