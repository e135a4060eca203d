"""Deadlines for the progress of calls: incomplete requests, and answers that are not read."""

from __future__ import annotations

from math import inf

import pytest
from tests.support.h2_peer import GUARDED, HANDLED, STATIC, Keys, Peer, some_router
from tests.support.h2_wire import (
    INITIAL_WINDOW_SIZE,
    Feed,
    continuation,
    data,
    grpc_message,
    headers,
    request_block,
    rst_stream,
    settings,
    three_ways,
    window_update,
)

from grpc_h2 import AnswerCutOff, Limits, Router, StaticAnswer

BODY = grpc_message(b"world")
QUIET = Limits(keepalive_time=inf)
BODY_TIMEOUT = 10.0
WRONG = request_block(GUARDED, authorization=b"Bearer wrong")


def authorized(path: bytes = GUARDED, **fields: bytes) -> bytes:
    return request_block(path, authorization=b"Bearer k1", **fields)


def expecting_one(peer: Peer, stream: int) -> None:
    peer.connection.expect_one_message(peer.calls[stream])


# --- incomplete requests ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("B-slow-body")
@three_ways
@pytest.mark.parametrize("begun", [b"", BODY[:3], BODY[:-1]], ids=["no octet", "half a prefix", "all but one octet"])
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_a_unary_request_that_is_incomplete_after_its_time_ends_with_deadline_exceeded(
    feed: Feed, begun: bytes, path: bytes
):
    peer = Peer(feed, limits=QUIET).send(headers(1, request_block(path)))
    if path == HANDLED:
        expecting_one(peer, 1)
    if begun:
        peer.send(data(1, begun))
    peer.advance(BODY_TIMEOUT * 0.9)
    assert not peer.result(1).ended if 1 in peer.replies.streams else True
    peer.advance(BODY_TIMEOUT * 0.5)
    peer.assert_status(1, 4)
    assert peer.result(1).reset == 0, "the client is asked to stop sending"
    assert (1 in peer.cancelled) == (path == HANDLED)


@pytest.mark.requirement("B-slow-body")
def test_a_request_of_many_messages_may_take_the_whole_time_of_its_deadline():
    peer = Peer(limits=QUIET).send(headers(1, request_block(HANDLED)))
    peer.advance(10 * BODY_TIMEOUT)
    peer.send(data(1, BODY, end_stream=True))
    assert peer.received[1] == [b"world"]


@pytest.mark.requirement("B-slow-body")
def test_many_unfinished_requests_are_ended_a_few_at_a_time():
    peer = Peer(limits=QUIET)
    ids = range(1, 400, 2)
    peer.send(*(headers(stream, request_block()) for stream in ids))
    peer.now += 2 * BODY_TIMEOUT
    peer.connection.tick(peer.now)  # the answers up to now belong to the replaced data
    peer.now += 2 * BODY_TIMEOUT
    peer.connection.tick(peer.now)
    peer.read()
    ended = sum(peer.result(stream).ended for stream in ids if stream in peer.replies.streams)
    assert 0 < ended <= 16
    assert peer.connection.next_deadline() <= peer.now, "the other calls are due at once"
    peer.advance(1.0)
    for stream in ids:
        peer.assert_answered_with(stream, 4)


@pytest.mark.requirement("B-slow-body")
@pytest.mark.parametrize("block", [b"first", b"remembered"])
def test_a_stream_without_its_body_does_not_outlive_its_deadline(block: bytes):
    peer = Peer(limits=QUIET)
    if block == b"remembered":
        peer.send(headers(1, request_block(grpc_timeout=b"1S")), data(1, BODY, end_stream=True))
    peer.send(headers(3, request_block(grpc_timeout=b"1S")))
    peer.advance(0.9)
    assert 3 not in peer.replies.streams
    peer.advance(0.2)
    peer.assert_status(3, 4)


@pytest.mark.requirement("B-slow-body")
def test_a_stream_that_has_sent_a_part_of_its_body_does_not_outlive_its_deadline():
    peer = Peer(limits=QUIET).send(headers(1, request_block(grpc_timeout=b"2S")), data(1, BODY[:3]))
    peer.advance(2.1)
    peer.assert_status(1, 4)


