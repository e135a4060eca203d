"""Faults of the database and of the network between it and the server. No call may fail during any of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress

import psycopg
from tests.chaos.drills.model import NOTHING, Allowance, Fault
from tests.chaos.drills.rows import TABLE
from tests.chaos.drills.stage import Stage
from tests.chaos.drills.standby import standby_behind
from tests.support.polling import until
from tests.support.providers import ContainerServer, EmbeddedServer

Inject = Callable[[Stage], AbstractContextManager[None]]

FAILED, REFUSED = "Sync failed", "Catalogue held"
RESTARTS = 4
SLOW_BYTES_PER_SECOND = 10_000.0
_MID_READ_BYTES_PER_SECOND = 1_000_000.0
_CANCELLATIONS = 100


def tells(message: str, *needles: str, times: int = 2) -> Callable[[Stage], bool]:
    """Whether the fault had an effect: the server has logged the message at least ``times`` times, with one of
    ``needles`` in the error, or it has died or fails calls.
    """

    def felt(stage: Stage) -> bool:
        assert stage.load is not None
        return stage.logged(message, *needles) >= times or stage.gone or stage.load.failed > 0

    return felt


# -- the server process of the database ------------------------------------------------------------------------


@contextmanager
def killed(stage: Stage) -> Iterator[None]:
    """All processes of PostgreSQL are killed together."""
    assert stage.database is not None
    stage.database.stop_hard()
    try:
        yield
    finally:
        stage.database.start_again()


@contextmanager
def stopped(stage: Stage) -> Iterator[None]:
    """PostgreSQL is shut down in order, as for maintenance."""
    assert stage.database is not None
    stage.database.stop_in_order()
    try:
        yield
    finally:
        stage.database.start_again()


@contextmanager
def paused(stage: Stage) -> Iterator[None]:
    """PostgreSQL hangs: every connection stays open, none is answered."""
    assert stage.database is not None
    stage.database.pause()
    try:
        yield
    finally:
        stage.database.resume()


@contextmanager
def restarting(stage: Stage) -> Iterator[None]:
    """PostgreSQL is killed and started again every second."""
    assert stage.database is not None
    for number in range(RESTARTS):
        began = time.monotonic()
        stage.database.stop_hard()
        # PostgreSQL stays down until the server has noticed it once, because a restart within 0.1 s may fall between
        # two change checks.
        until(lambda number=number: stage.logged(FAILED) > number, "the server notices", seconds=10)
        stage.database.start_again()
        assert stage.load is not None
        stage.load.keep(max(0.1, 1 - (time.monotonic() - began)))
    yield


@contextmanager
def standby(stage: Stage) -> Iterator[None]:
    """A failover to a standby that lacks the latest version."""
    assert isinstance(stage.database, EmbeddedServer)
    assert stage.table is not None
    assert stage.proxy is not None
    assert stage.load is not None
    with standby_behind(stage.database.server, stage.table.url) as url:
        latest = stage.table.advance()
        stage.load.wait_everywhere(latest, 3 * stage.cycle_seconds)
        stage.proxy.lead_to(url)
        try:
            yield
        finally:
            stage.proxy.lead_to(stage.table.url)


def went_back(stage: Stage) -> bool:
    """Every client sees the version of the standby, which is the one before the latest."""
    assert stage.table is not None
    assert stage.load is not None
    return stage.load.version == str(stage.table.version - 1)


# -- who may connect, and what the role may do -----------------------------------------------------------------


@contextmanager
def connection_limit(stage: Stage) -> Iterator[None]:
    """Other clients hold every connection that the database grants."""
    assert stage.reader is not None
    assert stage.table is not None
    url = stage.reader.url(stage.table.url)
    with ExitStack() as crowd:

        def crowded_out() -> bool:
            with suppress(psycopg.OperationalError):
                while True:
                    crowd.enter_context(psycopg.connect(url, connect_timeout=5))
            assert stage.reader is not None
            if stage.logged(FAILED, *FULL) or stage.gone:
                return True
            # The first client to connect gets the freed slot; after some attempts, it is a client of the crowd.
            stage.reader.end_sessions()
            return False

        until(crowded_out, "the server finds no connection left", seconds=20)
        yield


FULL = ("too many clients", "connection slots are reserved")


@contextmanager
def wrong_password(stage: Stage) -> Iterator[None]:
    """The password is rotated, and the server gets it only at the end."""
    assert stage.reader is not None
    assert stage.proxy is not None
    assert stage.directory is not None
    assert stage.server is not None
    stage.reader.rotate()
    stage.reader.end_sessions()
    try:
        yield
    finally:
        (stage.directory / "url").write_text(stage.reader.url(stage.proxy.url))
        stage.server.signal(signal.SIGHUP)


@contextmanager
def revoked(stage: Stage) -> Iterator[None]:
    """The role loses the right to read the table."""
    assert stage.reader is not None
    assert stage.table is not None
    stage.table.run(f"REVOKE SELECT ON {TABLE} FROM {stage.reader.name}")
    try:
        yield
    finally:
        stage.table.run(f"GRANT SELECT ON {TABLE} TO {stage.reader.name}")


# -- the table -------------------------------------------------------------------------------------------------


@contextmanager
def dropped(stage: Stage) -> Iterator[None]:
    """The table is dropped; later it is created again, with the next version."""
    assert stage.table is not None
    stage.table.run(f"DROP TABLE {TABLE}")
    try:
        yield
    finally:
        stage.table.create()


@contextmanager
def locked(stage: Stage) -> Iterator[None]:
    """A migration holds an exclusive lock on the table."""
    assert stage.table is not None
    with psycopg.connect(stage.table.url) as connection:
        connection.execute(f"LOCK TABLE {TABLE} IN ACCESS EXCLUSIVE MODE")
        yield


@contextmanager
def truncated_mid_read(stage: Stage) -> Iterator[None]:
    """While the server reads, all rows are rewritten, deleted, and the table is truncated."""
    assert stage.table is not None
    assert stage.proxy is not None
    stage.proxy.bytes_per_second = _MID_READ_BYTES_PER_SECOND
    before = stage.proxy.bytes_from_database
    stage.table.advance()
    try:
        tenth = stage.table.rows * stage.table.size // 10
        until(lambda: stage.proxy.bytes_from_database > before + tenth, "the server reads", seconds=20)
        stage.table.advance()
        stage.table.run(f"DELETE FROM {TABLE}")
        stage.table.run(f"TRUNCATE {TABLE}")  # waits until the reading has ended
        stage.proxy.bytes_per_second = None
        yield
    finally:
        stage.proxy.bytes_per_second = None
        stage.table.fill()


@contextmanager
def cancelled(stage: Stage) -> Iterator[None]:
    """An administrator cancels the server's statement halfway through its reading."""
    assert stage.table is not None
    assert stage.reader is not None
    assert stage.proxy is not None
    before = stage.proxy.bytes_from_database
    stage.table.advance()
    half = stage.table.rows * stage.table.size // 2
    until(lambda: stage.proxy.bytes_from_database > before + half, "the server reads", seconds=60)
    with psycopg.connect(stage.table.url, autocommit=True) as connection:

        def cancel() -> bool:
            # A cancellation between two statements has no effect, and each FETCH takes only a few milliseconds. So the
            # test cancels repeatedly without a pause, but only FETCH statements.
            assert stage.reader is not None
            assert stage.load is not None
            for _ in range(_CANCELLATIONS):
                connection.execute(
                    "SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
                    "WHERE usename = %s AND state = 'active' AND starts_with(query, 'FETCH')",
                    (stage.reader.name,),
                )
            return stage.logged(FAILED, CANCELLED) > 0 or stage.load.failed > 0

        until(cancel, "a statement is cancelled", seconds=20)
    yield


