"""The interface of a source of definitions. PostgreSQL is such a source (`postgres.py`); tests have others."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Protocol

from definition_server.catalog.definition import Row
from definition_server.observability.reasons import Reason


class SourceError(Exception):
    """The source could not be read. The message, which is logged, names the failure and, if known, the remedy."""

    def __init__(self, message: str, reason: Reason = Reason.DATABASE_ERROR) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class ReadLimits:
    """Limits of size for a reading, so that a large table does not exhaust the memory."""

    definition: int = 4 * 1024 * 1024
    """The most octets in the texts of a row. A larger row is not fetched: `Reading.batches` yields it with the fault
    ``too_large``.
    """
    catalogue: int = 2**31 - 1
    """The most octets in the snapshot of all other rows. If it would be larger, no row is fetched, and the cycle fails.
    """


@dataclass(frozen=True, slots=True)
class Ranges:
    """The rows of a source, divided into ranges, at the moment of a reading."""

    basis: str
    """Identifies the way in which the division and the fingerprints were made. The ranges of two moments can be
    compared only if it is equal.
    """
    versions: Mapping[int, str]
    """Range → fingerprint of its rows, for all ranges that have rows."""
    width: int = 1
    """The size of a range, in a unit that the source defines."""
    sizes: dict[int, Mapping[int, tuple[int, int]]] = field(default_factory=dict)
    """The sizes in each range, for the source's own use. They are complete when the rows have been read."""


class Reading(Protocol):
    """One consistent view of the source: the fingerprint and the rows are of the same moment."""

    fingerprint: str
    """Differs from an earlier fingerprint if anything that would be served has changed in between. It may also differ
    without such a change; if the source cannot detect changes, it always differs. It is only compared, and never
    interpreted."""

    async def ranges(self, before: Ranges | None) -> Ranges | None:
        """The ranges of this moment; None if the source has none. From now on each row names its range.

        Args:
            before: The ranges of an earlier moment. If possible, the division is the same, so that they can be
                compared.

        Raises:
            SourceError: if reading fails.
        """

    def batches(self, ranges: Collection[int] | None = None) -> AsyncIterator[list[Row]]:
        """All rows, or those of ``ranges``, in batches, in no particular order. May be called only once.

        Raises:
            SourceError: if reading fails. In this case the batches returned so far must not be used.
        """


class DefinitionSource(Protocol):
    """A source of rows."""

    def read(self) -> AbstractAsyncContextManager[Reading]:
        """Open a `Reading`. Connects first, unless there is a connection.

        Raises:
            SourceError: on entering the context, if the source does not answer.
        """

    async def close(self) -> None:
        """Close the connection, if any."""
