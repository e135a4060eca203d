"""The worker, made slower on purpose: ``python -m perf.harness.slowed INJECTION CONTROL_FD STATS_FD SLOT``.

That is how the harness is tested: what it cannot see here, it would not see in a change either. Nothing of this is in
the server; the worker's own program runs, after one method of the engine's shell, through which everything passes that
a client sends, has been replaced.

- ``busy``: a tenth of the CPU time that the serving thread takes is burnt once more.
- ``twice``: all of it is.
- ``delay``: every hundredth batch read waits for 3 ms before it is looked at, and what comes on that connection
  meanwhile waits behind it. Other connections are served, so that the server stands still at no time: of all calls, one
  in a hundred or a little more is slow, and nothing else is to be seen.
- ``none``: nothing, started in the same way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from time import thread_time

from definition_server.data_plane.worker import main as worker_main
from grpc_h2 import Http2Protocol

BUSY_SHARE = 0.10
DELAY_SECONDS = 0.003
ONE_IN = 100
_BATCHES = 16
"""Batches between two times of burning: asking for the time costs a microsecond, which is a lot beside one batch."""

Receive = Callable[[Http2Protocol, bytes], None]


def busy(receive: Receive, share: float = BUSY_SHARE, clock: Callable[[], float] = thread_time) -> Receive:
    """``receive``, and for every second of CPU time that the thread takes otherwise, ``share`` of one on top."""
    last, batches = clock(), 0

    def slowed(shell: Http2Protocol, data: bytes) -> None:
        nonlocal last, batches
        receive(shell, data)
        batches += 1
        if batches % _BATCHES:
            return
        now = clock()
        end = now + (now - last) * share
        while (last := clock()) < end:
            pass

    return slowed


def delayed(receive: Receive, seconds: float = DELAY_SECONDS, one_in: int = ONE_IN) -> Receive:
    """``receive``, for one batch in ``one_in`` after ``seconds``; each connection's octets stay in order."""
    held: dict[int, list[bytes]] = {}
    batches = 0

    def release(shell: Http2Protocol) -> None:
        waiting = b"".join(held.pop(id(shell)))
        if not shell.closing:
            receive(shell, waiting)

    def slowed(shell: Http2Protocol, data: bytes) -> None:
        nonlocal batches
        waiting = held.get(id(shell))
        if waiting is not None:
            waiting.append(data)
            return
        batches += 1
        if batches % one_in:
            receive(shell, data)
            return
        held[id(shell)] = [data]
        shell._loop.call_later(seconds, release, shell)  # holds the shell, so that its id is nobody else's meanwhile

    return slowed


INJECTIONS: dict[str, Callable[[Receive], Receive]] = {
    "busy": busy, "twice": partial(busy, share=1.0), "delay": delayed, "none": lambda receive: receive,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """Inject, then run the worker with what follows. Returns its exit code."""
    if not arguments or arguments[0] not in INJECTIONS:
        print(f"the first argument wants to be one of {', '.join(INJECTIONS)}", file=sys.stderr)
        return 2
    # By name: the method of a class is replaced, which is exactly what a type checker should object to elsewhere.
    setattr(Http2Protocol, "data_received", INJECTIONS[arguments[0]](Http2Protocol.data_received))  # noqa: B010
    return worker_main(arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
