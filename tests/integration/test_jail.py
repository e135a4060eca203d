"""The jail, tested inside a real worker: forbidden actions are refused, and the worker's own work succeeds."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.conftest import StartServer
from tests.support.certificates import Authority
from tests.support.client import Client, Tls, failure
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.environment import EX_CONFIG
from definition_server.jail.confinement import support

INSIDE = Path(__file__).parents[1] / "support/inside_worker"
TRY = signal.SIGRTMIN + 1
"""As in the code inside."""

pytestmark = pytest.mark.skipif(bool(support().missing), reason=f"this kernel lacks {support().missing}")

REFUSED = {"EPERM", "EACCES"}


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    return {"WORKERS": "1", "JAIL": "require", "PYTHONPATH": str(INSIDE)}


def attempts(server: ServerProcess) -> dict[str, str]:
    """Actions that code in the worker could try."""
    before = len(server.lines)
    (worker,) = server.worker_pids()
    os.kill(worker, TRY)
    return dict(server.wait_log("Attempts", after=before)["outcomes"])


def test_code_in_a_worker_is_refused_everything_outside_its_task(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(3)
    stored = tmp_path / "last-known-good"
    stored.write_bytes(b"stored")
    server = start_server(table.url, PYTHON_TEST_STORED=str(stored)).wait_ready()
    assert server.wait_log("Confined")["threads"] == 1
    outcomes = attempts(server)
    assert len(outcomes) > 80
    assert {name: outcome for name, outcome in outcomes.items() if outcome not in REFUSED} == {}
    assert stored.read_bytes() == b"stored"
    assert server.wait_log("Imported")["name"] == "colorsys"
    with Client(server.port) as client:
        assert client.get("command1").name == "command1"


def test_a_confined_worker_logs_an_exception_with_its_traceback(table: Table, start_server: StartServer) -> None:
    server = start_server(table.url, APP_ENV="development", ALLOW_EMPTY_CATALOG="true")
    until(lambda: any("Serving" in line for line in server.other_output), "it serves")
    (worker,) = server.worker_pids()
    os.kill(worker, TRY)
    until(lambda: server.logged("Imported", name="colorsys"), server.tail)
    assert [line["name"] for line in server.logged("Imported")] == ["colorsys"]
    until(lambda: any("an exception with a traceback" in line for line in server.other_output), server.tail)


def test_a_confined_worker_imports_nothing_and_does_all_its_work(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    """A late import opens a file, and fails in a worker that has not imported the module before."""
    table.add_commands(3)
    key = tmp_path / "key"
    key.write_text(KEY)
    settings = {"API_KEY": "", "API_KEY_FILE": str(key), "REFLECTION": "true", "LOG_LEVEL": "DEBUG"}
    server = start_server(table.url, **settings).wait_ready()
    with Client(server.port) as client:
        assert client.get("command1").name == "command1"
        assert failure(client.get, "missing")[0] == "NOT_FOUND"
        assert len(client.sync().commands) == 3
        assert client.health() == "SERVING"
        assert "avap.DefinitionEngine" in _reflected(client)
    with Client(server.port, key="wrong") as stranger:
        assert failure(stranger.get, "command1")[0] == "UNAUTHENTICATED"
    with socket.create_connection(("127.0.0.1", server.port)) as garbage:
        garbage.sendall(b"GET / HTTP/1.1\r\n\r\n")
        garbage.settimeout(10)
        with contextlib.suppress(OSError):
            while garbage.recv(4096):
                pass
    table.add_commands(1, start=3)  # a publication, and so a swap
    key.write_text("another key")
    server.signal(signal.SIGHUP)
    until(lambda: _gets("another key", server), "the other key")
    server.end()
    assert [line["name"] for line in server.logged("Imported")] == []
    assert server.logged("Worker ended; starting another") == []


def test_with_tls_a_confined_worker_reads_no_file_and_its_certificate_can_be_replaced(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(3)
    authority = Authority(tmp_path)
    shown = authority.sign("shown")
    files = {
        "TLS_CERT_FILE": str(shown.cert),
        "TLS_KEY_FILE": str(shown.key),
        "TLS_CLIENT_CA_FILE": str(authority.cert),
    }
    own = authority.sign("client")
    # Each attempt on the stored snapshot is also made on the key.
    server = start_server(table.url, PYTHON_TEST_STORED=str(shown.key), **files).wait_ready()
    authority.sign("shown")  # another key and certificate, in the same files
    before = len(server.lines)
    server.signal(signal.SIGHUP)
    server.wait_log("Certificate loaded", after=before)
    assert {name: outcome for name, outcome in attempts(server).items() if outcome not in REFUSED} == {}
    with Client(server.port, tls=Tls(authority.cert, own.cert, own.key)) as client:
        assert client.get("command1").name == "command1"
    server.end()
    assert [line["name"] for line in server.logged("Imported")] == ["colorsys"]


def _reflected(client: Client) -> list[str]:
    stub = reflection_pb2_grpc.ServerReflectionStub(client.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = stub.ServerReflectionInfo(iter([request]), timeout=10)
    symbol = reflection_pb2.ServerReflectionRequest(file_containing_symbol="avap.DefinitionEngine")
    assert list(stub.ServerReflectionInfo(iter([symbol]), timeout=10))
    return [service.name for service in answer.list_services_response.service]


def _gets(key: str, server: ServerProcess) -> bool:
    with Client(server.port, key=key) as client:
        try:
            return bool(client.get("command1").name)
        except grpc.RpcError:
            return False


OLD_CONTAINER = """
import os, sys
from definition_server.jail import seccomp
from definition_server.jail.kernel import architecture
here = architecture()
refused = {int(number): seccomp.Rule(seccomp.refuse(38)) for number in sys.argv[1].split(",")}
seccomp.install(here, seccomp.program(here, refused, seccomp.ALLOW))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Starts a command where some system calls do not exist, as an old container runtime's profile has it."""

