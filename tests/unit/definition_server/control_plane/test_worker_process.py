"""The master's object for a worker process. No process is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually, turns

from definition_server.control_plane.worker_process import WorkerProcess
from definition_server.ipc.channel import Channel
from definition_server.ipc.messages import Certificate, Drain, Ready


class Process:
    """Runs until ``ended`` is set, as a killed process does until the kernel has cleaned up after it."""

    pid = 1
    returncode: int | None = None

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    def kill(self) -> None:
        pass


class Stats:
    """A page without a fault."""

    fault = None

    def read(self) -> None:
        pass


@pytest.fixture
async def pair() -> AsyncIterator[tuple[WorkerProcess, Channel]]:
    """The master's object for a worker, and the worker's end of the control socket."""
    ours, theirs = Channel.pair()
    process = Process()
    worker = WorkerProcess(
        0,
        cast(Any, process),
        ours,
        cast(Any, Stats()),
        Certificate(0),
        on_mapped=lambda: None,
        on_keys_used=lambda _: None,
        on_calls_sampled=lambda *_: None,
        on_ready=lambda _: None,
    )
    channel = Channel.of_worker(theirs)
    yield worker, channel
    channel.close()
    process.ended.set()
    assert await worker.ended == -9


async def test_a_worker_that_closes_its_control_socket_and_stays_is_reported_once_after_five_seconds(
    pair: tuple[WorkerProcess, Channel],
) -> None:
    worker, theirs = pair
    now = asyncio.get_running_loop().time
    assert worker.problem(now() + 60) is None
    theirs.close()
    problem = await eventually(lambda: worker.problem(now() + 5.1), "the end of the socket is noticed")
    assert problem == "it has closed its control socket"
    assert worker.problem(now() + 60) is None, "the worker is being killed already"


async def test_a_worker_that_drains_gets_the_order_and_may_close_its_control_socket(
    pair: tuple[WorkerProcess, Channel],
) -> None:
    worker, theirs = pair
    worker.drain(Drain(True, 1.0, 2.0))
    received = await eventually(theirs.receive, "the order to drain")
    assert received is not None
    assert received[0] == Drain(True, 1.0, 2.0)
    theirs.close()
    await turns()
    assert worker.problem(asyncio.get_running_loop().time() + 60) is None


async def test_after_a_violation_nothing_more_is_read_of_a_worker(
    pair: tuple[WorkerProcess, Channel], logs: LogLines
) -> None:
    _worker, theirs = pair
    for _ in range(2):
        theirs.send(Ready(1))  # before its stats page is mapped
    await eventually(lambda: logged(logs, "Worker violates the control protocol; killed"), "the violation is logged")
    await turns()
    assert len(logged(logs, "Worker violates the control protocol; killed")) == 1
