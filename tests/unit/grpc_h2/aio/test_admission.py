"""Which connections a server keeps, and which it closes to make room, by address, idleness, and the trust in their
peers."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import ExitStack
from math import inf
from typing import Any

import grpc
import pytest
from tests.support.h2_wire import HELLO, SETTINGS_ACK, data, grpc_message, headers, ping, request_block
from tests.support.native_server import LOOPS, RawClient, ServerThread, handlers
from tests.support.polling import until
from tests.unit.grpc_h2.aio.test_protocol import FakeTransport, loop_until

from grpc_h2.aio import admission as module
from grpc_h2.aio.admission import Admission, Refusal, Trust, network_of
from grpc_h2.aio.protocol import Http2Protocol
from grpc_h2.aio.server import Server
from grpc_h2.static.answers import StaticAnswer


class Loop:
    """A clock, and timers that the test runs."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[tuple[float, Any, tuple[Any, ...]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, seconds: float, function: Any, *arguments: Any) -> Any:
        self.timers.append((self.now + seconds, function, arguments))
        return None

    def advance(self, seconds: float) -> None:
        self.now += seconds
        while due := [timer for timer in self.timers if timer[0] <= self.now]:
            for timer in due:
                self.timers.remove(timer)
                timer[1](*timer[2])


class One:
    """A connection."""

    def __init__(self) -> None:
        self.trust = Trust.STRANGER
        self.active_at = -inf
        self.drained = 0
        self.dismissed: list[Refusal] = []

    def drain(self) -> None:
        self.drained += 1

    def dismiss(self, refusal: Refusal) -> None:
        self.dismissed.append(refusal)


class House:
    """An `Admission`, its clock and its connections."""

    def __init__(self, **settings: Any) -> None:
        self.loop = Loop()
        self.admission = Admission(**settings)

    def connect(self, *, client: bool = False, peer: str = "10.0.0.1") -> One:
        self.loop.now += 0.001
        one = One()
        assert self.admission.admit(one, peer, self.loop) is None
        if client:
            one.trust = Trust.CLIENT
            self.admission.vouched(one)
        return one

    def refused(self, peer: str = "10.0.0.1") -> Refusal | None:
        return self.admission.admit(One(), peer, self.loop)


def test_an_address_holds_no_more_than_its_limit_and_others_are_not_affected() -> None:
    house = House(max_per_peer=2)
    first, _ = house.connect(), house.connect()
    assert house.refused() is Refusal.PEER_LIMIT
    house.connect(peer="10.0.0.2")
    house.admission.gone(first)
    house.connect()
    assert house.refused() is Refusal.PEER_LIMIT


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.1", "::ffff:10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8:0:1::1", "2001:db8:0:2::1", False),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::9", True),
        ("fe80::1%eth0", "fe80::2%eth0", True),
        ("::1", "::2", True),
    ],
)
def test_ipv6_addresses_are_one_peer_by_network(one: str, other: str, same: bool) -> None:
    assert (network_of(one) == network_of(other)) is same


def test_a_full_server_closes_the_stranger_that_is_idle_for_the_longest_time() -> None:
    house = House(max_connections=4)
    client, active, idle, probe = house.connect(client=True), house.connect(), house.connect(), house.connect()
    probe.trust = Trust.PROBE
    house.admission.vouched(probe)
    house.loop.now += 10
    active.active_at = house.loop.now - 2
    house.connect()
    assert idle.dismissed == [Refusal.EVICTED]
    house.connect()
    assert probe.dismissed == [Refusal.EVICTED]
    house.connect()
    assert active.dismissed == [Refusal.EVICTED]
    assert not client.dismissed
    assert house.admission.held == 4


def test_no_connection_is_closed_while_there_is_room() -> None:
    house = House(max_connections=100)
    held = [house.connect() for _ in range(100)]
    house.loop.now += 1000
    assert not any(one.dismissed for one in held)


