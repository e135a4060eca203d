"""Flow control in both directions, and the client's header table (RFC 9113 sections 4.3.1 and 6.9)."""

from __future__ import annotations

import random

import pytest
from tests.support.h2_peer import ANSWER, GUARDED, HANDLED, REFUSING, Peer, handled
from tests.support.h2_wire import (
    DATA,
    FLOW_CONTROL_ERROR,
    HEADER_TABLE_SIZE,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    LARGEST_WINDOW,
    MAX_FRAME_SIZE,
    PROTOCOL_ERROR,
    WINDOW_UPDATE,
    Feed,
    call,
    data,
    grpc_message,
    headers,
    plain,
    request_block,
    rst_stream,
    settings,
    three_ways,
    window_update,
)

from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream

# --- the client's HPACK table --------------------------------------------------------------------------------


@pytest.mark.requirement("A18")
@three_ways
@pytest.mark.parametrize("size", [0, 100, 4095])
def test_the_first_block_after_a_smaller_table_starts_with_a_size_update(feed: Feed, size: int):
    peer = Peer(feed).send(settings((HEADER_TABLE_SIZE, size)), call(1), call(3), handled(5))
    peer.answer(5, b"x")
    blocks = [got.payload for got in peer.replies.frames if got.kind == HEADERS]
    assert len(blocks) == 6
    assert blocks[0][0] & 0xE0 == 0x20
    assert [block[0] & 0xE0 == 0x20 for block in blocks[1:]] == [False] * 5
    peer.assert_answered(1)
    peer.assert_answered(3)
    peer.assert_answered(5, b"x")


@pytest.mark.requirement("A18")
@three_ways
def test_trailers_that_were_queued_before_a_smaller_table_start_with_a_size_update(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 0)), handled(1))
    peer.answer(1, b"x")
    peer.send(settings((HEADER_TABLE_SIZE, 0)), window_update(1, 100))
    peer.assert_answered(1, b"x")
    trailers = [got.payload for got in peer.replies.frames if got.kind == HEADERS][-1]
    assert trailers[0] == 0x20


@pytest.mark.requirement("A18")
@three_ways
def test_a_table_that_shrinks_and_grows_in_one_frame_is_signalled(feed: Feed):
    # RFC 7541 section 4.2: the smallest size in between must be signalled.
    peer = Peer(feed).send(settings((HEADER_TABLE_SIZE, 0), (HEADER_TABLE_SIZE, 4096)), call(1))
    assert next(got.payload for got in peer.replies.frames if got.kind == HEADERS)[0] == 0x20
    peer.assert_answered(1)


@pytest.mark.requirement("A18")
@three_ways
def test_a_larger_table_needs_no_size_update(feed: Feed):
    peer = Peer(feed).send(settings((HEADER_TABLE_SIZE, 2**32 - 1)), call(1))
    peer.assert_answered(1)


# --- sending within windows ----------------------------------------------------------------------------------


@pytest.mark.requirement("A19")
@three_ways
def test_a_new_initial_window_shifts_every_stream_even_below_zero(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 10)), handled(1), handled(3))
    peer.answer(1, b"a" * 20)
    peer.answer(3, b"b" * 20)
    assert len(peer.result(1).body) == len(peer.result(3).body) == 10
    peer.send(settings((INITIAL_WINDOW_SIZE, 4)), window_update(1, 6))
    assert len(peer.result(1).body) == 10, "the window is at zero, not above"
    peer.send(window_update(1, 1))
    assert (len(peer.result(1).body), len(peer.result(3).body)) == (11, 10)
    peer.send(settings((INITIAL_WINDOW_SIZE, 65535)))
    peer.assert_answered(1, b"a" * 20)
    peer.assert_answered(3, b"b" * 20)


