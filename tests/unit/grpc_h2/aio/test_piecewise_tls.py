"""TLS records that arrive together are decrypted in time slices: no peer's records keep the others waiting."""

from __future__ import annotations

import random
import socket
import ssl
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_wire import HELLO, SETTINGS_ACK
from tests.support.key_updates import renegotiate, send_key_updates
from tests.support.longest_iteration import LongestIteration
from tests.support.native_server import LOOPS, ServerThread, secure_server
from tests.support.polling import until
from tests.support.tls_pair import Pair

from grpc_h2 import frames
from grpc_h2.aio import piecewise_tls
from grpc_h2.aio.admission import Trust
from grpc_h2.aio.piecewise_tls import PIECE, TIME_SLICE

T = TypeVar("T")

SECONDS = 10.0
UNKNOWN = 0x50
"""A type of frame, which is ignored."""
SMALL_RECORD = 23
"""Octets of a record of TLS 1.3 with one octet."""


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Authority(tmp_path_factory.mktemp("authority")).sign("server")


class Clock:
    """A clock that advances whenever it is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: float) -> None:
        self.now, self.step = 1.0, step
        monkeypatch.setattr(piecewise_tls, "perf_counter", self)

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def read_all(pair: Pair) -> bytes:
    """The octets that one iteration of an event loop reads."""
    received = b""
    while octets := pair.read():
        received += octets
    return received


def test_records_that_arrive_together_are_decrypted_a_time_slice_at_a_time(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = Pair(certificate)
    turns: list[int] = []

    def on_more() -> None:
        turns.append(pair.to_server.pending)

    pair.server.on_more = on_more  # type: ignore[attr-defined]
    Clock(monkeypatch, TIME_SLICE / 2)
    sent = random.Random(1).randbytes(400)
    for octet in sent:
        pair.client.write(bytes((octet,)))
    arrived = pair.to_server.pending
    received = [read_all(pair)]
    while pair.to_server.pending:
        received.append(read_all(pair))
    assert b"".join(received) == sent
    slices = -(-arrived // (2 * PIECE))
    assert len(received) == slices, "two pieces each"
    assert len(turns) == slices - 1
    assert max(map(len, received)) <= -(-2 * PIECE // SMALL_RECORD)


@pytest.mark.parametrize("size", [1, PIECE, PIECE + 1, 16_384, 100_000])
def test_all_octets_that_arrive_are_decrypted_in_order(certificate: Certificate, size: int) -> None:
    pair = Pair(certificate)
    pair.server.on_more = lambda: None  # type: ignore[attr-defined]
    sent = random.Random(size).randbytes(size)
    pair.client.write(sent)
    octets = pair.to_server.read()
    received = b""
    for at in range(0, len(octets), 3000):
        pair.to_server.write(octets[at : at + 3000])
        while pair.to_server.pending or pair.server.pending():
            received += pair.read()
    assert received == sent


def test_records_are_decrypted_at_once_if_the_protocol_cannot_continue_later(certificate: Certificate) -> None:
    pair = Pair(certificate)
    for _ in range(200):
        pair.client.write(b"x")
    assert read_all(pair) == b"x" * 200


def test_a_client_of_tls_1_2_cannot_renegotiate(certificate: Certificate) -> None:
    """RFC 9113, section 9.2.1."""
    pair = Pair(certificate, ssl.TLSVersion.TLSv1_2)
    pair.client.write(b"before")
    assert pair.read() == b"before"
    renegotiate(pair.client)
    assert pair.to_server.pending
    assert pair.read() == b""
    with pytest.raises(ssl.SSLError, match="NO_RENEGOTIATION"):
        pair.client.read(1)


class Client:
    """A client whose TLS records a test makes first and then sends together."""

    def __init__(self, port: int) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        self.socket = socket.create_connection(("127.0.0.1", port), SECONDS)
        self.arrived, self.made = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(self.arrived, self.made)
        self._repeat(self.tls.do_handshake)
        self.tls.write(HELLO + SETTINGS_ACK)
        self.send()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self) -> None:
        self.socket.sendall(self.made.read())

    def answers_a_ping(self) -> bool:
        answer, received = frames.ping(b"abcdefgh", ack=True), b""
        while answer not in received:
            octets = self._repeat(lambda: self.tls.read(1000))
            assert octets, "the server has closed"
            received += octets
        return True

    def _repeat(self, work: Callable[[], T]) -> T:
        while True:
            try:
                return work()
            except ssl.SSLWantReadError:
                self.send()
                octets = self.socket.recv(65536)
                assert octets, "the server has closed"
                self.arrived.write(octets)


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest, certificate: Certificate) -> Iterator[ServerThread]:
    with secure_server(LOOPS[request.param], certificate) as thread:
        yield thread


def test_key_updates_of_an_authorized_client_do_not_block_the_loop(running: ServerThread) -> None:
    """The KeyUpdates are 108 kB, and take 50 to 120 ms of CPU time."""
    with Client(running.port) as client:
        client.tls.write(frames.ping(b"abcdefgh", ack=False))
        assert client.answers_a_ping()
        (protocol,) = running.server._protocols
        running.call(protocol.vouch, Trust.CLIENT)
        send_key_updates(client.tls, 4000)
        client.tls.write(frames.ping(b"abcdefgh", ack=False))
        with LongestIteration(running) as longest:
            client.send()
            assert client.answers_a_ping()
        assert longest.seconds < 0.02
    until(lambda: running.server.connections == 0, "the connection has ended")


@pytest.mark.parametrize("trust", [Trust.STRANGER, Trust.CLIENT])
def test_small_records_are_decrypted_in_many_iterations_and_answered(
    trust: Trust, running: ServerThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(piecewise_tls, "TIME_SLICE", 0.0)
    with Client(running.port) as client:
        until(lambda: running.server.connections == 1, "the client is connected")
        (protocol,) = running.server._protocols
        running.call(protocol.vouch, trust)
        reads: list[bool] = []
        decrypt = protocol.__class__._decrypt
        monkeypatch.setattr(
            protocol.__class__, "_decrypt", lambda self: (reads.append(self._reading), decrypt(self))[1]
        )
        request = frames.frame(UNKNOWN, 0, 0, bytes(80)) + frames.ping(b"abcdefgh", ack=False)
        for octet in request:
            client.tls.write(bytes((octet,)))
        client.send()
        assert client.answers_a_ping()
        assert reads
        assert not any(reads), "the rest waits for its time slice"
    until(lambda: running.server.connections == 0, "the connection has ended")
