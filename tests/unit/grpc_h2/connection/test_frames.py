"""Preface, frames and settings (RFC 9113 sections 3 to 6)."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import HANDLED, Peer
from tests.support.h2_wire import (
    CONTINUATION,
    DATA,
    ENABLE_PUSH,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    GOAWAY,
    HEADERS,
    HELLO,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    PADDED,
    PING,
    PREFACE,
    PRIORITISED,
    PRIORITY,
    PROTOCOL_ERROR,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    SETTINGS_ACK,
    WINDOW_UPDATE,
    Feed,
    call,
    continuation,
    data,
    frame,
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

from grpc_h2.connection.connection import Connection
from grpc_h2.connection.limits import Limits
from grpc_h2.static.routes import Router

# --- the preface ---------------------------------------------------------------------------------------------


@pytest.mark.requirement("A1")
def test_our_settings_are_the_first_frame_sent_before_any_input():
    connection = Connection(Router(), Limits(), 0.0)
    octets = b"".join(connection.data_to_send())
    assert octets[3] == SETTINGS
    assert octets[4] == 0


@pytest.mark.requirement("A1")
@three_ways
@pytest.mark.parametrize(
    "opening", [b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", PREFACE[:-1] + b"x" + settings(), b"\x16\x03\x01" * 9]
)
def test_a_wrong_preface_is_a_connection_error(feed: Feed, opening: bytes):
    peer = Peer(feed, hello=opening)
    assert peer.connection.terminated
    assert peer.code in (None, PROTOCOL_ERROR)
    assert peer.closing is not None


@pytest.mark.requirement("A1")
@three_ways
@pytest.mark.parametrize("first", [ping(), call(1), window_update(0, 1), SETTINGS_ACK, frame(0x42)])
def test_a_first_frame_other_than_settings_is_a_connection_error(feed: Feed, first: bytes):
    Peer(feed, hello=PREFACE + first).assert_closed(PROTOCOL_ERROR)


@pytest.mark.requirement("A1")
def test_a_tcp_probe_without_a_preface_raises_no_event():
    peer = Peer(hello=None)
    assert peer.connection.connection_lost() == []


@pytest.mark.requirement("A1", "C-h2load-first-flight")
@three_ways
def test_requests_in_the_first_flight_are_answered(feed: Feed):
    peer = Peer(feed, hello=None).send(HELLO, call(1), call(3), SETTINGS_ACK)
    peer.assert_answered(1)
    peer.assert_answered(3)


# --- sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A2")
@three_ways
@pytest.mark.parametrize("kind", [DATA, HEADERS, SETTINGS, PING, CONTINUATION, GOAWAY])
@pytest.mark.parametrize("excess", [1, 2**24 - 1 - 16384])
def test_a_frame_above_the_maximum_size_is_rejected_from_its_header(feed: Feed, kind: int, excess: int):
    peer = Peer(feed)
    longest = peer.replies.settings.get(MAX_FRAME_SIZE, 16384)
    stream = 0 if kind in (SETTINGS, PING, GOAWAY) else 1
    peer.send(frame(kind, 0, stream, length=min(longest + excess, 2**24 - 1)))
    peer.assert_closed(FRAME_SIZE_ERROR)


@pytest.mark.requirement("A3")
@three_ways
@pytest.mark.parametrize(
    "wrong",
    [
        *(frame(RST_STREAM, 0, 1, bytes(size)) for size in (0, 3, 5)),
        *(frame(PING, 0, 0, bytes(size)) for size in (0, 7, 9)),
        *(frame(PING, 1, 0, bytes(size)) for size in (0, 7)),
        *(frame(WINDOW_UPDATE, 0, stream, bytes(size)) for stream in (0, 1) for size in (0, 3, 5)),
        *(frame(SETTINGS, 0, 0, bytes(size)) for size in (1, 5, 7)),
        frame(SETTINGS, 1, 0, bytes(6)),
        *(frame(GOAWAY, 0, 0, bytes(size)) for size in (0, 7)),
    ],
)
def test_a_wrong_fixed_length_is_a_frame_size_error(feed: Feed, wrong: bytes):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), wrong)
    peer.assert_closed(FRAME_SIZE_ERROR)
    assert peer.cancelled.keys() == {1}


@pytest.mark.requirement("A3", "B-made-you-reset")
@three_ways
@pytest.mark.parametrize("size", [0, 4, 6])
def test_a_wrong_priority_length_is_a_stream_error(feed: Feed, size: int):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), frame(PRIORITY, 0, 1, bytes(size)))
    peer.assert_reset(1, FRAME_SIZE_ERROR)
    assert peer.cancelled == {1: FRAME_SIZE_ERROR}


@pytest.mark.requirement("A3", "A8", "A21", "A15")
@three_ways
@pytest.mark.parametrize("wrong", [frame(PRIORITY, 0, 1, b""), priority(1, 1), window_update(1, 0), headers(1, b"")])
def test_a_stream_error_resets_a_static_call_whose_data_has_not_arrived(feed: Feed, wrong: bytes):
    peer = Peer(feed).send(headers(1, request_block()), wrong, data(1, grpc_message(b"world"), end_stream=True))
    assert peer.result(1).headers is None
    peer.assert_reset(1, FRAME_SIZE_ERROR, PROTOCOL_ERROR)
    assert len([got for got in peer.replies.frames if got.kind == RST_STREAM]) == 1


# --- types and stream ids ------------------------------------------------------------------------------------


@pytest.mark.requirement("A4")
@three_ways
@pytest.mark.parametrize(
    "wrong",
    [
        data(0, b"x"),
        headers(0, request_block()),
        priority(0, 3),
        rst_stream(0),
        continuation(0, b"", end_headers=True),
        frame(SETTINGS, 0, 1),
        frame(SETTINGS, 1, 1),
        frame(PING, 0, 1, bytes(8)),
        frame(GOAWAY, 0, 1, bytes(8)),
        frame(PUSH_PROMISE, END_HEADERS, 1, (2).to_bytes(4, "big") + request_block()),
    ],
)
def test_a_frame_on_the_wrong_kind_of_stream_is_a_connection_error(feed: Feed, wrong: bytes):
    Peer(feed).send(headers(1, request_block(HANDLED)), wrong).assert_closed(PROTOCOL_ERROR)


@pytest.mark.requirement("A5")
@three_ways
def test_unknown_types_flags_settings_and_error_codes_are_ignored(feed: Feed):
    peer = Peer(feed).send(
        frame(0x0B, 0xFF, 0, b"anything"),
        frame(0xFF, 0, 77, b""),
        settings((0xFE03, 1), (0x99, 2**32 - 1)),
        frame(PING, 0xFE, 0, b"pingpong"),
        frame(HEADERS, END_HEADERS | 0xD2, 1, request_block(HANDLED)),
        frame(0x0C, 0, 1, b"x"),
        rst_stream(1, 0xDEADBEEF),
    )
    assert peer.replies.pongs == [b"pingpong"]
    assert peer.cancelled == {1: 0xDEADBEEF}
    assert peer.replies.settings_acks == 2
    peer.assert_alive()


@pytest.mark.requirement("A5")
@three_ways
def test_the_reserved_bit_is_ignored(feed: Feed):
    reserved = 1 << 31
    peer = Peer(feed).send(
        headers(1 | reserved, request_block()), data(1 | reserved, grpc_message(b"world"), end_stream=True)
    )
    peer.assert_answered(1)
    peer.send(window_update(0, 1 | reserved)).assert_alive()


@pytest.mark.requirement("A5", "A7")
@three_ways
def test_an_unknown_frame_type_inside_a_header_block_is_a_connection_error(feed: Feed):
    block = request_block()
    peer = Peer(feed).send(headers(1, block[:9], end_headers=False), frame(0x42, 0, 1), continuation(1, block[9:]))
    peer.assert_closed(PROTOCOL_ERROR)


# --- padding and priority ------------------------------------------------------------------------------------


@pytest.mark.requirement("A6", "C-java-priority", "C-nghttp-padding")
@three_ways
@pytest.mark.parametrize("pad", [None, 0, 1, 255])
@pytest.mark.parametrize("depends", [None, 0, 77])
def test_padding_and_priority_fields_are_removed_from_a_request(feed: Feed, pad: int | None, depends: int | None):
    peer = Peer(feed).send(
        headers(3, request_block(), pad=pad, depends=depends), data(3, grpc_message(b"world"), end_stream=True, pad=pad)
    )
    peer.assert_answered(3)


@pytest.mark.requirement("A6", "A7", "C-nghttp-padding")
@three_ways
def test_a_padded_request_that_continues_in_continuation_frames_is_answered(feed: Feed):
    block = request_block()
    peer = Peer(feed).send(
        headers(1, block[:20], pad=7, depends=0, end_headers=False),
        continuation(1, block[20:40]),
        continuation(1, block[40:], end_headers=True),
        data(1, pad=3),
        data(1, grpc_message(b"world"), pad=9, end_stream=True),
    )
    peer.assert_answered(1)


@pytest.mark.requirement("A6")
@three_ways
@pytest.mark.parametrize("payload", [b"\x01", b"\x05abcd", b"\xffabcd"])
@pytest.mark.parametrize("kind", [DATA, HEADERS])
def test_padding_as_long_as_the_payload_is_a_connection_error(feed: Feed, kind: int, payload: bytes):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)))
    peer.send(frame(kind, PADDED | END_HEADERS | END_STREAM, 1 if kind == DATA else 3, payload))
    peer.assert_closed(PROTOCOL_ERROR)


@pytest.mark.requirement("A6")
@three_ways
@pytest.mark.parametrize(
    "wrong",
    [
        frame(DATA, PADDED, 1),
        frame(HEADERS, PADDED | END_HEADERS, 3),
        frame(HEADERS, PRIORITISED | END_HEADERS, 3, b"\0\0\0\0"),
        frame(HEADERS, PRIORITISED | PADDED | END_HEADERS, 3, b"\x02\0\0\0\0\0\0"),
    ],
)
def test_cut_padding_or_priority_fields_are_a_connection_error(feed: Feed, wrong: bytes):
    peer = Peer(feed).send(headers(1, request_block(HANDLED)), wrong)
    peer.assert_closed(FRAME_SIZE_ERROR, PROTOCOL_ERROR)


# --- header blocks in parts ----------------------------------------------------------------------------------


@pytest.mark.requirement("A7")
@three_ways
@pytest.mark.parametrize(
    "between",
    [
        ping(),
        settings(),
        data(1, b"x"),
        headers(3, request_block()),
        continuation(3, b""),
        window_update(0, 1),
        priority(1),
        rst_stream(1),
        goaway(),
    ],
)
def test_any_other_frame_inside_a_header_block_is_a_connection_error(feed: Feed, between: bytes):
    block = request_block()
    peer = Peer(feed).send(
        headers(1, block[:9], end_headers=False), between, continuation(1, block[9:], end_headers=True)
    )
    peer.assert_closed(PROTOCOL_ERROR)
    assert not peer.calls


@pytest.mark.requirement("A7")
@three_ways
@pytest.mark.parametrize("before", [b"", headers(1, request_block(HANDLED)), call(1)])
def test_a_continuation_without_a_header_block_is_a_connection_error(feed: Feed, before: bytes):
    Peer(feed).send(before, continuation(1, b"", end_headers=True)).assert_closed(PROTOCOL_ERROR)


# --- settings ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A16")
@three_ways
def test_each_settings_frame_is_applied_in_order_and_acknowledged(feed: Feed):
    size = INITIAL_WINDOW_SIZE
    peer = Peer(feed).send(
        settings((size, 0), (size, 3)), settings(), headers(1, request_block(HANDLED), end_stream=True)
    )
    assert peer.replies.settings_acks == 3
    peer.answer(1, b"hello")
    assert bytes(peer.result(1).body) == grpc_message(b"hello")[:3]
    peer.send(settings((size, 65535)))
    peer.assert_answered(1, b"hello")


@pytest.mark.requirement("A16")
@three_ways
def test_an_ack_without_settings_is_a_connection_error(feed: Feed):
    peer = Peer(feed)
    peer.send(SETTINGS_ACK)
    peer.assert_closed(PROTOCOL_ERROR)


@pytest.mark.requirement("A17")
@three_ways
@pytest.mark.parametrize(
    ("setting", "value", "code"),
    [
        (ENABLE_PUSH, 2, PROTOCOL_ERROR),
        (ENABLE_PUSH, 2**32 - 1, PROTOCOL_ERROR),
        (MAX_FRAME_SIZE, 2**14 - 1, PROTOCOL_ERROR),
        (MAX_FRAME_SIZE, 2**24, PROTOCOL_ERROR),
        (INITIAL_WINDOW_SIZE, 2**31, FLOW_CONTROL_ERROR),
    ],
)
@pytest.mark.parametrize("where", ["first", "later"])
def test_a_setting_out_of_its_range_is_a_connection_error(feed: Feed, setting: int, value: int, code: int, where: str):
    wrong = settings((0x7777, 1), (setting, value))
    peer = Peer(feed, hello=PREFACE + wrong) if where == "first" else Peer(feed).send(wrong)
    peer.assert_closed(code)


@pytest.mark.requirement("A17")
@three_ways
def test_the_edges_of_the_ranges_of_settings_are_legal(feed: Feed):
    for value in ((ENABLE_PUSH, 0), (ENABLE_PUSH, 1), (MAX_FRAME_SIZE, 2**14), (MAX_FRAME_SIZE, 2**24 - 1)):
        Peer(feed).send(settings(value)).assert_alive()
    Peer(feed).send(settings((INITIAL_WINDOW_SIZE, 2**31 - 1))).assert_alive()


@pytest.mark.requirement("B-settings-abuse")
def test_more_than_32_settings_in_a_frame_end_the_connection():
    peer = Peer().send(settings(*((0x1000 + n, n) for n in range(2700))))
    peer.assert_closed(ENHANCE_YOUR_CALM)
