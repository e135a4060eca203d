"""The sockets of the admin port: the waits of each step of a connection, and the behaviour of a full or exhausted
port."""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
from http import HTTPStatus
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually, turns

from definition_server.control_plane import admin_port
from definition_server.control_plane.admin_http import Answer, Request, text_answer

pytestmark = pytest.mark.usefixtures("nothing_is_left")

LARGE = text_answer(HTTPStatus.OK, "x" * 4_000_000)
"""More octets than a socket accepts at once."""


class Shares:
    """Delays a network for as long as the test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.charged: list[tuple[str, float]] = []

    def wait(self, network: str, now: float) -> float:
        return self.seconds

    def charge(self, network: str, cpu_seconds: float, now: float) -> None:
        self.charged.append((network, cpu_seconds))


class Loop:
    """A wrapper of the running loop that remembers its timers."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.timers: list[tuple[float, asyncio.TimerHandle]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def call_later(self, seconds: float, callback: Any) -> asyncio.TimerHandle:
        timer = self._loop.call_later(seconds, callback)
        self.timers.append((seconds, timer))
        return timer

    def due(self) -> list[float]:
        """The seconds of each timer that was not cancelled."""
        return [seconds for seconds, timer in self.timers if not timer.cancelled()]


class Port:
    """The part of a port that a connection uses."""

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


class Client:
    """One end of a connection. The port has the other end."""

    def __init__(self, port: Port) -> None:
        self.socket, served = socket.socketpair()
        self.socket.setblocking(False)
        self.served = served
        self.connection = admin_port._Connection(cast(Any, port), served, ("192.0.2.1", 4711))

    def received(self) -> bytes | None:
        """The octets that have arrived since the last call: empty at the end of the connection, None if nothing has
        arrived."""
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


async def test_a_new_connection_of_a_network_over_its_share_is_not_read_at_first(port: Port, client: Client) -> None:
    port.shares.seconds = 3600.0
    client.socket.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    client.connection.begin()
    await turns()
    assert not port.shares.charged
    client.connection._too_late()
    assert (client.received() or b"").startswith(b"HTTP/1.1 429 ")
    assert port.faults == ["its address has used more than its share of CPU time"]
    assert client.received() == b""


async def test_a_fault_of_a_client_is_reported_with_its_address_and_an_ordinary_request_is_not(
    port: Port, client: Client
) -> None:
    client.connection.begin()
    client.socket.sendall(b"BREW / HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: (client.received() or b"").startswith(b"HTTP/1.1 501 "), "the answer")
    assert port.faults == ["refused: 501 Only GET and HEAD are answered."]
    other = Client(port)
    other.connection.begin()
    other.socket.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: (other.received() or b"").startswith(b"HTTP/1.1 200 "), "the answer")
    assert len(port.faults) == 1
    other.close()


async def test_a_connection_that_closes_leaves_no_timer(port: Port, client: Client) -> None:
    port.shares.seconds = 3600.0
    client.connection.begin()
    assert port.loop.due() == [5.0, 3600.0]
    client.connection.close()
    client.connection.close()
    assert port.loop.due() == []
    assert port.ended_connections == 1


async def test_each_step_of_a_connection_has_its_own_time_limit_and_cancels_the_previous_one(
    port: Port, client: Client
) -> None:
    port.answer = LARGE
    client.connection.begin()
    assert port.loop.due() == [5.0]
    client.socket.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: client.connection._unsent, "a part of the answer is sent")
    assert port.loop.due() == [10.0]
    await eventually(lambda: client.received() == b"", "the whole answer is sent, and the server ends its side")
    assert port.loop.due() == [1.0]
    client.socket.sendall(b"more")
    await turns()
    assert client.served.fileno() >= 0, "the client has not ended its side"
    client.socket.shutdown(socket.SHUT_WR)
    await eventually(lambda: client.served.fileno() < 0, "the connection is closed at once")
    assert port.loop.due() == []


async def test_the_rest_of_an_answer_is_sent_when_the_socket_has_room(port: Port, client: Client) -> None:
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


# -- the port ----------------------------------------------------------------------------------------------------------


class Listening:
    """A listening socket whose ``accept`` first raises the given errors, and then returns the given clients."""

    def __init__(self) -> None:
        self.failures: list[int] = []
        self.clients: list[Any] = []
        self.socket = socket.create_server(("127.0.0.1", 0))

    def accept(self) -> Any:
        if self.failures:
            raise OSError(self.failures.pop(0), "a fault")
        if not self.clients:
            raise BlockingIOError
        return self.clients.pop(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.socket, name)


