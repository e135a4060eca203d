"""When a decoded header block may be remembered: the rules for which `Decoder.epoch` and `Decoder.changed` exist.

Decoding is a function of (block, dynamic table, limits). A memo of blocks is therefore sound if and only if a hit would
neither have changed the table nor read it in another state: the memo keeps blocks that did not advance the epoch, and
is emptied whenever the epoch has advanced. Here a decoder with the smallest such memo runs beside one without a memo;
fields, refusals and tables must be the same after each block. Memos and decoders that break one rule each prove that
the comparison detects a fault.
"""

from __future__ import annotations

from collections.abc import Sequence

import hpack as reference
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from grpc_h2.wire.errors import HpackError
from grpc_h2.wire.hpack import Decoder, Field, encode_size_update

Block = bytes
Step = Block | int
"""A header block, or the table size of an acknowledged SETTINGS_HEADER_TABLE_SIZE."""

TABLE_SIZE = 100


class Memo:
    """The smallest memo that follows the rules."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.epoch = decoder.epoch
        self.known: dict[Block, tuple[Field, ...]] = {}
        self.hits = 0

    def fresh(self) -> bool:
        """Whether the remembered blocks were decoded in the present epoch."""
        return self.decoder.epoch == self.epoch

    def worth(self) -> bool:
        """Whether the block just decoded may be remembered."""
        return not self.decoder.changed

    def decode(self, block: Block) -> tuple[Field, ...]:
        if not self.fresh():
            self.known.clear()
            self.epoch = self.decoder.epoch
        if block in self.known:
            self.hits += 1
            return self.known[block]
        fields = self.decoder.decode(block)
        if self.worth():
            self.known[block] = fields
        return fields


class NeverFlushed(Memo):
    def fresh(self) -> bool:
        return True


class OfEverything(NeverFlushed):
    def worth(self) -> bool:
        return True


class FlushedButOfEverything(Memo):
    """A memo that is emptied when the epoch advances, but keeps the block that advanced it."""

    def worth(self) -> bool:
        self.epoch = self.decoder.epoch
        return True


class SilentInsertion(Decoder):
    """A decoder that does not count one kind of change; so are the decoders below."""

    def _insert(self, field: Field, size: int) -> None:
        before = self.epoch
        super()._insert(field, size)
        self.epoch = before


class SilentOversizeInsertion(Decoder):
    def _insert(self, field: Field, size: int) -> None:
        before = self.epoch
        super()._insert(field, size)
        if size > self._capacity:
            self.epoch = before


class SilentSizeUpdate(Decoder):
    def _resize(self, block: bytes, position: int, size: int) -> int:
        before = self.epoch
        position = super()._resize(block, position, size)
        self.epoch = before
        return position


class UnmarkedSizeUpdate(Decoder):
    def _resize(self, block: bytes, position: int, size: int) -> int:
        before = self.epoch
        position = super()._resize(block, position, size)
        self.epoch = before
        self.changed = False
        return position


class SilentAcknowledgement(Decoder):
    def set_max_table_size(self, size: int) -> None:
        super().set_max_table_size(size)
        self.epoch -= 1


def outcome(subject: Decoder | Memo, block: Block) -> tuple[Field, ...] | str:
    try:
        return subject.decode(block)
    except HpackError as error:
        return error.reason


def first_difference(
    steps: Sequence[Step], memo_kind: type[Memo] = Memo, decoder_kind: type[Decoder] = Decoder
) -> str | None:
    """Run a decoder with a memo and one without, on the same blocks. Returns their first difference; a refusal does not
    end the run."""
    plain = Decoder(max_list_size=1000, max_fields=10, max_table_size=TABLE_SIZE)
    memo = memo_kind(decoder_kind(max_list_size=1000, max_fields=10, max_table_size=TABLE_SIZE))
    for number, step in enumerate(steps):
        if isinstance(step, int):
            plain.set_max_table_size(step)
            memo.decoder.set_max_table_size(step)
            continue
        expected, found = outcome(plain, step), outcome(memo, step)
        if found != expected:
            return f"block {number}: {found!r} instead of {expected!r}"
        if memo.decoder.dynamic_table != plain.dynamic_table:
            return f"block {number}: another table"
    return None


A1 = bytes.fromhex("4001610131")
B2 = bytes.fromhex("4001620132")
NEWEST = b"\xbe"
OLDER = b"\xbf"
OVERSIZE = b"\x40\x01a\x64" + b"x" * 100
EMPTY = encode_size_update(0)
SAME_SIZE = encode_size_update(TABLE_SIZE)
REFILL = EMPTY + SAME_SIZE
BROKEN = NEWEST + b"\x80"

WITNESS: list[Step] = [A1, NEWEST, B2, NEWEST]
"""a: 1, then b: 2: the same octet, another table."""

ALPHABET: list[Step] = [
    A1, B2, NEWEST, OLDER, NEWEST * 2, b"\xc0", OVERSIZE, EMPTY, SAME_SIZE, REFILL, REFILL + A1, encode_size_update(34),
    A1 + NEWEST, NEWEST + A1, BROKEN, A1 + b"\x80", b"\x82\x86", b"\x00\x01a\x011", b"\x10\x01a\x011",
    b"\x7e\x0133", b"\x0f\x2f\x0133", b"\x82" * 20, b"", 0, 34, TABLE_SIZE,
]  # fmt: skip

STEPS = st.lists(st.sampled_from(ALPHABET) | st.binary(max_size=5), max_size=40)


@pytest.mark.requirement("D1", "D2")
@given(STEPS)
@example(WITNESS)
def test_a_memo_that_follows_the_epoch_changes_no_result(steps: list[Step]) -> None:
    assert first_difference(steps) is None


@pytest.mark.requirement("D2")
@pytest.mark.parametrize(
    "change",
    [A1, A1 * 3, OVERSIZE, EMPTY, REFILL, SAME_SIZE, encode_size_update(34), BROKEN, A1 + b"\x80", 0, TABLE_SIZE],
    ids=["insertion", "eviction", "oversize", "size 0", "size 0 and back", "same size", "size 34", "error",
         "insertion and error", "acknowledged 0", "acknowledged same"],
)  # fmt: skip
def test_blocks_replayed_after_each_kind_of_change_give_the_present_fields(change: Step) -> None:
    blocks = [NEWEST, OLDER, NEWEST * 2, b"\x82", b"\x7e\x0133", BROKEN]
    for block in blocks:
        assert first_difference([A1, B2, *blocks, *blocks, change, block, block, *blocks]) is None


WITNESSES: list[tuple[str, type[Memo], type[Decoder], list[Step]]] = [
    ("everything kept", OfEverything, Decoder, [A1, A1, OLDER]),
    ("everything kept, flushed", FlushedButOfEverything, Decoder, [A1, A1, OLDER]),
    ("never flushed", NeverFlushed, Decoder, WITNESS),
    ("insertion not counted", Memo, SilentInsertion, WITNESS),
    ("oversize insertion not counted", Memo, SilentOversizeInsertion, [A1, NEWEST, OVERSIZE, NEWEST]),
    ("size update not counted", Memo, SilentSizeUpdate, [A1, NEWEST, EMPTY, NEWEST]),
    ("size update not marked", Memo, UnmarkedSizeUpdate, [EMPTY, SAME_SIZE, EMPTY, A1]),
    ("acknowledgement not counted", Memo, SilentAcknowledgement, [A1, NEWEST, 34, NEWEST]),
]


@pytest.mark.interpreted
@pytest.mark.requirement("D1", "D2")
@pytest.mark.parametrize(("_what", "memo", "decoder", "steps"), WITNESSES, ids=[row[0] for row in WITNESSES])
def test_a_memo_or_decoder_that_breaks_a_rule_gives_a_wrong_result(
    _what: str, memo: type[Memo], decoder: type[Decoder], steps: list[Step]
) -> None:
    assert first_difference(steps) is None
    assert first_difference(steps, memo, decoder) is not None


CALL = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/avap.DefinitionService/GetCommand"),
    (b":authority", b"localhost:50051"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


@pytest.mark.requirement("D1", "C-go-fresh-timeout")
@pytest.mark.parametrize("timeouts", ["none", "fresh", "a few"])
def test_requests_of_real_clients_give_the_same_fields_with_and_without_a_memo(timeouts: str) -> None:
    """The encoder inserts all fields, as grpc-go and grpc-java do; fresh timeouts evict older entries."""
    encoder = reference.Encoder()
    plain = Decoder(max_list_size=16384, max_fields=100)
    memo = Memo(Decoder(max_list_size=16384, max_fields=100))
    for number in range(500):
        timeout = {"none": None, "fresh": 4_999_000 + number, "a few": 4_999_000 + number // 7 % 5}[timeouts]
        fields = CALL + ([(b"grpc-timeout", b"%du" % timeout)] if timeout else [])
        block = encoder.encode(fields)
        assert tuple(fields) == plain.decode(block) == memo.decode(block)
        assert memo.decoder.dynamic_table == plain.dynamic_table
    # With a fresh timeout no block repeats; there the memo of Huffman-coded strings helps.
    assert (memo.hits == 0) == (timeouts == "fresh")
