"""A gRPC server in this process for the commands of clients, and ways to run these commands."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import click
import grpc
from click.testing import CliRunner, Result
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from definition_server.rpc import avap_pb2, avap_pb2_grpc

KEY = "a key of the tests"
CODE = b"def plus(x):\n    return x + 1\n"
INTERFACE = '[{"item": "x", "type": "var"}]'
PATIENCE = 30.0
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Engine(avap_pb2_grpc.DefinitionEngineServicer):
    """Serves ``commands``. If ``failure`` is set, every call fails with it. While ``gate`` is closed, every answer is
    delayed."""

    def __init__(self) -> None:
        self.commands: list[avap_pb2.CommandResponse] = []
        self.failure: tuple[grpc.StatusCode, str] | None = None
        self.called = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def add(self, name: str, code: bytes = CODE, interface: str = INTERFACE) -> None:
        self.commands.append(
            avap_pb2.CommandResponse(name=name, type="function", interface_json=interface, code=code, hash="a1" * 32)
        )

    def _admit(self, context: grpc.ServicerContext) -> None:
        self.called.set()
        self.gate.wait(PATIENCE)
        if dict(context.invocation_metadata()).get("x-avap-auth") != KEY:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials")
        if self.failure is not None:
            context.abort(*self.failure)

    def GetCommand(self, request: Any, context: Any) -> avap_pb2.CommandResponse:
        self._admit(context)
        for command in self.commands:
            if command.name == request.name:
                return command
        context.abort(grpc.StatusCode.NOT_FOUND, f"Command '{request.name}' not found")
        raise AssertionError

    def SyncCatalog(self, request: Any, context: Any) -> avap_pb2.CatalogResponse:
        self._admit(context)
        return avap_pb2.CatalogResponse(commands=self.commands, total_count=len(self.commands), version_hash="5e" * 32)


class Server:
    """A gRPC server on 127.0.0.1 that can be stopped and started again on the same port."""

    def __init__(self) -> None:
        self.engine = Engine()
        self.health: Any = grpc_health.HealthServicer()
        self.port = 0
        self._server: grpc.Server | None = None
        self.pool: ThreadPoolExecutor | None = None

    def start(self) -> None:
        self.pool = ThreadPoolExecutor(8)
        options = [("grpc.max_send_message_length", -1), ("grpc.so_reuseport", 1)]
        self._server = grpc.server(self.pool, options=options)
        avap_pb2_grpc.add_DefinitionEngineServicer_to_server(self.engine, self._server)
        if self.health is not None:
            health_pb2_grpc.add_HealthServicer_to_server(self.health, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self.engine.gate.set()
        if self._server is not None and self.pool is not None:
            self._server.stop(0).wait(PATIENCE)
            self.pool.shutdown()

    @property
    def environment(self) -> dict[str, str | None]:
        return {**NO_SETTINGS, "API_KEY": KEY, "PORT": str(self.port)}

    def run(self, command: click.Command, *arguments: str, **environment: str | None) -> Result:
        return invoke(command, *arguments, **{**self.environment, **environment})


NO_SETTINGS: dict[str, str | None] = {
    "API_KEY": None,
    "API_KEY_FILE": None,
    "DEFINITION_SERVER_HOST": None,
    "PORT": None,
}


def invoke(command: click.Command, *arguments: str, **environment: str | None) -> Result:
    result = CliRunner().invoke(command, list(arguments), env={**NO_SETTINGS, **environment})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def spawn(
    command: str, *arguments: str, environment: dict[str, str | None], module: str = "client", **streams: Any
) -> Any:
    """Run the command of ``module`` in a process of its own, in which SIGINT has its default action even if this
    process ignores it."""
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"from definition_server.cli.{module} import {command}; {command}()"
    )
    variables = {**os.environ, "COLUMNS": "100", "TERM": "xterm-256color", **environment}
    given = {name: value for name, value in variables.items() if value is not None and name != "NO_COLOR"}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], env=given, **streams)


def on_a_terminal(
    command: str,
    *arguments: str,
    environment: dict[str, str | None],
    module: str = "client",
    stdout: Any = None,
) -> str:
    """The command's output on a terminal; only its stderr if ``stdout`` is given."""
    controller, terminal = pty.openpty()
    try:
        target = terminal if stdout is None else stdout
        process = spawn(command, *arguments, environment=environment, module=module, stdout=target, stderr=terminal)
    finally:
        os.close(terminal)
    shown = b""
    with os.fdopen(controller, "rb", buffering=0) as screen, process:
        try:
            while octets := screen.read(65_536):
                shown += octets
        except OSError:  # EIO: the command has closed the terminal
            pass
    assert process.returncode == 0, shown
    return shown.decode()
