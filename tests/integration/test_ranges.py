"""If little of the table changed, only the rows of the changed ranges are read. The catalogue built from these rows and
the previous snapshot equals the catalogue of a reading of all rows, in a real PostgreSQL and after any statements.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from tests.integration.reader import COLUMNS, empty
from tests.support.table import Table

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.postgres import PostgresSource
from definition_server.control_plane.source import ReadLimits, SourceError
from definition_server.control_plane.table_reader import ReadTable, TableReader
from definition_server.control_plane.table_reading import runs

ROWS = 1500
"""At a row or two in a block, enough for many ranges."""


def fill(table: Table, more: str = "WITH (fillfactor=20, autovacuum_enabled=false)") -> Table:
    empty(table, COLUMNS, more)
    table.run(
        "INSERT INTO obex_dapl_functions SELECT i, 'command' || i, 'function', '[]', repeat(md5(i::text), 25) "
        f"FROM generate_series(1, {ROWS}) AS i"
    )
    return table


class Master:
    """A reader that reads the ranges that changed, and one that always reads all rows."""

    def __init__(
        self, url: str, limits: ReadLimits | None = None, *, on_change: Callable[[], None] | None = None
    ) -> None:
        self.sources = [PostgresSource(url, connect_timeout=5, statement_timeout=30, limits=limits) for _ in range(2)]
        self.background = Background()
        self.built = b""
        self.reader = TableReader(self.sources[0], self.background, on_change=on_change)
        self.whole = TableReader(self.sources[1], self.background)

    async def __aenter__(self) -> Master:
        return self

    async def __aexit__(self, *error: object) -> None:
        for source in self.sources:
            await source.close()
        self.background.close()

    async def read(self) -> int | None:
        """Read the changed ranges, and compare the result with a reading of all rows. Returns the ranges that were
        read, or None if all rows were read."""
        found = await self.reader.read(None, serving=True)
        assert found is not None
        octets = self.octets(found)
        whole = await self.whole.read(None, serving=True, unconditional=True)
        assert whole is not None
        assert octets == self.octets(whole)
        assert found.builder.findings.source_rows == whole.builder.findings.source_rows
        assert found.builder.findings.unserved == whole.builder.findings.unserved
        assert found.builder.faults() == whole.builder.faults()
        await self.reader.remember(found, [None, Snapshot(octets)])
        self.built = octets
        return found.ranges_read

    @staticmethod
    def octets(table: ReadTable) -> bytes:
        """The catalogue built from ``table``."""
        return table.builder.build(generation=1, created_at_ns=1).to_bytes()


STATEMENTS = (
    "UPDATE obex_dapl_functions SET code = md5(random()::text) WHERE id = {a}",
    "UPDATE obex_dapl_functions SET code = repeat(md5(random()::text), 300) WHERE id = {a}",
    "UPDATE obex_dapl_functions SET id = id + 10000 WHERE id = {a}",
    "UPDATE obex_dapl_functions SET name = 'command{b}' WHERE id = {a}",
    "UPDATE obex_dapl_functions SET name = 'other' || id WHERE id = {a}",
    "UPDATE obex_dapl_functions SET code = NULL WHERE id = {a}",
    "UPDATE obex_dapl_functions SET name = NULL WHERE id = {a}",
    "DELETE FROM obex_dapl_functions WHERE id BETWEEN {a} AND {a} + 5",
    "INSERT INTO obex_dapl_functions SELECT max(id) + 1, 'command{b}', NULL, NULL, 'new' FROM obex_dapl_functions",
    "DELETE FROM obex_dapl_functions WHERE id > {rows}",
    "VACUUM obex_dapl_functions",
    "UPDATE obex_dapl_functions SET code = code WHERE id = {a}",
)


@pytest.mark.parametrize("seed", range(2))
async def test_a_reading_of_ranges_after_any_statements_equals_a_full_reading(table: Table, seed: int) -> None:
    random = Random(seed)
    fill(table)
    parts = 0
    async with Master(table.url) as master:
        assert await master.read() is None
        for step in range(15):
            for _ in range(random.randrange(1, 4)):
                a, b = random.randrange(ROWS), random.randrange(ROWS)
                table.run(random.choice(STATEMENTS).format(a=a, b=b, rows=ROWS))
            table.run(
                f"UPDATE obex_dapl_functions SET code = 'step {step}' WHERE id = (SELECT min(id) FROM "
                "obex_dapl_functions)"
            )
            parts += await master.read() is not None
    assert parts >= 5, "most readings were of some ranges"


async def test_one_changed_row_causes_a_reading_of_few_ranges(table: Table) -> None:
    fill(table)
    async with Master(table.url) as master:
        assert await master.read() is None
        table.run("UPDATE obex_dapl_functions SET code = 'changed' WHERE id = 700")
        ranges = await master.read()
        assert ranges is not None
        assert 1 <= ranges <= 2


@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE obex_dapl_functions ADD more int DEFAULT 7",
        "VACUUM FULL obex_dapl_functions",
        "UPDATE obex_dapl_functions SET code = 'changed'",
        "TRUNCATE obex_dapl_functions",
        "CREATE TABLE child () INHERITS (obex_dapl_functions); INSERT INTO child VALUES (7, 'child', '', '', 'code')",
    ],
)
async def test_all_rows_are_read_if_many_rows_changed(table: Table, statement: str) -> None:
    fill(table)
    async with Master(table.url) as master:
        assert await master.read() is None
        table.run(statement)
        assert await master.read() is None


BYTECODE = (
    "CREATE TABLE avap_bytecode (command_name text UNIQUE, source_hash text, avbc_bytecode bytea, avbc_version int); "
    "INSERT INTO avap_bytecode SELECT name, encode(sha256(code::bytea), 'hex'), 'first', 1 FROM obex_dapl_functions"
)


@pytest.mark.parametrize(
    ("before", "statement"),
    [
        (
            "CREATE TYPE kind AS ENUM ('function'); "
            "ALTER TABLE obex_dapl_functions ALTER type TYPE kind USING type::kind",
            "ALTER TYPE kind RENAME VALUE 'function' TO 'procedure'",
        ),
        ("", "ALTER TABLE obex_dapl_functions DROP type, ADD type text DEFAULT 'procedure'"),
        (
            "CREATE TABLE other (LIKE obex_dapl_functions) WITH (fillfactor=20); "
            "INSERT INTO other SELECT id, name, 'procedure', interface, code FROM obex_dapl_functions",
            "ALTER TABLE obex_dapl_functions RENAME TO old; ALTER TABLE other RENAME TO obex_dapl_functions",
        ),
        (
            "",
            "ALTER TABLE obex_dapl_functions RENAME TO old; "
            "CREATE VIEW obex_dapl_functions AS SELECT * FROM old WHERE id < 700",
        ),
        (BYTECODE, "UPDATE avap_bytecode SET avbc_bytecode = 'second' WHERE command_name = 'command7'"),
        (BYTECODE, "DROP TABLE avap_bytecode"),
        ("", BYTECODE),
    ],
    ids=[
        "enum label",
        "default",
        "another table",
        "view",
        "bytecode",
        "no more bytecode",
        "bytecode for the first time",
    ],
)
async def test_all_rows_are_read_if_something_other_than_rows_changed(
    table: Table, before: str, statement: str
) -> None:
    fill(table)
    for each in before, "UPDATE obex_dapl_functions SET code = 'changed' WHERE id = 700":
        table.run(each)
    async with Master(table.url) as master:
        assert await master.read() is None
        octets = master.built
        # One row changes as well, so that a reading by ranges has a reason.
        table.run(f"UPDATE obex_dapl_functions SET code = 'changed' WHERE id = 700; {statement}")
        assert await master.read() is None
        assert master.built != octets


async def test_a_row_that_changes_while_the_table_is_read_is_read_in_the_next_cycle(table: Table) -> None:
    def write_meanwhile() -> None:
        if writes:
            table.run(writes.pop())

    fill(table)
    writes: list[str] = []
    async with Master(table.url, on_change=write_meanwhile) as master:
        assert await master.read() is None
        table.run("UPDATE obex_dapl_functions SET code = 'first' WHERE id = 700")
        writes = ["UPDATE obex_dapl_functions SET code = 'second' WHERE id IN (700, 900)"]
        found = await master.reader.read(None, serving=True)
        assert found is not None
        assert not writes
        snapshot = Snapshot(master.octets(found))
        codes = [definition.code for definition in snapshot if definition.code in (b"first", b"second")]
        assert codes == [b"first"], "fingerprint, ranges and rows are of one moment"
        await master.reader.remember(found, [snapshot])
        assert await master.read() is not None
        assert master.built.count(b"second") == 2


async def test_a_partitioned_table_has_no_ranges(table: Table) -> None:
    fill(table, "PARTITION BY LIST (type); CREATE TABLE part PARTITION OF obex_dapl_functions DEFAULT")
    async with Master(table.url) as master:
        for code in ("first", "second"):
            table.run(f"UPDATE obex_dapl_functions SET code = '{code}' WHERE id = 700")
            assert await master.read() is None


async def test_the_reading_after_a_failure_is_a_full_reading(table: Table) -> None:
    fill(table)
    async with Master(table.url) as master:
        await master.read()
        table.run("UPDATE obex_dapl_functions SET code = 'changed' WHERE id = 700")
        found = await master.reader.read(None, serving=True)
        assert found is not None
        assert found.ranges_read is not None
        # That reading was not used for a build.
        assert await master.read() is None


async def test_the_limit_of_the_catalogue_applies_to_all_rows(table: Table) -> None:
    fill(table)
    octets = ROWS * (800 + 150 + 30)
    async with Master(table.url, ReadLimits(catalogue=octets)) as master:
        assert await master.read() is None
        table.run("UPDATE obex_dapl_functions SET code = repeat('x', 100000) WHERE id = 700")
        with pytest.raises(SourceError, match="MAX_CATALOG_BYTES"):
            await master.reader.read(None, serving=True)


def test_adjacent_ranges_are_one_run() -> None:
    assert runs({3, 1, 2, 7}, 8) == [[(8, 32), (56, 64)]]
    assert [len(part) for part in runs(range(0, 260, 2), 8)] == [64, 64, 2]
    assert runs(set(), 8) == []
    assert runs({2**32 // 8 - 1}, 8) == [[(2**32 - 8, 2**32 - 1)]]
