"""A built snapshot *is* a serialized ``avap.CatalogResponse``, octet for octet as protobuf writes it, except that the
hash is the last field of each command. The commands are sorted and complete, with one definition for each name, and
with defaults. The hashes depend only on the content of the rows, and stay the same in every release. Rows that cannot
be served are left out and counted.
"""

from __future__ import annotations

import hashlib
import marshal
import pickle
import tracemalloc
import zlib
from collections.abc import Iterable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from definition_server.catalog import wire
from definition_server.catalog.builder import BuiltSnapshot, CatalogTooLarge, SnapshotBuilder, rows_of
from definition_server.catalog.definition import Row, Unserved
from definition_server.catalog.signing import OVERHEAD, UNSIGNED, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import LARGE_DEFINITION, Suspect
from definition_server.data_plane.services import MAX_REQUEST
from definition_server.rpc import avap_pb2

SIGNER = Signer("the key")


def build(
    rows: Iterable[Row], signer: Signer | None = None, *, generation: int = 7, created_at_ns: int = 11
) -> BuiltSnapshot:
    builder = SnapshotBuilder(signer)
    builder.add(rows)
    return builder.build(generation=generation, created_at_ns=created_at_ns)


def body(built: BuiltSnapshot) -> bytes:
    return built.to_bytes()[: built.footer.body_length]


def catalogue(rows: Iterable[Row], signer: Signer | None = None) -> avap_pb2.CatalogResponse:
    """Build a catalogue from ``rows``, and parse it with protobuf."""
    return avap_pb2.CatalogResponse.FromString(body(build(rows, signer)))


def as_served(catalogue: avap_pb2.CatalogResponse) -> bytes:
    """``catalogue`` in its served form: the octets of protobuf, but with the hash of each command after its other
    fields."""
    octets = b""
    for command in catalogue.commands:
        rest = avap_pb2.CommandResponse()
        rest.CopyFrom(command)
        rest.ClearField("hash")
        message = rest.SerializeToString(deterministic=True) + b"\x2a\x40" + command.hash.encode()
        octets += b"\x0a" + wire.varint(len(message)) + message
    tail = avap_pb2.CatalogResponse(total_count=catalogue.total_count, version_hash=catalogue.version_hash)
    return octets + tail.SerializeToString(deterministic=True)


def model(rows: Iterable[Row], signer: Signer | None = None) -> avap_pb2.CatalogResponse:
    """The hash, computed as the contract describes it. Of the server's code, only the function for signatures is
    used.
    """
    served = {row.name: row for row in sorted(rows, key=lambda row: row.id or 0) if row.name and row.code is not None}
    answer, version = avap_pb2.CatalogResponse(total_count=len(served)), hashlib.sha256()
    for name, row in sorted(served.items()):
        assert row.code is not None
        command = avap_pb2.CommandResponse(
            name=name.decode(),
            type=(row.type or b"function").decode(),
            interface_json=(row.interface or b"[]").decode(),
            code=row.code,
        )
        if row.avbc_code:
            command.avbc_code, command.avbc_version = row.avbc_code, row.avbc_version or 0
        command.hash = hashlib.sha256(command.SerializeToString(deterministic=True)).hexdigest()
        version.update(name + b"\0" + command.hash.encode())
        if row.id is not None and -(2**31) <= row.id < 2**31:
            command.internal_id = row.id
        if signer is not None:
            command.code = signer.pack(row.code)
        answer.commands.append(command)
    answer.version_hash = version.hexdigest()
    return answer


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12).map(str.encode)
FEW_NAMES = st.sampled_from([b"if", b"else", "año".encode(), b"", None])


def rows(names: st.SearchStrategy[bytes | None]) -> st.SearchStrategy[list[Row]]:
    """Rows of a table: unique ids, in any order, with NULLs."""
    ids = st.integers(1, 2**31 - 1) | st.integers(-(2**63), 2**63 - 1)
    bytecode, version = st.none() | st.binary(max_size=5), st.none() | st.integers(-(2**31), 2**31 - 1)
    text = st.none() | TEXT
    row = st.builds(Row, ids, names, text, text, text, bytecode, version, st.none())
    return st.lists(row, max_size=20, unique_by=lambda row: row.id)


SIGNERS = st.sampled_from([None, SIGNER])


LONG = Row(1, b"n" * 130, b"t" * 200, b"[%b]" % (b" " * 20_000), b"c" * 3_000_000)


