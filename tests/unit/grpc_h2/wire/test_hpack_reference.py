"""Compares the decoder and the encoder with the independent `hpack` package. Each decodes the blocks of the other. For
any octets, both decoders give the same fields and the same table, or both refuse the octets.
"""

from __future__ import annotations

import hpack as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.wire import hpack
from grpc_h2.wire.errors import HpackError
from grpc_h2.wire.hpack import Decoder, Field
from grpc_h2.wire.static_table import STATIC_TABLE

LARGE = 1 << 30


def decoder(max_table_size: int = 4096) -> Decoder:
    return Decoder(max_list_size=LARGE, max_fields=LARGE, max_table_size=max_table_size)


def literal(name: bytes, value: bytes, pattern: int) -> bytes:
    return bytes([pattern, len(name)]) + name + bytes([len(value)]) + value


NAME = st.one_of(st.sampled_from([name for name, _ in STATIC_TABLE]), st.binary(max_size=12))
VALUE = st.one_of(st.sampled_from([value for _, value in STATIC_TABLE]), st.binary(max_size=40), st.just(b"x" * 500))
FIELD = st.one_of(st.sampled_from(STATIC_TABLE), st.tuples(NAME, VALUE))
FIELDS = st.lists(st.tuples(FIELD, st.booleans()), max_size=12)
BLOCKS = st.lists(st.tuples(FIELDS, st.booleans(), st.none() | st.sampled_from([0, 40, 300, 4096])), max_size=8)


@pytest.mark.requirement("A26", "A27")
@given(BLOCKS)
def test_blocks_of_the_reference_encoder_are_decoded(
    blocks: list[tuple[list[tuple[Field, bool]], bool, int | None]],
) -> None:
    encoder, subject, peer = reference.Encoder(), decoder(), reference.Decoder(LARGE)
    for fields, huffman, size in blocks:
        if size is not None:
            encoder.header_table_size = size
        block = encoder.encode([(*field, sensitive) for field, sensitive in fields], huffman=huffman)
        assert subject.decode(block) == tuple(field for field, _ in fields)
        peer.decode(block, raw=True)
        assert subject.dynamic_table == tuple(peer.header_table.dynamic_entries)
        assert subject.dynamic_table_size == peer.header_table._current_size


PIECE = st.one_of(
    st.binary(max_size=6),
    st.integers(0x80, 0xFF).map(lambda octet: bytes([octet])),
    st.builds(literal, st.binary(max_size=3), st.binary(max_size=40), st.sampled_from([0x00, 0x10, 0x40])),
    st.builds(lambda octet, text: bytes([octet, len(text)]) + text, st.integers(0x40, 0x7E), st.binary(max_size=20)),
    st.sampled_from([0, 40, 100, 4096, 4097]).map(hpack.encode_size_update),
)


@pytest.mark.requirement("A23", "A24", "A25", "A26")
@given(st.lists(st.lists(PIECE, max_size=8).map(b"".join), max_size=6), st.sampled_from([0, 64, 4096]))
def test_any_octets_are_decoded_or_refused_as_by_the_reference(blocks: list[bytes], table_size: int) -> None:
    subject, peer = decoder(table_size), reference.Decoder(LARGE)
    peer.max_allowed_table_size = peer.header_table_size = table_size
    for block in blocks:
        try:
            expected = tuple(tuple(field) for field in peer.decode(block, raw=True))
        except reference.HPACKError:
            expected = None
        if expected is None:
            with pytest.raises(HpackError):
                subject.decode(block)
            return
        assert subject.decode(block) == expected
        assert subject.dynamic_table == tuple(peer.header_table.dynamic_entries)


# -- the encoder, decoded by the reference -------------------------------------------------------------------


@pytest.mark.requirement("A18")
@given(st.lists(FIELD, max_size=12))
def test_encoded_blocks_are_decoded_in_any_state_of_the_table(fields: list[Field]) -> None:
    block = hpack.encode_block(fields)
    peer = reference.Decoder(LARGE)
    for _ in range(2):
        assert [tuple(field) for field in peer.decode(block, raw=True)] == fields
        assert decoder(0).decode(block) == tuple(fields)
    assert not peer.header_table.dynamic_entries


@pytest.mark.parametrize(
    ("field", "octets"),
    [
        ((b":status", b"200"), "88"),
        ((b":status", b"415"), "0803343135"),
        ((b"content-type", b"a"), "0f100161"),
        ((b"grpc-status", b"0"), "000b677270632d7374617475730130"),
    ],
)
def test_the_encoding_is_the_shortest_without_the_dynamic_table(field: Field, octets: str) -> None:
    assert hpack.encode_field(*field) == bytes.fromhex(octets)


@pytest.mark.requirement("A18")
def test_a_size_update_of_zero_is_one_octet() -> None:
    assert hpack.encode_size_update(0) == b"\x20"
