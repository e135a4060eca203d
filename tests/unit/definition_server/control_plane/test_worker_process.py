"""A worker's process as the master sees it, without a process."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from tests.support.loop import eventually

from definition_server.control_plane.worker_process import WorkerProcess
from definition_server.ipc.channel import Channel
from definition_server.ipc.messages import Certificate


class Process:
    """Runs until it is killed."""

    pid = 1
    returncode: int | None = None

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    def kill(self) -> None:
        self.ended.set()


class Stats:
    """A page without a fault."""

    fault = None

    def read(self) -> None:
        pass


async def test_a_worker_that_closes_its_control_socket_and_stays_is_reported_once_after_five_seconds() -> None:
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
    now = asyncio.get_running_loop().time
    assert worker.problem(now() + 60) is None
    theirs.close()
    problem = await eventually(lambda: worker.problem(now() + 5.1), "the end of the socket is noticed")
    assert problem == "it has closed its control socket"
    assert worker.problem(now() + 60) is None, "it is being killed already"
    worker.kill()
    assert await worker.ended == -9
