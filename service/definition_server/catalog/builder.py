"""Builds a snapshot from rows.

The builder keeps one encoded ``CommandResponse`` per name and nothing else, so 200 MB of code take little more than
200 MB of memory while they are read. The result is a list of pieces, which are written to shared memory one after the
other and never joined.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from operator import ne

from definition_server.catalog import wire
from definition_server.catalog.definition import (
    DEFAULT_INTERFACE,
    DEFAULT_TYPE,
    LONGEST_ASKED_FOR,
    Row,
    Unserved,
    bytecode_fields,
    content_fields,
    content_hash,
    id_field,
    parse_definition,
)
from definition_server.catalog.layout import FOOTER_SIZE, SLOT, Footer, name_hash, slot_count
from definition_server.catalog.signing import UNSIGNED, Binding, Signer, payload_of
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import (
    LARGE_DEFINITION,
    Findings,
    Suspect,
    reason_not_served,
)

_NO_ID = -(2**63) - 1
"""Stands for the id of a row without one: below every other."""

_HASH_TAG = bytes([wire.HASH << 3 | wire.LENGTH_DELIMITED, 64])


class CatalogTooLarge(ValueError):
    """The catalogue would not fit into one protobuf message (2 GiB), so no client could read it."""


@dataclass(frozen=True, slots=True)
class BuiltSnapshot:
    """A snapshot as its pieces, in order."""

    pieces: list[bytes]
    footer: Footer

    @property
    def size(self) -> int:
        """Octets in all."""
        return self.footer.body_length + self.footer.slots * SLOT.size + FOOTER_SIZE

    def to_bytes(self) -> bytes:
        """All octets in one object."""
        return b"".join(self.pieces)


@dataclass(frozen=True, slots=True)
class RowFacts:
    """The parts of one definition that a check reads."""

    id: int | None
    type: bytes
    interface: bytes
    code: bytes
    """Unsigned."""


class SnapshotBuilder:
    """Collects rows, then builds one snapshot. Call `add` any number of times, `build` once.

    Between the two, `hold` and `leave_out` change what is served for one name.
    """

    def __init__(self, signer: Signer | None = None, known: Mapping[bytes, bytes] | None = None) -> None:
        """
        Args:
            signer: Signs the code.
            known: The content hashes, by name, with which `differing` will compare the rows. Each is then compared when
                it is encoded, while it is in the processor's cache: of 100,000 rows that saves 30 to 60 ms.
        """
        self._signer = signer
        self._known = known or None
        # The names whose row differed from `_known` when it was added.
        self._differed: dict[bytes, None] = {}
        # Rows with a name that are not served for a fault of their own, by name: the one with the highest id.
        self._faults: dict[bytes, tuple[Unserved, Row]] = {}
        # name → (id of its row, encoded CommandResponse)
        self._entries: dict[bytes, tuple[int, bytes]] = {}
        # name → content hash. A table of its own, because to copy it takes a tenth of the time of making it.
        self._digests: dict[bytes, bytes] = {}
        self._suspicions: dict[bytes, list[Suspect]] = {}
        self.findings = Findings()

    def add(self, rows: Iterable[Row]) -> None:
        """Add ``rows``, in any order. Of rows with the same name the one with the highest id is served."""
        for row in rows:
            self.findings.source_rows += 1
            reason = reason_not_served(row)
            if reason is None:
                self._add_served(row)
            else:
                self.findings.note(reason, row)
                if row.name:
                    self._note_fault(row.name, reason, row)

    def _note_fault(self, name: bytes, reason: Unserved, row: Row) -> None:
        earlier = self._faults.get(name)
        if earlier is None or _order(earlier[1]) < _order(row):
            self._faults[name] = reason, row._replace(type=None, interface=None, code=None, avbc_code=None)

    def _add_served(self, row: Row) -> None:
        name = row.name or b""
        earlier = self._entries.get(name)
        if earlier is not None:
            loser = row if _order(row) < earlier[0] else row._replace(id=_id(earlier[0]))
            self.findings.note(Unserved.DUPLICATE, loser)
            if loser is row:
                return
            for suspicion in self._suspicions.pop(name, ()):
                self.findings.withdraw(suspicion, loser)
        digest, message = self._encode(row)
        self._entries[name] = (_order(row), message)
        self._digests[name] = digest
        if self._known is not None and self._known.get(name) != digest:
            self._differed[name] = None
        if len(message) > LARGE_DEFINITION:
            self._suspect(name, Suspect.LARGER_THAN_4_MIB, row)
        if len(name) > LONGEST_ASKED_FOR:
            self._suspect(name, Suspect.NAME_TOO_LONG, row)

    def _suspect(self, name: bytes, why: Suspect, row: Row) -> None:
        self._suspicions.setdefault(name, []).append(why)
        self.findings.note(why, row)

    def _encode(self, row: Row) -> tuple[bytes, bytes]:
        """Content hash and ``CommandResponse`` of a row that can be carried."""
        name, code = row.name or b"", row.code or b""
        interface = row.interface or DEFAULT_INTERFACE
        kind = row.type or DEFAULT_TYPE
        content = content_fields(name, kind, interface, code)
        bytecode = bytecode_fields(row.avbc_code, row.avbc_version)
        digest = content_hash(content + bytecode if bytecode else content)
        if self._signer is not None:
            binding = Binding(name, kind, interface, digest)
            content = content_fields(name, kind, interface, self._signer.pack(code, binding))
        # The hash comes last, behind fields of higher numbers, so that it is found without reading what precedes it.
        return digest, b"".join((content, id_field(row.id), bytecode, _HASH_TAG, digest))

    @property
    def key_id(self) -> bytes:
        """That of the key that signs what is built."""
        return UNSIGNED if self._signer is None else self._signer.key_id

    @property
    def count(self) -> int:
        """Definitions collected so far."""
        return len(self._entries)

    def digests(self) -> dict[bytes, bytes]:
        """Name → content hash (64 hexadecimal digits) of what `build` would serve. A new table at each call."""
        return self._digests.copy()

    def differing(self, known: Mapping[bytes, bytes]) -> list[bytes]:
        """The names whose content hash, as `digests` has it, is another one than in ``known``, or is not there."""
        digests = self._digests
        if known is self._known:
            # `known` may have changed meanwhile, and of rows with one name another one may be served.
            return [name for name in self._differed if name in digests and digests[name] != known.get(name)]
        # Without a step of the interpreter for each row that is as it was.
        return list(compress(digests, map(ne, digests.values(), map(known.get, digests))))

    def faults(self) -> Mapping[bytes, Unserved]:
        """The names of which no row can be served → why not. Of several rows of a name the highest id's reason."""
        return {name: reason for name, (reason, _) in self._faults.items() if name not in self._entries}

    def row_facts(self, name: bytes) -> RowFacts:
        """The row that `build` would serve under ``name``.

        Raises:
            KeyError: where it would serve none.
        """
        order, message = self._entries[name]
        definition = parse_definition(memoryview(message))
        code = definition.code if self._signer is None else payload_of(definition.code)
        return RowFacts(_id(order), definition.type.encode(), definition.interface_json.encode(), code)

    def id_of(self, name: bytes) -> int | None:
        """The id of the row that is served under ``name``; None where it is held, or has none."""
        return _id(self._entries[name][0])

    def encode(self, row: Row) -> bytes:
        """The ``CommandResponse`` of a row that was served before, signed with the builder's key."""
        return self._encode(row)[1]

    def hold(self, name: bytes, message: bytes, reason: Unserved) -> None:
        """Serve ``message``, an earlier ``CommandResponse`` of ``name``, in place of the table's row.

        ``message`` comes from a snapshot that was built with the same signing key. The `findings` about the row that is
        not served are withdrawn; the caller reports it as held, for ``reason``.
        """
        self._withdraw(name)
        self._entries[name] = (_NO_ID, bytes(message))
        self._digests[name] = bytes(message[-64:])

    def leave_out(self, name: bytes, reason: Unserved) -> None:
        """Serve nothing under ``name``, and count its row under ``reason``."""
        order = self._entries[name][0]
        self._withdraw(name)
        del self._entries[name], self._digests[name]
        self.findings.note(reason, Row(_id(order), name, None, None, None))

    def _withdraw(self, name: bytes) -> None:
        """Take back what `findings` say of the row of ``name`` that would have been served, or of its fault."""
        if name in self._entries:
            row = Row(_id(self._entries[name][0]), name, None, None, None)
            for suspicion in self._suspicions.pop(name, ()):
                self.findings.withdraw(suspicion, row)
        elif name in self._faults:
            self.findings.withdraw(*self._faults.pop(name))

    def build(self, *, generation: int, created_at_ns: int) -> BuiltSnapshot:
        """The snapshot of the rows that were added.

        Args:
            generation: number of the publication.
            created_at_ns: time of building, nanoseconds since the epoch.

        Raises:
            CatalogTooLarge: where the body would exceed 2 GiB.
        """
        names = sorted(self._entries)
        version = _version_hash((name, self._digests[name]) for name in names)
        pieces: list[bytes] = []
        slots = _Slots(slot_count(len(names)))
        position = 0
        for name in names:
            message = self._entries[name][1]
            prefix = b"\x0a" + wire.varint(len(message))
            slots.put(name_hash(name), position + len(prefix), len(message))
            position += len(prefix) + len(message)
            pieces.append(prefix)
            pieces.append(message)
        tail = _catalog_tail(len(names), version)
        body_length = position + len(tail)
        if body_length > wire.MAX_MESSAGE:
            raise CatalogTooLarge(f"{body_length} bytes of definitions; protobuf ends at {wire.MAX_MESSAGE}")
        pieces += [tail, slots.to_bytes()]
        digest = hashlib.sha256()
        for piece in pieces:
            digest.update(piece)
        footer = Footer(
            generation=generation,
            created_at_ns=created_at_ns,
            count=len(names),
            body_length=body_length,
            slots=slots.count,
            key_id=UNSIGNED if self._signer is None else self._signer.key_id,
            version_hash=version,
            content_digest=digest.digest(),
        )
        pieces.append(footer.pack())
        return BuiltSnapshot(pieces, footer)


