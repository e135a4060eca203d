"""A connection of the admin port whose network has used more than its share: nothing of it is read meanwhile."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any, cast

import pytest
from tests.support.leftovers import nothing_left
from tests.support.loop import eventually

from definition_server.control_plane import admin_port
from definition_server.control_plane.admin_http import Answer, Request, text_answer

LARGE = text_answer(HTTPStatus.OK, "x" * 4_000_000)
"""More than a socket takes at once."""


class Shares:
    """Lets a network wait for as long as the test says."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.charged: list[tuple[str, float]] = []

    def wait(self, network: str, now: float) -> float:
        return self.seconds

    def charge(self, network: str, cpu_seconds: float, now: float) -> None:
        self.charged.append((network, cpu_seconds))


class Loop:
    """The running loop; remembers its timers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.timers: list[asyncio.TimerHandle] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, seconds: float, callback: Any) -> asyncio.TimerHandle:
        self.timers.append(self._loop.call_later(seconds, callback))
        return self.timers[-1]

    def due(self) -> list[float]:
        """In how many seconds each timer is due that was not cancelled, to a tenth."""
        return [round(timer.when() - self._loop.time(), 1) for timer in self.timers if not timer.cancelled()]


class Port:
    """What a connection needs of its port."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.shares = Shares()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.ended_connections = 0
        self.answer = text_answer(HTTPStatus.OK, "yes\n")

    def respond(self, request: Request) -> Answer:
        self.requests.append(request.path)
        return self.answer

    def report(self, peer: str, fault: str) -> None:
        self.faults.append(fault)

    def ended(self, _: object) -> None:
        self.ended_connections += 1


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left():
        yield


class Client:
    """One end of a connection; the port has the other."""

    def __init__(self, port: Port) -> None:
        self.socket, served = socket.socketpair()
        self.socket.setblocking(False)
        self.served = served
        self.connection = admin_port._Connection(cast(Any, port), served, ("192.0.2.1", 4711))

    def received(self) -> bytes | None:
        """What has come since the last time; empty at the end, None where nothing has come."""
        try:
            return self.socket.recv(65536)
        except BlockingIOError:
            return None

    def close(self) -> None:
        self.connection.close()
        self.socket.close()


@pytest.fixture
async def port() -> Port:
    return Port()


@pytest.fixture
async def client(port: Port) -> Any:
    made = Client(port)
    yield made
    made.close()


async def turns() -> None:
    """Far more turns of the loop than an answer takes."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_request_is_answered_and_its_time_charged_to_its_network(port: Port, client: Client) -> None:
    client.connection.begin()
    client.socket.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: (client.received() or b"").startswith(b"HTTP/1.1 200 "), "the answer")
    assert port.requests == ["/livez"]
    assert {network for network, _ in port.shares.charged} == {"192.0.2.1"}
    assert all(0 <= seconds < 5 for _, seconds in port.shares.charged)


async def test_a_network_over_its_share_is_read_again_only_after_its_wait(port: Port, client: Client) -> None:
    client.connection.begin()
    port.shares.seconds = 3600.0
    client.socket.sendall(b"GET /livez ")
    await eventually(lambda: len(port.shares.charged) >= 2, "the first octets are read")
    read = len(port.shares.charged)
    client.socket.sendall(b"HTTP/1.1\r\nHost: a\r\n\r\n")
    await turns()
    assert len(port.shares.charged) == read, "it waits"
    assert not port.requests
    port.shares.seconds = 0.0
    client.connection.begin()
    await eventually(lambda: port.requests == ["/livez"], "the request, after its wait")
    await eventually(lambda: (client.received() or b"").startswith(b"HTTP/1.1 200 "), "the answer")


async def test_a_network_over_its_share_is_not_read_from_the_beginning(port: Port, client: Client) -> None:
    port.shares.seconds = 3600.0
    client.socket.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    client.connection.begin()
    await turns()
    assert not port.shares.charged
    client.connection._too_late()
    assert (client.received() or b"").startswith(b"HTTP/1.1 429 ")
    assert port.faults == ["its address has used more than its share of CPU time"]
    assert client.received() == b""


async def test_a_connection_that_closes_leaves_no_timer(port: Port, client: Client) -> None:
    port.shares.seconds = 3600.0
    client.connection.begin()
    assert port.loop.due() == [5.0, 3600.0]
    client.connection.close()
    client.connection.close()
    assert port.loop.due() == []
    assert port.ended_connections == 1


async def test_each_step_of_a_connection_has_its_own_time_and_cancels_the_one_before(
    port: Port, client: Client
) -> None:
    port.answer = LARGE
    client.connection.begin()
    assert port.loop.due() == [5.0]
    client.socket.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: client.connection._unsent, "a part of the answer is sent")
    (seconds,) = port.loop.due()
    assert 9 < seconds <= 10
    await eventually(lambda: client.received() == b"", "all of it is taken, and the server ends its side")
    (seconds,) = port.loop.due()
    assert 0 < seconds <= 1
    client.socket.sendall(b"more")
    await turns()
    assert client.served.fileno() >= 0, "the client has not ended its side"
    client.socket.shutdown(socket.SHUT_WR)
    await eventually(lambda: client.served.fileno() < 0, "closed at once")
    assert port.loop.due() == []


async def test_an_answer_that_is_not_taken_is_sent_on_when_there_is_room(port: Port, client: Client) -> None:
    port.answer = LARGE
    client.connection.begin()
    client.socket.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: client.connection._unsent, "a part is sent")
    taken = bytearray()

    def ended() -> bool:
        octets = client.received()
        taken.extend(octets or b"")
        return octets == b""

    await eventually(ended, "the whole answer")
    assert taken.endswith(b"\r\n\r\n" + LARGE.body)


async def test_an_evicted_connection_is_refused_unless_its_answer_is_on_the_way(port: Port, client: Client) -> None:
    client.connection.begin()
    client.connection.evict()
    assert (client.received() or b"").startswith(b"HTTP/1.1 503 ")
    assert client.received() == b""
    other = Client(port)
    port.answer = LARGE
    other.connection.begin()
    other.socket.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: other.connection._unsent, "a part is sent")
    other.connection.evict()
    taken = bytearray()
    while octets := other.received():
        taken += octets
    assert taken.startswith(b"HTTP/1.1 200 ")
    assert b"503" not in taken
    other.close()


@pytest.mark.parametrize(
    ("address", "peer"), [("192.0.2.1", "192.0.2.1:7"), ("2001:db8::1", "[2001:db8::1]:7")], ids=["IPv4", "IPv6"]
)
async def test_a_peer_is_named_with_its_port(port: Port, address: str, peer: str) -> None:
    ours, theirs = socket.socketpair()
    connection = admin_port._Connection(cast(Any, port), ours, (address, 7))
    assert connection.peer == peer
    connection.close()
    theirs.close()
