"""TLS on the native engine: ALPN, reloading, client certificates."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.certificates import Authority, Certificate
from tests.support.h2_peer import Replies
from tests.support.h2_wire import HELLO, PROTOCOL_ERROR, data
from tests.support.native_server import LOOPS, ServerThread, handlers
from tests.support.polling import until

from grpc_h2.aio import listener
from grpc_h2.aio.server import Server
from grpc_h2.aio.tls import CertificateFault, TlsCredentials
from grpc_h2.connection.limits import Limits

SECONDS = 10.0


async def who(request: bytes, context: Any) -> bytes:
    known = dict(context.auth_context())
    assert known["transport_security_type"] == [b"ssl"]
    assert ("x509_pem_cert" in known) == (context.peer_identity_key() is not None)
    return b" ".join([*known.get("x509_common_name", ()), *(context.peer_identities() or ())])


async def large(request: bytes, context: Any) -> bytes:
    return b"x" * 10_000_000


class Secured:
    """A server with TLS; the test can change its credentials."""

    def __init__(self, credentials: TlsCredentials) -> None:
        self.credentials = credentials

    def __call__(self, server: Server) -> None:
        methods: dict[str, Any] = {
            "who": grpc.unary_unary_rpc_method_handler(who),
            "large": grpc.unary_unary_rpc_method_handler(large),
        }
        server.add_generic_rpc_handlers((handlers(**methods),))
        self.port = server.add_secure_port("127.0.0.1:0", self.credentials)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.sign("server")


@pytest.fixture(scope="module")
def client_certificate(authority: Authority) -> Certificate:
    return authority.sign("client")


@pytest.fixture
def files(certificate: Certificate, tmp_path: Path) -> Certificate:
    """Copies of the certificate and the key; a test may change them."""
    copies = Certificate(tmp_path / "server.pem", tmp_path / "server.key")
    shutil.copy(certificate.cert, copies.cert)
    shutil.copy(certificate.key, copies.key)
    return copies


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


def ask(port: int, authority: Authority, method: str = "who", certificate: Certificate | None = None) -> bytes:
    pair = (certificate.key.read_bytes(), certificate.cert.read_bytes()) if certificate else (None, None)
    credentials = grpc.ssl_channel_credentials(authority.cert.read_bytes(), *pair)
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.secure_channel(f"localhost:{port}", credentials, options=options) as channel:
        call: Any = channel.unary_unary(f"/t.S/{method}")
        answer: bytes = call(b"x", timeout=SECONDS)
        return answer


def connect(port: int, alpn: list[str], **versions: ssl.TLSVersion) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if alpn:
        context.set_alpn_protocols(alpn)
    for name, version in versions.items():
        setattr(context, name, version)
    plain = socket.create_connection(("127.0.0.1", port), SECONDS)
    try:
        return context.wrap_socket(plain)
    except OSError:
        plain.close()
        raise


def common_name(port: int, authority: Authority) -> str:
    """The common name of the certificate that the server presents."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    context.set_alpn_protocols(["h2"])
    plain = socket.create_connection(("127.0.0.1", port), SECONDS)
    with context.wrap_socket(plain, server_hostname="localhost") as tls:
        shown: Any = tls.getpeercert()
        return str(shown["subject"][0][0][1])


def test_a_grpcio_client_calls_over_tls(loop: Any, certificate: Certificate, authority: Authority) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with ServerThread(loop, secured, listen=False):
        assert ask(secured.port, authority) == b""
        assert len(ask(secured.port, authority, "large")) == 10_000_000


@pytest.mark.requirement("A1")
@pytest.mark.parametrize("alpn", [[], ["http/1.1"], ["grpc-exp"]])
def test_a_client_that_does_not_offer_h2_gets_an_alert(loop: Any, certificate: Certificate, alpn: list[str]) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with ServerThread(loop, secured, listen=False):
        with pytest.raises(ssl.SSLError, match="no application protocol"):
            connect(secured.port, alpn)
        assert ask_raw(secured.port)


def ask_raw(port: int) -> bool:
    """Whether a client that offers h2 is served."""
    with connect(port, ["h2"]) as client:
        return client.recv(100)[3] == 4


