"""A start with any fault of the database: the server starts, logs the fault, and serves the stored catalogue if there
is one."""

from __future__ import annotations

import re
import resource
import signal
import socket
import stat
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.families import sample
from tests.support.polling import until
from tests.support.providers import DatabaseServer, create_database
from tests.support.server import ServerProcess
from tests.support.table import Table, shared_table

from definition_server.catalog.signing import Signer

CLOSED_PORT_URL = "postgresql://nobody@127.0.0.1:1/none"
LAST_KNOWN_GOOD = "last-known-good.avapsnap"

pytestmark = pytest.mark.any_transport


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: the number of workers does not matter here."""
    return {"WORKERS": "1"}


def store_snapshot(table: Table, start_server: StartServer, directory: Path, **settings: str) -> str:
    """Let a server store its catalogue. Returns the version hash."""
    server = start_server(table.url, SNAPSHOT_DIR=str(directory), **settings).wait_ready()
    version = str(server.wait_log("Definitions Broadcasted")["version_hash"])
    server.end()
    assert (directory / LAST_KNOWN_GOOD).exists()
    return version


def test_a_start_without_a_database_serves_the_last_known_good_snapshot_and_logs_it(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(20)
    version = store_snapshot(table, start_server, tmp_path)
    server = start_server(CLOSED_PORT_URL, SNAPSHOT_DIR=str(tmp_path)).wait_ready()
    line = server.wait_log("Serving the last-known-good snapshot")
    assert (line["level"], line["count"], line["version_hash"]) == ("WARN", 20, version)
    assert line["age_seconds"] >= 0
    with Client(server.port) as client:
        assert client.sync().version_hash == version
        assert client.health() == "SERVING"
    assert server.metric("avap_last_known_good_served") == 1
    assert server.http("/readyz") == (200, "ready\n")
    assert "refused" in server.wait_log("Sync failed")["error"]


def test_a_start_without_database_and_snapshot_waits_and_then_serves(
    frail_postgres: DatabaseServer, start_server: StartServer, tmp_path: Path
) -> None:
    table = Table(create_database(frail_postgres.url, "late"))
    table.add_commands(5)
    frail_postgres.stop_hard()
    server = start_server(table.url, SNAPSHOT_DIR=str(tmp_path))
    server.wait_log("No last-known-good snapshot")
    line = server.wait_log("Sync failed")
    assert line["level"] == "ERROR"
    assert line["serving_generation"] is None
    assert line["next_attempt_in_seconds"] > 0
    with Client(server.port) as client:
        until(lambda: client.health() == "NOT_SERVING", "the worker answers health checks")
        assert server.http("/readyz")[0] == 503
        assert server.http("/livez")[0] == 200
        frail_postgres.start_again()
        server.wait_ready()
        assert client.health() == "SERVING"
        assert client.sync().total_count == 5


@pytest.mark.thorough  # starts servers
def test_a_hanging_database_at_the_start_does_not_delay_the_last_known_good_snapshot(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(5)
    store_snapshot(table, start_server, tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"postgresql://nobody@127.0.0.1:{mute.getsockname()[1]}/none"
        server = start_server(url, SNAPSHOT_DIR=str(tmp_path), CONNECT_TIMEOUT_SECONDS="1").wait_ready(10)
        line = server.wait_log("Sync failed")
        assert "no answer from the database within 1 s" in line["error"]
        server.end()


@pytest.fixture(scope="module")
def stored(postgres: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A snapshot as a server stores it."""
    directory = tmp_path_factory.mktemp("stored")
    with shared_table(postgres, "stored") as table, ExitStack() as stack:
        table.add_commands(5)
        store_snapshot(table, lambda url, **more: stack.enter_context(ServerProcess(url, **more)), directory)
    return (directory / LAST_KNOWN_GOOD).read_bytes()