@given(rows(TEXT | st.none()), SIGNERS)
@example([LONG, LONG._replace(id=2, name=b"n")], None)  # lengths whose varints take two, three and four octets
@example([LONG], SIGNER)
def test_the_body_equals_the_octets_that_protobuf_writes(table: list[Row], signer: Signer | None) -> None:
    encoded = body(build(table, signer))
    assert encoded == as_served(model(table, signer))
    assert avap_pb2.CatalogResponse.FromString(encoded) == model(table, signer)


@given(rows(FEW_NAMES), SIGNERS, st.data())
def test_the_highest_id_wins_in_any_order_and_any_batches(
    table: list[Row], signer: Signer | None, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(table))
    middle = data.draw(st.integers(0, len(table)))
    builder = SnapshotBuilder(signer)
    builder.add(shuffled[:middle])
    builder.add(iter(shuffled[middle:]))
    built = builder.build(generation=7, created_at_ns=11)
    assert body(built) == as_served(model(table, signer))
    assert built.to_bytes() == build(table, signer).to_bytes()
    names = [row.name for row in table if row.name and row.code is not None]
    assert builder.findings.source_rows == len(table)
    assert builder.findings.unserved[Unserved.DUPLICATE] == len(names) - len(set(names))
    assert builder.count == built.footer.count == len(set(names))


@pytest.mark.parametrize("first", [1, 2])
def test_of_two_rows_with_one_name_the_unserved_row_is_reported_by_its_id(first: int) -> None:
    builder = SnapshotBuilder()
    for number in (first, 3 - first):
        builder.add([Row(number, b"if", None, None, b"code %d" % number)])
    assert builder.findings.examples == {Unserved.DUPLICATE: ["id=1 name='if'"]}
    assert Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes()).get("if").code == b"code 2"


def test_commands_are_sorted_by_the_utf_8_bytes_of_their_names() -> None:
    names = ["Z", "a", "ab", "é", "\uffff", "\U00010000"]  # in UTF-16 the last two would have the opposite order
    table = [Row(n, name.encode(), None, None, b"") for n, name in enumerate(reversed(names))]
    assert [command.name for command in catalogue(table).commands] == names


@pytest.mark.parametrize("missing", [None, b""])
def test_a_missing_type_and_interface_get_their_defaults(missing: bytes | None) -> None:
    (command,) = catalogue([Row(1, b"if", missing, missing, b"pass")]).commands
    assert (command.type, command.interface_json) == ("function", "[]")
    assert command == catalogue([Row(1, b"if", b"function", b"[]", b"pass")]).commands[0]


def test_empty_code_is_served_as_empty_code() -> None:
    (command,) = catalogue([Row(1, b"if", None, None, b"")]).commands
    assert command.code == b""
    (command,) = catalogue([Row(1, b"if", None, None, b"")], SIGNER).commands
    assert SIGNER.unpack(command.code) == b""


@pytest.mark.parametrize("signer", [None, SIGNER])
def test_an_empty_catalogue_can_be_built(signer: Signer | None) -> None:
    answer = catalogue([], signer)
    assert (len(answer.commands), answer.total_count) == (0, 0)
    assert answer.version_hash == hashlib.sha256(b"").hexdigest()


