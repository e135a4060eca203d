"""The jail of a worker, from inside a real one: what it must not do is refused, and what it must do works."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from pathlib import Path

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.conftest import StartServer
from tests.support.client import Client, failure
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.jail.confinement import support

INSIDE = Path(__file__).parents[1] / "support/inside_worker"

pytestmark = pytest.mark.skipif(bool(support().missing), reason=f"this kernel lacks {support().missing}")

REFUSED = {"EPERM", "EACCES"}


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    return {"WORKERS": "1", "JAIL": "require", "PYTHONPATH": str(INSIDE)}


def attempts(server: ServerProcess) -> dict[str, str]:
    """What code in the worker could do."""
    before = len(server.lines)
    (worker,) = server.worker_pids()
    os.kill(worker, signal.SIGUSR1)
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
    os.kill(worker, signal.SIGUSR1)
    until(lambda: server.logged("Imported", name="colorsys"), server.tail)
    assert [line["name"] for line in server.logged("Imported")] == ["colorsys"]
    assert any("an exception with a traceback" in line for line in server.other_output), server.tail()


def test_a_confined_worker_imports_nothing_and_does_all_its_work(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    """What is imported late needs a file to be opened, and fails in a worker that has not met it before."""
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
    table.add_commands(1, start=3)  # a publication, and a swap
    key.write_text("another key")
    server.signal(signal.SIGHUP)
    until(lambda: _gets("another key", server), "the other key")
    server.end()
    assert [line["name"] for line in server.logged("Imported")] == []
    assert server.logged("Worker ended; starting another") == []


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
