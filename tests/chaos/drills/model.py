"""What a drill is made of: a fault, what is allowed while it lasts, and what came of it."""

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
    """Calls that were under way during a wound (`Stage.wound`)."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a fault may cost."""

    plain: Loss = Loss.NONE
    """Of clients without a retry."""
    retried: Loss = Loss.NONE
    """Of clients with the default retry. Only where one server, alone, has nothing to serve: say why."""
    fresh: bool = True
    """Fresh rows must be served within one cycle after the fault's end."""
    memory: bool = True
    """Memory, descriptors and threads must come back to what they were before the fault."""
    may_go_back: bool = False
    """An older version may be served after a newer one, as the database itself went back."""
    grace_seconds: float = 0.0
    """Added to the time in which fresh rows must come, where the fault's end is not the cure's end. Argue it."""


NOTHING = Allowance()
"""No call fails, rows are fresh within a cycle, memory comes back."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One bad day. ``inject`` is a context: entering begins the fault, leaving ends it.

    It runs in the main thread while the load runs in a process of its own, so it may block. It must leave the stage
    sound whatever happens in between: `run.play` may leave it early.
    """

    id: str
    """Unique among all faults, of ``[a-z0-9-]``."""
    title: str
    """For the table: what befalls whom, in a few words."""
    kind: Kind
    inject: Callable[[Stage], AbstractContextManager[object]]
    allows: Allowance = NOTHING
    harms: bool = True
    """Whether it may hurt others that use the same server or database: asked for before it is played on a real one."""
    felt: Callable[[Stage], object] | None = None
    """Truthy once the fault has taken effect; asked again and again while it lasts. Never so: the drill is invalid."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A call that failed. Instants are seconds of the machine's monotonic clock."""

    method: str
    channel: int
    code: str
    details: str
    sent: float
    ended: float

    def __str__(self) -> str:
        return f"{self.method} on connection {self.channel}: {self.code} ({self.details}) after {self.seconds:.3f} s"

    @property
    def seconds(self) -> float:
        """From sending to the end."""
        return self.ended - self.sent


@dataclass(slots=True)
class SetReport:
    """What became of the calls of one set of clients."""

    offered: int = 0
    answered: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    """Status code → calls."""
    failures: list[Failure] = field(default_factory=list)
    """The first few hundred of them."""
    worst_ms: float = 0.0
    """From the scheduled instant to the answer, so that a stalled generator or server cannot hide."""
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @property
    def lost(self) -> int:
        """Calls that failed."""
        return sum(self.failed.values())


@dataclass(slots=True)
class Sighting:
    """A version as clients saw it. Instants are seconds of the machine's monotonic clock."""

    first: float
    last: float
    answers: int
    everywhere: float | None = None
    """When, for the first time, every connection's last answer was of this version."""


@dataclass(slots=True)
class LoadReport:
    """What the load saw."""

    plain: SetReport = field(default_factory=SetReport)
    retrying: SetReport = field(default_factory=SetReport)
    wrong: list[str] = field(default_factory=list)
    """Answers that are not whole of one version (the first few)."""
    wrong_count: int = 0
    went_back: list[str] = field(default_factory=list)
    """Answers of an older version to calls sent after a newer one was everywhere (the first few)."""
    versions: dict[str, Sighting] = field(default_factory=dict)
    seconds: float = 0.0
    late: int = 0
    """Calls that left a tenth of a second or more after their instant: the generator itself was held up."""
    rate: float = 0.0
    """Calls per second that were to be offered."""

    @property
    def too_late(self) -> bool:
        """Whether so many calls left late that the load was not what it should have been."""
        return self.late > MOST_LATE * self.offered

    @property
    def offered(self) -> int:
        """Calls in all."""
        return self.plain.offered + self.retrying.offered

    @property
    def lost(self) -> int:
        """Failed calls in all."""
        return self.plain.lost + self.retrying.lost

    @property
    def worst_ms(self) -> float:
        """The slower set's."""
        return max(self.plain.worst_ms, self.retrying.worst_ms)


@dataclass(frozen=True, slots=True)
class Usage:
    """What the server's processes hold together."""

    memory_bytes: int
    """Anonymous and shared memory, each page counted once (``Pss_Anon`` + ``Pss_Shmem``). Pages of program files are
    left out: how much of them a process is charged with depends on who else runs the same program."""
    rss_bytes: int
    descriptors: int
    threads: int
    memfds: int
    """Distinct anonymous memory files that are mapped or open: one a snapshot."""
    processes: int


@dataclass(slots=True)
class Outcome:
    """What came of a drill. `judge.judge` says which promises were broken."""

    fault: str
    title: str
    kind: Kind
    transport: str
    database: str
    allows: Allowance
    load: LoadReport = field(default_factory=LoadReport)
    written: list[str] = field(default_factory=list)
    """Versions that were committed to the table; empty where the table is not the drill's own."""
    wounds: list[tuple[float, float]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    """Promises that the fault itself saw broken (`Stage.broken`)."""
    fault_seconds: float = 0.0
    fresh_seconds: float | None = None
    """From the fault's end (and the commit of a new version after it) to the last connection that sees it."""
    fresh_cycles: int | None = None
    """Sync cycles that ended meanwhile."""
    fresh_limit_seconds: float | None = None
    """None: freshness was not to be measured (no table of our own)."""
    before: Usage | None = None
    after: Usage | None = None
    felt: bool = True
    trouble: str | None = None
    """Why the drill could not be played to its end."""

    def to_json(self) -> dict[str, Any]:
        """For a record: `table.to_json`."""
        from tests.chaos.drills.table import to_json

        return to_json(self)
