"""The state that a server inherits, such as closed descriptors; signals to its process group or during its start."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, combinations
from pathlib import Path

import pytest
from tests.support.client import Client
from tests.support.families import sample
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import CHECKER, KEY, ServerProcess
from tests.support.table import Table

pytestmark = [pytest.mark.slow, pytest.mark.transports("native")]

CLOSED = list(chain.from_iterable(combinations((0, 1, 2), size) for size in (1, 2, 3)))


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(server: ServerProcess, closed: tuple[int, ...]) -> Iterator[subprocess.Popen[bytes]]:
    """The server without those descriptors."""
    redirect = " ".join({0: "<&-", 1: ">&-", 2: "2>&-"}[number] for number in closed)
    others = " ".join({0: "</dev/null", 1: ">/dev/null", 2: "2>/dev/null"}[n] for n in {0, 1, 2} - set(closed))
    process = subprocess.Popen(
        ["sh", "-c", f'exec "$@" {redirect} {others}', "sh", *server.command],
        env=server.environment,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("closed", sample(CLOSED, [(0,), (0, 1, 2)]), ids=lambda closed: "".join(map(str, closed)))
def test_a_server_without_standard_descriptors_serves(closed: tuple[int, ...], table: Table, database_url: str) -> None:
    table.add_commands(1)
    port = free_port()
    server = ServerProcess(database_url, PORT=str(port), WORKERS="1")

    def served() -> bool:
        with Client(port, KEY) as client:
            return client.get("command0", timeout=1).name == "command0"

    def serves() -> bool:
        try:
            return served()
        except Exception:  # noqa: BLE001 - not yet
            return False

    with started(server, closed) as process:
        until(serves, "the server serves", seconds=40)
        for pid in [process.pid, *children(process.pid)]:
            standard = {number: open_descriptors(pid)[number] for number in range(3)}
            assert all(standard[number] == "/dev/null" for number in closed), standard


def children(pid: int) -> list[int]:
    """The workers of the master ``pid``. (The checker is left out: it has none of the descriptors of the master.)"""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in pids if CHECKER not in Path(f"/proc/{child}/cmdline").read_bytes()]


NOT_STOPPING = [signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM, signal.SIGIO, signal.SIGVTALRM, signal.SIGWINCH]


@pytest.fixture
def server(table: Table, database_url: str) -> Iterator[ServerProcess]:
    table.add_commands(1)
    with ServerProcess(database_url, DRAIN_WAIT_SECONDS="1.5") as server:
        server.wait_ready()
        yield server


def test_signals_to_the_whole_group_end_no_worker(server: ServerProcess) -> None:
    before = server.worker_pids()
    for number in NOT_STOPPING:
        os.killpg(server.pid, number)
        for pid in before:
            os.kill(pid, number)
    for pid in before:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR2):
            os.kill(pid, number)
    server.wait_log("Syncing at once")
    with Client(server.port, KEY) as client:
        assert client.get("command0").name == "command0"
    assert server.worker_pids() == before
    assert not server.logged("Worker ended; starting another")


@pytest.mark.thorough  # takes seconds
@pytest.mark.parametrize("number", sample([signal.SIGTERM, signal.SIGINT, signal.SIGQUIT]))
def test_a_stop_of_the_whole_group_waits_for_load_balancers(server: ServerProcess, number: signal.Signals) -> None:
    port = server.port
    with Client(port, KEY) as client:
        client.get("command0")
        begun = time.monotonic()
        os.killpg(server.pid, number)
        server.wait_log("Draining")
        with Client(port, KEY) as late:
            assert late.get("command0").name == "command0", "a new connection is served during the wait"
        assert client.get("command0").name == "command0"
    assert server.wait_exit() == 0
    assert time.monotonic() - begun >= 1.5
    assert not server.other_output
    assert server.logged("Stopped")


@pytest.mark.parametrize(
    "number",
    sample([signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGUSR1]),
)
@pytest.mark.parametrize("after", ["imports", "Starting"])
def test_a_signal_during_the_start_is_handled(
    number: signal.Signals, after: str, table: Table, database_url: str
) -> None:
    table.add_commands(1)
    with ServerProcess(database_url) as server:
        if after == "imports":
            until(lambda: caught(server.pid) >> (signal.SIGUSR2 - 1) & 1, "the handlers are installed")
        else:
            server.wait_log("Starting")
        os.killpg(server.pid, number)
        if number in (signal.SIGHUP, signal.SIGUSR1):
            server.wait_ready()
            assert not server.logged("Worker ended; starting another")
        else:
            assert server.wait_exit() == 0
            assert not server.worker_pids()
        assert not server.other_output, "no traceback"


@pytest.mark.thorough  # starts two servers
@pytest.mark.parametrize("umask", sample([0o777, 0o000, 0o277]), ids="{:03o}".format)
def test_the_files_of_a_server_are_private_with_any_umask_and_the_next_start_reads_them(
    umask: int, table: Table, database_url: str, tmp_path: Path
) -> None:
    table.add_commands(1)
    stored = tmp_path / "stored"
    stored.mkdir(0o700)
    settings = {"SNAPSHOT_DIR": str(stored), "CONTROL_SOCKET": str(stored / "control.sock"), "WORKERS": "1"}
    for _ in range(2):
        server = ServerProcess(database_url, **settings)
        server.command = ["sh", "-c", f'umask {umask:o}; exec "$@"', "sh", *server.command]
        with server:
            server.wait_ready()
            until(lambda: (stored / "last-known-good.avapsnap").exists(), "it is stored")
            until(lambda: any((stored / "history").glob("*.avapsnap")), "the history is stored")
            modes = {path.relative_to(stored).parts[0]: path.stat().st_mode & 0o777 for path in stored.rglob("*")}
            assert set(modes.values()) <= {0o600, 0o700}, modes
    assert not server.logged("Last-known-good snapshot not usable")


@pytest.mark.thorough  # takes seconds
def test_a_parent_that_ignores_sigchld_does_not_hide_how_a_worker_ended(table: Table, database_url: str) -> None:
    table.add_commands(1)
    server = ServerProcess(database_url, WORKERS="1")
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    server.command = [sys.executable, "-c", ignoring, *server.command]
    with server:
        server.wait_ready()
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGKILL)
        assert server.wait_log("Worker ended; starting another")["how"] == "signal 9"


def caught(pid: int) -> int:
    """The set of signals that a process handles."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("SigCgt:")).split()[1], 16)
