"""Header compression on a connection (RFC 7541), and the limits of header lists."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import HANDLED, STATIC, Peer
from tests.support.h2_wire import (
    COMPRESSION_ERROR,
    ENHANCE_YOUR_CALM,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    Feed,
    call,
    continuation,
    data,
    grpc_message,
    headers,
    indexed,
    inserting,
    integer,
    plain,
    request_block,
    size_update,
    string,
    three_ways,
)

from grpc_h2.connection.headers import FIELDS_AT_ONCE, Headers
from grpc_h2.connection.limits import Limits
from grpc_h2.wire.hpack import Decoder

LITERAL = b"\x00\x01a"  # a literal without indexing with the name "a"; its value is still missing

BROKEN = {
    "index zero": b"\x80",
    "index past the static table": indexed(62),
    "index far past": indexed(2**31),
    "name index past the table": b"\x0f\x7f" + string(b"x"),
    "inserting name index past the table": b"\x7f\x7f" + string(b"x"),
    "index of six octets": b"\xff" + b"\xff" * 5 + b"\x0f",
    "endless integer": b"\xff" + b"\x80" * 40,
    "integer above 32 bits": b"\xff\xff\xff\xff\xff\x7f",
    "unfinished integer": b"\xff\x80",
    "string past the block": LITERAL + b"\x05abcd",
    "string of four gigabytes": LITERAL + integer(2**32 - 1, 7) + b"a",
    "name past the block": b"\x00\x09abc",
    "literal without value": LITERAL,
    "literal without anything": b"\x40",
    "huffman padding of eleven bits": LITERAL + b"\x82\x1f\xff",
    "huffman padding of eight bits": LITERAL + b"\x81\xff",
    "huffman padding not ones": LITERAL + b"\x81\x18",
    "huffman end of string": LITERAL + b"\x84\xff\xff\xff\xff",
    "huffman end of string inside": LITERAL + b"\x85\x1f\xff\xff\xff\xff",
    "huffman broken name": b"\x00\x81\x18\x01a",
    "size update after a field": size_update(0),
    "size update above the limit": size_update(4097),
}


@pytest.mark.requirement("A23", "A24", "A25", "B-hpack-integer")
@three_ways
@pytest.mark.parametrize("name", BROKEN)
def test_a_block_that_cannot_be_decoded_is_a_compression_error(feed: Feed, name: str):
    peer = Peer(feed).send(headers(1, request_block(HANDLED) + BROKEN[name], end_stream=True))
    peer.assert_closed(COMPRESSION_ERROR)
    assert not peer.calls


@pytest.mark.requirement("A25")
@pytest.mark.parametrize("size", [0, 4096])
def test_several_size_updates_before_the_first_field_are_legal(size: int):
    peer = Peer().send(headers(1, size_update(0) + size_update(size) + request_block(HANDLED)))
    assert 1 in peer.calls
    peer.assert_alive()


@pytest.mark.requirement("A25")
@three_ways
def test_a_size_update_above_the_advertised_limit_is_a_compression_error(feed: Feed):
    peer = Peer(feed)
    advertised = peer.replies.settings.get(1, 4096)
    assert advertised >= 4096
    peer.send(headers(1, size_update(advertised + 1) + request_block(HANDLED)))
    peer.assert_closed(COMPRESSION_ERROR)


@pytest.mark.requirement("A27")
@three_ways
@pytest.mark.parametrize("name", ["huffman padding not ones", "index zero"])
@pytest.mark.parametrize("where", ["trailers", "refused", "reset", "continuation", "malformed"])
def test_a_broken_block_is_a_compression_error_even_if_its_request_is_dropped(feed: Feed, name: str, where: str):
    broken = BROKEN[name]
    peer = Peer(feed, limits=Limits(max_concurrent_streams=1)).send(headers(1, request_block(HANDLED)))
    if where == "refused":
        peer.send(headers(3, request_block() + broken))
    elif where == "continuation":
        peer.send(
            headers(1, broken[:1], end_stream=True, end_headers=False), continuation(1, broken[1:], end_headers=True)
        )
    elif where == "malformed":
        peer.send(headers(3, plain(b"Upper", b"") + broken))
    else:
        if where == "reset":
            peer.connection.cancel(peer.calls[1])
            peer.read()
        peer.send(headers(1, broken, end_stream=True))
    peer.assert_closed(COMPRESSION_ERROR)


# --- the dynamic table ---------------------------------------------------------------------------------------


def metadata_of(peer: Peer, stream: int) -> list[tuple[str, str | bytes]]:
    request = peer.calls[stream].request
    assert request is not None
    return list(request.metadata)


@pytest.mark.requirement("A26")
@three_ways
def test_an_oversize_entry_empties_the_table_and_is_not_an_error(feed: Feed):
    peer = Peer(feed).send(
        headers(1, request_block(HANDLED) + inserting(b"a", b"1")),
        headers(3, request_block(HANDLED) + indexed(62)),
        headers(5, request_block(HANDLED) + inserting(b"big", b"x" * 4100)),
        headers(7, request_block(HANDLED) + inserting(b"b", b"2") + indexed(62)),
    )
    assert ("a", "1") in metadata_of(peer, 3)
    assert ("big", "x" * 4100) in metadata_of(peer, 5)
    assert metadata_of(peer, 7).count(("b", "2")) == 2
    peer.send(headers(9, request_block(HANDLED) + indexed(63)))
    peer.assert_closed(COMPRESSION_ERROR)


@pytest.mark.requirement("A26")
@three_ways
def test_the_name_of_an_entry_that_its_own_insertion_evicts_can_be_used(feed: Feed):
    # RFC 7541 section 4.4: the referenced entry may be evicted before the new one is added.
    peer = Peer(feed).send(
        headers(1, request_block(HANDLED) + inserting(b"name", b"v" * 4000)),
        headers(3, request_block(HANDLED) + b"\x7e" + string(b"w" * 4000)),
        headers(5, request_block(HANDLED) + indexed(62)),
    )
    assert ("name", "w" * 4000) in metadata_of(peer, 5)


@pytest.mark.requirement("A26")
@three_ways
def test_the_size_of_an_entry_is_32_octets_more_than_its_strings(feed: Feed):
    # 4096 = 2 * (16 + 2000 + 32): exactly two fit.
    entry = [inserting(b"n" * 15 + bytes((97 + n,)), bytes((97 + n,)) * 2000) for n in range(3)]
    peer = Peer(feed).send(
        headers(1, request_block(HANDLED) + entry[0] + entry[1]), headers(3, request_block(HANDLED) + indexed(63))
    )
    assert ("n" * 15 + "a", "a" * 2000) in metadata_of(peer, 3)
    peer.send(headers(5, request_block(HANDLED) + entry[2]), headers(7, request_block(HANDLED) + indexed(63)))
    assert ("n" * 15 + "b", "b" * 2000) in metadata_of(peer, 7)
    peer.send(headers(9, request_block(HANDLED) + indexed(64))).assert_closed(COMPRESSION_ERROR)


@pytest.mark.requirement("A26")
@three_ways
def test_duplicates_in_the_table_are_legal(feed: Feed):
    twice = inserting(b"a", b"1") * 2
    peer = Peer(feed).send(headers(1, request_block(HANDLED) + twice), headers(3, request_block(HANDLED) + indexed(63)))
    assert metadata_of(peer, 1).count(("a", "1")) == 2
    assert metadata_of(peer, 3).count(("a", "1")) == 1


# --- errors leave the table in step --------------------------------------------------------------------------


@pytest.mark.requirement("A27")
@three_ways
@pytest.mark.parametrize(
    "fault",
    [
        plain(b"Upper", b"x"),
        plain(b"", b"x"),
        plain(b"value", b"a\r\nb"),
        plain(b"te", b"gzip"),
        plain(b"connection", b"close"),
        plain(b"bytes-bin", b"*"),
        plain(b":unknown", b"x"),
        plain(b"long", b"x" * 20_000),
        plain(b"grpc-timeout", b"soon"),
    ],
)
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_an_error_in_one_field_affects_neither_the_table_nor_the_next_field(feed: Feed, fault: bytes, path: bytes):
    block = request_block(path) + inserting(b"first", b"1") + fault + inserting(b"second", b"2")
    peer = Peer(feed).send(
        headers(1, block[:16000], end_headers=False, end_stream=True),
        continuation(1, block[16000:], end_headers=True),
        headers(3, request_block(HANDLED) + indexed(62) + indexed(63)),
    )
    assert peer.code is None, peer.closing
    assert [pair for pair in metadata_of(peer, 3) if pair[0] in ("first", "second")] == [
        ("second", "2"),
        ("first", "1"),
    ]
    assert peer.result(1).reset is not None or peer.result(1).status not in (None, 0)
    peer.assert_alive()


@pytest.mark.requirement("A27", "A47")
@three_ways
def test_header_blocks_after_goaway_are_decoded(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)))
    peer.connection.drain(peer.now)
    peer.read()
    peer.advance(30)
    peer.send(headers(3, request_block(HANDLED) + inserting(b"a", b"1"), end_stream=True))
    assert 3 not in peer.calls
    assert peer.result(3).reset in (None, REFUSED_STREAM)
    peer.send(headers(1, indexed(62), end_stream=True))
    assert peer.half_closed == {1}, "the table is in step"
    peer.send(headers(5, b"\x80"))
    peer.assert_closed(COMPRESSION_ERROR)


@pytest.mark.requirement("A27")
@three_ways
@pytest.mark.parametrize("broken", [b"\x80", indexed(70)])
def test_nothing_after_a_compression_error_is_read(feed: Feed, broken: bytes):
    peer = Peer(feed).send(headers(1, request_block() + broken), call(3), call(5, HANDLED))
    peer.assert_closed(COMPRESSION_ERROR)
    assert not peer.calls
    assert 3 not in peer.replies.streams


# --- header lists that are too large -------------------------------------------------------------------------


@pytest.mark.requirement("A28", "B-hpack-bomb")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
@pytest.mark.parametrize("extra", [plain(b"a", b"x" * 17_000), plain(b"cookie", b"a=b") * 110, plain(b"a", b"") * 101])
def test_a_header_list_above_the_limit_ends_the_call_with_resource_exhausted(feed: Feed, path: bytes, extra: bytes):
    block = request_block(path) + extra
    peer = Peer(feed).send(
        headers(1, block[:9000], end_headers=False),
        continuation(1, block[9000:], end_headers=True),
        data(1, grpc_message(b"world"), end_stream=True),
    )
    peer.assert_status(1, 8)
    assert not peer.calls


@pytest.mark.requirement("A28")
@three_ways
def test_a_header_list_of_8_kib_is_accepted(feed: Feed):
    extra = b"".join(plain(b"k%d" % number, b"v" * 80) for number in range(60))
    peer = Peer(feed).send(headers(1, request_block() + extra), data(1, grpc_message(b"world"), end_stream=True))
    peer.assert_answered(1)


@pytest.mark.requirement("A28", "B-hpack-bomb")
def test_a_header_list_above_the_hard_limit_ends_the_connection():
    block = request_block(HANDLED) + inserting(b"n", b"v" * 4000) + indexed(62) * 12_000
    peer = Peer().send(headers(1, block[:16_384], end_headers=False), continuation(1, block[16_384:], end_headers=True))
    peer.assert_closed(ENHANCE_YOUR_CALM)


@pytest.mark.requirement("A28", "B-hpack-bomb")
@three_ways
def test_a_header_list_of_600_fields_ends_the_connection(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block() + plain(b"cookie", b"a=b") * 600))
    peer.assert_closed(ENHANCE_YOUR_CALM)


@pytest.mark.requirement("A28", "B-hpack-bomb")
def test_decoding_stops_at_the_hard_limit_of_octets():
    decoder = Decoder(max_list_size=16_384, max_fields=100, hard_list_size=131_072)
    decoder.decode(inserting(b"n", b"v" * 4000) + indexed(62) * 12_000)
    assert 131_072 < decoder.list_size <= 131_072 + 4033
    assert decoder.beyond_hard_limit


@pytest.mark.requirement("A28", "B-hpack-bomb")
@pytest.mark.parametrize(("count", "beyond_hard_limit"), [(128, False), (129, True), (600, True)])
def test_decoding_stops_at_the_hard_limit_of_fields(count: int, beyond_hard_limit: bool):
    decoder = Decoder(max_list_size=16_384, max_fields=100, hard_fields=128)
    fields = decoder.decode(plain(b"a", b"") * count)
    assert len(fields) == 100
    assert decoder.overflow
    assert decoder.beyond_hard_limit is beyond_hard_limit
    assert decoder.list_size == 33 * min(count, 129)


MANY = plain(b"a", b"bcd") * 85  # 100 fields together with those of the request


@pytest.mark.requirement("B-long-reads")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
@pytest.mark.parametrize("continued", [False, True])
def test_a_long_block_is_decoded_in_several_reads_and_later_frames_wait(feed: Feed, path: bytes, continued: bool):
    block = request_block(path) + MANY + inserting(b"kept", b"1")
    frames = headers(3, block)
    if continued:
        frames = headers(3, block[:200], end_headers=False) + continuation(3, block[200:], end_headers=True)
    peer = Peer(feed).send(call(1))
    before = peer.turns
    peer.send(frames, data(3, grpc_message(b"world"), end_stream=True), headers(5, request_block() + indexed(62)))
    peer.send(data(5, grpc_message(b"world"), end_stream=True))
    peer.assert_answered(1)
    peer.assert_answered(5)
    if path == STATIC:
        peer.assert_answered(3)
    else:
        assert peer.received[3] == [b"world"]
    assert peer.turns > before


@pytest.mark.requirement("B-long-reads")
@three_ways
def test_long_trailers_are_decoded_in_several_reads(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), data(1, grpc_message(b"world")))
    before = peer.turns
    peer.send(headers(1, plain(b"a", b"x") * 98, end_stream=True), call(3))
    assert peer.half_closed == {1}
    peer.assert_answered(3)
    assert peer.turns > before


@pytest.mark.interpreted
@pytest.mark.requirement("B-long-reads")
@pytest.mark.parametrize("block", [MANY, MANY * 7, plain(b"n", b"v" * 30) * 400], ids=["many", "tiny", "small"])
def test_no_read_decodes_more_than_its_share_of_a_block(block: bytes, monkeypatch: pytest.MonkeyPatch):
    done: list[int] = []
    decode_some = Decoder.decode_some

    def counted(self: Decoder, block: bytes, most: int) -> object:
        done[-1] += most
        return decode_some(self, block, most)

    monkeypatch.setattr(Decoder, "decode_some", counted)
    peer = Peer()
    block = (request_block() + block)[:16_384]
    frames = headers(1, block) + data(1, grpc_message(b"world"), end_stream=True)
    done.append(0)
    peer.connection.receive_data(frames, peer.now)
    while peer.connection.backlog:
        done.append(0)
        peer.connection.receive_data(b"", peer.now)
    assert max(done) <= 2 * FIELDS_AT_ONCE
    assert sum(done) >= 90


@pytest.mark.interpreted
@pytest.mark.requirement("B-long-reads")
def test_the_last_piece_of_a_block_and_its_request_are_processed_in_different_turns(monkeypatch: pytest.MonkeyPatch):
    done: list[list[str]] = [[]]
    decode_some, route = Decoder.decode_some, Headers.route

    def noted_piece(self: Decoder, block: bytes, most: int) -> object:
        done[-1].append("piece")
        return decode_some(self, block, most)

    def noted_request(self: Headers, block: bytes) -> object:
        done[-1].append("request")
        return route(self, block)

    monkeypatch.setattr(Decoder, "decode_some", noted_piece)
    monkeypatch.setattr(Headers, "route", noted_request)
    peer = Peer()
    frames = headers(1, request_block() + MANY) + data(1, grpc_message(b"world"), end_stream=True)
    peer.connection.receive_data(frames, peer.now)
    while peer.connection.backlog:
        done.append([])
        peer.connection.receive_data(b"", peer.now)
    assert [turn for turn in done if "request" in turn] == [["request"]]
    assert sum(turn.count("piece") for turn in done) > 1


@pytest.mark.requirement("B-long-reads", "D7")
def test_while_a_block_is_being_decoded_the_fast_path_is_not_taken():
    peer = Peer().send(call(1))
    connection = peer.connection
    connection.receive_data(headers(3, request_block() + MANY), peer.now)
    assert connection.backlog
    assert connection.answer_one(call(5), peer.now) is None
    peer.send(data(3, grpc_message(b"world"), end_stream=True), call(5))
    for stream in (1, 3, 5):
        peer.assert_answered(stream)


@pytest.mark.requirement("A28")
def test_the_limit_of_the_header_list_is_advertised():
    assert 8 * 1024 <= Peer().replies.settings[6] <= 64 * 1024


@pytest.mark.requirement("A28")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_trailers_above_the_limit_end_their_stream_only(feed: Feed, path: bytes):
    block = plain(b"a", b"x" * 17_000) + inserting(b"kept", b"1")
    peer = Peer(feed).send(
        headers(1, request_block(path)),
        data(1, grpc_message(b"world")),
        headers(1, block[:9000], end_headers=False, end_stream=True),
        continuation(1, block[9000:], end_headers=True),
        headers(3, request_block(HANDLED) + indexed(62)),
    )
    assert ("kept", "1") in metadata_of(peer, 3)
    assert peer.result(1).reset in (None, PROTOCOL_ERROR, ENHANCE_YOUR_CALM)
    peer.assert_alive()
