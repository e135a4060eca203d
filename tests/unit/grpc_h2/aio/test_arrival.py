"""Many TLS handshake steps or records of new clients that arrive at the same moment do not block the loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_wire import HELLO
from tests.support.longest_iteration import LongestIteration
from tests.support.loop import eventually
from tests.support.native_server import LOOPS, ServerThread, secure_server
from tests.support.polling import until

from grpc_h2 import TlsCredentials, frames
from grpc_h2.aio.arrival import Arrival
from grpc_h2.aio.scheduler import FairScheduler, Share

SECONDS = 20.0
CROWD, OTHER = "127.9.0.1", "127.9.0.2"
AT_ONCE = 100
UNKNOWN = 0x50
"""An unknown frame type, which the server ignores."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.sign("server")


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest, certificate: Certificate) -> Iterator[ServerThread]:
    with secure_server(LOOPS[request.param], certificate) as thread:
        yield thread


class Newcomer:
    """A client whose records the test creates first and sends later."""

    def __init__(self, port: int, source: str = CROWD) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS, source_address=(source, 0))
        self.arrived, self.made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.arrived, self.made)
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        self.send()

    def __enter__(self) -> Newcomer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self) -> None:
        self.socket.sendall(self.made.read())

    def end_handshake(self) -> None:
        """Create the last flight of the handshake, followed by the client's first HTTP/2 frames."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                octets = self.socket.recv(65536)
                assert octets, "the server has closed"
                self.arrived.write(octets)
        self.tls.write(HELLO)


def send_at_once(running: ServerThread, newcomers: list[Newcomer]) -> None:
    """Send the records of all newcomers while the loop is busy with this call, so that its next iteration finds all of
    them."""
    running.call(lambda: [newcomer.send() for newcomer in newcomers])


def test_handshakes_that_end_at_the_same_moment_do_not_block_the_loop(running: ServerThread) -> None:
    """100 handshakes take 15 to 25 ms of CPU time."""
    with ExitStack() as stack:
        crowd = [stack.enter_context(Newcomer(running.port)) for _ in range(AT_ONCE)]
        for each in crowd:
            each.end_handshake()
        with LongestIteration(running) as longest:
            send_at_once(running, crowd)
            until(lambda: running.server.connections == AT_ONCE, "all are connected")
        assert longest.seconds < 0.006
    until(lambda: running.server.connections == 0, "all have gone")


def test_records_of_new_clients_that_arrive_at_the_same_moment_do_not_block_the_loop(running: ServerThread) -> None:
    """One time slice for each client would take 10 to 15 ms."""
    ping, answer = (frames.ping(b"abcdefgh", ack=ack) for ack in (False, True))
    with ExitStack() as stack:
        crowd = [stack.enter_context(Newcomer(running.port)) for _ in range(AT_ONCE)]
        for each in crowd:
            each.end_handshake()
            each.send()
        until(lambda: running.server.connections == AT_ONCE, "all are connected")
        for each in crowd:
            for octet in frames.frame(UNKNOWN, 0, 0, bytes(200)) + ping:
                each.tls.write(bytes((octet,)))
        with LongestIteration(running) as longest:
            send_at_once(running, crowd)
            for each in crowd:
                received = b""
                while answer not in received:
                    try:
                        received += each.tls.read(1000)
                    except ssl.SSLWantReadError:
                        octets = each.socket.recv(65536)
                        assert octets, "the server has closed"
                        each.arrived.write(octets)
        assert longest.seconds < 0.006
    until(lambda: running.server.connections == 0, "all have gone")


def test_a_handshake_does_not_wait_for_100_handshakes_of_another_network(
    running: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    networks: list[str] = []
    connected = running.server.connected
    monkeypatch.setattr(
        running.server, "connected", lambda protocol: (networks.append(protocol.network), connected(protocol))
    )
    with ExitStack() as stack:
        crowd = [stack.enter_context(Newcomer(running.port)) for _ in range(AT_ONCE)]
        other = stack.enter_context(Newcomer(running.port, OTHER))
        for each in (*crowd, other):
            each.end_handshake()
        send_at_once(running, [*crowd, other])
        until(lambda: len(networks) == AT_ONCE + 1, "all are connected")
    assert networks.index(OTHER) < 10
    until(lambda: running.server.connections == 0, "all have gone")


def test_a_client_whose_handshake_fails_gets_an_alert(certificate: Certificate, authority: Authority) -> None:
    def prepare(server: object) -> None:
        tls = TlsCredentials(certificate.cert, certificate.key, authority.cert)
        thread.port = server.add_secure_port("127.0.0.1:0", tls)  # type: ignore[attr-defined]

    thread = ServerThread(LOOPS["uvloop"], prepare, listen=False)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    with (
        thread,
        socket.create_connection(("127.0.0.1", thread.port), SECONDS) as plain,
        pytest.raises(ssl.SSLError, match="alert"),
    ):
        context.wrap_socket(plain)


class Withheld(FairScheduler):
    """A scheduler that grants no time slice; the test grants them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[asyncio.Future[None]] = []

    def grant(self, loop: asyncio.AbstractEventLoop, granted: asyncio.Future[None], share: Share, network: str) -> None:
        self.waiting.append(granted)


async def test_the_time_limit_of_a_peer_excludes_the_wait_for_a_time_slice() -> None:
    loop, scheduler = asyncio.get_running_loop(), Withheld()
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        arrival = Arrival(ours, loop, scheduler, Share.ARRIVALS, OTHER, seconds=0.2)
        waiting = asyncio.ensure_future(arrival.octets())
        peer.send(b"x")
        await eventually(lambda: bool(scheduler.waiting), "the peer has sent something")
        late = loop.time() + 0.3
        await eventually(lambda: loop.time() > late, "more time has passed than the peer has")
        assert not waiting.done()
        scheduler.waiting.pop().set_result(None)
        await waiting
        assert ours.recv(10) == b"x"
        with pytest.raises(TimeoutError):
            await arrival.octets()
        assert not loop.remove_reader(ours.fileno())
        assert not scheduler.waiting
