"""A transaction that replaces all rows at once (TRUNCATE, a rewrite, another table) and that a reading waits for: the
reading gets the rows after it. A snapshot that is older than such a transaction has no rows at all (PostgreSQL manual,
"Caveats" of concurrency control).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from tests.integration.reader import COLUMNS, Reader, empty
from tests.support.polling import until
from tests.support.table import Table

from definition_server.control_plane.postgres import _Reading
from definition_server.control_plane.table_reading import TABLE

FIRST = f"INSERT INTO {TABLE} VALUES (1, 'if', 'function', '[]', 'first')"
AFTER = "VALUES (1, 'if', 'function', '[]', 'after')"

EMPTY_BYTECODE = (
    "CREATE TABLE avap_bytecode (command_name text UNIQUE, source_hash text, avbc_bytecode bytea, avbc_version int)"
)

REPLACED = {
    # before, and the transaction
    "truncated": (FIRST, f"TRUNCATE {TABLE}; INSERT INTO {TABLE} {AFTER}"),
    "rewritten by ALTER TABLE": (
        FIRST,
        f"ALTER TABLE {TABLE} ALTER id TYPE bigint, ALTER code TYPE text USING 'after'",
    ),
    "dropped and created": (
        FIRST,
        f"DROP TABLE {TABLE}; CREATE TABLE {TABLE} ({COLUMNS}); INSERT INTO {TABLE} {AFTER}",
    ),
    "another table": (
        f"{FIRST}; CREATE TABLE next (LIKE {TABLE})",
        f"ALTER TABLE {TABLE} RENAME TO last; ALTER TABLE next RENAME TO {TABLE}; INSERT INTO {TABLE} {AFTER}",
    ),
    "another table of a view": (
        f"{FIRST}; ALTER TABLE {TABLE} RENAME TO last; CREATE TABLE next (LIKE last); "
        f"CREATE VIEW {TABLE} AS SELECT * FROM last",
        f"INSERT INTO next {AFTER}; CREATE OR REPLACE VIEW {TABLE} AS SELECT * FROM next",
    ),
    "truncated below a view": (
        f"{FIRST}; ALTER TABLE {TABLE} RENAME TO rows; CREATE VIEW {TABLE} AS SELECT * FROM rows",
        f"TRUNCATE rows; INSERT INTO rows {AFTER}",
    ),
    "another partition": (
        f"DROP TABLE {TABLE}; CREATE TABLE {TABLE} ({COLUMNS}) PARTITION BY LIST (id); CREATE TABLE part PARTITION OF "
        f"{TABLE} FOR VALUES IN (1); CREATE TABLE next (LIKE part); {FIRST}",
        f"ALTER TABLE {TABLE} DETACH PARTITION part; INSERT INTO next {AFTER}; "
        f"ALTER TABLE {TABLE} ATTACH PARTITION next FOR VALUES IN (1)",
    ),
    "a truncated partition": (
        f"DROP TABLE {TABLE}; CREATE TABLE {TABLE} ({COLUMNS}) PARTITION BY LIST (id); CREATE TABLE part PARTITION OF "
        f"{TABLE} FOR VALUES IN (1); {FIRST}",
        f"TRUNCATE part; INSERT INTO part {AFTER}",
    ),
    "a truncated child": (
        f"CREATE TABLE child () INHERITS ({TABLE}); INSERT INTO child VALUES (1, 'if', '', '', 'first')",
        f"TRUNCATE child; INSERT INTO child {AFTER}",
    ),
    "a materialized view": (
        f"ALTER TABLE {TABLE} RENAME TO rows; INSERT INTO rows VALUES (1, 'if', 'function', '[]', 'first'); "
        f"CREATE MATERIALIZED VIEW {TABLE} AS SELECT * FROM rows",
        f"UPDATE rows SET code = 'after'; REFRESH MATERIALIZED VIEW {TABLE}",
    ),
    "another materialized view beside a table of bytecode": (
        f"ALTER TABLE {TABLE} RENAME TO rows; INSERT INTO rows VALUES (1, 'if', 'function', '[]', 'first'); "
        f"CREATE MATERIALIZED VIEW {TABLE} AS SELECT * FROM rows; {EMPTY_BYTECODE}",
        f"UPDATE rows SET code = 'after'; DROP MATERIALIZED VIEW {TABLE}; "
        f"CREATE MATERIALIZED VIEW {TABLE} AS SELECT * FROM rows",
    ),
}  # fmt: skip


WAITING = (
    "SELECT FROM pg_locks JOIN pg_database d ON d.oid = database WHERE NOT granted AND datname = current_database()"
)


@asynccontextmanager
async def waited_for(table: Table, statements: str, reading: Any) -> AsyncIterator[asyncio.Task[Any]]:
    """``reading``, as a task that waits for a transaction of ``statements``, which then ends."""
    with psycopg.connect(table.url) as writer, psycopg.connect(table.url, autocommit=True) as watcher:
        writer.execute(statements)  # type: ignore[arg-type]
        task = asyncio.create_task(reading)

        def waits() -> bool:
            return bool(watcher.execute(WAITING).fetchall())

        await asyncio.to_thread(until, waits, "the reading waits")
        assert not task.done()
    yield task


@pytest.mark.parametrize("connected", [False, True], ids=["first reading", "later reading"])
@pytest.mark.parametrize("how", REPLACED)
async def test_a_reading_that_waits_until_all_rows_are_replaced_gets_the_new_rows(
    table: Table, how: str, connected: bool
) -> None:
    before, statements = REPLACED[how]
    empty(table)
    table.run(before)
    async with Reader(table.url) as reader:
        if connected:
            assert await reader.codes() == {b"if": b"first"}
        async with waited_for(table, statements, reader.codes()) as reading:
            assert await reading == {b"if": b"after"}


BYTECODE = (
    EMPTY_BYTECODE,
    "INSERT INTO avap_bytecode SELECT name, encode(sha256(code::bytea), 'hex'), 'octets', 3 FROM obex_dapl_functions",
)


@pytest.mark.parametrize("connected", [False, True], ids=["first reading", "later reading"])
async def test_a_reading_that_waits_until_all_bytecode_is_replaced_gets_the_new_bytecode(
    table: Table, connected: bool
) -> None:
    table.run("INSERT INTO obex_dapl_functions (name, code) VALUES ('if', 'first')")
    for statement in BYTECODE:
        table.run(statement)
    async with Reader(table.url) as reader:
        if connected:
            assert [row.avbc_code for row in await reader.rows()] == [b"octets"]
        replace = f"TRUNCATE avap_bytecode; {BYTECODE[1].replace('octets', 'others')}"
        async with waited_for(table, replace, reader.rows()) as reading:
            assert [row.avbc_code for row in await reading] == [b"others"]


async def test_a_reading_that_waits_until_bytecode_that_cannot_be_locked_is_replaced_gets_the_new_bytecode(
    table: Table,
) -> None:
    table.run("INSERT INTO obex_dapl_functions (name, code) VALUES ('if', 'first')")
    for statement in BYTECODE:
        table.run(statement)
    table.run("ALTER TABLE avap_bytecode RENAME TO compiled")
    view = (
        "CREATE MATERIALIZED VIEW avap_bytecode AS SELECT * FROM compiled; "
        "CREATE UNIQUE INDEX ON avap_bytecode (command_name)"
    )
    table.run(view)
    async with Reader(table.url) as reader:
        assert [row.avbc_code for row in await reader.rows()] == [b"octets"]
        replace = f"UPDATE compiled SET avbc_bytecode = 'others'; DROP MATERIALIZED VIEW avap_bytecode; {view}"
        async with waited_for(table, replace, reader.rows()) as reading:
            assert [row.avbc_code for row in await reading] == [b"others"]


async def test_a_table_of_bytecode_that_is_created_after_the_snapshot_belongs_to_the_next_reading(
    table: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_meanwhile(connection: Any, *_: object) -> Any:
        for statement in statements:
            table.run(statement)
        statements.clear()
        return row(connection, *_)

    row, statements = _Reading._row, list(BYTECODE)
    monkeypatch.setattr(_Reading, "_row", create_meanwhile)
    table.run("INSERT INTO obex_dapl_functions (name, code) VALUES ('if', 'first')")
    async with Reader(table.url) as reader:
        assert [row.avbc_code for row in await reader.rows()] == [None]
        assert not statements
        assert [row.avbc_code for row in await reader.rows()] == [b"octets"]