@pytest.mark.requirement("B-slow-body", "A51")
@pytest.mark.parametrize("begun", [(), (data(1, BODY[:3]),)], ids=["no body", "a part"])
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_a_stream_without_its_body_does_not_lengthen_a_drain(path: bytes, begun: tuple[bytes, ...]):
    peer = Peer(limits=QUIET).send(headers(1, request_block(path)))
    if path == HANDLED:
        expecting_one(peer, 1)
    peer.send(*begun)
    peer.connection.drain(peer.now)
    peer.read()
    peer.advance(2.5)
    assert peer.connection.terminated
    peer.assert_answered_with(1, 4)


@pytest.mark.requirement("B-slow-body", "A51")
def test_a_stream_begun_without_its_body_during_a_drain_does_not_lengthen_it():
    peer = Peer(limits=QUIET)
    peer.connection.drain(peer.now)
    peer.read()
    peer.advance(0.5)
    peer.send(headers(1, request_block()))
    peer.advance(3.0)
    assert peer.connection.terminated


# --- refusals known at HEADERS ---------------------------------------------------------------------------------------


@pytest.mark.requirement("B-slow-body", "A32")
@three_ways
@pytest.mark.parametrize(
    ("block", "status"),
    [
        (request_block(GUARDED, authorization=None), 16),
        (request_block(GUARDED, authorization=b"Bearer wrong"), 16),
        (request_block(grpc_timeout=b"never"), 13),
        (request_block(grpc_timeout=b"0S"), 4),
        (request_block(x_long=b"v" * 20_000), 8),
    ],
    ids=["no key", "wrong key", "malformed timeout", "expired", "header list too large"],
)
def test_a_refusal_decided_by_the_headers_does_not_wait_for_the_body(feed: Feed, block: bytes, status: int):
    first, rest = block[:16_000], block[16_000:]
    sent = headers(1, first, end_headers=not rest) + (continuation(1, rest, end_headers=True) if rest else b"")
    peer = Peer(feed).send(sent)
    result = peer.result(1)
    assert (result.status, result.ended, result.reset) == (status, True, None)
    assert peer.connection.held < 4096
    peer.advance(1.1)
    assert peer.result(1).reset == 0, "RFC 9113 section 8.1"
    peer.send(data(1, bytes(1000)), data(1, b"", end_stream=True))
    peer.assert_alive()


@pytest.mark.requirement("B-slow-body")
def test_a_refused_call_whose_body_comes_with_its_headers_is_answered_without_a_reset():
    peer = Peer().send(headers(1, WRONG), data(1, BODY, end_stream=True))
    assert (peer.result(1).status, peer.result(1).reset) == (16, None)


@pytest.mark.requirement("B-slow-body")
def test_any_number_of_calls_with_a_wrong_key_and_a_late_body_is_refused():
    peer = Peer()
    for stream in range(1, 6001, 2):
        peer.send(headers(stream, WRONG))
        peer.send(data(stream, BODY, end_stream=True))
        assert peer.code is None
        peer.assert_answered_with(stream, 16)
    peer.assert_alive()


# --- the right to an answer is judged when it is given ---------------------------------------------------------------


@pytest.mark.requirement("D6")
@three_ways
@pytest.mark.parametrize("parts", [(BODY,), (BODY[:3], BODY[3:]), (b"", BODY)], ids=["whole", "cut", "behind nothing"])
@pytest.mark.parametrize("many", [1, 40])
def test_a_call_whose_body_comes_after_a_key_rotation_is_judged_by_the_new_keys(
    feed: Feed, parts: tuple[bytes, ...], many: int
):
    keys = Keys("Bearer k1")
    router = some_router(keys)
    peer = Peer(feed, router=router)
    ids = range(1, 2 * many, 2)
    peer.send(*(headers(stream, authorized()) for stream in ids))
    if len(parts) > 1:
        peer.send(*(data(stream, parts[0]) for stream in ids))
    keys.valid = {"Bearer k2"}
    router.forget_authorizations()
    peer.send(*(data(stream, parts[-1], end_stream=True) for stream in ids))
    for stream in ids:
        peer.assert_answered_with(stream, 16)
        assert not peer.result(stream).body
    peer.assert_alive()


