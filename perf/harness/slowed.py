"""A worker that is slowed down deliberately: ``python -m perf.harness.slowed INJECTION CONTROL_FD STATS_FD SLOT``.

It tests the harness: if the gates do not detect a slowdown here, they would not detect it in a change either. The
server contains none of this. The worker's own program runs after the method of `Http2Protocol` that receives all octets
from clients has been replaced.

- ``busy``: the serving thread uses an additional tenth of its CPU time for no work.
- ``twice``: the serving thread uses the same CPU time again for no work.
- ``delay``: every hundredth batch waits for 3 ms before it is processed, and later octets of that connection wait
  behind it. Other connections are served meanwhile, so the server never stalls: the only effect is that about one call
  in a hundred is slow.
- ``held``: every batch waits for 20 ms before it is processed, so the server's latency is known at any rate that it can
  serve; other generators are judged by it (`perf.benches.witness`).
- ``none``: no slowdown; the worker is started in the same way.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from time import thread_time

from definition_server.data_plane.worker import main as worker_main
from grpc_h2 import Http2Protocol

BUSY_SHARE = 0.10
DELAY_SECONDS = 0.003
HELD_SECONDS = 0.020
ONE_IN = 100
_BATCHES = 16
"""Batches between two measurements of the CPU time. A measurement takes a microsecond, which is much compared with one
batch."""

Receive = Callable[[Http2Protocol, bytes], None]


def busy(receive: Receive, share: float = BUSY_SHARE, clock: Callable[[], float] = thread_time) -> Receive:
    """A ``receive`` that uses ``share`` additional seconds of CPU time for each second of the thread's CPU time."""
    last, batches = clock(), 0

    def slowed(protocol: Http2Protocol, data: bytes) -> None:
        nonlocal last, batches
        receive(protocol, data)
        batches += 1
        if batches % _BATCHES:
            return
        now = clock()
        end = now + (now - last) * share
        while (last := clock()) < end:
            pass

    return slowed


def delayed(receive: Receive, seconds: float = DELAY_SECONDS, one_in: int = ONE_IN) -> Receive:
    """A ``receive`` that delays one batch in ``one_in`` by ``seconds``; the order of a connection's octets is kept."""
    held: dict[int, list[bytes]] = {}
    batches = 0

    def release(protocol: Http2Protocol) -> None:
        waiting = b"".join(held.pop(id(protocol)))
        if not protocol.closing:
            receive(protocol, waiting)

    def slowed(protocol: Http2Protocol, data: bytes) -> None:
        nonlocal batches
        waiting = held.get(id(protocol))
        if waiting is not None:
            waiting.append(data)
            return
        batches += 1
        if batches % one_in:
            receive(protocol, data)
            return
        held[id(protocol)] = [data]
        protocol._loop.call_later(seconds, release, protocol)  # the reference prevents a reuse of its id

    return slowed


def held(receive: Receive, seconds: float = HELD_SECONDS) -> Receive:
    """A ``receive`` that delays every batch by ``seconds``, in order."""
    waiting: deque[tuple[Http2Protocol, bytes]] = deque()

    def release() -> None:
        protocol, data = waiting.popleft()
        if not protocol.closing:
            receive(protocol, data)

    def slowed(protocol: Http2Protocol, data: bytes) -> None:
        # All batches wait for the same time, so the oldest batch is due, whichever timer is called first.
        waiting.append((protocol, data))
        protocol._loop.call_later(seconds, release)

    return slowed


INJECTIONS: dict[str, Callable[[Receive], Receive]] = {
    "busy": busy, "twice": partial(busy, share=1.0), "delay": delayed, "held": held, "none": lambda receive: receive,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Apply the injection that the first argument names, then run the worker with the other arguments. Returns its exit
    code."""
    if not arguments or arguments[0] not in INJECTIONS:
        print(f"the first argument must be one of {', '.join(INJECTIONS)}", file=sys.stderr)
        return 2
    setattr(Http2Protocol, "data_received", INJECTIONS[arguments[0]](Http2Protocol.data_received))  # noqa: B010 - mypy rejects it
    return worker_main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
