"""The gRPC stacks of today read a catalogue from a real definition server: grpc-go, grpc-js, grpc-java and tonic.

Each stack makes one call after another on one connection, each with another deadline, so that its insertions into
HPACK's dynamic table, its pings and its window updates occur many times.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from tests.integration.test_serving import ROWS, expected
from tests.judges.conftest import definition_server
from tests.judges.serve import TRANSPORTS
from tests.judges.tools import go_programs, java_program, may_build, node_program, run, tonic_program
from tests.support.providers import DatabaseServer
from tests.support.server import KEY, ServerProcess

from definition_server.rpc import avap_pb2

pytestmark = may_build

CALLS = 200
MANY_CALLS = 5000
SECONDS = 60
POLL_SECONDS = 0.005
ESTABLISHED, TIME_WAIT = b"01", b"06"

STACKS: dict[str, Callable[[], list[str]]] = {
    "grpc-go": lambda: [str(go_programs() / "catalogue")],
    "grpc-js": node_program,
    "grpc-java": java_program,
    "tonic": tonic_program,
}


@pytest.fixture(scope="session")
def descriptors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The contract as the clients read it."""
    described = descriptor_pb2.FileDescriptorProto.FromString(avap_pb2.DESCRIPTOR.serialized_pb)
    path = tmp_path_factory.mktemp("contract") / "descriptors"
    path.write_bytes(descriptor_pb2.FileDescriptorSet(file=[described]).SerializeToString())
    return path


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, postgres: DatabaseServer) -> Iterator[ServerProcess]:
    """A definition server on each transport in turn."""
    with definition_server(postgres, f"judges_{request.param}", TRANSPORT=request.param) as process:
        yield process


@pytest.mark.parametrize("stack", STACKS)
def test_every_call_of_a_stack_gets_the_answer_of_the_catalogue(
    server: ServerProcess, descriptors: Path, stack: str
) -> None:
    answers, connections = _ask(stack, server.port, descriptors, CALLS)
    assert len(connections) == 1
    catalogue = answers["catalogue"]
    got = {command["name"]: _plain(command) for command in catalogue["commands"]}
    assert got == {row[0]: expected(row) for row in ROWS}
    assert catalogue["total_count"] == len(ROWS)
    assert len(bytes.fromhex(catalogue["version_hash"])) == 32
    assert answers["equal"] == CALLS
    assert answers["missing"] == {"code": 5, "details": "Command 'nichts / 無' not found"}
    assert answers["refused"] == {"code": 16, "details": "Invalid Credentials"}


def _ask(stack: str, port: int, descriptors: Path, calls: int) -> tuple[Any, set[bytes]]:
    """The output of the client, and the client's ports of the connections that were seen."""
    arguments = [*STACKS[stack](), f"127.0.0.1:{port}", KEY, str(descriptors), str(calls)]
    before, seen = _client_ports(port), set()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run, arguments, seconds=SECONDS)
        while not running.done():
            seen |= _client_ports(port)
            wait([running], POLL_SECONDS)
    done = running.result()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), (seen | _client_ports(port)) - before


def _client_ports(port: int) -> set[bytes]:
    """The clients' ports of connections to ``port`` that are established, or that either end has closed in the last
    minute (proc_pid_net(5)): a fast client may connect and leave between two polls.
    """
    lines = [line for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_bytes().splitlines()[1:]]
    found = set()
    for line in lines:
        local, remote, state = (field.rpartition(b":")[2] for field in line.split()[1:4])
        if remote == b"%04X" % port and state in (ESTABLISHED, TIME_WAIT):
            found.add(local)
        elif local == b"%04X" % port and state == TIME_WAIT:
            found.add(remote)
    return found


def _plain(command: dict[str, str]) -> tuple[str, str, str, bytes]:
    return command["name"], command["type"], command["interface_json"], base64.b64decode(command["code"])


@pytest.fixture(scope="module")
def restless(postgres: DatabaseServer) -> Iterator[ServerProcess]:
    """A definition server that drains every connection after a quarter of a second. With a shorter time, a busy
    client's next connection might be drained before its calls are sent, and gRPC repeats a refused call only once.
    """
    with definition_server(
        postgres, "judges_restless", TRANSPORT="native", MAX_CONNECTION_AGE_SECONDS="0.25"
    ) as process:
        yield process


@pytest.mark.parametrize("stack", [stack for stack in STACKS if stack != "tonic"])
def test_no_call_of_a_stack_fails_while_connections_are_drained(
    restless: ServerProcess, descriptors: Path, stack: str
) -> None:
    # With any server, tonic 0.14 ends calls that it had not sent when GOAWAY arrived with CANCELLED ("connection
    # closed"); docs/conformance.md has the figures.
    answers, connections = _ask(stack, restless.port, descriptors, MANY_CALLS)
    assert answers["equal"] == MANY_CALLS
    assert len(connections) > 1