@pytest.mark.parametrize(
    ("damage", "check"),
    sample(
        [
            (lambda data: data[:40] + bytes([data[40] ^ 1]) + data[41:], "content checksum"),
            (lambda data: data[: len(data) // 2], "truncated|magic"),
            (lambda data: b"", "truncated|cannot mmap|empty"),
            (lambda data: data[:-1], "magic"),
            (lambda data: data[:-20] + bytes([data[-20] ^ 1]) + data[-19:], "footer checksum"),
            (lambda data: data + b"x", "magic"),
        ],
        unpack=True,
    ),
)
def test_a_damaged_snapshot_is_refused_and_the_log_names_the_check(
    stored: bytes, start_server: StartServer, tmp_path: Path, damage, check: str
) -> None:
    (tmp_path / LAST_KNOWN_GOOD).write_bytes(damage(stored))
    server = start_server(CLOSED_PORT_URL, SNAPSHOT_DIR=str(tmp_path))
    line = server.wait_log("Last-known-good snapshot not usable")
    assert line["level"] == "ERROR"
    assert re.search(check, line["error"]), line
    with Client(server.port) as client:
        until(lambda: client.health() == "NOT_SERVING", "the worker answers health checks")


@pytest.mark.thorough  # starts servers
@pytest.mark.parametrize("before", sample([{"AVAP_INTERNAL_KEY": "old"}, {}]), ids=["another key", "no key"])
def test_a_stored_snapshot_that_was_not_signed_with_the_key_is_refused(
    table: Table, start_server: StartServer, tmp_path: Path, before: dict[str, str]
) -> None:
    table.add_commands(5)
    store_snapshot(table, start_server, tmp_path, **before)
    server = start_server(CLOSED_PORT_URL, SNAPSHOT_DIR=str(tmp_path), AVAP_INTERNAL_KEY="new")
    line = server.wait_log("Last-known-good snapshot not usable")
    assert "MAC" in line["error"]
    assert (tmp_path / LAST_KNOWN_GOOD).exists()
    with Client(server.port) as client:
        until(lambda: client.health() == "NOT_SERVING", "the worker answers health checks")


def test_a_snapshot_that_was_stored_with_the_previous_key_is_served_and_gets_the_mac_of_the_new_key(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(5)
    stored = store_snapshot(table, start_server, tmp_path, AVAP_INTERNAL_KEY="old")
    file = tmp_path / LAST_KNOWN_GOOD
    old = file.read_bytes()
    new = {"SNAPSHOT_DIR": str(tmp_path), "AVAP_INTERNAL_KEY": "new"}
    server = start_server(CLOSED_PORT_URL, **new, AVAP_INTERNAL_KEY_PREVIOUS="old").wait_ready()
    with Client(server.port) as client:
        assert client.sync().version_hash == stored
        assert Signer("new").unpack(client.get("command1").code).startswith(b"# 1\n")
    until(lambda: file.read_bytes() != old, server.tail)
    server.end()
    server = start_server(CLOSED_PORT_URL, **new).wait_ready()
    with Client(server.port) as client:
        assert client.sync().version_hash == stored


@pytest.mark.parametrize("version", sample(["2", "1"]))
def test_a_stored_snapshot_with_a_valid_mac_is_served_in_either_version(
    table: Table, start_server: StartServer, tmp_path: Path, version: str
) -> None:
    from definition_server.catalog.signing import Binding, Signer

    table.add_commands(5)
    stored = store_snapshot(table, start_server, tmp_path, AVAP_INTERNAL_KEY="key")
    more = {"AVAP_INTERNAL_KEY": "key", "PACKAGE_VERSION": version}
    server = start_server(CLOSED_PORT_URL, SNAPSHOT_DIR=str(tmp_path), **more).wait_ready()
    with Client(server.port) as client:
        assert client.sync().version_hash == stored
        found = client.get("command1")
        binding = Binding(*(text.encode() for text in (found.name, found.type, found.interface_json, found.hash)))
        assert Signer("key", int(version)).unpack(found.code, binding).startswith(b"# 1\n")


@pytest.mark.thorough  # starts servers
def test_a_server_with_an_unwritable_snapshot_directory_serves_and_lacks_only_the_file(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(5)
    (tmp_path / "file").write_text("in the way")
    server = start_server(table.url, SNAPSHOT_DIR=str(tmp_path / "file" / "below")).wait_ready()
    line = server.wait_log("Last-known-good snapshot not stored")
    assert line["level"] == "ERROR"
    assert "Not a directory" in line["error"]
    assert server.metric("avap_snapshot_store_failed") == 1
    table.add_commands(1, start=5)
    server.wait_count(6)


def test_a_stored_snapshot_is_private_to_the_server(table: Table, start_server: StartServer, tmp_path: Path) -> None:
    table.add_commands(1)
    store_snapshot(table, start_server, tmp_path)
    assert stat.S_IMODE((tmp_path / LAST_KNOWN_GOOD).stat().st_mode) == 0o600


BROKEN: dict[str, tuple[str, str]] = {
    "no table": ("DROP TABLE obex_dapl_functions", "create the table obex_dapl_functions"),
    "no column": ("ALTER TABLE obex_dapl_functions DROP COLUMN interface", "lacks a column"),
    "no right": ("REVOKE ALL ON obex_dapl_functions FROM limited", "GRANT SELECT ON obex_dapl_functions"),
}


@pytest.mark.parametrize("trouble", sample(BROKEN, ("no right",)))
def test_an_unreadable_table_is_logged_with_its_remedy(table: Table, start_server: StartServer, trouble: str) -> None:
    statement, remedy = BROKEN[trouble]
    table.add_commands(3)
    table.run("DROP ROLE IF EXISTS limited; CREATE ROLE limited LOGIN PASSWORD 'limited'")
    try:
        table.run(statement)
        server = start_server(_as(table.url, "limited", "limited") if trouble == "no right" else table.url)
        line = server.wait_log("Sync failed")
        assert remedy in line["error"]
        assert "\n" not in line["error"]
        server.end()
    finally:
        table.run("DROP OWNED BY limited; DROP ROLE limited")


def test_a_wrong_password_is_logged_without_the_password(start_server: StartServer, container_url: str) -> None:
    server = start_server(_as(container_url, container_url.split("//")[1].split(":")[0], "wr0ng-secret"))
    line = server.wait_log("Sync failed")
    assert "password authentication failed" in line["error"]
    assert "user, password and database in DATABASE_URL" in line["error"]
    assert "wr0ng-secret" not in server.tail(1000)


@pytest.mark.thorough  # starts servers
def test_an_unknown_database_is_logged(postgres: DatabaseServer, start_server: StartServer) -> None:
    server = start_server(postgres.url.rpartition("/")[0] + "/nowhere")
    line = server.wait_log("Sync failed")
    assert "nowhere" in line["error"]
    assert "user, password and database in DATABASE_URL" in line["error"]


def _as(url: str, user: str, password: str) -> str:
    return f"postgresql://{user}:{password}@" + url.rpartition("@")[2]


@pytest.fixture
def container_url() -> str:
    """A PostgreSQL that requires a password; the embedded PostgreSQL trusts all connections."""
    from tests.support.providers import provider_or_skip

    server = provider_or_skip("container")
    yield server.url
    server.close()


def test_a_second_instance_on_the_same_port_logs_that_and_exits(table: Table, start_server: StartServer) -> None:
    table.add_commands(1)
    first = start_server(table.url).wait_ready()
    second = start_server(table.url, PORT=str(first.port))
    assert second.wait_exit() == 69
    line = second.wait_log("Cannot start")
    assert line["level"] == "FATAL"
    assert f"127.0.0.1:{first.port} is in use" in line["error"]
    assert "set PORT to a free port" in line["error"]
    with Client(first.port) as client:
        assert client.get("command0").name == "command0"


@pytest.mark.thorough  # starts servers
def test_a_taken_metrics_port_is_logged_and_no_worker_is_left(table: Table, start_server: StartServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = start_server(table.url, METRICS_PORT=str(port))
        assert server.wait_exit() == 69
        assert f"127.0.0.1:{port} is in use" in server.wait_log("Cannot start")["error"]


def test_all_problems_of_a_wrong_environment_are_listed_and_the_exit_code_is_78() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "definition_server", "serve"],
        env={"PORT": "http", "WORKERS": "0", "API_KEY": "se cret "},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 78
    for part in ("DATABASE_URL is not set", "PORT = 'http'", "WORKERS = '0'", "API_KEY = '********'"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert "se cret" not in done.stderr


@pytest.mark.thorough  # starts servers
def test_a_low_limit_of_open_files_is_raised_or_logged(table: Table, start_server: StartServer) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    table.add_commands(1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 1024), hard))
    try:
        server = start_server(table.url)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    server.wait_ready()
    limits = Path(f"/proc/{server.worker_pids()[0]}/limits").read_text()
    granted = int(next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3])
    assert granted >= 65_536 or granted == hard
    if granted < 65_536:
        assert server.logged("Limit of open files is low; connections beyond it will be refused")[0]["level"] == "WARN"


@pytest.mark.parametrize("number", sample([signal.SIGTERM, signal.SIGINT]))
def test_a_signal_before_the_first_catalogue_ends_the_server_in_order(
    start_server: StartServer, number: signal.Signals
) -> None:
    server: ServerProcess = start_server(CLOSED_PORT_URL)
    server.wait_log("Sync failed")
    server.signal(number)
    assert server.wait_exit() == 0
    assert server.logged("Stopped")


@pytest.mark.thorough  # starts servers
@pytest.mark.any_transport
def test_the_table_is_not_read_during_a_drain(start_server: StartServer) -> None:
    server: ServerProcess = start_server(CLOSED_PORT_URL, DRAIN_WAIT_SECONDS="1.5", SYNC_INTERVAL_SECONDS="0.1")
    server.wait_log("Sync failed")
    server.signal(signal.SIGTERM)
    assert server.wait_exit() == 0
    messages = [line["msg"] for line in server.lines]
    assert messages[-1] == "Stopped"
    assert "Sync failed" not in messages[messages.index("Draining") :]


@pytest.mark.thorough  # waits for cycles
def test_a_snapshot_that_could_not_be_stored_is_stored_when_the_disk_is_repaired(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(5)
    blocked = tmp_path / "snapshots"
    blocked.write_text("in the way")
    server = start_server(table.url, SNAPSHOT_DIR=str(blocked)).wait_ready()
    server.wait_log("Last-known-good snapshot not stored")
    blocked.unlink()
    server.wait_log("Last-known-good snapshot stored again", generation=1)
    assert server.metric("avap_snapshot_store_failed") == 0
    assert (blocked / LAST_KNOWN_GOOD).exists()


def test_a_malformed_host_is_an_error_message_without_a_traceback(start_server: StartServer) -> None:
    server = start_server("postgresql://nobody@a..b/none")
    line = server.wait_log("Sync failed")
    assert "DATABASE_URL" in line["error"]
    assert "unexpected" not in line["error"]
