"""A build on the previous build equals a build of all rows, octet for octet, and gives the same data to the gate and to
the findings. This holds for any rows that are added, removed or moved, that lose their name to another row, or that
have faults, and for any commands that the gate holds or leaves out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from random import Random
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from definition_server.catalog import assembly, layout
from definition_server.catalog.assembly import chunks
from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder
from definition_server.catalog.definition import Row, Unserved
from definition_server.catalog.guard import Contents
from definition_server.catalog.previous_build import PreviousBuild
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot, diff
from definition_server.catalog.validation import LARGE_DEFINITION, Suspect

PLACES, OF_A_RANGE = 15, 3
"""The number of places that rows may be in, and the number of places in a range."""

BAD = b"bad"
"""The code that the gate of this test refuses."""

NAMES = st.sampled_from([b"a", b"ab", b"b", "ñ".encode(), b"n" * 200, b"z", b"", None])
TEXTS = st.sampled_from([None, b"", b"x", b"\xff", "é".encode(), b"long " * 60])
CODES = TEXTS | st.sampled_from([BAD, b" \n", b"c" * 20_000]) | st.integers(0, 5).map(lambda number: b"%d" % number)
FAULTS = st.sampled_from([None] * 9 + [Unserved.TOO_LARGE])
ROWS = st.builds(
    Row,
    st.none(),
    NAMES,
    TEXTS,
    TEXTS,
    CODES,
    st.sampled_from([None, b"bytecode"]),
    st.sampled_from([None, -7]),
    FAULTS,
)
IDS = st.integers(1, 12) | st.integers(-(2**63), 2**63 - 1)
CHANGES = st.one_of(
    st.tuples(st.just("put"), st.integers(0, PLACES - 1), ROWS, IDS),
    st.tuples(st.just("delete"), st.integers(0, PLACES - 1)),
    st.tuples(st.just("move"), st.integers(0, PLACES - 1), st.integers(0, PLACES - 1)),
)


@dataclass
class Table:
    """Rows at places. Ids and names need not be unique."""

    rows: dict[int, Row] = field(default_factory=dict)
    changed: set[int] = field(default_factory=set)
    """Ranges."""

    def change(self, kind: str, place: int, *values: object) -> None:
        """Apply one of `CHANGES`."""
        if kind == "put":
            row, number = values
            assert isinstance(row, Row)
            assert isinstance(number, int)
            self._set(place, row._replace(id=number))
        elif kind == "delete":
            self._set(place, None)
        else:
            (to,) = values
            assert isinstance(to, int)
            moved = self.rows.get(place)
            if to not in self.rows:
                self._set(place, None)
                self._set(to, moved)

    def _set(self, place: int, row: Row | None) -> None:
        self.rows.pop(place, None)
        number = place // OF_A_RANGE
        self.changed.add(number)
        if row is not None:
            self.rows[place] = row._replace(range=number)

    def ranges(self) -> set[int]:
        return {place // OF_A_RANGE for place in self.rows}


def judge(builder: SnapshotBuilder, last: Snapshot | None) -> None:
    """Hold bad commands at their last good version, or leave them out, as the gate does."""
    faulty = dict(builder.faults())
    bad = [name for name in builder.digests() if builder.row_facts(name).code == BAD]
    for name in sorted({*faulty, *bad}):
        message = None if last is None else last.answer(name)
        if message is not None and BAD not in message:
            builder.hold(name, message, Unserved.CODE_INVALID)
        elif name in bad:
            builder.leave_out(name, Unserved.CODE_INVALID)


def seen(builder: SnapshotBuilder, known: Mapping[bytes, bytes]) -> object:
    """The data that a build gives to the gate and to the findings."""
    digests, findings = builder.digests(), builder.findings
    facts = {name: (builder.row_facts(name), builder.id_of(name)) for name in digests}
    examples = None
    if sum(findings.unserved.values()) <= 10:  # if there are more than ten, any ten of them may be shown
        examples = {reason: sorted(found) for reason, found in findings.examples.items()}
    counts = findings.source_rows, dict(findings.unserved), dict(findings.suspect), examples
    differing = sorted(builder.differing(known))
    return digests, facts, dict(builder.faults()), builder.count, counts, differing


def built(
    builder: SnapshotBuilder, rows: Iterable[Row], last: Snapshot | None, known: Mapping[bytes, bytes]
) -> tuple[object, object, BuiltSnapshot]:
    builder.add(rows)
    before = seen(builder, known)
    judge(builder, last)
    snapshot = builder.build(generation=3, created_at_ns=5)
    return before, seen(builder, known), snapshot


@given(
    st.lists(st.lists(CHANGES, max_size=8), min_size=2, max_size=6),
    st.sampled_from([None, Signer("key"), Signer("key", 2)]),
    st.randoms(use_true_random=False),
)
@example(
    # The row that was served under a name is removed, and the other one, whose range did not change, is served.
    [
        [("put", 0, Row(None, b"a", None, None, b"old"), 1), ("put", 9, Row(None, b"a", None, None, b"new"), 2)],
        [("put", 14, Row(None, b"b", None, None, b"other"), 3)],
        [("delete", 9)],
    ],
    None,
    Random(1),
)
@example(
    # A range with a faulty row and a valid row; neither row changes afterwards.
    [
        [("put", 0, Row(None, b"a", None, None, None), 1), ("put", 1, Row(None, b"b", None, None, b"sound"), 2)],
        [("put", 14, Row(None, b"z", None, None, b"other"), 3)],
        [("put", 14, Row(None, b"z", None, None, b"changed"), 3)],
    ],
    Signer("key"),
    Random(1),
)
def test_a_build_on_the_previous_one_equals_a_build_of_all_rows(steps, signer, random) -> None:
    small = mock.patch.multiple(assembly, _HASHED_TOGETHER=2, _CHUNK_OCTETS=50, _LONG_OCTETS=30)
    with small, mock.patch.object(layout, "_HASHED_TOGETHER", 2):
        compare(steps, signer, random)


@pytest.mark.parametrize("changed", range(12))
def test_the_version_hash_is_computed_only_from_the_first_changed_definition_on(changed: int) -> None:
    """Twelve names, each in a range of its own. One of them gets another code."""
    first = [("put", OF_A_RANGE * place, Row(None, b"%02d" % place, None, None, b"old"), place) for place in range(12)]
    another = Row(None, b"%02d" % changed, None, None, b"new")
    with mock.patch.object(assembly, "_HASHED_TOGETHER", 2):
        compare([first, [("put", OF_A_RANGE * changed, another, changed)]], None, Random(1))


def test_the_names_of_removed_rows_are_forgotten_when_their_range_is_read_again() -> None:
    rows = [("put", place, Row(None, b"twice", None, None, b"%d" % place), place) for place in (0, OF_A_RANGE)]
    other = ("put", 2 * OF_A_RANGE, Row(None, b"other", None, None, b"1"), 3)
    gone = [("delete", 0), ("delete", OF_A_RANGE)]
    compare([[*rows, other], gone], None, Random(1))


def compare(steps, signer, random) -> None:
    """After each of ``steps``, build on the previous build, and build from all rows."""
    table, previous, last = Table(), None, None
    known: dict[bytes, bytes] = {b"gone": b""}
    for step in steps:
        for change in step:
            table.change(*change)
        rows = list(table.rows.values())
        random.shuffle(rows)
        full = SnapshotBuilder(signer, known)
        whole = built(full, rows, last, known)
        builder, kept = SnapshotBuilder(signer, known), set[int]()
        if previous is not None:
            kept = (previous.ranges.keys() & table.ranges()) - table.changed
            builder.take_over(previous, kept)
        read = [row for row in rows if row.range not in kept]
        part = built(builder, read, last, known)
        assert part[:2] == whole[:2]
        assert part[2].to_bytes() == whole[2].to_bytes()
        assert b"".join(chunks(list(part[2].pieces))) == whole[2].to_bytes()
        before, last = last, Snapshot(part[2].to_bytes())
        last.verify()
        for counted in (False, True):
            # The guard judges the same, whether it has read the catalogue or asks the builder.
            read_in_full = Contents.of(last, with_hashes=counted)
            for each in (full, builder):
                assert Contents.built(last, each.digests(), each.blank, with_hashes=counted) == read_in_full
        changed = builder.changed_since(before)
        assert (changed is None) == (previous is None)
        if before is not None and changed is not None:
            # The names reported as changed are the same as those found by a comparison of all names.
            assert diff(before, last, changed) == diff(before, last)
            for counted in (False, True):
                known_before = Contents.of(before, with_hashes=counted)
                assert known_before.after(last, changed, with_hashes=counted) == Contents.of(last, with_hashes=counted)
        previous = builder.as_previous(last)
        assert previous is not None
        table.changed.clear()
        # All names except one, as if one row still had to be judged.
        known = dict(list(builder.digests().items())[1:])


def some(count: int, *, size: int = 100) -> list[Row]:
    return [Row(n, b"name%04d" % n, None, None, b"%d" % n + bytes(size), range=n // 10) for n in range(count)]


def previous_of(rows: list[Row], signer: Signer | None = None) -> tuple[PreviousBuild, Snapshot]:
    builder = SnapshotBuilder(signer)
    builder.add(rows)
    snapshot = Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes())
    previous = builder.as_previous(snapshot)
    assert previous is not None
    return previous, snapshot


def test_unchanged_rows_are_slices_of_the_previous_snapshot() -> None:
    rows = some(1000)
    previous, snapshot = previous_of(rows)
    assert len(previous.ranges) == 100
    builder = SnapshotBuilder()
    builder.take_over(previous, previous.ranges.keys() - {50})
    builder.add(row._replace(code=b"changed") if row.id == 505 else row for row in rows[500:510])
    pieces = builder.build(generation=2, created_at_ns=2).pieces
    slices = [piece for piece in pieces if isinstance(piece, memoryview) and piece.obj is snapshot.buffer.obj]
    assert len(slices) == 2
    # The other pieces: ten commands, tail, index, footer.
    assert len(pieces) == 2 + 10 + 3


@pytest.mark.parametrize(
    "row",
    [
        Row(7000, b"name0007", None, None, b"wins", range=70),
        Row(-7, b"name0007", None, None, b"loses", range=70),
        Row(7000, b"other", None, None, None, range=70),
        Row(7000, b"other", None, None, None, range=9),
        Row(7000, None, None, None, b"code", range=70),
        Row(7000, b"other", None, None, bytes(LARGE_DEFINITION), range=70),
    ],
    ids=["wins its name", "loses its name", "no code", "no code beside others", "no name", "large"],
)
def test_a_range_with_a_faulty_or_duplicate_row_is_read_again(row: Row) -> None:
    previous, _ = previous_of([*some(100), row])
    # If two rows share a name, the ranges of both are read again, because the range of the unserved row is not known.
    read_again = {0, 70} if row.name == b"name0007" else {row.range}
    assert previous.ranges.keys() == set(range(10)) - read_again


@pytest.mark.parametrize("held", [True, False], ids=["held", "left out"])
def test_a_range_with_a_row_that_the_gate_does_not_serve_is_read_again(held: bool) -> None:
    _, before = previous_of(some(100))
    builder = SnapshotBuilder()
    builder.add(some(100))
    name = b"name0057"
    if held:
        message = before.answer(name)
        assert message is not None
        builder.hold(name, message, Unserved.CODE_INVALID)
    else:
        builder.leave_out(name, Unserved.CODE_INVALID)
    previous = builder.as_previous(Snapshot(builder.build(generation=2, created_at_ns=2).to_bytes()))
    assert previous is not None
    assert previous.ranges.keys() == set(range(10)) - {5}, "the gate judges the row in the next build, too"


@pytest.mark.parametrize("order", [(9, 3, -4, None), (None, -4, 3, 9), (-4, 9, None, 3)], ids=str)
def test_of_several_faulty_rows_of_a_name_the_one_with_the_highest_id_gives_the_reason(
    order: tuple[int | None, ...],
) -> None:
    faults = {9: Unserved.TOO_LARGE, 3: Unserved.INTERFACE_INVALID, -4: Unserved.INVALID_ID, None: Unserved.DUPLICATE}
    for ids, highest in ((order, 9), ([each for each in order if each in (None, -4)], -4)):
        builder = SnapshotBuilder()
        builder.add(Row(each, b"name", None, None, b"pass", fault=faults[each]) for each in ids)
        assert dict(builder.faults()) == {b"name": faults[highest]}, "a row without an id is the lowest"


@pytest.mark.parametrize("code", [b"other", None], ids=["both can be served", "neither can be served"])
def test_the_same_row_is_served_in_any_order_if_two_rows_share_name_and_id(code: bytes | None) -> None:
    rows = [Row(7, b"name", None, None, code), Row(7, b"name", None, b"[]", code and b"code", fault=None)]
    rows[1] = rows[1] if code else rows[1]._replace(fault=Unserved.TOO_LARGE)
    made = set()
    for order in (rows, rows[::-1]):
        builder = SnapshotBuilder()
        builder.add(order)
        made.add((builder.build(generation=1, created_at_ns=1).to_bytes(), repr(builder.faults())))
    assert len(made) == 1


def test_rows_without_ranges_are_not_taken_over() -> None:
    builder = SnapshotBuilder()
    builder.add([*some(10), Row(77, b"elsewhere", None, None, b"")])
    assert builder.as_previous(Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes())) is None


def test_changes_since_another_snapshot_than_the_previous_one_are_not_known() -> None:
    previous, snapshot = previous_of(some(10))
    _, other = previous_of(some(11))
    builder = SnapshotBuilder()
    builder.take_over(previous, previous.ranges)
    builder.add([Row(77, b"new", None, None, b"", range=70)])
    builder.build(generation=2, created_at_ns=2)
    assert builder.changed_since(snapshot) == [b"new"]
    assert builder.changed_since(other) is None
    assert builder.changed_since(None) is None


def test_contents_with_the_same_names_share_them_in_memory() -> None:
    before, after = previous_of(some(10))[1], previous_of([*some(9), Row(9, b"name0009", None, None, b" ", range=0)])[1]
    known = Contents.of(before)
    later = known.after(after, [b"name0009"])
    assert later == Contents.of(after)
    assert later.names is known.names
    assert known.lost_in(later) == {b"name0009"}


BLANK, CODE = Row(1, b"a", None, None, b" \n", range=0), Row(2, b"a", None, None, b"code", range=1)


@pytest.mark.parametrize("signer", [None, Signer("key")], ids=["unsigned", "signed"])
@pytest.mark.parametrize(
    ("rows", "last", "then", "blank"),
    [
        ([BLANK._replace(code=b"")], None, "serve", True),
        ([BLANK._replace(code=b"\t" * 1024)], None, "serve", True),
        ([BLANK._replace(code=b"\t" * 1025)], None, "serve", False),
        ([BLANK._replace(code=b"\tx")], None, "serve", False),
        ([BLANK, CODE], None, "serve", False),
        ([CODE, BLANK], None, "serve", False),
        ([BLANK._replace(id=3), CODE], None, "serve", True),
        ([BLANK], CODE, "hold", False),
        ([CODE], BLANK, "hold", True),
        ([BLANK], None, "leave out", False),
    ],
    ids=["empty", "1024 octets", "1025 octets", "not only white space", "replaced by code", "after code",
         "wins its name", "held at code", "held at blank code", "left out"],
)  # fmt: skip
def test_the_builder_knows_which_code_is_blank(
    rows: list[Row], last: Row | None, then: str, blank: bool, signer: Signer | None
) -> None:
    builder = SnapshotBuilder(signer)
    builder.add(rows)
    if then == "hold":
        assert last is not None
        builder.hold(b"a", builder.encode(last), Unserved.CODE_INVALID)
    elif then == "leave out":
        builder.leave_out(b"a", Unserved.CODE_INVALID)
    assert builder.blank == ({b"a"} if blank else set())
    snapshot = Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes())
    assert Contents.built(snapshot, builder.digests(), builder.blank) == Contents.of(snapshot)


def test_nothing_is_taken_over_from_another_snapshot() -> None:
    _, other = previous_of(some(11))
    builder = SnapshotBuilder()
    builder.add(some(10))
    builder.build(generation=1, created_at_ns=1)
    assert builder.as_previous(other) is None
    _, signed = previous_of(some(10), Signer("key"))
    assert builder.as_previous(signed) is None


def test_a_suspect_row_is_found_in_each_build() -> None:
    previous, _ = previous_of([*some(100), Row(7000, b"large", None, None, bytes(LARGE_DEFINITION), range=70)])
    builder = SnapshotBuilder()
    builder.take_over(previous, previous.ranges)
    builder.add([Row(7000, b"large", None, None, bytes(LARGE_DEFINITION), range=70)])
    assert builder.findings.suspect == {Suspect.LARGER_THAN_4_MIB: 1}
    assert builder.findings.source_rows == 101


def test_the_tables_of_a_build_are_passed_on_once() -> None:
    previous, _ = previous_of(some(10))
    SnapshotBuilder().take_over(previous, previous.ranges)
    with pytest.raises(AssertionError, match="only one build takes over"):
        SnapshotBuilder().take_over(previous, previous.ranges)


def test_the_cost_of_a_changed_row_does_not_depend_on_the_unchanged_rows() -> None:
    previous, _ = previous_of(some(1000))
    ids, digests = previous.tables()
    previous._tables = ids, digests
    builder = SnapshotBuilder()
    builder.take_over(previous, previous.ranges.keys() - {50})
    assert builder._ids is ids
    assert builder._digests is digests
    assert builder.count == 990
    builder.add(some(1000)[500:510])
    assert builder._doubtful == {b"name%04d" % number for number in range(500, 510)}
    assert builder._fields.keys() == builder._doubtful
