"""Many TLS handshake steps or records of new clients that arrive at the same moment do not block the loop."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_wire import HELLO
from tests.support.key_updates import send_key_updates
from tests.support.longest_iteration import LongestIteration
from tests.support.loop import eventually
from tests.support.native_server import LOOPS, ServerThread, secure_server
from tests.support.polling import until

from grpc_h2 import TlsCredentials, frames
from grpc_h2.aio.admission import Trust
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
    """A client whose records the test creates first and sends later. ``split``: a function that is called after the
    first 20 octets of the ClientHello, which are sent alone; without it, the client offers h2."""

    def __init__(self, port: int, source: str = CROWD, split: Callable[[], object] | None = None) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        if split is None:
            context.set_alpn_protocols(["h2"])
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS, source_address=(source, 0))
        self.arrived, self.made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.arrived, self.made)
        with pytest.raises(ssl.SSLWantReadError):
            self.tls.do_handshake()
        if split is not None:
            self.socket.sendall(self.made.read(20))
            split()
        self.send()

    def __enter__(self) -> Newcomer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self) -> None:
        self.socket.sendall(self.made.read())

    def end_handshake(self, behind: bytes = HELLO) -> None:
        """Create the last flight of the handshake, followed by ``behind``: the client's first HTTP/2 frames."""
        while True:
            try:
                self.tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                octets = self.socket.recv(65536)
                assert octets, "the server has closed"
                self.arrived.write(octets)
        self.tls.write(behind)

    def read_until(self, answer: bytes) -> None:
        received = b""
        while answer not in received:
            try:
                received += self.tls.read(1000)
            except ssl.SSLWantReadError:
                octets = self.socket.recv(65536)
                assert octets, "the server has closed"
                self.arrived.write(octets)


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
                each.read_until(answer)
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


def test_key_updates_behind_a_handshake_without_h2_are_not_decrypted(running: ServerThread) -> None:
    """A ClientHello in two parts cannot be examined, so the client is not refused before its handshake. 9,000
    KeyUpdates take over 100 ms of CPU time."""
    pause = lambda: [running.call(lambda: None) for _ in range(20)]  # noqa: E731 - the first part is read alone
    with Newcomer(running.port, split=pause) as newcomer:
        newcomer.end_handshake()
        send_key_updates(newcomer.tls, 9000, requesting=False)
        with LongestIteration(running) as longest:
            newcomer.send()
            while newcomer.socket.recv(65536):
                pass
            newcomer.socket.shutdown(socket.SHUT_WR)
            until(lambda: running.server.connections == 0, "the server has closed")
        assert longest.seconds < 0.006


def test_a_large_amount_of_data_behind_a_handshake_is_read_in_time_slices(running: ServerThread) -> None:
    answer = frames.ping(b"abcdefgh", ack=True)
    with Newcomer(running.port) as newcomer:
        newcomer.end_handshake(HELLO + frames.frame(UNKNOWN, 0, 0, bytes(80)))
        for octet in frames.frame(UNKNOWN, 0, 0, bytes(8000)) + frames.ping(b"abcdefgh", ack=False):
            newcomer.tls.write(bytes((octet,)))
        with LongestIteration(running) as longest:
            newcomer.send()
            newcomer.read_until(answer)
        assert longest.seconds < 0.006
    until(lambda: running.server.connections == 0, "it has gone")


@pytest.mark.parametrize("known", [False, True], ids=["a stranger", "a client"])
def test_a_record_that_cannot_be_decrypted_closes_the_connection_with_an_alert_and_a_log_line(
    known: bool, running: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "grpc_h2")
    with Newcomer(running.port) as newcomer:
        newcomer.end_handshake()
        newcomer.send()
        until(lambda: running.server.connections == 1, "it is connected")
        (protocol,) = running.server._protocols
        if known:
            running.call(protocol.vouch, Trust.CLIENT)
        newcomer.tls.write(frames.ping(b"abcdefgh", ack=False))
        newcomer.socket.sendall(newcomer.made.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        with pytest.raises(ssl.SSLError, match="alert bad record mac"):
            newcomer.read_until(frames.ping(b"abcdefgh", ack=True))
    until(lambda: running.server.connections == 0, "it has gone")
    (record,) = [record for record in caplog.records if record.getMessage() == "A client broke the protocol"]
    assert record.error.startswith("[SSL: ")  # type: ignore[attr-defined]
    assert record.peer.startswith(f"ipv4:{CROWD}")  # type: ignore[attr-defined]


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


@pytest.fixture
def unread() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A server's socket whose peer reads nothing, and the peer's."""
    ours, peer = socket.socketpair()
    with ours, peer:
        ours.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                ours.send(bytes(65536))
        yield ours, peer


async def test_a_peer_that_does_not_read_its_part_of_the_handshake_has_its_time_limit(
    unread: tuple[socket.socket, socket.socket], certificate: Certificate
) -> None:
    ours, peer = unread
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    hello = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), hello, server_hostname="localhost").do_handshake()
    peer.send(hello.read())
    arrival = Arrival(ours, asyncio.get_running_loop(), Withheld(), Share.ARRIVALS, OTHER, seconds=0.01)
    with pytest.raises(TimeoutError):
        await arrival.shake_hands(TlsCredentials(certificate.cert, certificate.key).context)
    assert not asyncio.get_running_loop().remove_writer(ours.fileno())


async def test_a_handshake_that_fails_does_not_wait_until_its_alert_is_read(
    unread: tuple[socket.socket, socket.socket], certificate: Certificate
) -> None:
    ours, peer = unread
    peer.send(b"\x16\x03\x01\x00\x04none")
    arrival = Arrival(ours, asyncio.get_running_loop(), Withheld(), Share.ARRIVALS, OTHER, seconds=SECONDS)
    with pytest.raises(ssl.SSLError):
        await arrival.shake_hands(TlsCredentials(certificate.cert, certificate.key).context)


async def test_the_time_that_a_peer_takes_to_read_its_part_of_the_handshake_counts(
    unread: tuple[socket.socket, socket.socket],
) -> None:
    ours, peer = unread
    loop = asyncio.get_running_loop()
    arrival = Arrival(ours, loop, Withheld(), Share.ARRIVALS, OTHER, seconds=SECONDS)
    sending = asyncio.ensure_future(arrival._send(b"answer"))
    late = loop.time() + 0.02
    await eventually(lambda: loop.time() > late, "the peer takes its time")
    assert not sending.done()
    peer.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            peer.recv(1 << 20)
    await sending
    assert arrival._seconds <= SECONDS - 0.02
