"""How a connection ends, and every limit in time (RFC 9113 sections 5.4.1 and 6.8; gRPC proposals A8 and A9)."""

from __future__ import annotations

from math import inf

import pytest
from tests.support.h2_peer import ANSWER, Peer, handled
from tests.support.h2_wire import (
    CANCEL,
    ENHANCE_YOUR_CALM,
    GOAWAY,
    HELLO,
    INITIAL_WINDOW_SIZE,
    NO_ERROR,
    PING,
    PREFACE,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    SETTINGS_ACK,
    Feed,
    call,
    continuation,
    data,
    goaway,
    grpc_message,
    headers,
    ping,
    priority,
    request_block,
    rst_stream,
    settings,
    three_ways,
    window_update,
)

from grpc_h2.connection.limits import Limits

LARGEST_ID = 2**31 - 1


def drain_ping(peer: Peer) -> bytes:
    """The payload of the last PING the server sent."""
    return [got.payload for got in peer.replies.frames if got.kind == PING and not got.flags & 1][-1]


# --- header blocks ---


@pytest.mark.requirement("B-slow-client")
def test_a_finished_header_block_has_no_time_limit():
    begun, rest = request_block()[:5], request_block()[5:]
    peer = Peer(limits=Limits(header_timeout=1.0))
    peer.send(headers(1, begun, end_headers=False), continuation(1, rest, end_headers=True)).advance(5.0)
    peer.send(data(1, grpc_message(b"world"), end_stream=True)).assert_answered(1)
    peer.send(headers(3, begun, end_headers=False)).advance(5.0)
    peer.assert_closed(ENHANCE_YOUR_CALM)


# --- drain ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A47")
@three_ways
def test_a_drain_sends_goaway_twice_and_serves_calls_until_the_second(feed: Feed):
    peer = Peer(feed).send(handled(1))
    peer.connection.drain(peer.now)
    peer.read()
    assert [goodbye[:2] for goodbye in peer.replies.goaways] == [(LARGEST_ID, NO_ERROR)]
    peer.send(handled(3))
    assert 3 in peer.calls, "until the second GOAWAY, calls are taken"
    peer.send(ping(drain_ping(peer), ack=True))
    assert [goodbye[:2] for goodbye in peer.replies.goaways] == [(LARGEST_ID, NO_ERROR), (3, NO_ERROR)]
    peer.send(handled(5), data(5, b"ignored"), rst_stream(5))
    assert 5 not in peer.calls
    assert peer.result(5).headers is None
    peer.answer(1, b"x")
    assert not peer.connection.terminated
    peer.answer(3, b"y")
    peer.send(b"")
    peer.assert_answered(1, b"x")
    peer.assert_answered(3, b"y")
    assert peer.connection.terminated
    assert [goodbye[0] for goodbye in peer.replies.goaways][-1] == 3


@pytest.mark.requirement("A47")
def test_without_a_ping_ack_the_second_goaway_comes_after_the_timeout():
    peer = Peer().send(handled(1))
    peer.connection.drain(peer.now)
    peer.read()
    peer.advance(Limits().drain_timeout - 0.01)
    assert len(peer.replies.goaways) == 1
    peer.advance(0.02)
    assert peer.replies.goaways[-1][:2] == (1, NO_ERROR)
    peer.answer(1, status=5)
    peer.advance(0)
    assert peer.connection.terminated


@pytest.mark.requirement("A47")
def test_a_drained_connection_without_streams_closes():
    peer = Peer().send(call(1))
    peer.connection.drain(peer.now)
    peer.read()
    peer.send(ping(drain_ping(peer), ack=True))
    assert peer.connection.terminated
    assert peer.closing is not None
    assert peer.closing.code == NO_ERROR
    assert peer.replies.goaways[-1][:2] == (1, NO_ERROR)


@pytest.mark.requirement("A47")
def test_static_calls_are_answered_until_the_second_goaway():
    peer = Peer().send(handled(1))
    peer.connection.drain(peer.now)
    peer.read()
    peer.send(call(3))
    peer.assert_answered(3)
    peer.send(ping(drain_ping(peer), ack=True), call(5))
    assert peer.result(5).status is None
    assert peer.result(5).reset in (None, REFUSED_STREAM)
    assert peer.replies.goaways[-1][0] == 3


@pytest.mark.requirement("A47")
def test_a_drained_connection_closes_when_its_last_stream_is_refused_before_its_data():
    peer = Peer().send(call(1), headers(3, request_block()), ping())
    peer.connection.drain(peer.now)
    peer.read()
    peer.send(ping(drain_ping(peer), ack=True))
    assert not peer.connection.terminated
    peer.send(priority(3, depends=3))
    assert peer.result(3).reset == PROTOCOL_ERROR
    assert peer.connection.terminated
    assert peer.closing is not None
    assert peer.closing.code == NO_ERROR


