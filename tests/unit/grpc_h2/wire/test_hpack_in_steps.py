"""A block gives the same result whether it is decoded in steps or at once, and each step is short."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.grpc_h2.wire.hpack_blocks import decoder, literal

from grpc_h2.wire import hpack, huffman
from grpc_h2.wire.errors import HpackError
from grpc_h2.wire.hpack import Decoder

_NAMES = st.sampled_from([b"a", b"name", b"x-" + b"y" * 40])
_FIELDS = st.one_of(
    st.builds(literal, _NAMES, st.binary(max_size=60), st.sampled_from([0x40, 0x00, 0x10])),
    st.integers(1, 70).map(lambda index: hpack.encode_integer(index, 0x7F, 0x80)),
    st.just(literal(b"large", b"v" * 5000)),
    st.just(b"\x00\x05cut"),
)
_UPDATES = st.lists(st.sampled_from([0, 200, 4096]).map(hpack.encode_size_update), max_size=2)


def whole(subject: Decoder, block: bytes) -> object:
    return subject.decode(block)


def in_pieces(most: int) -> object:
    def decode(subject: Decoder, block: bytes) -> object:
        for _ in range(len(block) + 1):
            if (fields := subject.decode_some(block, most)) is not None:
                return fields
        raise AssertionError("no end")

    return decode


def outcome(subject: Decoder, decode: object, block: bytes) -> object:
    """The fields and the visible state of the decoder after a block, or the error."""
    try:
        fields = decode(subject, block)
    except HpackError as error:
        return str(error)
    seen = (subject.changed, subject.epoch, subject.overflow, subject.list_size, subject.beyond_hard_limit)
    return fields, seen, subject.dynamic_table, subject.dynamic_table_size


@pytest.mark.requirement("B-long-reads")
@given(
    st.lists(st.tuples(_UPDATES, st.lists(_FIELDS, max_size=90)), min_size=1, max_size=3),
    st.integers(1, 40),
    st.sampled_from([5, 32, 64, 10_000]),
)
def test_a_block_decoded_in_steps_equals_the_block_decoded_at_once(
    blocks: list[tuple[list[bytes], list[bytes]]], most: int, beyond_hard_limit: int
) -> None:
    first, second = (
        Decoder(max_list_size=1000, max_fields=20, hard_list_size=8000, hard_fields=beyond_hard_limit) for _ in range(2)
    )
    for updates, fields in blocks:
        block = b"".join((*updates, *fields))
        seen = outcome(first, whole, block)
        assert outcome(second, in_pieces(most), block) == seen
        if isinstance(seen, str) or first.beyond_hard_limit:
            return  # the decoder must not be used again


@pytest.mark.requirement("B-long-reads")
def test_a_step_decodes_no_more_fields_than_requested() -> None:
    subject = decoder()
    block = b"".join(literal(b"n", b"%d" % number) for number in range(10))
    for done in (4, 8):
        assert subject.decode_some(block, 4) is None
        assert len(subject.dynamic_table) == done
    fields = subject.decode_some(block, 4)
    assert fields is not None
    assert [value for _, value in fields] == [b"%d" % number for number in range(10)]


huffman_encode = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode


def _coded_string(coded: bytes) -> bytes:
    return hpack.encode_integer(len(coded), 0x7F, 0x80) + coded


@pytest.mark.requirement("B-long-reads")
@pytest.mark.parametrize("first", [0x00, 0x10, 0x40], ids=["plain", "never indexed", "inserting"])
@pytest.mark.parametrize("names", [False, True], ids=["long value", "long name and value"])
def test_a_long_huffman_string_is_decoded_in_short_pieces_with_the_same_result(first: int, names: bool) -> None:
    rng = random.Random(7)
    text = bytes(rng.choice(b"abcdefghijklmnopqrstuvwxyz0123456789-") for _ in range(30_000))
    coded = huffman_encode(text)
    name = _coded_string(coded) if names else b"\x01n"
    block = bytes((first,)) + name + _coded_string(coded) + b"\x82" + bytes((first,)) + b"\x01m\x01v"
    sizes = {"max_list_size": 200_000, "max_fields": 100}
    pieces, subject = 0, Decoder(**sizes)
    while (fields := subject.decode_some(block, 32)) is None:
        pieces += 1
    whole = Decoder(**sizes)
    assert fields == whole.decode(block)
    assert fields[0] == (text if names else b"n", text)
    assert (subject.list_size, subject.dynamic_table, subject.epoch) == (
        whole.list_size,
        whole.dynamic_table,
        whole.epoch,
    )
    assert pieces >= (1 + names) * len(coded) // 512
    assert subject.decode(b"\x82") == whole.decode(b"\x82"), "and the next block is decoded as usual"


@pytest.mark.requirement("B-long-reads")
def test_a_piece_of_a_block_ends_early_if_it_takes_new_steps_of_the_huffman_tree(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huffman, "_ROOT", huffman._tree())
    rng = random.Random(3)
    coded = huffman_encode(bytes(rng.randrange(256) for _ in range(4000)))
    known = []
    run = huffman.Run(coded, 0, len(coded), len(coded))
    while run.step() is None:
        known.append(huffman._steps_known)
    new = [after - before for before, after in pairwise(known)]
    assert max(new) <= 24
    assert len(known) > len(coded) // huffman.OCTETS_AT_ONCE


@pytest.mark.requirement("B-long-reads")
@pytest.mark.parametrize("first", [0x00, 0x10, 0x40], ids=["plain", "never indexed", "inserting"])
@pytest.mark.parametrize(("octets", "kept"), [(900, 900), (4050, 4050), (4100, 4100), (60_000, 4300)])
def test_only_the_beginning_of_a_text_too_long_for_list_and_table_is_kept(first: int, octets: int, kept: int) -> None:
    """The size of the table is 4,096 octets here, and the limit of the list is 1,000. The result is the same as with
    the whole text."""
    coded = huffman_encode(b"a" * octets)
    block = b"\x82" + bytes((first,)) + b"\x01n" + _coded_string(coded) + b"\x83"
    subject = Decoder(max_list_size=1000, max_fields=10, hard_list_size=131_072)
    plain = Decoder(max_list_size=1000, max_fields=10, hard_list_size=131_072)
    kept_pieces: list[int] = []
    while subject.decode_some(block, 32) is None:
        strings = subject._long_strings
        if strings is not None and strings._run is not None:
            kept_pieces.append(sum(map(len, strings._run[1]._pieces)))
    uncoded = b"\x82" + literal(b"n", b"a" * octets, first) + b"\x83"
    assert outcome(plain, whole, uncoded)
    for name in ("changed", "epoch", "overflow", "list_size", "beyond_hard_limit"):
        assert getattr(subject, name) == getattr(plain, name), name
    assert subject.dynamic_table == plain.dynamic_table
    assert max(kept_pieces) <= kept
    assert subject.decode(b"\x84\x85") == plain.decode(b"\x84\x85"), "and the next block is decoded as usual"


@pytest.mark.requirement("B-long-reads")
def test_a_long_string_with_wrong_padding_or_eos_is_an_error_in_its_last_piece() -> None:
    for coded in (b"\x1f" * 600 + b"\x00\x00", b"\xff" * 700):
        subject = Decoder(max_list_size=200_000, max_fields=100)
        block = b"\x00\x01n" + _coded_string(coded)
        with pytest.raises(HpackError):
            any(subject.decode_some(block, 32) is not None for _ in range(100))
