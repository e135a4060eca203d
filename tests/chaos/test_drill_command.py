"""The drill command on a server that it did not start: its drills, questions, output and exit codes."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tests.chaos.test_drills_client import BROKEN
from tests.conftest import StartServer
from tests.support.polling import until
from tests.support.providers import create_database, drop_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

ROOT = Path(__file__).parents[2]
HARMLESS = [
    "observe", "client-crowd-gentle", "client-slow-readers-gentle", "client-resets-gentle", "client-wrong-keys-gentle",
]  # fmt: skip
SHORT = ("--seconds", "1", "--interval", "0.2")


def command(*arguments: str, **environment: str) -> tuple[list[str], dict[str, str]]:
    kept = {name: value for name, value in os.environ.items() if name not in ("API_KEY", "DATABASE_URL")}
    return [sys.executable, "-m", "tests.chaos.drill", *arguments], kept | {"API_KEY": KEY} | environment


def drill(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line, variables = command(*arguments, **environment)
    return subprocess.run(
        line,
        cwd=ROOT,
        env=variables,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def _hears_ctrl_c() -> None:
    """Tests that run in the background ignore SIGINT, and child processes inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def served(table: Table, start_server: StartServer) -> tuple[ServerProcess, Table]:
    table.add_commands(200)
    return start_server(table.url).wait_ready(), table


def at(server: ServerProcess) -> tuple[str, str]:
    return "--target", f"127.0.0.1:{server.port}"


def outcomes(path: Path) -> dict[str, dict[str, Any]]:
    return {each["fault"]: each for each in json.loads(path.read_text())}


@pytest.mark.thorough  # whole drills
@pytest.mark.timeout(300)
def test_without_a_fault_option_only_harmless_faults_run(served: tuple[ServerProcess, Table], tmp_path: Path) -> None:
    server, _ = served
    done = drill(*at(server), *SHORT, "--json", str(tmp_path / "drill.json"))
    found = outcomes(tmp_path / "drill.json")
    assert (done.returncode, list(found)) == (0, HARMLESS), done.stdout + done.stderr
    assert {each["verdict"] for each in found.values()} == {"held"}
    assert all(each["load"]["plain"]["offered"] > 50 for each in found.values())
    assert "5 drills," in done.stdout
    assert "200 wrong keys a second" in done.stdout
    # The server has counted more successful calls than the other load can have made, so the drill used this server.
    assert server.metric("avap_requests_total", status="200") > 500
    assert server.metric("avap_requests_total", status="401") > 100


