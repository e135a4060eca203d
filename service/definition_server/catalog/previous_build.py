"""The parts of a build that the next one may take over, instead of reading and encoding the same rows again.

A source divides its rows into *ranges* and knows which of them changed. A range is kept if the snapshot that was built
serves each of its rows unchanged: none has a fault, shares its name with another row, looks wrong, or is held or left
out by the gate. Whatever happens to the rows of other ranges, reading a kept range again would give the same result.
Its names, ids and content hashes are kept here; its messages are in the snapshot. All other ranges are read again. So
if a row was not served because another row had the same name, it is found again once that other row is gone.

The tables of ids and hashes are handed on from build to build and changed in place: making new ones for each changed
row would cost more than all other work for that row.
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
    """The interface of the hash objects of `hashlib`."""

    def update(self, octets: bytes | memoryview, /) -> None:
        """Add ``octets`` to the hashed content."""

    def copy(self) -> Self:
        """A hash object in the same state."""

    def digest(self) -> bytes:
        """The hash of the content so far."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The places of a snapshot's commands. Each list is in name order."""

    names: list[bytes] = field(default_factory=list)
    offsets: array[int] = field(default_factory=lambda: array("Q"))
    """The offset of each ``CommandResponse`` in the body."""
    lengths: array[int] = field(default_factory=lambda: array("Q"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    """The `layout.name_hash` of each name."""
    slots: array[int] = field(default_factory=lambda: array("Q"))
    """The slot of each command in the index."""
    version_states: list[Hash] = field(default_factory=list)
    """Intermediate states of the version hash: see `assembly.version_hash`."""

    def begin(self, number: int) -> int:
        """Where the field that holds the command ``number`` begins."""
        return self.offsets[number] - len(wire.varint(self.lengths[number])) - 1

    def end(self, number: int) -> int:
        """Where the field that holds the command ``number`` ends."""
        return self.offsets[number] + self.lengths[number]


@dataclass(slots=True)
class PreviousBuild:
    """A snapshot, the places of its commands, and the ranges that may be kept."""

    snapshot: Snapshot
    arrangement: Arrangement
    ranges: Mapping[int, Sequence[bytes]]
    """The names of the rows in each range."""
    others: AbstractSet[bytes]
    """The names of rows that are in none of ``ranges``. The snapshot may have a command of such a name, or none."""
    blank: AbstractSet[bytes]
    """The names whose code is blank; some may be in none of ``ranges``."""
    _tables: tuple[dict[bytes, int], dict[bytes, bytes]] | None
    """The ids and the content hashes of all names in ``ranges``."""

    def tables(self) -> tuple[dict[bytes, int], dict[bytes, bytes]]:
        """Name → id and name → content hash of the rows in `ranges`. Can be called once: the next build owns and
        changes them.
        """
        tables, self._tables = self._tables, None
        assert tables is not None, "only one build takes over a previous one"
        return tables