def test_after_the_last_goaway_a_handler_s_cancellation_sends_nothing():
    peer = Peer().send(settings((INITIAL_WINDOW_SIZE, 0)), handled(1))
    peer.answer(1, ANSWER)
    peer.connection.close(NO_ERROR, "")
    peer.read()
    peer.connection.cancel(peer.calls[1])
    assert peer.connection.data_to_send() == []
    peer.connection.check_invariants()


def test_a_connection_stays_open_without_a_drain_when_its_last_stream_is_refused_before_its_data():
    peer = Peer().send(call(1), headers(3, request_block()), ping())
    peer.send(priority(3, depends=3))
    peer.assert_reset(3, PROTOCOL_ERROR)


@pytest.mark.requirement("A47")
@pytest.mark.parametrize("opening", [b"", PREFACE[:9], PREFACE])
def test_a_drain_before_the_preface_closes_at_once(opening: bytes):
    peer = Peer(hello=None).send(opening)
    peer.connection.drain(peer.now)
    peer.advance(0)
    assert peer.connection.terminated
    assert peer.code == NO_ERROR


@pytest.mark.requirement("A47")
def test_a_second_drain_changes_nothing():
    peer = Peer().send(handled(1))
    peer.connection.drain(peer.now)
    peer.connection.drain(peer.now)
    peer.read()
    peer.send(ping(drain_ping(peer), ack=True))
    peer.connection.drain(peer.now)
    peer.read()
    assert len(peer.replies.goaways) == 2


@pytest.mark.requirement("A47")
def test_a_ping_ack_with_another_payload_does_not_advance_the_drain():
    peer = Peer().send(handled(1))
    peer.connection.drain(peer.now)
    peer.read()
    peer.send(ping(b"mistaken", ack=True))
    assert len(peer.replies.goaways) == 1


# --- age, idleness, keepalive --------------------------------------------------------------------------------


@pytest.mark.requirement("A48")
def test_by_default_no_limit_ends_an_idle_connection():
    assert (Limits().max_connection_age, Limits().max_connection_idle, Limits().age_grace) == (inf, inf, inf)
    peer = Peer()
    peer.advance(7000)
    peer.assert_alive()


@pytest.mark.requirement("A48")
def test_an_old_connection_is_drained_within_the_jitter_of_its_age():
    ages = set()
    for tenths in range(-10, 11, 5):
        peer = Peer(limits=Limits(max_connection_age=100.0, age_grace=50.0), jitter=tenths / 10)
        start = peer.now
        peer.send(handled(1))
        while not peer.replies.goaways:
            peer.advance(0.5)
            assert peer.now - start <= 111
        ages.add(peer.now - start)
        assert peer.now - start >= 89.5
        assert peer.replies.goaways[0][0] == LARGEST_ID
    assert len(ages) == 5, "all at the same moment"


@pytest.mark.requirement("A48")
def test_calls_of_an_old_connection_are_cancelled_after_the_grace():
    peer = Peer(limits=Limits(max_connection_age=100.0, age_grace=50.0)).send(handled(1))
    peer.advance(115)
    assert not peer.connection.terminated
    peer.advance(60)
    assert peer.connection.terminated
    assert 1 in peer.cancelled
    assert peer.closing is not None


@pytest.mark.requirement("A48", "B-slow-client")
def test_an_idle_connection_is_drained_after_the_idle_limit():
    peer = Peer(limits=Limits(max_connection_idle=30.0)).send(call(1))
    peer.advance(29)
    assert not peer.replies.goaways
    peer.send(call(3))
    peer.advance(29)
    assert not peer.replies.goaways
    peer.advance(2)
    assert peer.code == NO_ERROR
    peer.advance(10)
    assert peer.connection.terminated


@pytest.mark.requirement("A48")
def test_a_connection_with_an_open_call_is_not_idle():
    peer = Peer(limits=Limits(max_connection_idle=30.0)).send(handled(1))
    peer.advance(300)
    assert not peer.replies.goaways
    peer.answer(1, status=5)
    peer.advance(31)
    assert peer.replies.goaways


@pytest.mark.requirement("A48")
def test_a_client_that_does_not_answer_the_keepalive_ping_is_disconnected():
    peer = Peer().send(handled(1))
    peer.advance(7199)
    assert not [got for got in peer.replies.frames if got.kind == PING]
    peer.advance(2)
    assert len([got for got in peer.replies.frames if got.kind == PING]) == 1
    peer.advance(21)
    assert peer.connection.terminated
    assert 1 in peer.cancelled


@pytest.mark.requirement("A48")
@three_ways
def test_a_client_that_answers_the_keepalive_ping_stays_connected(feed: Feed):
    peer = Peer(feed).send(handled(1))
    for _ in range(3):
        peer.advance(7201)
        peer.send(ping(drain_ping(peer), ack=True))
    assert not peer.replies.goaways
    peer.answer(1, b"x")
    peer.assert_answered(1, b"x")


