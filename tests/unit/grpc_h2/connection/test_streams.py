"""Streams and their states (RFC 9113 sections 5 and 8)."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import HANDLED, Peer
from tests.support.h2_wire import (
    CANCEL,
    DATA,
    PING,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    RST_STREAM,
    STREAM_CLOSED,
    Feed,
    call,
    data,
    grpc_message,
    headers,
    indexed,
    inserting,
    ping,
    priority,
    request_block,
    rst_stream,
    three_ways,
    window_update,
)

from grpc_h2.connection.events import CallStarted
from grpc_h2.connection.limits import Limits

# --- priority, ping, ids -------------------------------------------------------------------------------------


@pytest.mark.requirement("A8", "C-nghttp-priority")
@three_ways
def test_priority_is_legal_in_every_state_of_a_stream(feed: Feed):
    peer = Peer(feed).send(
        priority(3, 0, 200), priority(5, 3), priority(9, 7), headers(11, request_block(HANDLED), depends=9)
    )
    peer.send(priority(11, 9), data(11, grpc_message(b"a"), end_stream=True), priority(11, 3))
    peer.answer(11, b"b")
    peer.send(priority(11, 0))
    peer.assert_answered(11, b"b")
    peer.assert_alive()


@pytest.mark.requirement("A8", "B-made-you-reset")
@three_ways
def test_a_stream_that_depends_on_itself_is_a_stream_error(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block(HANDLED) + inserting(b"a", b"1"), depends=1))
    peer.assert_reset(1, PROTOCOL_ERROR)
    assert not peer.calls
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), priority(1, 1))
    peer.assert_reset(1, PROTOCOL_ERROR)


@pytest.mark.requirement("A9")
@three_ways
def test_a_ping_is_answered_ahead_of_data_and_the_ack_of_a_ping_is_not_answered(feed: Feed):
    peer = Peer(feed, reads=False).send(headers(1, request_block(HANDLED), end_stream=True))
    handled = peer.calls[1]
    peer.connection.send_initial_metadata(handled, ())
    peer.connection.send_message(handled, bytes(60_000))
    peer.send(ping(b"overtake"), ping(b"nonsense", ack=True))
    peer.read()
    kinds = [got.kind for got in peer.replies.frames]
    assert kinds.index(PING) < kinds.index(DATA)
    assert peer.replies.pongs == [b"overtake"]


@pytest.mark.requirement("A10")
@three_ways
@pytest.mark.parametrize(("first", "second"), [(2, None), (3, 1), (3, 2), (2**31 - 1, 5)])
def test_an_even_or_lower_stream_id_is_a_connection_error(feed: Feed, first: int, second: int | None):
    peer = Peer(feed).send(call(first))
    if second is not None:
        peer.assert_answered(first)
        peer.send(call(second))
    assert peer.code in (PROTOCOL_ERROR, STREAM_CLOSED)
    if (first, second) != (3, 1):
        assert peer.code == PROTOCOL_ERROR
    assert peer.connection.terminated


@pytest.mark.requirement("A10")
@three_ways
@pytest.mark.parametrize("skipped", [3, 4, 2 * 3 * 199 - 1])
def test_a_skipped_stream_id_is_closed_even_if_very_many_were_skipped(feed: Feed, skipped: int):
    peer = Peer(feed).send(*(call(stream) for stream in range(1, 6 * 200, 6)))
    for stream in range(1, 6 * 200, 6):
        peer.assert_answered(stream)
    peer.send(call(skipped))
    assert peer.code in (PROTOCOL_ERROR, STREAM_CLOSED)
    assert peer.result(skipped).status is None


@pytest.mark.requirement("A10")
@three_ways
def test_a_call_after_the_largest_stream_id_is_a_connection_error(feed: Feed):
    peer = Peer(feed).send(call(2**31 - 1))
    peer.assert_answered(2**31 - 1)
    peer.send(call(2**31 + 1))  # the reserved bit and stream 1
    assert peer.code in (PROTOCOL_ERROR, STREAM_CLOSED)


@pytest.mark.requirement("A11")
@three_ways
@pytest.mark.parametrize(
    "wrong", [data(5, b"x"), rst_stream(5), window_update(5, 1), data(2, b"x"), window_update(4, 1)]
)
def test_a_frame_other_than_headers_and_priority_on_an_idle_stream_is_a_connection_error(feed: Feed, wrong: bytes):
    Peer(feed).send(call(3), wrong).assert_closed(PROTOCOL_ERROR)


# --- after the end of a stream -------------------------------------------------------------------------------


@pytest.mark.requirement("A12")
@three_ways
@pytest.mark.parametrize("late", [data(1, b"x"), headers(1, request_block(), end_stream=True)])
def test_headers_or_data_after_end_stream_are_a_stream_closed_error(feed: Feed, late: bytes):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), data(1, grpc_message(b"a"), end_stream=True), late)
    assert STREAM_CLOSED in (peer.result(1).reset, peer.code)
    assert peer.cancelled == {1: STREAM_CLOSED}
    if peer.code is None:
        peer.assert_reset(1, STREAM_CLOSED)


@pytest.mark.requirement("A12")
@three_ways
@pytest.mark.parametrize(
    "late", [data(1, b"x"), data(1, end_stream=True), headers(1, request_block(), end_stream=True)]
)
def test_headers_or_data_on_a_closed_stream_are_a_stream_closed_error(feed: Feed, late: bytes):
    peer = Peer(feed).send(call(1), late)
    peer.assert_answered_until_reset(1)
    assert peer.result(1).reset == STREAM_CLOSED or peer.code in (STREAM_CLOSED, PROTOCOL_ERROR)


@pytest.mark.requirement("A12")
@three_ways
def test_window_update_priority_and_rst_stream_on_a_closed_stream_are_ignored(feed: Feed):
    harmless = (window_update(1, 5), priority(1, 3), rst_stream(1), window_update(1, 5), rst_stream(1))
    peer = Peer(feed).send(call(1))
    peer.send(*harmless)
    peer.assert_answered(1)
    peer.send(headers(3, request_block(HANDLED), end_stream=True), window_update(3, 9), priority(3))
    peer.answer(3, b"b")
    peer.assert_answered(3, b"b")
    peer.assert_alive()


@pytest.mark.requirement("A13")
@three_ways
def test_frames_in_flight_at_our_reset_are_decoded_and_counted_and_dropped(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), window_update(1, 0))
    peer.send(
        data(1, grpc_message(b"a")),
        data(1, b"", pad=9),
        window_update(1, 7),
        headers(1, inserting(b"kept", b"in step"), end_stream=True),
        headers(3, request_block(HANDLED) + indexed(62), end_stream=True),
        rst_stream(1),
    )
    assert peer.result(1).reset == PROTOCOL_ERROR
    assert [got.stream for got in peer.replies.frames if got.kind == RST_STREAM] == [1]
    assert ("kept", "in step") in peer.calls[3].request.metadata
    assert 1 not in peer.received
    peer.assert_alive()


@pytest.mark.requirement("A13")
@three_ways
@pytest.mark.parametrize("state", ["open", "reset by us", "answered"])
def test_a_reset_is_never_answered_with_a_reset(feed: Feed, state: str):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)))
    if state == "reset by us":
        peer.send(window_update(1, 0))
    elif state == "answered":
        peer.send(data(1, end_stream=True))
        peer.answer(1, status=5)
    before = [got for got in peer.replies.frames if got.kind == RST_STREAM]
    peer.send(rst_stream(1), rst_stream(1), data(1, b"late"))
    after = [got for got in peer.replies.frames if got.kind == RST_STREAM]
    if state == "open":
        # DATA on a stream that the client has reset is an error of the client: section 5.1 allows STREAM_CLOSED.
        assert len(after) <= 1
    elif state == "reset by us":
        assert after == before


# --- too many streams ----------------------------------------------------------------------------------------


@pytest.mark.requirement("A14", "A27")
@three_ways
def test_streams_above_the_limit_are_refused_and_their_blocks_decoded(feed: Feed):
    peer = Peer(feed, limits=Limits(max_concurrent_streams=2))
    peer.send(*(headers(stream, request_block(HANDLED)) for stream in (1, 3)))
    peer.send(headers(5, request_block(HANDLED) + inserting(b"kept", b"in step")), data(5, b"dropped", end_stream=True))
    assert peer.result(5).reset == REFUSED_STREAM
    assert peer.calls.keys() == {1, 3}
    peer.send(rst_stream(1))
    peer.send(headers(7, request_block(HANDLED) + indexed(62)))
    assert ("kept", "in step") in peer.calls[7].request.metadata
    peer.answer(3, status=5)
    peer.assert_alive()


@pytest.mark.requirement("A14", "B-rapid-reset")
@three_ways
def test_a_running_handler_of_a_reset_stream_is_counted_as_a_stream(feed: Feed):
    peer = Peer(feed, limits=Limits(max_concurrent_streams=2), slow_handlers=True)
    for stream in (1, 3):
        peer.send(headers(stream, request_block(HANDLED)), rst_stream(stream))
    peer.send(headers(5, request_block(HANDLED)))
    assert peer.result(5).reset == REFUSED_STREAM
    peer.connection.finished(peer.calls[1])
    peer.send(headers(7, request_block(HANDLED)))
    assert 7 in peer.calls


@pytest.mark.requirement("A14")
def test_the_advertised_limit_of_streams_is_at_least_a_hundred():
    peer = Peer()
    assert peer.replies.settings[3] >= 100


# --- trailers ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A15")
@three_ways
def test_trailers_with_end_stream_end_a_request(feed: Feed):
    peer = Peer(feed).send(
        headers(1, request_block()), data(1, grpc_message(b"world")), headers(1, inserting(b"a", b"b"), end_stream=True)
    )
    peer.assert_answered(1)


@pytest.mark.requirement("A15")
@three_ways
@pytest.mark.parametrize("path", [HANDLED, b"/t.S/Get"])
@pytest.mark.parametrize(
    "trailers",
    [
        headers(1, b""),
        headers(1, inserting(b"a", b"b")),
        headers(1, inserting(b":path", b"/"), end_stream=True),
        headers(1, inserting(b":status", b"200"), end_stream=True),
        headers(1, inserting(b"Upper", b"x"), end_stream=True),
    ],
)
def test_trailers_without_end_stream_or_with_pseudo_headers_are_a_stream_error(
    feed: Feed, path: bytes, trailers: bytes
):
    peer = Peer(feed).send(headers(1, request_block(path)), data(1, grpc_message(b"world")), trailers)
    peer.assert_reset(1, PROTOCOL_ERROR)


# --- events --------------------------------------------------------------------------------------------------


@three_ways
def test_the_events_of_a_handled_call_come_in_order(feed: Feed):
    peer = Peer(feed).send(
        headers(1, request_block(HANDLED)), data(1, grpc_message(b"a") + grpc_message(b"b")), data(1, end_stream=True)
    )
    assert [type(event).__name__ for event in peer.events] == [
        "CallStarted",
        "MessageReceived",
        "MessageReceived",
        "HalfClosed",
    ]
    started = peer.events[0]
    assert isinstance(started, CallStarted)
    assert started.stream.id == 1
    assert peer.connection.open_calls == 1
    peer.connection.cancel(peer.calls[1])
    peer.connection.finished(peer.calls[1])
    peer.read()
    assert peer.result(1).reset == CANCEL
    assert peer.connection.open_calls == 0
