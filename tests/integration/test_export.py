"""``export --sql``: a real PostgreSQL gets its rows back octet by octet, from a server, a file and the history."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from tests.conftest import StartServer
from tests.integration.reader import Reader
from tests.support.families import sample
from tests.support.providers import DatabaseServer, drop_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.catalog.restore_sql import TableRow, literal, script

pytestmark = pytest.mark.any_transport

NASTY = [
    "",
    "'",
    "''",
    "\\",
    "\\'; DROP TABLE obex_dapl_functions; --",
    "$$ $tag$ $1 :variable :'quoted'",
    "\n\r\n\r\t\x0b\x0c\x1b[31m\x7f\x01",
    "\r",
    "trailing newline\n",
    "  blanks  ",
    "-- comment\n/* not closed",
    "é ß 漢字 😀 \U0010ffff \ufeff \u2028 \u0085",
    "e\u0301 is not \u00e9",
    "\\.\n\\copy\n\\! true",
    "%s %(name)s {0}",
    "x" * 300_000,
    "\\x41 \\u0041 \\101",
    "COMMIT;\nBEGIN;",
]


@pytest.fixture
def rows(table: Table) -> Table:
    """A table with difficult names, types, interfaces and code, gaps between ids, one id above the sequence, and
    columns that are not served."""
    with psycopg.connect(table.url) as connection:
        for number, text in enumerate(NASTY):
            connection.execute(
                "INSERT INTO obex_dapl_functions (id, name, type, interface, code, description, logic) "
                "VALUES (%s, %s, %s, %s, %s, %s, true)",
                (1000 - 7 * number, f"n{number}{text[:90]}", text[:50] or "t", f'["{number}",  1.50]', text, "kept"),
            )
        connection.execute(
            "INSERT INTO obex_dapl_functions (id, name, type, interface, code) VALUES (5, 'bare', NULL, '', 'pass')"
        )
    return table


def served_rows(table: Table) -> list[Any]:
    with psycopg.connect(table.url) as connection:
        return connection.execute(
            "SELECT id, name, coalesce(nullif(type, ''), 'function'), coalesce(nullif(interface, ''), '[]'), code "
            "FROM obex_dapl_functions ORDER BY id"
        ).fetchall()


@pytest.fixture
def server(start_server: StartServer, rows: Table, tmp_path: Path) -> ServerProcess:
    running = start_server(
        rows.url,
        SNAPSHOT_DIR=str(tmp_path / "snapshots"),
        GATE_CODE="off",
        AVAP_INTERNAL_KEY="a key",
        SYNC_INTERVAL_SECONDS="300",
    ).wait_ready()
    running.wait_log("Control socket open")
    return running


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "definition_server", *arguments],
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        timeout=60,
    )


def from_server(server: ServerProcess, directory: Path) -> bytes:
    return _stdout(run("export", "--sql", API_KEY=KEY, PORT=str(server.port)))


def from_file(server: ServerProcess, directory: Path) -> bytes:
    return _stdout(run("export", "--sql", "--snapshot", str(directory / "last-known-good.avapsnap")))


def from_history(server: ServerProcess, directory: Path) -> bytes:
    version = server.statusz()["catalog"]["version_hash"]
    return _stdout(run("export", "--sql", "--history", version[:8], SNAPSHOT_DIR=str(directory)))


def restore(table: Table, sql: bytes) -> None:
    """Run the script as an operator does."""
    psql = shutil.which("psql")
    if psql is None:
        # One message is decoded before the script has set its encoding; psql sends each statement by itself.
        with psycopg.connect(table.url, client_encoding="UTF8") as connection:
            connection.execute(sql)
        return
    done = subprocess.run(
        [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", "-", table.url], input=sql, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def _stdout(done: subprocess.CompletedProcess[bytes]) -> bytes:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("source", sample([from_server, from_file, from_history]))
def test_a_damaged_table_gets_its_rows_back_octet_by_octet(
    server: ServerProcess, rows: Table, tmp_path: Path, source: Callable[[ServerProcess, Path], bytes]
) -> None:
    before, version = served_rows(rows), server.statusz()["catalog"]["version_hash"]
    sql = source(server, tmp_path / "snapshots")
    rows.run("DELETE FROM obex_dapl_functions WHERE id % 2 = 0")
    rows.run("UPDATE obex_dapl_functions SET code = code || ' ' WHERE id % 3 = 0")
    rows.add([("bare", None, None, "a newer duplicate"), ("extra", None, None, "pass")])
    restore(rows, sql)
    after = served_rows(rows)
    ids_known = b"(1, NULL," not in sql
    assert [row[1:] for row in sorted(after, key=lambda row: row[1])] == [
        row[1:] for row in sorted(before, key=lambda row: row[1])
    ]
    if ids_known:
        assert after == before
    with psycopg.connect(rows.url) as connection:
        [(kept,)] = connection.execute("SELECT count(*) FROM obex_dapl_functions WHERE description = 'kept'").fetchall()
        [(odd,)] = connection.execute("SELECT count(*) FROM obex_dapl_functions WHERE id % 2 = 1").fetchall()
        assert kept > 0
        assert odd >= kept
        connection.execute("INSERT INTO obex_dapl_functions (name, code) VALUES ('next', 'pass')")  # has a free id
        connection.execute("DELETE FROM obex_dapl_functions WHERE name = 'next'")
    synced = run("sync", "--json", SNAPSHOT_DIR=str(tmp_path / "snapshots"))
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert server.statusz()["catalog"]["version_hash"] == version


def test_a_lost_table_is_created_again_and_an_incomplete_script_changes_nothing(
    server: ServerProcess, rows: Table, tmp_path: Path
) -> None:
    before = served_rows(rows)
    sql = from_server(server, tmp_path).decode()
    rows.run("DROP TABLE obex_dapl_functions")
    connection = psycopg.connect(rows.url, autocommit=True)
    connection.execute(sql[: sql.index("ANALYZE restored")])
    connection.close()  # ends the script in psql; leaving the context would commit
    with psycopg.connect(rows.url) as connection:
        assert connection.execute("SELECT to_regclass('obex_dapl_functions')").fetchall() == [(None,)]
    rows.run(sql)
    assert [row[1:] for row in sorted(served_rows(rows), key=lambda row: row[1])] == [
        row[1:] for row in sorted(before, key=lambda row: row[1])
    ]


BYTECODE = (
    "CREATE TABLE avap_bytecode (id serial, command_name varchar(255) UNIQUE, bytecode bytea, "
    "source_hash varchar(64), avbc_bytecode bytea, avbc_version int)"
)
HASH = "encode(sha256(convert_to(code, 'UTF8')), 'hex')"
DAMAGE = {
    "rows": (
        "DELETE FROM avap_bytecode WHERE id % 3 = 0; UPDATE avap_bytecode SET avbc_version = 9 WHERE id % 3 = 1; "
        "UPDATE avap_bytecode SET avbc_bytecode = 'other', source_hash = 'other' WHERE id % 5 = 2; "
        "UPDATE obex_dapl_functions SET code = code || ' ' WHERE id % 2 = 0; "
        # Bytecode that the exported catalogue lacks, of exactly the code that it has.
        f"INSERT INTO avap_bytecode (command_name, bytecode, source_hash, avbc_bytecode) "
        f"SELECT name, 'kept', upper({HASH}), 'newer' FROM obex_dapl_functions WHERE name = 'bare' "
        "ON CONFLICT (command_name) DO UPDATE SET bytecode = 'kept', source_hash = excluded.source_hash, "
        "avbc_bytecode = 'newer'; "
    ),
    "tables": "DROP TABLE avap_bytecode; DROP TABLE obex_dapl_functions",
}


@pytest.mark.thorough  # starts servers
@pytest.mark.parametrize("damage", sample(DAMAGE))
def test_only_the_bytecode_of_the_catalogue_is_restored(
    start_server: StartServer, rows: Table, tmp_path: Path, damage: str
) -> None:
    rows.run(BYTECODE)
    rows.run(
        "INSERT INTO avap_bytecode (command_name, source_hash, avbc_bytecode, avbc_version) "
        f"SELECT name, {HASH}, sha256(convert_to(name, 'UTF8')), CASE WHEN id % 2 = 0 THEN id END "
        "FROM obex_dapl_functions WHERE code <> '' AND name <> 'bare'"
    )
    rows.run("INSERT INTO avap_bytecode (command_name, source_hash, avbc_bytecode) VALUES ('bare', 'of old code', 'x')")
    rows.run("INSERT INTO avap_bytecode (command_name, source_hash, avbc_bytecode) VALUES ('elsewhere', 'x', 'x')")
    server = start_server(rows.url, SNAPSHOT_DIR=str(tmp_path), GATE_CODE="off", SYNC_INTERVAL_SECONDS="300")
    server.wait_ready().wait_log("Control socket open")
    version = server.statusz()["catalog"]["version_hash"]
    done = run("export", "--sql", API_KEY=KEY, PORT=str(server.port))
    assert b"bytecode of %d commands" % (len(NASTY) - 1) in done.stderr
    for statement in DAMAGE[damage].split("; "):
        if statement:
            rows.run(statement)
    restore(rows, _stdout(done))
    synced = run("sync", "--json", SNAPSHOT_DIR=str(tmp_path))
    assert synced.returncode == 0, synced.stdout + synced.stderr
    assert server.statusz()["catalog"]["version_hash"] == version
    if damage == "rows":
        with psycopg.connect(rows.url) as connection:
            found = connection.execute(
                "SELECT bytecode, source_hash, avbc_bytecode FROM avap_bytecode WHERE command_name = 'bare'"
            ).fetchall()
            assert found == [(b"kept", "", b"newer")], "not served, and not lost"
            [(others,)] = connection.execute(
                "SELECT count(*) FROM avap_bytecode WHERE command_name = 'elsewhere'"
            ).fetchall()
            assert others == 1


OTHER_TYPES = {
    "bytea": {"name": "bytea", "type": "bytea", "interface": "bytea", "code": "bytea"},
    "an enum and jsonb": {"type": "kind", "interface": "jsonb"},
    "json and blank-padded": {"type": "character(12)", "interface": "json"},
    "ids of its own": {"id": "generated"},
    "ids of any size": {"id": "numeric"},
    "ids as text": {"id": "text"},
    "ids as floating point": {"id": "double precision"},
}


@pytest.mark.parametrize("types", sample(OTHER_TYPES))
def test_columns_of_other_types_get_their_rows_back_and_a_row_that_has_its_text_is_not_touched(
    table: Table, types: str
) -> None:
    columns = {"id": "integer", "name": "text", "type": "text", "interface": "text", "code": "text"} | OTHER_TYPES[
        types
    ]
    table.run("DROP TABLE obex_dapl_functions; CREATE TYPE kind AS ENUM ('function', 'other')")
    columns["id"] = columns["id"].replace("generated", "bigint GENERATED ALWAYS AS IDENTITY")
    table.run(
        "CREATE TABLE obex_dapl_functions (" + ", ".join(f"{name} {kind}" for name, kind in columns.items()) + ")"
    )
    wanted = [
        TableRow(1, "n1 é", "function", "[]", "\\x41 \\\\"),
        TableRow(2, "n2", "other", '["a"]', "é\r\n"),
        TableRow(3, "n3", "other", "[]", ""),
        TableRow(4, "n4", "function", "[1]", "漢" * 9),
    ]
    text = "convert_from({}, 'UTF8')".format if types == "bytea" else "{}::text".format
    rows = f"SELECT id, {text('name')}, {text('type')}, {text('interface')}, {text('code')} FROM obex_dapl_functions"
    sql = "".join(script(wanted, version_hash=""))
    with psycopg.connect(table.url, autocommit=True) as connection:
        for damage in (
            "TRUNCATE obex_dapl_functions",
            "UPDATE obex_dapl_functions SET code = NULL, type = 'other' WHERE id IN ('1', '4')",
            "DELETE FROM obex_dapl_functions WHERE id = '2'",
        ):
            connection.execute(damage)
            connection.execute(sql.encode())
            found = connection.execute(f"{rows} ORDER BY id".encode()).fetchall()
            assert [(int(row[0]), row[1], row[2].rstrip(), *row[3:]) for row in found] == [row[:5] for row in wanted]
        before = connection.execute("SELECT ctid, xmin FROM obex_dapl_functions").fetchall()
        connection.execute(sql.encode())
        assert connection.execute("SELECT ctid, xmin FROM obex_dapl_functions").fetchall() == before


COMPOUND_TYPES = {
    "a composite": ("pair", ["ROW('a, \"b\" \\ (é)\r\n', 1)", "ROW(NULL, NULL)", "ROW('', -5)"]),
    "a composite with texts that depend on settings": (
        "many",
        [
            "ROW('2026-12-31 23:59:59.5+09', '1 day 2 hours', 0.1::float8 + 0.2, '\\x00ff', '2026-12-31', ROW('x', 1))",
            "ROW('infinity', '-1 mons', 'NaN', '', '0044-03-15 BC', NULL)",
            "ROW(NULL, NULL, NULL, NULL, NULL, ROW(NULL, 2))",
        ],
    ),
    "a domain over a composite": ("known_pair", ["ROW('x', 1)", "ROW('y', 2)", "ROW(E'\t', NULL)"]),
    "the row type of another table": ("other_table", ["ROW(1, 'first')", "ROW(2, NULL)", "ROW(NULL, '{}')"]),
    "an array of composites": ("pair[]", ["ARRAY[ROW('x,y', 1)::pair, NULL]", "ARRAY[]::pair[]", "'{}'"]),
    "a range of instants": ("tstzrange", ["tstzrange('2026-01-01', '2026-02-01')", "'empty'", "tstzrange(NULL, NULL)"]),
}
COMPOUND = (
    "CREATE TYPE pair AS (word text, number int); CREATE DOMAIN known_pair AS pair; "
    "CREATE TYPE many AS (at timestamptz, lasts interval, share float8, octets bytea, day date, inner_pair pair); "
    "CREATE TABLE other_table (number int, word text); DROP TABLE obex_dapl_functions; "
)
OTHER_SETTINGS = {
    "bytea_output": "escape",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "-15",
    "TimeZone": "Asia/Tokyo",
}


@pytest.mark.parametrize("of", ["code", "interface", "name"])
@pytest.mark.parametrize("types", sample(COMPOUND_TYPES))
async def test_columns_of_composite_types_get_their_rows_back_under_any_settings_of_the_session(
    table: Table, types: str, of: str
) -> None:
    kind, values = COMPOUND_TYPES[types]
    columns = {"name": "text", "type": "text", "interface": "text", "code": "text"} | {of: kind}
    described = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
    table.run(f"{COMPOUND} CREATE TABLE obex_dapl_functions (id int PRIMARY KEY, {described})")
    for number, value in enumerate(values):
        texts = {"name": f"'n{number}'", "type": "'t'", "interface": "'[]'", "code": "'pass'"} | {of: value}
        table.run(f"INSERT INTO obex_dapl_functions VALUES ({number}, {', '.join(texts.values())})")
    table.run("CREATE TABLE before AS TABLE obex_dapl_functions")
    async with Reader(table.url) as reader:
        served = await reader.rows()
    rows = [
        TableRow(row.id, *((text or b"").decode() for text in (row.name, row.type, row.interface, row.code)))
        for row in served
    ]
    sql = "".join(script(rows, version_hash=""))
    database = urlsplit(table.url).path[1:]
    for setting, value in OTHER_SETTINGS.items():
        table.run(f"ALTER DATABASE \"{database}\" SET {setting} = '{value}'")
    for damage in (
        "TRUNCATE obex_dapl_functions",
        f"UPDATE obex_dapl_functions SET {of} = (SELECT {of} FROM before WHERE id = 2) WHERE id = 1",
        "DELETE FROM obex_dapl_functions WHERE id = 0",
        "SELECT",
    ):
        table.run(damage)
        restore(table, sql.encode())
        async with Reader(table.url) as reader:
            assert await reader.rows() == served
        with psycopg.connect(table.url) as connection:
            same = (
                f"SELECT count(*) FROM obex_dapl_functions AS now JOIN before USING (id) WHERE now.{of} = before.{of}"
            )
            [(found,)] = connection.execute(same.encode()).fetchall()
            assert found == len(values)


THREE = [
    TableRow(1, "a", "function", "[]", "x = 1"),
    TableRow(2, "b", "t", "[]", "y"),
    TableRow(3, "c", "t", "[]", "z"),
]


def held_rows(connection: psycopg.Connection[Any]) -> list[Any]:
    query = "SELECT id, name, type, interface, code FROM obex_dapl_functions ORDER BY id, name"
    return connection.execute(query.encode()).fetchall()


TRIGGER = (
    "CREATE FUNCTION meddle() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {} END$$; CREATE TRIGGER meddles BEFORE "
    "INSERT OR UPDATE ON obex_dapl_functions FOR EACH ROW EXECUTE FUNCTION meddle()"
)
OBSTACLES = {
    "a trigger that changes rows": TRIGGER.format("NEW.code := NEW.code || '#'; RETURN NEW;"),
    "a trigger that skips rows": TRIGGER.format("RETURN NULL;"),
    "a rule that keeps rows": "CREATE RULE kept AS ON DELETE TO obex_dapl_functions DO INSTEAD NOTHING",
    "code made of something else": (
        "ALTER TABLE obex_dapl_functions DROP code; "
        "ALTER TABLE obex_dapl_functions ADD code TEXT GENERATED ALWAYS AS ('of ' || name) STORED"
    ),
}


@pytest.mark.parametrize("obstacle", sample(OBSTACLES))
def test_a_script_whose_rows_the_table_refuses_fails_and_changes_nothing(table: Table, obstacle: str) -> None:
    table.run("INSERT INTO obex_dapl_functions (id, name, code) VALUES (1, 'a', 'other'), (9, 'extra', 'pass')")
    table.run(OBSTACLES[obstacle])
    with psycopg.connect(table.url, autocommit=True) as connection:
        before = held_rows(connection)
        with pytest.raises(psycopg.errors.RaiseException, match=r"cannot be restored: \d rows of the catalogue"):
            connection.execute("".join(script(THREE, version_hash="")).encode())
        connection.rollback()
        assert held_rows(connection) == before


def test_a_generated_column_with_equal_values_does_not_stop_the_script(table: Table) -> None:
    table.run("ALTER TABLE obex_dapl_functions DROP type")
    table.run("ALTER TABLE obex_dapl_functions ADD type TEXT GENERATED ALWAYS AS ('function') STORED")
    wanted = [row._replace(type="function") for row in THREE]
    table.run("INSERT INTO obex_dapl_functions (id, name, code) VALUES (1, 'a', 'other'), (9, 'extra', 'pass')")
    with psycopg.connect(table.url, autocommit=True) as connection:
        connection.execute("".join(script(wanted, version_hash="")).encode())
        assert held_rows(connection) == [row[:5] for row in wanted]


def test_names_that_share_an_id_each_get_their_own_content(table: Table) -> None:
    """Without a primary key ids need not be unique, and a server serves both names."""
    table.run("ALTER TABLE obex_dapl_functions DROP CONSTRAINT obex_dapl_functions_pkey")
    wanted = [THREE[0], THREE[1]._replace(id=1)]
    table.run("INSERT INTO obex_dapl_functions (id, name, code) VALUES (1, 'a', 'y'), (1, 'b', 'x = 1'), (1, 'c', 'z')")
    with psycopg.connect(table.url, autocommit=True) as connection:
        connection.execute("".join(script(wanted, version_hash="")).encode())
        assert held_rows(connection) == [row[:5] for row in wanted]


def test_a_database_that_was_made_read_only_is_written_by_the_script(table: Table) -> None:
    with psycopg.connect(table.url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = on")
        connection.execute("".join(script(THREE, version_hash="")).encode())
        assert held_rows(connection) == [row[:5] for row in THREE]


def test_a_table_of_another_schema_than_the_search_path_is_named(table: Table) -> None:
    table.run("CREATE SCHEMA avap; ALTER TABLE obex_dapl_functions SET SCHEMA avap")
    with psycopg.connect(table.url, autocommit=True) as connection:
        noticed: list[str] = []
        connection.add_notice_handler(lambda notice: noticed.append(notice.message_primary or ""))
        connection.execute("".join(script(THREE, version_hash="")).encode())
        assert any("search_path lacks avap" in text for text in noticed)


@pytest.mark.parametrize("encoding", sample(["LATIN1", "SQL_ASCII"]))
def test_databases_of_other_encodings_get_their_rows_back(postgres: DatabaseServer, encoding: str) -> None:
    name = f"restored_{encoding.lower()}_{os.getpid()}"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'".encode())
    try:
        table = Table(postgres.url.rpartition("/")[0] + f"/{name}")
        table.run(f"ALTER DATABASE {name} SET standard_conforming_strings = off")
        table.run(f"ALTER DATABASE {name} SET client_encoding = 'SQL_ASCII'")
        wanted = [TableRow(1, "é", "t", "[]", "\\'é\r\n \\"), TableRow(2, "n", "", "[]", "x")]
        table.run("INSERT INTO obex_dapl_functions (id, name, code) VALUES (1, 'old', 'x'), (2, 'n', 'y')")
        restore(table, "".join(script(wanted, version_hash="")).encode())
        with psycopg.connect(table.url, client_encoding="UTF8") as connection:
            columns = "id, convert_to(name, 'UTF8'), convert_to(code, 'UTF8')"
            found = connection.execute(f"SELECT {columns} FROM obex_dapl_functions ORDER BY id".encode()).fetchall()
        assert found == [(row.id, row.name.encode(), row.code.encode()) for row in wanted]
    finally:
        drop_database(postgres.url, name)


def test_every_literal_means_its_text_to_postgresql(table: Table) -> None:
    every = [*NASTY, "".join(map(chr, range(1, 0x3000))), "".join(map(chr, range(0x1F300, 0x1F700)))]
    with psycopg.connect(table.url) as connection:
        for text in every:
            assert connection.execute(f"SELECT {literal(text)}".encode()).fetchall() == [(text,)]


@pytest.mark.thorough  # takes seconds
def test_a_catalogue_that_cannot_be_exported_is_refused_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(b"x" * 1000)
    for arguments, code in (
        (("--snapshot", str(tmp_path / "damaged"), "--sql"), 1),
        (("--snapshot", str(tmp_path / "none"), "--sql"), 1),
        (("--history", "00000000", "--sql", "--socket", str(tmp_path / "none")), 69),
        (("--snapshot", "x", "--history", "y", "--sql"), 2),
        ((), 2),
    ):
        done = run("export", *arguments)
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        assert done.stdout == b""
