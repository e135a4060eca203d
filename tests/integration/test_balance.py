"""Connections are spread over the workers by load, move from a dead worker to others, and do not wait for a hung
one.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from tests.conftest import StartServer
from tests.support.client import UNLIMITED, Client
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

pytestmark = pytest.mark.transports("native")  # grpcio cannot adopt a listening socket: the kernel hashes connections

WORKERS, CLIENTS = 4, 16
PATIENT = (*UNLIMITED, ("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 200))


def start(table: Table, start_server: StartServer, **settings: str) -> ServerProcess:
    table.add_commands(3)
    return start_server(table.url, WORKERS=str(WORKERS), **settings).wait_ready()


def held(server: ServerProcess) -> list[int]:
    """Number of connections of each worker."""
    return [worker["connections"] or 0 for worker in server.statusz()["workers"]]


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    """Clients that are closed at the end of the test."""
    with ExitStack() as stack:
        yield stack


def connect(clients: ExitStack, server: ServerProcess, count: int) -> list[Client]:
    """Open clients one after the other. Each has a connection on which it has received an answer."""
    made = []
    for _ in range(count):
        made.append(clients.enter_context(Client(server.port, options=PATIENT)))
        assert made[-1].get("command1").name == "command1"
    return made


def test_sixteen_clients_in_sequence_are_spread_evenly_over_four_workers(
    table: Table, start_server: StartServer, clients: ExitStack
) -> None:
    server = start(table, start_server)
    for count in range(1, CLIENTS + 1):
        connect(clients, server, 1)
        assert sum(held(server)) == count
        assert max(held(server)) - min(held(server)) <= 1
    assert held(server) == [CLIENTS // WORKERS] * WORKERS
    assert server.metric("avap_connections", worker="0") == CLIENTS // WORKERS


@pytest.mark.thorough  # starts four workers
def test_a_burst_of_clients_is_spread_evenly(table: Table, start_server: StartServer, clients: ExitStack) -> None:
    server = start(table, start_server)
    for _ in range(40):
        clients.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=5))
    until(lambda: sum(held(server)) == 40, lambda: f"all accepted: {held(server)}")
    assert max(held(server)) - min(held(server)) <= 1


@pytest.mark.thorough  # starts four workers
def test_connections_of_a_dead_worker_move_to_others_and_are_spread_again(
    table: Table, start_server: StartServer, clients: ExitStack
) -> None:
    """Connections of the dead worker move to the others at once; as connections reach their maximum age, its successor
    gets its share.
    """
    server = start(table, start_server, MAX_CONNECTION_AGE_SECONDS="2")
    callers = connect(clients, server, CLIENTS)
    os.kill(server.worker_pids()[0], signal.SIGKILL)
    until(lambda: any(worker["restarts"] for worker in server.statusz()["workers"]), server.tail)

    def spread() -> bool:
        for caller in callers:
            caller.health()  # the client reconnects if necessary
        now = held(server)
        # A client may open its next connection while the previous one drains.
        return sum(now) >= CLIENTS and max(now) - min(now) <= 1 and min(now) >= CLIENTS // WORKERS

    until(spread, lambda: f"an even spread over all workers: {held(server)}", seconds=60)


@pytest.mark.thorough  # starts four workers
def test_a_hung_worker_does_not_delay_new_connections(
    table: Table, start_server: StartServer, clients: ExitStack
) -> None:
    server = start(table, start_server, HEARTBEAT_TIMEOUT_SECONDS="60")
    began = time.monotonic()
    connect(clients, server, WORKERS - 1)
    usual = (time.monotonic() - began) / (WORKERS - 1)
    idle = next(worker["pid"] for worker in server.statusz()["workers"] if not worker["connections"])
    os.kill(idle, signal.SIGSTOP)
    try:
        slowest = 0.0
        deadline = time.monotonic() + 2.5  # the worker is waited for until its heartbeat is too old
        while time.monotonic() < deadline:
            began = time.monotonic()
            connect(clients, server, 1)
            slowest = max(slowest, time.monotonic() - began)
    finally:
        os.kill(idle, signal.SIGCONT)
    # The first connection waits 50 ms, and later connections do not wait; any further delay is due to a busy machine.
    assert slowest < max(0.5, 20 * usual)
    assert [worker["connections"] for worker in server.statusz()["workers"] if worker["pid"] == idle] == [0]


@pytest.mark.thorough  # starts four workers
def test_a_client_beyond_the_limit_is_served_from_the_reserve_and_the_service_is_not_ready(
    table: Table, start_server: StartServer, clients: ExitStack
) -> None:
    server = start(table, start_server, MAX_CONNECTIONS="2")
    connect(clients, server, 2 * WORKERS - 1)
    with Client(server.port) as last:
        assert last.get("command1").name == "command1"
        assert held(server) == [2] * WORKERS
        until(lambda: [worker["room"] for worker in server.statusz()["workers"]] == ["taken"] * WORKERS, "all is taken")
        assert not server.statusz()["ready"]
        connect(clients, server, 1)
        server.wait_log("MAX_CONNECTIONS is reached", connections=2)
