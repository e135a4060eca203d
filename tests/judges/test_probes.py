"""Operators' tools for gRPC servers work on a real definition server: grpc-health-probe, as Kubernetes runs it,
and grpcurl, which finds the methods by reflection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.integration.test_serving import ROWS
from tests.judges.conftest import definition_server
from tests.judges.serve import TRANSPORTS
from tests.judges.tools import go_programs, may_build, run
from tests.support.providers import DatabaseServer
from tests.support.server import KEY, ServerProcess

pytestmark = may_build

SECONDS = 30
NOT_FOUND = 3
"""Exit code of grpc-health-probe where the check itself fails, as it does for an unknown service."""


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, postgres: DatabaseServer) -> Iterator[ServerProcess]:
    with definition_server(postgres, f"probes_{request.param}", TRANSPORT=request.param, REFLECTION="true") as process:
        yield process


@pytest.mark.parametrize(("service", "code"), [("", 0), ("avap.DefinitionEngine", 0), ("nothing", NOT_FOUND)])
def test_grpc_health_probe_reports_the_state_of_each_service(server: ServerProcess, service: str, code: int) -> None:
    probe = str(go_programs() / "grpc-health-probe")
    done = run([probe, f"-addr=127.0.0.1:{server.port}", f"-service={service}"], seconds=SECONDS)
    assert done.returncode == code, done.stderr


def grpcurl(*arguments: str) -> str:
    done = run([str(go_programs() / "grpcurl"), "-plaintext", *arguments], seconds=SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_grpcurl_finds_the_services_and_calls_one(server: ServerProcess) -> None:
    target = f"127.0.0.1:{server.port}"
    assert set(grpcurl(target, "list").split()) >= {"avap.DefinitionEngine", "grpc.health.v1.Health"}
    name = ROWS[0][0]
    method = "avap.DefinitionEngine/GetCommand"
    answer = grpcurl("-H", f"x-avap-auth: {KEY}", "-d", json.dumps({"name": name}), target, method)
    assert json.loads(answer)["name"] == name