UNSERVED = {
    "a NULL name": (Row(5, None, None, None, b"pass"), Unserved.NULL_NAME, "id=5 name=None"),
    "an empty name": (Row(5, b"", None, None, b"pass"), Unserved.EMPTY_NAME, "id=5 name=''"),
    "NULL code": (Row(5, b"x", None, None, None), Unserved.NULL_CODE, "id=5 name='x'"),
    "a name that is not UTF-8": (
        Row(5, b"\xffx", None, None, b""), Unserved.INVALID_ENCODING, "id=5 name='\ufffdx'",
    ),
    "a type that is not UTF-8": (Row(5, b"x", b"\xff", None, b""), Unserved.INVALID_ENCODING, "id=5 name='x'"),
    "an interface that is not UTF-8": (Row(5, b"x", None, b"\xff", b""), Unserved.INVALID_ENCODING, "id=5 name='x'"),
    "code that is not UTF-8": (Row(5, b"x", None, None, b"\xc3"), Unserved.INVALID_ENCODING, "id=5 name='x'"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason", "example"), UNSERVED.values(), ids=UNSERVED)
@pytest.mark.parametrize("signer", [None, SIGNER])
def test_a_row_that_cannot_be_served_is_left_out_and_counted(
    row: Row, reason: Unserved, example: str, signer: Signer | None
) -> None:
    builder = SnapshotBuilder(signer)
    builder.add([row, Row(6, b"if", None, None, b"")])
    assert builder.findings.unserved == {reason: 1}
    assert builder.findings.examples == {reason: [example]}
    assert builder.findings.source_rows == 2
    assert Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes()).count == 1


def test_a_row_that_cannot_be_served_does_not_replace_a_row_that_can() -> None:
    table = [Row(1, b"if", None, None, b"good"), Row(2, b"if", None, None, None), Row(3, b"if", b"\xff", None, b"x")]
    assert [command.code for command in catalogue(table).commands] == [b"good"]


# -- suspects ----------------------------------------------------------------------------------------------------------


def suspects(*table: Row, signer: Signer | None = None) -> dict[Suspect, int]:
    builder = SnapshotBuilder(signer)
    builder.add(table)
    assert builder.count == len({row.name for row in table})
    return dict(builder.findings.suspect)


def test_a_plain_definition_is_not_suspect() -> None:
    assert suspects(Row(1, b"if", None, b'[{"item": "x", "type": "var"}]', b"pass"), Row(2, b"x", None, b"", b"")) == {}


@pytest.mark.parametrize("signer", [None, SIGNER])
@pytest.mark.parametrize(
    ("excess", "expected"),
    [
        (0, {}),
        (1, {Suspect.LARGER_THAN_4_MIB: 1}),
    ],
)
def test_an_answer_that_stock_clients_refuse_is_served_and_counted(
    signer: Signer | None, excess: int, expected: dict[Suspect, int]
) -> None:
    """The limit applies to the whole answer with all of its fields."""
    around = len(model([Row(1, b"if", None, None, b"x" * LARGE_DEFINITION)]).commands[0].SerializeToString())
    around += 0 if signer is None else OVERHEAD
    row = Row(1, b"if", None, None, b"x" * (2 * LARGE_DEFINITION - around + excess))
    assert len(model([row], signer).commands[0].SerializeToString()) == LARGE_DEFINITION + excess
    assert suspects(row, signer=signer) == expected


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_that_lost_its_name_to_another_is_not_suspect(order: int) -> None:
    """Suspect rows are *served* ones that look wrong."""
    large = b"x" * LARGE_DEFINITION
    assert suspects(*[Row(1, b"if", None, None, large), Row(2, b"if", None, None, b"")][::order]) == {}
    assert suspects(*[Row(1, b"if", None, None, b""), Row(2, b"if", None, None, large)][::order]) == {
        Suspect.LARGER_THAN_4_MIB: 1
    }


@pytest.mark.parametrize("order", [1, -1])
def test_only_the_served_row_of_duplicates_is_an_example_of_a_suspect_row(order: int) -> None:
    builder = SnapshotBuilder()
    builder.add([Row(n, b"if", None, None, b"x" * LARGE_DEFINITION) for n in (1, 2, 3)][::order])
    assert builder.findings.examples[Suspect.LARGER_THAN_4_MIB] == ["id=3 name='if'"]
    assert builder.findings.examples[Unserved.DUPLICATE] == [f"id={n} name='if'" for n in (1, 2)][::order]


def test_a_reason_without_rows_has_no_examples() -> None:
    builder = SnapshotBuilder()
    builder.add([Row(1, b"if", None, None, b"x" * LARGE_DEFINITION), Row(2, b"if", None, b"[]", b"")])
    assert builder.findings.examples.keys() == {Unserved.DUPLICATE}


# -- hashes ------------------------------------------------------------------------------------------------------------

TABLE = [
    Row(3, b"if", b"function", b'[{"item": "condition", "type": "var"}]', b"task = None\n"),
    Row(1, "año".encode(), None, None, "# ñ\n".encode()),
    Row(2, b"if", None, None, b"an older duplicate"),
    Row(4, b"else", b"", b"", b""),
]


@pytest.mark.parametrize("signer", [None, SIGNER])
def test_the_hashes_of_a_known_catalogue_never_change(signer: Signer | None) -> None:
    """Clients compare hashes across releases. If this fails, the contract has changed."""
    answer = catalogue(TABLE, signer)
    assert {command.name: command.hash for command in answer.commands} == {
        "año": "958e828e85de123d89d28d7e7276aa1f52570982cf5aa565baaa7dae72f71b98",
        "else": "f030336e7ba760534b157eb39a5c2760cd346f99794ad98bf53a8588495ecb08",
        "if": "4e7028c56c1aa7d10d6e57c3f371f39a8a93d713d5c7059831e9eb71b979174e",
    }
    assert answer.version_hash == "5283263c327fab9d82f03f11bdbb37802abc5f953444ae4e7acd7c3908ca38ea"


def test_the_hashes_of_a_known_body_never_change() -> None:
    """The octets of the answer do not change either. The rows have no id, because the first contract had no field for
    an id.
    """
    table = [row._replace(id=None) for row in TABLE if row.id != 2]
    assert (
        hashlib.sha256(body(build(table))).hexdigest()
        == "a1075661c05765e1cc80c0536123de0fa42a9180ca67f7f53c770be4997e6504"
    )
    assert (
        hashlib.sha256(body(build(table, SIGNER))).hexdigest()
        == "9f1b862127c20ac347856282ce53b553706906a72417a9717c11cd9be17834e2"
    )


@pytest.mark.parametrize(
    "changed",
    [
        TABLE[0]._replace(name=b"If"),
        TABLE[0]._replace(type=b"functio"),
        TABLE[0]._replace(interface=b"[]"),
        TABLE[0]._replace(code=b"task = None"),
        TABLE[0]._replace(name=b"iff", type=b"unction"),  # same letters, other fields
        TABLE[0]._replace(code=b""),
    ],
)
def test_a_change_of_any_field_changes_both_hashes(changed: Row) -> None:
    (before,), (after,) = catalogue(TABLE[:1]).commands, catalogue([changed]).commands
    assert before.hash != after.hash
    assert catalogue(TABLE).version_hash != catalogue([changed, *TABLE[1:]]).version_hash


@pytest.mark.parametrize("row_id", [0, None, 2**31, -(2**31) - 1, 2**63 - 1])
def test_an_id_that_does_not_fit_into_32_bits_is_not_served_but_its_row_is(row_id: int | None) -> None:
    (command,) = catalogue([TABLE[0]._replace(id=row_id)]).commands
    assert (command.internal_id, command.code) == (0, TABLE[0].code)
    assert body(build([TABLE[0]._replace(id=row_id)])) == body(build([TABLE[0]._replace(id=None)]))


@pytest.mark.parametrize("number", [1, 127, 128, 2**31 - 1, -1, -(2**31)])
def test_id_and_version_of_the_bytecode_are_whole_numbers_of_32_bits(number: int) -> None:
    built = build([TABLE[0]._replace(id=number, avbc_code=b"\0code", avbc_version=number)])
    (command,) = avap_pb2.CatalogResponse.FromString(body(built)).commands
    assert (command.internal_id, command.avbc_code, command.avbc_version) == (number, b"\0code", number)
    definition = Snapshot(built.to_bytes()).get("if")
    assert definition is not None
    assert (definition.internal_id, definition.avbc_code, definition.avbc_version) == (number, b"\0code", number)


def test_a_change_of_the_bytecode_or_its_version_changes_both_hashes() -> None:
    tables = [
        [TABLE[0]._replace(avbc_code=code, avbc_version=version), *TABLE[1:]]
        for code, version in ((None, None), (b"a", None), (b"b", None), (b"a", 1), (b"a", 2))
    ]
    assert len({catalogue(table).version_hash for table in tables}) == len(tables)
    assert len({catalogue(table).commands[2].hash for table in tables}) == len(tables)


BYTECODE = {
    "code that ends the process": marshal.dumps(compile("import os; os._exit(7)", "x", "exec")),
    "nested without end": b"\xa9\x01" * 200_000,
    "a length of gigabytes": b"s\xff\xff\xff\x7f",
    "cut off": marshal.dumps(compile("x = 1", "x", "exec"))[:-7],
    "of another version": b"\x03\xf3\r\n" + bytes(12) + b"c",
    "compressed": zlib.compress(bytes(10_000_000)),
    "a pickle": pickle.dumps(print),
    "no bytecode at all": "not\0code \ud800".encode(errors="surrogatepass"),
}


@pytest.mark.parametrize("octets", BYTECODE.values(), ids=BYTECODE)
@pytest.mark.parametrize("signer", [None, SIGNER], ids=["unsigned", "signed"])
def test_any_bytecode_is_served_octet_by_octet(octets: bytes, signer: Signer | None) -> None:
    built = build([TABLE[0]._replace(avbc_code=octets, avbc_version=-1)], signer)
    (command,) = avap_pb2.CatalogResponse.FromString(body(built)).commands
    assert (command.avbc_code, command.avbc_version) == (octets, -1)
    snapshot = Snapshot(built.to_bytes())
    snapshot.verify()
    found = snapshot.get(TABLE[0].name.decode())
    assert found is not None
    assert found.avbc_code == octets


def test_a_version_without_bytecode_is_not_served() -> None:
    assert body(build([TABLE[0]._replace(avbc_version=7)])) == body(build([TABLE[0]]))


# -- changes by a check of the rows ------------------------------------------------------------------------------------


def served(builder: SnapshotBuilder) -> Snapshot:
    return Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes())


