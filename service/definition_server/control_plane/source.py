"""What the sync cycle asks of a source of definitions; PostgreSQL is one (`postgres.py`), tests have another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from definition_server.catalog.definition import Row


class SourceError(Exception):
    """The source could not be read; the message says what failed and, where we know, what to do."""


class Reading(Protocol):
    """One consistent look at the source: the fingerprint and the rows are of the same moment."""

    fingerprint: str
    """Differs from an earlier one wherever any row was inserted, updated or deleted in between. It may differ
    without a change; it is compared, never interpreted."""

    def batches(self) -> AsyncIterator[list[Row]]:
        """All rows, some at a time, in no particular order. May be asked for once.

        Raises:
            SourceError: where reading fails; what came before is then to be thrown away.
        """


class DefinitionSource(Protocol):
    """Where rows come from."""

    def read(self) -> AbstractAsyncContextManager[Reading]:
        """Open a `Reading`, connecting first where needed.

        Raises:
            SourceError: on entering, where the source cannot be asked.
        """

    async def close(self) -> None:
        """Let go of what is held open."""
