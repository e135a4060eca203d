"""A snapshot is read without a copy. Each of its names finds its own answer, and other names find nothing, even if
hashes collide. Opening a snapshot reads no entry, and a look-up allocates only its answer. A damaged snapshot, such as
one with a flipped bit or with an octet more or less, is never served.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tracemalloc
from array import array
from mmap import MAP_SHARED, PAGESIZE, PROT_READ, mmap

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.support.hypothesis_profiles import examples
from tests.support.resident import resident_octets

from definition_server.catalog import arranging as arranging_module
from definition_server.catalog import snapshot as snapshot_module
from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.layout import (
    FOOTER_SIZE,
    SLOT,
    Footer,
    SnapshotError,
    name_hash,
    slot_count,
)
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Difference, Snapshot, diff
from definition_server.rpc import avap_pb2

pytestmark = pytest.mark.usefixtures("nothing_is_left")


CHECKS = re.compile(r"(truncated|magic|format|footer checksum|size|index|body|content checksum): ")
"""The beginning of the message of a refusal: the name of the check that failed."""


def octets(names: list[bytes], signer: Signer | None = None, *, code: bytes = b"pass") -> bytes:
    """A snapshot with the given names, each with its own code."""
    builder = SnapshotBuilder(signer)
    builder.add(Row(number, name, None, None, b"%b # %d" % (code, number)) for number, name in enumerate(names))
    return builder.build(generation=3, created_at_ns=5).to_bytes()


def catalogue(snapshot: Snapshot) -> avap_pb2.CatalogResponse:
    return avap_pb2.CatalogResponse.FromString(bytes(snapshot.body))


def check(buffer: bytes) -> Snapshot:
    """Open and verify, as is required before anything in a file is served."""
    snapshot = Snapshot(buffer)
    snapshot.verify()
    return snapshot


# -- every name is found, no other -------------------------------------------------------------------------------------

ODD_NAMES = [
    "if", "i", "iff", "'", '"', "a'b\"c", "new\nline", "\r\n", " ", "tab\t", "año", "日本語", "🐍", "\x7f", "%s", "\\",
    "x" * 127, "x" * 128, "x" * 129, "é" * 64, "y" * 16_384,
]  # fmt: skip


def as_served(command: avap_pb2.CommandResponse) -> bytes:
    """``command`` in its served form, with the hash after the other fields."""
    digest = command.hash
    command.ClearField("hash")
    octets: bytes = command.SerializeToString() + b"\x2a\x40" + digest.encode()
    command.hash = digest
    return octets


def test_any_name_finds_its_own_answer() -> None:
    snapshot = Snapshot(octets([name.encode() for name in ODD_NAMES]))
    by_name = {command.name: command for command in catalogue(snapshot).commands}
    assert by_name.keys() == set(ODD_NAMES)
    for name in ODD_NAMES:
        assert name.encode() in snapshot
        assert snapshot.answer(name.encode()) == as_served(by_name[name])
        definition = snapshot.get(name)
        assert definition is not None
        assert (definition.name, definition.code) == (name, by_name[name].code)


@pytest.mark.parametrize("missing", ["", "If", "if ", "x" * 126, "x" * 130, "año"[:2], "\0", "z" * 100_000])
def test_an_unknown_name_finds_nothing(missing: str) -> None:
    snapshot = Snapshot(octets([name.encode() for name in ODD_NAMES]))
    assert missing.encode() not in snapshot
    assert snapshot.answer(missing.encode()) is None
    assert snapshot.get(missing) is None


def test_a_name_that_is_not_utf_8_finds_nothing() -> None:
    assert Snapshot(octets([b"if"])).answer(b"\xff\xfe") is None


NAMES = st.lists(st.binary(min_size=1, max_size=5).filter(bytes.isascii), max_size=40, unique=True)


@given(NAMES, st.binary(max_size=5))
def test_exactly_the_names_of_the_catalogue_are_found(names: list[bytes], other: bytes) -> None:
    snapshot = Snapshot(octets(names))
    assert all(name in snapshot for name in names)
    assert (other in snapshot) is (other in names)


@settings(max_examples=examples(30))
@given(st.integers(1, 500), st.integers(0, 10**6))
@example(4, 0)  # an index of 8 slots, half full
@example(5, 0)
@example(256, 0)
@example(500, 0)
def test_every_name_is_found_in_catalogues_of_any_size(size: int, salt: int) -> None:
    names = [b"command%d-%d" % (salt, number) for number in range(size)]
    snapshot = Snapshot(octets(names))
    assert len(snapshot) == snapshot.count == size
    answers = (snapshot.answer(name) for name in names)
    assert all(answer is not None and answer[2 : 2 + len(n)] == n for answer, n in zip(answers, names, strict=True))
    assert not any(name + b"x" in snapshot for name in names)


@pytest.mark.parametrize("constant", [0, 7, 2**63, 2**64 - 1])
def test_names_with_the_same_hash_are_distinguished(constant: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All names then share one sequence of slots, which wraps around the end of the index."""
    monkeypatch.setattr(arranging_module, "name_hashes", lambda names: array("Q", [constant] * len(names)))
    monkeypatch.setattr(snapshot_module, "name_hash", lambda name: constant)
    names = [b"a", b"ab", b"abc", b"b", b"ba", b"x" * 200, b"x" * 201]
    snapshot = Snapshot(octets(names))
    for name in names:
        answer = snapshot.answer(name)
        assert answer is not None
        assert avap_pb2.CommandResponse.FromString(answer).name.encode() == name
    for missing in (b"abcd", b"c", b"x", b"x" * 202):
        assert snapshot.answer(missing) is None


