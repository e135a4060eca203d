"""The interface of a source of definitions. PostgreSQL is one (`postgres.py`); tests have another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from definition_server.catalog.definition import Row
from definition_server.observability.reasons import Reason


class SourceError(Exception):
    """The source could not be read. The message says what failed and, where we know it, what to do: for the log."""

    def __init__(self, message: str, reason: Reason = Reason.DATABASE_ERROR) -> None:
        super().__init__(message)
        self.reason = reason


class Reading(Protocol):
    """One consistent view of the source: the fingerprint and the rows are of the same moment."""

    fingerprint: str
    """Differs from an earlier one if any row was inserted, updated or deleted in between. It may also differ without
    such a change. It is compared, never interpreted."""

    def batches(self) -> AsyncIterator[list[Row]]:
        """All rows, in batches, in no particular order. May be called once.

        Raises:
            SourceError: where reading fails. The batches before it must then not be used.
        """


class DefinitionSource(Protocol):
    """A source of rows."""

    def read(self) -> AbstractAsyncContextManager[Reading]:
        """Open a `Reading`, connecting first where needed.

        Raises:
            SourceError: on entering the context, where the source does not answer.
        """

    async def close(self) -> None:
        """Close what is open."""
