"""How a connection to the database is made and kept, without a database."""

from __future__ import annotations

import asyncio
import gc
import socket
from collections.abc import Awaitable, Callable, Generator
from types import SimpleNamespace
from typing import Any, cast

import psycopg
import pytest
from psycopg.pq import ConnStatus
from psycopg.waiting import Ready, Wait
from tests.support.logs import captured_logs, logged

from definition_server.control_plane import postgres
from definition_server.control_plane.database_address import Host
from definition_server.control_plane.postgres import PostgresSource, _Connection, _passes, _Reading
from definition_server.control_plane.source import ReadLimits, SourceError
from definition_server.observability.reasons import Reason

TWO_HOSTS = "postgresql://user:secret@one,two:5433/db"
ONE_HOST = "postgresql://user:secret@one/db"


class Source(PostgresSource):
    """A source; the test gives the addresses of its hosts and answers at them."""

    def __init__(self, url: str, addresses: list[str]) -> None:
        super().__init__(url, connect_timeout=10.0, statement_timeout=5.0)
        self.addresses = addresses
        self.attempts: list[tuple[str, str, float]] = []
        self.connections: list[Any] = []
        self.error: Exception = OSError("refused")

    async def _addresses(self, host: Any, seconds: float) -> list[str]:
        if not self.addresses:
            raise OSError(f"{host.name} is not known")
        return self.addresses

    async def _connect_to(self, host: Any, address: str, session: str | None, seconds: float) -> Any:
        self.attempts.append((str(host), address, seconds))
        if not self.connections:
            raise self.error
        return self.connections.pop(0)


class Connection:
    """A stand-in for a connection; only its socket is real."""

    def __init__(self, user: str = "user") -> None:
        self.closed = False
        self.info = SimpleNamespace(hostaddr="10.0.0.1", dbname="db", user=user)
        self.pgconn = SimpleNamespace(finish=lambda: setattr(self, "closed", True))
        self.statements: list[str] = []

    async def execute(self, statement: str, **_: object) -> None:
        self.statements.append(statement)

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
async def frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop's clock stands still."""
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: 1000.0)


@pytest.mark.usefixtures("frozen")
async def test_the_time_to_connect_is_shared_by_hosts_and_their_addresses() -> None:
    source = Source(TWO_HOSTS, ["10.0.0.1", "10.0.0.2"])
    with pytest.raises(SourceError):
        await source._connect()
    assert [(address, seconds) for _, address, seconds in source.attempts] == [
        ("10.0.0.1", 2.5), ("10.0.0.2", 5.0), ("10.0.0.1", 5.0), ("10.0.0.2", 10.0),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("url", "addresses", "faults"),
    [
        (ONE_HOST, ["10.0.0.1"], ["refused"]),
        (ONE_HOST, ["10.0.0.1", "10.0.0.2"], ["at 10.0.0.1: refused", "at 10.0.0.2: refused"]),
        (TWO_HOSTS, ["10.0.0.1"], ["one", "at 10.0.0.1: refused", "two", "at 10.0.0.1: refused"]),
        (ONE_HOST, [], ["one is not known"]),
    ],
    ids=["one", "two addresses", "two hosts", "no address"],
)
async def test_failed_hosts_are_named_if_there_are_several(url: str, addresses: list[str], faults: list[str]) -> None:
    with pytest.raises(SourceError) as failed:
        await Source(url, addresses)._connect()
    text = str(failed.value)
    position = 0
    for fault in faults:
        position = text.index(fault, position)
    assert (" at 10.0.0.1" in text) is ("at 10.0.0.1: refused" in faults)
    assert text.endswith("(check host, port, user, password and database in DATABASE_URL)")
    assert "secret" not in text


async def test_the_reason_of_several_failures_is_the_one_that_an_operator_can_mend_best() -> None:
    source = Source(ONE_HOST, ["10.0.0.1"])
    for error, reason in (
        (OSError("refused"), Reason.DATABASE_UNREACHABLE),
        (TimeoutError("no answer"), Reason.DATABASE_TIMEOUT),
    ):
        source.error = error
        with pytest.raises(SourceError) as failed:
            await source._connect()
        assert failed.value.reason is reason
    unusable = PostgresSource("not a url", connect_timeout=1.0, statement_timeout=1.0)
    with pytest.raises(SourceError, match="DATABASE_URL cannot be used") as failed:
        await unusable._connect()
    assert failed.value.reason is Reason.DATABASE_URL_UNUSABLE