CANCELLED = "canceling statement due to user request"


# -- the network -----------------------------------------------------------------------------------------------


@contextmanager
def slow(stage: Stage) -> Iterator[None]:
    """The network passes 10 kB/s while a new version has to be read."""
    assert stage.table is not None
    assert stage.proxy is not None
    stage.proxy.bytes_per_second = SLOW_BYTES_PER_SECOND
    stage.table.advance()
    try:
        yield
    finally:
        stage.proxy.bytes_per_second = None


@contextmanager
def half_open(stage: Stage) -> Iterator[None]:
    """All data is acknowledged and none is passed on; in the end the connections are cut."""
    assert stage.proxy is not None
    stage.proxy.hold()
    try:
        yield
    finally:
        stage.proxy.cut()
        stage.proxy.resume()


@contextmanager
def black_hole(stage: Stage) -> Iterator[None]:
    """All data is lost. Connections that are opened during the fault are never closed and never answered, even
    afterwards."""
    assert stage.proxy is not None
    stage.proxy.swallow()
    try:
        yield
    finally:
        stage.proxy.spit_out()


@contextmanager
def disconnected(stage: Stage) -> Iterator[None]:
    """The database's container is disconnected from its network."""
    assert isinstance(stage.database, ContainerServer)
    stage.database.leave_network()
    try:
        yield
    finally:
        stage.database.join_network()


_UNANSWERED = "no answer from the database within"


def _fault(name: str, title: str, inject: Inject, felt: Callable[[Stage], bool], allows: Allowance = NOTHING) -> Fault:
    return Fault(f"db-{name}", title, "database", inject, allows, felt=felt)


FAULTS = (
    _fault("killed", "PostgreSQL killed", killed, tells(FAILED)),
    _fault("stopped", "PostgreSQL shut down", stopped, tells(FAILED)),
    _fault("paused", "PostgreSQL hangs", paused, tells(FAILED, _UNANSWERED)),
    _fault("restarting", "PostgreSQL killed every second", restarting, tells(FAILED, times=RESTARTS)),
    _fault(
        "standby-behind", "failover to a standby that is behind", standby, went_back, Allowance(may_go_back=True)
    ),
    _fault("connection-limit", "no connection left", connection_limit, tells(FAILED, *FULL)),
    _fault(
        "wrong-password", "password rotated, server not signalled", wrong_password,
        tells(FAILED, "password authentication failed"),
    ),
    _fault("role-revoked", "SELECT revoked", revoked, tells(FAILED, "permission denied")),
    _fault("table-dropped", "table dropped", dropped, tells(FAILED, "does not exist")),
    _fault("table-locked", "table locked", locked, tells(FAILED, "holds a lock", times=3)),
    _fault("truncated-mid-read", "table truncated during a read", truncated_mid_read, tells(REFUSED, "is empty")),
    _fault("read-cancelled", "statement cancelled during a read", cancelled, tells(FAILED, CANCELLED, times=1)),
    _fault("slow", "10 kB/s from the database", slow, tells(FAILED, _UNANSWERED)),
    _fault("half-open", "connection half open", half_open, tells(FAILED, _UNANSWERED)),
    _fault("black-hole", "network swallows everything", black_hole, tells(FAILED, _UNANSWERED)),
    _fault("network-disconnected", "container off its network", disconnected, tells(FAILED)),
)  # fmt: skip
"""All are possible on an `EmbeddedServer` except ``db-network-disconnected``, and on a `ContainerServer` except
``db-standby-behind``. ``db-truncated-mid-read`` and ``db-read-cancelled`` need several batches (of 1,000 rows).
"""
