"""Two containers are replaced one after the other while clients call: no call fails.

Each address is unreachable while its container is replaced, as with two machines that are updated in turn; a rollout of
Kubernetes with ``maxUnavailable: 0`` is easier for clients. docs/containers.md lists the conditions for clients.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.containers.engine import ADMIN, COMMANDS, GRPC
from tests.containers.fleet import FleetLoad, Result
from tests.containers.test_running import http
from tests.support.polling import until

from definition_server.cli.embedded_postgres import free_port

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.containers.conftest import StartContainer
    from tests.containers.engine import Running
    from tests.support.table import Table

RATE = 300
CALLS_BEFORE_NEXT = 200
"""Calls that a replacement must have answered before the other container is stopped, as with ``minReadySeconds``."""
STOP_SECONDS = 20
LATE_SECONDS = 0.5
"""Maximum delay of the generator; with a longer delay it has not offered its rate."""

MORE, OCTETS = 1000, 2000
"""Number of definitions; the catalogue has 2 MB, so that sending it takes some time."""

NAMES = {f"command{number}": b"# %d\n" % number for number in range(COMMANDS)}


def answered(server: Running) -> int:
    """Calls that this container has answered with OK."""
    for family in text_string_to_metric_families(http(server, "/metrics")[1]):
        for sample in family.samples:
            if sample.name == "avap_requests_total" and sample.labels["status"] == "200":
                return int(sample.value)
    return 0


@pytest.fixture
def count(table: Table) -> int:
    """Definitions in the table."""
    table.add_commands(MORE, OCTETS, start=COMMANDS)
    return COMMANDS + MORE


class Fleet:
    """Two containers behind two fixed ports."""

    def __init__(self, start: StartContainer, transport: str) -> None:
        self._start = start
        self._settings = {"TRANSPORT": transport, "DRAIN_WAIT_SECONDS": "1", "DRAIN_TIMEOUT_SECONDS": "10"}
        self.ports = [free_port(), free_port()]
        self.servers = [self._serve(port) for port in self.ports]
        for server in self.servers:
            server.wait_log("Serving")

    def _serve(self, port: int) -> Running:
        ports = {f"{GRPC}/tcp": ("127.0.0.1", port), f"{ADMIN}/tcp": ("127.0.0.1",)}
        return self._start(options={"ports": ports}, **self._settings)

    def replace(self, number: int) -> None:
        """Stop one container as ``docker stop`` does, start its successor, and wait until clients use it."""
        old = self.servers[number]
        old.container.stop(timeout=STOP_SECONDS)
        assert old.state["ExitCode"] == 0, old.output()
        old.remove()
        new = self.servers[number] = self._serve(self.ports[number])
        new.wait_log("Serving")
        self.wait_answered(number)

    def wait_answered(self, number: int) -> None:
        server = self.servers[number]
        goal = answered(server) + CALLS_BEFORE_NEXT
        until(lambda: answered(server) >= goal, lambda: f"clients find port {self.ports[number]}: {server.output()}")


def offered_at_its_rate(result: Result, seconds: float) -> bool:
    """Check that the load had its rate; otherwise the test proves nothing."""
    return result.latest_start_seconds < LATE_SECONDS and result.offered >= 0.95 * RATE * seconds


@pytest.mark.timeout(240)
@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_no_call_fails_while_both_containers_are_replaced(
    start: StartContainer, count: int, transport: str, figure: Callable[[str], None]
) -> None:
    fleet = Fleet(start, transport)
    with FleetLoad(fleet.ports, NAMES, count, rate=RATE) as load:
        began = time.monotonic()
        for number in (0, 1):
            fleet.wait_answered(number)
        for number in (0, 1):
            fleet.replace(number)
        seconds = time.monotonic() - began
    figure(f"rolling replacement, {transport}: {load.result}")
    assert offered_at_its_rate(load.result, seconds), load.result
    assert load.result.failed == {}
    assert load.result.wrong == []
    assert load.result.answered == load.result.offered


def test_the_load_detects_a_replacement_without_a_drain(start: StartContainer, count: int) -> None:
    """Both containers are killed, and the clients do not retry: the same load must report failures."""
    fleet = Fleet(start, "native")
    with FleetLoad(fleet.ports, NAMES, count, rate=RATE, retries=False) as load:
        for number in (0, 1):
            fleet.wait_answered(number)
        for server in fleet.servers:
            server.container.kill()
        until(lambda: load.result.failed, lambda: f"failures: {load.result}")
    assert all(cause.startswith("UNAVAILABLE") for cause in load.result.failed)
