"""The memo of decoded header blocks changes no answer: each equals that of a decoder without a memo.

The static method under test answers with the metadata that it sees, so that a wrong header list shows in the answer;
the oracle is the independent `hpack` library, which decodes every block.
"""

from __future__ import annotations

import pytest
from tests.support.h2_oracle import A1, B2, BODY, FIRST, OVERSIZE, REPLAYS, REQUEST, Oracle, placed, replay
from tests.support.h2_peer import GUARDED, HANDLED, REFUSING, STATIC, Keys, Peer, some_router
from tests.support.h2_wire import (
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
    plain,
    request_block,
    rst_stream,
    size_update,
    three_ways,
    whole,
    window_update,
)

from grpc_h2.connection.limits import Limits
from grpc_h2.static.answers import StaticAnswer
from grpc_h2.static.routes import Router
from grpc_h2.wire import hpack as engine_hpack


@pytest.mark.requirement("D2")
@three_ways
@pytest.mark.parametrize("name", REPLAYS)
def test_a_block_replayed_after_a_change_of_the_table_is_decoded_again(feed: Feed, name: str):
    replay(Oracle(feed), name)


@pytest.mark.requirement("D1", "D2")
@three_ways
def test_the_same_octet_after_another_insertion_gives_the_new_field(feed: Feed):
    oracle = Oracle(feed)
    for atoms in ("4001610131", "be", "4001620132", "be"):
        oracle.call(bytes.fromhex(atoms))


@pytest.mark.requirement("D2")
@three_ways
@pytest.mark.parametrize("emptied", [OVERSIZE, size_update(0), size_update(0) + size_update(4096)])
def test_a_block_replayed_after_the_table_was_emptied_is_a_compression_error(feed: Feed, emptied: bytes):
    oracle = Oracle(feed)
    for atoms in (A1, FIRST, FIRST):
        oracle.call(atoms)
    update, rest = placed(emptied)
    oracle.call(rest, update + REQUEST)
    oracle.assert_out_of_step(FIRST)


CHANGING_ELSEWHERE = {
    "trailers": lambda s: headers(s, REQUEST) + data(s, BODY) + headers(s, B2, end_stream=True),
    "malformed trailers": lambda s: headers(s, REQUEST) + data(s, BODY) + headers(s, inserting(b"b", b"2")),
    "a malformed request": lambda s: headers(s, REQUEST + plain(b"Bad", b"") + B2, end_stream=True),
    "a request for nobody": lambda s: headers(s, request_block(b"nowhere") + B2, end_stream=True),
    "a request that is not gRPC": lambda s: headers(s, request_block(method=b"GET") + B2, end_stream=True),
    "a handled call": lambda s: headers(s, request_block(HANDLED) + B2, end_stream=True),
    "continuations": lambda s: (
        headers(s, REQUEST + B2[:2], end_headers=False, end_stream=True)
        + continuation(s, B2[2:4])
        + continuation(s, B2[4:], end_headers=True)
    ),
    "a padded request": lambda s: headers(s, REQUEST + B2, pad=30, end_stream=True),
    "a request that depends on itself": lambda s: headers(s, REQUEST + B2, depends=s, end_stream=True),
    "a stream that we reset": lambda s: headers(s, REQUEST) + window_update(s, 0) + headers(s, B2, end_stream=True),
    "a list that is too large": lambda s: headers(
        s, REQUEST + inserting(b"b", b"2") + plain(b"a", b"") * 101, end_stream=True
    ),
}


@pytest.mark.requirement("D2", "A27")
@three_ways
@pytest.mark.parametrize("name", CHANGING_ELSEWHERE)
def test_a_change_of_the_table_by_any_block_empties_the_memo(feed: Feed, name: str):
    oracle = Oracle(feed)
    for atoms in (A1, FIRST, FIRST):
        oracle.call(atoms)
    oracle.stream += 2
    oracle.send(CHANGING_ELSEWHERE[name](oracle.stream))
    oracle.decoder.decode(B2)
    oracle.call(FIRST)
    oracle.call(indexed(63))


