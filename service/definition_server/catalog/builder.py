"""Builds a snapshot from rows.

The builder keeps one encoded ``CommandResponse`` for each name and little else, so it needs little more than 200 MB of
memory for 200 MB of code. The result is a list of pieces, which are never joined: they are written to shared memory one
after the other.

A build may begin with rows of the previous build (`take_over`). The messages of these rows are not copied one by one:
the new snapshot contains slices of the previous one, a slice for each run of commands between two changes. The result
is the same, octet for octet, as a build from all rows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from itertools import chain, compress
from operator import ne

from definition_server.catalog import assembly, wire
from definition_server.catalog.arranging import Arranging
from definition_server.catalog.blank_code import has_blank_code, is_blank
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
from definition_server.catalog.layout import FOOTER_SIZE, SLOT, Footer, slot_count
from definition_server.catalog.previous_build import Arrangement, PreviousBuild
from definition_server.catalog.signing import OVERHEAD, UNSIGNED, Binding, Signer, payload_of
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import (
    LARGE_DEFINITION,
    Findings,
    Suspect,
    reason_not_served,
)

_NO_ID = -(2**63) - 1
"""Stands for the id of a row that has no id. It is less than every real id."""

_HASH_TAG = bytes([wire.HASH << 3 | wire.LENGTH_DELIMITED, 64])
_HASH_LENGTH = len(_HASH_TAG) + 64


class CatalogTooLarge(ValueError):
    """The catalogue would not fit into one protobuf message (2 GiB), so no client could read it."""


@dataclass(frozen=True, slots=True)
class BuiltSnapshot:
    """A snapshot as its pieces, in order."""

    pieces: list[bytes | memoryview]
    footer: Footer

    @property
    def size(self) -> int:
        """Octets of the whole snapshot."""
        return self.footer.body_length + self.footer.slots * SLOT.size + FOOTER_SIZE

    def to_bytes(self) -> bytes:
        """The octets of the whole snapshot, joined."""
        return b"".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Unsealed:
    """A snapshot without its footer."""

    pieces: list[bytes | memoryview]
    """Body and index, in order."""
    arrangement: Arrangement
    body_length: int
    slots: int
    version_hash: bytes


@dataclass(frozen=True, slots=True)
class RowFacts:
    """The parts of one definition that a check reads."""

    id: int | None
    type: bytes
    interface: bytes
    code: bytes
    """Unsigned."""

    @classmethod
    def of(cls, row: Row) -> RowFacts:
        """The parts of a row that can be served."""
        return cls(row.id, row.type or DEFAULT_TYPE, row.interface or DEFAULT_INTERFACE, row.code or b"")


class SnapshotBuilder:
    """Collects rows, then builds one snapshot. Call `add` any number of times, `build` once.

    In between, `hold` and `leave_out` change the definition that is served for one name.
    """

    def __init__(self, signer: Signer | None = None, known: Mapping[bytes, bytes] | None = None) -> None:
        """
        Args:
            signer: Signs the code.
            known: The content hashes, by name, with which `differing` will compare the rows. If they are given here,
                each row is compared as soon as it is encoded, while it is in the processor's cache: for 100,000 rows
                this saves 30 to 60 ms.
        """
        self._signer = signer
        self._known = known or None
        # The names whose row differed from `_known` when it was added.
        self._differed: dict[bytes, None] = {}
        # Name → the reason and the row, for rows that are not served because of a fault. If several rows of a name have
        # a fault, the one with the highest id is kept.
        self._faults: dict[bytes, tuple[Unserved, Row]] = {}
        # name → id, and name → content hash, of the served definitions.
        self._ids: dict[bytes, int] = {}
        self._digests: dict[bytes, bytes] = {}
        # The names of served definitions whose code is blank.
        self._blank: set[bytes] = set()
        # name → encoded ``CommandResponse``, for commands that are not taken from the previous snapshot. Each is the
        # field of ``CatalogResponse`` that holds it: one piece of the body.
        self._fields: dict[bytes, bytes] = {}
        self._previous: PreviousBuild | None = None
        # The names whose command may differ from that in the previous snapshot, because its row was read again or is
        # gone.
        self._doubtful: set[bytes] = set()
        # The names of rows that were served when they were added, by range.
        self._ranges: dict[int, list[bytes]] = {}
        # Two reasons why a range is not kept: it has a row that was not served, or a row with one of these names.
        self._not_kept: set[int | None] = set()
        self._disputed: set[bytes] = set()
        self._kept: dict[int, Sequence[bytes]] = {}
        self._built: tuple[Footer, Arrangement] | None = None
        # After the build: the names whose command is not copied from the previous snapshot.
        self._renewed: list[bytes] = []
        self._suspicions: dict[bytes, list[Suspect]] = {}
        self.findings = Findings()

    def take_over(self, previous: PreviousBuild, ranges: Iterable[int]) -> None:
        """Begin with the rows of ``ranges``, which ``previous`` keeps. Must be called before the first `add`.

        Takes O(rows of the other ranges) time, or O(all rows) if the builder has hashes to compare the rows with.
        ``previous`` was built with the same signing key. Only one build may take ``previous`` over.
        """
        assert not self._ids, "rows are taken over first, so that none of them replaces a row that was read"
        self._previous = previous
        self._kept = {number: previous.ranges[number] for number in ranges}
        self._ids, self._digests = previous.tables()
        self._doubtful = set(previous.others)
        for number in previous.ranges.keys() - self._kept.keys():
            for name in previous.ranges[number]:
                del self._ids[name], self._digests[name]
            self._doubtful.update(previous.ranges[number])
        self._blank = {name for name in previous.blank if name in self._ids}
        if self._known is not None:
            self._differed = dict.fromkeys(self._compare(self._known))
        self.findings.source_rows += len(self._ids)

    def add(self, rows: Iterable[Row]) -> None:
        """Add ``rows``, in any order. Of rows with the same name the one with the highest id is served."""
        number = 0
        for number, row in enumerate(rows, 1):  # noqa: B007 - the number of the last one is used
            reason = reason_not_served(row)
            if reason is None:
                self._add_served(row)
            else:
                self._not_kept.add(row.range)
                self.findings.note(reason, row)
                if row.name:
                    self._note_fault(row.name, reason, row)
        self.findings.source_rows += number

    def _note_fault(self, name: bytes, reason: Unserved, row: Row) -> None:
        earlier = self._faults.get(name)
        if earlier is None or (_order(earlier[1]), earlier[0]) < (_order(row), reason):
            self._faults[name] = reason, row._replace(type=None, interface=None, code=None, avbc_code=None)

    def _add_served(self, row: Row) -> None:
        row_id, name, _, _, code, _, _, _, number = row
        name, code = name or b"", code or b""
        order = _NO_ID if row_id is None else row_id
        digest, field = self._encode(row)
        earlier = self._ids.get(name)
        if earlier is not None and not self._replaces(row, (order, digest), (earlier, self._digests[name])):
            return
        self._ids[name] = order
        self._digests[name] = digest
        self._fields[name] = field
        # Few rows begin with white space: this runs for each row of a full reading.
        if code[:1] <= b" " and is_blank(code):
            self._blank.add(name)
        elif earlier is not None:
            self._blank.discard(name)
        if number is None:
            self._not_kept.add(None)
        else:
            try:
                self._ranges[number].append(name)
            except KeyError:
                self._ranges[number] = [name]
        if self._known is not None and self._known.get(name) != digest:
            self._differed[name] = None
        if len(field) > LARGE_DEFINITION and wire.content_length(len(field)) > LARGE_DEFINITION:
            self._suspect(name, Suspect.LARGER_THAN_4_MIB, row)
        if len(name) > LONGEST_ASKED_FOR:
            self._suspect(name, Suspect.NAME_TOO_LONG, row)

    def _replaces(self, row: Row, new: tuple[int, bytes], earlier: tuple[int, bytes]) -> bool:
        """Whether ``row`` is served in place of an earlier row with the same name. ``new`` and ``earlier`` are the ids
        and hashes of the two rows.
        """
        name = row.name or b""
        # The ranges of both rows are not kept: when one of the rows is deleted, the other must be read again.
        self._disputed.add(name)
        # If two rows have the same id, the hash decides, so that the result does not depend on the order of reading.
        if new < earlier:
            self.findings.note(Unserved.DUPLICATE, row)
            self._not_kept.add(row.range)
            return False
        loser = row._replace(id=_id(earlier[0]))
        self.findings.note(Unserved.DUPLICATE, loser)
        for suspicion in self._suspicions.pop(name, ()):
            self.findings.withdraw(suspicion, loser)
        return True

    def _suspect(self, name: bytes, why: Suspect, row: Row) -> None:
        self._suspicions.setdefault(name, []).append(why)
        self.findings.note(why, row)

    def _encode(self, row: Row) -> tuple[bytes, bytes]:
        """The content hash of a row that can be served, and its command as a field of ``CatalogResponse``."""
        row_id, name, kind, interface, code, avbc_code, avbc_version, _, _ = row
        name, code = name or b"", code or b""
        kind, interface = kind or DEFAULT_TYPE, interface or DEFAULT_INTERFACE
        content = content_fields(name, kind, interface, code)
        bytecode = bytecode_fields(avbc_code, avbc_version) if avbc_code else b""
        digest = content_hash(content + bytecode if bytecode else content)
        if self._signer is not None:
            binding = Binding(name, kind, interface, digest)
            content = content_fields(name, kind, interface, self._signer.pack(code, binding))
        number = id_field(row_id)
        length = len(content) + len(number) + len(bytecode) + _HASH_LENGTH
        # The hash is the last field, although others have higher numbers: so it is found without reading the others.
        return digest, b"".join((b"\x0a", wire.varint(length), content, number, bytecode, _HASH_TAG, digest))

    @property
    def key_id(self) -> bytes:
        """The id of the key that signs the code."""
        return UNSIGNED if self._signer is None else self._signer.key_id

    @property
    def copies_from(self) -> Snapshot | None:
        """The snapshot from which commands are copied."""
        return None if self._previous is None else self._previous.snapshot

    @property
    def count(self) -> int:
        """The number of definitions collected so far."""
        return len(self._ids)

    def digests(self) -> dict[bytes, bytes]:
        """Name → content hash (64 hexadecimal digits) of every definition that `build` would serve. A new dict at each
        call.
        """
        return self._digests.copy()

    @property
    def blank(self) -> AbstractSet[bytes]:
        """The names in `digests` whose code is empty or only white space."""
        return self._blank

    def differing(self, known: Mapping[bytes, bytes]) -> list[bytes]:
        """The names in `digests` whose content hash is not the one in ``known``, or that ``known`` lacks."""
        digests = self._digests
        if known is self._known:
            # `known` may have changed since the comparison, and another row of the same name may be served now.
            return [name for name in self._differed if name in digests and digests[name] != known.get(name)]
        return list(self._compare(known))

    def comparison_is_over(self) -> None:
        """`differing` will not be called again with the hashes known from the start: they may be freed."""
        self._known = None
        self._differed = {}

    def _compare(self, known: Mapping[bytes, bytes]) -> Iterator[bytes]:
        """`differing`, for all rows that were added so far. The interpreter executes no bytecode for a row that is
        unchanged.
        """
        return compress(self._digests, map(ne, self._digests.values(), map(known.get, self._digests)))

    def faults(self) -> Mapping[bytes, Unserved]:
        """Each name that has only rows that cannot be served → the reason. If a name has several such rows, the reason
        is that of the row with the highest id.
        """
        return {name: reason for name, (reason, _) in self._faults.items() if name not in self._ids}

    def row_facts(self, name: bytes) -> RowFacts:
        """The row that `build` would serve under ``name``.

        Raises:
            KeyError: if `build` would serve nothing under ``name``.
        """
        order = self._ids[name]
        definition = parse_definition(memoryview(self._message(name)))
        code = definition.code if self._signer is None else payload_of(definition.code)
        return RowFacts(_id(order), definition.type.encode(), definition.interface_json.encode(), code)

    def _message(self, name: bytes) -> bytes:
        field = self._fields.get(name)
        if field is not None:
            return _content(field)
        assert self._previous is not None
        message = self._previous.snapshot.answer(name)
        assert message is not None, "a command that was taken over is in the previous snapshot"
        return message

    def id_of(self, name: bytes) -> int | None:
        """The id of the row that is served under ``name``; None if the row is held, or has no id."""
        return _id(self._ids[name])

    def encode(self, row: Row) -> bytes:
        """The ``CommandResponse`` of a row that was served before, signed with the builder's key."""
        return _content(self._encode(row)[1])

    def hold(self, name: bytes, message: bytes, reason: Unserved) -> None:
        """Serve ``message``, an earlier ``CommandResponse`` of ``name``, in place of the table's row.

        ``message`` comes from a snapshot that was built with the same signing key. The `findings` about the row that is
        not served are withdrawn; the caller reports it as held, for ``reason``.
        """
        self._withdraw(name)
        self._disputed.add(name)
        self._ids[name], self._digests[name] = _NO_ID, bytes(message[-64:])
        self._fields[name] = wire.field(wire.COMMANDS, message)
        if has_blank_code(message, 0 if self._signer is None else OVERHEAD):
            self._blank.add(name)
        else:
            self._blank.discard(name)

    def leave_out(self, name: bytes, reason: Unserved) -> None:
        """Serve nothing under ``name``, and count the row that is left out under ``reason``."""
        order = self._ids[name]
        self._withdraw(name)
        self._disputed.add(name)
        self._doubtful.add(name)
        del self._ids[name], self._digests[name]
        self._fields.pop(name, None)
        self._blank.discard(name)
        self.findings.note(reason, Row(_id(order), name, None, None, None))

    def _withdraw(self, name: bytes) -> None:
        """Remove from `findings` the suspicions about the row that would have been served under ``name``. If no row
        would have been served, remove the fault of the row.
        """
        if name in self._ids:
            row = Row(_id(self._ids[name]), name, None, None, None)
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
            CatalogTooLarge: if the body would exceed 2 GiB.
        """
        unsealed = self._unsealed()
        digest = hashlib.sha256()
        for chunk in assembly.chunks(list(unsealed.pieces)):
            digest.update(chunk)
        footer = self.seal(unsealed, digest.digest(), generation=generation, created_at_ns=created_at_ns)
        return BuiltSnapshot([*unsealed.pieces, footer.pack()], footer)

    def arrange(self) -> Unsealed:
        """The snapshot without its footer. `seal` returns the footer, for which the caller must hash the content.

        Afterwards the builder refers to no message: the caller can free each piece once it is written.

        Raises:
            CatalogTooLarge: if the body would exceed 2 GiB.
        """
        unsealed = self._unsealed()
        self._fields = {}
        return unsealed

    def seal(self, unsealed: Unsealed, content_digest: bytes, *, generation: int, created_at_ns: int) -> Footer:
        """The footer of ``unsealed``, whose pieces have the SHA-256 ``content_digest``. Arguments: see `build`."""
        footer = Footer(
            generation=generation,
            created_at_ns=created_at_ns,
            count=len(unsealed.arrangement.names),
            body_length=unsealed.body_length,
            slots=unsealed.slots,
            key_id=self.key_id,
            version_hash=unsealed.version_hash,
            content_digest=content_digest,
        )
        self._built = footer, unsealed.arrangement
        return footer

    def _unsealed(self) -> Unsealed:
        pieces, arrangement, body = self._arrange()
        names, before = arrangement.names, self._before()
        # The first commands have the places, names and hashes that they had in the previous snapshot.
        unchanged = bisect_left(before.names, self._renewed[0]) if self._renewed else len(before.names)
        states = arrangement.version_states, before.version_states
        version = assembly.version_hash(names, self._digests, *states, unchanged)
        tail = assembly.catalog_tail(len(names), version)
        body_length = body + len(tail)
        if body_length > wire.MAX_MESSAGE:
            raise CatalogTooLarge(
                f"{body_length} bytes of definitions; a protobuf message has at most {wire.MAX_MESSAGE}"
            )
        slots = slot_count(len(names))
        if self._previous is not None and arrangement.slots is before.slots:
            index = assembly.index_after(self._previous.snapshot.index, arrangement, unchanged)
        else:
            index = assembly.index(slots, arrangement)
        pieces += [tail, index]
        return Unsealed(pieces, arrangement, body_length, slots, version)

    def _before(self) -> Arrangement:
        return Arrangement() if self._previous is None else self._previous.arrangement

    def _arrange(self) -> tuple[list[bytes | memoryview], Arrangement, int]:
        """The commands as pieces of the body, their places, and the octets of all pieces."""
        before = self._before()
        old = None if self._previous is None else self._previous.snapshot.body
        arranging = Arranging(before, old, self._fields.__getitem__)
        if self._previous is None:
            self._renewed = sorted(self._fields)
            arranging.append(self._renewed)
            return arranging.pieces, arranging.finish(), arranging.size
        self._renewed = sorted(self._doubtful | self._fields.keys())
        run: list[bytes] = []
        for name in self._renewed:
            number = bisect_left(before.names, name, arranging.done)
            if number != arranging.done:
                arranging.append(run)
                arranging.copy(number)
                run = []
            arranging.done = number + (number < len(before.names) and before.names[number] == name)
            if name in self._fields:  # a name without a field has no command any more
                run.append(name)
        arranging.append(run)
        arranging.copy(len(before.names))
        return arranging.pieces, arranging.finish(), arranging.size

    def changed_since(self, snapshot: Snapshot | None) -> Sequence[bytes] | None:
        """After `build`: the names whose command may differ from that in ``snapshot``; None if any command may
        differ.
        """
        before = self.copies_from
        if before is None or snapshot is None or not snapshot.footer.same_octets(before.footer):
            return None
        return self._renewed

    def as_previous(self, snapshot: Snapshot) -> PreviousBuild | None:
        """The parts of this build that the next one may take over, if ``snapshot`` has the octets that `build` made.

        Must be the last call to this builder, after `build`: the next build owns and changes its tables. None if
        ``snapshot`` is not the one that was built, or the rows came without ranges.
        """
        assert self._built is not None, "it was built"
        footer, arrangement = self._built
        if not footer.same_octets(snapshot.footer) or None in self._not_kept:
            return None
        # The next build takes over no command of these names: disputed names, and all names of a range that is read
        # again.
        disputed = self._disputed | self._suspicions.keys()
        others, kept = set(disputed), dict[int, Sequence[bytes]]()
        for number, names in chain(self._kept.items(), self._ranges.items()):
            if number in self._not_kept or not disputed.isdisjoint(names):
                others.update(names)
            else:
                kept[number] = names
        for name in others:
            self._ids.pop(name, None)
            self._digests.pop(name, None)
        # Freed here, in the caller's thread: its lists have an entry for each command.
        self._previous = None
        return PreviousBuild(snapshot, arrangement, kept, others, self._blank, (self._ids, self._digests))


def _content(field: bytes) -> bytes:
    """The content of ``field``."""
    length, start = wire.read_varint(field, 1)
    return field[start : start + length]


def _order(row: Row) -> int:
    return _NO_ID if row.id is None else row.id


def _id(order: int) -> int | None:
    return None if order == _NO_ID else order


def rows_of(snapshot: Snapshot) -> Iterator[Row]:
    """The rows that ``snapshot`` serves, with unsigned source code; an id is None if it is unknown.

    Used to rebuild a stored snapshot with another signing key.
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
