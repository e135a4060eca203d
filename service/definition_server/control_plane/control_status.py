"""The status of the service as messages of ``avap.control.v1``."""

from __future__ import annotations

import os
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.events import duration
from definition_server.control_plane.history import HistoryEntry
from definition_server.control_plane.sync_state import ChangeCounts, SyncState
from definition_server.observability.status import EventStatus, ServiceStatus, WorkerStatus
from definition_server.rpc import avap_control_pb2 as pb


def set_time(field: Timestamp, seconds: float | None) -> None:
    """Set ``field`` to ``seconds`` since the epoch; None leaves it unset."""
    if seconds is not None:
        field.FromNanoseconds(int(seconds * 1e6) * 1000)


def served_message(snapshot: Snapshot) -> pb.Served:
    """The served catalogue, without the times at which the workers received it."""
    message = pb.Served(version_hash=snapshot.version_hash, generation=snapshot.generation, definitions=snapshot.count)
    set_time(message.created_at, snapshot.footer.created_at_ns / 1e9)
    return message


def version_message(entry: HistoryEntry, changes: ChangeCounts | None, *, served: bool) -> pb.Version:
    """An entry of the history, with the changes by its publication if they are known."""
    message = pb.Version(version_hash=entry.version_hash, definitions=entry.definitions, served=served)
    set_time(message.created_at, entry.created_at)
    set_time(message.published_at, entry.published_at)
    if changes is not None:
        message.changes.added, message.changes.removed, message.changes.changed = changes[:3]
        message.changes.SetInParent()
    return message


class HeldCommand(Protocol):
    """A command of which an earlier version is served, because its row is bad."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def reason(self) -> str:
        """The fault of the row."""

    @property
    def since(self) -> float:
        """Seconds since the epoch."""

    @property
    def hash_served(self) -> str | None:
        """Hash of the version that is served."""

    @property
    def hash_refused(self) -> str | None:
        """Hash of the row."""


def held_message(held: HeldCommand) -> pb.HeldCommand:
    """A held command."""
    message = pb.HeldCommand(
        name=held.name,
        reason=str(held.reason),
        hash_served=held.hash_served or "",
        hash_refused=held.hash_refused or "",
    )
    set_time(message.since, held.since)
    return message


def status_message(status: ServiceStatus, sync: SyncState) -> pb.Status:
    """``status`` without history and notices. The texts of errors come from ``sync``; the admin port does not show
    them.
    """
    message = pb.Status(server_version=status.version, pid=os.getpid(), ready=status.ready, stopping=status.stopping)
    message.engine = status.engine
    set_time(message.started_at, status.started_at)
    if status.catalog is not None:
        catalog = status.catalog
        message.served.version_hash = catalog.version_hash
        message.served.generation = catalog.generation
        message.served.definitions = catalog.definitions
        set_time(message.served.created_at, catalog.created_at)
    message.fresh = status.freshness.fresh
    message.freshness_reason = status.freshness.reason or ""
    message.safe_to_restart.safe = status.restart.safe
    message.safe_to_restart.reason = status.restart.reason
    message.events.extend(_event(event) for event in status.events)
    if (database := status.database) is not None:
        message.database.hosts.extend(database.hosts)
        message.database.name, message.database.role = database.name, database.role
        message.database.connected_to = database.connected_to or ""
    _set_sync(message.sync, status, sync)
    _set_wishes(message, sync)
    message.workers.extend(_worker(worker) for worker in status.workers)
    for name, used in status.keys_last_used.items():
        key = message.keys.add(id=name)
        set_time(key.last_used, used or None)
    for name, expires in status.certificates_expire.items():
        set_time(message.certificates.add(name=name).expires, expires)
    return message


def _set_sync(message: pb.SyncState, status: ServiceStatus, state: SyncState) -> None:
    message.last_outcome = status.sync.last_outcome or ""
    message.last_error = state.last_error or ""
    message.last_duration_seconds = status.sync.last_duration_seconds
    set_time(message.last_attempt, status.sync.last_attempt)
    set_time(message.last_success, status.sync.last_success)
    message.cycles.update(status.sync.cycles)
    message.source_rows = status.sync.source_rows
    message.unserved.update({reason: count for reason, count in status.sync.unserved.items() if count})
    message.suspect.update({reason: count for reason, count in status.sync.suspect.items() if count})


def shortfalls(state: SyncState, held_commands: int) -> str:
    """The reasons why the served catalogue differs from the table although a cycle succeeded; empty if the two
    agree.
    """
    parts = []
    if (pin := state.pin) is not None and not pin.vain:
        parts.append("a pin is in effect, and its version is not known here" if pin.missing else "a pin is in effect")
    if held_commands:
        parts.append(f"commands held at an earlier version: {held_commands:,}")
    if left_out := sum(state.findings.unserved.values()):
        parts.append(f"rows not served: {left_out:,}")
    return f"{'; '.join(parts)} (see `definition-server status`)" if parts else ""


def _set_wishes(message: pb.Status, state: SyncState) -> None:
    if (pin := state.pin) is not None:
        message.pin.version_hash, message.pin.source, message.pin.missing = pin.version_hash, pin.source, pin.missing
        set_time(message.pin.until, pin.until)
    if (held := state.held) is not None:
        message.held_catalogue.version_hash = held.version_hash
        message.held_catalogue.reason = held.text
        message.held_catalogue.definitions = held.definitions
        message.held_catalogue.names.extend(held.names)
        set_time(message.held_catalogue.since, held.since)


def _event(event: EventStatus) -> pb.Event:
    lasted = "" if event.after_seconds is None else f"after {duration(event.after_seconds)}"
    text = " ".join(part for part in (str(event.reason or ""), lasted) if part)
    message = pb.Event(kind=event.kind, text=text)
    set_time(message.time, event.at)
    return message


def _worker(worker: WorkerStatus) -> pb.Worker:
    return pb.Worker(
        number=worker.worker,
        pid=worker.pid or 0,
        state=worker.state,
        version_hash=worker.version_hash,
        generation=worker.generation,
        connections=worker.connections or 0,
        restarts=worker.restarts,
        jail=worker.jail,
    )
