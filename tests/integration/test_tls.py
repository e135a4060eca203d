"""TLS: which clients are accepted, and replacement of a certificate while the server runs."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.certificates import Authority, Certificate
from tests.support.client import Client, Tls, failure
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: how many there are plays no part here."""
    return {"WORKERS": "1"}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def start(table: Table, start_server: StartServer, shown: Certificate, **settings: str) -> ServerProcess:
    table.add_commands(3)
    files = {"TLS_CERT_FILE": str(shown.cert), "TLS_KEY_FILE": str(shown.key)}
    return start_server(table.url, **files | settings).wait_ready()


def common_name(server: ServerProcess, authority: Authority) -> str:
    """Serial number of the certificate that a new connection gets."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        assert tls.selected_alpn_protocol() == "h2"
        certificate = tls.getpeercert()
    assert certificate is not None
    return str(dict(pair[0] for pair in certificate["subject"])["commonName"])


def test_with_tls_calls_are_answered_over_tls_only(
    table: Table, start_server: StartServer, authority: Authority
) -> None:
    server = start(table, start_server, authority.sign("server"))
    with Client(server.port, tls=Tls(authority.cert)) as client:
        assert client.get("command1").name == "command1"
        assert len(client.sync().commands) == 3
        assert client.health() == "SERVING"
    with Client(server.port) as cleartext:
        assert failure(cleartext.get, "command1")[0] == "UNAVAILABLE"


def test_with_a_client_authority_a_client_needs_a_certificate_of_it(
    table: Table, start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    server = start(table, start_server, authority.sign("server"), TLS_CLIENT_CA_FILE=str(authority.cert))
    known, stranger = authority.sign("client"), Authority(tmp_path, "other").sign("stranger")
    with Client(server.port, tls=Tls(authority.cert, known.cert, known.key)) as client:
        assert client.get("command1").name == "command1"
    for tls in (Tls(authority.cert), Tls(authority.cert, stranger.cert, stranger.key)):
        with Client(server.port, tls=tls) as refused:
            assert failure(refused.get, "command1")[0] == "UNAVAILABLE"


def test_the_client_commands_call_a_server_with_tls(
    table: Table, start_server: StartServer, authority: Authority
) -> None:
    server = start(table, start_server, authority.sign("server"), TLS_CLIENT_CA_FILE=str(authority.cert))
    own = authority.sign("client")
    kept = {
        name: value for name, value in os.environ.items() if name in ("PATH", "HOME") or name.startswith("COVERAGE_")
    }
    trusting = kept | {"API_KEY": KEY, "PORT": str(server.port), "DEFINITION_SERVER_CA_FILE": str(authority.cert)}
    pair = ("--client-cert-file", str(own.cert), "--client-key-file", str(own.key))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        program = [sys.executable, "-m", "definition_server", *arguments]
        return subprocess.run(program, env=trusting, capture_output=True, text=True, timeout=60, check=False)

    health, get = run("health", *pair), run("get", "command1", *pair)
    assert (health.returncode, health.stdout) == (0, "SERVING\n"), health.stderr
    assert get.returncode == 0, get.stderr
    assert "command1" in get.stdout
    refused = run("get", "command1")
    assert refused.returncode == 69
    assert "--client-cert-file" in refused.stderr


def test_a_replaced_certificate_is_used_after_sighup_and_open_connections_stay(
    table: Table, start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    first, second = authority.sign("first"), authority.sign("second")
    shown = Certificate(tmp_path / "shown.pem", tmp_path / "shown.key")

    def show(certificate: Certificate) -> None:
        shutil.copy(certificate.cert, shown.cert)
        shutil.copy(certificate.key, shown.key)

    show(first)
    server = start(table, start_server, shown, WORKERS="1")
    with Client(server.port, tls=Tls(authority.cert)) as client:
        assert client.get("command1").name == "command1"
        assert common_name(server, authority) == "first"
        show(second)
        server.signal(signal.SIGHUP)
        until(lambda: common_name(server, authority) == "second", server.tail)
        shown.key.write_text("no key")
        before = len(server.lines)
        server.signal(signal.SIGHUP)
        line = server.wait_log("Settings not read again; the old ones stay", after=before)
        assert "TLS_KEY_FILE" in line["error"]
        assert common_name(server, authority) == "second"
        assert client.get("command1").name == "command1"


def test_a_certificate_without_its_key_is_reported_at_the_start(
    start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    cert, other = authority.sign("one"), authority.sign("other")
    url = "postgresql://nobody@127.0.0.1:1/none"
    for settings in (
        {"TLS_CERT_FILE": str(cert.cert)},
        {"TLS_CERT_FILE": str(cert.cert), "TLS_KEY_FILE": str(other.key)},
        {"TLS_CERT_FILE": str(tmp_path / "missing.pem"), "TLS_KEY_FILE": str(cert.key)},
    ):
        server = start_server(url, **settings)
        assert server.wait_exit() == 78
        until(lambda server=server: any("TLS_KEY_FILE" in line for line in server.other_output), server.tail)