def test_digests_are_the_hashes_of_the_definitions_that_would_be_served() -> None:
    builder = SnapshotBuilder(SIGNER)
    builder.add(TABLE)
    assert {name.decode(): digest.decode() for name, digest in builder.digests().items()} == {
        definition.name: definition.hash for definition in served(builder)
    }


def test_comparing_rows_when_they_are_added_or_afterwards_finds_the_same_differences() -> None:
    old = SnapshotBuilder()
    old.add([Row(number, name, None, b"[]", b"pass") for number, name in enumerate((b"a", b"b", b"c", b"d", b"gone"))])
    known = old.digests()
    builders = SnapshotBuilder(SIGNER), SnapshotBuilder(SIGNER, known)
    for builder in builders:
        builder.add([Row(number, name, None, b"[]", b"pass") for number, name in enumerate((b"a", b"b", b"c", b"new"))])
        builder.add([Row(9, b"a", None, b"[]", b"x = 1"), Row(9, b"b", None, b"[]", b"x = 2")])
        builder.add([Row(10, b"b", None, b"[]", b"pass"), Row(10, b"d", None, b"[1]", b"pass")])
        assert sorted(builder.differing(known)) == [b"a", b"d", b"new"]
        assert sorted(builder.differing({})) == [b"a", b"b", b"c", b"d", b"new"]
        builder.leave_out(b"d", Unserved.CODE_INVALID)
        builder.hold(b"a", old.encode(Row(0, b"a", None, b"[]", b"pass")), Unserved.CODE_INVALID)
        known[b"new"] = builder.digests()[b"new"]
        assert builder.differing(known) == []
        del known[b"new"]