@pytest.mark.requirement("D2", "A14")
@three_ways
def test_a_change_of_the_table_by_a_refused_stream_empties_the_memo(feed: Feed):
    oracle = Oracle(feed, Limits(max_concurrent_streams=1))
    for atoms in (A1, FIRST, FIRST):
        oracle.call(atoms)
    held = oracle.stream + 2
    oracle.send(headers(held, request_block(HANDLED)))
    oracle.send(headers(held + 2, REQUEST + B2))
    assert oracle.peer.result(held + 2).reset == REFUSED_STREAM
    oracle.send(rst_stream(held))
    oracle.stream = held + 2
    oracle.decoder.decode(B2)
    oracle.call(FIRST)


# --- the same block in other frames ------------------------------------------------------------------------------


@pytest.mark.requirement("D3")
@three_ways
def test_padding_priority_and_continuations_are_not_part_of_the_key(feed: Feed):
    oracle = Oracle(feed)
    oracle.call(A1)
    octets = REQUEST + FIRST
    for _ in range(2):
        for clothes in (
            lambda s: headers(s, octets),
            lambda s: headers(s, octets, pad=17),
            lambda s: headers(s, octets, depends=0),
            lambda s: headers(s, octets, depends=3, pad=0),
            lambda s: headers(s, octets[:5], end_headers=False) + continuation(s, octets[5:], end_headers=True),
            lambda s: headers(s, b"", end_headers=False) + continuation(s, octets, end_headers=True),
        ):
            oracle.stream += 2
            oracle.send(clothes(oracle.stream) + data(oracle.stream, BODY, end_stream=True))
            oracle.judge("a=1*1")


@pytest.mark.requirement("D3", "A27")
@three_ways
@pytest.mark.parametrize("authorization", [b"Bearer wrong", None], ids=["wrong key", "no key"])
def test_fields_of_a_remembered_block_in_continuations_do_not_reach_the_next_request(
    feed: Feed, authorization: bytes | None
):
    known, other = request_block(GUARDED), request_block(GUARDED, authorization=authorization)
    peer = Peer(feed).send(headers(1, known) + data(1, BODY, end_stream=True))
    peer.send(
        headers(3, known[:9], end_headers=False),
        continuation(3, known[9:], end_headers=True),
        data(3, BODY, end_stream=True),
    )
    peer.send(headers(5, other), data(5, BODY, end_stream=True))
    peer.send(headers(7, request_block(HANDLED)), data(7, BODY, end_stream=True))
    assert [peer.result(stream).status for stream in (1, 3, 5)] == [0, 0, 16]
    assert peer.calls[7].request.path == HANDLED.decode()


@pytest.mark.requirement("D3")
def test_a_remembered_request_block_as_trailers_is_a_stream_error():
    oracle = Oracle(whole)  # a refused call does not wait for trailers
    oracle.call(b"")
    oracle.call(b"")
    oracle.stream += 2
    oracle.send(
        headers(oracle.stream, REQUEST) + data(oracle.stream, BODY) + headers(oracle.stream, REQUEST, end_stream=True)
    )
    oracle.peer.assert_reset(oracle.stream, PROTOCOL_ERROR)


@pytest.mark.requirement("D3")
@three_ways
def test_remembered_trailers_as_a_request_are_a_stream_error(feed: Feed):
    oracle = Oracle(feed)
    for _ in range(2):
        oracle.stream += 2
        oracle.send(
            headers(oracle.stream, REQUEST)
            + data(oracle.stream, BODY)
            + headers(oracle.stream, plain(b"q", b"1"), end_stream=True)
        )
        oracle.judge("")
    oracle.stream += 2
    oracle.send(headers(oracle.stream, plain(b"q", b"1"), end_stream=True))
    oracle.peer.assert_reset(oracle.stream, PROTOCOL_ERROR)


