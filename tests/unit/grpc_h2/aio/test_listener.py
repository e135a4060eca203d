"""Accepting connections: addresses, shared sockets, accept policies, limits, and exhausted descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.h2_wire import call
from tests.support.native_server import LOOPS, RawClient, ServerThread
from tests.support.polling import until

from grpc_h2.aio import admission
from grpc_h2.aio.admission import Refusal
from grpc_h2.aio.handlers import MethodHandler
from grpc_h2.aio.listener import listen
from grpc_h2.aio.server import Server
from grpc_h2.static.answers import StaticAnswer

SECONDS = 10.0
GRACE = 600.0
"""Longer than a test takes: what happens in a test does not happen because this time is over."""


def prepare(server: Server) -> None:
    server.add_static_unary("/t.S/Get", lambda request: StaticAnswer.unary(b"S"))


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


def answered(port: int) -> bool:
    with RawClient(port) as client:
        client.send(call(1))
        client.until(lambda: client.replies.stream(1).ended)
        return client.replies.stream(1).messages == [b"S"]


class Policy:
    """An accept policy that accepts when the test allows it."""

    retry_seconds = 0.01

    def __init__(self) -> None:
        self.open = True
        self.asked = self.opened_count = self.closed_count = self.clients = 0
        self.refusals: list[Refusal] = []

    def may_accept(self) -> bool:
        self.asked += 1
        return self.open

    def opened(self) -> None:
        self.opened_count += 1

    def closed(self) -> None:
        self.closed_count += 1

    def vouched(self) -> None:
        self.clients += 1

    def unvouched(self) -> None:
        self.clients -= 1

    def refused(self, refusal: Refusal) -> None:
        self.refusals.append(refusal)


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0", "localhost:0", "[::1]:0", "[::]:0"])
def test_a_server_listens_on_every_form_of_address(loop: Any, address: str) -> None:
    if address.startswith("[") and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    ports: list[int] = []

    def add(server: Server) -> None:
        prepare(server)
        try:
            ports.append(server.add_insecure_port(address))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                pytest.skip("no IPv6 here")
            raise

    with ServerThread(loop, add, listen=False):
        target = address.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]").rpartition(":")[0]
        with grpc.insecure_channel(f"{target}:{ports[0]}") as channel:
            method: Any = channel.unary_unary("/t.S/Get")
            assert method(b"x", timeout=SECONDS) == b"S"


@pytest.mark.parametrize("address", ["127.0.0.1", ":", "host:", "::1:50051", "127.0.0.1:http", "127.0.0.1:-1"])
def test_an_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="not an address"):
        listen(address)


def test_a_taken_port_is_refused_and_a_port_that_was_just_closed_is_not(loop: Any) -> None:
    with ServerThread(loop, prepare) as server:
        with pytest.raises(OSError, match="in use"):
            listen(server.target)
        assert answered(server.port)
    listen(server.target).close()


# --- shared sockets and accept policies ------------------------------------------------------------------------------


def test_two_servers_accept_from_one_inherited_socket(loop: Any) -> None:
    with listen("127.0.0.1:0") as shared:
        port = shared.getsockname()[1]

        def adopt(server: Server) -> None:
            prepare(server)
            server.add_listener(shared.dup())

        with ServerThread(loop, adopt, listen=False) as one, ServerThread(loop, adopt, listen=False):
            assert all([answered(port) for _ in range(20)])  # noqa: C419 - all of them
            one.stop(0).result(SECONDS)
            assert all([answered(port) for _ in range(5)])  # noqa: C419 - all of them


def test_the_policy_is_informed_of_every_connections_beginning_and_end(loop: Any) -> None:
    policy = Policy()

    def add(server: Server) -> None:
        prepare(server)
        server.add_listener(listening, policy=policy)

    listening = listen("127.0.0.1:0")
    port = listening.getsockname()[1]
    with ServerThread(loop, add, listen=False):
        assert all([answered(port) for _ in range(5)])  # noqa: C419 - all of them
        with RawClient(port):
            until(lambda: policy.opened_count == 6, "the sixth connection is counted")
        until(lambda: policy.closed_count == 6, "all six connections have ended")
        assert policy.clients == 0


def test_a_refusal_of_the_policy_leaves_the_connection_waiting_without_a_busy_loop(loop: Any) -> None:
    policy = Policy()
    policy.open = False

    def add(server: Server) -> None:
        prepare(server)
        server.add_listener(listening, policy=policy)

    listening = listen("127.0.0.1:0")
    port = listening.getsockname()[1]
    with ServerThread(loop, add, listen=False) as server, RawClient(port) as client:
        client.send(call(1))
        until(lambda: policy.asked >= 3, "the policy is asked again")
        before, began = policy.asked, server.call(server.loop.time)
        until(lambda: server.call(server.loop.time) > began + 0.2, "0.2 s go by")
        assert policy.asked - before < 60, "the policy is asked at most once in retry_seconds"
        assert policy.opened_count == 0
        policy.open = True
        client.until(lambda: client.replies.stream(1).ended)
        assert policy.opened_count == 1


def test_a_stop_while_the_policy_refuses_leaves_nothing_behind(loop: Any) -> None:
    policy = Policy()
    policy.open = False
    listening = listen("127.0.0.1:0")
    port = listening.getsockname()[1]
    with (
        ServerThread(loop, lambda server: server.add_listener(listening, policy=policy), listen=False),
        RawClient(port),
    ):
        until(lambda: policy.asked >= 1, "the policy is asked")


def test_a_connection_that_arrives_during_a_stop_is_drained(loop: Any) -> None:
    """The connection is accepted before the stop and set up after it: the client gets GOAWAY long before the grace
    period is over, which would end with a GOAWAY in any case."""
    stops: list[asyncio.Task[None]] = []

    class Stopping(Policy):
        def opened(self) -> None:
            super().opened()
            stops.append(asyncio.ensure_future(running.server.stop(GRACE)))

    listening = listen("127.0.0.1:0")
    policy = Stopping()
    with ServerThread(loop, lambda server: server.add_listener(listening, policy=policy), listen=False) as running:
        with RawClient(listening.getsockname()[1]) as client:
            client.until(lambda: client.replies.goaways)
        until(lambda: policy.closed_count == 1, "the policy is notified of the end")
        until(lambda: stops[0].done(), "the stop")


# --- limits ----------------------------------------------------------------------------------------------------------


def client_of(port: int) -> RawClient:
    """A connection that has made a call."""
    client = RawClient(port)
    client.send(call(1))
    client.until(lambda: client.replies.stream(1).ended)
    return client


@pytest.mark.requirement("B-slow-client")
def test_clients_above_the_limit_and_its_reserve_are_refused_with_goaway_until_one_ends(
    loop: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission, "RESERVE", 0)
    with (
        caplog.at_level(logging.WARNING, "grpc_h2"),
        ServerThread(loop, prepare, max_connections=2) as server,
    ):
        with client_of(server.port), client_of(server.port):
            until(lambda: server.server.connections == 2, "both connections are held")
            for _ in range(3):
                with RawClient(server.port, b"") as refused:
                    refused.until_eof()
                    assert b"as many connections as it can" in refused.replies.goaways[0][2]
        until(lambda: server.server.connections == 0, "both connections have ended")
        assert answered(server.port)
    assert {record.getMessage() for record in caplog.records} == {"A connection was refused"}
    assert all(record.__dict__["peer"].startswith("ipv4:127.0.0.1:") for record in caplog.records)


class Exhausted(socket.socket):
    """A listening socket whose ``accept`` raises the errors that the test sets."""

    failures: list[int]

    def accept(self) -> Any:
        if self.failures:
            code = self.failures.pop()
            raise OSError(code, "set by the test")
        return super().accept()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE])
def test_exhausted_descriptors_pause_accepting_and_log_one_line(
    loop: Any, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    with listen("127.0.0.1:0") as original:
        listening = Exhausted(fileno=original.detach())
    listening.failures = [code] * 3
    port = listening.getsockname()[1]

    def add(server: Server) -> None:
        prepare(server)
        server.add_listener(listening)

    with caplog.at_level(logging.ERROR, "grpc_h2"), ServerThread(loop, add, listen=False) as server:
        began = server.call(server.loop.time)
        assert answered(port)
        assert server.call(server.loop.time) - began >= 0.25, "a pause of a tenth of a second for each error"
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_an_accept_error_of_one_connection_does_not_end_accepting(loop: Any) -> None:
    with listen("127.0.0.1:0") as original:
        listening = Exhausted(fileno=original.detach())
    listening.failures = [errno.ECONNABORTED, errno.EPROTO]
    port = listening.getsockname()[1]

    def add(server: Server) -> None:
        prepare(server)
        server.add_listener(listening)

    with ServerThread(loop, add, listen=False):
        assert answered(port)


def test_a_listener_may_be_added_to_a_running_server(loop: Any) -> None:
    with ServerThread(loop, prepare) as server:
        port = server.call(server.server.add_insecure_port, "127.0.0.1:0")
        assert answered(port)
        assert answered(server.port)


def test_a_server_that_was_never_started_closes_its_sockets() -> None:
    server = Server()
    port = server.add_insecure_port("127.0.0.1:0")
    asyncio.run(server.stop(None))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


# --- Unix sockets, and connections that are refused ------------------------------------------------------------------


def unix_listener(path: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(path)
    listening.listen()
    return listening


def echo(server: Server) -> None:
    async def repeat(request: bytes, context: Any) -> bytes:
        return request + context.peer().encode()

    async def twice(request: bytes, context: Any) -> Any:
        yield request
        yield request

    server.add_registered_method_handlers(
        "t.S",
        {
            "Echo": MethodHandler.unary(repeat, bytes, bytes),
            "Twice": MethodHandler.streaming(twice, bytes, bytes),
        },
    )


def test_a_grpc_client_calls_handlers_over_a_unix_socket(loop: Any, tmp_path: Path) -> None:
    path = str(tmp_path / "s")

    def prepare_unix(server: Server) -> None:
        echo(server)
        server.add_listener(unix_listener(path))

    with ServerThread(loop, prepare_unix, listen=False), grpc.insecure_channel(f"unix:{path}") as channel:
        assert channel.unary_unary("/t.S/Echo")(b"x", timeout=SECONDS) == b"xunix:"
        assert list(channel.unary_stream("/t.S/Twice")(b"x", timeout=SECONDS)) == [b"x", b"x"]


def test_a_connection_with_an_objection_gets_goaway_with_the_reason(
    loop: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tmp_path / "s")

    def prepare_unix(server: Server) -> None:
        echo(server)
        server.add_listener(unix_listener(path), objection=lambda connection: "not you")

    with ServerThread(loop, prepare_unix, listen=False) as running:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(path)
            octets = b""
            while chunk := client.recv(1000):
                octets += chunk
        assert b"not you" in octets
        assert running.server.connections == 0
    assert "A connection was refused" in caplog.text
