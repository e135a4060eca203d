"""The limit of KeyUpdates. Each costs the peer 27 octets and the server 30 µs of CPU time, and OpenSSL does not limit
their number."""

from __future__ import annotations

import gc
import logging
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_wire import HELLO, SETTINGS_ACK
from tests.support.key_updates import send_key_updates
from tests.support.native_server import LOOPS, ServerThread, secure_server
from tests.support.polling import until
from tests.support.tls_pair import Pair

from grpc_h2 import frames
from grpc_h2.aio.admission import Trust
from grpc_h2.aio.key_updates import MOST, KeyUpdates

SECONDS = 10.0


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Authority(tmp_path_factory.mktemp("authority")).sign("server")


def test_octets_after_too_many_key_updates_are_not_processed(certificate: Certificate) -> None:
    pair = Pair(certificate)
    floods: list[int] = []
    updates = KeyUpdates(pair.server, lambda: floods.append(updates.count))
    send_key_updates(pair.client, 500)
    assert pair.read() == b""
    assert floods == [MOST + 1]
    assert updates.count == MOST + 1, "the other KeyUpdates were thrown away"
    assert not pair.to_server.pending


def test_octets_after_a_few_key_updates_are_processed(certificate: Certificate) -> None:
    pair = Pair(certificate)
    updates = KeyUpdates(pair.server, pytest.fail)
    send_key_updates(pair.client, MOST)
    pair.client.write(b"request")
    assert pair.read() == b"request"
    assert updates.count == MOST


def test_key_updates_of_a_client_are_not_counted_and_its_context_has_no_callback(certificate: Certificate) -> None:
    pair = Pair(certificate)
    before = pair.server.context
    updates = KeyUpdates(pair.server, pytest.fail)
    assert pair.server.context is not before
    updates.release()
    assert pair.server.context is before
    assert updates not in gc.get_referents(vars(pair.server)), "no reference cycle is left"
    send_key_updates(pair.client, 3 * MOST)
    pair.client.write(b"request")
    assert pair.read() == b"request"
    assert updates.count == 0


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest, certificate: Certificate) -> Iterator[ServerThread]:
    with secure_server(LOOPS[request.param], certificate) as thread:
        yield thread


def connected(port: int) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    client = context.wrap_socket(socket.create_connection(("127.0.0.1", port), SECONDS))
    client.sendall(HELLO + SETTINGS_ACK)
    return client


def answers_a_ping(client: ssl.SSLSocket) -> bool:
    client.sendall(frames.ping(b"12345678", ack=False))
    received = b""
    while frames.ping(b"12345678", ack=True) not in received:
        if not (octets := client.recv(1000)):
            return False
        received += octets
    return True


def test_a_stranger_that_floods_with_key_updates_is_disconnected_and_a_client_is_not(
    running: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    with connected(running.port) as client:
        assert answers_a_ping(client)
        (protocol,) = running.server._protocols
        running.call(protocol.vouch, Trust.CLIENT)
        send_key_updates(client, 3 * MOST)
        assert answers_a_ping(client)
    until(lambda: running.server.connections == 0, "the connection has ended")
    with caplog.at_level(logging.WARNING, "grpc_h2"), connected(running.port) as stranger:
        assert answers_a_ping(stranger)
        send_key_updates(stranger, 3 * MOST)
        with suppress(OSError):
            assert not answers_a_ping(stranger)
    (record,) = (record for record in caplog.records if "KeyUpdate" in getattr(record, "error", ""))
    assert record.getMessage() == "A client was cut off"
