"""The shared part of the tests that read from a real PostgreSQL."""

from __future__ import annotations

from tests.support.table import Table

from definition_server.catalog.definition import Row
from definition_server.control_plane.postgres import PostgresSource
from definition_server.control_plane.source import ReadLimits

COLUMNS = "id int, name text, type text, interface text, code text"


class Reader:
    """A source that stays connected, as the master's does between its cycles."""

    def __init__(self, url: str, limits: ReadLimits | None = None) -> None:
        self.source = PostgresSource(url, connect_timeout=5, statement_timeout=30, limits=limits)

    async def __aenter__(self) -> Reader:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.source.close()

    async def fingerprint(self) -> str:
        """The fingerprint that a cycle remembers after it has read the rows; the first reading of a connection gets it
        from its ranges."""
        async with self.source.read() as reading:
            await reading.ranges(None)
            return reading.fingerprint

    async def rows(self) -> list[Row]:
        async with self.source.read() as reading:
            return sorted([row async for batch in reading.batches() for row in batch], key=lambda row: row.id or 0)

    async def codes(self) -> dict[bytes | None, bytes | None]:
        return {row.name: row.code for row in await self.rows()}


def empty(table: Table, columns: str = COLUMNS, more: str = "") -> Table:
    """The table, created again with other columns."""
    table.run(f"DROP TABLE obex_dapl_functions; CREATE TABLE obex_dapl_functions ({columns}) {more}")
    return table