def test_a_server_full_of_clients_accepts_a_probe_and_further_probes() -> None:
    house = House(max_connections=3)
    clients = [house.connect(client=True) for _ in range(3)]
    for _ in range(10 * module.RESERVE):
        probe = house.connect()
        probe.trust = Trust.PROBE
        house.admission.vouched(probe)
        house.admission.gone(probe)
    assert not any(one.dismissed or one.drained for one in clients)


def test_a_connection_in_the_reserve_is_closed_if_its_peer_makes_no_authorized_call_in_time() -> None:
    house = House(max_connections=1)
    house.connect(client=True)
    silent, probe, late = house.connect(), house.connect(), house.connect(client=True)
    probe.trust = Trust.PROBE
    house.admission.vouched(probe)
    house.loop.advance(module.RESERVE_SECONDS + 0.1)
    assert silent.dismissed == [Refusal.NO_CALL]
    assert not probe.dismissed
    assert not late.dismissed


def test_clients_that_fill_the_reserve_are_drained_for_later_connections() -> None:
    house = House(max_connections=1)
    regular = house.connect(client=True)
    reserved = [house.connect(client=True) for _ in range(module.RESERVE)]
    late = [house.connect(client=True) for _ in range(module.RESERVE)]
    assert [one.drained for one in reserved] == [1] * module.RESERVE
    assert not regular.drained
    assert house.refused() is Refusal.FULL
    house.admission.gone(late[0])
    house.connect()


def test_a_stranger_is_drained_after_the_first_call_timeout_and_then_closed() -> None:
    house = House(first_call_timeout=30.0)
    silent, probe, client = house.connect(), house.connect(), house.connect(client=True)
    probe.trust = Trust.PROBE
    house.admission.vouched(probe)
    for _ in range(31):
        house.loop.advance(1.0)
    assert (silent.drained, probe.drained, client.drained) == (1, 0, 0)
    for _ in range(31):
        house.loop.advance(1.0)
    assert silent.dismissed == [Refusal.NO_CALL]
    house.admission.gone(silent)
    house.loop.advance(100)
    assert not house.loop.timers, "nothing wakes the server for clients alone"


def test_an_ended_connection_leaves_no_entry_and_no_timer() -> None:
    house = House(max_connections=2, max_per_peer=5, first_call_timeout=30.0)
    for _ in range(1000):
        one = house.connect()
        assert house.admission.gone(one)
        assert not house.admission.gone(one)
    parts = (getattr(house.admission, name) for name in ("_peers", "_per_peer", "_strangers", "_unproven", "_reserve"))
    assert not any(parts)


# --- with sockets ----------------------------------------------------------------------------------------------------


async def health(request: bytes, context: Any) -> bytes:
    return b"S"


def prepare(server: Server) -> None:
    def authorize(metadata: Any) -> StaticAnswer | None:
        return None if ("key", "right") in metadata else StaticAnswer.failure(16, "no")

    server.add_static_unary("/t.S/Get", lambda request: StaticAnswer.unary(b"S"), authorize)
    server.add_generic_rpc_handlers((handlers(health=grpc.unary_unary_rpc_method_handler(health)),))


def trust(path: str) -> Trust:
    return Trust.PROBE


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


def keyed(stream: int, path: bytes, *fields: tuple[bytes, bytes]) -> bytes:
    return headers(stream, request_block(path, *fields)) + data(stream, grpc_message(b"x"), end_stream=True)


def ask(client: RawClient, stream: int, path: bytes = b"/t.S/Get", *fields: tuple[bytes, bytes]) -> None:
    client.send(keyed(stream, path, *fields))
    client.until(lambda: client.replies.stream(stream).ended)


