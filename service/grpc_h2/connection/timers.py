"""When something is due on a connection: pure arithmetic over instants that others note down. No clock in here."""

from __future__ import annotations

from enum import Enum, auto
from math import inf

from grpc_h2.connection.limits import Limits


class Due(Enum):
    """What has become due."""

    PREFACE = auto()
    """The client has not introduced itself."""
    HEADER_BLOCK = auto()
    """A header block was begun and not finished."""
    KEEPALIVE = auto()
    """Silence: ask whether the peer lives."""
    DEAD = auto()
    """It was asked and did not answer."""
    AGE = auto()
    IDLE = auto()
    FINAL_GOAWAY = auto()
    """The PING of a drain was not answered."""
    GRACE = auto()
    """Calls of an aged connection have had their time."""
    STALLED = auto()
    """The peer reads nothing of what is queued."""


class Lifetime:
    """The instants of one connection, in seconds of one monotonic clock."""

    __slots__ = (
        "age_at",
        "asked_at",
        "block_at",
        "draining_at",
        "grace_at",
        "idle_at",
        "introduced",
        "limits",
        "opened_at",
        "progress_at",
        "read_at",
    )

    def __init__(self, limits: Limits, now: float, jitter: float) -> None:
        self.limits = limits
        self.opened_at = self.read_at = self.idle_at = self.progress_at = now
        self.introduced = False
        """The client's preface and first SETTINGS are in."""
        self.block_at = inf
        """Begin of an unfinished header block."""
        self.asked_at = inf
        """When the keepalive PING left that has had no answer."""
        self.age_at = now + limits.max_connection_age * (1 + limits.age_jitter * jitter)
        self.grace_at = inf
        self.draining_at = inf
        """When the first GOAWAY of a drain left, until the second has."""

    def _deadlines(self, *, idle: bool, unsent: bool) -> tuple[tuple[float, Due], ...]:
        limits = self.limits
        introduced = self.introduced
        return (
            (inf if introduced else self.opened_at + limits.preface_timeout, Due.PREFACE),
            (self.block_at + limits.header_timeout, Due.HEADER_BLOCK),
            (self.asked_at + limits.keepalive_timeout, Due.DEAD),
            (self.read_at + limits.keepalive_time if introduced and self.asked_at == inf else inf, Due.KEEPALIVE),
            (self.age_at, Due.AGE),
            (self.idle_at + limits.max_connection_idle if idle else inf, Due.IDLE),
            (self.draining_at + limits.drain_timeout, Due.FINAL_GOAWAY),
            (self.grace_at, Due.GRACE),
            (self.progress_at + limits.stall_timeout if unsent else inf, Due.STALLED),
        )

    def next_deadline(self, *, idle: bool, unsent: bool) -> float:
        """The first instant at which something becomes due if nothing happens; ``inf`` if nothing ever does."""
        return min(instant for instant, _ in self._deadlines(idle=idle, unsent=unsent))

    def due(self, now: float, *, idle: bool, unsent: bool) -> list[Due]:
        """What is due at ``now``."""
        return [what for instant, what in self._deadlines(idle=idle, unsent=unsent) if instant <= now]
