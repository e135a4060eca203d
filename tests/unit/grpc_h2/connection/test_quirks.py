"""Habits of real clients, from the captures in `tests/data/captures` and from the sources of other clients."""

from __future__ import annotations

import base64
from pathlib import Path

import hpack
import pytest
from tests.support.h2_peer import ANSWER, GUARDED, HANDLED, STATIC, Peer
from tests.support.h2_replies import Replies
from tests.support.h2_wire import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_STREAM,
    HEADERS,
    INITIAL_WINDOW_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    REFUSED_STREAM,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    Feed,
    Frame,
    bytewise,
    continuation,
    data,
    frame,
    goaway,
    grpc_message,
    headers,
    indexed,
    inserting,
    ping,
    plain,
    request_block,
    request_fields,
    rst_stream,
    settings,
    split_frames,
    three_ways,
    window_update,
)

from grpc_h2.connection.limits import Limits
from grpc_h2.static.routes import Router

CAPTURES = {
    path.stem: path.read_bytes() for path in sorted((Path(__file__).parents[3] / "data/captures").glob("*.bin"))
}
TOO_LARGE = "nghttp-1.52.0-padded-continuation"


def frames_of(name: str) -> list[Frame]:
    frames, rest = split_frames(CAPTURES[name].removeprefix(PREFACE))
    assert rest == b""
    return frames


def streams_of(name: str) -> list[int]:
    return [got.stream for got in frames_of(name) if got.kind == HEADERS]


def step_by_step(name: str) -> list[bytes]:
    """A capture that is cut after each END_STREAM; the client sent each part after the answer to the previous part."""
    steps, step = [], PREFACE
    for got in frames_of(name):
        step += frame(got.kind, got.flags, got.stream, got.payload)
        if got.kind == DATA and got.flags & END_STREAM:
            steps.append(step)
            step = b""
    return [*steps, step]


@pytest.mark.requirement("C-captures")
def test_at_least_ten_captures_exist():
    assert len(CAPTURES) >= 10


@pytest.mark.requirement("C-captures")
@three_ways
@pytest.mark.parametrize("name", [name for name in CAPTURES if name != TOO_LARGE])
def test_a_capture_sent_at_once_is_answered(feed: Feed, name: str):
    peer = Peer(feed, hello=None).send(CAPTURES[name])
    assert peer.code is None, peer.closing
    for stream in streams_of(name):
        peer.assert_answered(stream)
    asked = [got.payload for got in frames_of(name) if got.kind == PING and not got.flags]
    assert peer.replies.pongs == asked


@pytest.mark.requirement("C-captures")
@three_ways
@pytest.mark.parametrize("name", [name for name in CAPTURES if name != TOO_LARGE])
def test_a_capture_sent_call_by_call_is_answered(feed: Feed, name: str):
    peer = Peer(feed, hello=None)
    streams = streams_of(name)
    for step in step_by_step(name):
        peer.send(step)
    assert peer.code is None, peer.closing
    for stream in streams:
        peer.assert_answered(stream)
    assert peer.connection.answered == [1] * len(streams)


