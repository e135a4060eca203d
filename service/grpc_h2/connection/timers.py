"""The deadlines of a connection: instants, and arithmetic over them. This module reads no clock.

Every instant is in seconds of one monotonic clock. ``now`` is the instant of the call that is being worked on.
"""

from __future__ import annotations

from enum import Enum, auto
from math import inf

from grpc_h2.connection.limits import Limits


class Due(Enum):
    """The deadlines that may have passed."""

    PREFACE = auto()
    """The client has not sent its preface and SETTINGS in time."""
    HEADER_BLOCK = auto()
    """A header block was begun and not finished in time."""
    KEEPALIVE = auto()
    """The peer was silent: a PING is sent to check whether it is alive."""
    DEAD = auto()
    """The PING of KEEPALIVE was not answered."""
    AGE = auto()
    IDLE = auto()
    FINAL_GOAWAY = auto()
    """The PING of a drain was not answered."""
    GRACE = auto()
    """The time that calls of an aged connection had to finish is over."""
    STALLED = auto()
    """The peer does not read the queued output."""


class Timers:
    """The instants of one connection."""

    __slots__ = (
        "_age_at",
        "_block_at",
        "_draining_at",
        "_grace_at",
        "_idle_at",
        "_limits",
        "_opened_at",
        "_progress_at",
        "_read_at",
        "_reading",
        "asked_at",
        "now",
    )

    def __init__(self, limits: Limits, now: float, jitter: float) -> None:
        """``jitter``: from -1 to 1. The connection's age varies by this share of ``Limits.age_jitter``."""
        assert -1 <= jitter <= 1
        self._limits = limits
        self.now = now
        self._opened_at = self._read_at = self._idle_at = self._progress_at = now
        self._block_at = inf
        """Time at which an unfinished header block began."""
        self._reading = True
        """Whether octets of the peer are read when they arrive."""
        self.asked_at = inf
        """Time at which the keepalive PING was sent; infinity if no PING is unanswered."""
        self._age_at = now + limits.max_connection_age * (1 + limits.age_jitter * jitter)
        self._grace_at = inf
        self._draining_at = inf
        """Time at which the first GOAWAY of a drain was sent; infinity before the first GOAWAY and after the second."""

    # -- events ---------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Set the present instant to ``now``."""
        self.now = now

    def read(self, now: float) -> None:
        """Set the present instant to ``now``, at which the peer has sent something."""
        self.now = self._read_at = now
        self.asked_at = inf

    def reading_paused(self) -> None:
        """Nothing that the peer sends is read from now on, so its silence means nothing."""
        self._reading = False

    def reading_resumed(self) -> None:
        """The peer is heard again; a PING that it could not answer so far counts as just sent."""
        self._reading = True
        self._read_at = self.now
        if self.asked_at != inf:
            self.asked_at = self.now

    def answered(self, instant: float) -> None:
        """The fast path has answered calls, the last of them at ``instant``."""
        self.now = self._read_at = self._idle_at = instant
        self.asked_at = inf

    def stream_ended(self) -> None:
        """From now on the connection may be idle."""
        self._idle_at = self.now

    def progressed(self) -> None:
        """The peer has taken output, or output was queued while none was waiting."""
        self._progress_at = self.now

    def block_begun(self) -> None:
        """A header block has begun, and its end has not arrived."""
        self._block_at = self.now

    def block_ended(self) -> None:
        """The header block is whole."""
        self._block_at = inf

    def keepalive_sent(self) -> None:
        """A PING was sent to check whether the peer is alive."""
        self.asked_at = self.now

    def drain_begun(self) -> None:
        """The first GOAWAY has been sent, so the connection's age is no longer checked."""
        self._age_at = inf
        self._draining_at = self.now

    def drain_announced(self) -> None:
        """The last GOAWAY has been sent."""
        self._draining_at = inf

    def grace_begun(self) -> None:
        """The connection has reached its age: calls have ``Limits.age_grace`` to finish."""
        self._grace_at = self.now + self._limits.age_grace

    def idleness_noted(self) -> None:
        """The connection was reported as idle, which happens only once."""
        self._idle_at = inf

    # -- deadlines ------------------------------------------------------------------------------------------------

    def _deadlines(self, *, introduced: bool, idle: bool, unsent: bool) -> tuple[tuple[float, Due], ...]:
        limits = self._limits
        asked_at = self.asked_at if self._reading else inf
        silent = introduced and self._reading and self.asked_at == inf
        return (
            (inf if introduced else self._opened_at + limits.preface_timeout, Due.PREFACE),
            (self._block_at + limits.header_timeout, Due.HEADER_BLOCK),
            (asked_at + limits.keepalive_timeout, Due.DEAD),
            (self._read_at + limits.keepalive_time if silent else inf, Due.KEEPALIVE),
            (self._age_at, Due.AGE),
            (self._idle_at + limits.max_connection_idle if idle else inf, Due.IDLE),
            (self._draining_at + limits.drain_timeout, Due.FINAL_GOAWAY),
            (self._grace_at, Due.GRACE),
            (self._progress_at + limits.stall_timeout if unsent else inf, Due.STALLED),
        )

    def next_deadline(self, *, introduced: bool, idle: bool, unsent: bool) -> float:
        """The first instant at which a deadline passes if no other event occurs; ``inf`` if there is no deadline."""
        return min(instant for instant, _ in self._deadlines(introduced=introduced, idle=idle, unsent=unsent))

    def due(self, *, introduced: bool, idle: bool, unsent: bool) -> list[Due]:
        """The deadlines that have passed."""
        deadlines = self._deadlines(introduced=introduced, idle=idle, unsent=unsent)
        return [what for instant, what in deadlines if instant <= self.now]
