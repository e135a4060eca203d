"""Assembles the `ServiceStatus` from the state of the master's parts. Only reads; may be called from any thread."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence

from definition_server import __version__
from definition_server.catalog.definition import Unserved
from definition_server.catalog.gate import Held
from definition_server.catalog.validation import HOLDABLE, Suspect
from definition_server.control_plane.events import EventKind
from definition_server.control_plane.history import HistoryEntry
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.propagation import BOUNDS, Propagation
from definition_server.control_plane.publisher import RECENT, Publisher
from definition_server.control_plane.supervisor import Supervisor, WorkerSlot
from definition_server.control_plane.sync_state import SyncState
from definition_server.control_plane.worker_stats import RequestCounts
from definition_server.ipc.stats import LATENCY_BOUNDS, Room
from definition_server.observability.logs import dropped_lines, waiting_lines
from definition_server.observability.status import (
    CatalogStatus,
    DatabaseStatus,
    EventStatus,
    FreshnessStatus,
    HeldCommandStatus,
    LogStatus,
    PropagationStatus,
    PublicationStatus,
    RequestStatus,
    RestartStatus,
    ServiceStatus,
    SyncStatus,
    WorkerStatus,
)

MOST_HELD_COMMANDS = 20
_NAME_LENGTH = 64


class StatusReader:
    """Reads the status of a running master."""

    def __init__(
        self,
        publisher: Publisher,
        sync: SyncState,
        supervisor: Supervisor,
        proof: Proof,
        *,
        engine: str = "",
        keys: Callable[[], dict[str, float]] = dict,
        certificates: Callable[[], dict[str, float]] = dict,
        control_socket: Callable[[], str] = lambda: "off",
        database: Callable[[], DatabaseStatus | None] = lambda: None,
        held_commands: Callable[[], Sequence[Held]] = tuple,
        history: Callable[[], Sequence[HistoryEntry]] = tuple,
    ) -> None:
        """``engine``: see `ServiceStatus.engine`. ``keys``: see `ServiceStatus.keys_last_used`.
        ``certificates``: see `ServiceStatus.certificates_expire`.
        ``control_socket``: see `ServiceStatus.control_socket`. ``database``: see `ServiceStatus.database`.
        ``held_commands``: the commands of which an earlier version is served. ``history``: the catalogues on disk."""
        self._engine = engine
        self._held_commands = held_commands
        self._history = history
        self._database = database
        self._control_socket = control_socket
        self._keys = keys
        self._certificates = certificates
        self._publisher = publisher
        self._sync = sync
        self._supervisor = supervisor
        self._proof = proof
        self._started_at = time.time()
        # The kernel allows any octets in a host name, but pages and messages are UTF-8: other octets are replaced.
        self._hostname = socket.gethostname().encode(errors="replace").decode()
        self.stopping = False

    def read(self) -> ServiceStatus:
        """The present status."""
        supervisor = self._supervisor
        workers = tuple(
            _worker(slot, supervisor.counts_connections, supervisor.confines_workers) for slot in supervisor.slots
        )
        serving = [worker.room for worker in workers if worker.state == "serving"]
        full = bool(serving) and all(room == Room.TAKEN.name.lower() for room in serving)
        verdict = self._proof.verdict()
        counts = supervisor.stats.requests()
        return ServiceStatus(
            version=__version__,
            hostname=self._hostname,
            engine=self._engine,
            started_at=self._started_at,
            ready=not self.stopping and self._supervisor.serving > 0 and not full,
            control_socket=self._control_socket(),
            full=full,
            stopping=self.stopping,
            catalog=_catalog(self._publisher),
            sync=_sync(self._sync, self._proof),
            publications=self._publications(),
            held_commands=tuple(
                HeldCommandStatus(_cut(held.name), held.reason, held.since)
                for held in self._held_commands()[:MOST_HELD_COMMANDS]
            ),
            workers=workers,
            requests=_requests(counts),
            keys_last_used=self._keys(),
            certificates_expire=self._certificates(),
            database=self._database(),
            freshness=FreshnessStatus(verdict.stale is None, verdict.stale),
            restart=RestartStatus(verdict.restart.safe, verdict.restart.reason),
            propagation=_propagation(self._proof.propagation),
            events=tuple(
                EventStatus(event.at, event.kind, event.reason, event.after_seconds)
                for event in self._proof.events.last()
            ),
            logs=LogStatus(waiting_lines(), dropped_lines() + counts.lines_dropped),
        )

    def _publications(self) -> tuple[PublicationStatus, ...]:
        """The publications since the start, and older publications that the history on disk holds."""
        found = []
        recent = self._publisher.recent
        for published in recent:
            changes = self._sync.changes.get(published.version_hash)
            known = changes if changes is not None and changes.generation == published.generation else None
            found.append(
                PublicationStatus(published.at, published.version_hash, published.definitions)
                if known is None
                else PublicationStatus(
                    published.at, published.version_hash, published.definitions, *known[:3], tuple(map(_cut, known[3]))
                )
            )
        versions = {published.version_hash for published in recent}
        found += [
            PublicationStatus(entry.published_at, entry.version_hash, entry.definitions)
            for entry in self._history()
            if entry.published_at < self._started_at and entry.version_hash not in versions
        ]
        return tuple(found[:RECENT])


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH - 1]}…"


def _catalog(publisher: Publisher) -> CatalogStatus | None:
    publication = publisher.current
    if publication is None:
        return None
    snapshot = publication.snapshot
    return CatalogStatus(
        generation=snapshot.generation,
        version_hash=snapshot.version_hash,
        definitions=snapshot.count,
        bytes=snapshot.size,
        created_at=snapshot.footer.created_at_ns / 1e9,
        published_at=publisher.published_at,
    )


def _propagation(propagation: Propagation) -> PropagationStatus:
    measured = propagation.distribution()
    return PropagationStatus(BOUNDS, measured.counts, measured.sum_seconds, propagation.last_seconds)


def _sync(state: SyncState, proof: Proof) -> SyncStatus:
    findings = state.findings
    failure = proof.events.latest(EventKind.SYNC_FAILED)
    return SyncStatus(
        cycles={outcome.value: count for outcome, count in state.cycles.items()},
        last_outcome=state.last_outcome,
        last_attempt=state.last_attempt,
        last_success=state.last_success,
        last_error=state.last_reason,
        last_duration_seconds=state.last_duration_seconds,
        age_seconds=None if state.last_success is None else max(0.0, time.time() - state.last_success),
        restored_age_seconds=state.restored_age_seconds,
        store_error=state.store_reason,
        held_reason=None if state.held is None else state.held.reason,
        held_since=None if state.held is None else state.held.since,
        held_version=None if state.held is None else state.held.version_hash,
        held_definitions=None if state.held is None else state.held.definitions,
        held_names=() if state.held is None else tuple(map(_cut, state.held.names)),
        pinned=None if state.pin is None else state.pin.source,
        pinned_version=None if state.pin is None else state.pin.version_hash,
        pinned_until=None if state.pin is None else state.pin.until,
        pinned_missing=state.pin is not None and state.pin.missing,
        history_entries=state.history_entries,
        next_attempt=proof.next_attempt,
        last_failure=None if failure is None else failure.at,
        last_failure_reason=None if failure is None else failure.reason,
        store=proof.store,
        source_rows=findings.source_rows,
        unserved={reason.value: findings.unserved[reason] for reason in Unserved},
        suspect={reason.value: findings.suspect[reason] for reason in Suspect},
        rows_held={reason.value: findings.held[reason] for reason in Unserved if reason in HOLDABLE},
        rows_unchecked=findings.unchecked,
    )


def _worker(slot: WorkerSlot, counts_connections: bool, confined: bool) -> WorkerStatus:
    worker = slot.worker
    if worker is None:
        return WorkerStatus(
            slot.number,
            None,
            "down",
            0,
            "",
            0,
            None,
            slot.restarts,
            slot.crash_loop.looping,
            jail="none" if confined else "off",
        )
    reading = worker.stats.read()
    if worker.draining:
        state = "draining"
    elif not worker.ready.is_set():
        state = "starting"
    else:
        state = "serving" if worker.generation else "waiting"
    return WorkerStatus(
        worker=slot.number,
        pid=worker.pid,
        state=state,
        generation=reading.generation,
        version_hash=reading.version_hash,
        definitions=reading.entries,
        heartbeat_age_seconds=worker.stats.heartbeat_age_seconds,
        restarts=slot.restarts,
        crash_loop=slot.crash_loop.looping,
        jail=worker.jail if confined else "off",
        connections=reading.connections if counts_connections else None,
        room=reading.room.name.lower() if counts_connections else None,
    )


def _requests(counts: RequestCounts) -> RequestStatus:
    return RequestStatus(
        refused_connections=counts.refused,
        by_status=counts.requests,
        bounds_seconds=LATENCY_BOUNDS,
        latency=counts.latency,
        latency_sum_seconds=counts.latency_sum_seconds,
    )
