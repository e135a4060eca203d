"""An open-loop load from a separate process; a line on standard input ends the load.

``python -m perf.benches.steady_load PORT RATE ROWS`` starts it.

Prints ``started`` once the connections are open and one JSON object at the end: answered, failed, latencies in ms from
the scheduled instant (so a stall lengthens the latency of every request that was due during the stall).
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

import grpc
from tests.support.open_loop import open_loop
from tests.support.server import KEY

CONNECTIONS = 16


async def run(port: int, rate: int, rows: int) -> dict[str, float]:
    """Offer ``rate`` calls per second until a line arrives on standard input."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(CONNECTIONS)]
    calls: list[Any] = [channel.unary_unary("/avap.DefinitionEngine/GetCommand") for channel in channels]
    metadata = (("x-avap-auth", KEY),)
    names = [f"command{number}".encode() for number in range(0, rows, max(1, rows // 997))]
    requests = [b"\x0a" + bytes([len(name)]) + name for name in names]
    latencies: list[float] = []
    failed = 0

    async def call(number: int, due: float) -> None:
        nonlocal failed
        try:
            await calls[number % CONNECTIONS](requests[number % len(requests)], metadata=metadata, timeout=30)
        except grpc.aio.AioRpcError:
            failed += 1
        else:
            latencies.append(time.monotonic() - due)

    await asyncio.gather(*(call(number, time.monotonic()) for number in range(CONNECTIONS)))
    latencies.clear()
    gc.collect()
    gc.disable()  # so that the generator's own pauses are not measured
    print("started", flush=True)
    stopped = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    pending: set[asyncio.Task[None]] = set()
    async for due in open_loop(rate, stopped.done):
        task = asyncio.create_task(call(due.number, due.instant))
        pending.add(task)
        task.add_done_callback(pending.discard)
    await asyncio.gather(*pending)
    for channel in channels:
        await channel.close()
    latencies.sort()
    at = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
    in_ms = {name: latencies[min(len(latencies) - 1, int(share * len(latencies)))] * 1000 for name, share in at.items()}
    return {"answered": len(latencies), "failed": failed, **in_ms}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(*(int(argument) for argument in sys.argv[1:])))))