async def test_the_connected_server_is_logged_when_it_changes() -> None:
    source = Source(ONE_HOST, ["10.0.0.1"])
    source.connections = [Connection(), Connection(), Connection("other")]
    with captured_logs() as lines:
        for _ in range(3):
            await source._connect()
    found = logged(lines, "Connected to the database", address="10.0.0.1", database="db", log_level="info")
    assert [line["role"] for line in found] == ["user", "other"]
    assert source.connected_to is not None


async def test_a_changed_url_closes_the_connection_and_the_same_url_keeps_it() -> None:
    source = Source(ONE_HOST, ["10.0.0.1"])
    connection = Connection()
    source._connection = cast(Any, connection)
    source.connected_to = "one"
    await source.use_url(ONE_HOST)
    assert not connection.closed
    await source.use_url(TWO_HOSTS)
    assert connection.closed
    assert (source._connection, source.connected_to) == (None, None)
    assert source.address is not None
    assert len(source.address.hosts) == 2
    await source.close()


@pytest.mark.parametrize(
    ("host", "address"),
    [
        (Host("db", "10.0.0.1", ""), "10.0.0.1"),
        (Host("", "10.0.0.1", ""), "10.0.0.1"),
        (Host("10.0.0.2", "", ""), "10.0.0.2"),
        (Host("::1", "", "5433"), "::1"),
        (Host("/run/postgresql", "", ""), ""),
        (Host("@abstract", "", ""), ""),
        (Host("", "", ""), ""),
    ],
    ids=["a name with its address", "an address", "a numeric name", "IPv6", "a directory", "abstract", "the default"],
)
async def test_a_host_that_is_an_address_is_not_looked_up(host: Host, address: str) -> None:
    nobody = cast(Any, SimpleNamespace(addresses=pytest.fail))
    source = PostgresSource(ONE_HOST, connect_timeout=1.0, statement_timeout=1.0, resolver=nobody)
    assert await source._addresses(host, 2.0) == [address]


@pytest.mark.parametrize(("seconds", "waited"), [(2.0, 1.0), (0.0, 0.0)])
async def test_a_look_up_may_take_half_of_the_time_of_its_host(seconds: float, waited: float) -> None:
    asked: list[tuple[str, float]] = []

    async def addresses(name: str, seconds: float) -> list[str]:
        asked.append((name, seconds))
        return ["10.0.0.1"]

    source = PostgresSource(
        ONE_HOST, connect_timeout=1.0, statement_timeout=1.0, resolver=cast(Any, SimpleNamespace(addresses=addresses))
    )
    assert await source._addresses(Host("db", "", ""), seconds) == ["10.0.0.1"]
    assert asked == [("db", waited)]


@pytest.mark.parametrize(("seconds", "whole"), [(0.4, 2), (2.4, 2), (2.6, 3), (9.5, 10)])
async def test_a_connection_is_opened_with_its_limits_and_closed_if_it_cannot_be_used(
    seconds: float, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection = Connection()
    given: dict[str, Any] = {}

    async def connect(url: str, **options: Any) -> Connection:
        given.update(options, url=url)
        return connection

    async def prepare(_: object) -> None:
        raise OSError("the encoding is not known")

    monkeypatch.setattr(_Connection, "connect", connect)
    source = PostgresSource(ONE_HOST, connect_timeout=10.0, statement_timeout=5.0)
    monkeypatch.setattr(source, "_prepare", prepare)
    with pytest.raises(OSError, match="encoding"):
        await source._connect_to(Host("one", "", "5433"), "10.0.0.1", "standby", seconds)
    assert connection.closed
    assert given == {
        "url": ONE_HOST, "host": "one", "hostaddr": "10.0.0.1", "port": "5433", "target_session_attrs": "standby",
        "connect_timeout": whole, "client_encoding": "utf8", "application_name": "avap-definition-server",
        "keepalives": 1, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
        "tcp_user_timeout": 5000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "passes"),
    [
        (None, [("one", None), ("two", None)]),
        ("read-write", [("one", "read-write"), ("two", "read-write")]),
        ("prefer-standby", [("one", "standby"), ("two", "standby"), ("one", "any"), ("two", "any")]),
    ],
)
def test_each_host_is_tried_once_or_twice_if_a_standby_is_preferred(
    asked: str | None, passes: list[tuple[str, str | None]]
) -> None:
    hosts = [Host("one", "", ""), Host("two", "", "")]
    assert [(host.name, session) for host, session in _passes(hosts, asked)] == passes


