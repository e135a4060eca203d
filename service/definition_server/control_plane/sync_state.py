"""The result of the sync cycles so far, as logs, status and metrics report it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from definition_server.catalog.validation import Findings
from definition_server.observability.reasons import Reason


class Outcome(StrEnum):
    """How a cycle ended."""

    UNCHANGED = "unchanged"
    PUBLISHED = "published"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(slots=True)
class SyncState:
    """The result of the cycles so far; times are seconds since the epoch."""

    cycles: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    last_outcome: Outcome | None = None
    last_attempt: float | None = None
    last_success: float | None = None
    """When the table and the served catalogue last agreed."""
    last_error: str | None = None
    """The text, for the log alone."""
    last_reason: Reason | None = None
    last_duration_seconds: float = 0.0
    store_error: str | None = None
    """The text, for the log alone."""
    store_reason: Reason | None = None
    restored_age_seconds: float | None = None
    """Age of the last-known-good snapshot where that is served without a database; None once rows were read."""
    findings: Findings = field(default_factory=Findings)
