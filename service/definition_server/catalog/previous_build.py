"""What a build may take over from the one before, instead of reading and encoding the same rows again.

A source divides its rows into *ranges* and knows which of them changed. A range is kept where each of its rows is
served, as it is, by the snapshot that was built: none has a fault, lost against another row of its name, looks wrong,
or is held or left out by the gate. So whatever happens to the rows of other ranges, a kept range has all that a new
reading of it would give: the names, the ids and the content hashes are here, the messages in the snapshot. All other
ranges are read again, and a row that lost its name to another comes back by that.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from definition_server.catalog import wire
from definition_server.catalog.snapshot import Snapshot

Entry = tuple[int, bytes, bytes | None]
"""Id, content hash and encoded ``CommandResponse`` of a row. Without the last where the previous snapshot has it."""

Kept = tuple[Sequence[bytes], Sequence[Entry]]
"""The names of a range and their entries, in the same order. The entries have no message."""


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
    """The position of each in the index."""

    def begin(self, number: int) -> int:
        """Where the field that holds the command ``number`` begins."""
        return self.offsets[number] - len(wire.varint(self.lengths[number])) - 1

    def end(self, number: int) -> int:
        """Where the field that holds the command ``number`` ends."""
        return self.offsets[number] + self.lengths[number]


@dataclass(frozen=True, slots=True)
class PreviousBuild:
    """A snapshot, where it has its commands, and the ranges that may be kept."""

    snapshot: Snapshot
    arrangement: Arrangement
    ranges: Mapping[int, Kept]
