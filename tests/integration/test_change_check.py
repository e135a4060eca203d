"""The change check of `PostgresSource` notices every change of what would be served, in a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import psycopg
import pytest
from tests.integration.reader import COLUMNS, Reader, empty
from tests.support.logs import captured_logs
from tests.support.table import Table

from definition_server.catalog.definition import Row

# -- every change is noticed -------------------------------------------------------------------------------------------

PARTITIONED = (
    "DROP TABLE obex_dapl_functions; "
    f"CREATE TABLE obex_dapl_functions ({COLUMNS}) PARTITION BY LIST (id); "
    "CREATE TABLE first PARTITION OF obex_dapl_functions FOR VALUES IN (1); "
    "CREATE TABLE second (LIKE first); "
    "INSERT INTO first VALUES (1, 'if', NULL, NULL, 'first')"
)
INHERITED = (
    f"DROP TABLE obex_dapl_functions; CREATE TABLE obex_dapl_functions ({COLUMNS}); "
    "CREATE TABLE first () INHERITS (obex_dapl_functions); CREATE TABLE second (LIKE first); "
    "INSERT INTO first VALUES (1, 'if', NULL, NULL, 'first')"
)
ENUM = (
    "DROP TABLE obex_dapl_functions; CREATE TYPE word AS ENUM ('first', 'second'); {}"
    "CREATE TABLE obex_dapl_functions (id int, name text, type text, interface text, code {}); "
    "INSERT INTO obex_dapl_functions VALUES (1, 'if', NULL, NULL, 'first')"
)
RENAME = "ALTER TYPE word RENAME VALUE 'first' TO 'changed'"

UNSEEN: dict[str, tuple[str, str]] = {
    "a partition takes the place of another": (
        PARTITIONED,
        "INSERT INTO second SELECT 1, 'if', NULL, NULL, 'changed'; "
        "ALTER TABLE obex_dapl_functions DETACH PARTITION first; "
        "ALTER TABLE obex_dapl_functions ATTACH PARTITION second FOR VALUES IN (1)",
    ),
    "a partition of a partition takes the place of another": (
        f"DROP TABLE obex_dapl_functions; CREATE TABLE obex_dapl_functions ({COLUMNS}) PARTITION BY LIST (id); "
        "CREATE TABLE middle PARTITION OF obex_dapl_functions FOR VALUES IN (1) PARTITION BY LIST (name); "
        "CREATE TABLE first PARTITION OF middle FOR VALUES IN ('if'); CREATE TABLE second (LIKE first); "
        "INSERT INTO first VALUES (1, 'if', NULL, NULL, 'first')",
        "INSERT INTO second SELECT 1, 'if', NULL, NULL, 'changed'; "
        "ALTER TABLE middle DETACH PARTITION first; ALTER TABLE middle ATTACH PARTITION second FOR VALUES IN ('if')",
    ),
    "an inheriting table takes the place of another": (
        INHERITED,
        "INSERT INTO second SELECT 1, 'if', NULL, NULL, 'changed'; "
        "ALTER TABLE first NO INHERIT obex_dapl_functions; ALTER TABLE second INHERIT obex_dapl_functions",
    ),
    "a column of a partition is added again with a default": (
        INHERITED,
        "ALTER TABLE obex_dapl_functions DROP code; ALTER TABLE obex_dapl_functions ADD code text DEFAULT 'changed'",
    ),
    "an enum label gets another name": (ENUM.format("", "word"), RENAME),
    "an enum label below a domain gets another name": (
        ENUM.format("CREATE DOMAIN term AS word; CREATE DOMAIN phrase AS term; ", "phrase"), RENAME,
    ),
    "an enum gets a cast to text of its own": (
        ENUM.format("", "word"),
        "CREATE FUNCTION spelled(word) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'changed' $$; "
        "CREATE CAST (word AS text) WITH FUNCTION spelled(word)",
    ),
    "the function behind a cast to text is replaced": (
        ENUM.format("", "word")
        + "; CREATE FUNCTION spelled(word) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'first' $$; "
        "CREATE CAST (word AS text) WITH FUNCTION spelled(word)",
        "CREATE OR REPLACE FUNCTION spelled(word) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'changed' $$",
    ),
    "a column of a composite type": (
        "DROP TABLE obex_dapl_functions; CREATE TYPE word AS ENUM ('first', 'second'); "
        "CREATE TYPE pair AS (a word, b int); "
        "CREATE TABLE obex_dapl_functions (id int, name text, type text, interface text, code pair); "
        "INSERT INTO obex_dapl_functions VALUES (1, 'if', NULL, NULL, ('first', 1))",
        RENAME,
    ),
    "a column whose text names another object": (
        "CREATE TABLE named_first (); DROP TABLE obex_dapl_functions; "
        "CREATE TABLE obex_dapl_functions (id int, name text, type text, interface text, code regclass); "
        "INSERT INTO obex_dapl_functions VALUES (1, 'if', NULL, NULL, 'named_first')",
        "ALTER TABLE named_first RENAME TO named_changed",
    ),
    "a generated column": (
        "DROP TABLE obex_dapl_functions; CREATE TABLE obex_dapl_functions (id int, name text, type text, "
        "interface text, word text, code text GENERATED ALWAYS AS ('is ' || word) STORED); "
        "INSERT INTO obex_dapl_functions VALUES (1, 'if', NULL, NULL, 'first')",
        "UPDATE obex_dapl_functions SET word = 'changed'",
    ),
    "a generated column that gets another expression": (
        "DROP TABLE obex_dapl_functions; CREATE TABLE obex_dapl_functions (id int, name text, type text, "
        "interface text, word text, code text GENERATED ALWAYS AS ('is ' || word) STORED); "
        "INSERT INTO obex_dapl_functions VALUES (1, 'if', NULL, NULL, 'first')",
        "ALTER TABLE obex_dapl_functions DROP code; "
        "ALTER TABLE obex_dapl_functions ADD code text GENERATED ALWAYS AS ('changed ' || word) STORED",
    ),
    "a view over a table": (
        f"DROP TABLE obex_dapl_functions; CREATE TABLE below ({COLUMNS}); "
        "INSERT INTO below VALUES (1, 'if', NULL, NULL, 'first'); "
        "CREATE VIEW obex_dapl_functions AS SELECT * FROM below",
        "UPDATE below SET code = 'changed'",
    ),
    "a view that is replaced": (
        f"DROP TABLE obex_dapl_functions; CREATE TABLE below ({COLUMNS}); "
        "INSERT INTO below VALUES (1, 'if', NULL, NULL, 'first'); "
        "CREATE VIEW obex_dapl_functions AS SELECT * FROM below",
        "CREATE OR REPLACE VIEW obex_dapl_functions AS SELECT id, name, type, interface, 'changed' AS code FROM below",
    ),
    "a materialized view that is refreshed": (
        f"DROP TABLE obex_dapl_functions; CREATE TABLE below ({COLUMNS}); "
        "INSERT INTO below VALUES (1, 'if', NULL, NULL, 'first'); "
        "CREATE MATERIALIZED VIEW obex_dapl_functions AS SELECT * FROM below",
        "UPDATE below SET code = 'changed'; REFRESH MATERIALIZED VIEW obex_dapl_functions",
    ),
    "a table of that name in a schema that is searched earlier": (
        "UPDATE obex_dapl_functions SET code = 'first'; "
        "INSERT INTO obex_dapl_functions (name, code) VALUES ('if', 'first'); "
        "CREATE SCHEMA IF NOT EXISTS AUTHORIZATION CURRENT_USER",
        'SET search_path TO "$user"; CREATE TABLE obex_dapl_functions (LIKE public.obex_dapl_functions); '
        "INSERT INTO obex_dapl_functions (id, name, code) VALUES (1, 'if', 'changed')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", UNSEEN)
async def test_a_change_that_row_versions_do_not_show_is_noticed(table: Table, change: str) -> None:
    before, statement = UNSEEN[change]
    table.run(before)
    async with Reader(table.url) as reader:
        assert b"first" in ((await reader.codes())[b"if"] or b"")
        fingerprint = await reader.fingerprint()
        table.run(statement)
        assert await reader.fingerprint() != fingerprint
        assert b"changed" in ((await reader.codes())[b"if"] or b"")


async def test_a_change_of_rows_at_the_same_places_by_the_same_transaction_is_noticed(table: Table) -> None:
    """Both partitions get their only row from one transaction, so that ``ctid`` and ``xmin`` are the same."""
    table.run(PARTITIONED)
    table.run("TRUNCATE first; INSERT INTO first VALUES (1, 'if', NULL, NULL, 'first')")
    with psycopg.connect(table.url) as connection:
        connection.execute("TRUNCATE first; INSERT INTO first VALUES (1, 'if', NULL, NULL, 'first')")
        connection.execute("INSERT INTO second VALUES (1, 'if', NULL, NULL, 'changed')")
    async with Reader(table.url) as reader:
        fingerprint = await reader.fingerprint()
        table.run("ALTER TABLE obex_dapl_functions DETACH PARTITION first")
        table.run("ALTER TABLE obex_dapl_functions ATTACH PARTITION second FOR VALUES IN (1)")
        assert await reader.fingerprint() != fingerprint


@contextmanager
def file_of_the_database(table: Table) -> Iterator[str]:
    """The path of a file on the machine of the database, which may be a container."""
    with psycopg.connect(table.url, autocommit=True) as connection:
        path: str = connection.execute("SELECT current_setting('data_directory') || '/rows'").fetchone()[0]
        try:
            yield path
        finally:
            connection.execute(f"COPY (SELECT) TO PROGRAM 'rm -f {path}'")


@pytest.mark.parametrize("below", [False, True])
async def test_all_rows_of_a_foreign_table_are_read_in_every_cycle(table: Table, below: bool) -> None:
    """A foreign table has no row versions: ``xmin`` is always 0."""

    def write(code: str) -> None:
        table.run(f"COPY (SELECT 1, 'if', 'function', '[]', '{code}') TO '{file}'")

    with file_of_the_database(table) as file, captured_logs() as lines:
        write("first")
        table.run("CREATE EXTENSION IF NOT EXISTS file_fdw")
        table.run("CREATE SERVER files FOREIGN DATA WRAPPER file_fdw; DROP TABLE obex_dapl_functions")
        name = "first" if below else "obex_dapl_functions"
        table.run(f"CREATE FOREIGN TABLE {name} ({COLUMNS}) SERVER files OPTIONS (filename '{file}')")
        if below:
            table.run(f"CREATE TABLE obex_dapl_functions ({COLUMNS})")
            table.run("ALTER FOREIGN TABLE first INHERIT obex_dapl_functions")
        async with Reader(table.url) as reader:
            assert await reader.codes() == {b"if": b"first"}
            fingerprint = await reader.fingerprint()
            write("other")
            assert await reader.fingerprint() != fingerprint
            assert await reader.codes() == {b"if": b"other"}
    said = [line for line in lines if line["event"] == "The table is read whole in every cycle"]
    assert len(said) == 1
    assert "foreign table" in said[0]["reason"]


async def test_all_rows_of_a_foreign_table_in_another_postgresql_are_read_in_every_cycle(table: Table) -> None:
    parts = urlsplit(table.url)
    table.run("ALTER TABLE obex_dapl_functions RENAME TO there; INSERT INTO there (name, code) VALUES ('if', 'first')")
    with psycopg.connect(table.url) as connection:  # the port inside a container differs
        port: str = connection.execute("SELECT current_setting('port')").fetchone()[0]
    host = f"host '127.0.0.1', port '{port}'" if parts.port else "host ''"
    table.run("CREATE EXTENSION postgres_fdw")
    table.run(f"CREATE SERVER other FOREIGN DATA WRAPPER postgres_fdw OPTIONS ({host}, dbname '{parts.path[1:]}')")
    table.run(
        f"CREATE USER MAPPING FOR CURRENT_USER SERVER other OPTIONS (user '{parts.username}', "
        f"password '{parts.password or ''}'); "
        f"CREATE FOREIGN TABLE obex_dapl_functions ({COLUMNS}) SERVER other OPTIONS (table_name 'there')"
    )
    async with Reader(table.url) as reader:
        assert await reader.codes() == {b"if": b"first"}
        fingerprint = await reader.fingerprint()
        table.run("UPDATE there SET code = 'changed'")
        assert await reader.fingerprint() != fingerprint
        assert await reader.codes() == {b"if": b"changed"}


async def test_each_reason_for_reading_the_whole_table_is_logged_once(table: Table) -> None:
    table.run("ALTER TABLE obex_dapl_functions RENAME TO below")
    table.run("CREATE VIEW obex_dapl_functions AS SELECT * FROM below")
    with captured_logs() as lines:
        async with Reader(table.url) as reader:
            for _ in range(3):
                await reader.fingerprint()
            table.run("DROP VIEW obex_dapl_functions; ALTER TABLE below RENAME TO obex_dapl_functions")
            assert await reader.fingerprint() == await reader.fingerprint()
    said = [line["reason"] for line in lines if line["event"] == "The table is read whole in every cycle"]
    assert said == ["obex_dapl_functions: it is a view"]


async def test_an_unchanged_table_has_one_fingerprint(table: Table) -> None:
    table.add_commands(10)
    table.run("ANALYZE obex_dapl_functions; CREATE TABLE of_no_matter (); CREATE TYPE of_no_matter_too AS ENUM ('a')")
    async with Reader(table.url) as reader:
        fingerprint = await reader.fingerprint()
        table.run("VACUUM ANALYZE obex_dapl_functions")
        table.run("ALTER TYPE of_no_matter_too RENAME VALUE 'a' TO 'b'")
        assert await reader.fingerprint() == fingerprint


# -- settings that change texts ----------------------------------------------------------------------------------------

SETTINGS = {
    "bytea_output": "escape",
    "DateStyle": "German, DMY",
    "IntervalStyle": "iso_8601",
    "extra_float_digits": "-15",
    "TimeZone": "Asia/Tokyo",
    "row_security": "on",
}


@contextmanager
def altered(table: Table, of: str) -> Iterator[None]:
    """The settings above, of the role or of the database."""
    name = urlsplit(table.url).path[1:]
    owner = f'ROLE CURRENT_USER IN DATABASE "{name}"' if of == "role" else f'DATABASE "{name}"'
    for setting, value in SETTINGS.items():
        table.run(f"ALTER {owner} SET {setting} = '{value}'")
    try:
        yield
    finally:
        table.run(f"ALTER {owner} RESET ALL")


@pytest.mark.parametrize("of", ["role", "database"])
async def test_settings_of_role_and_database_change_no_text(table: Table, of: str) -> None:
    empty(table, "id int, name bytea, type date, interface interval, code float8, more timestamptz")
    table.run(
        "INSERT INTO obex_dapl_functions VALUES (1, 'x\\\\', '2026-12-31', '1 day 2 hours', 0.1::float8 + 0.2, now())"
    )
    async with Reader(table.url) as reader:
        before = await reader.rows()
    with altered(table, of):
        async with Reader(table.url) as reader:
            assert await reader.rows() == before
    assert before == [Row(1, b"x\\", b"2026-12-31", b"1 day 02:00:00", b"0.30000000000000004")]
