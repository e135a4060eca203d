"""Stand-ins that a test controls: a source of definitions, a clock, and the status of a service."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from definition_server.catalog.definition import Row
from definition_server.control_plane.source import Ranges
from definition_server.observability.status import (
    CatalogStatus,
    RequestStatus,
    ServiceStatus,
    SyncStatus,
    WorkerStatus,
)


class FakeClock:
    """Seconds since the epoch; only the test advances it."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let ``seconds`` pass."""
        self.now += seconds


class FakeSource:
    """A `DefinitionSource` over a list of rows, with scripted changes, failures and hangs.

    Rows come in batches of one, so that a failure can hit between any two of them.
    """

    def __init__(self, *rows: Row) -> None:
        self.rows = rows
        self.version = 1
        """The fingerprint, as a number."""
        self.looks = 0
        """Number of readings that have begun."""
        self.rows_given = 0
        self.open_readings = 0
        self.answers = asyncio.Event()
        """A reading hangs at its beginning until this event is set."""
        self.answers.set()
        self._failures: deque[tuple[BaseException, int | None]] = deque()

    def replace(self, *rows: Row) -> None:
        """The table now holds ``rows``."""
        self.rows = rows
        self.touch()

    def touch(self) -> None:
        """Change the fingerprint but not the content, like an UPDATE that sets the present values."""
        self.version += 1

    def fail(self, error: BaseException, *, after_rows: int | None = None) -> None:
        """Let one later reading raise ``error``, at its beginning or after ``after_rows`` rows."""
        self._failures.append((error, after_rows))

    @asynccontextmanager
    async def read(self) -> AsyncIterator[FakeReading]:
        """See `DefinitionSource.read`."""
        self.looks += 1
        await self.answers.wait()
        error, after_rows = self._failures.popleft() if self._failures else (None, None)
        if error is not None and after_rows is None:
            raise error
        self.open_readings += 1
        try:
            yield FakeReading(self, error, after_rows)
        finally:
            self.open_readings -= 1

    async def close(self) -> None:
        """See `DefinitionSource.close`."""


class FakeReading:
    """`Reading` of a `FakeSource`: its rows at the time when the reading was opened."""

    def __init__(self, source: FakeSource, error: BaseException | None, after_rows: int | None) -> None:
        self.fingerprint = str(source.version)
        self._source = source
        self._rows = source.rows
        self._error = error
        self._after_rows = after_rows

    async def ranges(self, before: Ranges | None) -> None:
        """See `Reading.ranges`."""

    async def batches(self, ranges: Collection[int] | None = None) -> AsyncIterator[list[Row]]:
        """See `Reading.batches`."""
        for number, row in enumerate(self._rows):
            if self._error is not None and number == self._after_rows:
                raise self._error
            self._source.rows_given += 1
            yield [row]
        if self._error is not None:
            raise self._error


def service_status(**changes: Any) -> ServiceStatus:
    """The status of a service with one worker that serves two commands, with ``changes`` applied."""
    status = ServiceStatus(
        version="1.2.3",
        hostname="replica-0",
        started_at=1_700_000_000.0,
        ready=True,
        stopping=False,
        catalog=CatalogStatus(3, "ab" * 32, 2, 606, 1_700_000_001.0),
        sync=SyncStatus(
            cycles={"published": 1},
            last_outcome="published",
            last_attempt=1_700_000_001.0,
            last_success=1_700_000_001.0,
            last_error=None,
            last_duration_seconds=0.1,
            age_seconds=1.0,
            restored_age_seconds=None,
            store_error=None,
            source_rows=2,
            unserved={"duplicate": 0},
            suspect={},
        ),
        workers=(WorkerStatus(0, 4711, "serving", 3, "ab" * 32, 2, 0.1, 0, False),),
        requests=RequestStatus(
            by_status={"200": 5, "404": 1},
            bounds_seconds=(0.1,),
            latency={"GetCommand": (5, 1)},
            latency_sum_seconds={"GetCommand": 0.7},
        ),
    )
    return replace(status, **changes)
