"""A cycle notices every change, reads no rows if there is none, and reads all rows in one transaction."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import psycopg
import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.families import sample
from tests.support.polling import until
from tests.support.providers import DatabaseServer
from tests.support.proxy import Proxy
from tests.support.server import ServerProcess
from tests.support.table import Table, shared_table

from definition_server.catalog.restore_sql import CREATE_TABLE_SQL

pytestmark = pytest.mark.any_transport


def cycles(server: ServerProcess, outcome: str) -> int:
    return int(server.metric("avap_sync_cycles_total", outcome=outcome))


def wait_cycles(server: ServerProcess, count: int, outcome: str = "unchanged") -> None:
    """Wait for ``count`` more cycles with that outcome."""
    goal = cycles(server, outcome) + count
    until(lambda: cycles(server, outcome) >= goal, lambda: f"{count} more cycles {outcome}\n{server.tail()}")


CHANGES: dict[str, tuple[str, int]] = {
    "insert": ("INSERT INTO obex_dapl_functions (name, code) VALUES ('new', 'pass')", 11),
    "delete": ("DELETE FROM obex_dapl_functions WHERE name = 'command3'", 9),
    "update in place": ("UPDATE obex_dapl_functions SET code = 'changed' WHERE name = 'command3'", 10),
    "swap two bodies": (
        "UPDATE obex_dapl_functions a SET code = b.code FROM obex_dapl_functions b "
        "WHERE (a.name, b.name) IN (('command1', 'command2'), ('command2', 'command1'))",
        10,
    ),
    "delete one and insert one": (
        "WITH gone AS (DELETE FROM obex_dapl_functions WHERE name = 'command4') "
        "INSERT INTO obex_dapl_functions (name, code) VALUES ('other', 'pass')",
        10,
    ),
    "truncate and fill again": (
        "TRUNCATE obex_dapl_functions; INSERT INTO obex_dapl_functions (name, code) VALUES ('only', 'pass')",
        1,
    ),
    "drop and make again": (
        "CREATE TABLE t (LIKE obex_dapl_functions); INSERT INTO t (id, name, code) VALUES (1, 'only', 'pass'); "
        "DROP TABLE obex_dapl_functions; ALTER TABLE t RENAME TO obex_dapl_functions",
        1,
    ),
}


@pytest.fixture(scope="module")
def changing(postgres: DatabaseServer, transport: str) -> Iterator[tuple[ServerProcess, Table, str]]:
    """One server for all changes, its table, and the version hash of the ten commands before each change."""
    with shared_table(postgres, f"changing_{transport}") as table:
        table.add_commands(10)
        # Some changes concern the whole table, and the guard would hold them.
        with ServerProcess(table.url, TRANSPORT=transport, GUARD_MAX_REMOVED_PERCENT="100") as server:
            yield server.wait_ready(), table, server.statusz()["catalog"]["version_hash"]


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_change_is_served_by_every_worker(
    changing: tuple[ServerProcess, Table, str], change: str
) -> None:
    statement, count = CHANGES[change]
    server, table, ten_commands = changing
    if server.statusz()["catalog"]["version_hash"] != ten_commands:
        table.run(f"DROP TABLE obex_dapl_functions; {CREATE_TABLE_SQL}")
        table.add_commands(10)
        server.wait_version(ten_commands)
    before = server.statusz()["catalog"]
    table.run(statement)
    until(lambda: server.statusz()["catalog"]["version_hash"] != ten_commands, lambda: server.tail())
    after = server.statusz()["catalog"]
    assert after["definitions"] == count
    assert after["generation"] == before["generation"] + 1
    server.wait_version(after["version_hash"])


@pytest.mark.thorough  # waits for cycles
def test_an_unchanged_table_is_not_read_and_not_published(table: Table, start_server: StartServer) -> None:
    table.add_commands(2000, size=2000)
    with Proxy(table.url) as proxy:
        server = start_server(proxy.url).wait_ready()
        wait_cycles(server, 1)
        moved, seen = proxy.bytes_from_database, cycles(server, "unchanged")
        wait_cycles(server, 5)
        moved, seen = proxy.bytes_from_database - moved, cycles(server, "unchanged") - seen
    assert moved / seen < 2_000, "a cycle moves one row, not the table of 4 MB"
    assert cycles(server, "published") == 1
    assert len(server.logged("Definitions Broadcasted")) == 1


@pytest.mark.parametrize(
    "statement", sample(["UPDATE obex_dapl_functions SET code = code", "VACUUM FULL obex_dapl_functions"])
)
def test_rows_that_moved_without_changing_are_read_but_not_published(
    table: Table, start_server: StartServer, statement: str
) -> None:
    table.add_commands(10)
    with Proxy(table.url) as proxy:
        server = start_server(proxy.url).wait_ready()
        wait_cycles(server, 1)
        moved = proxy.bytes_from_database
        table.run(statement)
        wait_cycles(server, 2)
        assert proxy.bytes_from_database - moved > 2_000, "the rows were read"
    assert cycles(server, "published") == 1
    assert server.statusz()["catalog"]["generation"] == 1


@pytest.mark.thorough  # waits for cycles
def test_an_uncommitted_change_is_not_served(table: Table, start_server: StartServer) -> None:
    table.add_commands(10)
    server = start_server(table.url).wait_ready()
    with psycopg.connect(table.url) as connection:
        connection.execute("UPDATE obex_dapl_functions SET code = 'not yet'")
        wait_cycles(server, 2)
        with Client(server.port) as client:
            assert client.get("command1").code != b"not yet"
        connection.rollback()
    wait_cycles(server, 2)
    assert cycles(server, "published") == 1


def test_no_answer_mixes_two_states_of_the_table(table: Table, start_server: StartServer) -> None:
    """Every transaction gives all rows the same body; each answer must be exactly one of these states."""
    table.add_commands(3000, size=1000)
    table.run("UPDATE obex_dapl_functions SET code = 'state 0'")
    server = start_server(table.url, SYNC_INTERVAL_SECONDS="0.05").wait_ready()
    stop = threading.Event()

    def write() -> None:
        with psycopg.connect(table.url, autocommit=True) as connection:
            number = 0
            while not stop.is_set():
                number += 1
                connection.execute("UPDATE obex_dapl_functions SET code = %s", (f"state {number}",))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        with Client(server.port) as client:
            states: set[bytes] = set()
            until(lambda: _note_state(client.sync, states) >= 4, lambda: f"only {states} seen\n{server.tail()}")
    finally:
        stop.set()
        writer.join()


def _note_state(sync: Callable[[], object], states: set[bytes]) -> int:
    bodies = {command.code for command in sync().commands}
    assert len(bodies) == 1, f"one answer holds rows of {len(bodies)} states"
    states |= bodies
    return len(states)


def test_the_server_never_writes_and_needs_only_select(table: Table, start_server: StartServer) -> None:
    table.add_commands(5)
    table.run(
        "DROP ROLE IF EXISTS reader; CREATE ROLE reader LOGIN PASSWORD 'reader'; "
        "GRANT SELECT ON obex_dapl_functions TO reader"
    )
    try:
        server = start_server(_as_user(table.url, "reader", "reader")).wait_ready()
        with Client(server.port) as client:
            assert client.sync().total_count == 5
    finally:
        table.run("DROP OWNED BY reader; DROP ROLE reader")


def _as_user(url: str, user: str, password: str) -> str:
    return f"postgresql://{user}:{password}@" + url.rpartition("@")[2]


def test_sighup_syncs_at_once(table: Table, start_server: StartServer) -> None:
    import signal

    table.add_commands(3)
    server = start_server(table.url, SYNC_INTERVAL_SECONDS="3600").wait_ready()
    table.add_commands(1, start=3)
    server.signal(signal.SIGHUP)
    server.wait_count(4)


def test_sighup_reads_rotated_secrets_from_their_files(table: Table, start_server: StartServer, tmp_path) -> None:
    import signal

    table.add_commands(3)
    key, signing = tmp_path / "key", tmp_path / "signing"
    key.write_text("first\n")
    signing.write_text("one")
    server = start_server(
        table.url,
        SYNC_INTERVAL_SECONDS="3600",
        API_KEY="",
        API_KEY_FILE=str(key),
        AVAP_INTERNAL_KEY_FILE=str(signing),
    ).wait_ready()
    with Client(server.port, key="first") as old:
        before = old.get("command1")
        key.write_text("second\n")
        signing.write_text("two")
        server.signal(signal.SIGHUP)
        server.wait_log("Served catalogue is signed again", generation=2)
        with Client(server.port, key="second") as new:
            until(lambda: new.health() == "SERVING", "serving")
            until(lambda: new.get("command1").code != before.code, "its signature is another")
            assert new.get("command1").hash == before.hash
        from tests.support.client import failure

        assert failure(old.get, "command1") == ("UNAUTHENTICATED", "Invalid Credentials")
    key.write_text("")
    server.signal(signal.SIGHUP)
    line = server.wait_log("Settings not read again; the old ones stay")
    assert "API_KEY_FILE" in line["error"]
