"""The processes of a server: their resources, their replacement, and their end."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from grpc_health.v1 import health_pb2
from tests.conftest import StartServer
from tests.support.client import RETRYING, UNLIMITED, Client
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import KEY, ServerProcess
from tests.support.table import Table

SIGNING_KEY = "signing-secret"


@pytest.fixture
def server(table: Table, start_server: StartServer) -> ServerProcess:
    table.add_commands(50)
    return start_server(table.url, AVAP_INTERNAL_KEY=SIGNING_KEY, HEARTBEAT_TIMEOUT_SECONDS="1.5").wait_ready()


def sockets_of(pid: int) -> list[str]:
    """Remote ends of the established TCP connections of a process, as /proc/net/tcp writes them."""
    inodes = set(open_descriptors(pid).values())
    remote = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in inodes and fields[3] == "01":
                remote.append(fields[2])
    return remote


@pytest.mark.any_transport
def test_workers_hold_no_database_connection_and_no_credential(server: ServerProcess, table: Table) -> None:
    secrets = [KEY.encode(), SIGNING_KEY.encode(), table.url.encode(), b"DATABASE_URL", b"API_KEY"]
    port = int(table.url.rpartition(":")[2].split("/")[0])
    until(lambda: any(end.endswith(f":{port:04X}") for end in sockets_of(server.pid)), "the master is connected")
    for pid in server.worker_pids():
        for file in ("environ", "cmdline"):
            content = Path(f"/proc/{pid}/{file}").read_bytes()
            assert content
            assert not [secret for secret in secrets if secret in content], file
        assert not [end for end in sockets_of(pid) if end.endswith(f":{port:04X}")]


@pytest.mark.any_transport
def test_workers_share_one_copy_of_the_snapshot(server: ServerProcess) -> None:
    inodes = set()
    for pid in server.worker_pids():
        maps = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        inodes |= {fields[4] for fields in maps if len(fields) > 5 and "avap-snapshot" in fields[5]}
    assert len(inodes) == 1


@pytest.mark.any_transport
def test_a_killed_worker_is_replaced_and_its_counters_stay(server: ServerProcess) -> None:
    with Client(server.port) as client:
        for _ in range(20):
            client.get("command1")
    served = 20
    server.wait_metric(served, "avap_requests_total", status="200")
    # It is repeated three times, so that a worker uses a slot in which another worker has counted.
    for deaths in (1, 2, 3):
        for victim in server.worker_pids():
            os.kill(victim, signal.SIGKILL)
        until(lambda deaths=deaths: [w["restarts"] for w in server.statusz()["workers"]] == [deaths] * 2, server.tail)
        until(lambda: _serving(server) == 2, server.tail)
    assert server.logged("Worker ended; starting another", how="signal 9")
    assert server.metric("avap_requests_total", status="200") == served


def _serving(server: ServerProcess) -> int:
    return sum(worker["state"] == "serving" for worker in server.statusz()["workers"])


@pytest.mark.thorough  # takes seconds
@pytest.mark.any_transport
def test_a_hung_worker_is_killed_and_replaced(server: ServerProcess) -> None:
    victim = server.worker_pids()[0]
    os.kill(victim, signal.SIGSTOP)
    line = server.wait_log("Worker hangs; killed", worker_pid=victim)
    assert line["level"] == "ERROR"
    until(lambda: victim not in server.worker_pids() and _serving(server) == 2, server.tail)


@pytest.mark.thorough  # seconds of load
def test_a_roll_replaces_every_worker_and_no_call_fails(server: ServerProcess) -> None:
    before = server.worker_pids()
    stop = threading.Event()
    with Client(server.port, options=(*UNLIMITED, *RETRYING)) as client:

        def call() -> int:
            calls = 0
            while not stop.is_set():
                client.get(f"command{calls % 50}")
                calls += 1
            return calls

        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            callers = [pool.submit(call) for _ in range(2)]
            try:
                server.signal(signal.SIGUSR2)
                until(lambda: len(server.logged("Worker rolled")) == 2, server.tail)
                server.signal(signal.SIGUSR2)
                until(lambda: len(server.logged("Worker rolled")) == 4, server.tail)
            finally:
                stop.set()
            assert all(caller.result() > 0 for caller in callers), "any failed call would have raised"
    after = server.worker_pids()
    assert not set(before) & set(after)
    assert _serving(server) == 2
    assert not server.logged("Worker ended; starting another")


@pytest.mark.any_transport
def test_workers_exit_when_their_master_is_killed(server: ServerProcess) -> None:
    workers = server.worker_pids()
    assert len(workers) == 2
    os.kill(server.pid, signal.SIGKILL)
    server.wait_exit()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), "the workers have left")
    assert len(server.logged("The master is gone; leaving")) == 2


@pytest.mark.thorough  # starts two servers
def test_a_new_server_binds_the_port_of_a_killed_one(
    server: ServerProcess, table: Table, start_server: StartServer
) -> None:
    port = server.port
    os.kill(server.pid, signal.SIGKILL)
    successor = start_server(table.url, PORT=str(port)).wait_ready()
    with Client(successor.port) as client:
        assert client.get("command1").name == "command1"


def test_a_shutdown_reports_not_serving_then_waits_then_exits(table: Table, start_server: StartServer) -> None:
    table.add_commands(5)
    server = start_server(table.url, DRAIN_WAIT_SECONDS="1.5", DRAIN_TIMEOUT_SECONDS="60", WORKERS="1").wait_ready()
    with Client(server.port) as client:
        watch = client.health_stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        server.signal(signal.SIGTERM)
        told = time.monotonic()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not server.logged("Stopped"), "health reports before the wait, not after"
        assert client.get("command1").name == "command1", "calls are answered during the wait"
        assert server.http("/readyz")[0] == 503
        assert server.wait_exit() == 0
        assert time.monotonic() - told >= 1.5
        # An open watch must not keep the server running until the drain timeout.
        assert time.monotonic() - told < 30
        watch.cancel()
    assert server.logged("Stopped")


def test_calls_in_flight_finish_before_the_server_exits(table: Table, start_server: StartServer) -> None:
    """A slow reader keeps a SyncCatalog of 30 MB in flight while the server is stopped."""
    table.add_commands(15_000, size=2000)
    server = start_server(table.url, WORKERS="1").wait_ready()
    with Client(server.port) as client:
        call = client.stub.SyncCatalog.future(client_empty(), metadata=client.metadata, timeout=30)
        until(lambda: server.metric("avap_request_duration_seconds_count", method="SyncCatalog") == 1, "in flight")
        server.signal(signal.SIGTERM)
        assert len(call.result().commands) == 15_000
    assert server.wait_exit() == 0


def client_empty() -> object:
    from definition_server.rpc import avap_pb2

    return avap_pb2.Empty()


@pytest.mark.thorough  # takes seconds
def test_a_second_signal_ends_the_drain(table: Table, start_server: StartServer) -> None:
    table.add_commands(5)
    server = start_server(table.url, DRAIN_WAIT_SECONDS="60", DRAIN_TIMEOUT_SECONDS="90").wait_ready()
    server.signal(signal.SIGTERM)
    server.wait_log("Draining")
    server.signal(signal.SIGTERM)
    assert server.wait_exit(15) == 0


@pytest.mark.thorough  # takes seconds
@pytest.mark.any_transport
def test_a_worker_that_repeatedly_ends_is_a_crash_loop_and_the_others_serve(
    server: ServerProcess,
) -> None:
    """Kill the same worker five times: the master reports a crash loop and still brings the worker back."""
    for _ in range(5):
        workers = server.statusz()["workers"]
        victim = until(lambda: server.statusz()["workers"][0]["pid"], server.tail)
        survivor = workers[1]["pid"]
        os.kill(victim, signal.SIGKILL)
        until(lambda victim=victim: server.statusz()["workers"][0]["pid"] not in (victim, None), server.tail)
        assert server.statusz()["workers"][1]["pid"] == survivor
    line = server.wait_log("Worker crash loop", worker=0)
    assert (line["level"], line["ends"]) == ("ERROR", 5)
    assert server.metric("avap_worker_crash_loop", worker="0") == 1
    assert server.metric("avap_worker_restarts_total", worker="0") == 5
    until(lambda: _serving(server) == 2, server.tail)


@pytest.mark.thorough  # takes seconds
def test_the_master_releases_a_replaced_catalogue_after_all_workers(table: Table, start_server: StartServer) -> None:
    """The last process that releases a catalogue frees its memory; in a worker, calls would wait for that."""
    table.add_commands(10)
    server = start_server(table.url, SYNC_INTERVAL_SECONDS="0.05").wait_ready()

    def mapped(*pids: int) -> set[str]:
        """Inodes of the snapshots that the processes map."""
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
        return {line.split()[4] for line in lines if "avap-snapshot" in line}

    (old,) = mapped(*server.worker_pids())
    table.run("UPDATE obex_dapl_functions SET code = %s", ("# another",))
    until(lambda: mapped(*server.worker_pids()) - {old}, server.tail)
    until(lambda: old not in mapped(*server.worker_pids()), server.tail)
    assert old in mapped(server.pid)
    until(lambda: old not in mapped(server.pid), server.tail)


@pytest.mark.thorough  # takes seconds
@pytest.mark.any_transport
def test_publications_leave_no_descriptor_open(table: Table, start_server: StartServer) -> None:
    table.add_commands(10)
    server = start_server(table.url, SYNC_INTERVAL_SECONDS="0.05").wait_ready()

    def descriptors() -> list[int]:
        return [len(open_descriptors(pid)) for pid in (server.pid, *server.worker_pids())]

    def publish(number: int) -> None:
        table.run("UPDATE obex_dapl_functions SET code = %s", (f"# {number}",))
        until(lambda: server.statusz()["catalog"]["generation"] == number, server.tail)
        server.wait_version(server.statusz()["catalog"]["version_hash"])

    publish(2)
    before = descriptors()
    for number in range(3, 13):
        publish(number)
    until(
        lambda: max(a - b for a, b in zip(descriptors(), before, strict=True)) <= 1, lambda: f"{before} {descriptors()}"
    )

    def mapped() -> set[int]:
        return {Path(f"/proc/{pid}/maps").read_text().count("avap-snapshot") for pid in server.worker_pids()}

    until(lambda: mapped() == {1}, lambda: f"old snapshots are unmapped: {mapped()}")