@pytest.mark.requirement("D1", "D4")
@three_ways
@pytest.mark.parametrize(
    "octets",
    [
        request_block(STATIC) + plain(b"Bad", b""),
        request_block(b""),
        request_block(STATIC, (b"a-bin", b"*")),
        request_block(STATIC, grpc_timeout=b"soon"),
        request_block(STATIC, grpc_timeout=b"0S"),
        request_block(STATIC, content_type=b"text/plain"),
        request_block(b"t.S/Get"),
    ],
)
def test_a_request_that_failed_fails_in_the_same_way_when_it_is_repeated(feed: Feed, octets: bytes):
    peer = Peer(feed)
    for stream in (1, 3, 5):
        peer.send(headers(stream, octets), data(stream, BODY, end_stream=True))
    seen = [(r.status, r.http_status, r.reset, bytes(r.body)) for r in map(peer.result, (1, 3, 5))]
    assert seen[0] == seen[1] == seen[2]
    assert seen[0][0] != 0
    peer.assert_alive()


@pytest.mark.requirement("D4")
@three_ways
def test_content_length_and_stream_state_are_checked_for_each_call(feed: Feed):
    octets = request_block(STATIC, content_length=b"10")
    peer = Peer(feed)
    for stream, body in ((1, BODY), (3, BODY[:-1]), (5, BODY), (7, BODY + b"x"), (9, BODY)):
        peer.send(headers(stream, octets), data(stream, body, end_stream=True))
    assert [peer.result(stream).reset for stream in (1, 3, 5, 7, 9)] == [None, 1, None, 1, None]
    peer.send(headers(11, octets, depends=11))
    assert peer.result(11).reset == PROTOCOL_ERROR
    peer.send(headers(9, octets))
    assert peer.result(9).reset is not None or peer.code is not None


@pytest.mark.requirement("D4")
@three_ways
def test_each_handled_call_has_its_own_timeout(feed: Feed):
    peer = Peer(feed)
    for stream in (1, 3):
        peer.send(headers(stream, request_block(HANDLED, grpc_timeout=b"5S")))
    peer.send(headers(5, request_block(HANDLED)), headers(7, request_block(HANDLED, grpc_timeout=b"7S")))
    assert [peer.calls[stream].request.timeout for stream in (1, 3, 5, 7)] == [5.0, 5.0, None, 7.0]


@pytest.mark.requirement("D4", "A47")
@three_ways
def test_a_drained_connection_does_not_answer_a_remembered_block(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)))
    for stream in (3, 5):
        peer.send(headers(stream, request_block()), data(stream, BODY, end_stream=True))
        peer.assert_answered(stream)
    peer.connection.drain(peer.now)
    peer.read()
    peer.advance(30)
    peer.send(headers(7, request_block()), data(7, BODY, end_stream=True))
    assert peer.result(7).headers is None