def test_the_hash_of_a_name_is_the_same_in_every_process() -> None:
    expected = hashlib.blake2b("año".encode(), digest_size=8).digest()
    assert name_hash("año".encode()) == int.from_bytes(expected, "little") == 0xAAF94C0275369136


@given(st.integers(0, 2**40))
@example(16)
@example(17)
def test_the_index_is_the_least_power_of_two_that_is_at_least_half_free(commands: int) -> None:
    slots = slot_count(commands)
    assert slots.bit_count() == 1
    assert slots >= max(8, 2 * commands)
    assert slots == 8 or slots // 2 < 2 * commands, "half as many would not be enough"


# -- its values --------------------------------------------------------------------------------------------------------


def test_the_snapshot_has_the_values_of_its_footer() -> None:
    block = octets([b"b", b"a"])
    snapshot = Snapshot(block)
    assert (snapshot.generation, snapshot.footer.created_at_ns, snapshot.count) == (3, 5, 2)
    assert snapshot.version_hash == catalogue(snapshot).version_hash
    assert (snapshot.size, bytes(snapshot.buffer)) == (len(block), block)


def test_iteration_gives_every_definition_in_name_order_and_copies_no_message() -> None:
    block = octets([b"b", "año".encode(), b"a"])
    snapshot = Snapshot(block)
    commands = catalogue(snapshot).commands
    assert [definition.name for definition in snapshot] == [command.name for command in commands] == ["a", "año", "b"]
    assert [definition.hash for definition in snapshot] == [command.hash for command in commands]
    assert [bytes(message) for message in snapshot.messages()] == [as_served(command) for command in commands]
    assert all(message.obj is block for message in snapshot.messages())


def test_nothing_can_be_written_through_a_snapshot() -> None:
    snapshot = Snapshot(memoryview(bytearray(octets([b"if"]))))
    assert snapshot.body.readonly
    assert snapshot.buffer.readonly
    with pytest.raises(AttributeError):
        snapshot.generation = 4


def sparse(size: int) -> mmap:
    """A mapped snapshot of one command. Before it lies a hole of ``size`` octets, which the footer includes in the
    body."""
    small = octets([b"if"])
    footer = Footer.unpack(memoryview(small))
    index = bytes(8 * SLOT.size)
    large = Footer(3, 5, 1, size, 8, footer.key_id, footer.version_hash, bytes(32))
    descriptor = os.memfd_create("sparse", os.MFD_CLOEXEC)
    try:
        os.pwrite(descriptor, index + large.pack(), size)
        return mmap(descriptor, 0, flags=MAP_SHARED, prot=PROT_READ)
    finally:
        os.close(descriptor)


