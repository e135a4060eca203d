"""Attacks on a connection, each while a victim uses another connection. The cost of an attack is limited, and the
attack ends.

Time does not advance during an attack, so that every figure is that of the worst burst.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.h2_attack import Attacker, Beside, cpu, peak_memory, pieces_of
from tests.support.h2_peer import HANDLED, STATIC, Peer
from tests.support.h2_wire import (
    ENHANCE_YOUR_CALM,
    HELLO,
    INITIAL_WINDOW_SIZE,
    REFUSED_STREAM,
    SETTINGS_ACK,
    call,
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
    priority,
    request_block,
    rst_stream,
    settings,
    window_update,
)

from grpc_h2.connection.limits import Limits

BUCKET = Limits().glitches
MIB = 1024 * 1024
BODY = grpc_message(b"world")


def ids(count: int) -> range:
    return range(1, 2 * count + 1, 2)


# --- resets ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("B-rapid-reset", "B-bucket")
@pytest.mark.parametrize("path", [HANDLED, STATIC])
def test_rapid_reset_overflows_the_bucket(path: bytes):
    block = request_block(path)
    attack = b"".join(headers(stream, block) + rst_stream(stream) for stream in ids(20_000))
    with Beside() as attacker:
        attacker.flood([attack])
        assert attacker.code == ENHANCE_YOUR_CALM
        assert attacker.goaway
        assert attacker.started <= BUCKET + 100
        assert attacker.most_started_in_a_turn <= 33


@pytest.mark.requirement("B-rapid-reset", "A14")
def test_rapid_reset_frees_no_stream_while_handlers_run():
    block = request_block(HANDLED)
    attack = b"".join(headers(stream, block) + rst_stream(stream) for stream in ids(20_000))
    with Beside(slow_handlers=True) as attacker:
        attacker.flood([attack])
        assert attacker.most_running <= Limits().max_concurrent_streams
        assert attacker.code == ENHANCE_YOUR_CALM


@pytest.mark.requirement("B-rapid-reset")
def test_rapid_reset_costs_at_most_three_times_the_cpu_of_honest_calls():
    block = request_block(HANDLED)
    attack = b"".join(headers(stream, block) + rst_stream(stream) for stream in ids(20_000))
    honest = b"".join(
        headers(stream, request_block(n=b"%d" % stream)) + data(stream, BODY, end_stream=True) for stream in ids(3000)
    )
    assert cpu(lambda: Attacker().flood([attack])) < 3 * cpu(lambda: Attacker().flood([honest]))


UPPER = plain(b"Upper", b"x")
PROVOKED_RESETS: dict[str, Callable[[int], bytes]] = {
    "window update of zero": lambda stream: headers(stream, request_block(HANDLED)) + window_update(stream, 0),
    "window overflow": lambda stream: headers(stream, request_block(HANDLED)) + window_update(stream, 2**31 - 1),
    "priority length": lambda stream: headers(stream, request_block(HANDLED)) + frame(2, 0, stream, b""),
    "self-dependency": lambda stream: headers(stream, request_block(HANDLED), depends=stream),
    "self-dependent priority": lambda stream: headers(stream, request_block(HANDLED)) + priority(stream, stream),
    "data after the end": lambda stream: headers(stream, request_block(HANDLED), end_stream=True) + data(stream, b"x"),
    "headers after the end": lambda stream: headers(stream, request_block(HANDLED), end_stream=True) * 2,
    "data on a closed stream": lambda stream: call(stream) + data(stream, b"x"),
    "malformed fields": lambda stream: headers(stream, request_block(HANDLED) + UPPER, end_stream=True),
    "malformed fields of a static call": lambda stream: headers(stream, request_block() + UPPER) + data(stream, BODY),
    "no fields": lambda stream: headers(stream, b"", end_stream=True),
    "empty name": lambda stream: headers(stream, request_block() + plain(b"", b""), end_stream=True),
    "trailers without end": lambda stream: headers(stream, request_block(HANDLED)) * 2,
    "wrong length": lambda stream: headers(stream, request_block(content_length=b"1")) + data(stream, BODY),
    "short body": lambda stream: headers(stream, request_block(content_length=b"99"), end_stream=True),
}


@pytest.mark.requirement("B-made-you-reset", "B-bucket")
@pytest.mark.parametrize("name", PROVOKED_RESETS)
def test_provoked_resets_overflow_the_bucket(name: str):
    provoke = PROVOKED_RESETS[name]
    with Beside() as attacker:
        attacker.flood(provoke(stream) for stream in ids(3 * BUCKET))
        assert attacker.code == ENHANCE_YOUR_CALM
        assert attacker.started <= BUCKET + 100


@pytest.mark.requirement("B-bucket", "A14")
def test_refused_streams_overflow_the_bucket():
    with Beside(Limits(max_concurrent_streams=100)) as attacker:
        attacker.flood(headers(stream, request_block(HANDLED)) for stream in ids(3 * BUCKET))
        assert attacker.code == ENHANCE_YOUR_CALM
        assert attacker.most_running == 100


@pytest.mark.requirement("B-made-you-reset", "A45")
def test_resets_that_we_send_with_no_error_or_cancel_are_not_glitches():
    peer = Peer()
    for stream in ids(2 * BUCKET):
        peer.send(headers(stream, request_block(HANDLED)))
        if stream % 4 == 1:
            peer.answer(stream, status=5)
        else:
            peer.connection.cancel(peer.calls[stream])
            peer.connection.finished(peer.calls[stream])
            peer.read()
    for _ in range(40):
        peer.advance(1.1)
    assert {peer.result(stream).reset for stream in ids(2 * BUCKET)} == {0, 8}
    peer.assert_alive()


@pytest.mark.requirement("B-bucket", "B-rapid-reset")
@pytest.mark.parametrize(("share", "ends"), [(0.9, False), (1.1, True)], ids=["below", "above"])
def test_resets_below_the_refill_rate_of_the_bucket_are_tolerated_for_ever(share: float, ends: bool):
    limits = Limits(glitches=100, glitches_per_second=100.0)
    peer = Peer(limits=limits)
    for stream in ids(3000):
        peer.send(headers(stream, request_block(HANDLED)) + rst_stream(stream))
        peer.now += 1 / (share * limits.glitches_per_second)
        if peer.connection.terminated:
            break
    assert peer.connection.terminated == ends
    assert peer.code == (ENHANCE_YOUR_CALM if ends else None)


@pytest.mark.requirement("B-long-reads")
@pytest.mark.parametrize("between", [b"", window_update(0, 1)], ids=["calls", "and other frames"])
def test_a_long_read_is_answered_in_bounded_batches(between: bytes):
    connection = Attacker().connection
    flight = [call(stream) + between * (stream % 100 == 1) for stream in ids(3000)]
    connection.receive_data(b"".join(flight), 0.0)
    answered, turns = 0, 1
    while connection.backlog:
        assert len(connection.answered) <= Limits().answers_per_turn
        answered += len(connection.answered)
        connection.answered.clear()
        connection.data_to_send()
        connection.receive_data(b"", 0.0)
        turns += 1
    assert answered + len(connection.answered) == 3000
    assert turns >= 3000 // Limits().answers_per_turn


@pytest.mark.requirement("B-before-settings-ack", "A14")
def test_the_limit_of_streams_holds_before_our_settings_are_acknowledged():
    peer = Peer(hello=None)
    peer.send(HELLO, *(headers(stream, request_block(HANDLED)) for stream in ids(1000)), SETTINGS_ACK)
    limit = Limits().max_concurrent_streams
    assert len(peer.calls) == limit
    assert [peer.result(stream).reset for stream in ids(1000)[limit:]] == [REFUSED_STREAM] * (1000 - limit)
    assert peer.code is None


@pytest.mark.requirement("B-made-you-reset", "B-bucket")
@pytest.mark.parametrize("late", [data(1), data(1, b"x"), headers(1, indexed(2)), data(1, b"", pad=0)])
def test_frames_on_a_stream_that_we_reset_overflow_the_bucket(late: bytes):
    with Beside() as attacker:
        attacker.flood([headers(1, request_block(HANDLED)) + window_update(1, 0)])
        attacker.flood([late * 1000] * 20)
        assert attacker.code == ENHANCE_YOUR_CALM


# --- header blocks ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("B-continuation-flood")
@pytest.mark.parametrize("fragment", [b"", b"\x88", b"x" * 16384])
def test_a_continuation_flood_ends_within_nine_frames(fragment: bytes):
    with Beside() as attacker:
        opening = headers(1, plain(b"a", b"")[:2], end_headers=False)
        sent = 0

        def flood() -> None:
            nonlocal sent
            attacker.flood([opening])
            while attacker.code is None and sent < 1000:
                attacker.flood([continuation(1, fragment)])
                sent += 1

        assert peak_memory(flood) < MIB
        assert attacker.code == ENHANCE_YOUR_CALM
        assert sent <= 9


def in_frames(stream: int, block: bytes) -> bytes:
    """A block in HEADERS and as many CONTINUATION frames as its size needs."""
    parts = pieces_of(block, 16384)
    rest = [continuation(stream, part, end_headers=part is parts[-1]) for part in parts[1:]]
    return headers(stream, parts[0], end_stream=True, end_headers=len(parts) == 1) + b"".join(rest)


BOMBS = {
    "one large entry, many references": inserting(b"n", b"v" * 4000) + indexed(62) * 16_000,
    "many one-octet fields": plain(b"a", b"") * 600,
    "many references to a small entry": inserting(b"a", b"") + indexed(62) * 16_000,
    "cookie crumbs": inserting(b"cookie", b"a") + indexed(62) * 16_000,
    "static references": indexed(16) * 16_000,
    "duplicates of a pseudo-header": indexed(3) * 16_000,
    "trailers": b"",
}


@pytest.mark.requirement("B-hpack-bomb", "A28")
@pytest.mark.parametrize("name", BOMBS)
def test_a_header_bomb_is_stopped_while_it_is_decoded(name: str):
    bomb = BOMBS[name]
    with Beside() as attacker:
        if name == "trailers":
            attack = headers(1, request_block(HANDLED)) + in_frames(
                1, inserting(b"n", b"v" * 4000) + indexed(62) * 16_000
            )
        else:
            attack = in_frames(1, request_block(HANDLED) + bomb)
        assert peak_memory(lambda: attacker.flood([attack])) < 2 * MIB
        assert attacker.received == 0
        assert attacker.code is not None or attacker.octets_out > 0


@pytest.mark.requirement("B-hpack-bomb")
def test_a_header_bomb_costs_at_most_ten_times_the_cpu_of_honest_octets():
    bomb = in_frames(1, request_block(HANDLED) + inserting(b"a", b"") + indexed(62) * 16_000)
    honest = b"".join(call(stream) for stream in ids(200))
    once = cpu(lambda: [Attacker().flood([bomb]) for _ in range(10)]) / 10 / len(bomb)
    assert once < 10 * cpu(lambda: [Attacker().flood([honest]) for _ in range(10)]) / 10 / len(honest) + 1e-6


@pytest.mark.requirement("B-hpack-bomb")
def test_the_largest_header_lists_on_all_streams_take_bounded_memory():
    # 256 streams of 16 KiB, plus the memory of their fields as objects; the peer may send references to one entry.
    limits = Limits()
    value = b"v" * 1900
    block = request_block(HANDLED) + b"".join(plain(b"k%d" % n, value) for n in range(8))
    attack = [
        settings((INITIAL_WINDOW_SIZE, 0)),
        *(in_frames(stream, block) for stream in ids(limits.max_concurrent_streams)),
    ]
    with Beside() as attacker:
        assert peak_memory(lambda: attacker.flood(attack)) < 24 * MIB


# --- floods of small frames ------------------------------------------------------------------------------------------

FLOODS = {
    "PING": ping(),
    "SETTINGS": settings(),
    "window toggling": settings((INITIAL_WINDOW_SIZE, 0), (INITIAL_WINDOW_SIZE, 65535)),
    "PRIORITY": priority(99, 1),
    "self-dependent PRIORITY": priority(99, 99),
    "unknown frames": frame(0x77, 0, 0, b""),
    "RST_STREAM of a closed stream": rst_stream(1),
    "WINDOW_UPDATE of a closed stream": window_update(1, 1),
    "WINDOW_UPDATE of one octet": window_update(0, 1),
    "empty DATA": data(3),
    "padded empty DATA": data(3, pad=0),
}


@pytest.mark.requirement(
    "B-bucket", "B-reply-flood", "B-settings-abuse", "B-priority-flood", "B-empty-frames", "B-dribble"
)
@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_of_small_frames_ends_the_connection(name: str):
    with Beside() as attacker:
        attacker.flood([call(1), headers(3, request_block(HANDLED))])
        attacker.flood([FLOODS[name] * 1000] * 100)
        assert attacker.code == ENHANCE_YOUR_CALM
        assert attacker.octets_out < 100_000


@pytest.mark.requirement("B-settings-abuse")
def test_window_toggling_with_all_streams_open_costs_at_most_five_times_the_cpu_of_honest_calls():
    limit = Limits().max_concurrent_streams
    streams = b"".join(headers(stream, request_block(HANDLED)) for stream in ids(limit))
    toggles = settings(*((INITIAL_WINDOW_SIZE, number % 2 * 65535) for number in range(32)))
    honest = [b"".join(call(stream) for stream in ids(10_000))]
    with Beside() as attacker:
        attacker.flood([streams])
        spent = cpu(lambda: attacker.flood([toggles * 100] * 30))
        assert attacker.code == ENHANCE_YOUR_CALM
    assert spent < 5 * cpu(lambda: Attacker().flood(honest))


@pytest.mark.requirement("B-reply-flood")
@pytest.mark.parametrize("name", ["PING", "SETTINGS", "self-dependent PRIORITY", "RST_STREAM of a closed stream"])
def test_replies_that_are_never_read_take_bounded_memory(name: str):
    limits = Limits(glitches=10**9, max_ping_strikes=10**9)
    attacker = Attacker(limits=limits)
    attacker.flood([call(1)])
    flood = pieces_of(FLOODS[name] * 30_000)
    assert peak_memory(lambda: attacker.flood(flood, read=False)) < MIB
    assert attacker.drain() < 200_000


@pytest.mark.requirement("B-slow-read")
def test_answers_that_are_never_read_take_bounded_memory():
    attacker = Attacker()
    attacker.flood([window_update(0, 2**31 - 1 - 65535)])
    block = request_block()
    flood = pieces_of(b"".join(headers(stream, block) + data(stream, BODY, end_stream=True) for stream in ids(20_000)))
    assert peak_memory(lambda: attacker.flood(flood, read=False)) < MIB
    assert attacker.connection.backlog


@pytest.mark.requirement("B-bucket")
@pytest.mark.parametrize("name", ["goaways", "ping acks"])
def test_goaway_and_ping_ack_floods_take_no_memory(name: str):
    frames = {"goaways": goaway(), "ping acks": ping(ack=True)}
    with Beside() as attacker:
        assert peak_memory(lambda: attacker.flood([frames[name] * 1000] * 50)) < MIB
        assert attacker.code in (None, ENHANCE_YOUR_CALM)


# --- frames on streams that have ended -------------------------------------------------------------------------------


@pytest.mark.requirement("B-rapid-reset")
@pytest.mark.parametrize("together", [True, False], ids=["in one read", "behind the answer"])
def test_a_client_may_reset_every_stream_after_its_answer(together: bool):
    peer = Peer().send(window_update(0, 2**30))
    for stream in range(1, 10_001, 2):
        if together:
            peer.send(call(stream) + rst_stream(stream))
        else:
            peer.send(call(stream)).send(rst_stream(stream))
        assert peer.code is None
    peer.assert_alive()


@pytest.mark.requirement("B-rapid-reset")
def test_endless_resets_of_ended_streams_end_the_connection():
    peer = Peer().send(call(1))
    sent = 0
    while peer.code is None and sent < 20_000:
        peer.send(rst_stream(1) * 100)
        sent += 100
    peer.assert_closed(ENHANCE_YOUR_CALM)
    assert sent > 3000, "far above the number of an honest client"


@pytest.mark.requirement("B-rapid-reset")
def test_skipped_stream_ids_allow_no_frames_on_ended_streams():
    peer = Peer().send(call(1), call(2**31 - 50_001))
    for _ in range(100):
        if peer.code is None:
            peer.send(rst_stream(1) * 100)
    peer.assert_closed(ENHANCE_YOUR_CALM)
