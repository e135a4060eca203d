"""A server whose latency is known beforehand: it answers ``GetCommand`` after a set time.

``python -m perf.benches.delayed FD`` runs it.

It is used to compare the latencies that generators report: nine calls of ten take `USUAL_SECONDS`, the tenth
`SLOW_SECONDS`, so the P95 is `SLOW_SECONDS` for every generator, and the server has nothing else to do. ``FD`` is an
inherited descriptor of sealed memory that holds the catalogue. Prints its port; ends when its standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from subprocess import PIPE, Popen
from typing import Any

import grpc

from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import map_sealed
from definition_server.rpc import avap_pb2
from perf.targets.catalogue import Catalogue
from perf.targets.processes import on_cpu
from perf.targets.target import ROOT, SERVER_CPU, Target, TargetFailed

USUAL_SECONDS, SLOW_SECONDS = 0.010, 0.030
SLOW_EVERY = 10
"""One call of so many is slow. This is more than one in twenty, so the P95 lies well within the slow calls."""


@contextmanager
def delayed(catalogue: Catalogue) -> Iterator[Target]:
    """The server on ``catalogue``, on the server's CPU.

    Raises:
        TargetFailed: if the server does not start.
    """
    command = on_cpu(SERVER_CPU, [sys.executable, "-m", "perf.benches.delayed", str(catalogue.descriptor)])
    with Popen(command, cwd=ROOT, pass_fds=[catalogue.descriptor], stdin=PIPE, stdout=PIPE, text=True) as process:
        if process.stdout is None or not (line := process.stdout.readline()):
            raise TargetFailed("the server with known delays does not start")
        try:
            yield Target("delayed", int(line), process.pid)
        finally:
            process.communicate(timeout=20)  # this closes the server's standard input


async def _serve(snapshot: Snapshot) -> None:
    calls = count(1)

    async def get_command(request: bytes, context: Any) -> bytes:
        await asyncio.sleep(SLOW_SECONDS if next(calls) % SLOW_EVERY == 0 else USUAL_SECONDS)
        answer = snapshot.answer(avap_pb2.CommandRequest.FromString(request).name.encode())
        if answer is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "not found")
        return bytes(answer or b"")

    server = grpc.aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(get_command)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("avap.DefinitionEngine", {"GetCommand": handler}),)
    )
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)
    await server.stop(0)


if __name__ == "__main__":
    asyncio.run(_serve(Snapshot(map_sealed(int(sys.argv[1])))))
