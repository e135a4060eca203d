"""The operator's next steps, derived from the status: a sentence for each fault, and the page with details.

The sentences are fixed texts; numbers and hashes are those of the status. The sentences contain no error texts and no
names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from definition_server.observability.reasons import Reason
from definition_server.observability.status import ServiceStatus

EXPIRES_SOON_SECONDS = 14 * 86_400
"""The limit of the alert `DefinitionServerCertificateExpiresSoon`."""
SHOWN_DIGITS = 16

_ACCESS, _DAMAGED = "runbooks/database-access.md", "runbooks/table-damaged.md"
_UNREACHABLE, _SLOW = "runbooks/database-unreachable.md", "runbooks/database-slow.md"
_DISK, _HELD = "observability.md#c-the-disk", "observability.md#b-a-catalogue-is-held"
_DISK_REMEDY = "See that SNAPSHOT_DIR is on a disk with room that the server may write to."

BY_REASON: dict[Reason, tuple[str, str]] = {
    Reason.DATABASE_URL_UNUSABLE: (
        "DATABASE_URL cannot be used. The log names the fault: correct the URL and send SIGHUP.",
        "observability.md#a-the-table-cannot-be-read",
    ),
    Reason.DATABASE_UNREACHABLE: (
        "No host of the database accepts a connection. Check it and the network.",
        _UNREACHABLE,
    ),
    Reason.DATABASE_TIMEOUT: ("The database does not answer in time. Check its load and the network.", _SLOW),
    Reason.DATABASE_REFUSED_LOGIN: (
        "The database refuses the login. Check user, password, database and connection limit.",
        _ACCESS,
    ),
    Reason.DATABASE_CONNECTION_LOST: (
        "The connection broke while the table was read. Check the database.",
        _UNREACHABLE,
    ),
    Reason.DATABASE_ERROR: (
        "The database reports an error. The log has its text.",
        "observability.md#a-the-table-cannot-be-read",
    ),
    Reason.STATEMENT_TIMEOUT: ("A statement takes too long. Check the database's load, then the timeout.", _SLOW),
    Reason.TABLE_MISSING: ("The table does not exist. Create it, or check the database's name.", _DAMAGED),
    Reason.COLUMN_MISSING: ("The table lacks a column. Restore it.", _DAMAGED),
    Reason.TABLE_LOCKED: ("Another session holds a lock on the table. End it, or wait.", _SLOW),
    Reason.PERMISSION_DENIED: ("The role may not read the table. Grant it SELECT.", _ACCESS),
    Reason.ROWS_HIDDEN: ("Row-level security hides rows from the role. Grant it BYPASSRLS.", _ACCESS),
    Reason.TABLE_EMPTY: ("The table has nothing to serve. Restore it; the served catalogue stays.", _HELD),
    Reason.CATALOGUE_SHRUNK: ("Too many commands would vanish, so a catalogue is held.", _HELD),
    Reason.CATALOGUE_GROWN: ("The catalogue would grow too much, so it is held.", _HELD),
    Reason.CATALOGUE_CHANGED: ("Too many commands would have another content, so the catalogue is held.", _HELD),
    Reason.TOO_MANY_ROWS_HELD: ("Too many rows are bad, so a catalogue is held.", _HELD),
    Reason.CATALOGUE_TOO_LARGE: (
        "The table is larger than MAX_CATALOG_BYTES. Raise it and the memory limit, or remove rows.",
        "observability.md#d-rows",
    ),
    Reason.MACHINE_LIMIT: (
        "The machine has run out of memory, descriptors or another resource.",
        "runbooks/machine-limits.md",
    ),
    Reason.DISK_FAILED: (f"The disk fails. {_DISK_REMEDY}", _DISK),
    Reason.DISK_HANGS: (f"The disk does not answer. {_DISK_REMEDY}", _DISK),
    Reason.SNAPSHOT_UNUSABLE: (
        "The stored snapshot is damaged, or does not belong to this server. The log says which.",
        "runbooks/last-known-good.md",
    ),
    Reason.INTERNAL_ERROR: ("A bug of the server. Keep the log.", "observability.md#h-a-bug"),
}
"""Reason → the next step, and the page of ``docs`` with details."""

assert BY_REASON.keys() == set(Reason)


class Urgency(StrEnum):
    """The urgency of a step."""

    BAD = "bad"
    """Clients fail, or the next restart may make them fail."""
    WARN = "warn"
    """There is a fault, but clients are served."""
    NOTE = "note"
    """An operator requested the state."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step for the operator."""

    urgency: Urgency
    text: str
    """The sentence; commands in it are between backticks."""
    page: str
    """Path below ``docs``, with an anchor if it has one."""


