"""Reads a snapshot without copying it: from shared memory, a mapped file or a bytes object."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from mmap import MADV_DONTNEED, mmap

from definition_server.catalog import wire
from definition_server.catalog.definition import Definition, parse_definition
from definition_server.catalog.layout import FOOTER_SIZE, SLOT, Footer, SnapshotError, name_hash

_NAME_TAG = wire.NAME << 3 | wire.LENGTH_DELIMITED
_COMMAND_TAG_LENGTH = 1
"""Octets of the tag of `wire.COMMANDS`."""


class Snapshot:
    """An open snapshot. Immutable; it keeps its buffer alive for as long as it is referenced.

    Opening it checks the footer, the sizes in the footer, and that the index has a free slot, because the look-up of a
    missing name ends at a free slot. In an undamaged index a free slot is found at once, so opening is O(1). This is
    enough for memory that the master has sealed; a file must also pass `verify` before anything in it is served.
    """

    __slots__ = ("_body_length", "_buffer", "_index", "_mask", "footer")

    def __init__(self, buffer: bytes | mmap | memoryview) -> None:
        """Open the snapshot in ``buffer``, which has nothing else.

        Raises:
            SnapshotError: names the check that failed.
        """
        view = memoryview(buffer).toreadonly()
        self.footer = Footer.unpack(view)
        self._buffer = view
        self._body_length = self.footer.body_length
        self._index = view[self._body_length : len(view) - FOOTER_SIZE]
        self._mask = self.footer.slots - 1
        if not any(length == 0 for _, _, length in SLOT.iter_unpack(self._index)):
            raise SnapshotError("index: no slot is free, so a look-up of a missing name would not end")

    @property
    def generation(self) -> int:
        """The number of the publication. A master counts from 1, or continues from the number of the snapshot that it
        restored.
        """
        return self.footer.generation

    @property
    def count(self) -> int:
        """The number of commands in the catalogue."""
        return self.footer.count

    @property
    def version_hash(self) -> str:
        """Hex SHA-256 over all (name, hash) in name order."""
        return self.footer.version_hash.hex()

    @property
    def body(self) -> memoryview:
        """The serialized ``CatalogResponse``: the answer to ``SyncCatalog``."""
        return self._buffer[: self._body_length]

    @property
    def index(self) -> memoryview:
        """The slots of the index: see `layout`."""
        return self._index

    @property
    def size(self) -> int:
        """Octets of the whole snapshot."""
        return len(self._buffer)

    @property
    def buffer(self) -> memoryview:
        """The whole snapshot, read-only."""
        return self._buffer

    def release_pages(self) -> None:
        """Release the page tables of the parts that were read, if the snapshot is mapped memory. The snapshot can still
        be read.

        Reading a catalogue makes it resident in the process that reads. The shared memory itself is not released.
        """
        mapped = self._buffer.obj
        if isinstance(mapped, mmap):
            mapped.madvise(MADV_DONTNEED)

    def verify(self) -> None:
        """Check every octet before the footer against the footer's SHA-256, and that body and index agree. O(size).

        A file with a valid checksum may still have been made by another program. So every command in the body must be
        complete, in name order and found by its name, and the index must have no other entries.

        Raises:
            SnapshotError: if the content is damaged.
        """
        if hashlib.sha256(self._buffer[:-FOOTER_SIZE]).digest() != self.footer.content_digest:
            raise SnapshotError("content checksum: the body or the index is damaged")
        try:
            count = self._verify_body()
        except SnapshotError:
            raise
        except ValueError as error:  # a WireError, or text that is not UTF-8
            raise SnapshotError(f"body: {error}") from error
        if count != self.footer.count:
            raise SnapshotError(f"body: {count} commands found, the footer says {self.footer.count}")
        taken = sum(1 for _, _, length in SLOT.iter_unpack(self._index) if length)
        if taken != count:
            raise SnapshotError(f"index: {taken} slots are taken, for {count} commands")

    def _verify_body(self) -> int:
        """Check every command. Returns their number."""
        count, position, previous, ended = 0, 0, b"", False
        for number, _, content in wire.fields(self.body):
            if number != wire.COMMANDS:
                ended = True
                continue
            if ended:
                raise SnapshotError("body: a command comes after the catalogue's other fields")
            position += _COMMAND_TAG_LENGTH + len(wire.varint(len(content)))
            name = parse_definition(content).name.encode()
            if count and name <= previous:
                raise SnapshotError("body: the commands are not in name order")
            if self._find(name) != (position, len(content)):
                raise SnapshotError(f"index: command {count} is not found by its name")
            position += len(content)
            count, previous = count + 1, name
        return count

    def answer(self, name: bytes) -> bytes | None:
        """The serialized ``CommandResponse`` of the command called ``name`` (UTF-8), None if there is none."""
        found = self._find(name)
        return None if found is None else bytes(self._buffer[found[0] : found[0] + found[1]])

    def __contains__(self, name: bytes) -> bool:
        return self._find(name) is not None

    def get(self, name: str) -> Definition | None:
        """The definition called ``name``, None if there is none."""
        answer = self.answer(name.encode())
        return None if answer is None else parse_definition(memoryview(answer))

    def __len__(self) -> int:
        return self.footer.count

    def __iter__(self) -> Iterator[Definition]:
        """The definitions in name order."""
        for message in self.messages():
            yield parse_definition(message)

    def messages(self) -> Iterator[memoryview]:
        """Every serialized ``CommandResponse`` in name order, without copying it."""
        for number, _, content in wire.fields(self.body):
            if number == wire.COMMANDS:
                yield content

    def _find(self, name: bytes) -> tuple[int, int] | None:
        wanted = name_hash(name)
        position = wanted & self._mask
        while True:
            found, offset, length = SLOT.unpack_from(self._index, position * SLOT.size)
            if length == 0:
                return None
            if found == wanted:
                # An answer starts with its name field, tag and length included, so one comparison of prefixes shows
                # whether the slot belongs to this name or to another name with the same 64-bit hash.
                prefix = b"%c%b%b" % (_NAME_TAG, wire.varint(len(name)), name)
                if self._buffer[offset : offset + len(prefix)] == prefix:
                    return offset, length
            position = (position + 1) & self._mask


@dataclass(frozen=True, slots=True)
class Difference:
    """The names that were added, removed or changed between two snapshots, each in name order."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]


def diff(old: Snapshot | None, new: Snapshot, names: Iterable[bytes] | None = None) -> Difference:
    """The changes from ``old`` (None if nothing was served) to ``new``. A different signature is not a change.

    Args:
        old: What was served.
        new: What replaces it.
        names: The names that may differ, if they are known: only these are compared.
    """
    before = {} if old is None else _hashes(old, names)
    after = _hashes(new, names)
    return Difference(
        added=tuple(name for name in after if name not in before),
        removed=tuple(name for name in before if name not in after),
        changed=tuple(name for name, value in after.items() if before.get(name, value) != value),
    )


def _hashes(snapshot: Snapshot, names: Iterable[bytes] | None) -> dict[str, bytes]:
    """Name → hash, in name order. The code is not read: the hash is the last field, and its value has 64 octets."""
    if names is not None:
        found = ((name, snapshot.answer(name)) for name in sorted(names))
        return {name.decode(): message[-64:] for name, message in found if message is not None}
    hashes = {}
    for message in snapshot.messages():
        length, start = wire.read_varint(message, 1)
        hashes[str(message[start : start + length], "utf-8")] = bytes(message[-64:])
    return hashes
