"""One process of a load generator: ``python -m perf.generator.process``, started by `perf.generator.run`.

Reads a `perf.generator.job.Job` as one line of JSON, connects, and prints ``{"ready": …}``. A second line holds the
instant (of the monotonic clock) at which all processes begin: ``{"start": …}``. Prints ``{"measuring": true}`` when the
measurement begins, and at the end ``{"result": …}``, or ``{"error": …, "fault": "server" | "machine" | "generator"}``.
"""

from __future__ import annotations

import errno
import gc
import json
import resource
import sys
from contextlib import ExitStack
from functools import partial
from time import monotonic
from typing import Any

from tests.support.attacks import ATTACKS, Attackers

from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import map_sealed
from perf.generator.answers import WrongAnswer
from perf.generator.beside import IdleConnections, SlowReaders
from perf.generator.job import Job
from perf.generator.loops import LOOPS, Beside, Load
from perf.generator.sync import Catalogues, sync
from perf.targets.processes import forget_peak

_OURS = {errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.ENOMEM, errno.ENOBUFS}
"""Errors of a connection that the machine causes: it lacks a resource."""
DESCRIPTORS_BESIDE = 64


def send(**what: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(what), flush=True)


def next_message() -> dict[str, Any]:
    """The next line of standard input; empty at its end, when the process that started this one has ended."""
    line = sys.stdin.readline()
    found: dict[str, Any] = json.loads(line) if line else {}
    return found


def run_job(job: Job) -> dict[str, Any] | None:
    """Do the job and return its figures; None if standard input ends before the start.

    Raises:
        WrongAnswer: for an answer that is wrong or does not arrive.
        OSError: if no server listens, or the machine lacks a resource.
    """
    snapshot = Snapshot(map_sealed(job.snapshot))
    with ExitStack() as stack:
        idle = IdleConnections(job) if job.idle else None
        load: Load | Catalogues = Catalogues(job, snapshot) if job.kind == "sync" else Load(job, snapshot)
        stack.callback(load.close)
        beside: dict[str, Beside] = {"idle": idle} if idle else {}
        if job.slow:
            beside["slow_readers"] = SlowReaders(job)
        if job.attack:
            beside["attack"] = Attackers(ATTACKS[job.attack], job.port, job.key.encode())
        for pid in job.pids:
            if not job.member:
                _forget_peak(pid)
        gc.collect()
        gc.disable()  # so that the generator's own pauses are not measured
        send(ready=True)
        start = next_message().get("start")
        if start is None:
            return None
        working = [each for each in beside.values() if each is not idle]
        measure = partial(send, measuring=True)
        if isinstance(load, Catalogues):
            result = sync(load, working, start, measure)
        else:
            result = LOOPS[job.kind](load, working, start, measure)
        result["ended_at"] = monotonic()
        return result | {name: each.close() for name, each in beside.items()}


def _forget_peak(pid: int) -> None:
    try:
        forget_peak(pid)
    except OSError:
        return  # the process belongs to another user, so its peak counts from its start


def main() -> int:
    """Do the job. Returns 1 if the job ended with an ``error`` and not with figures."""
    job = Job(**next_message())
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = job.connections + job.idle + job.slow + DESCRIPTORS_BESIDE
    if wanted > hard:
        limit = f"this process may open {hard} files and needs {wanted}: raise the limit (ulimit -n)"
        send(error=limit, fault="machine")
        return 1
    try:
        result = run_job(job)
    except WrongAnswer as error:
        send(error=str(error), fault="server")
    except ProcessLookupError as error:
        send(error=f"the server died: {error}", fault="server")
    except ConnectionRefusedError:
        send(error=f"no process listens on port {job.port}", fault="server")
    except OSError as error:
        fault = "machine" if error.errno in _OURS else "server"
        send(error=f"port {job.port}: {type(error).__name__}: {error}", fault=fault)
    except ValueError as error:
        send(error=str(error), fault="generator")
    else:
        if result is not None:
            send(result=result)
            return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