@pytest.mark.requirement("D6")
def test_a_call_whose_key_becomes_valid_before_its_body_comes_is_answered():
    keys = Keys("Bearer k1")
    router = some_router(keys)
    peer = Peer(router=router).send(headers(1, authorized()))
    keys.valid = {"Bearer k1", "Bearer k2"}
    router.forget_authorizations()
    peer.send(data(1, BODY, end_stream=True))
    peer.assert_answered(1)


# --- answers that are not read ---------------------------------------------------------------------------------------


def reading(octets: int, **limits: float) -> tuple[Peer, Router]:
    router = some_router()
    answer = StaticAnswer.unary(memoryview(bytes(octets)))
    router.add_static_unary("/t.S/Large", lambda message: answer)
    numbers = {"min_read_rate": 1000.0, "read_grace": 10.0, "max_read_time": 100.0, **limits}
    return Peer(router=router, limits=Limits(keepalive_time=inf, **numbers)), router


def large_call(stream: int) -> bytes:
    return headers(stream, request_block(b"/t.S/Large")) + data(stream, BODY, end_stream=True)


@pytest.mark.requirement("B-slow-read")
@pytest.mark.parametrize(("octets", "seconds"), [(20_000, 30), (50_000, 60), (1_000_000, 100)])
def test_an_answer_that_is_read_octet_by_octet_is_given_up_after_the_time_for_its_size(octets: int, seconds: float):
    peer, _ = reading(octets)
    peer.send(settings((INITIAL_WINDOW_SIZE, 1)), large_call(1))
    begun = peer.now
    while peer.result(1).reset is None and peer.now < begun + 300:
        peer.advance(5.0)
        if peer.result(1).reset is None:
            peer.send(window_update(1, 1))
    assert seconds <= peer.now - begun <= seconds + 6
    assert peer.result(1).reset == 11
    assert any(isinstance(event, AnswerCutOff) for event in peer.events)
    peer.send(settings((INITIAL_WINDOW_SIZE, 65_535)))
    peer.assert_alive()


@pytest.mark.requirement("B-slow-read")
def test_a_slow_reader_of_one_stream_is_cut_off_while_it_reads_other_streams():
    peer, _ = reading(20_000)
    peer.send(settings((INITIAL_WINDOW_SIZE, 100)), large_call(1))
    for stream in range(3, 83, 2):
        peer.advance(1.0)
        peer.send(headers(stream, request_block()), data(stream, BODY, end_stream=True))
        peer.assert_answered(stream)
    assert peer.result(1).reset == 11


@pytest.mark.requirement("B-slow-read")
def test_an_answer_read_faster_than_the_least_rate_is_read_to_its_end():
    peer, _ = reading(80_000)
    peer.send(settings((INITIAL_WINDOW_SIZE, 1)), large_call(1))
    for _ in range(90):
        peer.advance(1.0)
        if not peer.result(1).ended:
            peer.send(window_update(1, 1200), window_update(0, 1200))
    assert (peer.result(1).status, peer.result(1).reset) == (0, None)


@pytest.mark.requirement("B-slow-read")
def test_a_handler_that_streams_for_hours_to_a_client_that_reads_is_not_cut_off():
    peer, _ = reading(1)
    peer.send(headers(1, request_block(HANDLED)))
    for _ in range(600):
        peer.connection.advance(peer.now)
        peer.connection.send_message(peer.calls[1], bytes(40_000))
        peer.read()
        peer.send(window_update(1, 40_005), window_update(0, 40_005))
        peer.advance(30.0)
    assert peer.result(1).reset is None
    assert not peer.cancelled


@pytest.mark.requirement("B-slow-read")
def test_answers_from_replaced_data_are_given_up_when_the_application_asks_for_it():
    peer, _ = reading(500_000, max_read_time=1000.0)
    peer.send(settings((INITIAL_WINDOW_SIZE, 1)), large_call(1))
    peer.advance(5.0)
    before = peer.now
    peer.advance(1.0)
    peer.send(large_call(3))
    peer.connection.cut_answers(before)
    peer.read()
    assert peer.result(1).reset == 11
    assert peer.result(3).reset is None
    peer.connection.check_invariants()


def test_a_cancelled_answer_leaves_no_deadline():
    peer, _ = reading(500_000)
    peer.send(settings((INITIAL_WINDOW_SIZE, 1)), large_call(1), rst_stream(1))
    peer.advance(200.0)
    peer.send(settings((INITIAL_WINDOW_SIZE, 65_535)))
    peer.assert_alive()
