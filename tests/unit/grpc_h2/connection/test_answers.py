"""Answers of handlers and static methods, and how calls end (PROTOCOL-HTTP2, RFC 9113 section 8.1)."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import ANSWER, REFUSING, Peer, handled
from tests.support.h2_wire import (
    CANCEL,
    CONTINUATION,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    NO_ERROR,
    RST_STREAM,
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

BODY = grpc_message(bytes(16_000))


# --- the answer ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("A43")
@three_ways
def test_an_answer_is_headers_data_trailers_or_one_headers_frame(feed: Feed):
    peer = Peer(feed).send(call(1), call(3, REFUSING), handled(5), handled(7))
    peer.answer(5, b"one", b"two")
    peer.answer(7, status=10, text="aborted")
    for stream, status, messages in ((1, 0, [ANSWER]), (5, 0, [b"one", b"two"])):
        result = peer.result(stream)
        assert (result.status, result.messages, result.ended) == (status, messages, True)
        assert result.headers[:1] == [(b":status", b"200")]
        assert (b"content-type", b"application/grpc") in result.headers
        assert (b"grpc-status", b"0") in result.trailers
    for stream, status in ((3, 5), (7, 10)):
        result = peer.result(stream)
        assert (result.status, result.trailers, bytes(result.body), result.ended) == (status, None, b"", True)
        assert (b"content-type", b"application/grpc") in result.headers
    assert peer.result(7).text == b"aborted"


@pytest.mark.requirement("A43", "A42")
@three_ways
def test_a_call_answered_without_messages_still_has_a_status(feed: Feed):
    peer = Peer(feed).send(handled(1))
    peer.connection.send_initial_metadata(peer.calls[1], (("a", "b"), ("c-bin", b"\xff\x00")))
    peer.answer(1)
    result = peer.result(1)
    assert result.status == 0
    assert (b"a", b"b") in result.headers
    assert (b"c-bin", b"/wA") in result.headers


@pytest.mark.requirement("A43", "A20")
@three_ways
def test_metadata_larger_than_a_frame_continues_in_continuation_frames(feed: Feed):
    peer = Peer(feed).send(handled(1))
    metadata = tuple((f"key-{number}", "v" * 1000) for number in range(40))
    peer.connection.send_initial_metadata(peer.calls[1], metadata)
    peer.answer(1, b"x")
    peer.assert_answered(1, b"x")
    assert CONTINUATION in [got.kind for got in peer.replies.frames]
    assert dict(peer.result(1).headers)[b"key-39"] == b"v" * 1000


@pytest.mark.requirement("A43")
@three_ways
def test_writing_on_an_ended_call_raises_an_error(feed: Feed):
    peer = Peer(feed).send(handled(1))
    stream = peer.calls[1]
    peer.answer(1, b"x")
    told = len(peer.replies.frames)
    peer.connection.send_message(stream, b"y")
    peer.connection.send_status(stream, 2, "again")
    peer.connection.send_initial_metadata(stream, ())
    peer.connection.cancel(stream)
    peer.connection.finished(stream)
    peer.read()
    assert len(peer.replies.frames) == told
    assert peer.connection.open_calls == 0


@pytest.mark.requirement("A44")
@pytest.mark.parametrize(
    ("text", "wire"),
    [("plain ~", b"plain ~"), ("100%", b"100%25"), ("ä\r\n\x7f", b"%C3%A4%0D%0A%7F"), ("無\0", b"%E7%84%A1%00")],
)
def test_a_status_message_is_percent_encoded(text: str, wire: bytes):
    peer = Peer().send(handled(1))
    peer.answer(1, status=2, text=text)
    assert peer.result(1).text.upper() == wire.upper()


@pytest.mark.requirement("A44")
@pytest.mark.parametrize("text", ["無" * 9000, "a" * 20_000, "%" * 8191, "a" + "ä" * 8000])
def test_trailers_with_a_long_message_stay_below_8_kib(text: str):
    peer = Peer().send(handled(1))
    peer.answer(1, status=2, text=text)
    result = peer.result(1)
    assert sum(len(name) + len(value) + 32 for name, value in result.headers) < 8192
    wire = result.text
    assert len(wire) > 4000
    assert b"%" not in wire[-2:-1] + wire[-1:], "cut in the middle of an escape"
    assert text.startswith(_percent_decoded(wire))


def _percent_decoded(wire: bytes) -> str:
    from urllib.parse import unquote_to_bytes

    return unquote_to_bytes(wire).decode(errors="ignore")


def resets(peer: Peer) -> list[int]:
    """The streams that were reset, in order."""
    return [got.stream for got in peer.replies.frames if got.kind == RST_STREAM]


@pytest.mark.requirement("A45")
@three_ways
def test_a_status_before_end_stream_is_followed_by_rst_stream_no_error_when_the_rest_does_not_arrive(feed: Feed):
    peer = Peer(feed).send(handled(1, end_stream=False))
    peer.answer(1, status=5)
    peer.advance(0.9)
    assert (peer.result(1).status, peer.result(1).reset) == (5, None)
    peer.advance(0.2)
    assert peer.result(1).reset == NO_ERROR
    kinds = [got.kind for got in peer.replies.frames if got.stream == 1]
    assert kinds == [HEADERS, RST_STREAM]
    peer.send(data(1, BODY), data(1, end_stream=True)).assert_alive()
    peer.advance(5)
    assert resets(peer) == [1]


@pytest.mark.requirement("A45")
@pytest.mark.parametrize(
    "rest",
    [data(1, BODY, end_stream=True), data(1, BODY) + data(1, b"", end_stream=True), rst_stream(1, CANCEL)],
    ids=["one frame", "two frames", "a reset"],
)
def test_a_client_that_sends_the_rest_of_its_request_gets_no_reset_after_its_status(rest: bytes):
    peer = Peer().send(handled(1, end_stream=False), handled(3, end_stream=False))
    peer.answer(1, status=5)
    peer.answer(3, status=5)
    peer.send(rest)
    peer.advance(5)
    assert (peer.result(1).status, peer.result(1).reset) == (5, None)
    assert resets(peer) == [3]
    peer.assert_alive()


@pytest.mark.requirement("A45")
def test_a_trailer_ends_the_rest_of_a_request_too():
    peer = Peer().send(headers(1, request_block(REFUSING)), handled(3, end_stream=False))
    peer.answer(3, status=5)
    peer.send(headers(3, plain(b"x-last", b"1"), end_stream=True))
    peer.advance(2)
    assert 3 not in resets(peer)


@pytest.mark.requirement("A45")
def test_an_endless_rest_of_a_request_is_reset_and_holds_nothing():
    peer = Peer().send(handled(1, end_stream=False))
    peer.answer(1, status=5)
    for _ in range(4):
        peer.send(data(1, bytes(16_000)))
    assert resets(peer) == []
    peer.send(data(1, bytes(16_000)))
    assert resets(peer) == [1]
    assert peer.connection.held < 4096
    peer.assert_alive()


@pytest.mark.requirement("A45")
def test_more_data_does_not_prolong_the_time_for_the_rest_of_a_request():
    peer = Peer().send(handled(1, end_stream=False), handled(3, end_stream=False))
    peer.answer(1, status=5)
    peer.advance(0.5)
    peer.answer(3, status=5)
    peer.send(data(1, BODY))
    peer.advance(0.6)
    assert resets(peer) == [1]
    peer.advance(0.5)
    assert resets(peer) == [1, 3]


@pytest.mark.requirement("A45")
def test_the_oldest_streams_are_reset_if_too_many_requests_are_unfinished_after_their_status():
    peer = Peer()
    for stream in range(1, 601, 2):
        peer.send(handled(stream, end_stream=False))
        peer.answer(stream, status=5)
    assert resets(peer) == [*range(1, 89, 2)]
    peer.advance(2)
    for _ in range(40):
        peer.advance(0.01)
    assert resets(peer) == [*range(1, 601, 2)]
    peer.assert_alive()


@pytest.mark.requirement("A45")
def test_a_draining_connection_first_resets_the_streams_with_an_unfinished_request():
    peer = Peer().send(handled(1, end_stream=False))
    peer.answer(1, status=5)
    peer.connection.drain(peer.now)
    peer.read()
    peer.advance(1.1)
    peer.advance(1.1)
    assert resets(peer) == [1]
    peer.assert_closed(NO_ERROR)


@pytest.mark.requirement("A45")
@three_ways
def test_an_early_status_after_queued_data_resets_the_stream_after_the_data(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 2)), handled(1, end_stream=False))
    peer.answer(1, b"abc")
    peer.advance(1.1)
    assert peer.result(1).reset is None
    peer.send(window_update(1, 100))
    peer.advance(1.1)
    assert (peer.result(1).messages, peer.result(1).status, peer.result(1).reset) == ([b"abc"], 0, NO_ERROR)


@pytest.mark.requirement("A45")
def test_a_large_early_answer_is_followed_by_one_reset():
    large = 2**20
    peer = Peer().send(settings((INITIAL_WINDOW_SIZE, large)), window_update(0, large), handled(1, end_stream=False))
    peer.answer(1, bytes(150_000))
    peer.advance(1.1)
    assert (peer.result(1).status, peer.result(1).reset) == (0, NO_ERROR)
    assert resets(peer) == [1]


@pytest.mark.requirement("A46")
@three_ways
def test_a_reset_by_the_client_cancels_the_handler_and_drops_queued_data(feed: Feed):
    peer = Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 4)), handled(1, end_stream=False))
    stream = peer.calls[1]
    peer.connection.send_initial_metadata(stream, ())
    peer.connection.send_message(stream, bytes(100_000))
    peer.read()
    peer.send(rst_stream(1, CANCEL))
    assert peer.cancelled == {1: CANCEL}
    assert stream.unsent == 0
    assert stream.closed
    peer.send(window_update(1, 10**6), window_update(0, 10**6))
    assert len(peer.result(1).body) == 4
    assert peer.result(1).reset is None
    peer.send(settings((INITIAL_WINDOW_SIZE, 65535))).assert_alive()


@pytest.mark.requirement("A46")
def test_messages_of_a_cancelled_calls_handler_are_dropped():
    peer = Peer(slow_handlers=True).send(handled(1), handled(3), rst_stream(1))
    peer.answer(1, b"too late")
    assert peer.result(1).headers is None
    peer.answer(3, b"x")
    peer.assert_answered(3, b"x")


@pytest.mark.requirement("A46", "C-grpcio-no-goaway")
def test_a_lost_connection_cancels_every_handler():
    peer = Peer().send(handled(1), handled(3, end_stream=False), call(5))
    lost = peer.connection.connection_lost()
    assert sorted(event.stream.id for event in lost) == [1, 3]
    assert {type(event).__name__ for event in lost} == {"CallCancelled"}
