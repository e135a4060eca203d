"""Operators' tools for gRPC servers work on a real definition server: grpc-health-probe, as Kubernetes runs it,
and grpcurl, which finds the methods by reflection.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.integration.test_serving import ROWS
from tests.judges.serve import TRANSPORTS
from tests.judges.tools import go_programs, may_build, run
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

pytestmark = may_build

SECONDS = 30
NOT_FOUND = 3
"""Exit code of grpc-health-probe where the check itself fails, as it does for an unknown service."""


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, postgres: DatabaseServer) -> Iterator[ServerProcess]:
    name = f"probes_{request.param}"
    url = create_database(postgres.url, name)
    Table(url).add(ROWS)
    with ServerProcess(url, TRANSPORT=request.param, REFLECTION="true") as process:
        yield process.wait_ready()
    drop_database(postgres.url, name)


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
