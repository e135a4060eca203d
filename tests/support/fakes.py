"""Stand-ins for what a test must control: the source of definitions, the clock, and what rows look like."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from definition_server.catalog.definition import Row


class FakeClock:
    """Seconds since the epoch, moved by hand."""

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
        """Readings that were begun."""
        self.rows_given = 0
        self.open_readings = 0
        self.answers = asyncio.Event()
        """While not set, a reading hangs on entering."""
        self.answers.set()
        self._failures: deque[tuple[BaseException, int | None]] = deque()

    def replace(self, *rows: Row) -> None:
        """The table now holds ``rows``."""
        self.rows = rows
        self.touch()

    def touch(self) -> None:
        """The fingerprint changes, the content does not (an UPDATE that sets what was there)."""
        self.version += 1

    def fail(self, error: BaseException, *, after_rows: int | None = None) -> None:
        """A reading to come raises ``error``: on entering, or when so many rows were given. One call, one reading."""
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
    """`Reading` of a `FakeSource`: what it held when the reading was opened."""

    def __init__(self, source: FakeSource, error: BaseException | None, after_rows: int | None) -> None:
        self.fingerprint = str(source.version)
        self._source = source
        self._rows = source.rows
        self._error = error
        self._after_rows = after_rows

    async def batches(self) -> AsyncIterator[list[Row]]:
        """See `Reading.batches`."""
        for number, row in enumerate(self._rows):
            if self._error is not None and number == self._after_rows:
                raise self._error
            self._source.rows_given += 1
            yield [row]
        if self._error is not None:
            raise self._error
