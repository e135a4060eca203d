"""What befalls the server's processes: killed, stopped, out of memory, a bad build, rolled, restarted.

Calls in flight on a killed worker may fail where the client does not retry. Where the whole server goes away, so may
calls that come while nobody listens: one server alone cannot answer them. With the default retry none may fail, ever.
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

from tests.chaos.drills.model import Allowance, Fault, Loss
from tests.chaos.drills.stage import Stage
from tests.chaos.machine import Need, address_space, limited, memory_refused, needs_cgroup
from tests.chaos.promises import exit_code, must, must_be_replaced, must_publish, server_of
from tests.support.polling import until
from tests.support.server import ServerProcess

KILLS = 3
ROLLS = 2
ROOM_FOR_A_SNAPSHOT = 1 << 20
"""Of a drill's table; a thread's stack wants eight times as much."""
FIRST_DELAY_SECONDS = 0.1
"""The supervisor's, before it fills a post again; it doubles from one death to the next."""


def kill(pids: Iterable[int]) -> None:
    """SIGKILL to those that still live."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def away(stage: Stage) -> Iterator[None]:
    """Nobody listens while the block lasts. Afterwards every client comes back, and sees what was written meanwhile.

    A gRPC client whose connection is refused tries again after 1 s, then 1.6 times as late each time, give or take a
    fifth; until then, calls that do not wait fail at once. After an outage of ``t`` that is 0.9 t + 1.5 s at the most.
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
    """One worker after the other."""
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
    """All at once. The port stays open (native): connections wait for the workers that follow."""
    pids = server_of(stage).worker_pids()
    if stage.transport == "native":
        with stage.wound():
            kill(pids)
        must_be_replaced(stage, pids)
    else:  # the workers have the port open, not the master: until the next ones do, connections are refused
        with away(stage):
            kill(pids)
            must_be_replaced(stage, pids)
    yield


@contextmanager
def worker_stopped(stage: Stage) -> Iterator[None]:
    """One worker stands still. Whoever called it waits until the master kills it."""
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
        stage.table.advance()  # if it needs no page for the calls, it needs one to map this
        until(lambda: victim not in server.worker_pids(), "the kernel kills the worker", seconds=20)
        assert group.counter("memory.oom_control", "oom_kill"), "the worker died of something else"
    must_be_replaced(stage, [victim])
    yield


@contextmanager
def worker_without_memory(stage: Stage) -> Iterator[None]:
    """The kernel grants one worker no further address space: the next version cannot be mapped. Then it grants enough
    for that, but not for another thread."""
    assert stage.table is not None
    victim = server_of(stage).worker_pids()[0]
    with stage.wound():
        with limited([victim], resource.RLIMIT_AS, address_space(victim)):
            stage.table.advance()
            must(stage, lambda: stage.logged("Snapshot refused"), "a worker that cannot map a snapshot says so")
        with limited([victim], resource.RLIMIT_AS, address_space(victim) + ROOM_FOR_A_SNAPSHOT):
            must_publish(stage, "with little memory left")
            yield


# -- a bad build -------------------------------------------------------------------------------------------------------


def build_of(server: ServerProcess) -> Path:
    """The copy of the package that the server runs from: a directory of its ``PYTHONPATH`` that holds one."""
    for entry in server.environment.get("PYTHONPATH", "").split(os.pathsep):
        if entry and (Path(entry) / "definition_server").is_dir():
            return Path(entry) / "definition_server"
    raise AssertionError("this drill spoils the server's code: run the server from a copy (PYTHONPATH)")


