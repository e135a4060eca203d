"""The parts of a drill: a fault, its allowance, and the outcome."""

from __future__ import annotations

import enum
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from tests.chaos.drills.stage import Stage

Kind = Literal["database", "process", "machine", "client"]


MOST_LATE = 0.02


class Loss(enum.Enum):
    """Which calls may fail."""

    NONE = "none"
    IN_FLIGHT = "in flight"
    """Calls that were in flight during a wound (`Stage.wound`), or were sent on a connection that it broke before the
    client noticed that (`judge`).
    """


@dataclass(frozen=True, slots=True)
class Allowance:
    """The damage that a fault may do."""

    plain: Loss = Loss.NONE
    """Calls of clients without a retry that may fail."""
    retried: Loss = Loss.NONE
    """Calls of clients with the default retry that may fail. Only for a single server with nothing to serve; state the
    reason.
    """
    fresh: bool = True
    """Fresh rows must be served within one cycle after the fault's end."""
    memory: bool = True
    """Memory, descriptors and threads must return to their values before the fault."""
    may_go_back: bool = False
    """An older version may be served after a newer one, because the database itself went back."""
    grace_seconds: float = 0.0
    """Added to the time in which fresh rows must be served, if recovery takes time after the fault's end. State the
    reason.
    """


NOTHING = Allowance()
"""No call fails, rows are fresh within a cycle, memory comes back."""


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault. ``inject`` is a context: entering begins the fault, leaving ends it.

    It runs in the main thread while the load runs in a separate process, so it may block. It must leave the stage
    intact in any case, because `run.play` may leave the context early.
    """

    id: str
    """Unique among all faults, of ``[a-z0-9-]``."""
    title: str
    """A short description for the table."""
    kind: Kind
    inject: Callable[[Stage], AbstractContextManager[object]]
    allows: Allowance = NOTHING
    harms: bool = True
    """Whether it may affect other users of the same server or database: on a target it needs a confirmation."""
    first_time_mib: int | None = None
    """The most by which all workers together may grow when the fault is made for the first time. A drill then makes the
    fault once before it begins to judge memory (`run.play`). State the reason. None if the fault is made once.
    """
    felt: Callable[[Stage], object] | None = None
    """True once the fault has had an effect; polled while the fault lasts. If it never is, the drill is invalid."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed. Instants are seconds of the machine's monotonic clock."""

    method: str
    channel: int
    code: str
    details: str
    sent: float
    ended: float
    answered: float
    """Of the calls that were answered on this connection by ``sent``: when the newest was sent; 0 if there was no such
    call.
    """

    def __str__(self) -> str:
        return f"{self.method} on connection {self.channel}: {self.code} ({self.details}) after {self.seconds:.3f} s"

    @property
    def seconds(self) -> float:
        """Seconds from the sending of the call to its end."""
        return self.ended - self.sent


@dataclass(slots=True)
class SetReport:
    """The results of the calls of one set of clients."""

    offered: int = 0
    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    """Status code → calls."""
    failures: list[Failure] = field(default_factory=list)
    """The first few hundred of them."""
    worst_ms: float = 0.0
    """From the scheduled instant to the answer, so that stalls of the generator or server are included."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def lost(self) -> int:
        """Calls that failed."""
        return sum(self.failed.values())


@dataclass(slots=True)
class Sighting:
    """A version that clients saw. Instants are seconds of the machine's monotonic clock."""

    first: float
    last: float
    answers: int
    everywhere: float | None = None
    """When every connection's last answer was first of this version."""


@dataclass(slots=True)
class LoadReport:
    """The observations of the load."""

    plain: SetReport = field(default_factory=SetReport)
    retrying: SetReport = field(default_factory=SetReport)
    wrong: list[str] = field(default_factory=list)
    """Answers that are incomplete or of several versions (the first few)."""
    wrong_count: int = 0
    went_back: list[str] = field(default_factory=list)
    """Answers of an older version to calls sent after all connections had seen a newer one (the first few)."""
    versions: dict[str, Sighting] = field(default_factory=dict)
    seconds: float = 0.0
    late: int = 0
    """Calls that were sent 0.1 s or more after their scheduled instant: the generator itself was delayed."""
    rate: float = 0.0
    """Planned calls per second."""

    @property
    def too_late(self) -> bool:
        """Whether too many calls were sent late for the load to be as planned."""
        return self.late > MOST_LATE * self.offered

    @property
    def offered(self) -> int:
        """Number of calls."""
        return self.plain.offered + self.retrying.offered

    @property
    def lost(self) -> int:
        """Number of failed calls."""
        return self.plain.lost + self.retrying.lost

    @property
    def worst_ms(self) -> float:
        """The slowest answer of both sets."""
        return max(self.plain.worst_ms, self.retrying.worst_ms)


@dataclass(frozen=True, slots=True)
class Usage:
    """The memory, descriptors and other resources of all server processes together."""

    memory_bytes: int
    """Anonymous and shared memory, each page counted once (``Pss_Anon`` + ``Pss_Shmem``). Pages of program files are
    left out: the share that a process is charged depends on which other processes run the same program.
    """
    rss_bytes: int
    descriptors: int
    threads: int
    memfds: int
    """Distinct anonymous memory files that are mapped or open: one per snapshot."""
    processes: int


@dataclass(slots=True)
class Outcome:
    """The outcome of a drill. `judge.judge` determines which promises were broken."""

    fault: str
    title: str
    kind: Kind
    transport: str
    database: str
    allows: Allowance
    load: LoadReport = field(default_factory=LoadReport)
    written: list[str] = field(default_factory=list)
    """Versions that were committed to the table; empty if the drill did not create the table."""
    wounds: list[tuple[float, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Broken promises that the fault itself detected (`Stage.broken`)."""
    fault_seconds: float = 0.0
    fresh_seconds: float | None = None
    """Seconds from the commit of a new version after the fault's end until the last connection sees it."""
    fresh_cycles: int | None = None
    """Sync cycles that ended meanwhile."""
    fresh_limit_seconds: float | None = None
    """None if freshness is not measured, because the drill did not create the table."""
    fresh_server: Usage | None = None
    """Before the first time of a fault that makes the workers larger."""
    first_time_mib: int | None = None
    """Allowed difference between ``fresh_server`` and ``before``."""
    before: Usage | None = None
    after: Usage | None = None
    felt: bool = True
    trouble: str | None = None
    """Why the drill could not be finished."""

    def to_json(self) -> dict[str, Any]:
        """Used in a record: `table.to_json`."""
        from tests.chaos.drills.table import to_json

        return to_json(self)
