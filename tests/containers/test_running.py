"""One container with minimal privileges: start, serving, logs, stop."""

from __future__ import annotations

import json
import os
import signal
import statistics
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from docker.errors import APIError
from docker.types import Mount
from tests.containers.engine import ADMIN, COMMANDS, GRPC
from tests.support.client import Client, failure
from tests.support.polling import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.containers.conftest import StartContainer
    from tests.containers.engine import Running, Secrets
    from tests.support.table import Table

START_RATIO = 3.0
"""A start may take as long as this number of ``--version`` commands, each in a container of its own: 0.6 to 1.3 of
them were measured."""
TRANSPORTS = ("native", "grpcio")


def http(server: Running, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port(ADMIN)}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_server_serves_on_a_read_only_root_without_any_capability(start: StartContainer, transport: str) -> None:
    server = start(TRANSPORT=transport)
    server.wait_log("Serving")
    with Client(server.port(GRPC)) as client:
        assert client.get("command7").code.startswith(b"# 7\n")
        assert client.sync().total_count == COMMANDS
    with Client(server.port(GRPC), key="wrong") as client:
        assert failure(client.get, "command7")[0] == "UNAUTHENTICATED"
    status = server.execute("cat", "/proc/1/status")
    told = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert told["Uid"].split() == ["10001"] * 4
    assert told["Gid"].split() == ["0"] * 4
    assert int(told["CapEff"], 16) == int(told["CapPrm"], 16) == 0
    assert told["NoNewPrivs"] == "1"
    # Nothing writable is mounted except the engine's own /dev/shm and the like: the server needs no writable path.
    assert server.inspect()["HostConfig"]["ReadonlyRootfs"] is True
    assert not server.inspect()["HostConfig"].get("Tmpfs")
    assert [line for line in server.lines() if line["level"] not in ("INFO", "WARN")] == []


def test_the_last_known_good_snapshot_is_kept_on_a_volume(start: StartContainer, engine: Any) -> None:
    volume = engine.volumes.create(labels={"org.testcontainers": "true"})
    try:
        _first_and_second(start, volume.name)
    finally:
        volume.remove()


def test_an_arbitrary_account_of_group_0_keeps_the_last_known_good_snapshot(start: StartContainer, engine: Any) -> None:
    """As OpenShift runs a container."""
    volume = engine.volumes.create(labels={"org.testcontainers": "true"})
    try:
        options = {"mounts": [Mount("/var/lib/definition-server", volume.name, type="volume")], "user": "1000770000:0"}
        server = start(options=options, SNAPSHOT_DIR="/var/lib/definition-server")
        server.wait_log("Definitions Broadcasted")
        server.wait_log("Serving")
        assert [line for line in server.lines() if line["level"] not in ("INFO", "WARN")] == []
        server.remove()
    finally:
        volume.remove(force=True)


def _first_and_second(start: StartContainer, volume: str) -> None:
    """One server stores its catalogue; the next one starts without a database."""
    options = {"mounts": [Mount("/var/lib/definition-server", volume, type="volume")]}
    first = start(options=options, SNAPSHOT_DIR="/var/lib/definition-server")
    first.wait_log("Serving")
    first.wait_log("Definitions Broadcasted")
    first.container.stop(timeout=20)
    assert first.state["ExitCode"] == 0, first.output()
    first.remove()
    second = start(
        options={**options, "network": "bridge"},  # on this network, no host has the name database
        SNAPSHOT_DIR="/var/lib/definition-server",
        CONNECT_TIMEOUT_SECONDS="1",
    )
    second.wait_log("Serving the last-known-good snapshot")
    with Client(second.port(GRPC)) as client:
        assert client.sync().total_count == COMMANDS
    second.remove()


def test_the_health_probe_of_kubernetes_is_answered(start: StartContainer) -> None:
    """The call of a `grpc:` probe: ``grpc.health.v1.Health/Check`` without a key."""
    server = start()
    server.wait_log("Serving")
    with Client(server.port(GRPC), key=None) as client:
        assert client.health() == "SERVING"
        assert client.health("avap.DefinitionEngine") == "SERVING"
    assert http(server, "/readyz") == (200, "ready\n")
    assert http(server, "/livez")[0] == 200


