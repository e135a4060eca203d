"""A ``@grpc/grpc-js`` client, the kind that is in use today, gets every definition byte for byte, signed and
unsigned."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import StartServer
from tests.integration.test_serving import ROWS, expected
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

from definition_server.catalog.signing import Signer

HERE = Path(__file__).parent / "grpc_js"
PROTO = Path(__file__).parents[2] / "service/definition_server/proto/avap.proto"


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: the number of workers does not matter here."""
    return {"WORKERS": "1"}


@pytest.fixture(scope="module")
def node_modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the client and its dependencies, installed from the lock file."""
    if shutil.which("npm") is None:
        missing = "Node.js and npm are needed for the grpc-js client"
        if os.environ.get("CI"):
            pytest.fail(missing, pytrace=False)
        pytest.skip(missing)
    directory = tmp_path_factory.mktemp("grpc_js")
    for file in HERE.iterdir():
        shutil.copy(file, directory)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund", "--loglevel=error"], cwd=directory, check=True, timeout=170)
    return directory


def read(node_modules: Path, server: ServerProcess) -> Any:
    done = subprocess.run(
        ["node", "read_catalogue.js", str(server.port), KEY, str(PROTO)],
        cwd=node_modules,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.thorough  # npm installs the client
@pytest.mark.parametrize("key", ["", "signing key"])
def test_grpc_js_gets_every_definition(node_modules: Path, table: Table, start_server: StartServer, key: str) -> None:
    table.add(ROWS)
    answers = read(node_modules, start_server(table.url, AVAP_INTERNAL_KEY=key).wait_ready())
    commands = answers["catalogue"]["commands"]
    assert answers["single"] == commands
    assert answers["catalogue"]["total_count"] == len(ROWS)
    assert len(answers["catalogue"]["version_hash"]) == 64
    got = {}
    for command in commands:
        code = base64.b64decode(command["code"])
        source = Signer(key).unpack(code) if key else code
        got[command["name"]] = (command["name"], command["type"], command["interface_json"], source)
    assert got == {row[0]: expected(row) for row in ROWS}
    assert answers["missing"] == {"code": 5, "details": "Command 'nichts / 無' not found"}
    assert answers["refused"] == answers["keyless"] == {"code": 16, "details": "Invalid Credentials"}
