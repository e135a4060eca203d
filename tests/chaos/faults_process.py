"""Faults of the server's processes: killed, stopped, out of memory, a bad build, rolled, restarted.

Calls in flight on a killed worker may fail if the client does not retry. If the whole server ends, calls that are made
before the next one listens may fail too: a single server cannot answer them. With the default retry no call may ever
fail.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import grpc
from tests.chaos.drills.model import Allowance, Fault, Loss
from tests.chaos.drills.stage import Stage
from tests.chaos.machine import Need, address_space, limited, memory_refused, needs_cgroup
from tests.chaos.promises import exit_code, must, must_be_replaced, must_publish, server_of
from tests.support.client import Client
from tests.support.polling import until
from tests.support.server import ServerProcess

KILLS = 3
ROLLS = 2
ROTATIONS = 3
ROOM_FOR_A_SNAPSHOT = 1 << 20
"""More than the snapshot of a drill's table; a thread's stack needs eight times as much."""
FIRST_DELAY_SECONDS = 0.1
"""The supervisor's delay before it starts a successor; it doubles with each end of the worker."""


def kill(pids: Iterable[int]) -> None:
    """Send SIGKILL to the processes that still run, and wait until they have ended and their connections are closed. On
    a busy machine, a process ends only when it gets a core.
    """
    killed = list(pids)
    for pid in killed:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    until(lambda: not any(map(_lives, killed)), "killed processes are gone", seconds=20)


