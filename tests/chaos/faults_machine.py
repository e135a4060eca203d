"""Faults of the server's machine: descriptors, disk, clock, CPU, port. No call may fail during any of them."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.drills.model import Fault, Loss
from tests.chaos.drills.rows import VersionedTable
from tests.chaos.drills.stage import Stage
from tests.chaos.faults_process import IN_FLIGHT, away, start_again, stop, with_burst
from tests.chaos.machine import (
    Need,
    cpu_limited,
    cpu_seconds,
    faketime,
    fill,
    limited,
    mounted_over,
    needs_cgroup,
    needs_mount,
    no_further_threads,
    set_clock,
)
from tests.chaos.promises import exit_code, must, must_publish, server_of
from tests.support.providers import create_database, drop_database
from tests.support.server import ServerProcess

from definition_server.control_plane.store import FILE_NAME

HOUR = 3600
NO_DESCRIPTOR = 3
"""A limit of open files below the number that a process has open, so that it gets no more."""
EX_UNAVAILABLE = 69
OBSERVED_SECONDS = 2.0
NOTICED_SECONDS = 2.5
"""After so many seconds libfaketime has noticed a new offset: it reads the offset again when more than a second has
passed, counted in whole seconds, which may take two seconds.
"""
_SMALL_DISK = "size=64k,mode=0755"
"""Less than the size of the snapshot of a drill's table, so that it cannot be stored."""


def pids_of(stage: Stage) -> list[int]:
    """Master and workers."""
    server = server_of(stage)
    return [server.pid, *server.worker_pids()]


def none_may_die(stage: Stage, pids: list[int]) -> None:
    """Check that ``pids`` are still the server's processes."""
    must(stage, lambda: pids_of(stage) == pids, "no process dies because of the missing resource", 0)


# -- descriptors -------------------------------------------------------------------------------------------------------


@contextmanager
def no_descriptors(stage: Stage) -> Iterator[None]:
    """Master and workers get no more descriptors while a new version is written and clients connect."""
    assert stage.table is not None
    host, _, port = stage.target.rpartition(":")
    pids = pids_of(stage)
    with limited(pids, resource.RLIMIT_NOFILE, NO_DESCRIPTOR):
        stage.table.advance()
        with socket.create_connection((host, int(port)), timeout=5):  # no worker can accept this connection
            yield
    none_may_die(stage, pids)


@contextmanager
def workers_without_descriptors(stage: Stage) -> Iterator[None]:
    """Only the workers have no descriptors, so the master cannot send them a snapshot."""
    assert stage.table is not None
    pids = pids_of(stage)
    with limited(pids[1:], resource.RLIMIT_NOFILE, NO_DESCRIPTOR):
        stage.table.advance()
        yield
    none_may_die(stage, pids)


@contextmanager
def no_threads(stage: Stage) -> Iterator[None]:
    """The limit of processes is reached; a new version is served nevertheless, and the admin port answers."""
    with no_further_threads(pids_of(stage)) as group:
        must_publish(stage, "while no thread can be started")
        yield
        assert group.counter("pids.events", "max"), "the server needed no thread"


# -- disk --------------------------------------------------------------------------------------------------------------


def snapshot_directory(stage: Stage) -> Path:
    """``SNAPSHOT_DIR`` of the server, which must be set."""
    assert stage.settings.get("SNAPSHOT_DIR"), "disk faults are for a server that has a SNAPSHOT_DIR"
    return Path(stage.settings["SNAPSHOT_DIR"])


def on_a_bad_disk(options: str) -> Callable[[Stage], AbstractContextManager[object]]:
    """``SNAPSHOT_DIR`` is on a small file system that is full or read-only; a new version is served nevertheless."""

    @contextmanager
    def inject(stage: Stage) -> Iterator[None]:
        directory = snapshot_directory(stage)
        with mounted_over(directory, options):
            if "ro" not in options.split(","):
                fill(directory / "ballast")
            must_publish(stage, "while the disk fails")
            yield
        must(stage, lambda: stage.logged("Last-known-good snapshot stored again"), "the disk is used again", 30)

    return inject


@contextmanager
def damaged_snapshot(stage: Stage) -> Iterator[None]:
    """The last-known-good file is damaged, and the server is restarted while the database does not answer."""
    assert stage.proxy is not None
    proxy = stage.proxy

    def answer_once_refused() -> None:
        must(stage, lambda: stage.logged("Last-known-good snapshot not usable"), "a damaged file is refused", 20)
        proxy.cut()
        proxy.resume()

    with away(stage):
        stop(stage)
        damage(snapshot_directory(stage) / FILE_NAME)
        proxy.hold()
        try:
            start_again(stage, answer_once_refused)
        finally:
            proxy.resume()
    yield


def damage(file: Path) -> None:
    """Change code within the file, as a faulty disk might. Lengths and structure remain valid."""
    whole = file.read_bytes()
    assert b"xxxx" in whole, f"{file} holds no row of a drill's table"
    file.write_bytes(whole.replace(b"xxxx", b"xxyx"))


# -- clock -------------------------------------------------------------------------------------------------------------


def clock_jumps(seconds: int) -> Callable[[Stage], AbstractContextManager[object]]:
    """The wall clock jumps, and jumps back at the end."""

    @contextmanager
    def inject(stage: Stage) -> Iterator[None]:
        file = Path(stage.settings["PYTHON_DRILL_CLOCK"])
        assert stage.load is not None
        set_clock(file, seconds)
        try:
            stage.load.keep(NOTICED_SECONDS)
            must_publish(stage, "after the clock jumped")
            yield
        finally:
            set_clock(file, 0)
        stage.load.keep(NOTICED_SECONDS)

    return inject


