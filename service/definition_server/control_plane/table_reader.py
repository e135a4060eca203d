"""The first step of a sync cycle: check the table for changes, and if there are any, read and encode its rows.

If the last reading was processed completely, and little has changed since, only the ranges of the source that changed
are read; the others are taken over from the snapshot that was built then. Every other reading is a full reading: the
first one, one that an operator or the interval requests, one with another signing key, and one after a failure of any
kind.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.previous_build import PreviousBuild
from definition_server.catalog.signing import UNSIGNED, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.source import DefinitionSource, Ranges, Reading
from definition_server.observability.tracing import begin, span

_PART = 4
"""If more than this share of the ranges must be read, all rows are read, because reading by ranges would cost more than
it saves.
"""


@dataclass(frozen=True, slots=True)
class ReadTable:
    """The encoded rows of one reading, and the fingerprint that the table had at the moment of the reading."""

    builder: SnapshotBuilder
    fingerprint: str
    begun: float
    """The time at which the reading began, in seconds of the loop's clock."""
    ranges: Ranges | None = None
    """The ranges of the source at the moment of the reading."""
    ranges_read: int | None = None
    """The number of ranges that were read; None if all rows were read."""


@dataclass(frozen=True, slots=True)
class _Previous:
    """The parts of the last completely processed reading that the next one may take over."""

    build: PreviousBuild
    ranges: Ranges

    def changed(self, ranges: Ranges, signer: Signer | None) -> set[int] | None:
        """The numbers of the ``ranges`` that must be read; None if all rows must be read."""
        key_id = UNSIGNED if signer is None else signer.key_id
        if ranges.basis != self.ranges.basis or key_id != self.build.snapshot.footer.key_id:
            return None
        kept, versions = self.build.ranges, self.ranges.versions
        read = {
            number
            for number, version in ranges.versions.items()
            if number not in kept or versions.get(number) != version
        }
        return read if len(read) * _PART <= len(ranges.versions) else None


class TableReader:
    """Reads a source if its fingerprint differs from that of the last completely processed reading, or if the last full
    reading was too long ago.
    """

    def __init__(
        self,
        source: DefinitionSource,
        background: Background,
        *,
        on_change: Callable[[], None] | None = None,
        on_rows: Callable[[list[Row]], None] | None = None,
        known: Callable[[], Mapping[bytes, bytes]] | None = None,
        full_read_interval: float = math.inf,
    ) -> None:
        """
        Args:
            source: Has the rows.
            background: The thread that encodes them.
            on_change: Called when rows are about to be read.
            on_rows: Called with each batch of rows.
            known: Returns the content hashes, by name, with which the rows will be compared.
            full_read_interval: When a full reading is older than so many seconds, all rows are read again, even if the
                fingerprint is the same.
        """
        self._on_change = on_change
        self._on_rows = on_rows
        self._known = known
        self._source = source
        self._background = background
        self._full_read_interval = full_read_interval
        self._fingerprint: str | None = None
        self._read_at = -math.inf
        self._previous: _Previous | None = None

    async def remember(self, table: ReadTable, snapshots: Iterable[Snapshot | None]) -> None:
        """Note that ``table`` was processed completely. It need not be read again until it changes.

        Args:
            table: The result of `read`.
            snapshots: One of them may have been built from it.
        """
        self._fingerprint = table.fingerprint
        if table.ranges_read is None:
            self._read_at = table.begun
        if table.ranges is not None:
            previous = await self._background.run(_previous, table.builder, table.ranges, snapshots)
            if self._fingerprint == table.fingerprint:  # otherwise `forget` was called meanwhile
                self._previous = previous

    def forget(self) -> None:
        """Read the whole table in the next cycle, even if it has not changed."""
        self._fingerprint = None
        self._previous = None

    async def read(self, signer: Signer | None, *, serving: bool, unconditional: bool = False) -> ReadTable | None:
        """The table, signed by ``signer``; None if it has not changed.

        Args:
            signer: Signs the code.
            serving: Whether workers answer calls, which the encoding must not delay.
            unconditional: Whether to read the rows even if the fingerprint is the same.

        Raises:
            SourceError: if the source cannot be read.
        """
        begun = asyncio.get_running_loop().time()
        due = unconditional or begun - self._read_at >= self._full_read_interval
        check = begin("check")
        try:
            async with self._source.read() as reading:
                check.set(changed=reading.fingerprint != self._fingerprint)
                check.end()
                if reading.fingerprint == self._fingerprint and not due:
                    return None
                return await self._read_rows(reading, signer, begun, due=due, serving=serving)
        finally:
            check.end()

    async def _read_rows(
        self, reading: Reading, signer: Signer | None, begun: float, *, due: bool, serving: bool
    ) -> ReadTable:
        """The rows of ``reading``. If that is possible and no full reading is ``due``, most rows are taken over from
        the previous snapshot.
        """
        # The previous build is remembered again only if this cycle succeeds.
        previous, self._previous = self._previous, None
        if self._on_change is not None:
            self._on_change()
        ranges = await reading.ranges(None if previous is None else previous.ranges)
        changed = None if previous is None or ranges is None or due else previous.changed(ranges, signer)
        builder = SnapshotBuilder(signer, None if self._known is None else self._known())
        if previous is not None and ranges is not None and changed is not None:
            await self._background.run(builder.take_over, previous.build, ranges.versions.keys() - changed)
        with span("read") as step:
            async for rows in reading.batches(changed):
                if self._on_rows is not None:
                    self._on_rows(rows)
                await self._encode(builder, rows, serving=serving)
            step.set(rows=builder.findings.source_rows)
        return ReadTable(builder, reading.fingerprint, begun, ranges, None if changed is None else len(changed))

    async def _encode(self, builder: SnapshotBuilder, rows: list[Row], *, serving: bool) -> None:
        """Give one batch to ``builder``. The next batch is fetched afterwards, and not meanwhile, because encoding and
        fetching both need the interpreter lock.
        """
        if serving:
            await self._background.run(builder.add, rows)
        else:
            # Encoding in this thread saves a quarter of a second, and there are no calls yet that it could delay.
            builder.add(rows)


def _previous(builder: SnapshotBuilder, ranges: Ranges, snapshots: Iterable[Snapshot | None]) -> _Previous | None:
    """The rows that the next reading may take over; None if none of ``snapshots`` was built from them."""
    for snapshot in snapshots:
        build = None if snapshot is None else builder.as_previous(snapshot)
        if build is not None:
            return _Previous(build, ranges)
    return None
