"""Judges whether the served catalogue is up to date, and whether a restart would lose anything. The functions read no
clock: time is an argument.

Readiness never depends on freshness: a server with a stale catalogue is better than no server, so no load balancer
should remove it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

INTERVALS = 2.0
"""The catalogue counts as stale when so many intervals have passed since the last successful check."""


class Stale(StrEnum):
    """The reasons why the served catalogue may differ from the table."""

    NOTHING_SERVED = "nothing_served"
    CATALOGUE_HELD = "catalogue_held"
    RESTORED = "restored"
    CHECK_LATE = "check_late"


def staleness(*, serves: bool, held: bool, restored: bool, since_check: float | None, interval: float) -> Stale | None:
    """The reason why the served catalogue counts as stale; None if it is fresh.

    Args:
        serves: Whether there is a catalogue.
        held: Whether the guard holds a catalogue.
        restored: Whether the catalogue came from the disk, and the database has not been read since.
        since_check: Seconds since the end of the last successful check; None if there was none.
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
    """Nothing is on disk, and the table has the served catalogue."""
    NOTHING_SERVED = "nothing_served"
    """Nothing is served that a restart could lose."""
    PIN_NOT_STORED = "pin_not_stored"
    HELD_NOT_STORED = "held_not_stored"
    ROWS_HELD_NOT_STORED = "rows_held_not_stored"
    NO_SOURCE = "no_source"
    """Neither the disk nor the database has the served catalogue."""


@dataclass(frozen=True, slots=True)
class Restart:
    """Whether the server would serve the same catalogue after a restart, and the reason."""

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
    """Whether a server that is restarted now would serve the same catalogue as now.

    Args:
        serves: Whether there is a catalogue.
        stored: Whether the served catalogue is on disk.
        pinned: Whether a pin is effective.
        held: Whether the guard holds a catalogue. Without the stored catalogue, a new process could not compare the
            held catalogue with anything, and would publish it.
        rows_held: Whether the last good version of a command is served in place of its row. A new process could get
            that version only from the disk.
        database_reachable: Whether the last cycle could read the table.
        pin_lost: Whether a pin, or its end, is not stored on disk; or the pinned version is not known here, so that the
            served catalogue stays only until a restart.
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