@pytest.mark.requirement("A19")
@pytest.mark.interpreted
@pytest.mark.parametrize("frame", [16_384, 20_000, 65_536, 1 << 20])
@pytest.mark.parametrize("seed", range(6))
def test_frames_that_are_cut_at_once_equal_those_that_are_cut_one_by_one(
    frame: int, seed: int, monkeypatch: pytest.MonkeyPatch
):
    taken: list[int] = []
    at_once = Stream.whole_frames

    def counted(stream: Stream, octets: int, most: int) -> list[memoryview]:
        taken.append(len(found := at_once(stream, octets, most)))
        return found

    monkeypatch.setattr(Stream, "whole_frames", counted)
    quick = _replies_to_large_answers(random.Random(seed), frame)
    assert frame >= 65_536 or sum(taken) > 5, "the test covers frames that are cut at once"
    monkeypatch.setattr(Stream, "whole_frames", lambda *_: [])
    assert quick == _replies_to_large_answers(random.Random(seed), frame)


def _replies_to_large_answers(chance: random.Random, frame: int) -> list[object]:
    """The frames of three answers of up to 400 kB, within windows that open at random."""
    window = chance.choice([65_536, 100_000, 1 << 20])
    peer = Peer().send(settings((INITIAL_WINDOW_SIZE, window), (MAX_FRAME_SIZE, frame)), window_update(0, 1 << 20))
    bodies = {stream: chance.randbytes(chance.randint(1, 400_000)) for stream in (1, 3)} | {5: bytes(16_384 * 8 - 5)}
    for stream, body in bodies.items():
        peer.send(handled(stream)).answer(stream, chance.choice([bytes, memoryview])(body))
    for _ in range(60):
        peer.send(window_update(chance.choice([0, 0, 1, 3, 5]), chance.choice([1, 16_384, 50_000, 200_000])))
    peer.send(settings((INITIAL_WINDOW_SIZE, 1 << 22)), window_update(0, 1 << 22))
    for stream, body in bodies.items():
        peer.assert_answered(stream, body)
    return list(peer.replies.frames)


@pytest.mark.requirement("A19")
@three_ways
def test_a_new_initial_window_does_not_change_the_connection_window(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 1_000_000)), handled(1))
    peer.answer(1, bytes(200_000))
    assert len(peer.result(1).body) == 65535
    peer.send(window_update(0, 200_000))
    peer.assert_answered(1, bytes(200_000))


@pytest.mark.requirement("A19")
@three_ways
def test_an_initial_window_that_shifts_a_stream_past_the_largest_window_is_a_connection_error(feed: Feed):
    peer = Peer(feed).send(handled(1), window_update(1, LARGEST_WINDOW - 65535))
    peer.send(settings((INITIAL_WINDOW_SIZE, 65536)))
    peer.assert_closed(FLOW_CONTROL_ERROR)


@pytest.mark.requirement("A20")
@three_ways
def test_data_stays_within_the_windows_of_stream_and_connection(feed: Feed):
    peer = Peer(feed).send(handled(1), handled(3))
    peer.answer(1, bytes(100_000))
    peer.answer(3, b"small")
    peer.send(*(window_update(0, 1) for _ in range(5)), window_update(0, 200_000))
    assert len(peer.result(1).body) == 65535
    peer.assert_answered(3, b"small")
    peer.send(window_update(1, 100_000))
    peer.assert_answered(1, bytes(100_000))


@pytest.mark.requirement("A20")
@three_ways
def test_a_larger_frame_is_sent_only_once_the_client_allows_it(feed: Feed):
    limits = settings((MAX_FRAME_SIZE, 2**24 - 1), (INITIAL_WINDOW_SIZE, 2**20))
    peer = Peer(feed).send(handled(1), window_update(0, 2**24))
    peer.answer(1, bytes(40_000))
    assert max(len(got.payload) for got in peer.replies.frames if got.kind == DATA) == 16384
    peer.send(limits, handled(3))
    peer.answer(3, bytes(100_000))
    peer.assert_answered(3, bytes(100_000))


@pytest.mark.requirement("A20")
@three_ways
def test_a_status_without_messages_needs_no_window(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 0)), call(1, REFUSING), handled(3))
    peer.answer(3, status=9)
    assert (peer.result(1).status, peer.result(3).status) == (5, 9)


