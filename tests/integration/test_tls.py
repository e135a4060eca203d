"""TLS: the clients that are accepted, and the replacement of a certificate while the server runs."""

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
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: the number of workers does not matter here."""
    return {"WORKERS": "1"}


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def start(table: Table, start_server: StartServer, shown: Certificate, **settings: str) -> ServerProcess:
    table.add_commands(3)
    files = {"TLS_CERT_FILE": str(shown.cert), "TLS_KEY_FILE": str(shown.key)}
    return start_server(table.url, **files | settings).wait_ready()


def common_name(server: ServerProcess, authority: Authority, own: Certificate | None = None) -> str:
    """The common name of the certificate that the server presents on a new connection. ``own`` is the client's
    certificate."""
    context = ssl.create_default_context(cafile=str(authority.cert))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
    ):
        assert tls.selected_alpn_protocol() == "h2"
        certificate = tls.getpeercert()
    assert certificate is not None
    return str(dict(pair[0] for pair in certificate["subject"])["commonName"])


def test_a_server_with_tls_answers_calls_only_over_tls(
    table: Table, start_server: StartServer, authority: Authority
) -> None:
    server = start(table, start_server, authority.sign("server"))
    with Client(server.port, tls=Tls(authority.cert)) as client:
        assert client.get("command1").name == "command1"
        assert len(client.sync().commands) == 3
        assert client.health() == "SERVING"
    with Client(server.port) as cleartext:
        assert failure(cleartext.get, "command1")[0] == "UNAVAILABLE"


def test_a_server_with_a_client_authority_requires_a_certificate_of_that_authority(
    table: Table, start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    server = start(table, start_server, authority.sign("server"), TLS_CLIENT_CA_FILE=str(authority.cert))
    known, stranger = authority.sign("client"), Authority(tmp_path, "other").sign("stranger")
    with Client(server.port, tls=Tls(authority.cert, known.cert, known.key)) as client:
        assert client.get("command1").name == "command1"
    for tls in (Tls(authority.cert), Tls(authority.cert, stranger.cert, stranger.key)):
        with Client(server.port, tls=tls) as refused:
            assert failure(refused.get, "command1")[0] == "UNAVAILABLE"


@pytest.mark.thorough  # starts many commands
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


@pytest.mark.thorough  # starts servers
def test_a_worker_that_dies_while_the_files_are_bad_is_replaced_with_the_last_good_pair(
    table: Table, start_server: StartServer, authority: Authority, tmp_path: Path
) -> None:
    first, second, other = authority.sign("first"), authority.sign("second"), authority.sign("other")
    shown, trusted = Certificate(tmp_path / "shown.pem", tmp_path / "shown.key"), tmp_path / "trusted.pem"

    def show(cert: Path, key: Path | None) -> None:
        shutil.copy(cert, shown.cert)
        shown.key.unlink(missing_ok=True)
        if key is not None:
            shutil.copy(key, shown.key)

    def replaced() -> None:
        """Kill a worker, and wait until another serves in its place."""
        killed = min(server.worker_pids())
        os.kill(killed, signal.SIGKILL)
        until(lambda: killed not in [worker["pid"] for worker in server.statusz()["workers"]], server.tail)
        until(lambda: [worker["state"] for worker in server.statusz()["workers"]] == ["serving"] * 2, server.tail)

    def served() -> set[str]:
        return {common_name(server, authority, own) for _ in range(12)}

    own = authority.sign("client")
    shutil.copy(authority.cert, trusted)
    show(first.cert, first.key)
    server = start(table, start_server, shown, WORKERS="2", TLS_CLIENT_CA_FILE=str(trusted))
    for cert, key, authorities in (
        (second.cert, first.key, authority.cert),
        (other.cert, None, authority.cert),
        (second.cert, second.key, other.key),
    ):
        show(cert, key)
        shutil.copy(authorities, trusted)
        before = len(server.lines)
        server.signal(signal.SIGHUP)
        server.wait_log("Settings not read again; the old ones stay", after=before)
        replaced()
        assert served() == {"first"}
        with Client(server.port, tls=Tls(authority.cert, own.cert, own.key)) as client:
            assert client.get("command1").name == "command1"
    assert not server.logged("Worker cannot start"), server.tail()
    shutil.copy(authority.cert, trusted)
    before = len(server.lines)
    server.signal(signal.SIGHUP)
    until(lambda: len(server.logged("Certificate loaded", after=before)) == 2, server.tail)
    assert served() == {"second"}
    replaced()
    assert served() == {"second"}
    held = [link for pid in server.worker_pids() for link in open_descriptors(pid).values() if "memfd:tls" in link]
    assert held == [], "a worker keeps nothing open from which its key could be read"
    kept = [link for link in open_descriptors(server.pid).values() if "memfd:tls" in link]
    assert len(kept) == 3, "the last good set alone"


@pytest.mark.thorough  # starts servers
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
