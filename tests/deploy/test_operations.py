"""Every command of docs/operations.md is executed; commands for a cluster are checked as far as possible without
one.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from tests.deploy.manifests import Manifests
from tests.deploy.tools import kustomize
from tests.judges.tools import command, may_build
from tests.support.pages import Block, blocks, languages
from tests.support.polling import until
from tests.support.table import Table

from definition_server.cli.embedded_postgres import first_binaries, free_port

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGE = DOCS / "operations.md"
PAGES = (PAGE, DOCS / "kubernetes.md")
SCRIPT_SECONDS = 170
MARK = "@@ line"
ROWS = 30


def questions() -> list[Block]:
    """The commands of the table of questions, in order, between two published versions of the catalogue."""
    text = PAGE.read_text(encoding="utf-8")
    start, end = text.index("<!-- questions -->"), text.index("<!-- /questions -->")
    line = text.count("\n", 0, start) + 4  # the rows after the mark, the head of the table and its rule
    rows = text[start:end].splitlines()[3:]
    found = [Block("sh", ANOTHER_VERSION, line - 1)]
    for number, row in enumerate(rows, line):
        command = re.fullmatch(r"\| [^|`]+\? \| `((?:[^`|]|\\\|)+)` \| .+ \|", row)
        assert command, row
        found.append(Block("sh", command[1].replace("\\|", "|") + "\n", number))
    return [*found, Block("sh", VERSION_BEFORE, line + len(rows))]


ANOTHER_VERSION = """
psql -q "$ADMIN_DATABASE_URL" -c "UPDATE obex_dapl_functions SET code = code || '#' WHERE id = 1"
definition-server sync
versions=$(definition-server history --json | python3 -c 'import json, sys
for version in json.load(sys.stdin)["versions"]: print(version["version_hash"][:8])')
NEW=$(head -n 1 <<< "$versions") OLD=$(sed -n 2p <<< "$versions")
"""
VERSION_BEFORE = """
psql -q "$ADMIN_DATABASE_URL" -c "UPDATE obex_dapl_functions SET code = left(code, -1) WHERE id = 1"
definition-server sync
"""


def script(parts: list[Block]) -> str:
    """One shell for all blocks, as an operator has it; it prints the current block, and stops at the first failure.

    At its end it ends the processes that the page has started, because the server keeps the pipe of the test open.
    """
    said = [f'echo "{MARK} {part.line}"\n{part.text}' for part in parts]
    return "set -euo pipefail\ntrap 'jobs -p | xargs -r kill' EXIT\n" + "\n".join(said)


def environment(database: str, folder: Path, signed: bool) -> dict[str, str]:
    """The variables that the page tells its reader to set, and the ``PATH`` of an operator."""
    place = psycopg.conninfo.conninfo_to_dict(database)
    programs = (Path(sys.executable).parent, kustomize().parent, first_binaries().bin_dir)
    (folder / "snapshots").mkdir()
    told = {
        "PATH": ":".join([*map(str, programs), "/usr/bin", "/bin"]),
        "ADMIN_DATABASE_URL": database,
        "DB_ADDRESS": f"{place['host']}:{place['port']}/{place['dbname']}",
        "DB_PASSWORD": "first",
        "NEW_DB_PASSWORD": "second",
        "DATABASE_URL_FILE": str(folder / "database-url"),
        "API_KEY_FILE": str(folder / "api-key"),
        "SNAPSHOT_DIR": str(folder / "snapshots"),
        "PORT": str(free_port()),
        "METRICS_PORT": str(free_port()),
        "HOST": "127.0.0.1",
        "WORKERS": "2",
        "DRAIN_WAIT_SECONDS": "0",
    }
    kept = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE_")}
    return kept | told | ({"AVAP_INTERNAL_KEY": "signing"} if signed else {})


def run(text: str, variables: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``text`` in its own process group, and end all its processes."""
    (folder / "deploy").symlink_to(ROOT / "deploy")
    shell = subprocess.Popen(
        ["bash", "-c", text], env=variables, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = shell.communicate(timeout=SCRIPT_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(shell.pid, signal.SIGKILL)
        output = f"{shell.communicate()[0]}\nnot done within {SCRIPT_SECONDS} s"
    finally:
        _end(shell.pid)
    return subprocess.CompletedProcess(shell.args, shell.returncode, output, "")


def _end(group: int) -> None:
    """Processes that a failed script left running."""

    def gone() -> bool:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            return True
        return False

    until(gone, "the script's processes are gone", seconds=10)


@may_build
@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_every_command_of_the_page_works_in_the_order_of_the_page(database: str, tmp_path: Path, signed: bool) -> None:
    command("curl", "Debian curl")
    table = Table(database)
    table.add_commands(ROWS)
    before = rows(database)
    parts = sorted([*blocks(PAGE, "sh"), *questions()], key=lambda part: part.line)
    done = run(script(parts), environment(database, tmp_path, signed), tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stdout
    assert [line for line in lines if line.startswith(MARK)] == [f"{MARK} {part.line}" for part in parts]
    # The last command of the page that writes to the table restores the rows from a served catalogue.
    assert rows(database) == before
    log = (tmp_path / "server.log").read_text()
    for message in ("Serving", "Syncing at once", "Rolling the workers", "Catalogue pinned", "Stopped"):
        assert f'"msg": "{message}"' in log, log
    assert '"msg": "Sync failed"' not in log
    assert '"msg": "Serving the last-known-good snapshot' in (tmp_path / "rehearsal.log").read_text()
    assert "kind: Deployment" in (tmp_path / "manifests.yaml").read_text()


def rows(database: str) -> list[tuple[str, ...]]:
    """The served columns of the table."""
    with psycopg.connect(database) as connection:
        return connection.execute(
            "SELECT name, type, interface, code FROM obex_dapl_functions ORDER BY name"
        ).fetchall()


@may_build
def test_a_failing_command_is_reported_with_its_block(database: str, tmp_path: Path) -> None:
    parts = [Block("sh", "sleep 600 &\n", 3), Block("sh", "false | cat\n", 7), Block("sh", "true\n", 9)]
    done = run(script(parts), environment(database, tmp_path, False), tmp_path)
    assert done.returncode == 1
    assert done.stdout.splitlines() == [f"{MARK} 3", f"{MARK} 7"]


# -- commands for a cluster --------------------------------------------------------------------------------------------


def cluster_commands() -> list[list[str]]:
    """Every command of every block for a cluster, split into words."""
    found = [block for page in PAGES for block in blocks(page, "console")]
    return [shlex.split(line) for block in found for line in block.text.splitlines()]


def test_every_command_of_a_page_is_executed_or_marked() -> None:
    assert languages(PAGE) <= {"sh", "console"}
    # All commands of this page need a cluster. Its other blocks are layouts and manifests.
    assert languages(PAGES[1]) <= {"console", "yaml", ""}


@pytest.mark.parametrize("words", cluster_commands(), ids=" ".join)
@may_build
def test_a_cluster_command_names_only_objects_that_exist(words: list[str], guide: Manifests) -> None:
    assert words[0] == "kubectl"
    namespace = guide.one("Namespace")["metadata"]["name"]
    named = {f"{each['kind'].lower()}/{each['metadata']['name']}" for each in guide.objects}
    assert words[1] == "apply" or words[words.index("-n") + 1] == namespace
    for word in words:
        if word.startswith("deploy/"):
            assert (ROOT / word).exists()
        if word.startswith(("deployment/", "service/", "configmap/")):
            assert word in named
        if word.startswith("app.kubernetes.io/name="):
            assert guide.pod_labels["app.kubernetes.io/name"] == word.partition("=")[2]
    if "secret" in words:
        assert guide.pod["volumes"][0]["secret"]["secretName"] in words
        files = {word.partition("=")[2] for word in words if word.startswith("--from-file=")}
        assert files == {Path(v).name for k, v in guide.environment.items() if k.endswith("_FILE")}
    if "port-forward" in words:
        assert words[-1] == f"{guide.port('metrics')}:{guide.port('metrics')}"
    if "snapshot" in words:
        assert words[-1].startswith(guide.environment["SNAPSHOT_DIR"] + "/")


def test_every_command_that_is_run_inside_a_pod_exists() -> None:
    inner = [words[words.index("--") + 1 :] for words in cluster_commands() if "exec" in words]
    assert inner
    for words in inner:
        if words[0] == "definition-server":
            told = [word for word in words[1:] if not word.startswith("/")]
            done = subprocess.run(
                [sys.executable, "-m", "definition_server", *told, "--help"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
        else:
            assert words[0] in {"sh", "grep"}, "the image has no other program"
