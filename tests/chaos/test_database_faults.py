"""During any fault of the database no call fails, and fresh rows are served within a cycle after its end."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import psycopg
import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.families import sample
from tests.support.load import Load
from tests.support.polling import until
from tests.support.providers import PROVIDERS, DatabaseServer, create_database, provider_or_skip
from tests.support.proxy import Proxy
from tests.support.server import ServerProcess
from tests.support.table import Table, shared_table

NAMES = [f"command{number}" for number in range(100)]
FAILED_CYCLES = 3

pytestmark = pytest.mark.any_transport


@pytest.fixture(params=sample([name for name in PROVIDERS if name != "external"], ["embedded"]))
def faulty(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server that a test may break, from each provider in turn."""
    server = provider_or_skip(request.param)
    yield server
    server.close()


def failed_cycles(server: ServerProcess) -> int:
    return int(server.metric("avap_sync_cycles_total", outcome="failed"))


def wait_failed_cycles(server: ServerProcess, count: int = FAILED_CYCLES) -> None:
    goal = failed_cycles(server) + count
    until(lambda: failed_cycles(server) >= goal, server.tail, seconds=60)


def assert_nothing_failed(load: Load) -> None:
    result = load.result
    assert result.offered > 0
    assert not result.failed, str(result)
    assert not result.wrong, str(result)
    assert result.answered == result.offered


def assert_fresh_rows_arrive(server: ServerProcess, table: Table) -> None:
    """Check that all workers serve a row that is written now after one cycle."""
    table.run("INSERT INTO obex_dapl_functions (name, code) VALUES ('fresh', 'pass')")
    before = sum(server.statusz()["sync"]["cycles"].values())
    server.wait_count(101)
    # Three cycles: the one under way at the commit, the next one, and one that may run before this test checks.
    assert sum(server.statusz()["sync"]["cycles"].values()) - before <= 3
    with Client(server.port) as client:
        assert client.get("fresh").code == b"pass"


def test_no_call_fails_when_the_database_is_killed(faulty: DatabaseServer, start_server: StartServer) -> None:
    table = Table(create_database(faulty.url, "killed"))
    table.add_commands(100)
    server = start_server(table.url).wait_ready()
    with Load(server.port, NAMES) as load:
        load.wait_answered(100)
        faulty.stop_hard()
        wait_failed_cycles(server)
        line = server.logged("Sync failed")[-1]
        assert (line["level"], line["serving_generation"]) == ("ERROR", 1)
        assert line["next_attempt_in_seconds"] == 0.2
        assert server.http("/readyz") == (200, "ready\n")
        faulty.start_again()
        until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
        assert_fresh_rows_arrive(server, table)
        load.wait_answered(100)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
def test_no_call_fails_while_the_database_hangs(faulty: DatabaseServer, start_server: StartServer) -> None:
    table = Table(create_database(faulty.url, "hung"))
    table.add_commands(100)
    server = start_server(table.url, STATEMENT_TIMEOUT_SECONDS="0.5", CONNECT_TIMEOUT_SECONDS="1").wait_ready()
    with Load(server.port, NAMES) as load:
        load.wait_answered(100)
        faulty.pause()
        try:
            wait_failed_cycles(server)
            assert "no answer from the database within" in server.logged("Sync failed")[-1]["error"]
        finally:
            faulty.resume()
        until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
        assert_fresh_rows_arrive(server, table)
    assert_nothing_failed(load)


@pytest.fixture
def served(table: Table, start_server: StartServer) -> Iterator[tuple[ServerProcess, Table, Proxy]]:
    """A server behind a proxy, on 100 commands."""
    table.add_commands(100)
    with Proxy(table.url) as proxy:
        yield start_server(proxy.url, STATEMENT_TIMEOUT_SECONDS="1").wait_ready(), table, proxy


@pytest.mark.thorough  # waits for time limits
def test_a_half_open_connection_is_replaced_after_the_statement_timeout(
    served: tuple[ServerProcess, Table, Proxy],
) -> None:
    """All data is acknowledged and not answered, so no TCP timer detects the fault."""
    server, table, proxy = served
    with Load(server.port, NAMES) as load:
        proxy.hold()
        wait_failed_cycles(server)
        proxy.cut()
        proxy.resume()
        until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
        assert_fresh_rows_arrive(server, table)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
def test_no_call_fails_while_database_connections_are_cut_repeatedly(
    served: tuple[ServerProcess, Table, Proxy],
) -> None:
    server, table, proxy = served
    with Load(server.port, NAMES) as load:
        for _ in range(5):
            goal = sum(server.statusz()["sync"]["cycles"].values()) + 2
            proxy.cut()
            until(lambda goal=goal: sum(server.statusz()["sync"]["cycles"].values()) >= goal, server.tail)
        # A connection that was cut while it was idle is replaced within the cycle. One cycle may have been cut in its
        # middle.
        assert failed_cycles(server) <= 2
        until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
        assert_fresh_rows_arrive(server, table)
    assert_nothing_failed(load)


