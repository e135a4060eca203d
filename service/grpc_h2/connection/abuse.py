"""Against clients that ping to keep a connection alive at our cost (gRPC proposal A8)."""

from __future__ import annotations

from grpc_h2.connection.limits import Limits


class PingPolicy:
    """Counts PINGs that come sooner than allowed. Whenever we send HEADERS or DATA, strikes and clock start anew.

    So grpc-go, which sends a PING after every reply to measure the bandwidth-delay product, never strikes.
    """

    __slots__ = ("_last", "_limits", "_strikes")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._last: float | None = None
        self._strikes = 0

    def reset(self) -> None:
        """We have sent HEADERS or DATA."""
        self._last = None
        self._strikes = 0

    def abused(self, now: float, *, idle: bool) -> bool:
        """A PING came. Returns whether it is one too many."""
        limits = self._limits
        least = limits.min_ping_interval_idle if idle else limits.min_ping_interval
        if self._last is not None and now - self._last < least:
            self._strikes += 1
        self._last = now
        return self._strikes > limits.max_ping_strikes
