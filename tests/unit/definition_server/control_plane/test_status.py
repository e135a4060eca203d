"""The status is assembled from the real publisher and stats page, with stand-ins for the supervisor's workers."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import pytest
from tests.support.snapshots import published

from definition_server import __version__
from definition_server.catalog.definition import Unserved
from definition_server.catalog.gate import Held
from definition_server.catalog.validation import Suspect
from definition_server.control_plane.history import HistoryEntry
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.schedule import CrashLoop
from definition_server.control_plane.status import StatusReader
from definition_server.control_plane.sync_state import ChangeCounts, HeldCatalogue, Outcome, SyncState
from definition_server.control_plane.worker_stats import FleetStats, WorkerStats
from definition_server.ipc.stats import METHODS, STATUSES, Slot, map_own
from definition_server.observability.reasons import Reason
from definition_server.observability.status_page import status_page

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@dataclass
class StandInWorker:
    """The attributes of a `WorkerProcess` that the status reads."""

    stats: WorkerStats
    pid: int = 4711
    generation: int = 0
    jail: str = "none"
    draining: bool = False
    ready: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class StandInSupervisor:
    """The attributes of a `Supervisor` that the status reads."""

    stats: FleetStats = field(default_factory=FleetStats)
    serving: int = 0
    counts_connections: bool = True
    confines_workers: bool = True
    slots: list[SimpleNamespace] = field(default_factory=list)
    opened: list[WorkerStats] = field(default_factory=list)

    def page(self) -> tuple[WorkerStats, Slot]:
        """The stats page of a worker with process id 4711, for the master and for the worker."""
        stats = self.stats.open()
        stats.belongs_to(4711)
        self.opened.append(stats)
        return stats, map_own(os.dup(stats.page.descriptor))

    def close(self) -> None:
        for stats in self.opened:
            self.stats.retire(stats)

    def add(self, worker: StandInWorker | None, *, restarts: int = 0, looping: bool = False) -> None:
        crash_loop = CrashLoop(1, 30.0)
        if looping:
            crash_loop.ended(0.1)
        self.slots.append(
            SimpleNamespace(number=len(self.slots), worker=worker, restarts=restarts, crash_loop=crash_loop)
        )


@pytest.fixture
def state() -> SyncState:
    return SyncState()


@pytest.fixture
def supervisor() -> Iterator[StandInSupervisor]:
    supervisor = StandInSupervisor()
    yield supervisor
    supervisor.close()


@pytest.fixture
def reader(publisher: Publisher, state: SyncState, supervisor: StandInSupervisor) -> StatusReader:
    return StatusReader(publisher, state, supervisor, Proof(state, interval=60.0, stores=True))


# -- ready -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serving", "stopping", "ready"), [(0, False, False), (1, False, True), (2, False, True), (2, True, False)]
)
def test_the_service_is_ready_if_a_worker_serves_and_it_does_not_stop(
    reader: StatusReader, supervisor: StandInSupervisor, serving: int, stopping: bool, ready: bool
) -> None:
    supervisor.serving, reader.stopping = serving, stopping
    assert (reader.read().ready, reader.read().stopping) == (ready, stopping)


# -- the catalogue ---------------------------------------------------------------------------------------------------


def test_before_the_first_publication_there_is_no_catalogue(reader: StatusReader) -> None:
    assert reader.read().catalog is None


def test_the_catalogue_is_the_current_publication(reader: StatusReader, publisher: Publisher) -> None:
    publisher.publish(published("if", generation=6))
    publisher.publish(published("if", "else", generation=7, created_at=1_700_000_123.5))
    assert publisher.current is not None
    snapshot = publisher.current.snapshot
    catalog = reader.read().catalog
    assert catalog is not None
    assert (catalog.generation, catalog.definitions, catalog.created_at) == (7, 2, 1_700_000_123.5)
    assert (catalog.version_hash, catalog.bytes) == (snapshot.version_hash, len(snapshot.buffer))


def test_the_status_of_the_catalogue_shows_since_when_it_is_served(reader: StatusReader, publisher: Publisher) -> None:
    before = time.time()
    publisher.publish(published("if", created_at=1_700_000_123.5))
    catalog = reader.read().catalog
    assert catalog is not None
    assert catalog.published_at is not None
    assert before <= catalog.published_at <= time.time()


def test_the_last_publications_come_first_each_with_its_changes(
    reader: StatusReader, publisher: Publisher, state: SyncState
) -> None:
    for generation, names in enumerate((("if",), ("if", "else"), ("if",)), start=1):
        publisher.publish(published(*names, generation=generation))
    first, second, again = reversed(publisher.recent)
    state.note_changes(second.version_hash, ChangeCounts(1, 0, 0, ("+ else",), 2))
    state.note_changes(first.version_hash, ChangeCounts(1, 0, 0, ("+ if",), 1))
    told = reader.read().publications
    assert [each.version_hash for each in told] == [again.version_hash, second.version_hash, first.version_hash]
    assert [(each.added, each.examples) for each in told] == [(None, ()), (1, ("+ else",)), (1, ("+ if",))]


def test_the_same_catalogue_signed_again_is_not_listed_as_a_publication(publisher: Publisher) -> None:
    for generation in (1, 2):
        publisher.publish(published("if", generation=generation))
    assert [each.generation for each in publisher.recent] == [1]


def test_publications_before_the_start_come_from_the_history(
    publisher: Publisher, state: SyncState, supervisor: StandInSupervisor
) -> None:
    publisher.publish(published("if"))
    served = publisher.recent[0].version_hash
    history = [HistoryEntry(served, 1, 1.0, 3.0), HistoryEntry("cd" * 32, 5, 1.0, 2.0)]
    history.append(HistoryEntry("ef" * 32, 6, 1.0, time.time() + 60))  # of this run, and forgotten by the publisher
    proof = Proof(state, interval=60.0, stores=True)
    reader = StatusReader(publisher, state, supervisor, proof, history=lambda: history)
    told = reader.read().publications
    assert [(each.version_hash, each.definitions, each.added) for each in told] == [
        (served, 1, None),
        ("cd" * 32, 5, None),
    ]


def test_names_and_lists_of_the_status_are_cut(
    publisher: Publisher, state: SyncState, supervisor: StandInSupervisor
) -> None:
    held = [Held("n" * 1000, Unserved.CODE_INVALID, 1.0, "", "")] * 100
    state.held = HeldCatalogue("cd" * 32, Reason.TABLE_EMPTY, "", ("n" * 1000,), 0, 1.0)
    publisher.publish(published("if"))
    state.note_changes(publisher.recent[0].version_hash, ChangeCounts(1, 0, 0, ("+ " + "n" * 1000,), 1))
    proof = Proof(state, interval=60.0, stores=True)
    reader = StatusReader(publisher, state, supervisor, proof, held_commands=lambda: held)
    told = reader.read()
    assert len(told.held_commands) == 20
    for name in (told.held_commands[0].name, told.sync.held_names[0], told.publications[0].examples[0]):
        assert len(name) == 64
        assert name.endswith("n…")


# -- the sync cycles -------------------------------------------------------------------------------------------------


def test_before_the_first_cycle_every_value_is_present_at_zero(reader: StatusReader) -> None:
    sync = reader.read().sync
    assert sync.cycles == {"unchanged": 0, "published": 0, "held": 0, "failed": 0}
    assert (sync.last_outcome, sync.last_attempt, sync.last_success, sync.age_seconds) == (None, None, None, None)
    assert sync.unserved == {reason.value: 0 for reason in Unserved}
    assert sync.suspect == {reason.value: 0 for reason in Suspect}


def test_the_sync_status_is_the_state_of_the_cycles(reader: StatusReader, state: SyncState) -> None:
    state.cycles[Outcome.FAILED] = 3
    state.last_outcome, state.last_error, state.store_error = Outcome.FAILED, "down", "disk full"
    state.last_reason, state.store_reason = Reason.DATABASE_TIMEOUT, Reason.DISK_FAILED
    state.last_attempt, state.last_duration_seconds, state.restored_age_seconds = 123.0, 0.5, 90.0
    state.findings.source_rows = 10
    state.findings.unserved[Unserved.DUPLICATE] = 2
    state.findings.suspect[Suspect.INTERFACE_NOT_JSON_ARRAY] = 1
    sync = reader.read().sync
    assert (sync.cycles["failed"], sync.last_outcome, sync.last_error) == (3, "failed", "database_timeout")
    assert (sync.store_error, sync.restored_age_seconds) == ("disk_failed", 90.0)
    assert (sync.last_attempt, sync.last_duration_seconds, sync.source_rows) == (123.0, 0.5, 10)
    assert (sync.unserved["duplicate"], sync.unserved["null_name"]) == (2, 0)
    assert sync.suspect["interface_not_json_array"] == 1


def test_the_age_counts_from_the_last_success_and_is_never_negative(reader: StatusReader, state: SyncState) -> None:
    state.last_success = time.time() - 90
    assert 90 <= reader.read().sync.age_seconds <= 120
    state.last_success = time.time() + 3600  # the clock was set back
    assert reader.read().sync.age_seconds == 0


# -- the workers -----------------------------------------------------------------------------------------------------


async def test_a_workers_state_is_reported(reader: StatusReader, supervisor: StandInSupervisor) -> None:
    workers = [StandInWorker(supervisor.page()[0]) for _ in range(4)]
    _, waiting, serving, draining = workers
    for worker in (waiting, serving, draining):
        worker.ready.set()
    serving.generation = draining.generation = 3
    draining.draining = True
    for worker in (*workers, None):
        supervisor.add(worker)
    told = reader.read().workers
    assert [worker.state for worker in told] == ["starting", "waiting", "serving", "draining", "down"]
    assert [worker.worker for worker in told] == [0, 1, 2, 3, 4]


def test_a_workers_status_holds_the_values_of_its_stats_slot(
    reader: StatusReader, supervisor: StandInSupervisor
) -> None:
    stats, slot = supervisor.page()
    slot.start(4711, time.monotonic_ns())
    slot.serve(7, 2, bytes(range(32)))
    supervisor.add(StandInWorker(stats), restarts=5, looping=True)
    (worker,) = reader.read().workers
    assert (worker.pid, worker.generation, worker.definitions) == (4711, 7, 2)
    assert worker.version_hash == bytes(range(32)).hex()
    assert worker.heartbeat_age_seconds == pytest.approx(30, abs=30)
    assert (worker.restarts, worker.crash_loop) == (5, True)


@pytest.mark.parametrize("counts", [True, False])
def test_connections_are_reported_if_the_transport_counts_them(
    reader: StatusReader, supervisor: StandInSupervisor, counts: bool
) -> None:
    supervisor.counts_connections = counts
    stats, slot = supervisor.page()
    slot.start(4711, time.monotonic_ns())
    slot.connected(3, 7)
    supervisor.add(StandInWorker(stats))
    (worker,) = reader.read().workers
    assert worker.connections == (3 if counts else None)
    assert (worker.room is None) is not counts


def test_a_slot_without_a_worker_reports_restarts_and_crash_loop(
    reader: StatusReader, supervisor: StandInSupervisor
) -> None:
    supervisor.add(None, restarts=5, looping=True)
    (worker,) = reader.read().workers
    assert (worker.pid, worker.generation, worker.version_hash, worker.definitions) == (None, 0, "", 0)
    assert worker.heartbeat_age_seconds is None
    assert (worker.restarts, worker.crash_loop) == (5, True)


# -- the requests ----------------------------------------------------------------------------------------------------


def test_the_requests_of_all_workers_are_counted_even_of_those_that_have_ended(
    reader: StatusReader, supervisor: StandInSupervisor
) -> None:
    pages = [supervisor.page() for _ in range(3)]
    supervisor.add(StandInWorker(pages[0][0]))
    first, second, ended = (slot for _, slot in pages)
    ok, missing = STATUSES.index("200"), STATUSES.index("404")
    first.count(METHODS.index("GetCommand"), ok, 60_000)
    ended.count(METHODS.index("GetCommand"), ok, 60_000)
    ended.count(METHODS.index("GetCommand"), missing, 2_000_000_000)
    second.count(METHODS.index("SyncCatalog"), ok, 10_000)
    supervisor.stats.retire(pages[2][0])
    requests = reader.read().requests
    assert requests.by_status == {"200": 3, "400": 0, "401": 0, "404": 1, "500": 0, "503": 0}
    buckets = requests.latency["GetCommand"]
    assert len(buckets) == len(requests.bounds_seconds) + 1
    assert (sum(buckets), buckets[1], buckets[-1]) == (3, 2, 1)
    assert sum(requests.latency["SyncCatalog"]) == 1
    assert requests.latency_sum_seconds == {
        "GetCommand": pytest.approx(2.00012),
        "SyncCatalog": pytest.approx(0.00001),
    }


# -- the whole -------------------------------------------------------------------------------------------------------


def test_version_and_start_time_are_reported(reader: StatusReader) -> None:
    first, second = reader.read(), reader.read()
    assert first.version == __version__
    assert 0 <= time.time() - first.started_at < 60
    assert first.started_at == second.started_at


@pytest.mark.parametrize(
    ("octets", "shown"), [(b"plain", "plain"), ("m\u00fcnchen".encode(), "m\u00fcnchen"), (b"m\xfcnchen", "m?nchen")]
)
def test_a_host_name_of_any_octets_is_shown(
    publisher: Publisher,
    state: SyncState,
    supervisor: StandInSupervisor,
    monkeypatch: pytest.MonkeyPatch,
    octets: bytes,
    shown: str,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: os.fsdecode(octets))
    proof = Proof(state, interval=60.0, stores=True)
    reader = StatusReader(publisher, state, supervisor, proof)
    assert reader.read().hostname == shown
    assert shown.encode() in status_page(reader.read(), time.time())


def test_the_status_is_plain_json(
    reader: StatusReader, publisher: Publisher, state: SyncState, supervisor: StandInSupervisor
) -> None:
    publisher.publish(published("if"))
    state.last_outcome = Outcome.HELD
    supervisor.add(StandInWorker(supervisor.page()[0]))
    supervisor.add(None)
    document = json.loads(json.dumps(asdict(reader.read()), allow_nan=False))
    assert document["sync"]["last_outcome"] == "held"
    assert document["catalog"]["definitions"] == 1