@pytest.mark.requirement("A1")
def test_a_client_without_h2_in_an_unreadable_client_hello_gets_close_notify_after_the_handshake(
    loop: Any, certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "offered_protocols", lambda octets: None)
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with ServerThread(loop, secured, listen=False), connect(secured.port, ["http/1.1"]) as client:
        assert client.selected_alpn_protocol() is None
        assert client.recv(100) == b"", "the stream ends without an error, because close_notify was sent"


@pytest.mark.requirement("A1")
def test_h2_is_selected_among_other_protocols_and_our_settings_come_first(loop: Any, certificate: Certificate) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with ServerThread(loop, secured, listen=False), connect(secured.port, ["http/1.1", "h2"]) as client:
        assert client.selected_alpn_protocol() == "h2"
        assert client.recv(100)[3] == 4


@pytest.mark.requirement("A50")
def test_goaway_is_delivered_before_the_connection_closes(loop: Any, certificate: Certificate) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with ServerThread(loop, secured, listen=False) as running, connect(secured.port, ["h2"]) as client:
        client.sendall(HELLO + data(0, b"x"))
        replies = Replies()
        replies.note_sent(HELLO)
        while got := client.recv(10_000):
            replies.feed(got)
        assert [goaway[1] for goaway in replies.goaways] == [PROTOCOL_ERROR]
        until(lambda: running.server.connections == 0, "the client need not send close_notify", seconds=5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tls_older_than_1_2_is_refused(loop: Any, certificate: Certificate) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with ServerThread(loop, secured, listen=False):
        old = {"minimum_version": ssl.TLSVersion.TLSv1, "maximum_version": ssl.TLSVersion.TLSv1_1}
        with pytest.raises((ssl.SSLError, ConnectionResetError)):
            connect(secured.port, ["h2"], **old)
        connect(secured.port, ["h2"], maximum_version=ssl.TLSVersion.TLSv1_2).close()


@pytest.mark.requirement("B-slow-client")
def test_a_client_without_a_tls_handshake_is_disconnected(loop: Any, certificate: Certificate) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with (
        ServerThread(loop, secured, listen=False, limits=Limits(preface_timeout=0.1)),
        socket.create_connection(("127.0.0.1", secured.port), SECONDS) as client,
    ):
        assert client.recv(1) == b""


def test_a_stop_cancels_handshakes(loop: Any, certificate: Certificate) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with (
        ServerThread(loop, secured, listen=False) as running,
        socket.create_connection(("127.0.0.1", secured.port), SECONDS) as client,
        connect(secured.port, ["h2"]),
    ):
        running.stop(0.1).result(SECONDS)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""


def test_plain_octets_on_a_tls_port_end_the_connection(loop: Any, certificate: Certificate) -> None:
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with (
        ServerThread(loop, secured, listen=False) as running,
        socket.create_connection(("127.0.0.1", secured.port), SECONDS) as client,
    ):
        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        try:
            while client.recv(100):
                pass
        except ConnectionResetError:
            pass
        until(lambda: running.server.connections == 0, "no connection is held")


# --- reload ----------------------------------------------------------------------------------------------------------


def test_a_reload_serves_the_new_certificate_to_new_connections(
    loop: Any, files: Certificate, authority: Authority
) -> None:
    secured = Secured(TlsCredentials(files.cert, files.key))
    with ServerThread(loop, secured, listen=False) as running:
        assert common_name(secured.port, authority) == "server"
        credentials = grpc.ssl_channel_credentials(authority.cert.read_bytes())
        with grpc.secure_channel(f"localhost:{secured.port}", credentials) as channel:
            call: Any = channel.unary_unary("/t.S/who")
            call(b"x", timeout=SECONDS)
            renewed = authority.sign("renewed")
            shutil.copy(renewed.cert, files.cert)
            shutil.copy(renewed.key, files.key)
            running.call(secured.credentials.reload)
            assert common_name(secured.port, authority) == "renewed"
            call(b"x", timeout=SECONDS)  # the old connection still works


@pytest.mark.parametrize("damage", ["other key", "no certificate", "no file", "empty", "half"])
def test_an_invalid_certificate_pair_is_refused_and_the_old_one_stays(
    loop: Any, files: Certificate, authority: Authority, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    secured = Secured(TlsCredentials(files.cert, files.key))
    if damage == "other key":
        shutil.copy(authority.sign("other").key, files.key)
    elif damage == "no certificate":
        files.cert.write_text("not a certificate")
    elif damage == "no file":
        files.key.unlink()
    elif damage == "empty":
        files.cert.write_text("")
    else:
        files.cert.write_text(files.cert.read_text()[:300])
    with ServerThread(loop, secured, listen=False) as running:
        with pytest.raises(CertificateFault, match=r"server\.(pem|key)"), caplog.at_level(logging.ERROR):
            running.call(secured.credentials.reload)
        assert "The certificate was not replaced" in caplog.text
        assert common_name(secured.port, authority) == "server"


def test_other_files_replace_the_certificate_and_unusable_ones_do_not(
    loop: Any, files: Certificate, authority: Authority
) -> None:
    secured = Secured(TlsCredentials(files.cert, files.key))
    renewed = authority.sign("renewed")
    with ServerThread(loop, secured, listen=False) as running:
        with pytest.raises(CertificateFault, match=r"renewed\.pem"):
            running.call(lambda: secured.credentials.replace(renewed.cert, files.key))
        assert common_name(secured.port, authority) == "server"
        running.call(secured.credentials.reload)  # the earlier files are still in use
        assert common_name(secured.port, authority) == "server"
        running.call(lambda: secured.credentials.replace(renewed.cert, renewed.key))
        assert common_name(secured.port, authority) == "renewed"


def test_an_encrypted_key_is_refused_without_a_prompt(certificate: Certificate, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(certificate.key.read_bytes(), None)
    encrypted = tmp_path / "encrypted.key"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(CertificateFault, match="encrypted"):
        TlsCredentials(certificate.cert, encrypted)


# --- client certificates ---------------------------------------------------------------------------------------------


@pytest.fixture(params=[True, False], ids=["required", "optional"])
def required(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def mutual(loop: Any, certificate: Certificate, authority: Authority, required: bool) -> Iterator[Secured]:
    tls = TlsCredentials(certificate.cert, certificate.key, authority.cert, require_client_certificate=required)
    secured = Secured(tls)
    with ServerThread(loop, secured, listen=False):
        yield secured


def test_the_auth_context_holds_the_clients_certificate(
    mutual: Secured, authority: Authority, client_certificate: Certificate
) -> None:
    assert ask(mutual.port, authority, certificate=client_certificate) == b"client localhost 127.0.0.1"


def test_a_client_without_a_certificate_is_accepted_only_if_certificates_are_optional(
    mutual: Secured, authority: Authority, required: bool
) -> None:
    if required:
        with pytest.raises(grpc.RpcError) as caught:
            ask(mutual.port, authority)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    else:
        assert ask(mutual.port, authority) == b""


def test_a_certificate_of_another_authority_is_refused(mutual: Secured, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "strangers").sign("stranger")
    with pytest.raises(grpc.RpcError) as caught:
        ask(mutual.port, authority, certificate=stranger)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_an_invalid_client_authority_is_named_in_the_error(certificate: Certificate, tmp_path: Path) -> None:
    nothing = tmp_path / "ca.pem"
    nothing.write_text("")
    with pytest.raises(CertificateFault, match=r"ca\.pem"):
        TlsCredentials(certificate.cert, certificate.key, nothing)


def test_a_connection_without_a_handshake_does_not_delay_a_stop(
    certificate: Certificate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grpc_h2.aio.server.LINGER", 60.0)  # the time for connections whose handshake has begun
    secured = Secured(TlsCredentials(certificate.cert, certificate.key))
    with (
        ServerThread(LOOPS["asyncio"], secured, listen=False) as server,
        socket.create_connection(("127.0.0.1", secured.port), SECONDS) as silent,
    ):
        (tls,) = server.server._listeners
        until(lambda: server.call(lambda: bool(tls._silent)), "the connection waits for its handshake")
        server.stop(60.0).result(SECONDS)
        assert silent.recv(1) == b""