class Open:
    """An open port on such a socket."""

    def __init__(self) -> None:
        self.listening = Listening()
        self.answer: Any = text_answer(HTTPStatus.OK, "yes\n")
        self.port = admin_port.AdminPort(cast(Any, self.listening), lambda request: self.answer(request))
        self.port.open()
        self.loop = self.port.loop = cast(Any, Loop())
        self.clients: list[socket.socket] = []

    def connect(self, *addresses: str) -> list[socket.socket]:
        """Clients with these addresses, accepted at once."""
        ours = []
        for number, address in enumerate(addresses):
            client, served = socket.socketpair()
            client.setblocking(False)
            self.listening.clients.append((served, (address, 1000 + number)))
            ours.append(client)
        self.clients += ours
        self.port._accept()
        return ours

    def close(self) -> None:
        if self.listening.fileno() >= 0:
            self.port.close()
        for client in self.clients:
            client.close()


@pytest.fixture
async def opened() -> Any:
    made = Open()
    yield made
    made.close()
    assert not made.loop.due()


async def test_after_a_connection_that_failed_before_it_was_accepted_the_next_one_is_accepted(opened: Open) -> None:
    opened.listening.failures = [errno.ECONNABORTED]
    opened.connect("192.0.2.1")
    assert len(opened.port._all()) == 1
    assert opened.port._count == 1


async def test_sixteen_connections_are_accepted_at_once_and_others_in_the_next_turn(opened: Open) -> None:
    opened.connect(*["192.0.2.1"] * 17)
    assert len(opened.port._all()) == 16
    opened.port._accept()
    assert len(opened.port._all()) == 17


@pytest.mark.parametrize("fault", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
async def test_without_a_free_descriptor_connections_are_closed_and_accepting_pauses(
    opened: Open, logs: LogLines, fault: int
) -> None:
    (held,) = opened.connect("192.0.2.1")
    watched: list[str] = []
    opened.loop.remove_reader = lambda file: watched.append("removed") if file is opened.listening else None
    opened.loop.add_reader = lambda file, _: watched.append("added") if file is opened.listening else None
    opened.listening.failures = [fault]
    opened.port._accept()
    assert held.recv(100).startswith(b"HTTP/1.1 503 ")
    assert opened.port._all() == []
    assert watched == ["removed"]
    assert opened.loop.due() == [0.1]
    assert logged(logs, "The admin port cannot accept connections for now", error="a fault", log_level="error")
    await eventually(lambda: watched == ["removed", "added"], "the port accepts again")
    opened.loop.timers.clear()
    del opened.loop.remove_reader, opened.loop.add_reader


async def test_a_port_that_was_closed_in_its_pause_stays_closed(opened: Open) -> None:
    opened.listening.failures = [errno.EMFILE]
    opened.port._accept()
    opened.loop.timers.pop()[1].cancel()
    opened.port.close()
    opened.port._resume()


async def test_a_full_port_closes_the_oldest_connection_of_the_network_that_holds_most(
    opened: Open, logs: LogLines
) -> None:
    opened.port._limit = 3
    first, second, third = opened.connect("192.0.2.1", "192.0.2.2", "192.0.2.2")
    opened.connect("192.0.2.3")
    assert second.recv(100).startswith(b"HTTP/1.1 503 ")
    assert opened.port._count == 3
    (line,) = logged(logs, "The admin port is full; its oldest connection was closed", log_level="warning")
    assert (line["peer"], line["connections"], line["of_its_network"]) == ("192.0.2.2:1001", 3, 2)
    for client in (first, third):
        with pytest.raises(BlockingIOError):
            client.recv(1)
    assert opened.port._connections.keys() == {"192.0.2.1", "192.0.2.2", "192.0.2.3"}


async def test_a_bug_in_a_page_is_logged_and_answered(opened: Open, logs: LogLines) -> None:
    opened.answer = lambda _: 1 // 0
    (client,) = opened.connect("192.0.2.1")
    client.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    await eventually(lambda: opened.port._all()[0]._answered, "the answer")
    assert client.recv(100).startswith(b"HTTP/1.1 500 ")
    (line,) = logged(logs, "Unexpected failure in a page of the admin port", log_level="error")
    assert line["page"] == "/livez"
    assert isinstance(line["exc_info"], ZeroDivisionError)
    line["exc_info"] = None


async def test_faults_of_clients_are_logged_a_limited_number_of_times(opened: Open, logs: LogLines) -> None:
    for _ in range(100):
        opened.port.report("192.0.2.1:7", "malformed HTTP: 400 Bad Request")
    lines = logged(logs, "A client of the admin port broke its protocol", peer="192.0.2.1:7", log_level="info")
    assert 0 < len(lines) < 100
    assert lines[0]["error"] == "malformed HTTP: 400 Bad Request"


@pytest.mark.parametrize(("soft", "limit"), [(1024, 64), (511, 63), (100, 12), (8, 2), (resource.RLIM_INFINITY, 64)])
async def test_connections_hold_an_eighth_of_the_files_at_most(
    soft: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, resource.RLIM_INFINITY))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        assert admin_port.AdminPort(listening, lambda _: text_answer(HTTPStatus.OK, ""))._limit == limit