def test_opening_reads_no_entry_and_a_miss_reads_no_body() -> None:
    size = 64 * 1024 * 1024
    mapping = sparse(size)
    snapshot = Snapshot(mapping)
    assert snapshot.answer(b"nothing") is None
    assert snapshot.size > size
    # The pages of the footer and of the index, and those that a kernel with huge pages loads with them.
    assert resident_octets("sparse") <= 4 * 1024 * 1024
    before = resident_octets("sparse")
    assert snapshot.body[0] == 0
    assert resident_octets("sparse") >= before + PAGESIZE, "the measurement detects a touched page"


def test_a_snapshot_keeps_its_memory_for_as_long_as_it_lives() -> None:
    mapping = sparse(PAGESIZE)
    snapshot = Snapshot(mapping)
    with pytest.raises(BufferError):
        mapping.close()
    del mapping
    assert snapshot.answer(b"nothing") is None
    assert snapshot.body[0] == 0


def test_a_lookup_leaves_no_allocation_but_its_answer() -> None:
    snapshot = Snapshot(octets([b"if", b"else", b"x" * 300], code=b"c" * 200_000))
    for name in (b"if", b"x" * 300):
        assert snapshot.answer(name) is not None  # objects that are made only once are made now
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            answer = snapshot.answer(name)
            after, peak = tracemalloc.get_traced_memory()
            missed = snapshot.answer(name + b"?")
            at_end, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert missed is None
        assert abs(after - before - sys.getsizeof(answer)) <= 512
        assert peak - before <= sys.getsizeof(answer) + 4096
        assert abs(at_end - after) <= 512


# -- differences -------------------------------------------------------------------------------------------------------


def snapshot_of(signer: Signer | None = None, **codes: str) -> Snapshot:
    builder = SnapshotBuilder(signer)
    builder.add(Row(1, name.encode(), None, None, code.encode()) for name, code in codes.items())
    return Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes())


def test_a_difference_names_added_removed_and_changed_definitions_in_name_order() -> None:
    old = snapshot_of(same="1", gone="1", b="1", a="1", left="1")
    new = snapshot_of(same="1", b="2", a="2", new="1", fresh="1")
    assert diff(old, new) == Difference(added=("fresh", "new"), removed=("gone", "left"), changed=("a", "b"))


def test_all_definitions_differ_from_no_snapshot_and_none_from_the_same_snapshot() -> None:
    snapshot = snapshot_of(b="1", **{"año" * 60: "1"})
    assert diff(None, snapshot) == Difference(added=("año" * 60, "b"), removed=(), changed=())
    assert diff(snapshot, snapshot) == Difference((), (), ())
    assert diff(snapshot, snapshot_of()) == Difference((), ("año" * 60, "b"), ())


def test_a_different_signature_is_not_a_difference() -> None:
    assert diff(snapshot_of(a="1"), snapshot_of(Signer("key"), a="1")) == Difference((), (), ())


# -- nothing damaged is ever served ------------------------------------------------------------------------------------

SMALL = octets([b"if", b"else"])


def test_every_single_flipped_bit_is_refused_by_a_named_check() -> None:
    assert check(SMALL).count == 2
    damaged = bytearray(SMALL)
    for position in range(len(SMALL)):
        for bit in range(8):
            damaged[position] ^= 1 << bit
            with pytest.raises(SnapshotError) as caught:
                check(bytes(damaged))
            assert CHECKS.match(str(caught.value))
            damaged[position] ^= 1 << bit
    assert damaged == SMALL


def test_every_truncation_and_extension_is_refused_by_a_named_check() -> None:
    for length in range(len(SMALL)):
        extension = SMALL[:length] or b"\0"
        for other in (SMALL[:length], SMALL[len(SMALL) - length :], SMALL + extension, extension + SMALL):
            with pytest.raises(SnapshotError) as caught:
                check(other)
            assert CHECKS.match(str(caught.value))


