"""What a build may take over from the one before, instead of reading and encoding the same rows again.

A source divides its rows into *ranges* and knows which of them changed. A range is kept where each of its rows is
served, as it is, by the snapshot that was built: none has a fault, shares its name with another row, looks wrong,
or is held or left out by the gate. So whatever happens to the rows of other ranges, a kept range has all that a new
reading of it would give: the names, the ids and the content hashes are here, the messages in the snapshot. All other
ranges are read again, and a row that lost its name to another comes back by that.

The tables of ids and hashes are handed on from build to build, and only changed where rows did: to make them anew for
each changed row would cost more than all else that is done for it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Protocol, Self

from definition_server.catalog import wire
from definition_server.catalog.snapshot import Snapshot


class Hash(Protocol):
    """An object of `hashlib`."""

    def update(self, octets: bytes | memoryview, /) -> None:
        """Hash ``octets`` too."""

    def copy(self) -> Self:
        """Another one in the same state."""

    def digest(self) -> bytes:
        """The hash so far."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Where a snapshot has its commands. Each list is in name order."""

    names: list[bytes] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    """Of each ``CommandResponse`` in the body."""
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    """Of the names: `layout.name_hash`."""
    slots: array[int] = field(default_factory=lambda: array("Q"))
    """The slot of each in the index."""
    version_states: list[Hash] = field(default_factory=list)
    """States of the computation of the version hash, at equal steps."""

    def begin(self, number: int) -> int:
        """Where the field that holds the command ``number`` begins."""
        return self.offsets[number] - len(wire.varint(self.lengths[number])) - 1

    def end(self, number: int) -> int:
        """Where the field that holds the command ``number`` ends."""
        return self.offsets[number] + self.lengths[number]


@dataclass(slots=True)
class PreviousBuild:
    """A snapshot, where it has its commands, and the ranges that may be kept."""

    snapshot: Snapshot
    arrangement: Arrangement
    ranges: Mapping[int, Sequence[bytes]]
    """The names in each."""
    others: AbstractSet[bytes]
    """The names of rows that are in none of ``ranges``; the snapshot may have a command of each, or not."""
    _tables: tuple[dict[bytes, int], dict[bytes, bytes]] | None
    """Of all names in ``ranges``: ids, and content hashes."""

    def tables(self) -> tuple[dict[bytes, int], dict[bytes, bytes]]:
        """Name → id and name → content hash of the rows in `ranges`. Once: the next build changes and keeps them."""
        tables, self._tables = self._tables, None
        assert tables is not None, "one build goes on from a previous one"
        return tables
