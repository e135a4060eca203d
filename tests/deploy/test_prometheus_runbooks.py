"""Runbooks name only existing alerts, metrics, messages, commands and drills; their commands and queries work."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import psycopg
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.chaos.drills.catalogue import every_fault
from tests.conftest import StartServer
from tests.support.certificates import Authority
from tests.support.polling import until
from tests.support.prometheus import Prometheus, shipped_alerts
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table
from tests.unit.definition_server.observability.test_metrics import RUNNING

from definition_server.cli.main import cli
from definition_server.observability.metrics import create_registry
from definition_server.observability.reasons import Reason

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/runbooks"
INDEX = FOLDER / "README.md"
PAGES = [path for path in sorted(FOLDER.glob("*.md")) if path != INDEX]
ALERTS = shipped_alerts()
SECTIONS = [
    "What you see", "What it means for clients", "What to check", "What to do", "When it is over", "Drill",
]  # fmt: skip
KINDS = {"alert", "metric", "log", "error", "probe", "client"}
PROGRAMS = ("grep", "python3")
"""Programs that every image with Python on Debian has, however small. Besides them, `definition-server`."""
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


@cache
def sections(page: Path) -> dict[str, str]:
    """The title of each section → its text."""
    parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", text)


def seen(page: Path, kind: str) -> list[str]:
    """The names of one kind in the section "What you see" of a page."""
    rows = re.findall(r"^\| (\w+) \| (.+) \|$", sections(page)["What you see"], flags=re.MULTILINE)
    assert {of for of, _ in rows} - {"kind"} <= KINDS
    return [name for of, text in rows if of == kind for name in quoted(text)]


def blocks(language: str, page: Path) -> list[str]:
    """Code blocks of a language, without their indent."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(rf"^{indent}", "", text, flags=re.MULTILINE) for indent, text in found]


def commands(page: Path) -> list[str]:
    return [line for block in blocks("sh", page) for line in block.splitlines()]


