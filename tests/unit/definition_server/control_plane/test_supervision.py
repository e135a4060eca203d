"""The supervisor with real worker processes, in failures that an integration test cannot produce."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import grpc
import pytest
from tests.support.client import Client
from tests.support.leftovers import child_processes
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually
from tests.support.polling import until

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.control_plane import worker_process
from definition_server.control_plane.listener import reserve_port
from definition_server.control_plane.publisher import Publisher, to_shared_memory
from definition_server.control_plane.supervisor import Supervisor
from definition_server.ipc.messages import Configure, Keys

pytestmark = pytest.mark.slow

SECONDS = 30.0


def publish(publisher: Publisher, *names: str) -> None:
    builder = SnapshotBuilder()
    builder.add(Row(number, name.encode(), None, None, b"pass") for number, name in enumerate(names))
    publisher.publish(to_shared_memory(builder.build(generation=publisher.next_generation, created_at_ns=0)))


@pytest.fixture
def holder() -> Iterator[socket.socket]:
    with reserve_port("127.0.0.1", 0) as holder:
        yield holder


@pytest.fixture
async def supervisor(publisher: Publisher, holder: socket.socket) -> AsyncIterator[Supervisor]:
    """One worker that serves one command, and the tick."""
    config = Configure("127.0.0.1", holder.getsockname()[1], "grpcio", False, 0.0, 2, "production", "ERROR", 5.0)
    keys = Keys((sha256(b"key").hexdigest(),))
    supervisor = Supervisor(config, publisher, keys, workers=1, heartbeat_timeout=30, start_timeout=SECONDS)
    publish(publisher, "if")
    tick = asyncio.create_task(supervisor.watch())
    supervisor.start()
    await eventually(lambda: supervisor.serving == 1, "the worker serves")
    yield supervisor
    living = [worker.pid for worker in supervisor._workers]
    await supervisor.drain(wait=0, timeout=5)
    assert not child_processes() & set(living), "a drain leaves no process"
    tick.cancel()
    await asyncio.gather(tick, return_exceptions=True)


@dataclass
class Reached:
    """A worker at some point of its start."""

    generation: int


def test_all_workers_serve_from_the_moment_when_the_last_one_has_the_publication(publisher: Publisher) -> None:
    config = Configure("127.0.0.1", 1, "grpcio", False, 0.0, 2, "production", "ERROR", 5.0)
    supervisor = Supervisor(config, publisher, Keys(()), workers=2, heartbeat_timeout=30, start_timeout=SECONDS)
    first, second = supervisor.slots

    def ready(worker: Reached, generation: int) -> float | None:
        worker.generation = generation
        supervisor._on_ready(worker)
        return supervisor.all_serve_since

    one, other = Reached(0), Reached(0)
    assert ready(one, 0) is None, "nothing is published"
    publish(publisher, "if")
    first.worker = one
    assert ready(one, 1) is None, "the other slot has no worker yet"
    second.worker = other
    assert ready(one, 1) is None
    began = time.time()
    since = ready(other, 1)
    assert since is not None
    assert began <= since <= time.time()
    assert ready(other, 1) == since, "the first time"
    publish(publisher, "if", "else")
    assert supervisor.all_serve_since is None, "the next publication has not arrived at every worker"
    assert ready(other, 2) is None
    later = ready(one, 2)
    assert later is not None
    assert later >= since


@pytest.fixture
def python_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make every later worker run a shell script in place of Python."""

    def replace(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(worker_process, "interpreter", lambda: str(program))

    return replace


def pid(supervisor: Supervisor) -> int | None:
    worker = supervisor.slots[0].worker
    return None if worker is None else worker.pid


async def test_a_roll_whose_successor_does_not_start_leaves_the_old_worker_serving(
    supervisor: Supervisor, python_that: Callable[[str], None], logs: LogLines
) -> None:
    before = pid(supervisor)
    python_that("exit 1")
    await supervisor.roll()
    assert pid(supervisor) == before
    assert supervisor.serving == 1
    assert "the old one stays" in logged(logs, "Roll stopped")[0]["error"]


async def test_the_old_worker_keeps_serving_if_a_roll_cannot_start_a_process(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    before = pid(supervisor)
    monkeypatch.setattr(worker_process, "interpreter", lambda: "/nowhere/python")
    await supervisor.roll()
    assert pid(supervisor) == before
    assert "No such file" in logged(logs, "Roll stopped")[0]["error"]


async def test_a_second_roll_while_one_is_under_way_is_ignored(supervisor: Supervisor, logs: LogLines) -> None:
    before = pid(supervisor)
    await asyncio.gather(supervisor.roll(), supervisor.roll())
    assert len(logged(logs, "Roll ignored: one is under way")) == 1
    assert len(logged(logs, "Rolling the workers", log_level="info")) == 1
    assert len(logged(logs, "Worker rolled")) == 1
    assert pid(supervisor) != before


async def test_a_worker_that_cannot_be_started_is_retried_until_it_starts(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    monkeypatch.setattr(worker_process, "interpreter", lambda: "/nowhere/python")
    worker = supervisor.slots[0].worker
    assert worker is not None
    worker.kill()
    await eventually(lambda: len(logged(logs, "Worker cannot be started")) >= 2, "two attempts")
    monkeypatch.setattr(worker_process, "interpreter", lambda: sys.executable)
    await eventually(lambda: supervisor.serving == 1, "the worker is back")
    assert supervisor.slots[0].restarts >= 3


async def test_a_worker_that_is_never_ready_is_killed_and_replaced(
    supervisor: Supervisor, python_that: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    python = worker_process.interpreter
    python_that("exec sleep 600")
    supervisor._start_timeout = 0.5
    worker = supervisor.slots[0].worker
    assert worker is not None
    worker.kill()
    await eventually(lambda: logged(logs, "Worker is not READY in time; killed"), "the sleeper is killed")
    supervisor._start_timeout = SECONDS
    monkeypatch.setattr(worker_process, "interpreter", python)
    await eventually(lambda: supervisor.serving == 1, "the worker is back")


async def test_workers_that_end_at_once_are_a_crash_loop_until_one_runs_long_enough(
    supervisor: Supervisor, python_that: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    python = worker_process.interpreter
    python_that("exit 7")
    slot = supervisor.slots[0]
    assert slot.worker is not None
    slot.worker.kill()
    await eventually(lambda: slot.crash_loop.looping, "a crash loop")
    assert logged(logs, "Worker ended; starting another")[-1]["how"] == "exit code 7"
    assert logged(logs, "Worker crash loop")[0]["worker"] == 0
    monkeypatch.setattr(worker_process, "interpreter", python)
    monkeypatch.setattr(slot.crash_loop, "_stable", 0.5)
    await eventually(lambda: supervisor.serving == 1 and not slot.crash_loop.looping, "recovery")


async def test_a_snapshot_that_a_worker_did_not_receive_is_sent_again(
    supervisor: Supervisor, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example because the worker had no free descriptor."""
    monkeypatch.setattr(worker_process, "_SEND_AGAIN_SECONDS", 0.3)
    worker = supervisor.slots[0].worker
    assert worker is not None
    send, lost = worker._channel.send, []

    def lossy(message: object, *descriptors: int) -> bool:
        if descriptors and not lost:
            lost.append(message)
            return True
        return send(message, *descriptors)

    monkeypatch.setattr(worker._channel, "send", lossy)
    publish(publisher, "if", "else")
    await eventually(lambda: worker.generation == 2, "the second attempt")
    assert len(lost) == 1


async def test_replaced_keys_reach_the_workers(supervisor: Supervisor, holder: socket.socket) -> None:
    port = holder.getsockname()[1]

    def refused(key: str) -> bool:
        with Client(port, key) as client:
            try:
                return client.get("if").name != "if"
            except grpc.RpcError:
                return True

    assert not await asyncio.to_thread(refused, "key")
    supervisor.use_keys(Keys((sha256(b"other").hexdigest(),)))
    await asyncio.to_thread(until, lambda: not refused("other"), "the other key is accepted")
    assert await asyncio.to_thread(refused, "key")
