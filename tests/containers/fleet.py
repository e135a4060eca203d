"""Open-loop load on a fleet: one client that knows every address, balances over them, and retries as the README says.

An event loop in a separate thread offers the load on a schedule; a call is counted as failed if its caller would see an
error. Each answer is checked.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import grpc
from tests.support.client import RETRYING, UNLIMITED
from tests.support.server import KEY

from definition_server.rpc import avap_pb2, avap_pb2_grpc

BALANCED = {"loadBalancingConfig": [{"round_robin": {}}]}
CALL_SECONDS = 20
SYNC_EVERY = 30
CLIENTS = 4
METADATA = (("x-avap-auth", KEY),)
SLICE_SECONDS = 0.01
"""Calls that are due within this time are sent together; the latency of each counts from the instant when it was
due.
"""


def service_config(*, retries: bool) -> str:
    """Service config: round robin over all addresses, with the README's retries or without any."""
    (_, readme) = RETRYING[0]
    return json.dumps(json.loads(readme) | BALANCED if retries else BALANCED)


@dataclass
class Result:
    """The results of the calls."""

    offered: int = 0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    slowest_seconds: float = 0.0
    latest_start_seconds: float = 0.0
    """Maximum delay of the generator itself."""

    def __str__(self) -> str:
        return (
            f"offered {self.offered}, answered {self.answered}, failed {dict(self.failed)}, wrong {self.wrong[:3]}, "
            f"slowest {self.slowest_seconds * 1000:.0f} ms, generator late {self.latest_start_seconds * 1000:.0f} ms"
        )


class FleetLoad:
    """``rate`` calls a second for ``names`` in turn, over ``CLIENTS`` channels that each know all ``ports``; a context
    manager.

    ``names`` maps a name to the octets that its code must begin with. One call in ``SYNC_EVERY`` is a SyncCatalog
    instead, which must have ``count`` definitions: such a call is in flight for longer, and gRPC never retries a call
    after its answer has begun.
    """

    def __init__(
        self, ports: Sequence[int], names: dict[str, bytes], count: int, *, rate: float, retries: bool = True
    ) -> None:
        self._target = "ipv4:" + ",".join(f"127.0.0.1:{port}" for port in ports)
        self._names = list(names.items())
        self._rate = rate
        self._count = count
        self._options: list[tuple[str, Any]] = [
            *UNLIMITED,
            ("grpc.service_config", service_config(retries=retries)),
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="fleet-load")
        self._began = 0.0
        self.result = Result()

    def __enter__(self) -> Self:
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(CALL_SECONDS + 10)
        assert not self._thread.is_alive(), "the load did not end"

    async def _run(self) -> None:
        channels = [grpc.aio.insecure_channel(self._target, options=self._options) for _ in range(CLIENTS)]
        stubs = [avap_pb2_grpc.DefinitionEngineStub(channel) for channel in channels]
        pending: set[asyncio.Task[None]] = set()
        while not self._stop.is_set():
            now = time.monotonic()
            while (due := self._began + self.result.offered / self._rate) <= now:
                number = self.result.offered
                self.result.latest_start_seconds = max(self.result.latest_start_seconds, now - due)
                task = asyncio.create_task(self._call(stubs[number % CLIENTS], number, due))
                pending.add(task)
                task.add_done_callback(pending.discard)
                self.result.offered += 1
            await asyncio.sleep(SLICE_SECONDS)
        await asyncio.gather(*pending)
        for channel in channels:
            await channel.close()

    async def _call(self, stub: Any, number: int, due: float) -> None:
        result = self.result
        try:
            wrong = await (self._sync(stub) if number % SYNC_EVERY == 0 else self._get(stub, number))
        except grpc.aio.AioRpcError as error:
            result.failed[f"{error.code().name}: {error.details()}"] += 1
            return
        result.slowest_seconds = max(result.slowest_seconds, time.monotonic() - due)
        result.answered += 1
        if wrong:
            result.wrong.append(wrong)

    async def _get(self, stub: Any, number: int) -> str | None:
        """The fault of the answer."""
        name, beginning = self._names[number % len(self._names)]
        request = avap_pb2.CommandRequest(name=name)
        answer = await stub.GetCommand(request, metadata=METADATA, timeout=CALL_SECONDS)
        right = answer.name == name and answer.code.startswith(beginning)
        return None if right else f"asked {name}, got {answer.name} {answer.code[:20]!r}"

    async def _sync(self, stub: Any) -> str | None:
        answer = await stub.SyncCatalog(avap_pb2.Empty(), metadata=METADATA, timeout=CALL_SECONDS)
        right = answer.total_count == len(answer.commands) == self._count
        return None if right else f"a catalogue of {answer.total_count} with {len(answer.commands)} definitions"
