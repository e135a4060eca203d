"""A stalled reader of stdout stops neither calls nor probes, supervision or shutdown; later all lines are written."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from tests.support.client import Client
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

PIPE = 65_536
FILL = (
    f"import os, sys; os.write(1, b'x' * {PIPE - 1} + b'\\n'); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class StalledServer(ServerProcess):
    """A server whose stdout and stderr are one full pipe, which nobody reads until the test does."""

    def __init__(self, database_url: str, **settings: str) -> None:
        self.ports = free_port(), free_port()
        super().__init__(database_url, PORT=str(self.ports[0]), METRICS_PORT=str(self.ports[1]), **settings)
        self.command = [sys.executable, "-c", FILL, *self.command[1:]]
        self.read_on = threading.Event()

    @property
    def metrics_port(self) -> int:
        """The admin port, which the test has chosen itself, because the log cannot be read."""
        return self.ports[1]

    def _read(self, process: subprocess.Popen[str]) -> None:
        self.read_on.wait()
        super()._read(process)

    def end(self) -> None:
        self.read_on.set()
        super().end()


@pytest.mark.any_transport
def test_a_log_pipe_that_is_not_read_stops_neither_calls_nor_supervision_nor_the_shutdown(
    table: Table, transport: str
) -> None:
    table.add_commands(3)
    with StalledServer(table.url, TRANSPORT=transport, WORKERS="1") as server:
        until(lambda: _status(server) == 200, "ready", seconds=60)
        with Client(server.ports[0]) as client:
            assert client.get("command1").name == "command1"
        table.add_commands(1, start=3)
        until(lambda: server.statusz()["catalog"]["definitions"] == 4, "the master publishes")
        (victim,) = server.worker_pids()
        os.kill(victim, signal.SIGKILL)
        until(lambda: server.statusz()["workers"][0]["restarts"] == 1, "the dead worker is noticed")
        until(lambda: _status(server) == 200, "and replaced")
        assert server.statusz()["logs"]["waiting_lines"] > 3
        assert server.metric("avap_log_lines_waiting") > 3
        assert server.metric("avap_log_lines_dropped_total") == 0
        server.read_on.set()
        # Every line is there, in order, although it was logged long ago.
        server.wait_log("Worker ended; starting another", how="signal 9")
        assert server.logged("Starting")
        times = [line["ts"] for line in server.lines if line["pid"] == server.pid]
        assert times == sorted(times)
        until(lambda: server.statusz()["logs"]["waiting_lines"] == 0, "all lines are written")


@pytest.mark.thorough  # takes seconds
@pytest.mark.any_transport
def test_a_server_whose_log_is_never_read_ends_on_sigterm(table: Table, transport: str) -> None:
    table.add_commands(1)
    with StalledServer(table.url, TRANSPORT=transport, WORKERS="1") as server:
        until(lambda: _status(server) == 200, "ready", seconds=60)
        server.signal(signal.SIGTERM)
        assert server.wait_exit(20) == 0


def _status(server: ServerProcess) -> int:
    try:
        return server.http("/readyz")[0]
    except OSError:
        return 0
