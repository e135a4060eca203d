"""The decoder follows RFC 7541: its examples, its errors and its limits; and the changes that advance the epoch."""

from __future__ import annotations

import sys

import hpack as reference
import pytest
from hpack.table import HeaderTable
from hypothesis import example, given
from hypothesis import strategies as st
from tests.unit.grpc_h2.wire.hpack_blocks import decoder, literal

from grpc_h2.wire import hpack
from grpc_h2.wire.errors import ErrorCode, HpackError
from grpc_h2.wire.hpack import Decoder, Field
from grpc_h2.wire.static_table import STATIC_INDICES, STATIC_NAMES, STATIC_TABLE


def refused(block: bytes, match: str, subject: Decoder | None = None) -> None:
    with pytest.raises(HpackError, match=match) as caught:
        (subject or decoder()).decode(block)
    assert caught.value.code is ErrorCode.COMPRESSION_ERROR


# -- RFC 7541 appendix C -------------------------------------------------------------------------------------------

DATE = b"Mon, 21 Oct 2013 20:13:21 GMT"
LATER = b"Mon, 21 Oct 2013 20:13:22 GMT"
COOKIE = b"foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"

GET = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")]
GET_AGAIN = [*GET, (b"cache-control", b"no-cache")]
GET_SECURE = [
    (b":method", b"GET"),
    (b":scheme", b"https"),
    (b":path", b"/index.html"),
    (b":authority", b"www.example.com"),
    (b"custom-key", b"custom-value"),
]
LOCATION = (b"location", b"https://www.example.com")
FOUND = [(b":status", b"302"), (b"cache-control", b"private"), (b"date", DATE), LOCATION]
MOVED = [(b":status", b"307"), (b"cache-control", b"private"), (b"date", DATE), LOCATION]
OK = [
    (b":status", b"200"),
    (b"cache-control", b"private"),
    (b"date", LATER),
    LOCATION,
    (b"content-encoding", b"gzip"),
    (b"set-cookie", COOKIE),
]
REQUEST_TABLES = [
    ([(b":authority", b"www.example.com")], 57),
    ([(b"cache-control", b"no-cache"), (b":authority", b"www.example.com")], 110),
    ([(b"custom-key", b"custom-value"), (b"cache-control", b"no-cache"), (b":authority", b"www.example.com")], 164),
]
RESPONSE_TABLES = [
    ([LOCATION, (b"date", DATE), (b"cache-control", b"private"), (b":status", b"302")], 222),
    ([(b":status", b"307"), LOCATION, (b"date", DATE), (b"cache-control", b"private")], 222),
    ([(b"set-cookie", COOKIE), (b"content-encoding", b"gzip"), (b"date", LATER)], 215),
]
REQUESTS = list(zip([GET, GET_AGAIN, GET_SECURE], REQUEST_TABLES, strict=True))
RESPONSES = list(zip([FOUND, MOVED, OK], RESPONSE_TABLES, strict=True))

Exchange = list[tuple[str, tuple[list[Field], tuple[list[Field], int]]]]
"""Sequences of blocks in hexadecimal, each with its fields, the dynamic table after it, and the size of the table."""

EXAMPLES: dict[str, tuple[int, Exchange]] = {
    "C.2.1": (4096, [("400a637573746f6d2d6b65790d637573746f6d2d686561646572",
                      ([(b"custom-key", b"custom-header")], ([(b"custom-key", b"custom-header")], 55)))]),
    "C.2.2": (4096, [("040c2f73616d706c652f70617468", ([(b":path", b"/sample/path")], ([], 0)))]),
    "C.2.3": (4096, [("100870617373776f726406736563726574", ([(b"password", b"secret")], ([], 0)))]),
    "C.2.4": (4096, [("82", ([(b":method", b"GET")], ([], 0)))]),
    "C.3": (4096, list(zip([
        "828684410f7777772e6578616d706c652e636f6d",
        "828684be58086e6f2d6361636865",
        "828785bf400a637573746f6d2d6b65790c637573746f6d2d76616c7565",
    ], REQUESTS, strict=True))),
    "C.4": (4096, list(zip([
        "828684418cf1e3c2e5f23a6ba0ab90f4ff",
        "828684be5886a8eb10649cbf",
        "828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf",
    ], REQUESTS, strict=True))),
    "C.5": (256, list(zip([
        "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
        "6e1768747470733a2f2f7777772e6578616d706c652e636f6d",
        "4803333037c1c0bf",
        "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738"
        "666f6f3d4153444a4b48514b425a584f5157454f50495541585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31",
    ], RESPONSES, strict=True))),
    "C.6": (256, list(zip([
        "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
        "4883640effc1c0bf",
        "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad"
        "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
    ], RESPONSES, strict=True))),
}  # fmt: skip