@pytest.mark.timeout(300)
def test_the_database_faults_end_with_the_drill(served: tuple[ServerProcess, Table], tmp_path: Path) -> None:
    server, table = served
    ids = ("--fault", "target-table-locked", "--fault", "target-sessions-cut")
    done = drill(*at(server), *SHORT, *ids, "--database", table.url, "--yes", "--json", str(tmp_path / "drill.json"))
    found = outcomes(tmp_path / "drill.json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {each["verdict"] for each in found.values()} == {"held"}
    assert all(each["fresh_seconds"] is not None for each in found.values()), "times are reported"
    with psycopg.connect(table.url) as connection:
        left = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'definition-server-drill'"
        assert connection.execute(left).fetchone() == (0,)
        connection.execute("LOCK TABLE obex_dapl_functions IN ACCESS EXCLUSIVE MODE NOWAIT")


@pytest.mark.transports
def test_a_broken_promise_exits_with_1(table: Table, start_server: StartServer) -> None:
    table.add_commands(200)
    server = start_server(table.url, PYTHONPATH=str(BROKEN), PYTHON_DRILL_BROKEN="lets-wrong-keys-in").wait_ready()
    done = drill(*at(server), *SHORT, "--fault", "client-wrong-keys-gentle")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
    assert "wrong keys were not all answered with UNAUTHENTICATED" in done.stdout


@pytest.mark.transports
def test_harmful_faults_need_a_confirmation(served: tuple[ServerProcess, Table]) -> None:
    server, table = served
    done = drill(*at(server), "--fault", "target-table-locked", "--database", table.url)
    assert done.returncode == 2
    assert "nothing was done: these faults need a confirmation" in done.stderr
    assert "target-table-locked: table locked ACCESS EXCLUSIVE" in done.stderr
    assert not server.logged("Sync failed")


@pytest.mark.thorough  # whole drills
@pytest.mark.transports
@pytest.mark.parametrize(("typed", "code"), [("yes", 2), ("the target's name", 0)])
def test_at_a_terminal_the_confirmation_is_the_targets_name(
    served: tuple[ServerProcess, Table], typed: str, code: int
) -> None:
    server, _ = served
    master, slave = pty.openpty()
    line, variables = command(*at(server), *SHORT, "--fault", "client-slow-readers")
    try:
        os.write(master, f"{at(server)[1] if code == 0 else typed}\n".encode())
        done = subprocess.run(
            line, cwd=ROOT, env=variables, stdin=slave, capture_output=True, text=True, timeout=100, check=False
        )
    finally:
        os.close(slave)
        os.close(master)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("nothing was done" in done.stderr) == (code == 2)


@pytest.mark.transports
def test_a_wrong_database_is_detected_before_any_fault(served: tuple[ServerProcess, Table], database_url: str) -> None:
    server, table = served
    other = create_database(database_url, "drill_other")
    try:
        Table(other).add_commands(3)
        arguments = (*at(server), "--fault", "target-table-locked", "--yes")
        done = drill(*arguments, "--database", other)
        assert done.returncode == 1
        assert "Is it the database that the target reads?" in done.stderr
        empty = drill(*arguments, "--database", f"{table.url}_is_not_there")
        assert empty.returncode == 69
        assert "the database of --database cannot be read" in empty.stderr
    finally:
        drop_database(database_url, "drill_other")


@pytest.mark.thorough  # whole drills
@pytest.mark.transports
def test_ctrl_c_ends_the_fault_and_prints_the_finished_drills(served: tuple[ServerProcess, Table]) -> None:
    server, table = served
    ids = ("--fault", "observe", "--fault", "target-table-locked")
    line, variables = command(*at(server), "--seconds", "5", *ids, "--database", table.url, "--yes")
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(
        line, cwd=ROOT, env=variables, text=True, start_new_session=True, preexec_fn=_hears_ctrl_c, **pipes
    ) as process:
        try:
            until(lambda: server.logged("Sync failed"), server.tail, seconds=60)
            os.killpg(process.pid, signal.SIGINT)  # to all processes of the group, as a terminal sends it
            out, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130, out + errors
    assert "1 drills" in out
    assert "the fault under way is over" in errors
    assert "Traceback" not in errors
    with psycopg.connect(table.url) as connection:
        connection.execute("SET lock_timeout = '5s'")
        connection.execute("LOCK TABLE obex_dapl_functions IN ACCESS EXCLUSIVE MODE")


@pytest.mark.transports
def test_a_refused_key_is_reported(served: tuple[ServerProcess, Table]) -> None:
    server, _ = served
    done = drill(*at(server), API_KEY="wrong")
    assert (done.returncode, done.stdout) == (4, "")
    assert "the key was refused by 127.0.0.1" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((), 2, "--target HOST:PORT is required"),
        (("--target", "staging"), 2, "is not HOST:PORT"),
        (("--target", "127.0.0.1:1"), 69, "no answer from 127.0.0.1:1"),
        (("--target", "127.0.0.1:1", "--fault", "no-such"), 2, "there is no fault no-such"),
        (("--target", "127.0.0.1:1", "--fault", "worker-killed"), 2, "it is not possible on a target"),
        (("--target", "127.0.0.1:1", "--fault", "target-table-locked"), 2, "needs the target's database"),
        (("--target", "127.0.0.1:1", "--key-file", __file__), 2, "give the key once"),
    ],
)
def test_wrong_usage_is_reported(arguments: tuple[str, ...], code: int, told: str) -> None:
    done = drill(*arguments)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_list_names_every_fault_and_needs_no_target() -> None:
    done = drill("--list")
    assert done.returncode == 0
    assert all(name in done.stdout for name in [*HARMLESS, "target-table-locked", "worker-killed", "db-killed"])