def test_a_container_starts_in_the_time_of_a_few_commands(start: StartContainer, figure: Callable[[str], None]) -> None:
    """Measures the time from the command until the server is ready, and reads the time that the server logs."""
    seen, told, yardstick = [], [], []
    for _ in range(5):
        began = time.monotonic()
        command = start("--version")
        assert command.wait_exit() == 0
        yardstick.append(time.monotonic() - began)
        command.remove()
        began = time.monotonic()
        server = start()
        until(partial(_ready, server), server.output)
        seen.append(time.monotonic() - began)
        with Client(server.port(GRPC), key=None) as client:
            assert client.health() == "SERVING"
        told.append(float(server.wait_log("Serving")["seconds"]))
        server.remove()
    ready, own, version = statistics.median(seen), statistics.median(told), statistics.median(yardstick)
    figure(f"start: SERVING {ready:.2f} s after docker run, {own:.2f} s of it in the server; --version {version:.2f} s")
    assert ready < START_RATIO * version


def _ready(server: Running) -> bool:
    with suppress(OSError):  # the port is published before the server listens on it
        return http(server, "/readyz")[0] == 200
    return False


@pytest.mark.parametrize(("cpus", "workers"), [(1.0, 1), (2.0, 2)])
def test_the_number_of_workers_is_that_of_the_containers_cpus(start: StartContainer, cpus: float, workers: int) -> None:
    if (os.cpu_count() or 1) < cpus:
        pytest.skip(f"this machine has no {cpus:g} CPUs")
    server = start(options={"nano_cpus": int(cpus * 1e9)}, WORKERS="")
    assert server.wait_log("Starting")["workers"] == workers


def test_the_memory_that_capacity_plans_is_sufficient(
    start: StartContainer, table: Table, figure: Callable[[str], None]
) -> None:
    """`definition-server capacity` replaces a heap limit: publications and a roll fit into the memory that it
    computes.
    """
    definitions, octets = 20_000, 2000
    table.add_commands(definitions - COMMANDS, octets, start=COMMANDS)
    asked = ("--rps", "1000", "--definitions", str(definitions), "--definition-octets", str(octets + 100))
    planner = start("capacity", *asked, "--json")
    assert planner.wait_exit() == 0, planner.output()
    plan = json.loads(planner.output())["replica"]
    limit = plan["memory_limit_mb"]
    # A swap limit equal to the memory limit means no swap, so a process above the limit is killed.
    memory = {"mem_limit": f"{limit}m", "memswap_limit": f"{limit}m"}
    server = start(options=memory, WORKERS=str(plan["workers"]), SYNC_INTERVAL_SECONDS="0.2")
    server.wait_log("Serving", seconds=60)
    for number in range(3):
        table.run("UPDATE obex_dapl_functions SET code = %s WHERE name = 'command0'", (f"new = {number}",))
        until(lambda least=number + 2: len(server.logged("Definitions Broadcasted")) >= least, server.output)
    server.container.kill(signal.SIGUSR2)
    until(lambda: len(server.logged("Worker rolled")) == plan["workers"], server.output, seconds=60)
    assert server.state["OOMKilled"] is False
    assert server.logged("Worker ended; starting another") == []
    peak = "cat /sys/fs/cgroup/memory.peak 2>/dev/null || cat /sys/fs/cgroup/memory/memory.max_usage_in_bytes"
    most = int(server.execute("sh", "-c", peak)) / 2**20
    figure(f"memory: {most:.0f} MiB at most of {limit} MiB planned ({definitions} definitions of {octets} octets)")
    assert most < limit


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_sigterm_lets_calls_in_flight_finish(start: StartContainer, table: Table, transport: str) -> None:
    """Whole catalogues are being sent to slow readers while Docker stops the container."""
    table.add_commands(3000, 2000, start=COMMANDS)
    server = start(TRANSPORT=transport, DRAIN_WAIT_SECONDS="1")
    server.wait_log("Serving")
    answers: list[int] = []
    go_on = threading.Event()

    def fetch() -> None:
        with Client(server.port(GRPC)) as client:
            while not go_on.is_set():
                answers.append(client.sync().total_count)

    threads = [threading.Thread(target=fetch) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: len(answers) > 8, server.output)
        server.container.kill(signal.SIGTERM)
        server.wait_log("Draining")
    finally:
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert set(answers) == {COMMANDS + 3000}
    assert server.wait_exit() == 0
    assert server.logged("Stopped")
    assert not server.logged("Workers did not leave in time; killed")


