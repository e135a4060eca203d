"""Catalogues for measurements: any number of definitions, all answers of the same, known size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import create_sealed, map_sealed

_LINE = "value_{0:04d} = registry.lookup('{1:08x}', scope={2:5d})\n"


def name_of(number: int) -> str:
    """The name of a definition; all have the same length."""
    return f"command{number:05d}"


class Catalogue:
    """``count`` definitions whose ``CommandResponse`` has ``answer`` octets, built once and sealed. The caller closes
    it."""

    def __init__(self, count: int, answer: int, *, variant: int = 0) -> None:
        """``variant`` is written into the last definition, so that two catalogues can differ in one row."""
        overhead = self._built(1, 1, "")[1] - 1
        # The length of a string of 128 or more octets takes two octets.
        self.built, length = self._built(count, answer - overhead - 1, f"# {variant}")
        if length != answer:
            raise ValueError(f"answers of {answer} octets cannot be made (got {length})")
        self.answer_octets = answer
        self.count = count
        self.descriptor = create_sealed("perf-catalogue", self.built.pieces)

    @staticmethod
    def _built(count: int, code: int, mark: str) -> tuple[BuiltSnapshot, int]:
        builder = SnapshotBuilder()
        # The definitions have no ids, which take one octet or several, so every answer has the same length.
        builder.add(
            Row(None, name_of(number).encode(), None, None, source(number, code, mark if number == count - 1 else ""))
            for number in range(count)
        )
        built = builder.build(generation=1, created_at_ns=0)
        return built, _first_length(built.pieces)

    @cached_property
    def snapshot(self) -> Snapshot:
        """The catalogue as a snapshot object."""
        return Snapshot(map_sealed(self.descriptor))

    def names(self, most: int) -> list[str]:
        """At most ``most`` names, spread over the catalogue."""
        return [name_of(number) for number in range(0, self.count, max(1, self.count // most))][:most]

    def generation(self, number: int) -> tuple[int, BuiltSnapshot]:
        """The same content as another generation: a sealed descriptor, which the caller closes, and its description."""
        footer = replace(self.built.footer, generation=number)
        built = BuiltSnapshot([*self.built.pieces[:-1], footer.pack()], footer)
        return create_sealed("perf-catalogue", built.pieces), built

    def close(self) -> None:
        """Release the memory."""
        self.__dict__.pop("snapshot", None)
        os.close(self.descriptor)


def source(number: int, octets: int, mark: str = "") -> bytes:
    """``octets`` octets of plausible code for definition ``number``, with ``mark`` at the start."""
    count = octets // 48 + 1
    lines = "".join(_LINE.format(line, number * 2654435761 + line & 0xFFFFFFFF, line % 7) for line in range(count))
    cut = (mark + "\n" + lines if mark else lines).encode()[:octets]
    whole = cut.rfind(b"\n") + 1
    return cut[:whole] + b"#" * (octets - whole)  # as a comment, because half a line would not compile


def _first_length(pieces: Sequence[bytes | memoryview]) -> int:
    """Octets of the first ``CommandResponse``, which is the number that follows the tag of its field.

    It is read from the octets of the snapshot, because all revisions have that format in common: this module also
    builds a catalogue with the code of the base of a comparison.
    """
    start = b"".join(bytes(piece[:16]) for piece in pieces[:2])
    length = shift = 0
    for octet in start[1:]:
        length |= (octet & 0x7F) << shift
        shift += 7
        if octet < 0x80:
            break
    return length