@pytest.mark.requirement("A20", "B-dribble")
@three_ways
def test_trailers_wait_for_data_that_the_window_holds_back(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 0)), call(1))
    assert peer.result(1).status is None
    for octet in range(len(grpc_message(ANSWER)) - 1):
        peer.send(window_update(1, 1))
        assert len(peer.result(1).body) == octet + 1
        assert not peer.result(1).ended
    peer.send(window_update(1, 1))
    peer.assert_answered(1)


@pytest.mark.requirement("A20")
@three_ways
def test_an_exhausted_connection_window_holds_back_all_streams(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, LARGEST_WINDOW)), handled(1))
    peer.answer(1, bytes(65530))
    peer.assert_answered(1, bytes(65530))
    peer.send(call(3), call(5, REFUSING))
    assert peer.result(3).status is None
    peer.assert_answered_with(5, 5)
    peer.send(window_update(0, 1000))
    peer.assert_answered(3)


@pytest.mark.requirement("A20")
@three_ways
def test_a_large_static_answer_stays_within_the_windows(feed: Feed):
    large = bytes(range(256)) * 400
    peer = Peer(feed).send(window_update(0, 10**6))
    # The request of 102,405 octets is sent in frames of the largest size; the static method returns its message.
    body = grpc_message(large)
    parts = [body[at : at + 16384] for at in range(0, len(body), 16384)]
    peer.send(headers(1, request_block()), *(data(1, part) for part in parts), data(1, end_stream=True))
    assert len(peer.result(1).body) == 65535
    peer.send(window_update(1, 65535))
    peer.assert_answered(1, large)


# --- WINDOW_UPDATE -------------------------------------------------------------------------------------------


@pytest.mark.requirement("A21", "B-made-you-reset")
@three_ways
@pytest.mark.parametrize(
    ("increments", "code"), [([0], PROTOCOL_ERROR), ([LARGEST_WINDOW], FLOW_CONTROL_ERROR), ([5, 0], PROTOCOL_ERROR)]
)
def test_a_wrong_window_increment_is_a_stream_error(feed: Feed, increments: list[int], code: int):
    peer = Peer(feed).send(handled(1, end_stream=False), *(window_update(1, increment) for increment in increments))
    peer.assert_reset(1, code)
    assert peer.cancelled == {1: code}


@pytest.mark.requirement("A21")
@three_ways
@pytest.mark.parametrize(("over", "code"), [(0, None), (1, FLOW_CONTROL_ERROR)], ids=["largest", "larger"])
def test_the_window_of_a_call_that_waits_for_its_data_is_checked_when_it_grows(feed: Feed, over: int, code: int | None):
    peer = Peer(feed).send(headers(1, request_block()), window_update(1, LARGEST_WINDOW - 65535 + over))
    if code is not None:
        peer.assert_reset(1, code)
    else:
        peer.send(data(1, grpc_message(b"world"), end_stream=True)).assert_answered(1)


@pytest.mark.requirement("A21")
@three_ways
@pytest.mark.parametrize(("increments", "code"), [([0], PROTOCOL_ERROR), ([2**30, 2**30], FLOW_CONTROL_ERROR)])
def test_a_wrong_window_increment_of_the_connection_is_a_connection_error(feed: Feed, increments: list[int], code: int):
    peer = Peer(feed).send(*(window_update(0, increment) for increment in increments))
    peer.assert_closed(code)


@pytest.mark.requirement("A21")
@three_ways
def test_the_largest_window_is_legal(feed: Feed):
    peer = Peer(feed).send(
        window_update(0, LARGEST_WINDOW - 65535), handled(1), window_update(1, LARGEST_WINDOW - 65535)
    )
    peer.answer(1, b"x")
    peer.assert_answered(1, b"x")


# --- receiving within windows --------------------------------------------------------------------------------


