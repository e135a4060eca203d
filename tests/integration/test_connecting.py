"""Connecting to a real database: a list of hosts with silent ones first, closed idle connections, and URLs with
secrets."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from tests.conftest import StartServer
from tests.support.families import sample
from tests.support.polling import until
from tests.support.table import Table

from definition_server.control_plane.database_address import NameResolver
from definition_server.control_plane.postgres import PostgresSource
from grpc_h2 import ENGINE

pytestmark = pytest.mark.any_transport

MARK = "S3cretWord"


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: the number of workers does not matter here."""
    return {"WORKERS": "1"}


@pytest.fixture
def silent() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def with_hosts(url: str, hosts: str, **more: str) -> str:
    """``url`` with another list of hosts."""
    parts = urlsplit(url)
    user = parts.netloc.rpartition("@")[0]
    query = "&".join(f"{name}={value}" for name, value in more.items())
    return parts._replace(netloc=f"{user}@{hosts}", query=query).geturl()


async def read_once(source: PostgresSource) -> str:
    async with source.read() as reading:
        return reading.fingerprint


@pytest.mark.parametrize("session", sample(["any", "prefer-standby", "read-write", "primary"], 2))
async def test_the_second_host_has_its_share_of_the_connect_time_if_the_first_is_silent(
    table: Table, silent: int, session: str
) -> None:
    port = urlsplit(table.url).port or 5432
    url = with_hosts(table.url, f"127.0.0.1:{silent},127.0.0.1:{port}", target_session_attrs=session)
    source = PostgresSource(url, connect_timeout=4, statement_timeout=5)
    try:
        assert await read_once(source)
    finally:
        await source.close()


async def test_the_second_address_of_a_name_has_its_share_of_the_time_if_the_first_is_silent(table: Table) -> None:
    port = urlsplit(table.url).port or 5432
    with socket.create_server(("127.0.0.2", port)):

        def look_up(*_: object, **__: object) -> list[object]:
            return [(2, 1, 6, "", ("127.0.0.2", 0)), (2, 1, 6, "", ("127.0.0.1", 0))]

        source = PostgresSource(
            with_hosts(table.url, f"db.example:{port}"),
            connect_timeout=4,
            statement_timeout=5,
            resolver=NameResolver(look_up),
        )
        try:
            assert await read_once(source)
        finally:
            await source.close()