@pytest.mark.parametrize("signer", [None, SIGNER])
def test_row_facts_hold_the_served_fields_and_the_unsigned_code(signer: Signer | None) -> None:
    builder = SnapshotBuilder(signer)
    builder.add(TABLE)
    facts = builder.row_facts(b"if")
    assert (facts.id, facts.type, facts.interface, facts.code) == (3, *TABLE[0][2:5])
    with pytest.raises(KeyError):
        builder.row_facts(b"unknown")


def test_a_row_with_a_fault_of_its_own_is_counted_and_named() -> None:
    builder = SnapshotBuilder()
    builder.add([Row(1, b"if", None, None, None), Row(2, b"if", None, None, None, fault=Unserved.TOO_LARGE)])
    builder.add([Row(3, b"else", None, None, b"\xff"), Row(4, b"else", None, None, b"pass"), Row(5, b"", *[None] * 3)])
    assert builder.faults() == {b"if": Unserved.TOO_LARGE}
    assert builder.digests().keys() == {b"else"}


def test_a_held_command_keeps_its_served_version_and_its_new_row_is_not_counted() -> None:
    old = SnapshotBuilder(SIGNER)
    old.add([Row(1, b"if", None, b"[]", b"old"), Row(2, b"else", None, b"[]", b"old too")])
    before = served(old)
    new = SnapshotBuilder(SIGNER)
    new.add([Row(1, b"if", None, b"[]", b"x" * LARGE_DEFINITION), Row(2, b"else", None, b"[]", None)])
    assert new.findings.suspect
    assert new.findings.unserved
    for name, reason in ((b"if", Unserved.INTERFACE_INVALID), (b"else", Unserved.NULL_CODE)):
        message = before.answer(name)
        assert message is not None
        new.hold(name, message, reason)
    assert served(new).body == before.body
    assert served(new).version_hash == before.version_hash
    assert new.findings.unserved == new.findings.suspect == new.findings.examples == new.faults() == {}


def test_an_omitted_command_is_counted_under_one_reason() -> None:
    builder = SnapshotBuilder()
    builder.add([Row(7, b"if", None, b"{}", b"pass"), Row(8, b"else", None, None, b"pass")])
    builder.leave_out(b"if", Unserved.CODE_INVALID)
    assert [definition.name for definition in served(builder)] == ["else"]
    assert builder.findings.unserved == {Unserved.CODE_INVALID: 1}
    assert builder.findings.examples == {Unserved.CODE_INVALID: ["id=7 name='if'"]}
    assert not builder.findings.suspect


