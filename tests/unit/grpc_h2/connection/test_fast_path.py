"""The fast path for one call per read: `Connection.answer_one` has the same effects as `receive_data`, in fewer
steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import h2_wire as wire
from tests.support.h2_peer import GUARDED, STATIC, Keys, some_router

from grpc_h2.connection.connection import Connection
from grpc_h2.connection.limits import Limits
from grpc_h2.wire.frames import frame

LIMITS = replace(Limits(), initial_window=65_535, connection_window=65_535, max_concurrent_streams=3)
HANDLED = b"/t.S/Handled"
PATHS = (STATIC, GUARDED, HANDLED)


class Pair:
    """Two connections with the same input, of which only one may take the fast path."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self.keys = Keys("Bearer k1")
        self.shorter = 0
        self.now = 1000.0
        self.both: list[Connection] = []
        for _ in range(2):
            self.both.append(Connection(some_router(self.keys), limits, self.now))
        self.send(wire.HELLO + wire.SETTINGS_ACK)

    def send(self, octets: bytes) -> bytes:
        """Feed both connections, and compare output, events and state. Returns the output."""
        self.now += 0.001
        one, other = self.both
        said = one.answer_one(octets, self.now)
        if said is None:
            kinds = [type(event) for event in one.receive_data(octets, self.now)]
            said = b"".join(one.data_to_send())
        else:
            self.shorter += 1
            kinds = []
        assert kinds == [type(event) for event in other.receive_data(octets, self.now)]
        assert said == b"".join(other.data_to_send())
        for each in self.both:
            each._fast_path.settle()
        first, second = (state(each) for each in self.both)
        assert first == second
        return said


def state(thing: Any, depth: int = 4) -> Any:
    """The comparable state of ``thing``, without the budgets of a turn."""
    if isinstance(thing, dict):
        return {getattr(key, "id", key): state(value, depth - 1) for key, value in thing.items()}
    names = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    if depth == 0 or not names or isinstance(thing, Limits):
        return thing if isinstance(thing, int | float | bytes | str | list | tuple | None) else type(thing)
    left_out = {"_alone_at", "calls_left", "work_left", "_router", "_decoder", "router_epoch"}
    return {name: state(getattr(thing, name), depth - 1) for name in names if name not in left_out}


def call(stream: int, path: bytes = STATIC, message: bytes = b"world") -> bytes:
    return wire.call(stream, path, message)


def _last_data(stream: int) -> bytes:
    return wire.data(stream, wire.grpc_message(b"x"), end_stream=True)


def _long_call(stream: int, message: bytes = b"as long as is said") -> bytes:
    """A call that announces 23 octets for a message of any length."""
    block = wire.request_block(STATIC, (b"content-length", b"23"))
    return wire.headers(stream, block) + wire.data(stream, wire.grpc_message(message), end_stream=True)


@pytest.mark.requirement("D7")
@pytest.mark.slow
def test_a_known_call_takes_the_fast_path() -> None:
    pair = Pair()
    pair.send(wire.window_update(0, 1 << 24))
    pair.send(call(1))
    assert pair.shorter == 0, "its block has to be decoded first"
    for stream in range(3, 603, 2):
        pair.send(call(stream, message=b"x" * 300))
    assert 290 < pair.shorter < 300, "sometimes a WINDOW_UPDATE has to be sent"


UNTIL_NOW = {
    "connection window": (wire.window_update(0, 5),),
    "a PING": (wire.ping(),),
    "a smaller window": (wire.settings((4, 5)),),
    "a larger window": (wire.settings((4, 1 << 20)),),
    "a smaller table": (wire.settings((1, 0)),),
    "GOAWAY": (wire.goaway(),),
    "a call under way": (wire.call(3, HANDLED),),
    "as many calls as may be": (wire.call(3, HANDLED), wire.call(5, HANDLED), wire.call(7, HANDLED)),
    "HEADERS alone": (wire.headers(3, wire.request_block(STATIC)),),
    "several HEADERS and a PING": (
        b"".join(wire.headers(stream, wire.request_block(STATIC)) for stream in (3, 5, 7)) + wire.ping(),
    ),
    "a part of a frame": (wire.headers(3, wire.request_block(STATIC))[:7],),
    "a part of a block": (wire.headers(3, wire.request_block(STATIC), end_headers=False),),
    "a window for the next stream": (wire.window_update(3, 1),),
    "a reset": (wire.rst_stream(1),),
    "two calls in one": (wire.call(3) + wire.call(5),),
    "a call and a half": (wire.call(3) + wire.call(5)[:20],),
    "a call and one octet": (wire.call(3) + b"\0",),
    "DATA of another stream": (wire.headers(3, wire.request_block(STATIC)) + _last_data(1),),
    "an id left out": (wire.call(5),),
    "an old id": (wire.call(1),),
    "another length": (_long_call(3), _long_call(5), _long_call(7, b"shorter")),
}  # fmt: skip