def next_steps(status: ServiceStatus, now: float) -> list[Step]:
    """The next steps, the most urgent first; empty if no step is needed. ``now``: seconds since the epoch."""
    steps = [*_serving(status), *_reading(status), *_wishes(status), *_rows(status), *_machine(status, now)]
    order = list(Urgency)
    return sorted(steps, key=lambda step: order.index(step.urgency))


def _serving(status: ServiceStatus) -> Iterator[Step]:
    if status.stopping:
        yield Step(Urgency.NOTE, "The server shuts down.", "runbooks/server-down.md")
    elif status.catalog is None:
        yield Step(Urgency.BAD, "No catalogue is served yet.", "runbooks/server-down.md")
    elif status.full:
        text = "Every worker holds MAX_CONNECTIONS clients. Add workers or replicas, or raise the limit."
        yield Step(Urgency.BAD, text, "runbooks/machine-limits.md")
    elif not status.ready:
        yield Step(Urgency.BAD, "No worker serves the catalogue.", "runbooks/workers.md")
    if not status.restart.safe:
        text = "Do not restart this server: the new process would not serve the same."
        yield Step(Urgency.WARN, text, "observability.md#safe-to-restart")


def _reading(status: ServiceStatus) -> Iterator[Step]:
    sync = status.sync
    held = sync.held_version
    # While nothing is served, a fault in reading the table also keeps clients from being served.
    urgency = Urgency.BAD if status.catalog is None else Urgency.WARN
    # After a catalogue was held, later cycles may fail for another reason, which must then be mended first.
    if sync.last_error is not None and (held is None or sync.last_error is not sync.held_reason):
        yield Step(urgency, *BY_REASON[sync.last_error])
    elif held is None and status.freshness.reason in ("check_late", "restored"):
        yield Step(Urgency.WARN, "The served catalogue may be out of date.", "runbooks/stale.md")
    if held is not None:
        why = "A catalogue is held." if sync.held_reason is None else BY_REASON[sync.held_reason][0]
        served = "" if status.catalog is None else f"{status.catalog.version_hash[:SHOWN_DIGITS]} "
        see = f" See it: `definition-server diff {served}{held[:SHOWN_DIGITS]}`." if served else ""
        accept = f"`definition-server accept {held[:SHOWN_DIGITS]}`"
        yield Step(urgency, f"{why}{see} An accident: mend the table. Intended: {accept}.", _HELD)
    if sync.store_error is not None and sync.store_error is not sync.last_error:
        yield Step(Urgency.WARN, *BY_REASON[sync.store_error])


def _wishes(status: ServiceStatus) -> Iterator[Step]:
    sync = status.sync
    if sync.pinned is not None and sync.pinned_missing:
        text = "The pinned version is not known here, so another one is served. Take the pin away, or pin another."
        yield Step(Urgency.WARN, text, "runbooks/pinned.md")
    elif sync.pinned is not None:
        end = (
            "`definition-server unpin`" if sync.pinned == "command" else "take it out of the file of PUBLICATION_POLICY"
        )
        yield Step(Urgency.NOTE, f"A pin is in effect: changes are not served. To end it: {end}.", "runbooks/pinned.md")


def _rows(status: ServiceStatus) -> Iterator[Step]:
    held, left_out = sum(status.sync.rows_held.values()), sum(status.sync.unserved.values())
    if held:
        text = f"Commands held at their last good version: {held:,}. Correct their rows; the next cycle serves them."
        yield Step(Urgency.WARN, text, _DAMAGED)
    if left_out:
        text = f"Rows not served: {left_out:,}. `definition-server validate` lists them."
        yield Step(Urgency.WARN, text, "observability.md#d-rows")


def _machine(status: ServiceStatus, now: float) -> Iterator[Step]:
    if any(worker.crash_loop for worker in status.workers):
        yield Step(Urgency.BAD, "A worker ends again and again. The log says how it ended.", "runbooks/workers.md")
    elif any(worker.state == "down" for worker in status.workers):
        yield Step(Urgency.WARN, "A worker is down. The master starts another.", "runbooks/workers.md")
    for name, expires in status.certificates_expire.items():
        which, remedy = f"The certificate of `{name}`", "Replace it and send SIGHUP."
        if expires <= now:
            yield Step(Urgency.BAD, f"{which} has expired. {remedy}", "runbooks/certificates.md")
        elif expires < now + EXPIRES_SOON_SECONDS:
            yield Step(Urgency.WARN, f"{which} expires soon. {remedy}", "runbooks/certificates.md")
    if status.sync.store == "off" and status.catalog is not None:
        text = "Nothing is kept on disk: SNAPSHOT_DIR is not set. A restart without the database serves nothing."
        yield Step(Urgency.NOTE, text, "runbooks/last-known-good.md")
