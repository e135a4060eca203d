"""Attacks on memory by many bodies, answers and connections, each while a victim uses another connection."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest
from tests.support.h2_attack import Attacker, Beside, peak_memory, pieces_of
from tests.support.h2_peer import HANDLED, STATIC, Peer, some_router
from tests.support.h2_wire import (
    HELLO,
    INITIAL_WINDOW_SIZE,
    SETTINGS_ACK,
    call,
    data,
    grpc_message,
    headers,
    request_block,
    settings,
    window_update,
)

from grpc_h2.connection.connection import Connection
from grpc_h2.connection.limits import Limits
from grpc_h2.static.answers import StaticAnswer
from grpc_h2.static.routes import Router

pytestmark = pytest.mark.slow

BUCKET = Limits().glitches
MIB = 1024 * 1024
BODY = grpc_message(b"world")


def ids(count: int) -> range:
    return range(1, 2 * count + 1, 2)


# --- bodies ----------------------------------------------------------------------------------------------------------


@pytest.mark.thorough  # takes seconds
@pytest.mark.requirement("B-tiny-data")
def test_tiny_data_frames_take_bounded_memory():
    with Beside() as attacker:
        prefix = grpc_message(bytes(4 * MIB - 5))[:5]
        attacker.flood([headers(1, request_block(HANDLED)) + data(1, prefix)])
        attack = pieces_of(data(1, b"x") * 20_000)
        assert peak_memory(lambda: attacker.flood(attack)) < MIB // 2


@pytest.mark.requirement("B-tiny-data")
def test_an_honest_stream_of_small_messages_is_served():
    peer = Peer().send(headers(1, request_block(HANDLED)))
    for _ in range(50):
        peer.send(data(1, grpc_message(b"twenty octets or so.")) * 1000)
    assert len(peer.received[1]) == 50_000
    peer.assert_alive()


@pytest.mark.requirement("B-tiny-data")
def test_an_honest_upload_in_small_frames_is_served():
    peer = Peer().send(headers(1, request_block(HANDLED)))
    body = grpc_message(bytes(MIB))
    peer.send(*(data(1, piece) for piece in pieces_of(body, 1000)))
    assert [len(message) for message in peer.received[1]] == [MIB]
    peer.assert_alive()


@pytest.mark.requirement("B-unread-messages")
@pytest.mark.parametrize("path", [HANDLED, STATIC])
def test_unfinished_messages_of_all_streams_take_bounded_memory(path: bytes):
    with Beside() as attacker:
        block, body = request_block(path), grpc_message(bytes(4 * MIB))[: 3 * MIB]
        attack = (
            piece
            for stream in ids(40)
            for piece in (headers(stream, block), *(data(stream, part) for part in pieces_of(body, 16384)))
        )
        assert peak_memory(lambda: attacker.flood(attack)) < 24 * MIB


@pytest.mark.thorough  # takes seconds
@pytest.mark.requirement("B-unread-messages")
def test_whole_messages_of_static_calls_that_do_not_end_take_bounded_memory():
    with Beside() as attacker:
        block, body = request_block(STATIC), grpc_message(bytes(4 * MIB - 5))
        attack = (
            piece
            for stream in ids(40)
            for piece in (headers(stream, block), *(data(stream, part) for part in pieces_of(body, 16384)))
        )
        assert peak_memory(lambda: attacker.flood(attack)) < 32 * MIB


@pytest.mark.requirement("B-unread-messages")
@pytest.mark.parametrize("size", [0, 2, *(pytest.param(size, marks=pytest.mark.thorough) for size in (1, 10, 1000))])
def test_messages_that_no_handler_takes_use_bounded_memory(size: int):
    with Beside() as attacker:
        count = 16_000 // (size + 5)
        attack = data(1, grpc_message(b"m" * size) * count)
        attacker.flood([headers(1, request_block(HANDLED))])

        def flood() -> None:
            for _ in range(400):
                attacker.flood([attack], keep=True)

        # Messages as objects in a handler's queue; 8 octets each where Python shares the object.
        assert peak_memory(flood) < 24 * MIB
        assert attacker.received < 200_000


@pytest.mark.requirement("B-inflate-bomb", "A39")
def test_a_gzip_bomb_takes_bounded_memory():
    bomb = grpc_message(gzip.compress(bytes(64 * MIB)), 1)
    block = request_block(HANDLED, grpc_encoding=b"gzip")
    attack = [headers(1, block), *(data(1, part) for part in pieces_of(bomb, 16384))]
    with Beside() as attacker:
        assert peak_memory(lambda: attacker.flood(attack)) < 12 * MIB
        assert attacker.received == 0


@pytest.mark.requirement("B-inflate-bomb", "B-long-reads")
@pytest.mark.parametrize("path", [HANDLED, STATIC])
def test_inflating_is_spread_over_several_reads(path: bytes):
    bomb = grpc_message(gzip.compress(bytes(4 * MIB - 5)), 1)
    block = request_block(path, grpc_encoding=b"gzip")
    flood = b"".join(headers(stream, block) + data(stream, bomb, end_stream=True) for stream in ids(30))
    attacker = Attacker()
    connection = attacker.connection
    connection.receive_data(flood, 0.0)
    turns = 1
    while connection.backlog and turns < 100:
        connection.data_to_send()
        connection.receive_data(b"", 0.0)
        turns += 1
    assert turns >= 10, "120 MiB were inflated in fewer turns of the loop"


@pytest.mark.requirement("B-inflate-bomb", "A39")
def test_a_request_that_inflates_above_the_limit_of_its_method_ends_with_resource_exhausted():
    most, router = 16 * 1024, some_router()
    router.limit_requests(STATIC.decode(), most)
    block = request_block(STATIC, grpc_encoding=b"gzip")
    peer = Peer(router=router).send(
        settings((INITIAL_WINDOW_SIZE, MIB)), window_update(0, MIB)
    )  # the answer is as long as the request
    for stream, octets in ((1, most), (3, most + 1)):
        peer.send(headers(stream, block), data(stream, grpc_message(gzip.compress(bytes(octets)), 1), end_stream=True))
    peer.assert_answered_with(1, 0)
    peer.assert_answered_with(3, 8)
    bomb = data(5, grpc_message(gzip.compress(bytes(4 * MIB - 5)), 1), end_stream=True)
    assert peak_memory(lambda: peer.send(headers(5, block), bomb)) < MIB
    peer.assert_alive()


@pytest.mark.requirement("B-slow-read")
def test_large_answers_held_back_by_a_closed_window_are_not_copied():
    router = Router()
    answer = StaticAnswer.unary(bytes(8 * MIB))
    router.add_static_unary("/t.S/Get", lambda message: answer)
    attacker = Attacker(router)
    attack = [settings((INITIAL_WINDOW_SIZE, 0)), *(call(stream) for stream in ids(300))]
    assert peak_memory(lambda: attacker.flood(attack)) < 2 * MIB


@pytest.mark.requirement("B-slow-read")
def test_a_stream_above_the_high_water_mark_is_not_writable_until_the_window_opens():
    peer = Peer().send(settings((INITIAL_WINDOW_SIZE, 0)), headers(1, request_block(HANDLED), end_stream=True))
    stream = peer.calls[1]
    peer.connection.send_initial_metadata(stream, ())
    sent = 0
    while stream.writable and sent < 1000:
        peer.connection.send_message(stream, bytes(16_384))
        sent += 1
    assert sent <= 1 + Limits().high_water // 16_384
    peer.send(window_update(1, MIB), window_update(0, MIB))
    assert stream.writable
    assert any(type(event).__name__ == "Writable" for event in peer.events + peer.connection.take_events())


# --- many connections ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("B-slow-client")
def test_an_idle_connection_takes_less_than_8_kib():
    router, limits = some_router(), Limits()

    def open_connections() -> list[Connection]:
        connections = []
        for _ in range(500):
            connection = Connection(router, limits, 0.0)
            connection.receive_data(HELLO + SETTINGS_ACK + call(1), 0.0)
            connection.data_to_send()
            connections.append(connection)
        return connections

    assert peak_memory(open_connections) / 500 < 8192


@pytest.mark.thorough  # takes seconds
@pytest.mark.requirement("B-made-you-reset")
def test_the_memory_of_reset_streams_is_bounded():
    limits = Limits(glitches=10**9)
    attacker = Attacker(limits=limits)
    block = request_block(HANDLED)

    def past(first: int) -> Callable[[], Attacker]:
        reset = (headers(stream, block) + window_update(stream, 0) for stream in range(first, first + 24_000, 6))
        return lambda: attacker.flood(reset)

    past(1)()
    assert peak_memory(past(24_001)) < MIB // 2


@pytest.mark.requirement("D5")
def test_requests_that_all_differ_take_bounded_memory():
    attacker = Attacker()

    def many() -> Attacker:
        return attacker.flood(
            headers(stream, request_block(STATIC, (b"x-request-id", b"%d" % stream), (b"pad", b"p" * 300)))
            + data(stream, grpc_message(b"%d" % stream + b"q" * 200), end_stream=True)
            for stream in ids(10_000)
        )

    assert peak_memory(many) < 12 * MIB
