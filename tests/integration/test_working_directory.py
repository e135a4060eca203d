"""No module is imported from the working directory, and a worker gets only the environment variables that it needs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.support.client import Client
from tests.support.families import sample
from tests.support.server import ServerProcess
from tests.support.table import Table

STRANGE = (
    "structlog",
    "uvloop",
    "json",
    "asyncio",
    "pydantic",
    "selectors",
    "grpc",
    "definition_server",
    "sitecustomize",
)
"""Modules of the server's, of its libraries and of Python's own."""

COMMANDS = {
    "python -m": [sys.executable, "-m", "definition_server", "serve"],
    "python -P -m": [sys.executable, "-P", "-m", "definition_server", "serve"],
    "console script": [str(Path(sys.executable).with_name("definition-server")), "serve"],
}


@pytest.fixture
def strange_directory(tmp_path: Path) -> Path:
    """Files with the names of modules, each of which leaves a trace when it is imported."""
    for name in STRANGE:
        trace = str(tmp_path / f"{name}.imported")
        (tmp_path / f"{name}.py").write_text(f"open({trace!r}, 'a').close()\nraise SystemExit(9)")
    return tmp_path


@pytest.fixture
def servers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("command", sample(COMMANDS.values()), ids=COMMANDS)
def test_a_file_with_a_modules_name_in_the_working_directory_is_not_imported(
    command: list[str], table: Table, servers: ExitStack, strange_directory: Path
) -> None:
    table.add_commands(1)
    server = ServerProcess(table.url, WORKERS="1", JAIL="auto")
    server.directory, server.command = strange_directory, command
    if command[1] == "-m":  # runpy imports modules before the package runs, so only -P protects the name of the package
        (strange_directory / "definition_server.py").unlink()
        (strange_directory / "sitecustomize.py").unlink()
    servers.enter_context(server).wait_ready()
    with Client(server.port) as client:
        assert client.get("command0").name == "command0"
    server.end()
    assert [path.name for path in strange_directory.glob("*.imported")] == []


@pytest.mark.parametrize("entry", sample(["", ".", "modules"]), ids=["empty", "dot", "relative"])
def test_workers_do_not_inherit_relative_entries_of_pythonpath(entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from definition_server.control_plane.worker_process import _environment

    monkeypatch.setenv("PYTHONPATH", f"{entry}:/opt/modules:{entry}")
    assert _environment()["PYTHONPATH"] == "/opt/modules"
    monkeypatch.setenv("PYTHONPATH", entry)
    assert "PYTHONPATH" not in _environment()


def test_a_workers_environment_holds_no_secret_and_no_variable_that_it_does_not_need(
    table: Table, servers: ExitStack
) -> None:
    table.add_commands(1)
    secrets = {"AVAP_INTERNAL_KEY": "a-signing-key", "AWS_SECRET_ACCESS_KEY": "a-cloud-key", "PGPASSWORD": "a-password"}
    server = servers.enter_context(ServerProcess(table.url, WORKERS="1", **secrets)).wait_ready()
    (worker,) = server.worker_pids()
    environment = Path(f"/proc/{worker}/environ").read_bytes().decode()
    names = {entry.partition("=")[0] for entry in environment.split("\0") if entry}
    allowed = {"PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV"}
    prefixes = ("LC_", "LD_", "PYTHON", "GRPC_", "COVERAGE_")
    assert {name for name in names - allowed if not name.startswith(prefixes)} == set()
    for secret in (server.environment["DATABASE_URL"], server.environment["API_KEY"], *secrets.values()):
        assert secret not in environment
