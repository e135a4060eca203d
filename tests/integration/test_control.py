"""The operator's commands against a real server: their output, their exit codes, and the limits for strangers."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.operator_command import answer, run
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

pytestmark = pytest.mark.any_transport


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def server(start_server: StartServer, table: Table, directory: Path) -> ServerProcess:
    table.add_commands(3)
    running = start_server(table.url, SNAPSHOT_DIR=str(directory), SYNC_INTERVAL_SECONDS="300").wait_ready()
    running.wait_log("Control socket open")
    return running


def test_status_shows_the_served_catalogue_and_the_workers(server: ServerProcess, directory: Path) -> None:
    status = answer("status", directory=directory)
    assert status["ready"] is True
    assert status["served"]["definitions"] == 3
    assert {worker["version_hash"] for worker in status["workers"]} == {status["served"]["version_hash"]}
    times = [status["served"][name] for name in ("created_at", "published_at", "all_workers_at")]
    assert times == sorted(times), "built, then published, then served by the last worker"
    assert status["sync"]["last_outcome"] == "published"
    assert status["fresh"] is True
    assert status["safe_to_restart"]["safe"] is True
    assert status["sync"]["next_attempt"].endswith("Z")
    assert [key["id"] for key in status["keys"]] == ["default"]
    assert server.statusz()["control_socket"] == "open"
    side_by_side = run("status", f"127.0.0.1:{server.metrics_port}", directory=directory)
    assert side_by_side.returncode == 0, side_by_side.stderr
    assert "\tyes\tready\t" in side_by_side.stdout
    assert status["served"]["version_hash"] in side_by_side.stdout
    plain = run("status", directory=directory)
    assert plain.returncode == 0
    assert status["served"]["version_hash"] in plain.stdout


@pytest.mark.thorough  # starts a server
def test_log_and_status_state_that_nothing_is_stored_if_there_is_no_snapshot_directory(
    start_server: StartServer, table: Table, tmp_path: Path
) -> None:
    table.add_commands(3)
    path = tmp_path / "control.sock"
    server = start_server(table.url, CONTROL_SOCKET=str(path), DATABASE_POOL_SIZE="20").wait_ready()
    server.wait_log("Control socket open")
    [line] = server.logged("Nothing is stored: SNAPSHOT_DIR is not set")
    assert (line["level"], "SNAPSHOT_DIR" in line["remedy"]) == ("WARN", True)
    [hint] = server.logged("An environment variable may be wrong")
    assert hint["variable"] == "DATABASE_POOL_SIZE"
    shown = run("status", directory=tmp_path, CONTROL_SOCKET=str(path))
    assert "nothing is stored, because SNAPSHOT_DIR is not set" in " ".join(shown.stdout.split())


@pytest.mark.thorough  # starts a server
def test_log_and_status_do_not_mention_storing_if_there_is_a_snapshot_directory(
    server: ServerProcess, directory: Path
) -> None:
    assert not server.logged("Nothing is stored: SNAPSHOT_DIR is not set")
    assert "nothing is stored" not in run("status", directory=directory).stdout


def test_sync_reads_the_table_at_once_and_reports_the_outcome(
    server: ServerProcess, directory: Path, table: Table
) -> None:
    assert answer("sync", directory=directory)["outcome"] == "unchanged"
    table.add_commands(1, start=3)
    synced = answer("sync", directory=directory)
    assert synced["outcome"] == "published"
    assert synced["served"]["definitions"] == 4
    assert {worker["definitions"] for worker in server.statusz()["workers"]} == {4}
    table.run("DROP TABLE obex_dapl_functions")
    failed = run("sync", directory=directory)
    assert failed.returncode == 1
    assert "obex_dapl_functions" in failed.stdout


def test_roll_replaces_every_worker(server: ServerProcess, directory: Path) -> None:
    before = server.worker_pids()
    assert answer("roll", directory=directory)["replaced"] == 2
    assert not set(before) & set(server.worker_pids())


@pytest.mark.thorough  # starts servers
def test_the_socket_is_gone_after_the_end_and_replaced_after_a_kill(
    start_server: StartServer, server: ServerProcess, directory: Path, table: Table
) -> None:
    path = directory / "control.sock"
    os.kill(server.pid, signal.SIGKILL)
    server.wait_exit()
    assert path.is_socket()
    gone = run("status", directory=directory)
    assert gone.returncode == 69
    assert str(path) in gone.stderr
    assert "Traceback" not in gone.stderr
    second = start_server(table.url, SNAPSHOT_DIR=str(directory)).wait_ready()
    second.wait_log("Control socket open")
    assert answer("status", directory=directory)["pid"] == second.pid
    second.end()
    assert not path.exists()
    assert run("status", directory=directory).returncode == 69


@pytest.mark.thorough  # starts servers
def test_a_second_instance_serves_without_the_socket_and_opens_it_when_the_first_ends(
    start_server: StartServer, server: ServerProcess, directory: Path, table: Table
) -> None:
    second = start_server(table.url, SNAPSHOT_DIR=str(directory)).wait_ready()
    line = second.wait_log("No control socket; the server serves without it")
    assert "another instance" in line["error"]
    assert "CONTROL_SOCKET" in line["remedy"]
    assert second.statusz()["control_socket"] == "unavailable"
    assert answer("status", directory=directory)["pid"] == server.pid
    server.end()
    second.wait_log("Control socket open")
    assert answer("status", directory=directory)["pid"] == second.pid


@pytest.mark.thorough  # starts servers
def test_a_server_without_a_place_for_the_socket_serves(
    start_server: StartServer, table: Table, tmp_path: Path
) -> None:
    table.add_commands(1)
    long = start_server(table.url, CONTROL_SOCKET=str(tmp_path / ("x" * 120))).wait_ready()
    assert "107" in long.wait_log("No control socket; the server serves without it")["error"]
    read_only = start_server(table.url, CONTROL_SOCKET="/proc/control.sock").wait_ready()
    assert "remedy" in read_only.wait_log("No control socket; the server serves without it")
    assert read_only.statusz()["control_socket"] == "unavailable"


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"", id="silence", marks=pytest.mark.thorough),
        pytest.param(b"\x00" * 4096, id="zeros", marks=pytest.mark.thorough),
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", id="http/1.1", marks=pytest.mark.thorough),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 9000, id="broken frames"),
    ],
)
def test_a_client_that_sends_garbage_harms_only_itself(server: ServerProcess, directory: Path, octets: bytes) -> None:
    with ExitStack() as stack:
        for _ in range(100):  # more clients than the limit of connections
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(10)
            client.connect(str(directory / "control.sock"))
            with suppress(OSError):
                client.send(octets)
        assert answer("status", directory=directory)["ready"] is True
    assert not server.logged("The master failed; leaving")


def test_a_client_of_another_account_is_refused_and_reported(server: ServerProcess, directory: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can take another uid")
    path = directory / "control.sock"
    path.chmod(0o666)
    for each in (directory, *list(directory.parents)[:-2]):
        each.chmod(each.stat().st_mode | 0o055)
    program = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "s = socket.socket(socket.AF_UNIX);"
        f"s.connect({str(path)!r}); sys.stdout.buffer.write(s.recv(1000))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=30)
    assert b"uid 65534" in done.stdout
    until(lambda: server.logged("A connection was refused"), server.tail)
    assert "uid 65534" in server.wait_log("A connection was refused")["error"]


@pytest.mark.thorough  # starts many commands
def test_unknown_versions_and_wrong_arguments_are_refused_with_a_reason(server: ServerProcess, directory: Path) -> None:
    for arguments, code in (
        (("accept", "00000000"), 3),
        (("pin", "00000000", "--for", "1h"), 3),
        (("diff", "00000000", "11111111"), 3),
        (("pin", "00000000"), 2),
        (("pin", "00000000", "--for", "soon"), 2),
        (("pin", "00000000", "--until", "2001-01-01T00:00Z"), 2),
        (("accept", "short"), 2),
    ):
        done = run(*arguments, directory=directory)
        assert done.returncode == code, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
    assert run("status", directory=Path("/nonexistent")).returncode == 69
