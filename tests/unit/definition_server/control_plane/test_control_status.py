"""The texts in the answers on the control socket."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from tests.support.snapshots import opened

from definition_server.catalog.definition import Unserved
from definition_server.control_plane.control_status import (
    held_message,
    served_message,
    shortfalls,
    status_message,
    version_message,
)
from definition_server.control_plane.history import HistoryEntry
from definition_server.control_plane.sync_state import ChangeCounts, HeldCatalogue, PinState, SyncState
from definition_server.observability.reasons import Reason
from definition_server.observability.status import (
    CatalogStatus,
    DatabaseStatus,
    EventStatus,
    FreshnessStatus,
    RequestStatus,
    RestartStatus,
    ServiceStatus,
    SyncStatus,
    WorkerStatus,
)


@dataclass(frozen=True)
class Held:
    name: str
    reason: str
    since: float
    hash_served: str | None
    hash_refused: str | None


def state(*, pinned: bool = False, missing: bool = False, vain: bool = False, left_out: int = 0) -> SyncState:
    made = SyncState()
    if pinned:
        made.pin = PinState("ab" * 32, until=None, source="command", missing=missing, vain=vain)
    made.findings.unserved[Unserved.CODE_INVALID] = left_out
    return made


@pytest.mark.parametrize(
    ("made", "held", "texts"),
    [
        (state(pinned=True), 0, ["a pin is in effect"]),
        (state(pinned=True, missing=True), 0, ["a pin is in effect, and its version is not known here"]),
        (state(), 2, ["commands held at an earlier version: 2"]),
        (state(left_out=1), 0, ["rows not served: 1"]),
        (
            state(pinned=True, left_out=1),
            2,
            ["a pin is in effect", "commands held at an earlier version: 2", "rows not served: 1"],
        ),
    ],
    ids=["pinned", "pin of an unknown version", "held", "left-out", "all"],
)
def test_a_successful_cycle_explains_why_the_table_is_not_served(made: SyncState, held: int, texts: list[str]) -> None:
    said = shortfalls(made, held)
    assert all(text in said for text in texts)
    assert "definition-server status" in said


def test_a_table_that_is_served_has_no_explanation() -> None:
    assert shortfalls(state(), 0) == ""
    assert shortfalls(state(pinned=True, missing=True, vain=True), 0) == ""


@pytest.mark.parametrize(("served", "refused"), [("ab" * 32, "cd" * 32), (None, None)], ids=["hashes", "no hashes"])
def test_a_held_command_has_its_name_reason_time_and_hashes(served: str | None, refused: str | None) -> None:
    held = Held("if", "code-invalid: unexpected end", 1_800_000_000.25, served, refused)
    message = held_message(held)
    assert (message.name, message.hash_served, message.hash_refused) == ("if", served or "", refused or "")
    assert message.reason == held.reason
    assert message.since.ToNanoseconds() == 1_800_000_000_250_000_000


def at(seconds: float) -> int:
    """Converts ``seconds`` since the epoch to nanoseconds, rounded to whole microseconds."""
    return round(seconds * 1e6) * 1000


def full_status(now: float) -> ServiceStatus:
    """A status of which every field has a value."""
    return ServiceStatus(
        version="1.2.3", started_at=now - 100, ready=True, stopping=False,
        catalog=CatalogStatus(7, "ab" * 32, 3, 1000, now - 50, now - 40),
        sync=SyncStatus(
            {"published": 2, "failed": 1}, "failed", now - 5, now - 9, Reason.DATABASE_UNREACHABLE, 0.125, 9.0, None,
            None,
            4, {"code-invalid": 1, "too-large": 0}, {"duplicate": 2, "other": 0},
        ),
        workers=(
            WorkerStatus(1, 4711, "serving", 7, "ab" * 32, 3, 0.1, 2, False, 17, "free", "full"),
            WorkerStatus(2, None, "down", 0, "", 0, None, 0, False),
        ),
        requests=RequestStatus({}, (), {}, {}), freshness=FreshnessStatus(False, Reason.DATABASE_UNREACHABLE),
        restart=RestartStatus(False, "the disk is full"),
        events=(EventStatus(now - 3, "sync-failed", Reason.DATABASE_UNREACHABLE, None),
                EventStatus(now - 2, "serves-again", None, 4.0)),
        database=DatabaseStatus(("db:5432", "db2:5432"), "avap", "reader", "db2:5432"), engine="compiled",
        keys_last_used={"k1": now - 1, "k2": 0.0}, certificates_expire={"server": now + 1000},
    )  # fmt: skip


def full_sync(now: float) -> SyncState:
    """A state of the sync with an error, a pin and a held catalogue."""
    sync = SyncState(last_error="the text of the error")
    sync.pin = PinState("cd" * 32, until=now + 60, source="command", missing=True)
    sync.held = HeldCatalogue("ef" * 32, Reason.DATABASE_UNREACHABLE, "too many are gone", ("if", "else"), 9, now - 7)
    return sync


def test_every_field_of_the_status_is_in_the_message() -> None:
    now = 1_800_000_000.25
    message = status_message(full_status(now), full_sync(now))
    assert (message.server_version, message.pid, message.ready, message.stopping, message.engine) == (
        "1.2.3", os.getpid(), True, False, "compiled",
    )  # fmt: skip
    served = message.served
    assert (served.version_hash, served.generation, served.definitions) == ("ab" * 32, 7, 3)
    assert (message.fresh, message.freshness_reason) == (False, str(Reason.DATABASE_UNREACHABLE))
    assert (message.safe_to_restart.safe, message.safe_to_restart.reason) == (False, "the disk is full")
    assert [(event.kind, event.text) for event in message.events] == [
        ("sync-failed", str(Reason.DATABASE_UNREACHABLE)), ("serves-again", "after 4 s"),
    ]  # fmt: skip
    database = message.database
    assert (list(database.hosts), database.name, database.role) == (["db:5432", "db2:5432"], "avap", "reader")
    assert database.connected_to == "db2:5432"
    cycles = message.sync
    assert (cycles.last_outcome, cycles.last_error, cycles.last_duration_seconds) == (
        "failed", "the text of the error", 0.125,
    )  # fmt: skip
    assert (dict(cycles.cycles), cycles.source_rows) == ({"published": 2, "failed": 1}, 4)
    assert (dict(cycles.unserved), dict(cycles.suspect)) == ({"code-invalid": 1}, {"duplicate": 2})
    assert (message.pin.version_hash, message.pin.source, message.pin.missing) == ("cd" * 32, "command", True)
    held = message.held_catalogue
    assert (held.version_hash, held.reason, held.definitions, list(held.names)) == (
        "ef" * 32, "too many are gone", 9, ["if", "else"],
    )  # fmt: skip
    worker, down = message.workers
    assert (worker.number, worker.pid, worker.state, worker.version_hash) == (1, 4711, "serving", "ab" * 32)
    assert (worker.generation, worker.connections, worker.restarts, worker.jail) == (7, 17, 2, "full")
    assert (down.number, down.pid, down.state, down.connections, down.jail) == (2, 0, "down", 0, "none")
    times = {
        "started": message.started_at, "created": served.created_at, "attempt": cycles.last_attempt,
        "success": cycles.last_success, "pin": message.pin.until, "held": held.since, "event": message.events[0].time,
        "key": message.keys[0].last_used, "certificate": message.certificates[0].expires,
    }  # fmt: skip
    seconds = {"started": -100, "created": -50, "attempt": -5, "success": -9, "pin": 60, "held": -7, "event": -3,
               "key": -1, "certificate": 1000}  # fmt: skip
    assert {name: time.ToNanoseconds() for name, time in times.items()} == {
        name: at(now + each) for name, each in seconds.items()
    }
    assert [(key.id, key.HasField("last_used")) for key in message.keys] == [("k1", True), ("k2", False)]
    assert message.certificates[0].name == "server"


def test_unknown_values_are_unset_in_the_message() -> None:
    status = ServiceStatus(
        version="1", started_at=1.0, ready=False, stopping=True, catalog=None,
        sync=SyncStatus({}, None, None, None, None, 0.0, None, None, None, 0, {}, {}), workers=(),
        requests=RequestStatus({}, (), {}, {}), freshness=FreshnessStatus(True, None),
        restart=RestartStatus(True, "it is stored"),
    )  # fmt: skip
    message = status_message(status, SyncState())
    set_fields = {field.name for field, _ in message.ListFields()}
    assert not set_fields & {"served", "database", "pin", "held_catalogue", "workers", "keys", "certificates"}
    assert (message.fresh, message.freshness_reason, message.stopping) == (True, "", True)
    assert not message.sync.HasField("last_attempt")


def test_a_version_of_the_history_has_its_known_changes_even_if_they_are_zero() -> None:
    entry = HistoryEntry("ab" * 32, 3, 1_800_000_000.0, 1_800_000_001.5)
    message = version_message(entry, ChangeCounts(1, 2, 3), served=True)
    assert (message.version_hash, message.definitions, message.served) == ("ab" * 32, 3, True)
    assert message.created_at.ToNanoseconds() == at(1_800_000_000.0)
    assert message.published_at.ToNanoseconds() == at(1_800_000_001.5)
    changes = message.changes
    assert (changes.added, changes.removed, changes.changed) == (1, 2, 3)
    assert version_message(entry, ChangeCounts(0, 0, 0), served=False).HasField("changes")
    assert not version_message(entry, None, served=False).HasField("changes")


def test_the_served_catalogue_has_its_hash_generation_count_and_time() -> None:
    message = served_message(opened("if", "else", generation=5))
    assert (message.generation, message.definitions, len(message.version_hash)) == (5, 2, 64)
    assert message.created_at.ToNanoseconds() == at(1_700_000_000.0)
