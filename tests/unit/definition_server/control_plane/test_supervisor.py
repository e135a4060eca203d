"""Two real worker processes under a supervisor, which replaces them when they end or hang, rolls them and drains them.

Failures that an integration test cannot produce are in `test_supervision`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from tests.support.client import Client
from tests.support.leftovers import child_processes, nothing_left, open_descriptors
from tests.support.logs import LogLines, logged
from tests.support.loop import end, eventually, promptly
from tests.support.snapshots import published

from definition_server.control_plane import supervisor as supervisor_module
from definition_server.control_plane.listener import reserve_port
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.supervisor import Supervisor
from definition_server.control_plane.worker_process import WorkerProcess
from definition_server.ipc.messages import Configure, Keys

pytestmark = pytest.mark.slow

WORKERS = 2
HEARTBEAT_TIMEOUT = 1.5
LONG = 120.0
"""More seconds than any test waits."""


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left(c_core=True):
        yield


@pytest.fixture
def port() -> Iterator[int]:
    with reserve_port("127.0.0.1", 0) as holder:
        yield int(holder.getsockname()[1])


class Supervised:
    """A supervisor and its tick."""

    def __init__(
        self,
        publisher: Publisher,
        port: int,
        *,
        workers: int = WORKERS,
        drain_timeout: float = LONG,
        heartbeat_timeout: float = HEARTBEAT_TIMEOUT,
    ) -> None:
        config = Configure("127.0.0.1", port, "grpcio", False, 0.0, 2, "production", "ERROR", drain_timeout)
        keys = Keys((sha256(b"key").hexdigest(),))
        self.supervisor = Supervisor(
            config, publisher, keys, workers=workers, heartbeat_timeout=heartbeat_timeout, start_timeout=LONG
        )
        self._tick = asyncio.create_task(self.supervisor.watch())
        self.drained = False

    @property
    def workers(self) -> list[WorkerProcess]:
        return [slot.worker for slot in self.supervisor.slots if slot.worker is not None]

    @property
    def pids(self) -> set[int]:
        return {worker.pid for worker in self.workers}

    def served(self) -> int:
        """Requests answered with 200 by any worker, including those that have ended."""
        return self.supervisor.stats.requests().requests["200"]

    async def all_serve(self, generation: int = 1) -> None:
        await eventually(
            lambda: [worker.generation for worker in self.workers] == [generation] * WORKERS,
            f"all workers serve generation {generation}",
        )

    async def drain(self, wait: float = 0.0, timeout: float = LONG) -> None:
        self.drained = True
        await self.supervisor.drain(wait=wait, timeout=timeout)

    async def end(self) -> None:
        if not self.drained:
            await promptly(self.drain(timeout=5))
        await end(self._tick)


@pytest.fixture
async def supervised(publisher: Publisher, port: int) -> AsyncIterator[Supervised]:
    """Two workers that serve generation 1, the command ``if``."""
    publisher.publish(published("if"))
    supervised = Supervised(publisher, port)
    supervised.supervisor.start()
    await supervised.all_serve()
    yield supervised
    await supervised.end()


async def get(port: int, name: str, times: int = 1) -> None:
    """Make a call without retries. Every call must succeed."""

    def call() -> None:
        with Client(port, "key") as client:
            for _ in range(times):
                assert client.get(name).name == name

    await asyncio.to_thread(call)


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


# -- serving ---------------------------------------------------------------------------------------------------------


async def test_serving_counts_workers_with_a_catalogue(publisher: Publisher, port: int) -> None:
    supervised = Supervised(publisher, port)
    supervisor = supervised.supervisor
    supervisor.start()
    await eventually(lambda: len(supervised.workers) == WORKERS, "all started")
    await eventually(lambda: all(worker.ready.is_set() for worker in supervised.workers), "all READY")
    assert supervisor.serving == 0
    publisher.publish(published("if"))
    await eventually(lambda: supervisor.serving == WORKERS, "all serve")
    await supervised.drain(timeout=5)
    assert supervisor.serving == 0
    await supervised.end()


async def test_a_publication_reaches_every_worker(supervised: Supervised, publisher: Publisher) -> None:
    publisher.publish(published("if", "else", generation=2))
    await supervised.all_serve(2)
    readings = [worker.stats.read() for worker in supervised.workers]
    assert [(reading.generation, reading.entries) for reading in readings] == [(2, 2)] * WORKERS
    assert {reading.version_hash for reading in readings} == {publisher.current.snapshot.version_hash}


@pytest.mark.thorough  # takes seconds
async def test_the_last_of_many_publications_at_once_is_served(supervised: Supervised, publisher: Publisher) -> None:
    for generation in range(2, 502):
        publisher.publish(published("if", generation=generation))
    await supervised.all_serve(501)


async def test_a_worker_does_not_inherit_the_masters_environment(
    publisher: Publisher, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("DATABASE_URL", "API_KEY", "AVAP_INTERNAL_KEY", "API_KEY_FILE", "ANYTHING"):
        monkeypatch.setenv(name, "a secret")
    supervised = Supervised(publisher, port)
    supervised.supervisor.start()
    await eventually(lambda: supervised.workers and supervised.workers[0].ready.is_set(), "READY")
    environment = environment_of(supervised.workers[0].pid)
    assert b"PATH=" in environment
    assert b"a secret" not in environment
    await supervised.end()


async def test_a_worker_inherits_only_its_own_descriptors(supervised: Supervised) -> None:
    for worker in supervised.workers:
        memory = [target for target in open_descriptors(worker.pid).values() if target.startswith("/memfd:")]
        stats = [target for target in memory if "definition-server-stats" in target]
        assert len(stats) == 1, "its own page's mapping"
        assert len(memory) - len(stats) == 1, "that of the snapshot's mapping"


# -- dying and hanging -----------------------------------------------------------------------------------------------


async def test_a_killed_worker_is_replaced_and_its_counters_stay(
    supervised: Supervised, port: int, logs: LogLines
) -> None:
    await get(port, "if", times=20)
    assert supervised.served() == 20
    before = supervised.pids
    for victim in before:
        os.kill(victim, signal.SIGKILL)
    await eventually(lambda: len(supervised.pids - before) == WORKERS, "other processes")
    await supervised.all_serve()
    assert supervised.served() == 20
    await get(port, "if")
    assert supervised.served() == 21
    assert [slot.restarts for slot in supervised.supervisor.slots] == [1, 1]
    assert len(logged(logs, "Worker ended; starting another", log_level="error", how="signal 9")) == WORKERS


@pytest.mark.thorough  # takes seconds
async def test_descriptors_do_not_grow_with_the_number_of_ended_workers(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    for slot in supervised.supervisor.slots:
        monkeypatch.setattr(slot.backoff, "_most", 0.1)
    before = sorted(open_descriptors().values())
    for _ in range(3):
        (victim, *_) = supervised.pids
        os.kill(victim, signal.SIGKILL)
        await eventually(lambda: victim not in supervised.pids, "the victim reaped")  # noqa: B023 - awaited here
        await supervised.all_serve()
    assert len(open_descriptors()) == len(before)


async def test_a_hung_worker_is_killed_and_replaced(supervised: Supervised, logs: LogLines) -> None:
    victim, other = supervised.pids
    os.kill(victim, signal.SIGSTOP)
    await eventually(lambda: victim not in supervised.pids, "the hung worker has ended")
    await supervised.all_serve()
    assert other in supervised.pids
    (line,) = logged(logs, "Worker hangs; killed", log_level="error")
    assert (line["worker_pid"], line["silent_seconds"]) == (victim, HEARTBEAT_TIMEOUT)


async def test_a_worker_that_pauses_for_less_than_the_timeout_is_left_alone(
    publisher: Publisher, port: int, logs: LogLines
) -> None:
    supervised = Supervised(publisher, port, workers=1, heartbeat_timeout=60.0)
    supervised.supervisor.start()
    await eventually(lambda: supervised.workers and supervised.workers[0].ready.is_set(), "READY")
    (worker,) = supervised.workers
    os.kill(worker.pid, signal.SIGSTOP)
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() - begun > 1.0, "a pause, in which the supervisor judges several times")
    stopped = worker.stats.read().heartbeat_ns
    os.kill(worker.pid, signal.SIGCONT)
    await eventually(lambda: worker.stats.read().heartbeat_ns > stopped, "another beat")
    assert supervised.workers == [worker]
    assert not logs
    await supervised.end()


# -- rolling ---------------------------------------------------------------------------------------------------------


async def test_a_roll_replaces_every_worker_and_never_reduces_the_number_that_serve(
    supervised: Supervised, port: int, logs: LogLines
) -> None:
    before = supervised.pids
    seen: set[int] = set()
    rolling = asyncio.create_task(supervised.supervisor.roll())
    while not rolling.done():
        seen.add(supervised.supervisor.serving)
        await asyncio.sleep(0)
    await rolling
    assert seen <= {WORKERS, WORKERS + 1}
    assert len(supervised.pids) == WORKERS
    assert not supervised.pids & before
    assert len(logged(logs, "Worker rolled", log_level="info")) == WORKERS
    assert not logged(logs, "Worker ended; starting another")
    assert [slot.restarts for slot in supervised.supervisor.slots] == [0, 0]
    await get(port, "if")


@pytest.mark.thorough
async def test_rolled_workers_are_watched_like_the_first_ones(supervised: Supervised) -> None:
    await supervised.supervisor.roll()
    before = supervised.pids
    for victim in before:
        os.kill(victim, signal.SIGKILL)
    await eventually(lambda: len(supervised.pids - before) == WORKERS, "other processes")
    await supervised.all_serve()


@pytest.mark.thorough
async def test_a_roll_after_a_roll_that_had_to_kill_a_worker_is_carried_out(
    publisher: Publisher, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_KILL_MARGIN_SECONDS", 0.1)
    publisher.publish(published("if"))
    supervised = Supervised(publisher, port, workers=1, drain_timeout=0.1)
    supervised.supervisor.start()
    await eventually(lambda: supervised.supervisor.serving == 1, "the worker serves")
    os.kill(supervised.workers[0].pid, signal.SIGSTOP)
    try:
        await supervised.supervisor.roll()
        await supervised.supervisor.roll()
    finally:
        await supervised.end()


@pytest.mark.thorough
async def test_a_roll_right_after_a_roll_whose_worker_died_is_carried_out(publisher: Publisher, port: int) -> None:
    publisher.publish(published("if"))
    supervised = Supervised(publisher, port, workers=1)
    supervised.supervisor.start()
    await eventually(lambda: supervised.supervisor.serving == 1, "the worker serves")
    (old,), before = supervised.workers, child_processes()
    rolling = asyncio.create_task(supervised.supervisor.roll())
    try:
        await eventually(lambda: child_processes() - before, "the successor's process")
        (successor,) = child_processes() - before
        # The successor is not READY before the dead worker's slot has another worker.
        os.kill(successor, signal.SIGSTOP)
        os.kill(old.pid, signal.SIGKILL)
        await eventually(lambda: supervised.supervisor.slots[0].worker not in (None, old), "the slot is filled again")
        os.kill(successor, signal.SIGCONT)
        await rolling
        assert successor not in child_processes()
        await supervised.supervisor.roll()
    finally:
        await supervised.end()


# -- leaving ---------------------------------------------------------------------------------------------------------


async def test_a_drain_ends_every_worker_in_order(supervised: Supervised, logs: LogLines) -> None:
    workers, pids = supervised.workers, supervised.pids
    await promptly(supervised.drain())
    assert [worker.ended.result() for worker in workers] == [0] * WORKERS
    assert not pids & child_processes()
    assert not logs


async def test_a_drain_ends_workers_that_are_still_starting(publisher: Publisher, port: int) -> None:
    supervised = Supervised(publisher, port)
    before = child_processes()
    supervised.supervisor.start()
    await eventually(lambda: child_processes() - before, "a process")
    await promptly(supervised.drain(timeout=10))
    assert not child_processes() - before
    await supervised.end()


async def test_a_drain_before_any_start_returns(publisher: Publisher, port: int) -> None:
    supervised = Supervised(publisher, port)
    await promptly(supervised.drain(timeout=0.1))
    await supervised.end()


async def test_a_worker_that_ends_during_a_drain_is_not_replaced(supervised: Supervised) -> None:
    draining = asyncio.create_task(supervised.drain(wait=0.5))
    await eventually(lambda: all(worker.draining for worker in supervised.workers), "the drain begun")
    before = supervised.pids
    os.kill(next(iter(before)), signal.SIGKILL)
    await promptly(draining)
    assert supervised.pids <= before


async def test_a_worker_that_does_not_drain_in_time_is_killed(
    supervised: Supervised, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "_KILL_MARGIN_SECONDS", 0.1)
    workers, victim = supervised.workers, supervised.workers[0]
    os.kill(victim.pid, signal.SIGSTOP)
    await promptly(supervised.drain(timeout=0.5))
    assert [worker.ended.result() for worker in workers] == [-signal.SIGKILL, 0]
    assert logged(logs, "Workers did not leave in time; killed", log_level="warning", count=1)


async def test_a_drain_is_cut_short_at_once(supervised: Supervised, port: int) -> None:
    workers = supervised.workers
    draining = asyncio.create_task(supervised.drain(wait=LONG / 2))
    await eventually(lambda: all(worker.draining for worker in workers), "the drain begun")
    assert not draining.done()
    supervised.supervisor.cut_short()
    await promptly(draining, seconds=10)
    assert [worker.ended.result() for worker in workers] == [-signal.SIGKILL] * WORKERS
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=10)