def _order(row: Row) -> int:
    return _NO_ID if row.id is None else row.id


def _id(order: int) -> int | None:
    return None if order == _NO_ID else order


def _version_hash(pairs: Iterable[tuple[bytes, bytes]]) -> bytes:
    """SHA-256 over ``name NUL hash`` of every definition; a PostgreSQL text cannot contain NUL."""
    digest = hashlib.sha256()
    for name, value in pairs:
        digest.update(b"%b\0%b" % (name, value))
    return digest.digest()


def _catalog_tail(count: int, version: bytes) -> bytes:
    total = bytes([wire.TOTAL_COUNT << 3 | wire.VARINT]) + wire.varint(count) if count else b""
    return total + wire.field(wire.VERSION_HASH, version.hex().encode("ascii"))


class _Slots:
    """The index under construction."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._octets = bytearray(count * SLOT.size)
        self._taken = bytearray(count)

    def put(self, hashed: int, offset: int, length: int) -> None:
        mask = self.count - 1
        position = hashed & mask
        while self._taken[position]:
            position = (position + 1) & mask
        self._taken[position] = 1
        SLOT.pack_into(self._octets, position * SLOT.size, hashed, offset, length)

    def to_bytes(self) -> bytes:
        return bytes(self._octets)


def rows_of(snapshot: Snapshot) -> Iterator[Row]:
    """The served rows that ``snapshot`` was built from, with unsigned source code; an id is None where it is unknown.

    They serve to rebuild a stored snapshot under another signing key.
    """
    signed = snapshot.footer.key_id != UNSIGNED
    for definition in snapshot:
        code = payload_of(definition.code) if signed else definition.code
        yield Row(
            definition.internal_id or None,
            definition.name.encode(),
            definition.type.encode(),
            definition.interface_json.encode(),
            code,
            definition.avbc_code or None,
            definition.avbc_version or None,
        )
