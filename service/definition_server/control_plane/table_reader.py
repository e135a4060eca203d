"""The first step of a sync cycle: check the table for changes; where there are any, read and encode its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.signing import Signer
from definition_server.control_plane.background import Background
from definition_server.control_plane.source import DefinitionSource


@dataclass(frozen=True, slots=True)
class ReadTable:
    """The rows of one reading, encoded, and the fingerprint that the table had at that moment."""

    builder: SnapshotBuilder
    fingerprint: str


class TableReader:
    """Reads a source where its fingerprint is another one than that of the last reading that was dealt with."""

    def __init__(
        self, source: DefinitionSource, background: Background, *, on_change: Callable[[], None] | None = None
    ) -> None:
        """``on_change`` is called when rows are about to be read."""
        self._on_change = on_change
        self._source = source
        self._background = background
        self._fingerprint: str | None = None

    def remember(self, table: ReadTable) -> None:
        """``table`` was dealt with: it is not read again until it changes."""
        self._fingerprint = table.fingerprint

    def forget(self) -> None:
        """Read the table in the next cycle, changed or not."""
        self._fingerprint = None

    async def read(self, signer: Signer | None, *, serving: bool, unconditional: bool = False) -> ReadTable | None:
        """The table, signed by ``signer``; None where it has not changed.

        Args:
            signer: Signs the code.
            serving: Whether calls are answered meanwhile, which must not be delayed.
            unconditional: Read the rows although the fingerprint is the same.

        Raises:
            SourceError: where the source cannot be read.
        """
        async with self._source.read() as reading:
            if reading.fingerprint == self._fingerprint and not unconditional:
                return None
            if self._on_change is not None:
                self._on_change()
            builder = SnapshotBuilder(signer)
            async for rows in reading.batches():
                await self._encode(builder, rows, serving=serving)
            return ReadTable(builder, reading.fingerprint)

    async def _encode(self, builder: SnapshotBuilder, rows: list[Row], *, serving: bool) -> None:
        """Give one batch to ``builder``. The next is fetched afterwards: both contend for the interpreter lock."""
        if serving:
            await self._background.run(builder.add, rows)
        else:
            # No calls are answered yet that could be delayed, and in this thread it is a quarter of a second faster.
            builder.add(rows)
