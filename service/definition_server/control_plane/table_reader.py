"""The first step of a sync cycle: check the table for changes; where there are any, read and encode its rows."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.signing import Signer
from definition_server.control_plane.background import Background
from definition_server.control_plane.source import DefinitionSource, Reading
from definition_server.observability.tracing import begin, span


@dataclass(frozen=True, slots=True)
class ReadTable:
    """The rows of one reading, encoded, and the fingerprint that the table had at that moment."""

    builder: SnapshotBuilder
    fingerprint: str
    begun: float
    """When the reading began, in seconds of the loop's clock."""


class TableReader:
    """Reads a source where its fingerprint is another one than that of the last reading that was dealt with, and where
    that reading is long ago."""

    def __init__(
        self,
        source: DefinitionSource,
        background: Background,
        *,
        on_change: Callable[[], None] | None = None,
        known: Callable[[], Mapping[bytes, bytes]] | None = None,
        full_read_interval: float = math.inf,
    ) -> None:
        """
        Args:
            source: Has the rows.
            background: The thread that encodes them.
            on_change: Called when rows are about to be read.
            known: Gives the content hashes, by name, with which the rows will be compared.
            full_read_interval: Seconds after which the rows are read although the fingerprint is the same.
        """
        self._on_change = on_change
        self._known = known
        self._source = source
        self._background = background
        self._full_read_interval = full_read_interval
        self._fingerprint: str | None = None
        self._read_at = -math.inf

    def remember(self, table: ReadTable) -> None:
        """``table`` was dealt with: it is not read again until it changes."""
        self._fingerprint = table.fingerprint
        self._read_at = table.begun

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
        begun = asyncio.get_running_loop().time()
        due = unconditional or begun - self._read_at >= self._full_read_interval
        check = begin("check")
        try:
            async with self._source.read() as reading:
                unchanged = reading.fingerprint == self._fingerprint
                check.set(changed=not unchanged)
                check.end()
                return None if unchanged and not due else await self._read_rows(reading, signer, begun, serving=serving)
        finally:
            check.end()

    async def _read_rows(self, reading: Reading, signer: Signer | None, begun: float, *, serving: bool) -> ReadTable:
        if self._on_change is not None:
            self._on_change()
        with span("read") as step:
            builder = SnapshotBuilder(signer, None if self._known is None else self._known())
            async for rows in reading.batches():
                await self._encode(builder, rows, serving=serving)
            step.set(rows=builder.findings.source_rows)
        return ReadTable(builder, reading.fingerprint, begun)

    async def _encode(self, builder: SnapshotBuilder, rows: list[Row], *, serving: bool) -> None:
        """Give one batch to ``builder``. The next is fetched afterwards: both contend for the interpreter lock."""
        if serving:
            await self._background.run(builder.add, rows)
        else:
            # No calls are answered yet that could be delayed, and in this thread it is a quarter of a second faster.
            builder.add(rows)
