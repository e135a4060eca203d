"""What a server inherits beside descriptors and signals: Python's own variables, locale, limits of the process, file
systems that are missing or small. It serves, ends with its exit code, and prints nothing that is no log line."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.client import Client
from tests.support.families import sample
from tests.support.server import FAST, KEY, ServerProcess
from tests.support.table import Table

pytestmark = [pytest.mark.slow, pytest.mark.transports("native")]

VARIABLES = {
    "PYTHONINSPECT": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONASYNCIODEBUG": "1",
    "PYTHONMALLOC": "debug",
    "PYTHONWARNINGS": "error",
    "PYTHONSTARTUP": "/nonexistent/startup.py",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONPYCACHEPREFIX": "/nonexistent/cache",
    "PYTHONIOENCODING": "ascii:strict",
    "PYTHONDEVMODE": "1",
    "LC_ALL": "xx_YY.ISO-8859-15",
    "TZ": "Nonsense/Zone",
    "TMPDIR": "/nonexistent",
    "HOME": "/nonexistent",
    "PATH": "/nonexistent",
}
SHELL = {
    "a working directory that is deleted": 'cd "$(mktemp -d)" && rmdir "$PWD"',
    "no HOME, PATH and LANG": "unset HOME PATH LANG",
    "64 open files": "ulimit -n 64",
    "a stack of 256 KiB": "ulimit -s 256",
    "1 GB of address space": "ulimit -v 1000000",
    "signals ignored": 'trap "" PIPE CHLD HUP',
    "core dumps": "ulimit -c unlimited",
}
MOUNTS = {
    "no /proc": "umount -l /proc",
    "other processes hidden": "mount -t proc -o hidepid=2 proc /proc",
    "64 KiB of shared memory": "mount -t tmpfs -o size=64k none /dev/shm",
    "no /sys": "umount -l /sys",
    "an empty /etc": "mount -t tmpfs none /etc",
    "no device but /dev/null": "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3",
    "a host without a name": "echo > /proc/sys/kernel/hostname",
}


def serves_and_ends(server: ServerProcess, table: Table) -> None:
    table.add_commands(2)
    with server:
        server.wait_ready()
        with Client(server.port, KEY) as client:
            assert client.get("command1").name == "command1"
        assert server.statusz()["held_commands"] == []
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    assert not server.other_output
    assert not [line for line in server.lines if line["level"] in ("ERROR", "FATAL")], server.tail()


def in_shell(server: ServerProcess, prelude: str, *wrapper: str) -> ServerProcess:
    server.command = [*wrapper, "/bin/sh", "-c", f'{prelude}; exec "$@"', "sh", *server.command]
    return server


@pytest.mark.parametrize("variable", sample(VARIABLES, ("PYTHONINSPECT", "PYTHONOPTIMIZE")))
def test_a_server_serves_whatever_a_variable_of_python_or_of_the_system_says(
    variable: str, table: Table, database_url: str
) -> None:
    server = ServerProcess(database_url, WORKERS="1")
    server.environment[variable] = VARIABLES[variable]
    serves_and_ends(server, table)


@pytest.mark.parametrize("name", sample(SHELL, ("64 open files",)))
def test_a_server_serves_whatever_a_shell_leaves_it(name: str, table: Table, database_url: str) -> None:
    serves_and_ends(in_shell(ServerProcess(database_url, WORKERS="1"), SHELL[name]), table)


@pytest.mark.parametrize("name", sample(MOUNTS, ("no /proc",)))
def test_a_server_serves_without_file_systems_that_others_have(name: str, table: Table, database_url: str) -> None:
    apart = ("unshare", "--mount", "--uts")
    if not shutil.which("unshare") or subprocess.run((*apart, "true"), capture_output=True, check=False).returncode:
        pytest.skip("this account may make no namespace")
    serves_and_ends(in_shell(ServerProcess(database_url, WORKERS="1"), MOUNTS[name], *apart), table)


def test_a_limit_under_which_nothing_can_be_served_is_refused_with_its_remedy() -> None:
    ended = run("ulimit -f 64", {"DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"})
    assert ended.returncode == 78
    assert "LimitFSIZE" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_limit_of_cpu_time_is_named_and_does_not_make_rows_bad(table: Table, database_url: str) -> None:
    table.add_commands(3)
    with in_shell(ServerProcess(database_url, WORKERS="1"), "ulimit -t 30") as server:
        server.wait_ready()
        (line,) = server.logged("A limit of the process is low")
        assert (line["what"], line["limit"]) == ("CPU time", 30)
        assert "LimitCPU" in line["remedy"]
        server.wait_count(3)
        assert not server.logged("Commands are left out: no good version is known")


def test_a_catalogue_beyond_the_size_of_a_file_fails_its_cycle_and_says_what_to_raise(
    table: Table, database_url: str
) -> None:
    table.add_commands(3, 1_000_000)
    with in_shell(ServerProcess(database_url, WORKERS="1"), "ulimit -f 4096") as server:
        line = server.wait_log("Sync failed")
        assert "ulimit -f" in line["error"]
        assert server.http("/livez")[0] == 200


def test_an_invalid_environment_ends_with_78_although_python_is_asked_to_stay() -> None:
    ended = run(":", {"PYTHONINSPECT": "1"})
    assert ended.returncode == 78
    assert "DATABASE_URL is not set" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_master_and_its_workers_write_no_core_dump(table: Table, database_url: str, tmp_path: Path) -> None:
    table.add_commands(1)
    server = in_shell(ServerProcess(database_url, WORKERS="1", JAIL="auto"), "ulimit -c unlimited")
    server.directory = tmp_path
    with server:
        server.wait_ready()
        (worker,) = server.worker_pids()
        os.kill(worker, signal.SIGSEGV)
        assert "11" in server.wait_log("Worker ended; starting another")["how"]
    assert not [*tmp_path.iterdir()]


def run(prelude: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in FAST and name != "DATABASE_URL"}
    return subprocess.run(
        ["sh", "-c", f'{prelude}; exec "$@"', "sh", sys.executable, "-m", "definition_server", "serve"],
        env=kept | {"API_KEY": KEY, "HOST": "127.0.0.1", "PORT": "0", "METRICS_PORT": "0"} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
