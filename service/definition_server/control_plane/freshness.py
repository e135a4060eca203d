"""Whether what is served is up to date, and whether a restart would lose anything. Pure: time is an argument.

Freshness is apart from readiness. A server that is stale still serves, better than none: no load balancer should take
it away, so readiness never depends on freshness.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

INTERVALS = 2.0
"""Intervals after which the last successful check is too old."""


class Stale(StrEnum):
    """Why the served catalogue may differ from the table."""

    NOTHING_SERVED = "nothing_served"
    CATALOGUE_HELD = "catalogue_held"
    RESTORED = "restored"
    CHECK_LATE = "check_late"


def staleness(*, serves: bool, held: bool, restored: bool, since_check: float | None, interval: float) -> Stale | None:
    """Why the served catalogue counts as stale; None where it is fresh.

    Args:
        serves: Whether there is a catalogue.
        held: Whether the guard holds a catalogue back.
        restored: Whether the catalogue came from the disk, and the database has not been read since.
        since_check: Seconds since the last successful check ended; None where there was none.
        interval: ``SYNC_INTERVAL_SECONDS``.
    """
    if not serves:
        return Stale.NOTHING_SERVED
    if held:
        return Stale.CATALOGUE_HELD
    if restored:
        return Stale.RESTORED
    if since_check is None or since_check > INTERVALS * interval:
        return Stale.CHECK_LATE
    return None


class RestartReason(StrEnum):
    """The facts that decide whether a restart is safe."""

    STORED = "stored"
    """The served, the pinned and the held catalogue are on disk."""
    DATABASE_REACHABLE = "database_reachable"
    """Nothing is on disk, and the table has what is served."""
    NOTHING_SERVED = "nothing_served"
    """There is nothing to lose."""
    PIN_NOT_STORED = "pin_not_stored"
    HELD_NOT_STORED = "held_not_stored"
    ROWS_HELD_NOT_STORED = "rows_held_not_stored"
    NO_SOURCE = "no_source"
    """Neither the disk nor the database has the served catalogue."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Whether the server serves the same after a restart, and why."""

    safe: bool
    reason: RestartReason


def restart_safety(
    *,
    serves: bool,
    stored: bool,
    pinned: bool,
    held: bool,
    rows_held: bool,
    database_reachable: bool,
    pin_lost: bool = False,
) -> Restart:
    """Whether a server that is restarted now would serve what it serves now, and neither another catalogue nor none.

    Args:
        serves: Whether there is a catalogue.
        stored: Whether it is on disk, up to date.
        pinned: Whether a pin counts.
        held: Whether the guard holds a catalogue: without the stored one, a new process would have nothing to compare
            it with, and would publish it.
        rows_held: Whether the last good version of a command is served in place of its row, which a new process would
            know from the disk alone.
        database_reachable: Whether the last cycle could read the table.
        pin_lost: Whether the disk does not know of a pin, or of its end; or a version is pinned that is not known here,
            so that what is served stays until a restart.
    """
    if not serves:
        return Restart(True, RestartReason.NOTHING_SERVED)
    if pin_lost:
        return Restart(False, RestartReason.PIN_NOT_STORED)
    if stored:
        return Restart(True, RestartReason.STORED)
    if pinned:
        return Restart(False, RestartReason.PIN_NOT_STORED)
    if held:
        return Restart(False, RestartReason.HELD_NOT_STORED)
    if not database_reachable:
        return Restart(False, RestartReason.NO_SOURCE)
    if rows_held:
        return Restart(False, RestartReason.ROWS_HELD_NOT_STORED)
    return Restart(True, RestartReason.DATABASE_REACHABLE)