@pytest.mark.requirement("A26")
@pytest.mark.parametrize("section", EXAMPLES)
def test_the_examples_of_rfc_7541_appendix_c_are_decoded(section: str) -> None:
    table_size, exchange = EXAMPLES[section]
    subject = decoder(table_size)
    for octets, (fields, (table, size)) in exchange:
        assert subject.decode(bytes.fromhex(octets)) == tuple(fields)
        assert subject.dynamic_table == tuple(table)
        assert subject.dynamic_table_size == size
        assert subject.list_size == sum(len(n) + len(v) + 32 for n, v in fields)
        assert not subject.overflow


@pytest.mark.requirement("A23")
@pytest.mark.parametrize(
    ("value", "prefix", "octets"), [(10, 0x1F, "0a"), (1337, 0x1F, "1f9a0a"), (42, 0xFF, "2a")], ids=str
)
def test_the_integers_of_rfc_7541_appendix_c_1_are_encoded_and_decoded(value: int, prefix: int, octets: str) -> None:
    assert hpack.encode_integer(value, prefix, 0) == bytes.fromhex(octets)
    if len(octets) > 2:
        assert hpack.decode_integer(bytes.fromhex(octets), 1, prefix) == (value, len(octets) // 2)


# -- integers (5.1) ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A23")
@given(st.integers(0, hpack.MAX_INTEGER), st.sampled_from([0x0F, 0x1F, 0x3F, 0x7F]), st.binary(max_size=2))
@example(hpack.MAX_INTEGER, 0x0F, b"\xff")
def test_an_encoded_integer_is_decoded_and_a_cut_one_refused(value: int, prefix: int, behind: bytes) -> None:
    octets = hpack.encode_integer(value, prefix, 0)
    if value < prefix:
        assert octets == bytes([value])
        return
    assert hpack.decode_integer(octets + behind, 1, prefix) == (value, len(octets))
    for end in range(1, len(octets)):
        with pytest.raises(HpackError):
            hpack.decode_integer(octets[:end], 1, prefix)


@pytest.mark.requirement("A23")
def test_an_integer_above_the_limit_is_refused() -> None:
    with pytest.raises(HpackError):
        hpack.decode_integer(hpack.encode_integer(hpack.MAX_INTEGER + 1, 0x7F, 0), 1, 0x7F)


@pytest.mark.requirement("A23")
def test_a_sixth_octet_after_the_prefix_of_an_integer_is_refused() -> None:
    assert hpack.decode_integer(b"\x80\x80\x80\x80\x00", 0, 0x7F) == (0x7F, 5)
    with pytest.raises(HpackError):
        hpack.decode_integer(b"\x80\x80\x80\x80\x80\x00", 0, 0x7F)


@pytest.mark.requirement("A23", "B-hpack-integer")
@pytest.mark.parametrize("first", ["ff", "7f", "3f", "0f", "1f", "007f", "00ff", "0001617f", "000161ff", "047f"])
@pytest.mark.parametrize(
    "rest",
    ["", "80", "80" * 5 + "00", "80" * 10_000, "ff" * 5, "ffffffff1f"],
    ids=["nothing", "cut", "six octets", "endless", "no end", "too large"],
)
def test_endless_large_and_cut_integers_are_refused_at_every_place(first: str, rest: str) -> None:
    refused(bytes.fromhex(first + rest), "integer")


# -- indices (6.1) -------------------------------------------------------------------------------------------------


def test_the_static_table_is_that_of_rfc_7541() -> None:
    assert HeaderTable.STATIC_TABLE == STATIC_TABLE
    for index, field in enumerate(STATIC_TABLE, 1):
        assert decoder().decode(bytes([0x80 | index])) == (field,)
        assert STATIC_INDICES[field] == index
        assert STATIC_TABLE[STATIC_NAMES[field[0]] - 1][0] == field[0]
    assert STATIC_NAMES[b":method"] == 2
    assert STATIC_NAMES[b":status"] == 8


@pytest.mark.requirement("A23")
@pytest.mark.parametrize("block", ["80", "be", "c0", "ff00", "ffff07", "7e0131", "0f2f0131", "1f2f0131", "7f000131"])
def test_an_index_that_does_not_exist_is_refused(block: str) -> None:
    refused(bytes.fromhex(block), "index")


@pytest.mark.requirement("A23")
def test_the_newest_entry_has_index_62_and_the_oldest_the_largest() -> None:
    subject = decoder()
    subject.decode(b"".join(literal(b"a", b"%d" % n) for n in range(70)))
    assert subject.decode(b"\xbe") == ((b"a", b"69"),)
    assert subject.decode(b"\xff" + bytes([62 + 69 - 127])) == ((b"a", b"0"),)
    refused(b"\xff" + bytes([62 + 70 - 127]), "beyond the table", subject)


def test_an_inserted_entry_can_be_used_in_the_same_block() -> None:
    assert decoder().decode(literal(b"a", b"1") + b"\xbe\x7e\x012\xbf") == (
        (b"a", b"1"), (b"a", b"1"), (b"a", b"2"), (b"a", b"1")
    )  # fmt: skip


@pytest.mark.requirement("D1")
@pytest.mark.parametrize("pattern", [0x00, 0x10])
def test_literals_without_indexing_do_not_change_the_table(pattern: int) -> None:
    subject = decoder()
    assert subject.decode(literal(b"a", b"1", pattern)) == ((b"a", b"1"),)
    assert (subject.dynamic_table, subject.changed, subject.epoch) == ((), False, 0)


# -- strings (5.2) -------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A23")
@pytest.mark.parametrize("block", ["00", "40", "10", "0001", "000161", "00016102", "0001610231", "01", "0102", "0f01"])
def test_a_block_that_ends_early_is_refused(block: str) -> None:
    refused(bytes.fromhex(block), "block|cut")


@pytest.mark.requirement("A23", "B-hpack-integer")
def test_a_string_longer_than_its_block_is_refused_before_it_is_copied() -> None:
    refused(b"\x00\x7f\x80\xff\xff\xff\x0f" + b"a" * 100, "longer than its block")
    refused(b"\x00\xff\x80\xff\xff\xff\x0f" + b"a" * 100, "longer than its block")


def test_an_empty_string_is_decoded() -> None:
    for block in (b"\x00\x00\x00", b"\x00\x80\x80"):
        assert decoder().decode(block) == ((b"", b""),)


@pytest.mark.requirement("A24")
@pytest.mark.parametrize("tail", ["82ffff", "8118", "84ffffffff", "81ff"], ids=["padding", "zeros", "eos", "octet"])
@pytest.mark.parametrize("head", ["00", "10", "40", "000161", "100161", "01", "41"])
def test_wrong_huffman_coding_in_a_name_or_value_is_refused(head: str, tail: str) -> None:
    refused(bytes.fromhex(head + tail) + b"\x00", "Huffman")


# -- size updates (6.3, 4.2) ---------------------------------------------------------------------------------------


@pytest.mark.requirement("A25")
@pytest.mark.parametrize("before", ["82", "000000", "400000", "2082"])
def test_a_size_update_after_a_field_is_refused(before: str) -> None:
    refused(bytes.fromhex(before) + b"\x20", "after a field")


@pytest.mark.requirement("A25")
def test_several_size_updates_before_the_first_field_are_applied() -> None:
    subject = decoder()
    subject.decode(literal(b"a", b"1"))
    assert subject.decode(b"\x20\x3f\xe1\x1f\x82") == ((b":method", b"GET"),)
    assert subject.dynamic_table == ()


@pytest.mark.requirement("A25")
def test_a_size_update_above_the_acknowledged_limit_is_refused() -> None:
    refused(hpack.encode_size_update(4097), "beyond our limit")
    subject = decoder()
    subject.set_max_table_size(8192)
    assert subject.decode(hpack.encode_size_update(8192)) == ()
    refused(hpack.encode_size_update(8193), "beyond our limit", subject)


@pytest.mark.requirement("A25")
@pytest.mark.parametrize("block", [b"", b"\x82", literal(b"a", b"1")])
def test_after_a_smaller_limit_a_block_without_a_size_update_is_refused(block: bytes) -> None:
    subject = decoder()
    subject.set_max_table_size(100)
    refused(block, "no size update", subject)
    subject.decode(hpack.encode_size_update(100) + block)
    subject.decode(block)


@pytest.mark.requirement("A25")
def test_a_smaller_limit_needs_no_size_update_if_the_peer_already_uses_less() -> None:
    subject = decoder()
    subject.decode(hpack.encode_size_update(50))
    subject.set_max_table_size(100)
    assert subject.decode(b"\x82") == ((b":method", b"GET"),)


@pytest.mark.requirement("A26")
def test_a_smaller_table_evicts_the_oldest_entries() -> None:
    subject = decoder()
    subject.decode(b"".join(literal(b"a", b"%d" % n) for n in range(3)))
    subject.decode(hpack.encode_size_update(68))
    assert subject.dynamic_table == ((b"a", b"2"), (b"a", b"1"))
    subject.decode(hpack.encode_size_update(67))
    assert list(subject.dynamic_table) == [(b"a", b"2")]


# -- eviction (4.4) ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A26")
def test_the_name_of_an_entry_that_its_own_insertion_evicts_can_be_used() -> None:
    subject = decoder(40)
    subject.decode(literal(b"name", b"1"))
    assert subject.decode(b"\x7e\x0222") == ((b"name", b"22"),)
    assert list(subject.dynamic_table) == [(b"name", b"22")]
    assert subject.decode(b"\x7e\x0a" + b"3" * 10) == ((b"name", b"3" * 10),)
    assert subject.dynamic_table == ()


@pytest.mark.requirement("A26")
def test_an_entry_larger_than_the_table_empties_it_and_is_not_an_error() -> None:
    subject = decoder(100)
    subject.decode(literal(b"a", b"1"))
    assert subject.decode(literal(b"b", b"2" * 68)) == ((b"b", b"2" * 68),)
    assert (subject.dynamic_table, subject.dynamic_table_size) == ((), 0)
    subject.decode(literal(b"b", b"2" * 67))
    assert subject.dynamic_table_size == 100


@pytest.mark.requirement("A26")
def test_duplicates_are_separate_entries() -> None:
    subject = decoder()
    subject.decode(literal(b"a", b"1") * 3)
    assert subject.dynamic_table == ((b"a", b"1"),) * 3


def test_decoders_do_not_share_a_table() -> None:
    first, second = decoder(), decoder()
    first.decode(literal(b"a", b"1"))
    second.decode(literal(b"b", b"2"))
    assert (first.dynamic_table, second.dynamic_table) == (((b"a", b"1"),), ((b"b", b"2"),))
    refused(b"\xbe", "beyond the table")


@pytest.mark.requirement("B-slow-client")
def test_a_decoder_without_insertions_holds_no_table_of_its_own() -> None:
    subject = decoder()
    held = sys.getsizeof(subject)
    assert not hasattr(subject, "__dict__")
    subject.decode(b"\x82")
    assert subject._table is decoder()._table
    assert held < 256


# -- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A27", "A28")
def test_a_list_above_the_limit_is_cut_and_the_table_stays_in_step() -> None:
    subject, peer = decoder(max_list_size=100), decoder()
    block = literal(b"a", b"1") + literal(b"b", b"2" * 100) + literal(b"c", b"3") + b"\xbe"
    whole = peer.decode(block)
    assert subject.decode(block) == whole[:1]
    assert subject.overflow
    assert subject.list_size == peer.list_size == sum(len(n) + len(v) + 32 for n, v in whole)
    assert subject.dynamic_table == peer.dynamic_table
    assert subject.decode(b"\xbe") == ((b"c", b"3"),)
    assert (subject.overflow, subject.list_size) == (False, 34)


@pytest.mark.requirement("A28")
def test_a_list_exactly_at_the_limit_is_not_cut() -> None:
    subject = decoder(max_list_size=68)
    subject.decode(literal(b"a", b"1") * 2)
    assert not subject.overflow
    subject.decode(literal(b"a", b"1") + literal(b"a", b"12"))
    assert subject.overflow


@pytest.mark.requirement("A28")
def test_a_list_of_too_many_fields_is_cut() -> None:
    subject = decoder(max_fields=3)
    assert len(subject.decode(b"\x82" * 3)) == 3
    assert not subject.overflow
    assert len(subject.decode(b"\x82" * 4)) == 3
    assert subject.overflow


@pytest.mark.requirement("A27")
def test_an_error_after_the_limit_of_the_list_is_an_error() -> None:
    refused(b"\x82" * 100 + b"\x80", "index 0", decoder(max_fields=3, max_list_size=100))


@pytest.mark.requirement("B-hpack-bomb")
def test_sixteen_thousand_references_keep_no_more_than_the_limit() -> None:
    # CVE-2016-6581: one entry as large as the table, and sixteen thousand references to it.
    subject = decoder(max_list_size=16384, max_fields=100)
    fields = subject.decode(literal(b"a", b"x" * 4000) + b"\xbe" * 16000)
    assert sum(len(name) + len(value) for name, value in fields) <= 16384
    assert len({id(value) for _, value in fields}) == 1
    assert subject.list_size == 16001 * 4033


# -- what advances the epoch ------------------------------------------------------------------------------------------


@pytest.mark.requirement("D2")
@pytest.mark.parametrize(
    "block",
    [literal(b"a", b"1"), literal(b"a", b"1" * 5000), b"\x20", b"\x3f\xe1\x1f", b"\x20\x3f\xe1\x1f"],
    ids=["insertion", "oversize insertion", "size 0", "same size", "size 0, then 4096"],
)
def test_every_change_of_the_table_advances_the_epoch(block: bytes) -> None:
    subject = decoder()
    before = subject.epoch
    subject.decode(block)
    assert (subject.changed, subject.epoch > before) == (True, True)
    before = subject.epoch
    subject.decode(b"\x82" + literal(b"a", b"1", 0x00) + literal(b"a", b"1", 0x10))
    assert (subject.changed, subject.epoch) == (False, before)


@pytest.mark.requirement("D2")
def test_an_acknowledged_table_size_advances_the_epoch() -> None:
    subject = decoder()
    subject.set_max_table_size(4096)
    assert subject.epoch == 1


@pytest.mark.requirement("D2")
def test_an_insertion_before_an_error_advances_the_epoch() -> None:
    subject = decoder()
    refused(literal(b"a", b"1") + b"\x80", "index 0", subject)
    assert (subject.changed, subject.epoch) == (True, 1)


# -- the Huffman memo ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("D6")
def test_the_huffman_memo_is_bounded_and_gives_the_decoded_text(monkeypatch: pytest.MonkeyPatch) -> None:
    memo = hpack._HuffmanMemo(10)
    coded = [reference.hpack.Encoder().huffman_coder.encode(b"text-%d" % n) for n in range(100)]
    for _ in range(2):
        for n, string in enumerate(coded):
            assert memo[string] == b"text-%d" % n
            assert memo[coded[0]] == b"text-0"
            assert memo.held <= 20
    assert coded[0] in memo | memo.old  # a string that is used repeatedly is kept
    size = memo.held
    long = reference.hpack.Encoder().huffman_coder.encode(b"x" * 200)
    assert memo[long] == b"x" * 200
    assert memo.held == size


@pytest.mark.requirement("D6")
def test_a_never_indexed_field_is_not_kept_in_the_huffman_memo(monkeypatch: pytest.MonkeyPatch) -> None:
    memo = hpack._HuffmanMemo(10)
    monkeypatch.setattr(hpack, "_remembered", memo.__getitem__)
    coded = reference.hpack.Encoder().huffman_coder.encode(b"secret")
    block = b"\x00\x01a" + bytes([0x80 | len(coded)]) + coded
    assert decoder().decode(b"\x10" + block[1:]) == ((b"a", b"secret"),)
    assert len(memo) == 0
    assert decoder().decode(block) == ((b"a", b"secret"),)
    assert len(memo) == 1