GARBAGE = {
    "emptied": "TRUNCATE obex_dapl_functions",
    "deleted": "DELETE FROM obex_dapl_functions",
    "all code gone": "UPDATE obex_dapl_functions SET code = NULL",
    "all names gone": "UPDATE obex_dapl_functions SET name = ''",
    "dropped": "DROP TABLE obex_dapl_functions",
    "column dropped": "ALTER TABLE obex_dapl_functions DROP COLUMN code",
    "column renamed": "ALTER TABLE obex_dapl_functions RENAME COLUMN name TO label",
}


@pytest.fixture(scope="module")
def ruined(postgres: DatabaseServer, transport: str) -> Iterator[tuple[ServerProcess, Table]]:
    """One server for all kinds of damage, with 100 commands; the table ``good`` keeps a copy of them."""
    with shared_table(postgres, f"ruined_{transport}") as table:
        table.add_commands(100)
        table.run("CREATE TABLE good AS TABLE obex_dapl_functions")
        with ServerProcess(table.url, TRANSPORT=transport, STATEMENT_TIMEOUT_SECONDS="1") as server:
            yield server.wait_ready(), table


@pytest.mark.parametrize("harm", GARBAGE)
def test_a_damaged_table_never_replaces_a_good_catalogue(ruined: tuple[ServerProcess, Table], harm: str) -> None:
    server, table = ruined
    table.run("DELETE FROM obex_dapl_functions WHERE name = 'fresh'")
    server.wait_count(100)
    before, seen = server.statusz()["catalog"]["generation"], len(server.lines)
    table.run(GARBAGE[harm])
    with Load(server.port, NAMES) as load:
        until(lambda: server.statusz()["sync"]["last_error"], server.tail)
        told = until(
            lambda: [*server.logged("Sync failed", after=seen), *server.logged("Catalogue held", after=seen)],
            server.tail,
        )
        assert {line["level"] for line in told} == {"ERROR"}
        load.wait_answered(100)
        status = server.statusz()
        assert (status["catalog"]["generation"], status["ready"]) == (before, True)
        table.run(
            "DROP TABLE IF EXISTS obex_dapl_functions; CREATE TABLE obex_dapl_functions (LIKE good); "
            "ALTER TABLE obex_dapl_functions ALTER id SET DEFAULT 1000; "
            "INSERT INTO obex_dapl_functions SELECT * FROM good"
        )
        until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
        assert_fresh_rows_arrive(server, table)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
def test_no_call_fails_while_the_table_is_locked(served: tuple[ServerProcess, Table, Proxy]) -> None:
    server, table, _ = served
    with Load(server.port, NAMES) as load:
        with psycopg.connect(table.url) as connection:
            connection.execute("LOCK TABLE obex_dapl_functions IN ACCESS EXCLUSIVE MODE")
            wait_failed_cycles(server)
            until(lambda: server.logged("Sync failed"), server.tail)
            assert "holds a lock" in server.logged("Sync failed")[-1]["error"]
        until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
        assert_fresh_rows_arrive(server, table)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
def test_an_interrupted_reading_publishes_nothing(table: Table, start_server: StartServer) -> None:
    table.add_commands(20_000, size=500)
    with Proxy(table.url) as proxy:
        server = start_server(proxy.url).wait_ready()
        before = proxy.bytes_from_database
        proxy.cut_after = before + 2_000_000
        table.run("UPDATE obex_dapl_functions SET code = code || '#new'")
        until(lambda: failed_cycles(server) >= 1, server.tail)
        assert server.statusz()["catalog"]["generation"] == 1
        with Client(server.port) as client:
            assert {command.code.endswith(b"#new") for command in client.sync().commands} == {False}
        proxy.cut_after = None
        until(lambda: server.statusz()["catalog"]["generation"] == 2, server.tail)
        with Client(server.port) as client:
            assert {command.code.endswith(b"#new") for command in client.sync().commands} == {True}


@pytest.mark.thorough  # seconds of load
def test_no_call_fails_while_the_database_sends_garbage(table: Table, start_server: StartServer) -> None:
    table.add_commands(100)
    with Proxy(table.url) as proxy:
        server = start_server(proxy.url).wait_ready()
        with Load(server.port, NAMES) as load, socket.create_server(("127.0.0.1", 0)):
            proxy.garble = True
            proxy.cut()
            wait_failed_cycles(server)
            proxy.garble = False
            proxy.cut()
            until(lambda: server.statusz()["sync"]["last_error"] is None, server.tail)
            assert_fresh_rows_arrive(server, table)
        assert_nothing_failed(load)