@cache
def texts_of_the_service() -> str:
    """Every string in the service's code; f-strings have placeholders for their values."""
    files = (ROOT / "service").rglob("*.py")
    nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text()))]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    texts += [
        "".join(str(part.value) if isinstance(part, ast.Constant) else "obex_dapl_functions" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return "\n".join(texts)


@each_page
def test_a_page_has_the_six_sections_and_none_is_empty(page: Path) -> None:
    assert list(sections(page)) == SECTIONS
    assert all(text.strip() for text in sections(page).values())


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_is_on_its_page_and_in_the_index(alert: str) -> None:
    page = ROOT / ALERTS[alert]["annotations"]["runbook_url"]
    assert alert in seen(page, "alert")
    (row,) = [line for line in INDEX.read_text().splitlines() if f"`{alert}`" in line]
    assert f"]({page.name})" in row


def test_every_page_is_in_the_index() -> None:
    assert set(re.findall(r"^\| \[.+?\]\((.+?)\)", INDEX.read_text(), flags=re.MULTILINE)) == {p.name for p in PAGES}


@each_page
def test_every_alert_and_message_of_a_page_exists(page: Path) -> None:
    assert set(seen(page, "alert")) <= ALERTS.keys()
    texts = texts_of_the_service()
    fields = {"ts", "removed", "SIGHUP"}
    assert [
        text for text in [*seen(page, "log"), *seen(page, "error")] if text not in texts and text not in fields
    ] == []


def test_each_fault_of_the_drills_is_on_one_runbook_and_each_fault_there_exists() -> None:
    named = [(drill, page.name) for page in PAGES for drill in quoted(sections(page)["Drill"])]
    assert sorted(drill for drill, _ in named) == sorted(every_fault())


@pytest.mark.parametrize("page", [*PAGES, INDEX], ids=lambda page: page.stem)
def test_links_have_targets(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).is_file(), target


# -- commands ----------------------------------------------------------------------------------------------------------


def cli_calls(line: str) -> Iterator[list[str]]:
    """Calls of `definition-server` in a shell line."""
    words = shlex.split(line, comments=True)
    while words:
        end = next((i for i, word in enumerate(words) if word in {"|", "&&"}), len(words))
        if words[0] == "definition-server":
            yield words[1:end]
        words = words[end + 1 :]


@each_page
def test_commands_of_the_server_have_valid_options(page: Path) -> None:
    for line in commands(page):
        if not line.startswith("definition-server "):
            continue
        for words in cli_calls(line):
            command: click.Command = cli
            context = click.Context(cli)
            while isinstance(command, click.Group):
                found = command.get_command(context, words[0])
                assert found is not None, line
                command, words = found, words[1:]
            # Parses the command without running it; an unknown option or a missing argument raises.
            command.make_context("runbook", [*words], resilient_parsing=False)


@each_page
def test_our_commands_in_the_text_exist(page: Path) -> None:
    for words in (text.split()[1:] for text in quoted(page.read_text()) if text.startswith("definition-server ")):
        assert cli.get_command(click.Context(cli), words[0]), words


@pytest.fixture
def server(table: Table, start_server: StartServer, tmp_path: Path) -> ServerProcess:
    table.add_commands(120)
    return start_server(table.url, SNAPSHOT_DIR=str(tmp_path)).wait_ready()


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine like the image: a running server with TLS, and a `PATH` with only the programs of the image."""

    environment: dict[str, str]
    values: dict[str, str]
    """Placeholder on a page → the value."""

    def run(self, block: str) -> subprocess.CompletedProcess[str]:
        """Run a block of a page as an operator would, with the values of this machine."""
        for placeholder, value in self.values.items():
            block = block.replace(placeholder, value)
        return subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", block],
            env=self.environment, cwd="/", capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip


@pytest.fixture(scope="module")
def machine(postgres: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("machine")
    authority = Authority(folder)
    certificate = authority.sign("server")
    table = Table(create_database(postgres.url, "runbooks"))
    table.add([("if", "control", "[]", "pass"), *((f"command{n}", "function", "[]", "pass") for n in range(30))])
    programs = folder / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).symlink_to(sys.executable if name == "python3" else shutil.which(name) or f"/usr/bin/{name}")
    ours = programs / "definition-server"
    ours.write_text(f'#!/bin/sh\nexec {sys.executable} -m definition_server "$@"\n')
    ours.chmod(0o755)
    (folder / "url").write_text(table.url)
    (folder / "snapshots").mkdir()
    settings = {
        "SNAPSHOT_DIR": str(folder / "snapshots"), "TLS_CERT_FILE": str(certificate.cert),
        "TLS_KEY_FILE": str(certificate.key), "JAIL": "off",
    }  # fmt: skip
    with ServerProcess(table.url, **settings) as server:
        old = server.wait_ready().statusz()["catalog"]["version_hash"]
        table.run("UPDATE obex_dapl_functions SET code = 'pass # new' WHERE name = 'if'")
        server.signal(signal.SIGHUP)
        until(lambda: server.statusz()["catalog"]["version_hash"] != old, "the change is served")
        until(lambda: server.statusz()["sync"]["history_entries"] == 2, "both versions are in the history")
        told = {
            "PATH": str(programs), "DATABASE_URL_FILE": str(folder / "url"), "API_KEY": KEY, "PORT": str(server.port),
            "SNAPSHOT_DIR": str(folder / "snapshots"), "DEFINITION_SERVER_CA_FILE": str(authority.cert),
        }  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
        new = server.statusz()["catalog"]["version_hash"]
        yield Machine(
            kept | told,
            {
                "OLD NEW": f"{old[:8]} {new[:8]}", "HOST": "127.0.0.1", "authority.pem": str(authority.cert),
                "/var/lib/definition-server": str(folder / "snapshots"), "50051": str(server.port),
            },
        )  # fmt: skip
    drop_database(postgres.url, "runbooks")


@pytest.mark.parametrize("page", [page for page in [*PAGES, INDEX] if blocks("sh", page)], ids=lambda page: page.stem)
def test_every_command_runs_with_the_programs_of_the_image(machine: Machine, page: Path) -> None:
    with ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", int(machine.environment["PORT"]))))
        for block in blocks("sh", page):
            done = machine.run(block)
            assert done.returncode == 0, (block, done.stdout, done.stderr)
            assert done.stdout.strip() or "|| true" in block, block
            if "/proc/net/tcp" in block:
                assert "127.0.0.1" in done.stdout, (connection.getsockname(), done.stdout)


@pytest.mark.parametrize("command", ["curl -s HOST:9464/statusz", "jq .", "ss -ltnp", "dmesg", "definition-server no"])
def test_a_command_that_the_image_does_not_have_is_detected(machine: Machine, command: str) -> None:
    assert machine.run(command).returncode


def test_refusals_of_the_database_have_a_separate_page() -> None:
    """It is not the page about a database that cannot be reached, where nobody looks for a wrong password."""
    rule = ALERTS["DefinitionServerDatabaseRefuses"]
    assert rule["annotations"]["runbook_url"].endswith("/database-access.md")
    refused = {reason.value for reason in Reason if re.search(rf"\b{reason.value}\b", rule["expr"])}
    table = (ROOT / "docs/observability.md").read_text()
    assert refused == {
        name
        for row in re.findall(r"^\| (`[a-z_`, ]+) \|.*\(runbooks/database-access\.md\) \|$", table, re.MULTILINE)
        for name in quoted(row)
    }


@pytest.mark.transports
def test_queries_are_valid_and_their_series_exist(server: ServerProcess, tmp_path: Path) -> None:
    queries = [query for page in PAGES for query in blocks("promql", page)]
    assert len(queries) > 10
    directory = tmp_path / "prometheus"
    directory.mkdir()
    with Prometheus(directory, [server.metrics_port]) as prometheus:
        prometheus.wait_series("rate(avap_requests_total[5m])")
        for query in queries:
            # Without traffic, quantiles are NaN, but the series exist.
            assert prometheus.query(query), query


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("sql", page)], ids=lambda page: page.stem)
def test_statements_run_on_a_database_with_the_table(page: Path, table: Table) -> None:
    table.add([("twice", None, None, "pass"), ("twice", None, None, "pass"), (None, None, None, "pass")])
    with psycopg.connect(table.url, autocommit=True) as connection:
        for statement in (one for block in blocks("sql", page) for one in block.split(";") if one.strip()):
            cursor = connection.execute(statement.encode())
            assert cursor.description, statement


@pytest.mark.parametrize("page", [*PAGES, INDEX], ids=lambda page: page.stem)
def test_every_metric_that_is_named_is_exported(page: Path, exported: set[str]) -> None:
    named = set(re.findall(r"\b(?:avap|process)_\w+", page.read_text()))
    assert named <= exported


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """Names of every sample of a server."""
    text = generate_latest(create_registry(lambda: RUNNING)).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
