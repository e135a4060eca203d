"""Steady open-loop load: calls are sent on a schedule, whether or not earlier calls have been answered."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self, TypeAlias

import grpc
from tests.support.client import UNLIMITED
from tests.support.open_loop import open_loop
from tests.support.server import KEY

from definition_server.rpc import avap_pb2, avap_pb2_grpc

GetCommand: TypeAlias = "grpc.aio.UnaryUnaryMultiCallable[avap_pb2.CommandRequest, avap_pb2.CommandResponse]"


@dataclass
class Result:
    """The outcomes of the calls."""

    offered: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    """Seconds from the scheduled instant to the answer, so a stall of generator or server counts in full."""

    def __str__(self) -> str:
        return (
            f"offered {self.offered}, answered {self.answered}, failed {dict(self.failed)}, "
            f"wrong {self.wrong[:3]}, slowest {self.slowest_seconds * 1000:.1f} ms"
        )


class Load:
    """Sends ``rate`` calls per second for ``names`` in turn over ``connections`` connections, in a thread. A
    context."""

    def __init__(
        self,
        port: int,
        names: Sequence[str],
        *,
        rate: float = 200,
        connections: int = 4,
        options: Sequence[tuple[str, object]] = (),
        key: str = KEY,
    ) -> None:
        self._port = port
        self._names = names
        self._rate = rate
        self._connections = connections
        self._options = [*UNLIMITED, *options, ("grpc.use_local_subchannel_pool", 1)]
        self._metadata = (("x-avap-auth", key),)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self.result = Result()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(60)

    async def _run(self) -> None:
        channels = [
            grpc.aio.insecure_channel(f"127.0.0.1:{self._port}", options=self._options)
            for _ in range(self._connections)
        ]
        stubs = [avap_pb2_grpc.DefinitionEngineStub(channel) for channel in channels]  # type: ignore[no-untyped-call]  # generated
        calls = [stub.GetCommand for stub in stubs]
        pending: set[asyncio.Task[None]] = set()
        async for due in open_loop(self._rate, self._stop.is_set):
            name = self._names[due.number % len(self._names)]
            task = asyncio.create_task(self._call(calls[due.number % len(calls)], name, due.instant))
            pending.add(task)
            task.add_done_callback(pending.discard)
            self.result.offered += 1
        await asyncio.gather(*pending)
        for channel in channels:
            await channel.close()

    async def _call(self, call: GetCommand, name: str, due: float) -> None:
        try:
            answer = await call(avap_pb2.CommandRequest(name=name), metadata=self._metadata, timeout=20)
        except grpc.aio.AioRpcError as error:
            self.result.failed[f"{error.code().name}: {error.details()}"] += 1
            return
        self.result.slowest_seconds = max(self.result.slowest_seconds, time.monotonic() - due)
        if answer.name != name or not answer.hash:
            self.result.wrong.append(f"asked {name}, got {answer.name}")
        self.result.answered += 1

    def wait_answered(self, more: int, seconds: float = 30) -> None:
        """Wait until ``more`` further calls have been answered."""
        from tests.support.polling import until

        goal = self.result.answered + more
        until(lambda: self.result.answered >= goal, lambda: f"{more} more answers; {self.result}", seconds=seconds)