def test_a_sigterm_before_the_server_has_started_ends_it(start: StartContainer) -> None:
    """PID 1 has no default action for signals: a signal that arrives while Python loads must be handled
    nevertheless.
    """
    server = start()
    deadline = time.monotonic() + 10
    while server.state["Running"] and time.monotonic() < deadline:
        with suppress(APIError):  # Docker refuses to signal a container that has just ended
            server.container.kill(signal.SIGTERM)
    assert server.state["Running"] is False
    assert server.state["ExitCode"] == 0
    assert "Starting" not in server.output(), "it took the signal only when it had started"
    assert "Second signal" not in server.output()


def test_the_first_process_reaps_orphans_of_an_exec(start: StartContainer) -> None:
    server = start()
    server.wait_log("Serving")
    zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null || true"
    # The inner shell exits at once; its three children become children of PID 1, and exit a moment later.
    server.execute("sh", "-c", "sh -c 'sleep 0.2 & sleep 0.2 & sleep 0.2 &' >/dev/null 2>&1")
    until(lambda: server.execute("sh", "-c", zombies).split(), "orphans have ended", seconds=5)
    until(lambda: not server.execute("sh", "-c", zombies).split(), "the orphans are reaped", seconds=10)
    assert server.logged("Worker ended; starting another") == []


def test_a_worker_that_dies_is_reaped_and_replaced_with_its_exit_status(start: StartContainer) -> None:
    """Reaping orphans must not reap the master's own children."""
    server = start()
    server.wait_log("Serving")
    workers = (
        "for pid in $(cat /proc/1/task/1/children); do grep -qa data_plane.worker /proc/$pid/cmdline && echo $pid; done"
    )
    worker = until(lambda: server.execute("sh", "-c", f"{workers}; true").split(), "workers")[0]
    server.execute("sh", "-c", f"kill -9 {worker}")
    assert server.wait_log("Worker ended; starting another")["how"] == "signal 9"


def test_secrets_are_files_and_appear_nowhere_else(start: StartContainer, mounted: Secrets) -> None:
    server = start()
    server.wait_log("Serving")
    password = (mounted.directory / "database-url").read_text().split(":")[2].split("@")[0]
    key = (mounted.directory / "api-key").read_text().strip()
    seen = repr(server.inspect()) + server.output() + server.execute("sh", "-c", "cat /proc/1/environ || true")
    assert password not in seen
    assert key not in seen
    mounted.write("api-key", "another-key")
    server.container.kill(signal.SIGHUP)
    until(lambda: _accepts(server, "another-key"), server.output)
    with Client(server.port(GRPC), key=key) as client:
        assert failure(client.get, "command1")[0] == "UNAUTHENTICATED"


def _accepts(server: Running, key: str) -> bool:
    with Client(server.port(GRPC), key=key) as client:
        try:
            return bool(client.get("command1").hash)
        except grpc.RpcError:
            return False


def test_a_wrong_password_is_logged_and_does_not_end_the_container(start: StartContainer, mounted: Secrets) -> None:
    right = (mounted.directory / "database-url").read_text().strip()
    wrong = right.replace(right.split(":")[2].split("@")[0], "not-the-password")
    mounted.write("database-url", wrong)
    server = start()
    line = server.wait_log("Sync failed")
    assert "password authentication failed" in line["error"]
    assert "not-the-password" not in server.output()
    assert http(server, "/readyz")[0] == 503
    assert "database_refused_login" in http(server, "/readyz")[1]
    with Client(server.port(GRPC), key=None) as client:
        assert client.health() == "NOT_SERVING"
    mounted.write("database-url", right)
    server.container.kill(signal.SIGHUP)
    server.wait_log("Serving")


def test_a_wrong_environment_is_logged_and_exits_with_78(start: StartContainer) -> None:
    server = start(PORT="many", SYNC_INTERVAL_SECONDS="-1")
    assert server.wait_exit() == 78
    assert "PORT" in server.output()
    assert "SYNC_INTERVAL_SECONDS" in server.output()
    assert "Traceback" not in server.output()