# --- bounds --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("D5")
@three_ways
def test_a_full_memo_gives_the_right_answers(feed: Feed):
    oracle = Oracle(feed)
    for _ in range(2):
        for number in range(150):
            oracle.call(plain(b"n", b"%d" % number))
            oracle.call(plain(b"n", b"%d" % (number // 2)))


@pytest.mark.requirement("D5")
@three_ways
@pytest.mark.parametrize("size", [100, 400, 513, 1024, 3000])
def test_blocks_of_every_size_get_the_right_answers(feed: Feed, size: int):
    oracle = Oracle(feed)
    for atoms in (A1, FIRST + plain(b"n", b"v" * size), B2, FIRST + plain(b"n", b"v" * size)):
        oracle.call(atoms)
        oracle.call(atoms)


@pytest.mark.interpreted
@pytest.mark.requirement("D1")
def test_a_repeated_block_is_decoded_once(monkeypatch: pytest.MonkeyPatch):
    decoded: list[bytes] = []
    original = engine_hpack.Decoder.decode_some

    def decode_some(self: engine_hpack.Decoder, octets: bytes, most: int) -> tuple[tuple[bytes, bytes], ...] | None:
        decoded.append(octets)
        return original(self, octets, most)

    monkeypatch.setattr(engine_hpack.Decoder, "decode_some", decode_some)
    oracle = Oracle()
    oracle.call(A1)
    for _ in range(100):
        oracle.call(FIRST)
    assert decoded.count(REQUEST + FIRST) == 1


@three_ways
def test_a_known_block_in_two_frames_leaves_nothing_behind_for_the_next_block(feed: Feed):
    peer = Peer(feed).send(call(1), call(3))
    known = request_block(STATIC)
    peer.send(headers(5, known[:9], end_headers=False), continuation(5, known[9:], end_headers=True))
    peer.send(data(5, grpc_message(b"world"), end_stream=True))
    peer.send(call(7, REFUSING), call(9, HANDLED))
    peer.assert_answered(5)
    peer.assert_answered_with(7, 5)
    assert 9 in peer.calls


# --- authorisation ----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("D4")
@three_ways
def test_rotated_keys_apply_to_the_next_call_on_open_connections(feed: Feed):
    keys = Keys("Bearer k1")
    router = some_router(keys)
    peers = [Peer(feed, router=router), Peer(feed, router=router)]
    octets = request_block(GUARDED)

    def status(stream: int) -> set[int | None]:
        for peer in peers:
            peer.send(headers(stream, octets), data(stream, BODY, end_stream=True))
        return {peer.result(stream).status for peer in peers}

    assert status(1) == status(3) == {0}
    keys.valid = {"Bearer k2"}
    router.forget_authorizations()
    assert status(5) == status(7) == {16}
    keys.valid = {"Bearer k1"}
    router.forget_authorizations()
    assert status(9) == status(11) == {0}


@pytest.mark.requirement("D4")
def test_remembered_answers_are_dropped_when_the_data_changes():
    current = [b"old"]
    router = Router()
    method = router.add_static_unary("/t.S/Get", lambda message: StaticAnswer.unary(current[0]))
    peer = Peer(router=router)
    for stream in (1, 3):
        peer.send(headers(stream, request_block()), data(stream, BODY, end_stream=True))
        peer.assert_answered(stream, b"old")
    current[0] = b"new"
    method.forget()
    peer.send(headers(5, request_block()), data(5, BODY, end_stream=True))
    peer.assert_answered(5, b"new")


@pytest.mark.requirement("D3", "D4")
def test_requests_with_different_metadata_do_not_share_a_route():
    peer = Peer()
    for stream, key in ((1, b"Bearer k1"), (3, b"Bearer k2"), (5, b"Bearer k1"), (7, b"bearer k1"), (9, b"Bearer k2")):
        peer.send(headers(stream, request_block(GUARDED, authorization=key)), data(stream, BODY, end_stream=True))
    assert [peer.result(stream).status for stream in (1, 3, 5, 7, 9)] == [0, 16, 0, 16, 16]


@pytest.mark.interpreted
@pytest.mark.requirement("D1")
@pytest.mark.parametrize(("length", "routed"), [(384, 1), (385, 2)], ids=["short", "long"])
def test_a_block_of_384_octets_is_remembered_and_a_longer_one_is_not(
    length: int, routed: int, monkeypatch: pytest.MonkeyPatch
):
    lengths: list[int] = []
    route = Router.route

    def noted(router: Router, fields: tuple[tuple[bytes, bytes], ...], size: int):
        lengths.append(size)
        return route(router, fields, size)

    monkeypatch.setattr(Router, "route", noted)
    peer = Peer()
    block = request_block(STATIC) + plain(b"first", b"v" * 100)
    block += plain(b"last", b"v" * (length - len(block) - len(plain(b"last", b""))))
    assert len(block) == length
    for stream in (1, 3):
        peer.send(headers(stream, block), data(stream, BODY, end_stream=True))
        assert peer.result(stream).status == 0
    assert len(lengths) == routed


def test_only_a_call_that_its_static_method_refuses_is_reported():
    peer = Peer()
    for stream, path in ((1, GUARDED), (3, HANDLED)):
        peer.send(headers(stream, request_block(path, authorization=b"x")), data(stream, BODY, end_stream=True))
        assert not peer.connection.authorized
    peer.send(headers(5, request_block(REFUSING)), data(5, BODY, end_stream=True))
    assert peer.connection.authorized
    assert peer.connection.reports == [("unauthorized", GUARDED.decode())]