@given(NAMES, st.sampled_from([None, Signer("key")]), st.data())
def test_no_damage_to_any_snapshot_is_served(names: list[bytes], signer: Signer | None, data: st.DataObject) -> None:
    whole = octets(names, signer)
    start = data.draw(st.integers(0, len(whole)))
    end = data.draw(st.integers(start, min(start + 40, len(whole))))
    damaged = whole[:start] + data.draw(st.binary(max_size=40)) + whole[end:]
    if damaged == whole:
        assert check(damaged).count == len(names)
        return
    with pytest.raises(SnapshotError) as caught:
        check(damaged)
    assert CHECKS.match(str(caught.value))


@pytest.mark.parametrize("before", [1, 24, 160, 5000])
def test_a_snapshot_inside_other_bytes_is_refused(before: int) -> None:
    for junk in (bytes(before), SMALL * (before // len(SMALL) + 1)):
        with pytest.raises(SnapshotError, match=r"^size: "):
            Snapshot(junk + SMALL)


@given(st.binary(max_size=400))
def test_any_bytes_are_refused_and_nothing_else_is_raised(junk: bytes) -> None:
    with pytest.raises(SnapshotError):
        check(junk)


NUMBER = st.integers(0, 2**64 - 1) | st.integers(0, 40)
DIGEST = st.binary(min_size=32, max_size=32)


@given(st.binary(max_size=600), NUMBER, NUMBER, NUMBER, DIGEST)
@example(bytes(8 * 24), 8, 0, 8, bytes(32))
def test_a_valid_footer_with_wrong_sizes_is_refused(
    before: bytes, count: int, body_length: int, slots: int, digest: bytes
) -> None:
    """The footer's own checksum is right; its sizes must still be checked before they are used."""
    footer = Footer(1, 1, count, body_length, slots, bytes(8), bytes(32), digest)
    with pytest.raises(SnapshotError, match=r"^(size|index|content checksum): "):
        check(before + footer.pack())


@pytest.mark.parametrize(("count", "slots"), [(8, 8), (9, 8), (1, 1), (3, 7), (3, 9), (3, 0)])
def test_an_index_in_which_a_search_could_not_end_is_refused(count: int, slots: int) -> None:
    index = bytes(slots * SLOT.size)
    footer = Footer(1, 1, count, 0, slots, bytes(8), bytes(32), hashlib.sha256(index).digest())
    with pytest.raises(SnapshotError, match=r"^index: "):
        check(index + footer.pack())


def test_every_check_has_a_message_of_its_own() -> None:
    def refused(buffer: bytes) -> str:
        with pytest.raises(SnapshotError) as caught:
            check(buffer)
        return str(caught.value).partition(":")[0]

    footer = len(SMALL) - FOOTER_SIZE
    assert refused(SMALL[: FOOTER_SIZE - 1]) == "truncated"
    assert refused(SMALL[:-1]) == "magic"
    assert refused(flipped(footer)) == "magic"
    assert refused(flipped(footer + 8)) == "format"
    assert refused(flipped(footer + 20)) == "footer checksum"
    assert refused(flipped(len(SMALL) - 1)) == "footer checksum"
    assert refused(SMALL[1:]) == "size"
    assert refused(flipped(0)) == "content checksum"
    assert refused(flipped(footer - 1)) == "content checksum"


def flipped(position: int) -> bytes:
    return SMALL[:position] + bytes([SMALL[position] ^ 1]) + SMALL[position + 1 :]


# -- snapshots that another program made: every checksum is right, but the content is not -----------------------------


def resealed(body: bytes, slots: list[tuple[int, int, int]], count: int) -> bytes:
    """A snapshot with these parts and right checksums."""
    index = b"".join(SLOT.pack(*slot) for slot in slots)
    digest = hashlib.sha256(body + index).digest()
    return body + index + Footer(3, 5, count, len(body), len(slots), bytes(8), bytes(32), digest).pack()


def parts(names: list[bytes]) -> tuple[bytes, list[tuple[int, int, int]]]:
    snapshot = Snapshot(octets(names))
    return bytes(snapshot.body), list(SLOT.iter_unpack(snapshot._index))


def test_an_index_without_a_free_slot_is_refused_at_opening() -> None:
    body, slots = parts([b"if", b"else"])
    taken = next(slot for slot in slots if slot[2])
    with pytest.raises(SnapshotError, match="index: no slot is free"):
        Snapshot(resealed(body, [slot if slot[2] else taken for slot in slots], 2))


FORGED_INDEXES = {
    "one free slot": lambda slots: [slots[0], *(slot if slot[2] else (7, 0, 5) for slot in slots[1:])],
    "offset beyond the body": lambda slots: [(h, 2**63, n) if n else (h, o, n) for h, o, n in slots],
    "length beyond the body": lambda slots: [(h, o, 2**63) if n else (h, o, n) for h, o, n in slots],
    "offset into another command": lambda slots: [(h, o + 1, n - 1) if n else (h, o, n) for h, o, n in slots],
    "overlapping": lambda slots: [(h, o, n + 1) if n else (h, o, n) for h, o, n in slots],
    "everything lost": lambda slots: [(0, 0, 0)] * len(slots),
    "wrong hash": lambda slots: [(h ^ 1, o, n) if n else (h, o, n) for h, o, n in slots],
    "moved": lambda slots: [*slots[3:], *slots[:3]],
}


@pytest.mark.parametrize("forgery", FORGED_INDEXES)
def test_an_index_that_does_not_lead_to_every_command_is_refused(forgery: str) -> None:
    body, slots = parts([b"if", b"else", b"end"])
    if slots[0][2]:  # the forgery with one free slot must free a slot first
        slots = [*slots[-1:], *slots[:-1]]
    with pytest.raises(SnapshotError, match="index: "):
        check(resealed(body, FORGED_INDEXES[forgery](slots), 3))


@pytest.mark.parametrize(("found", "said"), [(2, 0), (2, 1), (2, 3), (0, 1)])
def test_a_count_that_differs_from_the_number_of_commands_is_refused(found: int, said: int) -> None:
    body, slots = parts([b"if", b"else"][:found])
    with pytest.raises(SnapshotError, match=r"body: |index: "):
        check(resealed(body, slots, said))


def test_a_command_after_the_catalogues_other_fields_is_refused() -> None:
    body, slots = parts([b"a"])
    length = 2 + body[1]
    command, rest = body[:length], body[length:]
    assert check(resealed(body, slots, 1)).count == 1
    moved = [(found, offset + len(rest), size) if size else (found, offset, size) for found, offset, size in slots]
    with pytest.raises(SnapshotError, match="body: a command comes after"):
        check(resealed(rest + command, moved, 1))


def test_commands_out_of_order_or_twice_are_refused() -> None:
    body, slots = parts([b"a", b"b"])
    tail = body[-body[::-1].index(b"\x0a") :]
    first = body[: 2 + body[1]]
    assert tail
    with pytest.raises(SnapshotError, match=r"body: |index: "):
        check(resealed(first + body, slots, 3))


@settings(max_examples=examples(300))
@given(
    st.lists(st.binary(min_size=1, max_size=8).filter(lambda name: b"\0" not in name and is_text(name)), max_size=5),
    st.data(),
)
def test_content_with_right_checksums_is_refused_or_answers_every_look_up(
    names: list[bytes], data: st.DataObject
) -> None:
    body, slots = parts(sorted(set(names)))
    changed = bytearray(body)
    for _ in range(data.draw(st.integers(0, 3))):
        if changed:
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    word = st.integers(0, 2**64 - 1) | st.integers(0, len(body) + 2)
    for _ in range(data.draw(st.integers(0, len(slots)))):
        slots[data.draw(st.integers(0, len(slots) - 1))] = data.draw(st.tuples(word, word, word))
    buffer = resealed(bytes(changed), slots, data.draw(st.just(len(set(names))) | st.integers(0, len(slots))))
    try:
        snapshot = Snapshot(buffer)
    except SnapshotError:
        return
    for name in (*names, b"missing", b""):
        snapshot.answer(name)  # the look-up must end
    try:
        snapshot.verify()
    except SnapshotError:
        return
    assert len(list(snapshot)) == snapshot.count
    for definition in snapshot:
        assert snapshot.get(definition.name) == definition


def is_text(octets: bytes) -> bool:
    try:
        octets.decode()
    except UnicodeDecodeError:
        return False
    return True
