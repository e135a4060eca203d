"""Arranges the commands of a snapshot that is being built, in name order. Each command is either new or copied from the
previous snapshot.

A full reading arranges all commands, so each step handles many of them in one call.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import accumulate
from operator import sub

from definition_server.catalog import assembly, wire
from definition_server.catalog.layout import name_hashes, slot_count
from definition_server.catalog.previous_build import Arrangement


class Arranging:
    """The body of a snapshot, to which commands are appended."""

    def __init__(self, before: Arrangement, old: memoryview | None, field_of: Callable[[bytes], bytes]) -> None:
        """
        Args:
            before: The commands of the previous snapshot; an empty one if there is no previous snapshot.
            old: The body of the previous snapshot.
            field_of: Takes the name of a new command and returns the field of ``CatalogResponse`` that holds the
                command.
        """
        self._before = before
        self._old = old
        self._field_of = field_of
        self.pieces: list[bytes | memoryview] = []
        self.size = 0
        """Octets of all pieces so far."""
        self.done = 0
        """Number of commands of the previous snapshot that were either copied or left out."""
        self._names: list[bytes] = []
        self._offsets, self._lengths, self._hashes = array("Q"), array("Q"), array("Q")

    def append(self, names: list[bytes]) -> None:
        """Append the new commands with these names."""
        if not names:
            return
        fields = list(map(self._field_of, names))
        sizes = list(map(len, fields))
        lengths = array("Q", wire.content_lengths(sizes))
        ends = accumulate(sizes, initial=self.size)
        next(ends)
        offsets = array("Q", map(sub, ends, lengths))
        self.pieces += fields
        self.size = offsets[-1] + lengths[-1]
        self._names += names
        self._lengths += lengths
        self._offsets += offsets
        self._hashes += name_hashes(names)

    def copy(self, end: int) -> None:
        """Copy the commands of the previous snapshot from number `done` up to ``end``. They have not changed."""
        before, done = self._before, self.done
        if self._old is None or done == end:
            return
        begin, after = before.begin(done), before.end(end - 1)
        self.pieces.append(self._old[begin:after])
        self._names += before.names[done:end]
        self._lengths += before.lengths[done:end]
        self._hashes += before.hashes[done:end]
        shift, moved = self.size - begin, before.offsets[done:end]
        self._offsets.extend(map(shift.__add__, moved) if shift else moved)
        self.size += after - begin
        self.done = end

    def finish(self) -> Arrangement:
        """Return the places of all commands, in name order."""
        names, before = self._names, self._before
        if self._old is not None and names == before.names:  # so both arrangements can share the list and the array
            names, slots = before.names, before.slots
        else:
            slots = array("Q", assembly.slots(slot_count(len(names)), self._hashes))
        return Arrangement(names, self._offsets, self._lengths, self._hashes, slots)
