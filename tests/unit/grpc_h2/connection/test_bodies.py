"""The octets that a connection holds of its calls' messages, and when they are given back to the windows."""

from __future__ import annotations

import pytest
from tests.support.h2_peer import HANDLED, STATIC, some_router
from tests.support.h2_wire import grpc_message, request_fields

from grpc_h2.connection.abuse import Abuse
from grpc_h2.connection.bodies import MESSAGE_OVERHEAD, Bodies
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream
from grpc_h2.connection.timers import Timers
from grpc_h2.rpc.messages import frame_message
from grpc_h2.wire.errors import ConnectionFault

MESSAGE = grpc_message(bytes(100))


class Bench:
    def __init__(self, path: bytes = HANDLED, *, limits: Limits | None = None, **fields: bytes) -> None:
        self.limits = limits or Limits()
        self.timers = Timers(self.limits, 100.0, 0.0)
        self.abuse = Abuse(self.limits, self.timers)
        self.bodies = Bodies(self.limits, self.abuse)
        self.route = some_router().route(tuple(request_fields(path, **fields)), 200)
        self.streams = [self.open()]

    def open(self) -> Stream:
        return Stream(1, self.route, 1000, 2**20, self.bodies.reader(self.route))

    def feed(self, content: bytes, padding: int = 0, stream: int = 0) -> tuple[list[int], int, int | None]:
        """Returns the lengths of the complete messages, the octets that are given back, and the status of a failure."""
        messages, free, fault = self.bodies.feed(self.streams[stream], content, len(content) + padding)
        self.bodies.check_invariants(self.streams)
        return [len(message) for message in messages], free, None if fault is None else fault.status


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_message_for_a_handler_holds_its_window_until_it_is_taken(bench: Bench) -> None:
    assert bench.feed(MESSAGE * 2, padding=7) == ([100, 100], 7, None)
    assert bench.bodies.unread == 2 * (100 + MESSAGE_OVERHEAD)
    assert bench.streams[0].owed == 2 * len(MESSAGE)
    assert bench.bodies.consume(bench.streams[0], 100) == len(MESSAGE)
    assert bench.bodies.unread == 100 + MESSAGE_OVERHEAD
    assert bench.bodies.consume(bench.streams[0], 100) == len(MESSAGE)
    assert (bench.bodies.unread, bench.streams[0].owed, bench.streams[0].credit) == (0, 0, 217)


def test_the_octets_of_an_unfinished_message_are_given_back_and_counted(bench: Bench) -> None:
    assert bench.feed(MESSAGE[:80]) == ([], 80, None)
    assert bench.bodies.partial == 80
    assert bench.feed(MESSAGE[80:] + MESSAGE[:10]) == ([100], 0, None)
    assert bench.bodies.partial == 10
    assert bench.streams[0].owed == 35


def test_the_message_of_a_static_call_holds_no_window() -> None:
    bench = Bench(STATIC)
    assert bench.feed(MESSAGE[:80]) == ([], 80, None)
    assert bench.feed(MESSAGE[80:]) == ([], 25, None)
    assert bench.streams[0].message == bytes(100)
    assert bench.bodies.unread == 100 + MESSAGE_OVERHEAD
    assert bench.streams[0].owed == 0


@pytest.mark.parametrize("how", ["no reader", "closed"])
def test_data_without_a_reader_is_given_back(bench: Bench, how: str) -> None:
    bench.streams[0].body_read() if how == "no reader" else bench.streams[0].close()
    assert bench.feed(MESSAGE, padding=3) == ([], len(MESSAGE) + 3, None)
    assert bench.streams[0].credit == len(MESSAGE) + 3


def test_unfinished_messages_above_the_limit_are_not_given_back_to_their_windows() -> None:
    bench = Bench(limits=Limits(max_message=100, max_buffered=200, max_unread=10**6))
    bench.streams += [bench.open() for _ in range(3)]
    half = MESSAGE[:100]
    assert bench.feed(half, stream=0) == ([], 100, None)
    assert bench.feed(half, stream=1) == ([], 100, None), "200 octets may be held"
    assert bench.feed(half[:1], stream=2) == ([], 0, None)
    assert bench.streams[2].owed == 1
    assert bench.feed(b"", padding=9, stream=3) == ([], 9, None), "this one holds nothing"