@pytest.mark.requirement("A48")
@pytest.mark.parametrize("asked_first", [True, False], ids=["asked before", "not asked before"])
def test_a_client_is_not_said_to_be_dead_while_the_server_does_not_read(asked_first: bool):
    peer = Peer(limits=Limits(stall_timeout=inf)).send(handled(1))
    if asked_first:
        peer.advance(7201)
    peer.connection.pause_writing(peer.now)
    peer.advance(8000)
    assert not peer.connection.terminated
    peer.connection.resume_writing(peer.now)
    peer.read()
    peer.advance(19)
    assert len([got for got in peer.replies.frames if got.kind == PING]) == asked_first
    assert not peer.replies.goaways
    if asked_first:
        peer.advance(2)
        assert peer.connection.terminated, "the PING is not answered"


# --- too many pings ------------------------------------------------------------------------------------------


@pytest.mark.requirement("A49")
@three_ways
def test_the_third_ping_strike_ends_the_connection(feed: Feed):
    peer = Peer(feed).send(handled(1))
    for _ in range(8):
        if peer.code is not None:
            break
        peer.advance(1)
        peer.send(ping())
    peer.assert_closed(ENHANCE_YOUR_CALM)
    assert peer.replies.goaways[-1][2] == b"too_many_pings"
    # One PING is free, and two strikes are forgiven.
    assert 3 <= len(peer.replies.pongs) <= 4


@pytest.mark.requirement("A49", "C-go-bdp-ping", "C-grpcio-bdp-ping")
@three_ways
def test_a_ping_after_every_answer_is_not_a_strike(feed: Feed):
    peer = Peer(feed)
    for stream in range(1, 200, 2):
        peer.send(call(stream))
        peer.send(window_update(0, 5), ping(b"\x02\x04\x10\x10\x09\x0e\x07\x07"))
        peer.assert_answered(stream)
    assert len(peer.replies.pongs) == 100
    peer.assert_alive()


@pytest.mark.requirement("A49")
def test_pings_at_the_allowed_interval_are_not_strikes():
    peer = Peer(limits=Limits(keepalive_time=inf)).send(handled(1))
    for _ in range(20):
        peer.advance(10.1)
        peer.send(ping())
    assert len(peer.replies.pongs) == 20
    peer.answer(1, status=5)
    peer.assert_alive()


@pytest.mark.requirement("A49")
@pytest.mark.parametrize("streams", [0, 1], ids=["without calls", "with a call that is open"])
def test_a_client_that_pings_every_ten_seconds_stays_connected_for_hours_in_spite_of_jitter(streams: int):
    peer = Peer(limits=Limits(keepalive_time=inf))
    if streams:
        peer.send(handled(1))
    for number in range(1440):
        peer.advance(10.0 + (0.9, -0.9, 0.3, -0.8, 0.5)[number % 5])
        peer.send(ping())
    assert peer.code is None
    assert len(peer.replies.pongs) == 1440


@pytest.mark.requirement("A49")
@pytest.mark.parametrize("interval", [0.0, 1.0, 4.0, 7.0])
def test_pings_above_the_allowed_rate_end_the_connection_with_or_without_calls(interval: float):
    for opened in ((), (handled(1),)):
        peer = Peer(limits=Limits(keepalive_time=inf)).send(*opened)
        for _ in range(40):
            if peer.code is None:
                peer.advance(interval)
                peer.send(ping())
        peer.assert_closed(ENHANCE_YOUR_CALM)


@pytest.mark.requirement("A49")
def test_the_allowed_interval_of_pings_is_a_limit_that_the_server_sets():
    peer = Peer(limits=Limits(keepalive_time=inf, min_ping_interval=1.0))
    for _ in range(100):
        peer.advance(1.0)
        peer.send(ping())
    assert peer.code is None


# --- the end of a connection ---------------------------------------------------------------------------------


@pytest.mark.requirement("A50")
@three_ways
def test_input_after_the_last_goaway_is_ignored(feed: Feed):
    peer = Peer(feed).send(handled(1), frame_error())
    peer.assert_closed(PROTOCOL_ERROR)
    assert [type(event).__name__ for event in peer.events[-2:]] == ["CallCancelled", "ConnectionClosing"]
    peer.send(bytes(100_000))
    assert peer.connection.data_to_send() == []
    assert peer.connection.next_deadline() in (None, inf) or peer.connection.next_deadline() > peer.now


def frame_error() -> bytes:
    return data(0, b"x")


@pytest.mark.requirement("A50")
@three_ways
def test_close_sends_goaway_with_the_code_and_cancels_the_calls(feed: Feed):
    peer = Peer(feed).send(handled(1))
    peer.connection.close(NO_ERROR, "bye")
    peer.read()
    assert peer.replies.goaways[-1][1] == NO_ERROR
    assert peer.connection.terminated


