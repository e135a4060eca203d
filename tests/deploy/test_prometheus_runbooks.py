"""Runbooks name only existing alerts, metrics, messages, commands and drills; their commands and queries work."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from tests.chaos.drills.catalogue import every_fault
from tests.conftest import StartServer
from tests.support.prometheus import Prometheus, shipped_alerts
from tests.support.server import ServerProcess
from tests.support.table import Table
from tests.unit.definition_server.observability.test_metrics import RUNNING

from definition_server.cli.main import cli
from definition_server.observability.metrics import create_registry

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs/runbooks"
INDEX = FOLDER / "README.md"
PAGES = [path for path in sorted(FOLDER.glob("*.md")) if path != INDEX]
ALERTS = shipped_alerts()
SECTIONS = [
    "What you see", "What it means for clients", "What to check", "What to do", "When it is over", "Drill",
]  # fmt: skip
KINDS = {"alert", "metric", "log", "error", "probe", "client"}
PROGRAMS = {"awk", "curl", "definition-server", "df", "dmesg", "grep", "jq", "openssl", "sort", "ss", "uniq"}
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
    """Every string of the service's code, f-strings with placeholders for their values."""
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


def test_every_fault_of_the_drills_is_on_one_runbook_and_no_other_fault_is() -> None:
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
def test_commands_use_known_programs_and_valid_options(page: Path) -> None:
    for line in commands(page):
        first = re.sub(r"'[^']*'", "", line)
        assert {part.split()[0] for part in re.split(r"\|", first)} <= PROGRAMS, line
        for words in cli_calls(line):
            command: click.Command = cli
            context = click.Context(cli)
            while isinstance(command, click.Group):
                found = command.get_command(context, words[0])
                assert found is not None, line
                command, words = found, words[1:]
            # Parses without running: an unknown option or a missing argument raises.
            command.make_context("runbook", [*words], resilient_parsing=False)


@each_page
def test_our_commands_in_the_text_exist(page: Path) -> None:
    for words in (text.split()[1:] for text in quoted(page.read_text()) if text.startswith("definition-server ")):
        assert cli.get_command(click.Context(cli), words[0]), words


def tools_or_skip() -> None:
    missing = [name for name in ("curl", "jq") if shutil.which(name) is None]
    if missing:
        told = f"missing: {', '.join(missing)} (Debian packages of the same names)"
        if os.environ.get("CI"):
            pytest.fail(told, pytrace=False)
        pytest.skip(told)


@pytest.fixture
def server(table: Table, start_server: StartServer, tmp_path: Path) -> ServerProcess:
    table.add_commands(120)
    return start_server(table.url, SNAPSHOT_DIR=str(tmp_path)).wait_ready()


def keys_of(document: Any) -> set[str]:
    """Every key in a JSON document, at any depth."""
    if isinstance(document, dict):
        return set(document) | {key for value in document.values() for key in keys_of(value)}
    return {key for value in document for key in keys_of(value)} if isinstance(document, list) else set()


@pytest.mark.transports
def test_the_servers_answers_have_the_fields_that_a_page_reads(server: ServerProcess) -> None:
    tools_or_skip()
    asked = [line for page in [*PAGES, INDEX] for line in commands(page) if line.startswith("curl ")]
    assert len(asked) > 8
    known = keys_of(server.statusz())
    for line in asked:
        concrete = line.replace("HOST:9464", f"127.0.0.1:{server.metrics_port}")
        assert "HOST" not in concrete
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", concrete], capture_output=True, text=True, timeout=20, check=False
        )
        assert done.returncode == 0, (line, done.stderr)
        assert done.stdout.strip(), line
        # For a missing key jq prints null, which must not count as an answer.
        for key in set(re.findall(r"\b[a-z_]{3,}\b", " ".join(re.findall(r"'([^']*)'", line)))):
            assert key in known, f"{key}: {line}"


@pytest.mark.transports
def test_queries_are_valid_and_their_series_exist(server: ServerProcess, tmp_path: Path) -> None:
    queries = [query for page in PAGES for query in blocks("promql", page)]
    assert len(queries) > 10
    directory = tmp_path / "prometheus"
    directory.mkdir()
    with Prometheus(directory, [server.metrics_port]) as prometheus:
        prometheus.wait_series("rate(avap_requests_total[5m])")
        for query in queries:
            # Without traffic quantiles are NaN, which still is a series.
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
