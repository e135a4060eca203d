"""The commands as a new user and an operator run them, against real servers."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.environment import inherited_environment
from tests.support.polling import until
from tests.support.providers import DatabaseServer, need_provider, provider_or_skip
from tests.support.server import KEY, ServerProcess, _group_exists
from tests.support.table import Table, shared_table

pytestmark = pytest.mark.any_transport

PROGRAM = [sys.executable, "-m", "definition_server"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = inherited_environment()
    return subprocess.run(
        [*PROGRAM, *arguments], env=kept | environment, capture_output=True, text=True, timeout=60, check=False
    )


class Demo:
    """``definition-server demo`` in its own process group."""

    def __init__(self, umask: int = -1, cwd: Path | None = None, **environment: str) -> None:
        kept = inherited_environment()
        self.process = subprocess.Popen(
            [*PROGRAM, "demo"],
            env=kept | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            umask=umask,
            cwd=cwd,
        )
        self.output = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line

    def find(self, pattern: str) -> str:
        """Wait for ``pattern`` in the output. Returns its first group."""
        return until(lambda: re.search(pattern, self.output), lambda: self.output)[1]

    def interrupt(self) -> int:
        """Ctrl-C, as a terminal sends it: to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)
        code = self.process.wait(30)
        self._reader.join()
        return code

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def demo() -> Iterator[Demo]:
    need_provider("embedded")
    demo = Demo(PORT="0", METRICS_PORT="0", WORKERS="1")
    yield demo
    demo.end()


def test_the_demo_serves_its_catalogue_and_its_printed_commands_work(demo: Demo) -> None:
    port = demo.find(r"gRPC +127\.0\.0\.1:(\d+)")
    key = demo.find(r"x-avap-auth: (\S+)")
    url = demo.find(r"PostgreSQL at (\S+)")
    until(lambda: "Serving" in demo.output, lambda: demo.output)
    assert "signing   off: set AVAP_INTERNAL_KEY" in demo.output
    assert "Limit of open files" not in demo.output
    assert "Code is served unsigned" not in demo.output
    got = run("get", "if", "--json", API_KEY=key, PORT=port)
    assert json.loads(got.stdout)["name"] == "if"
    synced = run("fetch", "--json", API_KEY=key, PORT=port)
    assert json.loads(synced.stdout)["count"] >= 120
    assert "SERVING" in run("health", PORT=port).stdout
    update = re.search(r"  (\S+/psql .*)", demo.output)
    assert update, demo.output
    subprocess.run(update[1], shell=True, check=True, capture_output=True)
    with Client(int(port), key=key) as client:
        until(lambda: client.get("if").code.endswith(b"# changed"), "the change is served")
    postgres = int(url.rpartition(":")[2].split("/")[0])
    directories = set(Path("/tmp").glob("*/postgresql.conf"))
    assert demo.interrupt() == 0
    assert "The demo has ended" in demo.output
    assert "Traceback" not in demo.output
    until(lambda: not _group_exists(demo.process.pid), "no process of the demo is left")
    until(lambda: not _listens(postgres), "its PostgreSQL is gone")
    assert set(Path("/tmp").glob("*/postgresql.conf")) <= directories


