"""Peers that speak another protocol: the answers that they get, and the log lines."""

from __future__ import annotations

import http.client
import logging
import socket
import ssl
from contextlib import closing
from typing import Any

import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_peer import Replies
from tests.support.h2_wire import HELLO
from tests.support.native_server import LOOPS, ServerThread
from tests.support.polling import until

from grpc_h2 import Server, TlsCredentials
from grpc_h2.aio.client_hello import offered_protocols
from grpc_h2.aio.foreign import CLEARTEXT, SECURE, recognise, undecided
from grpc_h2.aio.listener import listen

SECONDS = 10.0


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    return Authority(tmp_path_factory.mktemp("authority")).sign("server")


class Secured:
    def __init__(self, certificate: Certificate) -> None:
        self._certificate = certificate
        self.port = 0

    def __call__(self, server: Server) -> None:
        listening = listen("127.0.0.1:0")
        self.port = listening.getsockname()[1]
        server.add_listener(listening, tls=TlsCredentials(self._certificate.cert, self._certificate.key))


def answer(port: int, *pieces: bytes) -> bytes:
    """Everything that the server sends."""
    got = b""
    with socket.create_connection(("127.0.0.1", port), SECONDS) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            client.sendall(piece)
        while more := client.recv(65536):
            got += more
    return got


def test_an_http_client_gets_an_answer_that_names_the_protocol_of_the_port(
    loop: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "grpc_h2"), ServerThread(loop, lambda _: None) as server:
        for method, body in (("GET", None), ("POST", b"x" * 100_000), ("HEAD", None), ("OPTIONS", None)):
            with closing(http.client.HTTPConnection("127.0.0.1", server.port, timeout=SECONDS)) as client:
                client.request(method, "/", body)
                response = client.getresponse()
                text = response.read()
                assert response.status == 400
                assert response.headers["Connection"] == "close"
                assert int(response.headers["Content-Length"]) > 40
                if method != "HEAD":
                    assert b"gRPC over HTTP/2 without TLS" in text
                    assert text.count(b"\n") == 1
    lines = {(record.getMessage(), record.__dict__["received"]) for record in caplog.records}
    assert lines == {("A client does not speak HTTP/2", "HTTP/1.1")}
    assert all(record.__dict__["peer"].startswith("ipv4:127.0.0.1:") for record in caplog.records)


@pytest.mark.parametrize(
    ("octets", "name", "begins"),
    [
        (b"PUT /x HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1", b"HTTP/1.1 400 "),
        (b"GET / HTTP/1.0\r\n\r\n", "HTTP/1.1", b"HTTP/1.1 400 "),
        (b"GET /\r\n", "HTTP/1.1", b"HTTP/1.1 400 "),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + HELLO, "PROXY protocol v1", b"\0\0"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes(12) + HELLO, "PROXY protocol v2", b"\0\0"),
        (b"\x16\x03\x01\x02\0" + b"\x01" + bytes(30), "TLS", b"\x15\x03\x03\0\x02\x02"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "SSH", b"\0\0"),
    ],
    ids=["put", "http10", "http09", "proxy1", "proxy2", "tls", "ssh"],
)
@pytest.mark.parametrize("piece", [1, 1000], ids=["octets", "whole"])
def test_other_protocols_are_recognised_from_one_read_and_octet_by_octet(
    octets: bytes, name: str, begins: bytes, piece: int, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = [octets[at : at + piece] for at in range(0, min(len(octets), 40), piece)]
    with caplog.at_level(logging.INFO, "grpc_h2"), ServerThread(LOOPS["uvloop"], lambda _: None) as server:
        got = answer(server.port, *pieces)
    assert got.startswith(begins)
    assert caplog.records[0].__dict__["received"] == name


@pytest.mark.parametrize("octets", [b"hello\r\n", b"\0" * 30, b"INVALID CONNECTION PREFACE\r\n\r\n"])
def test_an_unknown_protocol_gets_goaway(octets: bytes) -> None:
    with ServerThread(LOOPS["uvloop"], lambda _: None) as server:
        replies = Replies()
        replies.feed(answer(server.port, octets + b"\r\n" * 20))
        assert replies.goaways


@pytest.mark.parametrize(
    ("octets", "name", "begins"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "HTTP/1.1", b"HTTP/1.1 400 "),
        (HELLO, "HTTP/2 without TLS", b"HTTP/1.1 400 "),
        (b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n", "PROXY protocol v1", b""),
    ],
    ids=["http", "h2c", "proxy"],
)
def test_cleartext_on_a_tls_port_is_answered_and_logged_with_the_peer(
    loop: Any, certificate: Certificate, octets: bytes, name: str, begins: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    secured = Secured(certificate)
    with caplog.at_level(logging.INFO, "grpc_h2"), ServerThread(loop, secured, listen=False):
        got = answer(secured.port, octets)
    assert got.startswith(begins)
    assert b"with TLS" in got or not begins
    (record,) = caplog.records
    assert (record.getMessage(), record.__dict__["received"]) == ("A client does not speak TLS", name)
    assert record.__dict__["peer"].startswith("ipv4:127.0.0.1:")


def test_tcp_health_checks_of_a_tls_port_are_not_logged_and_garbage_is_logged_at_a_limited_rate(
    loop: Any, certificate: Certificate, caplog: pytest.LogCaptureFixture
) -> None:
    secured = Secured(certificate)
    with caplog.at_level(logging.INFO, "grpc_h2"), ServerThread(loop, secured, listen=False) as server:
        for _ in range(50):
            socket.create_connection(("127.0.0.1", secured.port), SECONDS).close()
        until(lambda: server.server.admission.held == 0, "all connections have ended")
        assert not caplog.records
        for _ in range(60):
            answer(secured.port, b"\x16\x03\x01\0\x05hello" + bytes(40))
    lines = [record.getMessage() for record in caplog.records]
    assert 20 <= lines.count("A connection was not established") < 60
    left_out = sum(record.__dict__.get("left_out", 0) for record in caplog.records)
    assert lines.count("A connection was not established") + left_out == 60
    assert all(record.__dict__["peer"] for record in caplog.records if record.levelno == logging.INFO)


def test_a_client_hello_names_its_protocols_and_an_incomplete_one_names_none() -> None:
    def hello(*protocols: str) -> bytes:
        context = ssl.create_default_context()
        if protocols:
            context.set_alpn_protocols(list(protocols))
        outgoing = ssl.MemoryBIO()
        with pytest.raises(ssl.SSLWantReadError):
            context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost").do_handshake()
        return outgoing.read()

    assert offered_protocols(hello("h2", "http/1.1")) == (b"h2", b"http/1.1")
    assert offered_protocols(hello()) == ()
    whole = hello("h2")
    assert all(offered_protocols(whole[:length]) is None for length in range(len(whole)))
    content = whole[5:]
    split = b"".join(
        b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in (content[:3], content[3:100], content[100:])
    )
    assert offered_protocols(split) == (b"h2",)
    assert offered_protocols(b"") is None


def test_the_preface_of_http2_is_not_recognised_as_another_protocol() -> None:
    for length in range(len(HELLO)):
        assert recognise(HELLO[:length], speaks=CLEARTEXT) is None
    assert recognise(HELLO, speaks=SECURE) is not None
    assert not undecided(b"hello")