@pytest.mark.parametrize(("most", "status"), [(3 * 228, None), (3 * 228 - 1, 8)])
def test_a_call_fails_if_its_untaken_messages_pass_the_limit(most: int, status: int | None) -> None:
    bench = Bench(limits=Limits(max_message=100, max_buffered=200, max_unread=most))
    lengths, free, found = bench.feed(MESSAGE * 3)
    assert found == status
    assert lengths == [100] * (3 if status is None else 2), "those before it are delivered"
    assert free == (0 if status is None else 3 * len(MESSAGE))


def test_the_end_of_a_call_gives_back_what_it_holds(bench: Bench) -> None:
    bench.feed(MESSAGE * 2 + MESSAGE[:50])
    assert bench.bodies.discard(bench.streams[0]) == 2 * len(MESSAGE)
    assert (bench.bodies.partial, bench.bodies.unread) == (0, 0)
    assert bench.bodies.discard(bench.streams[0]) == 0


# -- glitches and work -------------------------------------------------------------------------------------------------


def frames_endured(bench: Bench, content: bytes, most: int = 20_000) -> int:
    """How many DATA frames with ``content`` the client may send before the connection ends."""
    number = 0
    while number < most:
        try:
            bench.bodies.feed(bench.streams[0], content, len(content))
        except ConnectionFault:
            return number
        number += 1
    return number


@pytest.mark.parametrize(("octets", "endured"), [(1, 100), (63, 100), (64, 2000)])
def test_fifty_tiny_frames_inside_a_message_are_one_glitch(octets: int, endured: int) -> None:
    bench = Bench(limits=Limits(glitches=2, glitches_per_second=0.0, max_header_list=16384))
    bench.feed(grpc_message(bytes(2**20))[: 5 + 64])
    assert frames_endured(bench, bytes(octets), 2000) == pytest.approx(endured, abs=1)


@pytest.mark.parametrize(("octets", "work"), [(0, 0), (255, 0), (256, 2), (1000, 4)])
def test_a_message_of_256_octets_or_more_costs_work(bench: Bench, octets: int, work: int) -> None:
    before = bench.abuse.work_left
    bench.feed(grpc_message(bytes(octets)))
    assert before - bench.abuse.work_left == work


@pytest.mark.parametrize(("number", "work"), [(1, 0), (2, 2), (5, 5)])
def test_several_messages_in_one_frame_cost_work(bench: Bench, number: int, work: int) -> None:
    before = bench.abuse.work_left
    bench.feed(grpc_message(b"x") * number)
    assert before - bench.abuse.work_left == work


def test_a_message_that_inflates_more_than_a_hundredfold_is_ten_glitches() -> None:
    bench = Bench(limits=Limits(glitches=25, glitches_per_second=0.0), grpc_encoding=b"gzip")
    bomb = frame_message(bytes(100_000), compress=True)
    assert len(bomb) * 100 < 100_000
    bench.streams[0].receive(len(bomb), len(bomb), end_stream=False)
    assert frames_endured(bench, bomb, 10) == 2
    honest = Bench(limits=Limits(glitches=25, glitches_per_second=0.0), grpc_encoding=b"gzip")
    message = frame_message(bytes(range(256)) * 40, compress=True)
    assert len(message) * 100 > 256 * 40
    honest.streams[0].receive(len(message) * 10, len(message) * 10, end_stream=False)
    assert frames_endured(honest, message, 10) == 10


def test_a_message_beyond_the_limit_fails_its_call_and_costs_ten_glitches_and_work() -> None:
    bench = Bench(limits=Limits(max_message=1024, max_buffered=2048, glitches=25, glitches_per_second=0.0))
    before = bench.abuse.work_left
    assert bench.feed(grpc_message(bytes(1025))[:100]) == ([], 100, 8)
    assert before - bench.abuse.work_left == 1024 // 256
    bench.streams[0] = bench.open()
    assert bench.feed(grpc_message(bytes(1025))[:100]) == ([], 100, 8)
    bench.streams[0] = bench.open()
    with pytest.raises(ConnectionFault, match="messages beyond the limit"):
        bench.feed(grpc_message(bytes(1025))[:100])


def test_an_invalid_message_costs_no_work(bench: Bench) -> None:
    before = bench.abuse.work_left
    assert bench.feed(b"\2\0\0\0\0") == ([], 5, 13)
    assert bench.abuse.work_left == before


def test_a_refused_call_has_no_reader() -> None:
    refused = some_router().route(tuple(request_fields(b"no path")), 200)
    assert refused.request is None
    assert Bench().bodies.reader(refused) is None
