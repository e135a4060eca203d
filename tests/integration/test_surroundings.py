"""The surroundings of a server: variables of Python, locale, limits of the process, missing or small file systems.

In all of them the server serves, ends with its exit code, and prints only log lines.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.client import Client
from tests.support.families import sample
from tests.support.polling import until
from tests.support.server import FAST, KEY, ServerProcess
from tests.support.table import Table

pytestmark = [pytest.mark.slow, pytest.mark.transports("native")]

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
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
WITHOUT_NULL = {
    "missing": "mount -t tmpfs none /dev",
    "on a file system without devices": "mount -t tmpfs -o nodev none /dev && mknod -m 666 /dev/null c 1 3",
}
NETWORKS = {
    "IPv6 alone": "ip link set lo up && ip address del 127.0.0.1/8 dev lo",
    "no interface that is up": ":",
}
TOO_LOW = {"ulimit -f 64": "LimitFSIZE", "ulimit -v 300000": "LimitAS", "ulimit -d 50000": "LimitDATA"}


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


def uncovered(environment: Mapping[str, str]) -> dict[str, str]:
    """``environment`` without the measurement of coverage, which starts before the server and needs more of the
    machine."""
    return {name: value for name, value in environment.items() if not name.startswith("COVERAGE_")}


def in_shell(server: ServerProcess, prelude: str, *wrapper: str) -> ServerProcess:
    server.command = [*wrapper, "/bin/sh", "-c", f'{prelude}; exec "$@"', "sh", *server.command]
    return server


@pytest.mark.parametrize("variable", sample(VARIABLES, ("PYTHONINSPECT",)))
def test_a_server_serves_with_any_value_of_a_variable_of_python_or_the_system(
    variable: str, table: Table, database_url: str
) -> None:
    server = ServerProcess(database_url, WORKERS="1")
    server.environment[variable] = VARIABLES[variable]
    serves_and_ends(server, table)


@pytest.mark.parametrize("name", sample(SHELL, ("64 open files",)))
def test_a_server_serves_with_any_limits_and_signals_of_its_shell(name: str, table: Table, database_url: str) -> None:
    serves_and_ends(in_shell(ServerProcess(database_url, WORKERS="1"), SHELL[name]), table)


@pytest.mark.parametrize("name", sample(["/nonexistent/python", "definition-server"]))
def test_a_server_serves_with_any_argv_0(name: str, table: Table, database_url: str) -> None:
    """A Python that is in no virtual environment then does not know its own path."""
    server = ServerProcess(database_url, WORKERS="1", PYTHONPATH=os.pathsep.join(filter(os.path.isabs, sys.path)))
    server.environment = uncovered(server.environment)
    renamed = "import os, sys; os.execv(sys.argv[1], [sys.argv[2], *sys.argv[4:]])"
    server.command = [sys.executable, "-c", renamed, os.path.realpath(sys.executable), name, *server.command]
    serves_and_ends(server, table)


@pytest.mark.parametrize("name", sample(MOUNTS, ("no /proc",)))
def test_a_server_serves_without_some_usual_file_systems(name: str, table: Table, database_url: str) -> None:
    apart = namespaces("--mount", "--uts")
    serves_and_ends(in_shell(ServerProcess(database_url, WORKERS="1"), MOUNTS[name], *apart), table)


@pytest.mark.parametrize("closed", ["", "<&-", ">&- 2>&-"], ids=["open", "stdin closed", "stdout and stderr closed"])
@pytest.mark.parametrize("name", sample(WITHOUT_NULL))
def test_without_dev_null_a_start_is_refused_with_its_remedy(name: str, closed: str) -> None:
    ended = run(f"{WITHOUT_NULL[name]}; exec {closed}", {"DATABASE_URL": NOWHERE}, *namespaces("--mount"))
    assert ended.returncode == 78
    if "2>&-" not in closed:
        assert ended.stderr.startswith("Error: /dev/null cannot be opened")
        assert "mknod" in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
    assert not ended.stdout


def test_grpcio_is_refused_without_dev_urandom() -> None:
    devices = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3"
    ended = run(devices, {"DATABASE_URL": NOWHERE, "TRANSPORT": "grpcio"}, *namespaces("--mount"))
    assert ended.returncode == 78
    assert "/dev/urandom" in ended.stdout
    assert "TRANSPORT=native" in ended.stdout


@pytest.mark.parametrize("name", sample(NETWORKS))
def test_a_server_serves_on_a_host_without_ipv4(name: str, table: Table, database_url: str, tmp_path: Path) -> None:
    apart = namespaces("--net")
    if not shutil.which("ip"):
        pytest.skip("there is no ip(8) to make such a host")
    table.add_commands(1)
    settings = {"SNAPSHOT_DIR": str(tmp_path), "WORKERS": "1"}
    with ServerProcess(database_url, **settings):
        until((tmp_path / "last-known-good.avapsnap").exists, "it is stored")
    server = in_shell(ServerProcess(NOWHERE, HOST="::", **settings), NETWORKS[name], *apart)
    with server:
        server.wait_ready()
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
    assert not server.logged("Worker failed")


@pytest.mark.parametrize("limit", sample(TOO_LOW, 2))
def test_a_limit_under_which_nothing_can_be_served_is_refused_with_its_remedy(limit: str) -> None:
    ended = run(limit, {"DATABASE_URL": NOWHERE})
    assert ended.returncode == 78
    assert TOO_LOW[limit] in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


def test_a_limit_of_processes_under_which_no_worker_starts_is_refused_with_its_remedy() -> None:
    ended = run("ulimit -u 1 2>/dev/null || ulimit -p 1", {"DATABASE_URL": NOWHERE}, *as_another_account())
    assert ended.returncode == 78
    assert "TasksMax" in ended.stdout
    assert "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.thorough  # takes seconds
def test_a_limit_of_cpu_time_is_named_and_does_not_make_rows_bad(table: Table, database_url: str) -> None:
    table.add_commands(3)
    with in_shell(ServerProcess(database_url, WORKERS="1"), "ulimit -t 30") as server:
        server.wait_ready()
        (line,) = server.logged("A limit of the process is low")
        assert (line["what"], line["limit"]) == ("CPU time", 30)
        assert "LimitCPU" in line["remedy"]
        server.wait_count(3)
        assert not server.logged("Commands are left out: no good version is known")


@pytest.mark.thorough  # takes seconds
def test_a_catalogue_larger_than_the_file_size_limit_fails_the_cycle_and_the_log_names_the_limit(
    table: Table, database_url: str
) -> None:
    table.add_commands(3, 1_000_000)
    with in_shell(ServerProcess(database_url, WORKERS="1"), "ulimit -f 4096") as server:
        line = server.wait_log("Sync failed")
        assert "ulimit -f" in line["error"]
        assert server.http("/livez")[0] == 200


def test_an_invalid_environment_ends_with_78_even_in_interactive_mode_of_python() -> None:
    ended = run(":", {"PYTHONINSPECT": "1"})
    assert ended.returncode == 78
    assert "DATABASE_URL is not set" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.thorough  # takes seconds
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


def namespaces(*which: str) -> tuple[str, ...]:
    """The command that starts another command in its own namespaces. Skips the test if this account may not create
    namespaces."""
    apart = ("unshare", *which)
    if not shutil.which("unshare") or subprocess.run((*apart, "true"), capture_output=True, check=False).returncode:
        pytest.skip("this account may make no namespace")
    return apart


def as_another_account() -> tuple[str, ...]:
    """The command that starts another command under an account other than root, because the kernel does not limit
    processes of root. The account may read root's files, because this Python may be one of them. Empty if this account
    is not root. Skips the test if root may not change the account."""
    if os.geteuid() != 0:
        return ()
    reading = "+dac_read_search"
    other = ("setpriv", "--reuid=54321", "--clear-groups", f"--inh-caps={reading}", f"--ambient-caps={reading}")
    if not shutil.which("setpriv") or subprocess.run((*other, "true"), capture_output=True, check=False).returncode:
        pytest.skip("root may not become another account here")
    return other


def run(prelude: str, settings: dict[str, str], *wrapper: str) -> subprocess.CompletedProcess[str]:
    unset = (*FAST, "DATABASE_URL")
    kept = {name: value for name, value in uncovered(os.environ).items() if name not in unset}
    return subprocess.run(
        [*wrapper, "sh", "-c", f'{prelude}; exec "$@"', "sh", sys.executable, "-m", "definition_server", "serve"],
        env=kept | {"API_KEY": KEY, "HOST": "127.0.0.1", "PORT": "0", "METRICS_PORT": "0"} | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
