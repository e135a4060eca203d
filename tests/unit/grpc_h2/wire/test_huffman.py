"""The Huffman code is that of RFC 7541 appendix B, and the decoder is as strict as section 5.2 demands."""

from __future__ import annotations

import pytest
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.huffman_table import decode_huffman
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.wire import huffman
from grpc_h2.wire.errors import ErrorCode, HpackError

encode = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode

EOS_BITS = "1" * 30


def coded(bits: str) -> bytes:
    """The octets of ``bits``, whose number is a multiple of eight."""
    assert len(bits) % 8 == 0
    return int(bits, 2).to_bytes(len(bits) // 8, "big")


def bits_of(symbol: int) -> str:
    return format(REQUEST_CODES[symbol], f"0{REQUEST_CODES_LENGTH[symbol]}b")


def test_the_code_lengths_are_those_of_rfc_7541() -> None:
    assert list(huffman.CODE_LENGTHS) == list(REQUEST_CODES_LENGTH)


@pytest.mark.parametrize("symbol", range(256))
def test_each_octet_has_the_code_of_rfc_7541(symbol: int) -> None:
    for count in (1, 2, 3, 8):
        assert huffman.decode(encode(bytes([symbol]) * count)) == bytes([symbol]) * count


@pytest.mark.parametrize(
    ("octets", "text"),
    [
        ("f1e3c2e5f23a6ba0ab90f4ff", b"www.example.com"),
        ("a8eb10649cbf", b"no-cache"),
        ("25a849e95ba97d7f", b"custom-key"),
        ("25a849e95bb8e8b4bf", b"custom-value"),
        ("6402", b"302"),
        ("aec3771a4b", b"private"),
        ("d07abe941054d444a8200595040b8166e082a62d1bff", b"Mon, 21 Oct 2013 20:13:21 GMT"),
        ("9d29ad171863c78f0b97c8e9ae82ae43d3", b"https://www.example.com"),
    ],
)
def test_the_strings_of_rfc_7541_appendix_c_are_decoded(octets: str, text: bytes) -> None:
    assert huffman.decode(bytes.fromhex(octets)) == text


@given(st.binary(max_size=200))
def test_any_encoded_text_is_decoded(text: bytes) -> None:
    assert huffman.decode(encode(text)) == text


@pytest.mark.requirement("A24")
@given(st.binary(max_size=64))
def test_any_octets_are_decoded_or_refused_as_by_the_reference(data: bytes) -> None:
    try:
        expected = decode_huffman(data)
    except Exception:  # noqa: BLE001 - whatever the reference raises, it is a refusal
        expected = None
    if expected is None:
        with pytest.raises(HpackError):
            huffman.decode(data)
    else:
        assert huffman.decode(data) == expected


def test_zero_octets_are_decoded_as_the_empty_string() -> None:
    assert huffman.decode(b"") == b""


@pytest.mark.requirement("A24")
@pytest.mark.parametrize("ones", range(1, 8))
def test_up_to_seven_ones_are_padding(ones: int) -> None:
    # The numbers of symbols of 5 and 6 bits are chosen so that this many bits of the last octet remain.
    text = next(t for n in range(1, 20) for t in (b"0" * n, b"0" * n + b"A") if -sum(map(code_length, t)) % 8 == ones)
    data = encode(text)
    assert data[-1] & (1 << ones) - 1 == (1 << ones) - 1
    assert huffman.decode(data) == text


def code_length(symbol: int) -> int:
    return int(REQUEST_CODES_LENGTH[symbol])


@pytest.mark.requirement("A24")
@pytest.mark.parametrize("octets", [1, 2, 3])
def test_padding_of_more_than_seven_bits_is_refused(octets: int) -> None:
    for text in (b"", b"0", b"/path", b"&"):  # "&" has eight bits and needs no padding
        with pytest.raises(HpackError) as caught:
            huffman.decode(encode(text) + b"\xff" * octets)
        assert caught.value.code is ErrorCode.COMPRESSION_ERROR


@pytest.mark.requirement("A24")
def test_padding_that_is_not_ones_is_refused() -> None:
    whole = encode(b"0")  # five bits and three of padding
    for padding in range(7):
        with pytest.raises(HpackError):
            huffman.decode(bytes([whole[0] & 0xF8 | padding]))


@pytest.mark.requirement("A24")
@pytest.mark.parametrize("before", [b"", b"0", b"00", b"A"])
@pytest.mark.parametrize("after", [b"", b"0", b"A"])
def test_the_end_of_string_symbol_is_refused(before: bytes, after: bytes) -> None:
    bits = "".join(map(bits_of, before)) + EOS_BITS + "".join(map(bits_of, after))
    with pytest.raises(HpackError, match="EOS"):
        huffman.decode(coded(bits + "1" * (-len(bits) % 8)))


@pytest.mark.requirement("D6")
def test_a_refused_string_is_refused_again_and_changes_nothing() -> None:
    for _ in range(3):
        with pytest.raises(HpackError):
            huffman.decode(b"\xff\xff\xff\xff")
        assert huffman.decode(encode(b"\x16\xff")) == b"\x16\xff"