def test_ids_generation_time_and_signature_do_not_change_the_hashes() -> None:
    plain = build(TABLE).footer
    moved = build(
        [row._replace(id=(row.id or 0) + 100) for row in TABLE], SIGNER, generation=8, created_at_ns=12
    ).footer
    assert plain.version_hash == moved.version_hash
    assert [c.hash for c in catalogue(TABLE).commands] == [c.hash for c in catalogue(TABLE, SIGNER).commands]


def test_every_code_is_signed_and_the_footer_holds_the_key_id() -> None:
    built = build(TABLE, SIGNER)
    assert built.footer.key_id == SIGNER.key_id
    assert build(TABLE).footer.key_id == UNSIGNED
    codes = {definition.name: definition.code for definition in Snapshot(built.to_bytes())}
    assert {name: SIGNER.unpack(code) for name, code in codes.items()} == {
        command.name: command.code for command in catalogue(TABLE).commands
    }


# -- the block ---------------------------------------------------------------------------------------------------------


def test_the_footer_holds_the_given_values_and_the_size_of_the_pieces() -> None:
    built = build(TABLE, generation=2**63, created_at_ns=2**62)
    assert (built.footer.generation, built.footer.created_at_ns, built.footer.count) == (2**63, 2**62, 3)
    assert built.size == len(built.to_bytes()) == sum(map(len, built.pieces))


def test_a_catalogue_above_the_limit_of_protobuf_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    length = build(TABLE).footer.body_length
    monkeypatch.setattr(wire, "MAX_MESSAGE", length)
    assert build(TABLE).footer.body_length == length
    monkeypatch.setattr(wire, "MAX_MESSAGE", length - 1)
    with pytest.raises(CatalogTooLarge, match=str(length)):
        build(TABLE)


def test_a_build_copies_no_code() -> None:
    """The pieces are passed on one by one, so a catalogue is in memory only once."""
    builder = SnapshotBuilder()
    builder.add(Row(n, b"%d" % n, None, None, b"x" * 100_000) for n in range(50))
    tracemalloc.start()
    try:
        built = builder.build(generation=1, created_at_ns=1)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert built.size > 5_000_000
    assert peak < 100_000


@given(rows(TEXT), SIGNERS, SIGNERS | st.just(Signer("another key")))
def test_a_snapshot_yields_the_rows_to_rebuild_it_with_another_key(
    table: list[Row], old: Signer | None, new: Signer | None
) -> None:
    recovered = list(rows_of(Snapshot(build(table, old).to_bytes())))
    assert body(build(recovered, new)) == body(build(table, new))


# -- names of any kind -------------------------------------------------------------------------------------------------

ALIKE = (
    "caf\u00e9", "cafe\u0301", "if", "IF", "\ufb01", "fi", "sp", "sp ", "a\nb", "a\rb", "\u202eab", "ab\u200b",
    "\ufeffab",
)  # fmt: skip


def test_names_that_only_look_the_same_are_different_commands() -> None:
    rows = [Row(number, name.encode(), None, None, b"x = %d" % number) for number, name in enumerate(ALIKE, 1)]
    snapshot = Snapshot(build(rows).to_bytes())
    assert snapshot.count == len(ALIKE)
    for number, name in enumerate(ALIKE, 1):
        definition = snapshot.get(name)
        assert definition is not None
        assert (definition.name, definition.code) == (name, b"x = %d" % number)


@pytest.mark.parametrize(("octets", "suspect"), [(4093, False), (4094, True), (1 << 16, True)])
def test_a_name_too_long_for_a_request_is_served_as_suspect_and_logged_in_part(octets: int, suspect: bool) -> None:
    name = b"n" * octets
    builder = SnapshotBuilder()
    builder.add([Row(1, name, None, None, b"pass"), Row(2, b"if", None, None, b"pass")])
    assert builder.digests().keys() == {name, b"if"}
    assert builder.findings.suspect == ({Suspect.NAME_TOO_LONG: 1} if suspect else {})
    assert all(len(example) < 300 for example in builder.findings.examples.get(Suspect.NAME_TOO_LONG, ()))
    request = avap_pb2.CommandRequest(name=name.decode()).SerializeToString()
    assert (len(request) > MAX_REQUEST) is suspect