LANDLOCK = "444,445,446"


def start_without(calls: str, table: Table, servers: ExitStack, transport: str, **settings: str) -> ServerProcess:
    """A server for which ``calls`` do not exist."""
    table.add_commands(1)
    server = ServerProcess(table.url, **({"WORKERS": "1", "JAIL": "auto", "TRANSPORT": transport} | settings))
    server.command = [sys.executable, "-c", OLD_CONTAINER, calls, *server.command]
    return servers.enter_context(server)


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def test_auto_warns_and_confines_by_seccomp_if_landlock_does_not_exist(
    table: Table, servers: ExitStack, transport: str
) -> None:
    server = start_without(LANDLOCK, table, servers, transport, JAIL="auto", PYTHONPATH=str(INSIDE)).wait_ready()
    assert [line["missing"] for line in server.logged("Workers are confined only in part")] == ["Landlock"]
    assert [worker["jail"] for worker in server.statusz()["workers"]] == ["seccomp"]
    assert server.metric("avap_worker_jailed", worker="0") == 0
    assert {name: outcome for name, outcome in attempts(server).items() if outcome not in REFUSED} == {}
    with Client(server.port) as client:
        assert client.get("command0").name == "command0"


@pytest.mark.thorough  # takes seconds
def test_with_tls_and_without_landlock_a_worker_opens_no_file_and_another_certificate_is_served(
    table: Table, servers: ExitStack, transport: str, tmp_path: Path
) -> None:
    """OpenSSL opens a certificate by its path, and seccomp cannot distinguish paths."""
    authority = Authority(tmp_path)
    shown = authority.sign("shown")
    files = {"TLS_CERT_FILE": str(shown.cert), "TLS_KEY_FILE": str(shown.key), "PYTHON_TEST_STORED": str(shown.key)}
    server = start_without(LANDLOCK, table, servers, transport, PYTHONPATH=str(INSIDE), **files).wait_ready()
    before_roll = server.worker_pids()
    assert {name: outcome for name, outcome in attempts(server).items() if outcome not in REFUSED} == {}
    first = _served_certificate(server)
    authority.sign("shown")  # another key and certificate, in the same files
    server.signal(signal.SIGHUP)
    until(lambda: _served_certificate(server) != first, server.tail)
    if transport == "native":
        server.wait_log("Worker rolled")
    assert (server.worker_pids() == before_roll) is (transport == "grpcio")
    assert {name: outcome for name, outcome in attempts(server).items() if outcome not in REFUSED} == {}
    with Client(server.port, tls=Tls(authority.cert)) as client:
        assert client.get("command0").name == "command0"


def _served_certificate(server: ServerProcess) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with socket.create_connection(("127.0.0.1", server.port)) as plain, context.wrap_socket(plain) as secure:
        return ssl.DER_cert_to_PEM_cert(secure.getpeercert(binary_form=True) or b"")


def test_require_does_not_start_if_landlock_does_not_exist(table: Table, servers: ExitStack, transport: str) -> None:
    server = start_without(LANDLOCK, table, servers, transport, JAIL="require")
    assert server.wait_exit() == EX_CONFIG
    (line,) = server.logged("Cannot start")
    assert "Landlock" in line["error"]
    assert "set JAIL to auto" in line["remedy"]


@pytest.mark.thorough  # takes seconds
def test_a_worker_is_confined_by_seccomp_and_reports_it_if_the_kernel_refuses_landlock(
    table: Table, servers: ExitStack, transport: str
) -> None:
    """Only landlock_restrict_self is refused, which the master cannot know in advance."""
    server = start_without("446", table, servers, transport, JAIL="auto").wait_ready()
    assert server.logged("The worker is not confined as it should be", jail="seccomp")
    assert [worker["jail"] for worker in server.statusz()["workers"]] == ["seccomp"]


def test_a_confined_worker_is_shown_in_status_and_metric(table: Table, start_server: StartServer) -> None:
    server = start_server(table.url, ALLOW_EMPTY_CATALOG="true").wait_ready()
    assert [worker["jail"] for worker in server.statusz()["workers"]] == ["full"]
    assert server.metric("avap_worker_jailed", worker="0") == 1


@pytest.mark.thorough  # takes seconds
def test_with_jail_off_the_status_shows_it_and_there_is_no_sample(table: Table, start_server: StartServer) -> None:
    """With a sample, the alert could not distinguish a missing jail from one that is switched off."""
    server = start_server(table.url, ALLOW_EMPTY_CATALOG="true", JAIL="off").wait_ready()
    assert {worker["jail"] for worker in server.statusz()["workers"]} == {"off"}
    assert "avap_worker_jailed{" not in server.http("/metrics")[1]
