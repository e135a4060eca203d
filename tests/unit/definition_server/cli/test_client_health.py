"""``health``, once and with ``--watch``, against a gRPC server in this process."""

from __future__ import annotations

import json
import queue
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.unit.definition_server.cli.command_server import (
    NO_SETTINGS,
    NOT_SERVING,
    PATIENCE,
    SERVING,
    Server,
    invoke,
    spawn,
)

from definition_server.cli import client


def test_health_of_a_serving_server_exits_0_without_a_key(server: Server) -> None:
    result = server.run(client.health, API_KEY=None)
    assert (result.exit_code, result.stdout, result.stderr) == (0, "SERVING\n", "")


def test_health_of_a_server_that_is_not_serving_exits_69(server: Server) -> None:
    server.health.set("", NOT_SERVING)
    result = server.run(client.health)
    assert (result.exit_code, result.stdout) == (69, "NOT_SERVING\n")


def test_health_asks_about_the_service_named(server: Server) -> None:
    server.health.set("avap.DefinitionEngine", NOT_SERVING)
    result = server.run(client.health, "--service", "avap.DefinitionEngine", "--json")
    assert result.exit_code == 69
    assert json.loads(result.stdout) == {
        "server": f"127.0.0.1:{server.port}",
        "service": "avap.DefinitionEngine",
        "status": "NOT_SERVING",
    }


def test_health_of_an_unknown_service_exits_69(server: Server) -> None:
    result = server.run(client.health, "--service", "nobody")
    assert (result.exit_code, result.stdout) == (69, "SERVICE_UNKNOWN\n")


def test_health_prints_an_unknown_status_by_number(server: Server) -> None:
    server.health.set("", 77)
    assert server.run(client.health).stdout == "STATUS_77\n"


def test_health_without_a_server_exits_69_with_the_cause(unused_port: int) -> None:
    result = invoke(client.health, "--json", "--port", str(unused_port))
    assert result.exit_code == 69
    assert json.loads(result.stdout)["status"] == "UNREACHABLE"
    assert f"127.0.0.1:{unused_port} is unavailable" in result.stderr


def test_health_of_a_silent_server_exits_69_after_the_timeout(deaf_port: int) -> None:
    result = invoke(client.health, "--port", str(deaf_port), "--timeout", "0.2")
    assert (result.exit_code, result.stdout) == (69, "")
    assert "within 0.2 s" in result.stderr


@pytest.mark.parametrize("form", [[], ["--watch"]])
def test_health_of_a_server_without_a_health_service_exits_69(form: list[str]) -> None:
    bare = Server()
    bare.health = None
    bare.start()
    try:
        result = bare.run(client.health, *form)
    finally:
        bare.stop()
    assert result.exit_code == 69
    assert "UNIMPLEMENTED" in result.stderr


def test_health_refuses_a_service_that_is_not_utf8(server: Server) -> None:
    assert server.run(client.health, "--service", "\udcff").exit_code == 2


class Watching:
    """``health --watch --json`` in a process of its own, line by line."""

    def __init__(self, environment: dict[str, str | None], *arguments: str) -> None:
        self.process = spawn("health", "--watch", "--json", *arguments, environment=environment, stdout=-1, stderr=-1)
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)

    def next(self) -> dict[str, str]:
        told: dict[str, str] = json.loads(self._lines.get(timeout=PATIENCE))
        return told

    def interrupt(self) -> int:
        """Send Ctrl-C and return the exit code. Every state must have been printed, but no traceback."""
        self.process.send_signal(signal.SIGINT)
        code: int = self.process.wait(PATIENCE)
        self._reader.join()
        assert self._lines.empty()
        assert b"Traceback" not in self.process.stderr.read()  # gRPC's own log may mention a GOAWAY
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture
def watching(server: Server) -> Iterator[Watching]:
    running = Watching(server.environment, "--timeout", str(PATIENCE))
    yield running
    running.close()


def test_a_watch_prints_every_change_until_ctrl_c_and_exits_0(server: Server, watching: Watching) -> None:
    first = watching.next()
    assert first["status"] == "SERVING"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first["ts"])
    server.health.set("", NOT_SERVING)
    assert watching.next()["status"] == "NOT_SERVING"
    server.health.set("", SERVING)
    assert watching.next()["status"] == "SERVING"
    assert watching.interrupt() == 0


def test_a_watch_continues_when_the_server_stops_and_reconnects_when_it_starts(
    server: Server, watching: Watching
) -> None:
    assert watching.next()["status"] == "SERVING"
    server.stop()
    gone = watching.next()
    assert gone["status"] == "UNREACHABLE"
    assert gone["cause"]
    server.start()
    assert watching.next()["status"] == "SERVING"
    assert watching.interrupt() == 0


class CountingHealth(health_pb2_grpc.HealthServicer):
    """Every watch sends SERVING once, and then ends if ``ends`` is true. The third watch sets ``often``."""

    def __init__(self, *, ends: bool) -> None:
        self._ends = ends
        self._watches = 0
        self.often = threading.Event()

    def Watch(self, request: Any, context: Any) -> Iterator[Any]:
        self._watches += 1
        if self._watches == 3:
            self.often.set()
        yield health_pb2.HealthCheckResponse(status=SERVING)
        if not self._ends:
            left = threading.Event()
            context.add_callback(left.set)
            left.wait(PATIENCE)


@pytest.mark.parametrize("ends", [True, False], ids=["the server ends", "fall silent"])
def test_a_watch_whose_stream_ends_or_is_silent_is_renewed_without_a_message(ends: bool) -> None:
    server = Server()
    server.health = CountingHealth(ends=ends)
    server.start()
    watching = Watching(server.environment, "--timeout", "2")
    try:
        assert watching.next()["status"] == "SERVING"
        assert server.health.often.wait(PATIENCE)
        assert watching.interrupt() == 0  # nothing further was printed
    finally:
        watching.close()
        server.stop()


def test_a_watch_of_a_silent_server_prints_unreachable(deaf_port: int) -> None:
    watching = Watching({**NO_SETTINGS, "PORT": str(deaf_port)}, "--timeout", "0.2")
    try:
        assert watching.next()["status"] == "UNREACHABLE"
        assert watching.interrupt() == 0
    finally:
        watching.close()


def test_a_watch_tries_again_at_growing_but_bounded_intervals(
    unused_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []

    def sleep(seconds: float) -> None:
        delays.append(seconds)
        if len(delays) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", sleep)
    result = invoke(client.health, "--watch", "--port", str(unused_port))
    assert result.exit_code == 0
    assert result.stdout.count("UNREACHABLE") == 1
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (0.2, 5.0)


def test_a_watch_without_json_prints_a_time_and_a_state_per_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(client.time, "sleep", sleep)
    server = Server()
    server.health = CountingHealth(ends=True)
    server.start()
    try:
        result = server.run(client.health, "--watch")
    finally:
        server.stop()
    assert result.exit_code == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\S+ SERVING\n", result.stdout)