def _listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.thorough  # starts a PostgreSQL
def test_the_demo_serves_without_home_path_locale_or_a_writable_folder_and_despite_libpq_s_variables(
    tmp_path: Path,
) -> None:
    provider_or_skip("embedded").close()
    tmp_path.chmod(0o500)
    nothing = {"HOME": "/nonexistent", "PATH": "/nonexistent", "TMPDIR": "/nonexistent", "LC_ALL": "POSIX"}
    narrow = {"COLUMNS": "80", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    libpq = {"PGSERVICE": "none", "PGHOST": "192.0.2.1", "PGSSLMODE": "require", "PGOPTIONS": "-c nonsense=1"}
    demo = Demo(0o077, tmp_path, PORT="0", METRICS_PORT="0", WORKERS="1", **nothing, **narrow, **libpq)
    try:
        port, key = demo.find(r"gRPC +127\.0\.0\.1:(\d+)"), demo.find(r"x-avap-auth: (\S+)")
        until(lambda: "Serving" in demo.output, lambda: demo.output)
        got = run("get", "if", "--json", API_KEY=key, PORT=port, **nothing, **narrow)
        assert json.loads(got.stdout)["name"] == "if"
        assert demo.interrupt() == 0
    finally:
        demo.end()


def test_the_demo_refuses_a_wrong_environment_before_it_starts_anything() -> None:
    done = run("demo", PORT="x", WORKERS="-1")
    assert done.returncode == 78
    assert "PORT = 'x'" in done.stderr
    assert "WORKERS = '-1'" in done.stderr
    assert "PostgreSQL" not in done.stdout


@pytest.mark.parametrize("variable", ["PORT", "METRICS_PORT"])
def test_the_demo_reports_a_taken_port_before_it_starts_anything(variable: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        done = run("demo", **{"PORT": "0", "METRICS_PORT": "0", variable: str(port)})
    assert done.returncode == 69
    assert f"127.0.0.1:{port} is in use by another process" in done.stderr
    assert f"set {variable} to a free port" in done.stderr
    assert done.stdout == ""


@pytest.fixture(scope="module")
def server(postgres: DatabaseServer, transport: str) -> Iterator[ServerProcess]:
    """One server for tests that only read."""
    with shared_table(postgres, f"cli_{transport}") as table:
        table.add_commands(5)
        with ServerProcess(table.url, TRANSPORT=transport, WORKERS="1") as server:
            yield server.wait_ready()


def test_validate_reports_what_would_be_served(table: Table) -> None:
    table.add_commands(3)
    done = run("validate", DATABASE_URL=table.url)
    assert done.returncode == 0, done.stdout + done.stderr
    table.add([(None, None, None, "x"), ("odd", None, "{", "x"), ("broken", None, None, "if")])
    done = run("validate", "--json", DATABASE_URL=table.url)
    assert done.returncode == 1
    told = json.loads(done.stdout)
    for reason in ("null_name", "interface_invalid", "code_invalid"):
        assert reason in json.dumps(told)


def test_validate_reports_a_database_that_cannot_be_read() -> None:
    done = run("validate", DATABASE_URL="postgresql://nobody@127.0.0.1:1/none")
    assert done.returncode == 69
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr


def test_sync_writes_the_catalogue_to_files(server: ServerProcess, tmp_path: Path) -> None:
    done = run("sync", "--out", str(tmp_path / "out"), API_KEY=KEY, PORT=str(server.port))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "command1.py").read_bytes().startswith(b"# 1\n")


@pytest.mark.parametrize(
    ("arguments", "key", "code"),
    [
        (("get", "command1"), KEY, 0),
        (("get", "nothing"), KEY, 3),
        (("get", "command1"), "wrong", 4),
        (("get", "command1"), "", 78),
        (("fetch",), "wrong", 4),
        (("health",), "", 0),
    ],
)
def test_exit_codes_are_as_documented(server: ServerProcess, arguments: tuple[str, ...], key: str, code: int) -> None:
    done = run(*arguments, API_KEY=key, PORT=str(server.port))
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.thorough  # starts many commands
def test_a_server_that_cannot_be_reached_is_reported(server: ServerProcess) -> None:
    for command in (("get", "x"), ("fetch",), ("health",)):
        assert run(*command, API_KEY=KEY, PORT="1").returncode == 69


def test_config_prints_the_settings_in_force_the_database_and_no_secret() -> None:
    url = "postgresql://reader:s3cret@db.example/avap"
    done = run("config", "--json", DATABASE_URL=url, API_KEY="s3cret", SYNC_INTERVAL_SECONDS="0.5")
    values = json.loads(done.stdout)
    assert values["DATABASE_URL"] == "postgresql://reader:********@db.example:5432/avap"
    assert (values["SYNC_INTERVAL_SECONDS"], values["API_KEY"]) == ("0.5", "********")
    assert "s3cret" not in done.stdout


@pytest.mark.thorough  # starts servers
def test_validate_prints_only_its_report_on_stdout(table: Table) -> None:
    table.add_commands(2)
    done = run("validate", "--json", DATABASE_URL=table.url)
    assert json.loads(done.stdout)["count"] == 2
    assert (done.returncode, done.stderr) == (0, "")


def test_config_in_a_pipe_prints_each_value_in_full(table: Table, tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 150))
    done = run("config", DATABASE_URL=table.url, API_KEY="k", SNAPSHOT_DIR=long, COLUMNS="80")
    assert long in done.stdout


@pytest.mark.thorough  # starts a server
def test_snapshot_inspect_reads_the_stored_file(table: Table, start_server: StartServer, tmp_path: Path) -> None:
    table.add_commands(4)
    server = start_server(table.url, SNAPSHOT_DIR=str(tmp_path)).wait_ready()
    version = server.wait_log("Definitions Broadcasted")["version_hash"]
    file = tmp_path / "last-known-good.avapsnap"
    assert version in run("snapshot", "inspect", str(file), "--json").stdout
    file.write_bytes(file.read_bytes()[:-3])
    done = run("snapshot", "inspect", str(file))
    assert done.returncode == 1
    assert "magic" in done.stderr