class Reading:
    """A stand-in whose closing fails if the test has set that."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.ended = 0

    async def end(self) -> None:
        self.ended += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "keeps"),
    [
        (None, None, True),
        (psycopg.OperationalError("terminated"), SourceError, False),
        (TimeoutError("no answer"), SourceError, False),
        (OSError("reset"), SourceError, False),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid"), SourceError, False),
        (asyncio.CancelledError(), asyncio.CancelledError, False),
        (KeyError("a bug"), KeyError, False),
    ],
    ids=["none", "database", "time", "network", "encoding", "cancelled", "a bug"],
)
@pytest.mark.parametrize("where", ["in it", "at its end"])
async def test_the_connection_is_kept_after_a_reading_and_closed_after_any_error(
    error: BaseException | None, raised: type[BaseException] | None, keeps: bool, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    source, connection, reading = Source(ONE_HOST, []), Connection(), Reading()
    source._connection = cast(Any, connection)

    async def begin() -> Reading:
        return reading

    monkeypatch.setattr(source, "_begin", begin)
    reading.error = error if where == "at its end" else None

    async def read() -> None:
        async with source.read() as found:
            assert cast(Any, found) is reading
            if error is not None and where == "in it":
                raise error

    if raised is None:
        await read()
    else:
        with pytest.raises(raised):
            await read()
    assert connection.closed is not keeps
    assert (source._connection is not None) is keeps
    assert reading.ended == (keeps or where == "at its end")


@pytest.mark.parametrize(
    ("kept", "closes", "attempts"),
    [(False, [True, True], 2), (True, [True, True, True], 3), (False, [False], 1), (True, [True, False], 2)],
    ids=["new ones end", "kept and new ones end", "an error of the first", "an error of the second"],
)
async def test_a_connection_that_was_closed_between_readings_is_replaced_twice_at_most(
    kept: bool, closes: list[bool], attempts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Source(ONE_HOST, ["10.0.0.1"])
    source.connections = [Connection() for _ in range(4)]
    if kept:
        source._connection = cast(Any, Connection())
    tried: list[Any] = []
    new: list[bool] = []

    async def transaction(connection: Any, *, first: bool) -> Any:
        connection.closed = closes[len(tried)]
        tried.append(connection)
        new.append(first)
        raise psycopg.OperationalError("terminated")

    monkeypatch.setattr(source, "_transaction", transaction)
    with pytest.raises(psycopg.OperationalError):
        await source._begin()
    assert len(tried) == attempts
    assert source._connections == attempts - kept
    assert new == [not kept, *[True] * (attempts - 1)], "whether each transaction was the first on its connection"


async def test_a_reading_gets_the_number_of_its_connection_and_another_number_than_the_readings_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[tuple[object, ...]] = []

    class Begun:
        plan = SimpleNamespace(mistrust="a standby", tables=("obex_dapl_functions",))
        bytecode_fault = None

        def __init__(self, connection: Any, limited: object, limits: object, of_connection: str, number: int) -> None:
            steps.append((connection, of_connection, number))

        async def begin(self, *, first: bool) -> None:
            steps.append((first,))

    monkeypatch.setattr(postgres, "_Reading", Begun)
    one, two = Connection(), Connection()
    source = Source(ONE_HOST, ["10.0.0.1"])
    source.connections = [one, two]
    with captured_logs() as lines:
        for _ in range(2):
            assert isinstance(await source._begin(), Begun)
        await source.close()
        await source._begin()
    assert steps == [(one, "1", 1), (True,), (one, "1", 2), (False,), (two, "2", 3), (True,)]
    assert [len(one.statements), len(two.statements)] == [2, 1]
    for statement in one.statements + two.statements:
        assert "statement_timeout = 5000" in statement
        assert "LOCK TABLE obex_dapl_functions IN" in statement
    assert len(logged(lines, "The table is read whole in every cycle", reason="a standby")) == 1
    assert one.closed


async def test_a_statement_that_is_not_answered_ends_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(ONE_HOST, [])
    connection = Connection()
    source._connection = cast(Any, connection)
    limits: list[float] = []
    wait = asyncio.wait

    async def at_once(tasks: Any, timeout: float) -> Any:
        limits.append(timeout)
        return await wait(tasks, timeout=0)

    monkeypatch.setattr(asyncio, "wait", at_once)
    with pytest.raises(TimeoutError, match="no answer from the database within 6 s"):
        await source._limited(asyncio.sleep(60))
    assert connection.closed
    assert limits == [6.0], "the statement's own limit, and a second"
    with pytest.raises(TimeoutError):
        await source._limited(asyncio.sleep(60), 0.5)
    assert limits[1:] == [0.5]
    monkeypatch.undo()

    async def answer() -> int:
        return 5

    assert await source._limited(answer()) == 5


@pytest.mark.parametrize(("encoding", "converted"), [("UTF8", True), ("SQL_ASCII", False)])
async def test_a_reading_is_read_only_in_one_snapshot_and_gets_raw_octets_if_there_is_no_encoding(
    encoding: str, converted: bool
) -> None:
    steps: list[Any] = []

    def noting(name: str) -> Callable[..., Any]:
        async def note(*given: Any) -> None:
            steps.append((name, *given))

        return note

    connection = SimpleNamespace(
        info=SimpleNamespace(parameter_status={"server_encoding": encoding}.get),
        set_autocommit=noting("autocommit"), execute=noting("execute"), set_read_only=noting("read only"),
        set_isolation_level=noting("isolation"),
    )  # fmt: skip
    await Source(ONE_HOST, [])._prepare(cast(Any, connection))
    ascii_steps = [("autocommit", True), ("execute", "SET client_encoding TO 'SQL_ASCII'"), ("autocommit", False)]
    assert steps == ([] if converted else ascii_steps) + [
        ("isolation", psycopg.IsolationLevel.REPEATABLE_READ), ("read only", True),
    ]  # fmt: skip


def test_the_way_of_reading_the_tables_is_logged_when_it_changes() -> None:
    source = Source(ONE_HOST, [])
    with captured_logs() as lines:
        for mistrust, fault in (
            ("a view", None), ("a view", "no column"), (None, "no column"), ("a view", "no right"), ("a rule", None),
        ):  # fmt: skip
            source._report(mistrust, fault)
    whole, without = "The table is read whole in every cycle", "No bytecode is served"
    assert [(line["event"], line["reason"]) for line in lines] == [
        (whole, "a view"), (without, "no column"), (whole, "a view"), (without, "no right"), (whole, "a rule"),
    ]  # fmt: skip


def test_a_reading_uses_the_given_limits() -> None:
    limits = ReadLimits()
    given = PostgresSource(ONE_HOST, connect_timeout=1.0, statement_timeout=1.0, limits=limits)
    assert given._limits is limits
    assert Source(ONE_HOST, [])._limits == ReadLimits()


class Cursor:
    """A cursor that returns one batch of rows, and then runs `afterwards`."""

    def __init__(self, afterwards: Callable[[], Awaitable[None]]) -> None:
        self._batches = iter([[(1,), (2,)]])
        self._afterwards = afterwards

    async def fetchmany(self, size: int) -> list[tuple[int]]:
        for batch in self._batches:
            return batch
        await self._afterwards()
        return []


async def waits() -> None:
    await asyncio.Event().wait()


async def fails() -> None:
    raise OSError("the connection is lost")


@pytest.mark.parametrize(("afterwards", "closed"), [(waits, True), (fails, False)], ids=["waiting", "failed"])
async def test_a_reading_that_ends_in_its_middle_leaves_no_fetch_behind(
    afterwards: Callable[[], Awaitable[None]], closed: bool
) -> None:
    """The next batch has been requested, and its rows or its error are not used."""
    connection, untold = Connection(), []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: untold.append(context["message"]))
    source = Source(ONE_HOST, [])
    reading = _Reading(cast(Any, connection), source._limited, ReadLimits(1 << 20, 1 << 20), "", 1)
    batches = reading._fetched(cast(Any, Cursor(afterwards)), 1000)
    assert await anext(batches) == [(1,), (2,)]
    await asyncio.sleep(0)
    await batches.aclose()
    assert connection.closed is closed
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect()
    assert untold == []


async def test_octets_that_have_arrived_are_read_without_a_turn_of_the_event_loop_for_each_piece() -> None:
    connection = object.__new__(_Connection)
    ours, theirs = socket.socketpair()

    def answer() -> Generator[int, int, int]:
        for _ in range(3):
            assert (yield Wait.R) == Ready.R
            ours.recv(1)
        asyncio.get_running_loop().call_soon(theirs.send, b"d")
        yield Wait.R  # the last piece has not arrived
        return len(ours.recv(1))

    with ours, theirs:
        theirs.send(b"abc")
        connection.pgconn = cast("Any", SimpleNamespace(socket=ours.fileno(), status=ConnStatus.BAD))
        loop = asyncio.get_running_loop()
        added = []
        add_reader = loop.add_reader
        loop.add_reader = lambda *args: added.append(args) or add_reader(*args)
        try:
            assert await connection.wait(answer()) == 1
        finally:
            del loop.add_reader
    assert len(added) == 1


async def test_a_reading_that_begins_while_the_password_is_rotated_continues_with_a_new_connection() -> None:
    class Rotated(Connection):
        async def execute(self, *_: object, **__: object) -> None:
            await source.use_url(ONE_HOST.replace("secret", "new"))
            raise psycopg.OperationalError("the connection is closed")

    source = Source(ONE_HOST, ["10.0.0.1"])
    source.connections = [Rotated()]
    with pytest.raises(SourceError, match="refused"):  # the second connection
        async with source.read():
            pass
    assert len(source.attempts) == 2