def _lives(pid: int) -> bool:
    """Whether the process runs, or one of its threads has not released its files yet."""
    try:
        states = [path.read_text().rpartition(")")[2].split()[0] for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (FileNotFoundError, ProcessLookupError):
        return _lives(pid)  # one of its threads has just ended
    return any(state != "Z" for state in states)


@contextmanager
def away(stage: Stage) -> Iterator[None]:
    """No process listens during the block. Afterwards every client reconnects and sees the version that was written
    during it.

    A gRPC client whose connection is refused tries again after 1 s and multiplies the pause by 1.6 each time (± 20 %);
    until then, calls that do not wait fail at once. After an outage of ``t`` the next attempt comes within 0.9 t +
    1.5 s.
    """
    assert stage.load is not None
    assert stage.table is not None
    load, began = stage.load, time.monotonic()
    try:
        yield
    finally:
        now = time.monotonic()
        late = 0.9 * (now - began) + 1.5
        stage.wounds.append((began, now + late))
    version = stage.table.advance()
    told = "every client is back"
    must(stage, lambda: load.everywhere(version), told, late + stage.cycle_seconds)


# -- workers -----------------------------------------------------------------------------------------------------------


@contextmanager
def worker_killed(stage: Stage) -> Iterator[None]:
    """Kill one worker after the other."""
    assert stage.load is not None
    for number in range(KILLS):
        pids = server_of(stage).worker_pids()
        victim = pids[number % len(pids)]
        with stage.wound():
            kill([victim])
        must_be_replaced(stage, [victim])
        stage.load.keep(0.3)
    yield


@contextmanager
def workers_all_killed(stage: Stage) -> Iterator[None]:
    """Kill all workers at once. On the native transport the port stays open, and connections wait for the new
    workers."""
    pids = server_of(stage).worker_pids()
    if stage.transport == "native":
        with stage.wound():
            kill(pids)
        must_be_replaced(stage, pids)
    else:  # the workers hold the port, not the master, so connections are refused until new workers hold it
        with away(stage):
            kill(pids)
            must_be_replaced(stage, pids)
    yield


@contextmanager
def worker_stopped(stage: Stage) -> Iterator[None]:
    """Stop one worker (SIGSTOP). Its calls wait until the master kills it."""
    server = server_of(stage)
    victim = server.worker_pids()[0]
    try:
        with stage.wound():
            os.kill(victim, signal.SIGSTOP)
            must(stage, lambda: victim not in server.worker_pids(), "a worker that stands still is killed")
        must_be_replaced(stage, [victim])
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(victim, signal.SIGCONT)


@contextmanager
def worker_killed_for_memory(stage: Stage) -> Iterator[None]:
    """The kernel's out-of-memory killer takes one worker."""
    assert stage.table is not None
    server = server_of(stage)
    victim = server.worker_pids()[0]
    with stage.wound(), memory_refused(victim) as group:
        stage.table.advance()  # even if calls need no new page, mapping this snapshot needs one
        until(lambda: victim not in server.worker_pids(), "the kernel kills the worker", seconds=20)
        assert group.counter("memory.oom_control", "oom_kill"), "the worker died of something else"
    must_be_replaced(stage, [victim])
    yield


@contextmanager
def worker_without_memory(stage: Stage) -> Iterator[None]:
    """One worker gets no more address space, so it cannot map the next version. Then it gets enough for the mapping,
    but not for another thread.
    """
    assert stage.table is not None
    victim = server_of(stage).worker_pids()[0]
    with stage.wound():
        with limited([victim], resource.RLIMIT_AS, address_space(victim)):
            stage.table.advance()
            must(stage, lambda: stage.logged("Snapshot refused"), "a worker that cannot map a snapshot logs that")
        with limited([victim], resource.RLIMIT_AS, address_space(victim) + ROOM_FOR_A_SNAPSHOT):
            must_publish(stage, "with little memory left")
            yield


# -- a bad build -------------------------------------------------------------------------------------------------------


def build_of(server: ServerProcess) -> Path:
    """The copy of the package from which the server runs: a directory of its ``PYTHONPATH`` that contains one."""
    for entry in server.environment.get("PYTHONPATH", "").split(os.pathsep):
        if entry and (Path(entry) / "definition_server").is_dir():
            return Path(entry) / "definition_server"
    raise AssertionError("this drill spoils the server's code: run the server from a copy (PYTHONPATH)")


@contextmanager
def bad_build(stage: Stage) -> Iterator[None]:
    """A build whose workers die at once replaces the running one; then a roll is started, and then a worker is
    killed.
    """
    server = server_of(stage)
    code = build_of(server) / "data_plane" / "worker.py"
    sound = code.read_bytes()
    old = server.worker_pids()
    code.write_text('raise ImportError("a bad build")\n')
    try:
        server.signal(signal.SIGUSR2)
        must(stage, lambda: stage.logged("Roll stopped"), "a roll stops at a successor that dies")
        must(stage, lambda: server.worker_pids() == old, "if a successor dies, its predecessor stays")
        with stage.wound():
            kill(old[:1])
        must(stage, lambda: stage.logged("Worker crash loop"), "a crash loop is logged")
        must(stage, lambda: backs_off(server), "each start waits twice as long as the one before", 0)
        yield
    finally:
        code.write_bytes(sound)
    must_be_replaced(stage, old[:1])


def backs_off(server: ServerProcess) -> bool:
    """Whether the intervals between the ends of each worker number grow, as the supervisor's delay does."""
    deaths: dict[int, list[datetime]] = {}
    for line in server.logged("Worker ended; starting another"):
        deaths.setdefault(line["worker"], []).append(datetime.fromisoformat(line["ts"]))
    return all(
        (after - before).total_seconds() >= FIRST_DELAY_SECONDS * 2**number
        for times in deaths.values()
        for number, (before, after) in enumerate(pairwise(times))
    )


# -- by operators ------------------------------------------------------------------------------------------------------


@contextmanager
def workers_rolled(stage: Stage) -> Iterator[None]:
    """SIGUSR2: every worker is replaced by a new one, twice."""
    server = server_of(stage)
    with stage.wound():
        for _ in range(ROLLS):
            old, after = server.worker_pids(), len(server.lines)
            server.signal(signal.SIGUSR2)
            must(
                stage,
                lambda old=old, after=after: len(server.logged("Worker rolled", after=after)) == len(old),
                "every worker is rolled",
            )
            must_be_replaced(stage, old)
    yield


@contextmanager
def keys_rotated(stage: Stage) -> Iterator[None]:
    """SIGHUP: a second API key is accepted in addition to that of the load, and removed again; three times."""
    server, path = server_of(stage), Path(stage.settings["API_KEYS_FILE"])
    before = path.read_text()

    def accepted() -> bool:
        with Client(server.port, key="another-key") as client:
            try:
                client.get("no such command")
            except grpc.RpcError as error:
                return bool(error.code() != grpc.StatusCode.UNAUTHENTICATED)
        return True

    for number in range(ROTATIONS):
        path.write_text(f"another-{number}:another-key\n{before}")
        server.signal(signal.SIGHUP)
        must(stage, accepted, "a key that was added is accepted")
        path.write_text(before)
        server.signal(signal.SIGHUP)
        must(stage, lambda: not accepted(), "a key that was removed is refused")
    yield


@contextmanager
def server_restarted(stage: Stage) -> Iterator[None]:
    """SIGTERM, and a new server on the same port."""
    with away(stage):
        stop(stage)
        start_again(stage)
    yield


@contextmanager
def master_killed(stage: Stage) -> Iterator[None]:
    """Kill the master only; its workers exit by themselves, and a new server starts at once."""
    server = server_of(stage)
    with away(stage):
        server.signal(signal.SIGKILL)
        server.wait_exit()
        start_again(stage)
    yield


@contextmanager
def server_killed(stage: Stage) -> Iterator[None]:
    """Kill master and workers at once, as when a container's first process dies."""
    server = server_of(stage)
    with away(stage):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait_exit()
        start_again(stage)
    yield


def stop(stage: Stage) -> None:
    """Send SIGTERM and check the effect; a server that does not exit is killed."""
    server = server_of(stage)
    server.signal(signal.SIGTERM)
    code = exit_code(server)
    must(stage, lambda: code == 0, f"SIGTERM drains and exits 0 (exit code: {code})", 0)


def start_again(stage: Stage, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Start the stage's server on its old port and wait until it serves, as a process supervisor would.

    If the port is taken, the start fails and is repeated: workers of a killed master may still hold it. The new server
    replaces the old one on the stage.

    Args: stage: its server has ended. meanwhile: called once the new process runs.
    """
    former = server_of(stage)
    environment = former.environment | {"PORT": stage.target.rpartition(":")[2]}
    stage.first_line = 0
    stage.server = ServerProcess("", **environment).start()

    def serves() -> bool:
        if server_of(stage).logged("Cannot start"):
            server_of(stage).end()
            stage.server = ServerProcess("", **environment).start()
        return bool(server_of(stage).logged("Serving"))

    try:
        meanwhile()
        must(stage, serves, "a server that is started again serves on its old port")
    finally:
        former.end()


# -- the faults --------------------------------------------------------------------------------------------------------

IN_FLIGHT = Allowance(plain=Loss.IN_FLIGHT)

FAULTS = (
    Fault("worker-killed", "workers killed, one by one", "process", worker_killed, IN_FLIGHT),
    Fault("workers-all-killed", "all workers killed at once", "process", workers_all_killed, IN_FLIGHT),
    Fault("worker-stopped", "worker stands still", "process", worker_stopped, IN_FLIGHT),
    Fault("worker-oom-killed", "worker killed for memory", "process", worker_killed_for_memory, IN_FLIGHT),
    Fault("worker-no-memory", "worker refused memory", "process", worker_without_memory),
    Fault("bad-build", "crash loop of a bad build", "process", bad_build, IN_FLIGHT),
    Fault("workers-rolled", "rolling restart (SIGUSR2)", "process", workers_rolled),
    Fault(
        "keys-rotated", "API keys added and removed (SIGHUP)", "process", keys_rotated,
        felt=lambda stage: stage.logged("Settings read again"),
    ),
    Fault("server-restarted", "full restart (SIGTERM)", "process", server_restarted, IN_FLIGHT),
    Fault("master-killed", "master killed", "process", master_killed, IN_FLIGHT),
    Fault("server-killed", "master and workers killed", "process", server_killed, IN_FLIGHT),
)  # fmt: skip


NEEDS: dict[str, Need] = {"worker-oom-killed": needs_cgroup("memory")}
"""Requirements of a fault on the machine, by its id."""


def on_transport(fault: Fault, transport: str) -> Fault:
    """``fault`` with the allowance of ``transport``.

    grpcio: a worker that exits closes its own listener, and connections in its accept queue are reset; so a roll may
    cost calls of clients that do not retry. C-core also ends the process if it gets no memory.
    """
    if transport != "grpcio":
        return fault
    if fault.id in ("workers-rolled", "worker-no-memory"):
        return replace(fault, allows=IN_FLIGHT)
    return with_burst(fault) if fault.id in ("server-restarted", "master-killed", "server-killed") else fault


def with_burst(fault: Fault) -> Fault:
    """``fault`` on a transport that keeps the memory of its highest load.

    After an outage all waiting calls arrive at once, and grpcio's C-core keeps their memory: measured, 86 MiB before an
    outage of ten seconds under 300 calls a second, 113 MiB after it.
    """
    return replace(fault, allows=replace(fault.allows, memory=False))