def credit(peer: Peer, stream: int) -> int:
    """Octets that the server has allowed since the beginning on a stream, or on the connection if ``stream`` is 0."""
    initial = 65535 if not stream else peer.replies.settings.get(INITIAL_WINDOW_SIZE, 65535)
    given = (got for got in peer.replies.frames if got.kind == WINDOW_UPDATE and got.stream == stream)
    return initial + sum(got.words[0] for got in given)


BODY = grpc_message(bytes(16_000))
PIECES = {
    "static": (request_block(), [data(1, BODY, pad=100, end_stream=True)]),
    "refused key": (request_block(GUARDED, authorization=b"wrong"), [data(1, BODY, pad=255, end_stream=True)]),
    "handled": (request_block(HANDLED), [data(1, BODY), data(1, b"", pad=255), data(1, end_stream=True)]),
    "not gRPC": (request_block(method=b"GET"), [data(1, BODY, pad=9, end_stream=True)]),
    "malformed": (request_block() + plain(b"Upper", b""), [data(1, BODY), data(1, BODY, end_stream=True)]),
    "reset by us": (
        request_block(HANDLED),
        [window_update(1, 0), data(1, BODY, pad=1), data(1, BODY, end_stream=True)],
    ),
    "reset by the client": (request_block(HANDLED), [data(1, BODY), rst_stream(1)]),
    "cut": (request_block(), [data(1, BODY[:-1], end_stream=True)]),
    "too long": (request_block(content_length=b"5"), [data(1, BODY), data(1, BODY, end_stream=True)]),
    "answered early": (request_block(HANDLED), ["answer", data(1, BODY), data(1, BODY, end_stream=True)]),
}


@pytest.mark.requirement("A22", "A6", "A13")
@pytest.mark.parametrize("name", PIECES)
def test_all_data_uses_the_connection_window_and_is_given_back(name: str):
    peer = Peer(limits=Limits(glitches=100_000)).send(window_update(0, 2**28))
    block, frames = PIECES[name]
    used = 0
    for stream in range(1, 400, 2):
        peer.send(headers(stream, block))
        for piece in frames:
            if piece == "answer":
                peer.answer(stream, status=9)
                continue
            moved = piece[:5] + stream.to_bytes(4, "big") + piece[9:]
            if piece[3] == DATA:
                used += len(piece) - 9
                assert used <= credit(peer, 0), f"a leak: the window is exhausted after {stream // 2} calls"
            peer.send(moved)
        if stream in peer.calls and stream not in peer.cancelled and "answer" not in frames:
            peer.answer(stream, status=9)
    peer.assert_alive()


@pytest.mark.requirement("A22")
def test_data_beyond_our_window_is_a_flow_control_error():
    peer = Peer(consumes=False).send(handled(1, end_stream=False))
    body = grpc_message(bytes(1000)) * 16
    for _ in range(4096):
        left = credit(peer, 1) - sum(len(message) + 5 for message in peer.received.get(1, ()))
        peer.send(data(1, body))
        if left < len(body):
            break
    assert FLOW_CONTROL_ERROR in (peer.code, peer.result(1).reset)


@pytest.mark.requirement("A22")
def test_octets_that_a_handler_takes_are_given_back():
    peer = Peer().send(handled(1, end_stream=False))
    spent = 0
    for _ in range(300):
        spent += len(BODY)
        assert spent <= min(credit(peer, 0), credit(peer, 1))
        peer.send(data(1, BODY))
    assert len(peer.received[1]) == 300


@pytest.mark.requirement("A22")
def test_a_message_larger_than_the_window_arrives_whole():
    peer = Peer().send(handled(1, end_stream=False))
    body = grpc_message(bytes(4 * 1024 * 1024))
    for at in range(0, len(body), 16384):
        part = body[at : at + 16384]
        assert at + len(part) <= min(credit(peer, 0), credit(peer, 1)), f"no window for the rest after {at} octets"
        peer.send(data(1, part))
    assert [len(message) for message in peer.received[1]] == [4 * 1024 * 1024]
    peer.assert_alive()
