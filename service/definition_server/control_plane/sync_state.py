"""The result of the sync cycles so far, as logs, status and metrics report it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from definition_server.catalog.validation import Findings
from definition_server.observability.reasons import Reason

MOST_CHANGES = 100


class Outcome(StrEnum):
    """How a cycle ended."""

    UNCHANGED = "unchanged"
    PUBLISHED = "published"
    HELD = "held"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class HeldCatalogue:
    """A catalogue that was read, and whose publication the guard refuses."""

    version_hash: str
    reason: Reason
    text: str
    """The figures and the threshold, for the log and the control socket."""
    names: tuple[str, ...]
    """Up to ten of the commands concerned, for the log and the control socket."""
    definitions: int
    since: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class PinState:
    """The pin that is in effect."""

    version_hash: str
    """The version as the operator gave it: a hash, or the beginning of one."""
    until: float | None
    """Seconds since the epoch; None if the pin is in effect until it is taken away."""
    source: str
    """``command`` or ``policy``."""
    missing: bool = False
    """Whether this server does not know the version. Then another version is served."""
    vain: bool = False
    """Whether the version is missing, and the pin was in effect before anything was served. Then the server follows the
    table although there is a pin.
    """


class ChangeCounts(NamedTuple):
    """The changes by a publication."""

    added: int
    removed: int
    changed: int
    examples: tuple[str, ...] = ()
    """Up to ten commands of each kind (added, removed, changed), each with the prefix ``+ ``, ``- `` or ``~ ``."""
    generation: int = 0
    """Time of the publication, seconds since the epoch."""


@dataclass(slots=True)
class SyncState:
    """The result of the cycles so far; times are seconds since the epoch."""

    cycles: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    last_outcome: Outcome | None = None
    last_attempt: float | None = None
    last_success: float | None = None
    """The time when the table and the served catalogue last agreed."""
    last_error: str | None = None
    """The text, for the log alone."""
    last_reason: Reason | None = None
    last_duration_seconds: float = 0.0
    store_error: str | None = None
    """The text, for the log alone."""
    store_reason: Reason | None = None
    restored_age_seconds: float | None = None
    """Age of the last-known-good snapshot while it is served without a database; None once rows were read."""
    findings: Findings = field(default_factory=Findings)
    held: HeldCatalogue | None = None
    pin: PinState | None = None
    pin_unsaved: bool = False
    """Whether the last pin by command, or its end, is not stored on disk."""
    changes: dict[str, ChangeCounts] = field(default_factory=dict)
    """Version → the changes by its last publication, for the last `MOST_CHANGES` publications since the start."""
    history_entries: int = 0
    """The number of catalogues in the history."""

    def note_changes(self, version_hash: str, counts: ChangeCounts) -> None:
        """Note that ``version_hash`` was published."""
        self.changes.pop(version_hash, None)
        self.changes[version_hash] = counts
        while len(self.changes) > MOST_CHANGES:
            del self.changes[next(iter(self.changes))]
