"""The process of attackers: ``python -m perf.attackers.process`` with a `perf.attackers.job.Job` in its first line.

Prints ``{"started": true}`` once the attack is in force, and ``{"finished": true}`` at its end if it has one. Continues
until standard input ends, and then prints ``{"done": …}``, the numbers of events. It runs at a low priority, so that it
does not delay a victim on its CPU.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import sys
from collections import Counter
from collections.abc import Awaitable, Callable

from perf.attackers import calls, connections, records
from perf.attackers.job import Crew, Job

_NICENESS = 10

KINDS: dict[str, Callable[[Crew], Awaitable[None]]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        calls.long_names, calls.ended_watches, calls.watches, calls.endless_bodies_wrong_key, calls.endless_bodies,
        calls.expired_bodies, calls.open_streams, calls.gzip_bombs, calls.wrong_keys, calls.late_resets,
        calls.rapid_resets, connections.huffman_blocks, connections.paced_huffman_blocks, connections.connecting,
        connections.idle, connections.garbage, connections.health_checks, records.key_updates, records.small_records,
        records.resumptions,
    )
}  # fmt: skip


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


async def run(job: Job) -> Counter[str]:
    """Attack until standard input ends. Returns the numbers of events."""
    crew = Crew(job, lambda event: _say(**{event: True}))
    work = asyncio.ensure_future(KINDS[job.kind](crew))
    asked_to_end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait((work, asked_to_end), return_when=asyncio.FIRST_COMPLETED)
    if work.done() and work.exception() is None:
        await asked_to_end
    work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    return crew.done


def main() -> None:
    """Do the job."""
    os.nice(_NICENESS)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # the server may end connections at any time
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    job = Job(**json.loads(sys.stdin.readline()))
    _say(done=asyncio.run(run(job)))


if __name__ == "__main__":
    main()