def clock_is_off(seconds: int) -> Callable[[Stage], bool]:
    """Whether the fault had an effect: the times in the server's log have this offset."""

    def felt(stage: Stage) -> bool:
        told = datetime.fromisoformat(server_of(stage).lines[-1]["ts"])
        return abs((told - datetime.now(UTC)).total_seconds() - seconds) < HOUR / 2

    return felt


# -- CPU ---------------------------------------------------------------------------------------------------------------


@contextmanager
def cpu_halved(stage: Stage) -> Iterator[None]:
    """The server gets half of the CPU time that it uses under this load."""
    assert stage.load is not None
    pids = pids_of(stage)
    before, began = cpu_seconds(pids), time.monotonic()
    stage.load.keep(OBSERVED_SECONDS)
    used = (cpu_seconds(pids) - before) / (time.monotonic() - began)
    with cpu_limited(pids, used / 2) as group:
        yield
        assert group.counter("cpu.stat", "nr_throttled"), "the server had to wait for its CPU time"
    none_may_die(stage, pids)


# -- port --------------------------------------------------------------------------------------------------------------


@contextmanager
def second_server(stage: Stage) -> Iterator[None]:
    """A second server, with other rows, is started on the same port."""
    assert stage.database is not None
    assert stage.table is not None
    name = f"{stage.table.database}_other"
    url = create_database(stage.database.url, name)
    try:
        other = VersionedTable(url)
        other.version = 1_000_000
        other.advance()
        settings = {"DATABASE_URL": url, "DATABASE_URL_FILE": "", "PORT": stage.target.rpartition(":")[2]}
        with ServerProcess(url, **server_of(stage).environment | settings) as second:
            must_be_refused(stage, second)
            yield
    finally:
        drop_database(stage.database.url, name)


def must_be_refused(stage: Stage, server: ServerProcess) -> None:
    """Check that a second server on the stage's port logs that the port is in use, and exits with 69."""
    must(stage, lambda: server.logged("Cannot start", level="FATAL"), "a server whose port is taken cannot start")
    line = server.logged("Cannot start")[0]
    reason = f"{stage.target} is in use"
    must(stage, lambda: reason in line["error"], f"its error is {reason!r}", 0)
    code = exit_code(server)
    must(stage, lambda: code == EX_UNAVAILABLE, f"it exits {EX_UNAVAILABLE} (exit code: {code})", 0)


@contextmanager
def port_taken(stage: Stage) -> Iterator[None]:
    """While the server is restarted, another process holds its port, and then releases it."""
    host, _, port = stage.target.rpartition(":")
    with away(stage):
        stop(stage)
        environment = server_of(stage).environment | {"PORT": port}
        with socket.create_server((host, int(port))), ServerProcess("", **environment) as refused:
            must_be_refused(stage, refused)
        start_again(stage)
    yield


# -- the faults --------------------------------------------------------------------------------------------------------


def tells(message: str, *needles: str) -> Callable[[Stage], object]:
    """Whether the fault had an effect: the server has logged this message, with one of ``needles`` in the error."""
    return lambda stage: stage.logged(message, *needles)


_EMFILE = "Too many open files"

FAULTS = (
    Fault("no-descriptors", "no descriptors left", "machine", no_descriptors, felt=tells("Sync failed", _EMFILE)),
    Fault(
        "workers-no-descriptors", "no descriptors left in workers", "machine", workers_without_descriptors,
        felt=tells("Control message ignored"),
    ),
    Fault("no-threads", "limit of processes reached", "machine", no_threads),
    Fault(
        "disk-full", "SNAPSHOT_DIR full", "machine", on_a_bad_disk(_SMALL_DISK),
        felt=tells("Last-known-good snapshot not stored", "No space left on device"),
    ),
    Fault(
        "disk-read-only", "SNAPSHOT_DIR read-only", "machine", on_a_bad_disk(f"{_SMALL_DISK},ro"),
        felt=tells("Last-known-good snapshot not stored", "Read-only file system"),
    ),
    Fault(
        "snapshot-damaged", "last-known-good file damaged, restart", "machine", damaged_snapshot,
        # After the workers answer and before the database answers, "The catalogue is not loaded yet" is the right
        # answer, and five attempts end within a second.
        replace(IN_FLIGHT, retried=Loss.IN_FLIGHT),
    ),
    Fault(
        "clock-forward", "clock jumps an hour forward", "machine", clock_jumps(HOUR), felt=clock_is_off(HOUR),
    ),
    Fault("clock-back", "clock jumps an hour back", "machine", clock_jumps(-HOUR), felt=clock_is_off(-HOUR)),
    Fault("cpu-halved", "CPU quota: half of what is used", "machine", cpu_halved),
    Fault("second-server", "second server on the port", "machine", second_server),
    Fault("port-taken", "port taken at a restart", "machine", port_taken, IN_FLIGHT),
)  # fmt: skip

NEEDS: dict[str, Need] = {
    "no-threads": needs_cgroup("pids"),
    "disk-full": needs_mount,
    "disk-read-only": needs_mount,
    "clock-forward": faketime,
    "clock-back": faketime,
    "cpu-halved": needs_cgroup("cpu"),
}
"""Requirements of a fault on the machine, by its id."""


def on_transport(fault: Fault, transport: str) -> Fault:
    """``fault`` with the allowance of ``transport``: see `faults_process.on_transport`."""
    return with_burst(fault) if transport == "grpcio" and fault.id in ("snapshot-damaged", "port-taken") else fault