@pytest.mark.requirement("C-client-goaway")
@three_ways
def test_a_client_that_has_sent_goaway_still_gets_its_answers(feed: Feed):
    peer = Peer(feed).send(handled(1), goaway(0, NO_ERROR, b"client shuts down"), goaway())
    peer.answer(1, b"x")
    peer.assert_answered(1, b"x")
    peer.send(call(3))
    peer.assert_answered(3)


# --- timers --------------------------------------------------------------------------------------------------


@pytest.mark.requirement("B-slow-client")
@pytest.mark.parametrize("opening", [b"", PREFACE[:10], PREFACE, HELLO[:-1]])
def test_a_connection_without_a_complete_preface_ends_after_the_timeout(opening: bytes):
    peer = Peer(hello=None).send(opening)
    peer.advance(9.9)
    assert not peer.connection.terminated
    peer.advance(0.2)
    assert peer.connection.terminated
    assert peer.closing is not None


@pytest.mark.requirement("B-slow-client")
def test_a_preface_that_the_server_has_not_yet_read_does_not_time_out():
    peer = Peer(hello=None)
    peer.replies.note_sent(HELLO)
    peer.connection.hold(HELLO, peer.now)
    peer.advance(11)
    assert peer.closing is None, "the client has sent the preface in time"
    peer.connection.receive_data(b"", peer.now)
    peer.read()
    peer.send(SETTINGS_ACK).advance(11)
    peer.send(call(1)).assert_answered(1, ANSWER)


@pytest.mark.requirement("B-slow-client", "B-continuation-flood")
@three_ways
def test_an_unfinished_header_block_ends_the_connection_after_the_timeout(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block()[:9], end_headers=False))
    peer.advance(9.9)
    assert not peer.connection.terminated
    peer.advance(0.2)
    assert peer.connection.terminated
    assert peer.code in (ENHANCE_YOUR_CALM, PROTOCOL_ERROR, CANCEL)


@pytest.mark.requirement("B-slow-read")
def test_a_client_that_opens_no_window_is_disconnected_after_the_stall_timeout():
    peer = Peer(limits=Limits(read_grace=1000.0)).send(settings((INITIAL_WINDOW_SIZE, 0)), call(1), handled(3))
    peer.answer(3, bytes(100_000))
    peer.advance(Limits().stall_timeout + 1)
    assert peer.connection.terminated


@pytest.mark.requirement("B-slow-read")
def test_a_connection_whose_transport_stays_paused_ends_unless_the_transport_resumes():
    for resumes in (True, False):
        peer = Peer(limits=Limits(read_grace=1000.0)).send(handled(1))
        peer.connection.pause_writing(peer.now)
        assert not peer.connection.wants_read
        peer.answer(1, bytes(10_000))
        assert peer.connection.data_to_send() == []
        peer.advance(Limits().stall_timeout - 1)
        if resumes:
            peer.connection.resume_writing(peer.now)
            assert peer.connection.wants_read
            peer.read()
            peer.assert_answered(1, bytes(10_000))
        peer.advance(2)
        assert peer.connection.terminated != resumes


@pytest.mark.requirement("B-slow-read")
def test_the_stall_timeout_begins_when_a_handler_answers_even_after_a_long_silence():
    peer = Peer(limits=Limits(stall_timeout=10.0)).send(handled(1))
    peer.now += 60.0
    peer.connection.advance(peer.now)
    peer.answer(1, bytes(100_000))
    peer.advance(9.5)
    assert not peer.connection.terminated
    peer.advance(1.0)
    peer.assert_closed(ENHANCE_YOUR_CALM)


def test_idleness_begins_when_a_handler_answers_even_after_a_long_silence():
    peer = Peer(limits=Limits(max_connection_idle=10.0)).send(handled(1))
    peer.now += 60.0
    peer.connection.advance(peer.now)
    peer.answer(1, ANSWER)
    peer.advance(9.5)
    assert not peer.replies.goaways
    peer.advance(1.0)
    assert peer.replies.goaways


@pytest.mark.requirement("B-slow-read")
def test_a_client_that_opens_its_window_slowly_within_the_grace_for_reading_stays_connected():
    peer = Peer(limits=Limits(read_grace=5000.0, max_read_time=5000.0)).send(
        settings((INITIAL_WINDOW_SIZE, 0)), handled(1)
    )
    peer.answer(1, ANSWER)
    for _ in range(len(grpc_message(ANSWER))):
        peer.advance(Limits().stall_timeout * 0.9)
        peer.send(window_update(1, 1), SETTINGS_ACK[:0])
    peer.assert_answered(1)
    assert not [got for got in peer.replies.frames if got.kind == GOAWAY]
