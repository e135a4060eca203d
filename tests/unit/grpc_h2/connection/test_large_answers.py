"""A static answer of several DATA frames has the same octets whether it is kept ready or cut to fit the windows."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import STATIC, Peer
from tests.support.h2_wire import (
    DATA,
    HELLO,
    INITIAL_WINDOW_SIZE,
    MAX_FRAME_SIZE,
    SETTINGS_ACK,
    call,
    frame,
    ping,
    settings,
    split_frames,
    window_update,
)

from grpc_h2.connection.connection import Connection
from grpc_h2.connection.limits import Limits
from grpc_h2.static.answers import LARGEST_FRAMED, StaticAnswer
from grpc_h2.static.routes import Router

MEMORY = memoryview(bytes(range(256)) * 2000)
WIDE = (settings((INITIAL_WINDOW_SIZE, 2**31 - 1)), window_update(0, 2**30))
SIZES = (16_380, 32_763, 32_764, 100_000, 300_000, LARGEST_FRAMED - 5, LARGEST_FRAMED - 4)


def router() -> Router:
    """A router with a method whose answer has as many octets as the request asks for."""
    made = Router()
    made.add_static_unary(STATIC.decode(), lambda message: StaticAnswer.unary(MEMORY[: int(message)], int(message)))
    return made


def asked(stream: int, size: int) -> bytes:
    return call(stream, message=b"%d" % size)


@pytest.mark.requirement("A20", "D7")
@pytest.mark.parametrize("size", SIZES)
def test_a_ready_answer_equals_the_same_answer_cut_by_flow_control(size: int) -> None:
    ready, cut = Peer(router=router()).send(*WIDE), Peer(router=router()).send(settings((INITIAL_WINDOW_SIZE, 10)))
    for peer in (ready, cut):
        peer.send(asked(1, size))
    assert not ready.connection._streams.open
    assert cut.connection._streams.open, "it waits for the window"
    cut.send(window_update(1, 2**30), window_update(0, 2**30))
    for peer in (ready, cut):
        peer.assert_answered(1, bytes(MEMORY[:size]))
        assert peer.connection.answered == [size]
    assert _joined(ready) == _joined(cut)


def _joined(peer: Peer) -> list[tuple[int, int, bytes]]:
    """Kind, flags and content of all frames that belong to a stream, with successive DATA frames joined."""
    made: list[tuple[int, int, bytes]] = []
    for each in peer.replies.frames:
        if each.stream and made and made[-1][0] == each.kind == DATA:
            made[-1] = (DATA, each.flags, made[-1][2] + each.payload)
        elif each.stream:
            made.append((each.kind, each.flags, each.payload))
    return made


@pytest.mark.requirement("A20")
def test_a_ready_answer_stays_within_the_windows_of_stream_and_connection() -> None:
    narrow = Peer(router=router()).send(settings((INITIAL_WINDOW_SIZE, 100_000)), window_update(0, 2**30))
    narrow.send(asked(1, 99_995), asked(3, 99_996))
    narrow.assert_answered(1, bytes(MEMORY[:99_995]))
    assert len(narrow.result(3).body) == 100_000
    narrow.send(window_update(3, 1)).assert_answered(3, bytes(MEMORY[:99_996]))

    shared = Peer(router=router()).send(
        settings((INITIAL_WINDOW_SIZE, 2**30)), window_update(0, 100_000 - 65_535 + 50_005)
    )
    shared.send(asked(1, 50_000), asked(3, 99_996))
    shared.assert_answered(1, bytes(MEMORY[:50_000]))
    assert len(shared.result(3).body) == 100_000
    shared.send(window_update(0, 1)).assert_answered(3, bytes(MEMORY[:99_996]))


@pytest.mark.requirement("B-bucket")
def test_two_window_updates_for_each_frame_of_a_ready_answer_are_allowed() -> None:
    peer = Peer(router=router()).send(*WIDE)
    for stream in range(1, 201, 2):
        peer.send(asked(stream, 300_000))
        peer.send(*[window_update(0, 1), window_update(stream, 1)] * 19)
    assert peer.code is None
    peer.assert_answered(199, bytes(MEMORY[:300_000]))


BETWEEN = {
    "nothing": b"",
    "PING": ping(),
    "WINDOW_UPDATE": window_update(0, 1),
    "an unknown frame": frame(0x99, 0, 0),
    "SETTINGS": settings((MAX_FRAME_SIZE, 65_536)),
}
"""Frames that the fast path leaves to ``inbound.py``, so that they end a batch."""


@pytest.mark.requirement("B-long-reads")
@pytest.mark.parametrize("between", BETWEEN.values(), ids=BETWEEN)
@pytest.mark.parametrize("size", [16_000, 100_000, 200_000, 262_000])
def test_a_turn_ends_when_ready_answers_have_spent_its_budget_of_octets(size: int, between: bytes) -> None:
    limits = Limits()
    connection = Connection(router(), limits, 0.0)
    connection.receive_data(HELLO + SETTINGS_ACK + b"".join(WIDE) + asked(1, size), 0.0)
    connection.data_to_send()
    octets = b""
    connection.receive_data(b"".join(asked(stream, size) + between for stream in range(3, 123, 2)), 0.1)
    while True:
        written = b"".join(connection.data_to_send())
        assert len(written) < limits.octets_per_turn + size + 3000
        octets += written
        if not connection.backlog:
            break
        connection.receive_data(b"", 0.2)
    assert len(connection.answered) == 61
    assert sum(len(each.payload) for each in split_frames(octets)[0] if each.kind == DATA) == 60 * (size + 5)


@pytest.mark.requirement("A20")
def test_ready_answers_leave_a_waiting_stream_its_share_of_the_connection_window() -> None:
    peer = Peer(router=router()).send(settings((INITIAL_WINDOW_SIZE, 2**31 - 1)), asked(1, 300_000))
    assert len(peer.result(1).body) == 65_535, "it waits for the window of the connection"
    for stream in range(3, 43, 2):
        peer.send(window_update(0, 60_005), asked(stream, 60_000))
    assert peer.result(1).ended
    peer.assert_answered(1, bytes(MEMORY[:300_000]))
