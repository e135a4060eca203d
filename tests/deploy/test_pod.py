"""A real server with the environment of the manifests, with the kubelet's probes."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.deploy.manifests import Manifests
from tests.deploy.promises import PROBES, setting
from tests.judges.tools import may_build
from tests.support.polling import until
from tests.support.server import FAST, KEY, ServerProcess
from tests.support.table import Table

pytestmark = may_build

Status = health_pb2.HealthCheckResponse


def kubelet(manifests: Manifests, probe: str, port: int) -> bool:
    """The result of a probe as the kubelet sees it, over a new connection: SERVING in time, or a failure."""
    told = manifests.container[probe]
    request = health_pb2.HealthCheckRequest(service=told["grpc"]["service"])
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=told["timeoutSeconds"])
        except grpc.RpcError:
            return False
    return bool(answer.status == Status.SERVING)


@pytest.fixture
def variables(guide: Manifests, database_url: str, tmp_path: Path) -> dict[str, str]:
    """The environment of the pod, with directories of the test in which the Secret's files exist."""
    secrets, snapshots = tmp_path / "secrets", tmp_path / "snapshots"
    snapshots.mkdir()
    secrets.mkdir()
    (secrets / "database-url").write_text(f"{database_url}\n")
    (secrets / "api-key").write_text(KEY)
    mounts = {mount["name"]: mount["mountPath"] for mount in guide.container["volumeMounts"]}
    return {
        name: value.replace(mounts["secrets"], str(secrets)).replace(mounts["snapshots"], str(snapshots))
        for name, value in guide.environment.items()
    }


@pytest.fixture
def pod(variables: dict[str, str], transport: str) -> Iterator[ServerProcess]:
    """The server of a pod whose database has no table yet."""
    ports = {"PORT": "0", "METRICS_PORT": "0", "HOST": "127.0.0.1"}
    server = ServerProcess("", TRANSPORT=transport)
    kept = {k: v for k, v in server.environment.items() if k not in FAST and k != "DATABASE_URL"}
    server.environment = kept | variables | ports | {"SYNC_INTERVAL_SECONDS": "0.5"}
    with server:
        yield server


@pytest.mark.transports
def test_the_server_accepts_the_environment_of_the_pod(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "definition_server", "config"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout


def test_a_pod_without_a_table_is_alive_not_ready_and_then_serves(
    guide: Manifests, pod: ServerProcess, database_url: str
) -> None:
    port = pod.port
    until(lambda: kubelet(guide, "startupProbe", port), lambda: f"started:\n{pod.tail()}")
    pod.wait_log("Sync failed")
    assert [kubelet(guide, probe, port) for probe in PROBES] == [True, True, False]
    Table(database_url).add_commands(3)
    until(lambda: kubelet(guide, "readinessProbe", port), lambda: f"ready:\n{pod.tail()}")
    assert [kubelet(guide, probe, port) for probe in PROBES] == [True, True, True]


def test_a_terminated_pod_is_not_ready_first_and_exits_in_time(
    guide: Manifests, pod: ServerProcess, database_url: str
) -> None:
    Table(database_url).add_commands(3)
    pod.wait_ready()
    port = pod.port
    pod.signal(signal.SIGTERM)
    until(lambda: not kubelet(guide, "readinessProbe", port), lambda: f"not ready:\n{pod.tail()}")
    # The pod is still alive, so the kubelet does not interfere with the shutdown, and clients are answered.
    assert kubelet(guide, "livenessProbe", port)
    assert pod.wait_exit(seconds=setting(guide, "DRAIN_TIMEOUT_SECONDS")) == 0