async def test_a_service_file_s_hosts_are_tried_like_those_of_the_url(
    table: Table, silent: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = urlsplit(table.url)
    lines = [
        "[prod]",
        "host=127.0.0.1,127.0.0.1",
        f"port={silent},{parts.port or 5432}",
        f"user={parts.username or ''}",
        f"password={parts.password or ''}",
        f"dbname={parts.path[1:]}",
    ]
    (tmp_path / "services").write_text("\n".join(line for line in lines if not line.endswith("=")), encoding="utf-8")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    source = PostgresSource("postgresql:///?service=prod", connect_timeout=4, statement_timeout=5)
    try:
        assert await read_once(source)
    finally:
        await source.close()


def backends(url: str) -> str:
    where = f"application_name = 'avap-definition-server' AND datname = '{urlsplit(url).path[1:]}'"
    return f"FROM pg_stat_activity WHERE {where}"


async def test_a_cycle_whose_idle_connection_was_closed_reconnects_and_succeeds(table: Table) -> None:
    source = PostgresSource(table.url, connect_timeout=4, statement_timeout=5)
    try:
        first = await read_once(source)
        with psycopg.connect(table.url, autocommit=True) as operator:
            for _ in range(3):
                operator.execute(f"SELECT pg_terminate_backend(pid) {backends(table.url)}")
                until(
                    lambda: not operator.execute(f"SELECT 1 {backends(table.url)}").fetchall(),
                    lambda: "still connected",
                )
                again = await read_once(source)
                # A new connection reads the table even if the fingerprint is unchanged.
                assert again.partition("/")[0] != first.partition("/")[0]
                first = again
    finally:
        await source.close()


@pytest.mark.thorough  # waits for cycles
def test_a_server_s_idle_session_timeout_fails_no_cycle(table: Table, start_server: StartServer) -> None:
    table.add_commands(3)
    table.run(f"ALTER DATABASE \"{urlsplit(table.url).path[1:]}\" SET idle_session_timeout = '50ms'")
    server = start_server(table.url, SYNC_INTERVAL_SECONDS="0.3").wait_ready()
    until(lambda: sum(server.statusz()["sync"]["cycles"].values()) > 8, server.tail)
    assert server.statusz()["sync"]["cycles"]["failed"] == 0


# -- secrets -----------------------------------------------------------------------------------------------------------


def run(command: str, url: str, **more: str) -> tuple[int, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-m", "definition_server", command],
        env=kept | {"DATABASE_URL": url, "API_KEY": "k", "CONNECT_TIMEOUT_SECONDS": "2"} | more,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


REFUSED = [
    f"Postgres://u:{MARK}@127.0.0.1:1/db",
    f"host=127.0.0.1 password={MARK}",
    f"postgresql://u:{MARK}%@127.0.0.1:1/db",
    f"postgresql://u:{MARK}@127.0.0.1:{MARK}/db",
    f"postgresql://u:x@127.0.0.1:1/db?sslmode={MARK}",
]


@pytest.mark.parametrize("command", sample(["serve", "validate", "config"]))
@pytest.mark.parametrize("url", REFUSED, ids=lambda url: re.sub(MARK, "_", url))
def test_a_url_that_libpq_does_not_accept_ends_every_command_with_78_and_shows_no_secret(
    command: str, url: str
) -> None:
    code, output = run(command, url)
    assert code == 78
    assert "DATABASE_URL = '********'" in output
    assert MARK not in output


def test_no_output_of_a_server_shows_the_password_of_a_database_that_refuses_it(
    table: Table, start_server: StartServer
) -> None:
    parts = urlsplit(table.url)
    address = f"{parts.hostname}:{parts.port or 5432}"
    url = f"postgresql://nobody-{MARK}x:{MARK}@{address}{parts.path}?options=-c%20{MARK}%3D1"
    server = start_server(url, LOG_LEVEL="debug", SYNC_INTERVAL_SECONDS="0.1")
    until(lambda: server.http("/readyz")[0] == 503, server.tail)
    until(lambda: server.statusz()["sync"]["cycles"]["failed"] > 2, server.tail)
    texts = [server.http(path)[1] for path in ("/readyz", "/statusz", "/metrics")]
    for text in [*texts, str(server.lines), *server.other_output]:
        assert not re.search(rf"(?<!-){MARK}(?!x)", text), text
    code, output = run("validate", url)
    assert code == 69
    assert not re.search(rf"(?<!-){MARK}(?!x)", output)


@pytest.fixture
def role(table: Table) -> Iterator[str]:
    """A role with the password `MARK` that may read the table."""
    name = f"role_of_{urlsplit(table.url).path[1:]}"
    table.run(f"CREATE ROLE {name} LOGIN PASSWORD '{MARK}'; GRANT SELECT ON obex_dapl_functions TO {name}")
    yield name
    table.run(f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_server_shows_which_database_it_reads_and_with_which_role(
    table: Table, role: str, start_server: StartServer
) -> None:
    parts = urlsplit(table.url)
    port = parts.port or 5432
    first = f"127.0.0.1:{closed_port()}"
    url = f"postgresql://{role}:{MARK}@{first},{parts.hostname}:{port}{parts.path}"
    name, second = parts.path[1:], f"{parts.hostname}:{port}"
    table.add_commands(2)
    server = start_server(url).wait_ready()
    line = server.wait_log("Connected to the database")
    assert (line["host"], line["database"], line["role"]) == (second, name, role)
    line = server.wait_log("Starting")
    assert (line["database"], line["role"]) == (f"{first},{second}/{name}", role)
    assert line["engine"] == server.statusz()["engine"] == (ENGINE if line["transport"] == "native" else "grpcio")
    expected = {"hosts": [first, second], "name": name, "role": role, "connected_to": second}
    assert server.statusz()["database"] == expected
    assert MARK not in server.http("/statusz")[1] + str(server.lines)
    until(lambda: server.statusz()["sync"]["cycles"]["unchanged"] > 2, server.tail)
    assert len(server.logged("Connected to the database")) == 1


def closed_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
