"""Large answers that clients do not read: the memory of all connections together stays within the budget."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from contextlib import ExitStack
from typing import Any

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_peer import STATIC
from tests.support.h2_wire import HELLO, INITIAL_WINDOW_SIZE, SETTINGS_ACK, call, settings, window_update
from tests.support.native_server import LOOPS, PATIENCE, RawClient, ServerThread
from tests.support.polling import until

from grpc_h2 import Server, StaticAnswer, TlsCredentials
from grpc_h2.aio.protocol import Http2Protocol
from grpc_h2.connection.limits import Limits
from grpc_h2.static.answers import LARGEST_FRAMED

KIB = 1024
ANSWER = bytes(250 * KIB)
WIDE = HELLO + SETTINGS_ACK + settings((INITIAL_WINDOW_SIZE, 2**31 - 1)) + window_update(0, 2**30)
ASKED = b"".join(call(stream) for stream in range(1, 129, 2))
ATTACKERS = 24


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Authority(tmp_path_factory.mktemp("authority")).sign("server")


class Listening:
    """Registers a method with large answers for clients, and listens over TLS too."""

    def __init__(self, certificate: Certificate, size: int = len(ANSWER)) -> None:
        self._certificate = certificate
        self._answer = StaticAnswer.unary(ANSWER[:size])
        self.secure_port = 0

    def __call__(self, server: Server) -> None:
        server.add_static_unary(STATIC.decode(), lambda message: self._answer, lambda metadata: None)
        credentials = TlsCredentials(self._certificate.cert, self._certificate.key)
        self.secure_port = server.add_secure_port("127.0.0.1:0", credentials)


def silent_client(port: int, *, secure: bool) -> socket.socket:
    """A client that asks for 64 large answers, and reads nothing."""
    client = socket.socket()
    try:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", port))
        if secure:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.set_alpn_protocols(["h2"])
            client = context.wrap_socket(client)
        client.sendall(WIDE + ASKED)
    except OSError:
        client.close()
        raise
    return client


@pytest.mark.requirement("B-held-octets", "B-slow-read")
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("loop", LOOPS)
def test_clients_that_ask_for_large_answers_and_read_nothing_stay_within_the_budget(
    loop: str, secure: bool, certificate: Certificate
) -> None:
    limits = Limits(max_held=256 * KIB)
    turn = limits.octets_per_turn + LARGEST_FRAMED + 64 * KIB
    listening = Listening(certificate)
    with ServerThread(LOOPS[loop], listening, limits=limits) as server, ExitStack() as clients:
        budget = server.server.budget
        port = listening.secure_port if secure else server.port
        for _ in range(ATTACKERS):
            clients.enter_context(silent_client(port, secure=secure))

        def ended() -> bool:
            assert budget.held <= limits.max_held + turn
            return 0 < budget.evictions == ATTACKERS - server.server.connections

        until(ended, "too much is held, and the connection of each eviction is gone")
        until(lambda: budget.held <= limits.max_held, "its memory is released")
        with RawClient(server.port, WIDE) as honest:
            honest.send(call(1))
            honest.until(lambda: honest.replies.stream(1).ended)
            assert honest.replies.stream(1).messages == [ANSWER]


def _write_buffer(server: ServerThread) -> int:
    """The octets in the buffer of the only connection's transport."""
    (protocol,) = server.server._protocols
    return protocol._transport.get_write_buffer_size()


def _answered(server: ServerThread) -> int:
    """The last stream of the only connection."""
    (protocol,) = server.server._protocols
    return protocol.connection._streams.last_id


@pytest.mark.requirement("B-held-octets", "B-slow-read")
@pytest.mark.parametrize("reads", [False, True], ids=["never reads", "reads later"])
@pytest.mark.parametrize("loop", LOOPS)
def test_octets_that_do_not_fill_the_transport_are_counted_and_must_be_read_in_time(
    loop: str, reads: bool, certificate: Certificate
) -> None:
    limits = Limits(stall_timeout=PATIENCE if reads else 0.5, drain_timeout=0.05)
    with (
        ServerThread(LOOPS[loop], Listening(certificate, 30 * KIB), limits=limits) as server,
        RawClient(server.port, WIDE, receive_buffer=4096) as client,
    ):
        until(lambda: server.server.connections, "the client is connected")
        budget, stream = server.server.budget, -1
        while not server.call(_write_buffer, server):
            stream += 2
            client.send(call(stream))
            until(lambda told=stream: server.call(_answered, server) >= told, "the call is answered")
        assert 0 < server.call(_write_buffer, server) < 64 * KIB, "the transport is not full"
        if not reads:
            until(lambda: not server.server.connections, "the time to read is over")
            assert budget.held == 0
            return
        until(lambda: budget.held, "the octets are counted")
        client.until(lambda: client.replies.stream(stream).ended)
        until(lambda: not budget.held, "they were read")
        client.send(call(stream + 2))
        client.until(lambda: client.replies.stream(stream + 2).ended)


class FullTransport(asyncio.Transport):
    """A transport whose buffer holds ``size`` octets that nobody reads."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.aborted = False

    def get_write_buffer_size(self) -> int:
        return self.size

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        pass

    def is_closing(self) -> bool:
        return self.aborted

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        pass

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.requirement("B-held-octets")
@pytest.mark.parametrize("full", [False, True])
async def test_an_evicted_connection_whose_buffer_is_full_is_aborted_at_once(
    full: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    server = Server()
    protocol, transport = Http2Protocol(server, asyncio.get_running_loop()), FullTransport(100 * KIB)
    protocol.connection_made(transport)
    protocol.data_received(HELLO + SETTINGS_ACK)
    if full:
        protocol.pause_writing()
    protocol.connection._evict()
    assert not transport.aborted, "the eviction may be the work of another connection"
    await asyncio.sleep(0)
    assert transport.aborted is full
    assert [record.message for record in caplog.records] == ["A client was cut off"]
    protocol.connection_lost(None)