@pytest.mark.requirement("C-captures")
@three_ways
@pytest.mark.parametrize("name", [name for name in CAPTURES if name != TOO_LARGE])
def test_a_capture_gives_handlers_the_fields_and_messages_of_the_client(feed: Feed, name: str):
    peer = Peer(feed, hello=None, router=Router())
    decoder = hpack.Decoder()
    for step in step_by_step(name):
        peer.send(step)
        for stream in sorted(peer.half_closed - peer.replies.streams.keys()):
            peer.answer(stream, b"answer")
    assert peer.code is None, peer.closing
    assert list(peer.calls) == streams_of(name)
    for got in frames_of(name):
        if got.kind != HEADERS:
            continue
        pad = got.payload[0] if got.flags & PADDED else 0
        block = got.payload[bool(got.flags & PADDED) + 5 * bool(got.flags & PRIORITISED) : len(got.payload) - pad]
        fields = [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
        request = peer.calls[got.stream].request
        assert request is not None
        assert request.path == "/t.S/Get"
        assert ("authorization", "Bearer k1") in request.metadata
        assert (b":authority", request.authority.encode()) in fields
        assert any(key == b"grpc-timeout" for key, _ in fields) == (request.timeout is not None)
        binary = [value for key, value in fields if key == b"trace-bin"]
        assert [value for key, value in request.metadata if key == "trace-bin"] == [b"\x00\xff\x01"] * len(binary)
        peer.assert_answered(got.stream, b"answer")
        assert peer.received[got.stream] == [b"world"]


@pytest.mark.requirement("A28", "C-captures")
@three_ways
def test_a_captured_header_list_above_our_limit_ends_its_call_only(feed: Feed):
    peer = Peer(feed, hello=None).send(CAPTURES[TOO_LARGE])
    assert CONTINUATION in [got.kind for got in frames_of(TOO_LARGE)]
    peer.assert_status(13, 8)


# A block that inserts refers to other entries when it comes again.
REPEATABLE = [name for name in CAPTURES if name != TOO_LARGE and not name.startswith("grpc-java")]


@pytest.mark.requirement("C-captures")
@pytest.mark.parametrize("name", REPEATABLE)
def test_the_last_call_of_a_capture_is_answered_300_times(name: str):
    # The ids grow from call to call; no bucket overflows, and no window is exhausted.
    peer = Peer(hello=None).send(CAPTURES[name])
    last = max(streams_of(name))
    again = [got for got in frames_of(name) if got.stream == last and got.kind in (HEADERS, DATA, WINDOW_UPDATE)]
    for stream in range(last + 2, last + 602, 2):
        octets = b"".join(frame(got.kind, got.flags, stream, got.payload) for got in again)
        peer.send(octets, window_update(0, len(ANSWER) + 5))
        assert peer.result(stream).status is not None, (stream, peer.closing)
    peer.assert_alive()


@pytest.mark.requirement("A18", "C-nghttp-table-size")
def test_the_header_table_of_zero_octets_of_nghttp_is_answered_with_a_size_update():
    peer = Peer(hello=None).send(CAPTURES["nghttp-1.52.0-peer-table0"])
    first = next(got for got in peer.replies.frames if got.kind == HEADERS)
    assert first.payload[0] == 0x20


@pytest.mark.requirement("C-java-priority", "C-nghttp-priority", "C-grpcio-window-updates", "C-go-bdp-ping")
def test_the_captures_contain_the_habits_that_they_are_kept_for():
    assert frames_of("grpc-java-1.41.3-by-hand")[3].flags == 0x24
    assert streams_of("grpc-java-1.41.3-by-hand")[0] == 3
    assert [got.kind for got in frames_of("nghttp-1.52.0")[1:6]] == [PRIORITY] * 5
    grpcio = [got for got in frames_of("grpcio-1.85.1") if got.stream == 3]
    assert [got.kind for got in grpcio] == [HEADERS, WINDOW_UPDATE, DATA]
    assert b"\x02\x04\x10\x10\x09\x0e\x07\x07" in [got.payload for got in frames_of("grpc-go-1.64.0")]


# --- grpcio ----------------------------------------------------------------------------------------------------

GRPCIO_HELLO = (
    PREFACE + settings((2, 0), (3, 0), (4, 4194304), (5, 4194304), (6, 16384), (0xFE03, 1)) + window_update(0, 4128769)
)


@pytest.mark.requirement("C-grpcio-half-close", "C-grpcio-opening")
@three_ways
def test_an_empty_data_frame_of_grpcio_half_closes_the_call(feed: Feed):
    peer = Peer(feed, hello=GRPCIO_HELLO).send(
        headers(1, request_block(HANDLED)), window_update(1, 5), data(1, grpc_message(b"a")), data(1, end_stream=True)
    )
    assert (peer.received[1], peer.half_closed) == ([b"a"], {1})


@pytest.mark.requirement("C-grpcio-cancel")
@three_ways
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_a_cancel_of_grpcio_ends_its_call_only(feed: Feed, path: bytes):
    peer = Peer(feed, hello=GRPCIO_HELLO)
    peer.send(headers(1, request_block(path)), window_update(1, 5), rst_stream(1, CANCEL))
    assert peer.cancelled == ({1: CANCEL} if path == HANDLED else {})
    assert peer.result(1).headers is None
    peer.assert_alive()


@pytest.mark.requirement("C-grpcio-window-updates")
@three_ways
@pytest.mark.parametrize(
    "extra", [plain(b"Bad", b"x"), plain(b"a-bin", b"*"), plain(b"a", b"x" * 16_000), plain(b"a", b"") * 101]
)
@pytest.mark.parametrize("path", [STATIC, HANDLED])
def test_window_updates_of_grpcio_for_failed_calls_are_not_a_glitch(feed: Feed, path: bytes, extra: bytes):
    peer = Peer(feed, hello=GRPCIO_HELLO)
    # A hundred calls are sent at once and in chunks. A call sent octet by octet takes a hundred times as long, so ten
    # such calls are enough.
    for stream in range(1, 21 if feed is bytewise else 201, 2):
        block = request_block(path) + extra
        peer.send(
            headers(stream, block[:16_000], end_headers=False), continuation(stream, block[16_000:], end_headers=True)
        )
        peer.send(window_update(stream, 5), data(stream, grpc_message(b"world"), end_stream=True))
    assert peer.code is None, peer.closing
    peer.assert_alive()


@pytest.mark.requirement("C-grpcio-window-updates")
@three_ways
def test_window_updates_of_grpcio_for_refused_streams_are_not_a_glitch(feed: Feed):
    peer = Peer(feed, hello=GRPCIO_HELLO, limits=Limits(max_concurrent_streams=1)).send(
        headers(1, request_block(HANDLED))
    )
    for stream in range(3, 203, 2):
        octets = headers(stream, request_block()), window_update(stream, 5), data(stream, b"x", end_stream=True)
        peer.send(*octets)
    assert peer.code is None, peer.closing
    assert {peer.result(stream).reset for stream in range(3, 203, 2)} == {REFUSED_STREAM}
    peer.send(rst_stream(1))
    peer.assert_alive()


@pytest.mark.requirement("C-grpcio-no-goaway")
def test_a_grpcio_client_that_leaves_without_goaway_cancels_its_handler():
    peer = Peer(hello=GRPCIO_HELLO).send(headers(1, request_block(HANDLED), end_stream=True))
    lost = peer.connection.connection_lost()
    assert [event.stream.id for event in lost] == [1]


@pytest.mark.requirement("C-grpcio-bdp-ping", "A49")
@three_ways
def test_pings_of_grpcio_with_any_payload_after_data_are_not_strikes(feed: Feed):
    peer = Peer(feed, hello=GRPCIO_HELLO)
    for number in range(50):
        stream = 2 * number + 1
        peer.send(
            headers(stream, request_block()),
            window_update(stream, 5),
            data(stream, grpc_message(b"world"), end_stream=True),
        )
        peer.send(window_update(0, 16), ping(number.to_bytes(8, "big")))
        peer.assert_answered(stream)
    assert len(peer.replies.pongs) == 50


@pytest.mark.requirement("C-grpcio-window-updates")
def test_a_hundred_streams_whose_data_follow_all_headers_are_answered():
    peer = Peer(hello=GRPCIO_HELLO)
    streams = range(1, 201, 2)
    peer.send(*(headers(stream, request_block()) + window_update(stream, 5) for stream in streams))
    peer.send(*(data(stream, grpc_message(b"world"), end_stream=True) for stream in reversed(streams)))
    for stream in streams:
        peer.assert_answered(stream)


# --- grpc-go and grpc-java: a fresh entry for every call -----------------------------------------------------------


@pytest.mark.requirement("C-go-fresh-timeout", "C-go-bdp-ping")
@three_ways
def test_a_fresh_timeout_of_grpc_go_in_each_call_until_the_path_is_evicted_is_decoded(feed: Feed):
    encoder = hpack.Encoder()
    peer = Peer(feed)
    for number in range(200):
        stream = 2 * number + 1
        fields = request_fields(grpc_timeout=b"%du" % (4_999_976 - number))
        octets = headers(stream, encoder.encode(fields)) + data(stream, grpc_message(b"world"), end_stream=True)
        peer.send(octets)
        peer.send(window_update(0, 5), ping(b"\x02\x04\x10\x10\x09\x0e\x07\x07"))
        peer.assert_answered(stream)
    assert len(peer.replies.pongs) == 200
    assert peer.code is None


@pytest.mark.requirement("C-java-priority")
@three_ways
def test_priority_in_every_request_of_grpc_java_from_stream_3_is_accepted(feed: Feed):
    hello = PREFACE + settings((2, 0), (3, 0), (4, 1048576), (6, 8192))
    peer = Peer(feed, hello=hello)
    for stream in range(3, 60, 2):
        block = request_block() + (inserting(b"grpc-timeout", b"%du" % (4_998_977 - stream)))
        peer.send(headers(stream, block, depends=0), data(stream, grpc_message(b"world"), end_stream=True))
        peer.send(ping(b"\0\0\0\0\0\0\x04\xd2"))
        peer.assert_answered(stream)
    assert peer.code is None


@pytest.mark.requirement("C-tonic-never-indexed")
@three_ways
def test_never_indexed_fields_of_tonic_are_answered(feed: Feed):
    never = b"".join(b"\x10" + plain(name, value)[1:] for name, value in request_fields(content_length=b"10"))
    peer = Peer(feed)
    for stream in (1, 3, 5):
        peer.send(headers(stream, never), data(stream, grpc_message(b"world"), end_stream=True))
        peer.assert_answered(stream)


@pytest.mark.requirement("C-js-goaway")
@three_ways
def test_two_goaways_and_a_late_ping_of_grpc_js_do_not_end_its_calls(feed: Feed):
    peer = Peer(feed).send(headers(1, request_block(HANDLED), end_stream=True))
    peer.connection.drain(peer.now)
    peer.read()
    peer.send(ping(b"keepaliv"), goaway(), goaway())
    peer.answer(1, b"x")
    peer.assert_answered(1, b"x")
    assert peer.replies.pongs == [b"keepaliv"]


# --- h2load, curl, kubelet, Envoy -----------------------------------------------------------------------------------


@pytest.mark.requirement("C-h2load-first-flight", "C-curl")
@three_ways
def test_the_first_flight_of_h2load_with_a_window_of_1_gib_is_answered(feed: Feed):
    hello = PREFACE + settings((2, 0), (4, 2**30 - 1)) + window_update(0, 2**30 - 65536)
    streams = range(1, 65, 2)
    peer = Peer(feed, hello=None)
    peer.send(
        hello,
        *(headers(stream, request_block(content_length=b"10", accept=b"*/*")) for stream in streams),
        *(data(stream, grpc_message(b"world"), end_stream=True) for stream in streams),
        SETTINGS_ACK,
    )
    for stream in streams:
        peer.assert_answered(stream)


@pytest.mark.requirement("C-kubelet-probe")
@three_ways
def test_a_kubelet_probe_is_answered_and_its_end_raises_no_event(feed: Feed):
    peer = Peer(feed).send(
        headers(
            1,
            request_block(
                b"/grpc.health.v1.Health/Check", user_agent=b"kube-probe/1.31 grpc-go/1.65.0", grpc_timeout=b"1S"
            ),
        )
    )
    peer.send(data(1, grpc_message(b""), end_stream=True))
    peer.answer(1, b"\x08\x01")
    peer.assert_answered(1, b"\x08\x01")
    assert peer.connection.connection_lost() == []


@pytest.mark.requirement("C-envoy-tenants")
@three_ways
def test_only_the_bad_call_among_those_of_many_clients_of_envoy_fails(feed: Feed):
    peer = Peer(feed)
    for number in range(60):
        stream = 6 * number + 1
        request_id = inserting(b"x-request-id", b"id-%d" % number)
        peer.send(
            headers(stream, request_block() + request_id),
            data(stream, grpc_message(b"world"), end_stream=True),
            headers(stream + 2, request_block() + request_id + plain(b"Bad", b"x"), end_stream=True),
            headers(stream + 4, request_block(GUARDED) + indexed(62)),
            data(stream + 4, grpc_message(b"world"), end_stream=True),
        )
        peer.assert_answered(stream)
        peer.assert_answered(stream + 4)
        assert peer.result(stream + 2).reset == 1


@pytest.mark.requirement("A42")
def test_padded_and_unpadded_base64_give_the_same_value():
    peer = Peer()
    peer.send(headers(1, request_block(HANDLED, (b"a-bin", base64.b64encode(b"\xff").rstrip(b"=")))))
    peer.send(headers(3, request_block(HANDLED, (b"a-bin", base64.b64encode(b"\xff")))))
    for stream in (1, 3):
        assert ("a-bin", b"\xff") in peer.calls[stream].request.metadata


@pytest.mark.requirement("C-small-windows", "A20")
def test_a_client_with_small_windows_gets_a_large_answer_as_its_windows_open():
    peer = Peer().send(settings((INITIAL_WINDOW_SIZE, 65535)), headers(1, request_block(HANDLED), end_stream=True))
    peer.answer(1, bytes(500_000))
    while not peer.result(1).ended:
        had = len(peer.result(1).body)
        peer.send(window_update(1, 40_000), window_update(0, 40_000))
        assert len(peer.result(1).body) > had or peer.result(1).ended
    peer.assert_answered(1, bytes(500_000))


def test_the_checker_of_replies_rejects_illegal_frames():
    with pytest.raises(AssertionError):
        Replies().feed(ping())
    judge = Replies()
    judge.feed(settings())
    with pytest.raises(AssertionError):
        judge.feed(data(1, b"x"))
