"""The locustfile: its users read the catalogue, call in the configured mix, and report wrong answers as failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import StartServer
from tests.support.families import sample
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

pytestmark = pytest.mark.transports("native")
ROOT = Path(__file__).parents[2]
NAMES = ("SyncCatalog", "GetCommand", "GetCommand, unknown name", "GetCommand, wrong key")


def locust(port: int, *options: str, key: str = KEY, seconds: int = 3) -> subprocess.CompletedProcess[str]:
    """Run four users for some seconds. Returns the output of locust."""
    command = [sys.executable, "-m", "locust", "-f", "perf/locustfile.py", "--headless", "--json", "--only-summary"]
    command += [
        "-u",
        "4",
        "-r",
        "100",
        "-t",
        f"{seconds}s",
        "--host",
        f"127.0.0.1:{port}",
        "--pause",
        "0.005",
        *options,
    ]
    kept = {name: value for name, value in os.environ.items() if name != "API_KEY"}
    environment = kept | ({"API_KEY": key} if key else {})
    return subprocess.run(
        command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90,
        check=False,
    )  # fmt: skip


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Name → its statistics."""
    told = json.loads(done.stdout[done.stdout.index("[") :])
    return {row["name"]: row for row in told}


@pytest.fixture
def server(table: Table, start_server: StartServer) -> ServerProcess:
    table.add_commands(200)
    return start_server(table.url).wait_ready()


@pytest.mark.thorough  # locust takes seconds to start
def test_users_call_in_the_configured_mix(server: ServerProcess) -> None:
    before = {status: server.metric("avap_requests_total", status=status) for status in ("404", "401")}
    for seconds in (3, 10, 30):  # a machine that is busy with other tests takes longer for 100 calls
        done = locust(server.port, "--unknown", "0.2", "--bad-key", "0.1", seconds=seconds)
        assert done.returncode == 0, done.stdout + done.stderr
        seen = rows(done)
        assert seen["SyncCatalog"]["num_requests"] == 4
        total = sum(row["num_requests"] for row in seen.values()) - 4
        if total > 100:
            break
        before = {status: server.metric("avap_requests_total", status=status) for status in before}
    assert total > 100
    assert set(seen) == set(NAMES)
    assert sum(row["num_failures"] for row in seen.values()) == 0
    # The counts of locust and the server agree, except for one call of each user that the end may have cut.
    for name, status in zip(NAMES[2:], ("404", "401"), strict=True):
        counted = server.metric("avap_requests_total", status=status) - before[status]
        assert 0 <= counted - seen[name]["num_requests"] <= 4
    assert 0.1 < seen["GetCommand, unknown name"]["num_requests"] / total < 0.3
    assert 0.03 < seen["GetCommand, wrong key"]["num_requests"] / total < 0.2


@pytest.mark.thorough  # locust takes seconds to start
def test_a_changed_catalogue_is_read_again_without_a_failure(server: ServerProcess, table: Table) -> None:
    command = [sys.executable, "-m", "locust", "-f", "perf/locustfile.py", "--headless", "--json", "--only-summary"]
    command += ["-u", "2", "-r", "100", "-t", "6s", "--host", f"127.0.0.1:{server.port}", "--pause", "0.005"]
    with subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"API_KEY": KEY}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until(lambda: server.metric("avap_requests_total", status="200") > 50, server.tail)
        table.run("UPDATE obex_dapl_functions SET code = code || '#'")
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, out + errors
    seen = rows(subprocess.CompletedProcess(command, 0, out, errors))
    assert seen["SyncCatalog"]["num_requests"] >= 4
    assert sum(row["num_failures"] for row in seen.values()) == 0


@pytest.mark.thorough  # locust takes seconds to start
def test_a_refused_key_is_a_failure(server: ServerProcess) -> None:
    done = locust(server.port, key="another key")
    assert done.returncode == 1
    seen = rows(done)
    assert seen["SyncCatalog"]["num_failures"] == seen["SyncCatalog"]["num_requests"] > 0
    assert "Invalid Credentials" in done.stderr
    assert "GetCommand" not in seen


WRONG = {
    "no key": ((), "", "a key is needed: set API_KEY"),
    "shares above 1": (("--unknown", "0.9", "--bad-key", "0.2"), KEY, "their sum at most 1"),
    "a pause below 0": (("--pause", "-1"), KEY, "--pause must be at least 0"),
    "no such file": (("--ca-file", "nowhere.pem"), KEY, "there is no file nowhere.pem"),
}


@pytest.mark.parametrize(("options", "key", "told"), sample(WRONG.values(), unpack=True), ids=WRONG)
def test_wrong_options_are_reported_at_once(transport: str, options: tuple[str, ...], key: str, told: str) -> None:
    done = locust(1, *options, key=key, seconds=60)
    assert done.returncode == 2
    assert told in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
