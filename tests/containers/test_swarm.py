"""deploy/swarm/stack.yaml: Docker's own reader accepts it without a warning, and it keeps its promises."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import pytest
import yaml
from tests.containers.engine import ROOT, missing

from definition_server import __version__
from definition_server.control_plane.master import _EXIT_MARGIN_SECONDS
from definition_server.environment import variables
from definition_server.settings import Settings

FILE = ROOT / "deploy/swarm/stack.yaml"


@pytest.fixture(scope="module")
def stack() -> dict[str, Any]:
    """The stack as ``docker stack config`` prints it; that needs the command, and no engine."""
    if shutil.which("docker") is None:
        missing("the docker command (Debian docker-cli)")
    done = subprocess.run(["docker", "stack", "config", "-c", str(FILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), "docker warns on stderr of an option that Swarm ignores"
    return dict(yaml.safe_load(done.stdout))


@pytest.fixture
def server(stack: dict[str, Any]) -> dict[str, Any]:
    return dict(stack["services"]["avap-engine"])


def test_a_stack_file_that_docker_refuses_is_detected(stack: dict[str, Any]) -> None:
    broken = FILE.read_text().replace("stop_grace_period", "stop_grace")
    done = subprocess.run(["docker", "stack", "config", "-c", "-"], input=broken, capture_output=True, text=True)
    assert done.returncode, stack.keys()


def test_the_stack_has_the_size_of_the_guide_with_a_core_for_the_master(server: dict[str, Any]) -> None:
    resources = server["deploy"]["resources"]
    assert resources["limits"] == resources["reservations"] == {"cpus": "4", "memory": str(5 * 2**30)}
    assert int(server["environment"]["WORKERS"]) == 3
    assert server["ulimits"]["nofile"] == {"soft": 65536, "hard": 65536}
    assert server["image"] == f"definition-server:{__version__}"


def test_the_service_is_hardened_and_its_secrets_are_files_of_its_account(
    server: dict[str, Any], stack: dict[str, Any]
) -> None:
    assert (server["read_only"], server["cap_drop"], server["user"]) == (True, ["ALL"], "10001:10001")
    assert {(each["uid"], each["mode"]) for each in server["secrets"]} == {("10001", 0o400)}
    assert all(secret["external"] for secret in stack["secrets"].values())
    known = {name for field in Settings.model_fields.values() for name in variables(field)}
    assert {name.removesuffix("_FILE") for name in server["environment"]} <= known
    assert {"DATABASE_URL_FILE", "API_KEY_FILE"} <= server["environment"].keys()


def test_servers_are_replaced_one_by_one_and_have_time_to_drain(server: dict[str, Any]) -> None:
    deploy = server["deploy"]
    assert deploy["replicas"] == 3
    assert (deploy["update_config"]["parallelism"], deploy["update_config"]["failure_action"]) == (1, "rollback")
    assert deploy["endpoint_mode"] == "dnsrr"
    assert {port["mode"] for port in server["ports"]} == {"host"}, "the mesh does not work with dnsrr"
    grace = float(str(server["stop_grace_period"]).removesuffix("s"))
    assert grace >= Settings.model_fields["drain_timeout_seconds"].default + _EXIT_MARGIN_SECONDS