@contextmanager
def bad_build(stage: Stage) -> Iterator[None]:
    """A build whose workers die at once is laid over the one that runs; then a roll, and then a worker dies."""
    server = server_of(stage)
    code = build_of(server) / "data_plane" / "worker.py"
    sound = code.read_bytes()
    old = server.worker_pids()
    code.write_text('raise ImportError("a bad build")\n')
    try:
        server.signal(signal.SIGUSR2)
        must(stage, lambda: stage.logged("Roll stopped"), "a roll stops at a successor that dies")
        must(stage, lambda: server.worker_pids() == old, "where a successor dies, its predecessor stays")
        with stage.wound():
            kill(old[:1])
        must(stage, lambda: stage.logged("Worker crash loop"), "a crash loop is told")
        must(stage, lambda: backs_off(server), "each start waits twice as long as the one before", 0)
        yield
    finally:
        code.write_bytes(sound)
    must_be_replaced(stage, old[:1])


def backs_off(server: ServerProcess) -> bool:
    """Whether the deaths of each worker number lie ever further apart, as the supervisor's delay does."""
    deaths: dict[int, list[datetime]] = {}
    for line in server.logged("Worker ended; starting another"):
        deaths.setdefault(line["worker"], []).append(datetime.fromisoformat(line["ts"]))
    return all(
        (after - before).total_seconds() >= FIRST_DELAY_SECONDS * 2**number
        for times in deaths.values()
        for number, (before, after) in enumerate(pairwise(times))
    )


# -- on purpose --------------------------------------------------------------------------------------------------------


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
                lambda old=old, after=after: len(server.logged("Worker rolled", after=after)) == len(old),  # type: ignore[misc]
                "every worker is rolled",
            )
            must_be_replaced(stage, old)
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
    """The master alone; its workers leave by themselves, and a new server starts at once."""
    server = server_of(stage)
    with away(stage):
        server.signal(signal.SIGKILL)
        server.wait_exit()
        start_again(stage)
    yield


@contextmanager
def server_killed(stage: Stage) -> Iterator[None]:
    """Master and workers at once, as where a container's first process dies."""
    server = server_of(stage)
    with away(stage):
        os.killpg(server.pid, signal.SIGKILL)
        server.wait_exit()
        start_again(stage)
    yield


def stop(stage: Stage) -> None:
    """SIGTERM, and what must come of it; a server that does not obey is killed."""
    server = server_of(stage)
    server.signal(signal.SIGTERM)
    code = exit_code(server)
    must(stage, lambda: code == 0, f"SIGTERM drains and exits 0 (exit code: {code})", 0)


def start_again(stage: Stage, meanwhile: Callable[[], object] = lambda: None) -> None:
    """Start the stage's server on its old port and wait until it serves, as whatever supervises it would.

    A start that finds the port taken ends by itself and is repeated: workers of a killed master may still hold it. The
    new server takes the old one's place on the stage.

    Args:
        stage: its server has ended.
        meanwhile: called once the new one's process runs.
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
    Fault("server-restarted", "full restart (SIGTERM)", "process", server_restarted, IN_FLIGHT),
    Fault("master-killed", "master killed", "process", master_killed, IN_FLIGHT),
    Fault("server-killed", "master and workers killed", "process", server_killed, IN_FLIGHT),
)


NEEDS: dict[str, Need] = {"worker-oom-killed": needs_cgroup("memory")}
"""What a fault needs of the machine, by its id."""


def on_transport(fault: Fault, transport: str) -> Fault:
    """``fault`` with what ``transport`` is allowed.

    grpcio: a worker that leaves closes a port of its own, and connections that wait in its queue are reset; so a roll
    may cost calls of clients that do not retry. And C-core ends the process where it gets no memory.
    """
    if transport != "grpcio":
        return fault
    if fault.id in ("workers-rolled", "worker-no-memory"):
        return replace(fault, allows=IN_FLIGHT)
    return with_burst(fault) if fault.id in ("server-restarted", "master-killed", "server-killed") else fault


def with_burst(fault: Fault) -> Fault:
    """``fault`` on a transport that keeps the memory of its busiest moment.

    After an outage all calls that wait come at once, and grpcio's C-core keeps what they took: measured, 86 MiB before
    an outage of ten seconds under 300 calls a second, 113 MiB after it.
    """
    return replace(fault, allows=replace(fault.allows, memory=False))
