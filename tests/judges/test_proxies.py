"""No limit affects honest clients: gRPC's stacks and probes, directly and through nginx, HAProxy and Envoy, with the
default settings of the server, of the proxies and of the clients.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.test_serving import ROWS
from tests.judges.conftest import definition_server
from tests.judges.proxies import PROXIES, proxy
from tests.judges.serve import TRANSPORTS
from tests.judges.tools import go_programs, may_build, node_program, run
from tests.support.client import Client
from tests.support.polling import until
from tests.support.providers import DatabaseServer
from tests.support.server import KEY, ServerProcess

from definition_server.rpc import avap_pb2

pytestmark = may_build

CALLS, PROBES, FLEET = 200, 15, 100
SECONDS = 90
PING_SECONDS = 42
"""Four pings at intervals of 10 seconds: a server that allows no pings disconnects the client at the third."""
DIRECT = "direct"
PINGING = (
    ("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 5000),
    ("grpc.keepalive_permit_without_calls", 1), ("grpc.http2.max_pings_without_data", 0),
)  # fmt: skip
ON_PURPOSE = "A call was not authorized"
"""The catalogue programs make one call with a wrong key each."""
REFUSALS = ("flood", "evict", "refus", "reject", "strike")
"""Parts of the names of metrics that count the effects of limits."""


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, postgres: DatabaseServer) -> Iterator[ServerProcess]:
    """A definition server on each transport in turn, with the default limits."""
    with definition_server(postgres, f"proxies_{request.param}", TRANSPORT=request.param) as process:
        yield process


@pytest.fixture(params=(DIRECT, *PROXIES))
def port(request: pytest.FixtureRequest, server: ServerProcess, tmp_path: Path) -> Iterator[int]:
    """The port of the server, or of a proxy in front of it."""
    with ExitStack() as stack:
        yield (
            server.port if request.param == DIRECT else stack.enter_context(proxy(request.param, server.port, tmp_path))
        )


@pytest.fixture(scope="module")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contract as the clients read it."""
    described = descriptor_pb2.FileDescriptorProto.FromString(avap_pb2.DESCRIPTOR.serialized_pb)
    path = tmp_path_factory.mktemp("contract") / "descriptors"
    path.write_bytes(descriptor_pb2.FileDescriptorSet(file=[described]).SerializeToString())
    return path


def catalogue(program: list[str], port: int, descriptors: Path) -> str:
    """Let the client ``program`` read the catalogue and make calls. Returns its failures; empty if there were none."""
    done = run([*program, f"127.0.0.1:{port}", KEY, str(descriptors), str(CALLS)], seconds=SECONDS)
    equal = json.loads(done.stdout)["equal"] if done.returncode == 0 else done.stderr
    return "" if equal == CALLS else f"{program}: {equal}"


def probes(port: int) -> str:
    """Make probes as kubelet does, each on a new connection."""
    probe = [str(go_programs() / "grpc-health-probe"), f"-addr=127.0.0.1:{port}"]
    failed = [done.stderr for done in (run(probe, seconds=30) for _ in range(PROBES)) if done.returncode]
    return f"{len(failed)} probes failed: {failed[0]}" if failed else ""


def fleet(port: int) -> str:
    """Language servers, each with a connection, a Watch that stays, and some calls."""
    with ExitStack() as stack:
        clients = [stack.enter_context(Client(port)) for _ in range(FLEET)]
        watches = [
            health_pb2_grpc.HealthStub(each.channel).Watch(health_pb2.HealthCheckRequest(), timeout=SECONDS)
            for each in clients
        ]
        try:
            for each, watch in zip(clients, watches, strict=True):
                if next(watch).status != health_pb2.HealthCheckResponse.SERVING:
                    return "a watch says not SERVING"
                for row in ROWS[:3]:
                    if each.get(str(row[0])).name != row[0]:
                        return "a wrong answer"
        except grpc.RpcError as error:
            return f"the fleet: {error}"
        finally:
            for watch in watches:
                watch.cancel()
    return ""


def refusals(server: ServerProcess, after: int) -> list[str]:
    """The server's reports about limits: log lines about peers, and metrics that are not 0."""
    lines = [str(line) for line in server.lines[after:] if line.get("peer") and line.get("msg") != ON_PURPOSE]
    samples = (line.split() for line in server.http("/metrics")[1].splitlines() if not line.startswith("#"))
    counted = [
        f"{name} {value}" for name, value, *_ in samples
        if any(part in name for part in REFUSALS) and not name.startswith("avap_rows") and float(value)
    ]  # fmt: skip
    return lines + counted


def test_no_honest_client_is_refused(server: ServerProcess, port: int, descriptors: Path) -> None:
    after = len(server.lines)
    _reachable(port)
    go = [str(go_programs() / "catalogue")]
    with ThreadPoolExecutor(4) as pool:
        jobs = [
            pool.submit(catalogue, go, port, descriptors),
            pool.submit(catalogue, node_program(), port, descriptors),
            pool.submit(probes, port),
            pool.submit(fleet, port),
        ]
    assert [job.result() for job in jobs if job.result()] == []
    assert refusals(server, after) == []


def _reachable(port: int) -> None:
    """Wait until the proxy has found the server healthy."""

    def answers() -> bool:
        with Client(port) as client:
            try:
                return client.health() == "SERVING"
            except grpc.RpcError:
                return False

    until(answers, lambda: "the server answers through the proxy", seconds=20)


def test_a_client_that_pings_every_ten_seconds_is_not_disconnected(server: ServerProcess, tmp_path: Path) -> None:
    """Tested on a connection without calls, on a connection with a Watch, and behind an Envoy that pings the server."""
    after = len(server.lines)
    pings = [str(Path(node_program()[-1]).with_name("pings.js"))]
    target = f"127.0.0.1:{server.port}"
    with proxy("envoy", server.port, tmp_path) as behind, ThreadPoolExecutor(4) as pool:
        _reachable(behind)
        go = pool.submit(run, [str(go_programs() / "pings"), target, str(PING_SECONDS)], seconds=SECONDS)
        js = pool.submit(run, [node_program()[0], *pings, target, str(PING_SECONDS)], seconds=SECONDS)
        python = pool.submit(_hold, server.port)
        proxied = pool.submit(_hold, behind)
        for done in (go.result(), js.result()):
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout) == {"idle": 0, "watching": 0}
        assert python.result() == proxied.result() == []
    assert refusals(server, after) == []


def _hold(port: int) -> list[str]:
    """A grpcio client that pings every 10 seconds. Returns the status with which its Watch ended, and the states of an
    idle connection."""
    found: list[str] = []
    with Client(port, options=PINGING) as idle, Client(port, options=PINGING) as watching:
        idle.health()
        idle.channel.subscribe(
            lambda state: found.append(state.name) if state is not grpc.ChannelConnectivity.READY else None
        )
        # The call has no deadline, because the server would observe it too, and the faster clock would decide the
        # status.
        watch = health_pb2_grpc.HealthStub(watching.channel).Watch(health_pb2.HealthCheckRequest())
        cancel = threading.Timer(PING_SECONDS, watch.cancel)
        cancel.start()
        try:
            for _ in watch:
                continue
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                found.append(str(error))
        finally:
            cancel.cancel()
            cancel.join()
        return found