def test_idle_strangers_are_closed_for_probes_and_clients_and_named_in_the_log(
    loop: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_SECONDS", 0.0)
    with (
        caplog.at_level(logging.INFO, "grpc_h2"),
        ServerThread(loop, prepare, max_connections=3, trust=trust) as server,
        ExitStack() as stack,
    ):
        idle = []
        for _ in range(3):  # one after the other, so that the first has been idle for the longest time
            one = stack.enter_context(RawClient(server.port))
            one.until(lambda one=one: one.replies.settings_acks)
            idle.append(one)
            begun = time.monotonic()
            until(lambda begun=begun: time.monotonic() > begun + 0.002, "uvloop's clock advances")
        calls: tuple[tuple[Any, ...], ...] = ((b"/t.S/health",), (b"/t.S/Get", (b"key", b"right")))
        # Connections are opened one after the other, because a new connection is also an idle stranger until its call
        # arrives.
        for one, call in zip(idle[:2], calls, strict=True):
            ask(stack.enter_context(RawClient(server.port)), 1, *call)
            one.until_eof()
            assert b"place of this idle connection" in one.replies.goaways[0][2]
        until(lambda: server.server.connections == 3, "the other connections are held")
        idle[2].send(ping())
    lines = [record for record in caplog.records if record.getMessage() == "A connection was closed"]
    assert len(lines) == 2
    assert all(line.__dict__["peer"].startswith("ipv4:127.0.0.1:") for line in lines)


def test_a_connection_that_is_already_closing_makes_room_without_a_log_line(
    loop: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_SECONDS", 0.0)
    with (
        caplog.at_level(logging.ERROR),
        ServerThread(loop, prepare, max_connections=2, trust=trust) as server,
        ExitStack() as stack,
    ):
        for _ in range(2 * (module.RESERVE + 2)):
            broken = stack.enter_context(RawClient(server.port, b"\0" * 64))
            broken.until_eof()  # the test keeps its own end open
        probe = stack.enter_context(RawClient(server.port))
        ask(probe, 1, b"/t.S/health")
    assert [record.getMessage() for record in caplog.records] == []


def test_an_address_above_its_limit_gets_goaway(loop: Any) -> None:
    with (
        ServerThread(loop, prepare, max_connections_per_peer=1, trust=trust) as server,
        RawClient(server.port) as first,
    ):
        ask(first, 1, b"/t.S/health")
        with RawClient(server.port, b"") as second:
            second.until_eof()
            assert b"from this address" in second.replies.goaways[0][2]
        ask(first, 3, b"/t.S/health")


def test_a_stranger_gets_goaway_after_the_first_call_timeout_and_a_client_does_not(loop: Any) -> None:
    with ServerThread(loop, prepare, first_call_timeout=0.5, trust=trust) as server, ExitStack() as stack:
        wrong, right, silent = (stack.enter_context(RawClient(server.port)) for _ in range(3))
        ask(wrong, 1)
        ask(right, 1, b"/t.S/Get", (b"key", b"right"))
        silent.until(lambda: silent.replies.goaways)
        wrong.until(lambda: wrong.replies.goaways)
        ask(right, 3, b"/t.S/Get", (b"key", b"right"))
        assert not right.replies.goaways


async def test_a_strangers_later_reads_are_deferred_and_a_clients_are_not() -> None:
    server = Server(trust=trust)
    prepare(server)
    await server.start()
    found = {}
    for key in (b"right", b"wrong"):
        transport = FakeTransport()
        protocol = Http2Protocol(server, asyncio.get_running_loop())
        protocol.connection_made(transport)
        protocol.data_received(HELLO + SETTINGS_ACK)
        for stream in range(1, 41, 2):
            protocol.data_received(keyed(stream, b"/t.S/Get", (b"key", key)))
            await loop_until(lambda transport=transport: transport.is_reading())
        transport.writes.clear()
        protocol.data_received(keyed(41, b"/t.S/Get", (b"key", key)))
        found[key] = len(transport.writes)
        await loop_until(lambda transport=transport: bool(transport.writes))
    assert found == {b"right": 1, b"wrong": 0}
    await server.stop(0)
