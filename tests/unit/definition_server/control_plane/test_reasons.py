"""For any failure, the admin pages name a reason from a fixed list. They show neither the text of the error nor a
secret in this text."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import psycopg
import pytest
from psycopg import errors
from tests.support.fakes import FakeSource, service_status
from tests.support.logs import captured_logs

from definition_server.catalog.builder import CatalogTooLarge
from definition_server.control_plane import status
from definition_server.control_plane.admin import _Pages
from definition_server.control_plane.admin_http import Request
from definition_server.control_plane.postgres import _judge, _reason_of_attempt
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.status import StatusReader
from definition_server.control_plane.store import StoreError
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.worker_stats import FleetStats
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")

SECRET = "hunter2"
TEXT = f"postgresql://reader:{SECRET}@db.internal/avap: connection refused"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SourceError(TEXT, Reason.DATABASE_UNREACHABLE), "database_unreachable"),
        (SourceError(TEXT), "database_error"),
        (OSError(errno.EMFILE, TEXT), "machine_limit"),
        (MemoryError(), "machine_limit"),
        (RuntimeError("can't start new thread"), "machine_limit"),
        (RuntimeError(TEXT), "internal_error"),
        (CatalogTooLarge(TEXT), "catalogue_too_large"),
        (ValueError(TEXT), "internal_error"),
        (KeyError(TEXT), "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
async def test_the_pages_show_the_reason_of_a_failure_and_not_the_text_of_its_error(
    error: Exception, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, publisher = FakeSource(), Publisher()
    synchronizer = Synchronizer(source, publisher)
    source.fail(error)
    with captured_logs() as lines:
        await synchronizer.cycle(lambda _: 1.0)
    synchronizer.state.store_error = TEXT
    synchronizer.state.store_reason = StoreError(TEXT, Reason.DISK_FAILED).reason
    # The workers' counts do not matter here.
    monkeypatch.setattr(status, "_requests", lambda _: service_status().requests)
    stats = FleetStats()
    supervisor = SimpleNamespace(serving=0, counts_connections=True, confines_workers=True, slots=[], stats=stats)
    proof = Proof(synchronizer.state, interval=60.0, stores=True)
    reader = StatusReader(publisher, synchronizer.state, supervisor, proof)
    pages = _Pages(reader.read, lambda: None)
    shown = {path: pages.answer(Request(path, "", {})).body.decode() for path in ("/readyz", "/statusz", "/metrics")}
    synchronizer.close()
    publisher.close()
    assert f"last sync: {reason}\n" in shown["/readyz"]
    sync = json.loads(shown["/statusz"])["sync"]
    assert (sync["last_error"], sync["store_error"]) == (reason, "disk_failed")
    for text in shown.values():
        assert not [word for word in (SECRET, "reader", "db.internal", "connection refused") if word in text]
    (line,) = [line for line in lines if line["event"] == "Sync failed"]
    assert line["reason"] == reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errors.UndefinedTable(TEXT), Reason.TABLE_MISSING),
        (errors.UndefinedColumn(TEXT), Reason.COLUMN_MISSING),
        (errors.InsufficientPrivilege(TEXT), Reason.PERMISSION_DENIED),
        (errors.QueryCanceled(TEXT), Reason.STATEMENT_TIMEOUT),
        (errors.LockNotAvailable(TEXT), Reason.TABLE_LOCKED),
        (errors.AdminShutdown(TEXT), Reason.DATABASE_CONNECTION_LOST),
        (psycopg.OperationalError(TEXT), Reason.DATABASE_CONNECTION_LOST),
        (psycopg.InterfaceError(TEXT), Reason.DATABASE_CONNECTION_LOST),
        (errors.DataCorrupted(TEXT), Reason.DATABASE_ERROR),
        (UnicodeError(TEXT), Reason.DATABASE_ERROR),
        (TimeoutError(TEXT), Reason.DATABASE_TIMEOUT),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_of_the_database_has_its_reason(error: Exception, reason: Reason) -> None:
    assert _judge(error)[0] is reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            psycopg.OperationalError("FATAL:  password authentication failed"),
            Reason.DATABASE_REFUSED_LOGIN,
        ),
        (psycopg.OperationalError("connection refused"), Reason.DATABASE_UNREACHABLE),
        (OSError("Name or service not known"), Reason.DATABASE_UNREACHABLE),
        (TimeoutError(), Reason.DATABASE_TIMEOUT),
    ],
    ids=["refused", "unreachable", "no address", "timeout"],
)
def test_each_failure_to_connect_has_its_reason(error: Exception, reason: Reason) -> None:
    assert _reason_of_attempt(error) is reason