@pytest.mark.requirement("D7")
@pytest.mark.parametrize("before", UNTIL_NOW.values(), ids=UNTIL_NOW)
def test_both_paths_give_the_same_answer_after_any_earlier_input(before: tuple[bytes, ...]) -> None:
    pair = Pair()
    pair.send(call(1))
    for octets in before:
        pair.send(octets)
    for _ in range(4):
        pair.send(call(pair.both[0]._streams.last_id + 2))
    pair.send(call(3))


@pytest.mark.requirement("D7", "A20")
def test_the_fast_path_stays_within_the_connections_window() -> None:
    pair = Pair()
    pair.send(wire.settings((4, 1 << 20)))
    for stream in range(1, 501, 2):
        pair.send(call(stream, message=b"x" * 300))
    assert 200 < pair.shorter < 240, "then 65,535 octets are used up"


@pytest.mark.requirement("D7", "A21", "C-grpcio-window-updates")
@pytest.mark.parametrize("increment", [0, 1, 5 | 1 << 31, 2**31 - 1 - 65_535, 2**31 - 65_535, 2**31 - 1])
def test_a_window_update_after_headers_has_the_same_effect_in_a_separate_read(increment: int) -> None:
    headers = wire.headers(3, wire.request_block(STATIC))
    update = frame(8, 0, 3, increment.to_bytes(4, "big"))
    both = [Connection(some_router(Keys()), LIMITS, 1000.0) for _ in range(2)]
    replies = []
    for connection, reads in zip(
        both, ([headers + update + _last_data(3)], [headers + update[:9], update[9:], _last_data(3)]), strict=True
    ):
        connection.receive_data(wire.HELLO + wire.SETTINGS_ACK + call(1), 1000.0)
        for read in reads:
            connection.receive_data(read, 1000.0)
        replies.append(b"".join(connection.data_to_send()))
        connection.check_invariants()
    assert replies[0] == replies[1]
    assert state(both[0]) == state(both[1])


@pytest.mark.requirement("D7", "A10")
def test_the_largest_stream_ids_take_the_long_path() -> None:
    pair = Pair()
    pair.send(call(1))
    for each in pair.both:
        each._streams.use_up_to(2**31 - 1)
    pair.send(call(2**31 + 1))  # the reserved bit, and stream 1
    assert pair.shorter == 0


def _large_message(connection: Connection, now: float) -> None:
    connection.send_message(connection._streams.open[5], bytes(1 << 20))
    assert connection.data_to_send()


def _left(connection: Connection, now: float) -> None:
    connection.drain(now)
    connection.data_to_send()
    connection.receive_data(wire.ping(b"draining", ack=True), now)
    connection.data_to_send()


IN_BETWEEN: dict[str, Callable[[Connection, float], object]] = {
    "keys": lambda connection, now: connection._headers._router.forget_authorizations(),
    "a drain": lambda connection, now: connection.drain(now),
    "a finished drain": _left,
    "a pause": lambda connection, now: connection.pause_writing(now),
    "the end": lambda connection, now: connection.close(0, ""),
    "much to send": _large_message,
}


@pytest.mark.requirement("D7", "D4")
@pytest.mark.parametrize("change", IN_BETWEEN.values(), ids=IN_BETWEEN)
def test_both_paths_give_the_same_answer_after_any_change_by_the_server(
    change: Callable[[Connection, float], object],
) -> None:
    pair = Pair()
    pair.send(wire.settings((4, 1 << 24)) + wire.window_update(0, 1 << 24))
    pair.send(call(1))
    pair.send(call(3))
    pair.send(call(5, HANDLED))
    for each in pair.both:
        change(each, pair.now)
    before = pair.shorter
    pair.send(call(7))
    assert pair.shorter == before
    pair.send(call(9))


@pytest.mark.requirement("D7", "A48")
def test_a_call_on_the_fast_path_answers_the_keepalive_ping() -> None:
    pair = Pair()
    pair.send(call(1))
    pair.now += LIMITS.keepalive_time + 1
    for each in pair.both:
        each.tick(pair.now)
        each.data_to_send()
    assert pair.both[0]._timers.asked_at == pair.now
    pair.send(call(3))
    assert pair.shorter == 1
    assert pair.both[0]._timers.asked_at == inf


PIECES = st.one_of(
    st.tuples(st.sampled_from(PATHS), st.sampled_from([b"world", b"", b"x" * 300])).map(lambda what: ("call", what)),
    st.sampled_from(
        [
            wire.window_update(0, 70_000), wire.ping(), wire.settings((4, 1 << 20)), wire.settings((4, 10)),
            wire.settings((1, 0)), wire.rst_stream(1), b"\0", wire.goaway(),
        ]
    ).map(lambda octets: ("octets", octets)),
    st.integers(1, 60).map(lambda size: ("cut", size)),
)  # fmt: skip


@pytest.mark.requirement("D7")
@given(st.lists(PIECES, max_size=30))
def test_both_paths_give_the_same_answer_in_any_order_of_input(pieces: list[tuple[str, Any]]) -> None:
    pair = Pair()
    stream = 1
    for kind, what in pieces:
        if kind == "call":
            pair.send(call(stream, *what))
            stream += 2
        elif kind == "octets":
            pair.send(what)
        else:
            whole = call(stream)
            pair.send(whole[:what])
            pair.send(whole[what:])
            stream += 2
