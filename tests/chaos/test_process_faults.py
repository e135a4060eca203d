"""Faults of workers and publications: clients that retry see no failure, and the port never closes."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest
from tests.chaos.test_database_faults import NAMES, assert_nothing_failed
from tests.conftest import StartServer
from tests.support.client import RETRYING
from tests.support.load import Load
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table


@pytest.fixture
def server(table: Table, start_server: StartServer) -> ServerProcess:
    table.add_commands(100)
    return start_server(table.url, WORKERS="3", HEARTBEAT_TIMEOUT_SECONDS="1.5").wait_ready()


def serving(server: ServerProcess) -> int:
    return sum(worker["state"] == "serving" for worker in server.statusz()["workers"])


def assert_port_is_open(server: ServerProcess) -> None:
    socket.create_connection(("127.0.0.1", server.port), timeout=5).close()


def ports_connected_to(port: int) -> set[str]:
    """Local ends of the established connections to ``port``, as /proc/net/tcp writes them."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return {fields[1] for fields in lines if fields[2].endswith(f":{port:04X}") and fields[3] == "01"}


def test_no_call_of_a_client_that_retries_fails_when_a_worker_is_killed(server: ServerProcess) -> None:
    with Load(server.port, NAMES, options=RETRYING, connections=8) as load:
        for _ in range(2):
            load.wait_answered(100)
            victim = server.worker_pids()[0]
            os.kill(victim, signal.SIGKILL)
            assert_port_is_open(server)
            until(lambda victim=victim: victim not in server.worker_pids() and serving(server) == 3, server.tail)
        load.wait_answered(100)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
def test_no_call_of_a_client_that_retries_fails_during_a_roll(server: ServerProcess) -> None:
    with Load(server.port, NAMES, options=RETRYING, connections=8) as load:
        load.wait_answered(100)
        server.signal(signal.SIGUSR2)
        until(lambda: len(server.logged("Worker rolled")) == 3, server.tail)
        assert_port_is_open(server)
        load.wait_answered(100)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
@pytest.mark.transports("native")
def test_no_call_fails_or_is_retried_during_a_roll(server: ServerProcess) -> None:
    """The server sends two GOAWAYs: the first asks for no more calls, and the second is sent when the calls under way
    are known."""
    with Load(server.port, NAMES, connections=16, rate=400) as load:
        for roll in (1, 2):
            load.wait_answered(100)
            server.signal(signal.SIGUSR2)
            until(lambda roll=roll: len(server.logged("Worker rolled")) == 3 * roll, server.tail)
        load.wait_answered(100)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
@pytest.mark.transports("native")
def test_no_call_fails_or_is_retried_when_connections_reach_their_maximum_age(
    table: Table, start_server: StartServer
) -> None:
    table.add_commands(100)
    server = start_server(table.url, MAX_CONNECTION_AGE_SECONDS="0.3").wait_ready()
    with Load(server.port, NAMES, connections=16, rate=400) as load:
        load.wait_answered(100)
        first = ports_connected_to(server.port)
        load.wait_answered(600)
        assert not first & ports_connected_to(server.port), "every connection has been replaced"
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
@pytest.mark.any_transport
def test_no_call_fails_during_frequent_publications(server: ServerProcess, table: Table) -> None:
    with Load(server.port, NAMES, connections=6) as load:
        for number in range(20):
            table.run("UPDATE obex_dapl_functions SET code = %s", (f"# {number}",))
            until(lambda number=number: server.statusz()["catalog"]["generation"] >= number + 2, server.tail)
        load.wait_answered(50)
    assert_nothing_failed(load)


@pytest.mark.thorough  # seconds of load
@pytest.mark.any_transport
def test_a_restarted_server_serves_again_under_load(table: Table, start_server: StartServer) -> None:
    """Two servers on two ports are restarted in turn; the other one must not be affected."""
    table.add_commands(100)
    first = start_server(table.url).wait_ready()
    second = start_server(table.url).wait_ready()
    with Load(first.port, NAMES) as load:
        load.wait_answered(100)
        second.signal(signal.SIGTERM)
        assert second.wait_exit() == 0
        load.wait_answered(100)
    assert_nothing_failed(load)
