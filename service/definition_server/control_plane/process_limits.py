"""The kernel's limits of a process (getrlimit(2)), except that of open files: they are raised, checked and logged at
the start.

The number of processes is limited for an account (RLIMIT_NPROC) and for a container (the pids control group), which may
have other processes. So no number shows whether the limit suffices, and it is tested: as many threads as the server
needs at one time are started, and end at once.

The command line, a service manager or a container runtime sets the limits, often for all its processes. Each of these
limits, if it is too low, ends a server after some time, or disables a function. The limit of file sizes also applies to
unnamed memory (memfd_create(2)), in which snapshots are sent to the workers. The limit of CPU time ends the process.
The limit of the address space keeps the checker from compiling rows. A soft limit is raised to the hard limit, which
needs no privilege. If a limit is still so low that nothing could be served, the server does not start; if it is merely
low, it is logged.
"""

from __future__ import annotations

import resource
import threading
from contextlib import suppress
from dataclasses import dataclass

from definition_server.observability.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Limit:
    name: str
    number: int
    enough: int
    """At this value or above, no warning is logged."""
    least: int
    """Below this value the server cannot serve at all."""
    effect: str
    remedy: str


_MIB = 1 << 20
_LIMITS = (
    _Limit(
        "size of a file",
        resource.RLIMIT_FSIZE,
        enough=4096 * _MIB,
        least=_MIB,
        effect="a catalogue that is larger is not published: it goes to the workers in memory that counts as a file",
        remedy="raise it (ulimit -f unlimited, LimitFSIZE=infinity)",
    ),
    _Limit(
        "CPU time",
        resource.RLIMIT_CPU,
        enough=1 << 40,
        least=0,
        effect="the kernel ends each process of the server that has used so many seconds of CPU time",
        remedy="raise it (ulimit -t unlimited, LimitCPU=infinity)",
    ),
    _Limit(
        "address space",
        resource.RLIMIT_AS,
        enough=4096 * _MIB,
        least=512 * _MIB,
        effect="rows may not be checked, and larger catalogues not be published",
        remedy="raise it (ulimit -v unlimited, LimitAS=infinity) and limit the memory of the container or unit instead",
    ),
    _Limit(
        "data",
        resource.RLIMIT_DATA,
        enough=4096 * _MIB,
        least=128 * _MIB,
        effect="rows may not be checked, and larger catalogues not be published",
        remedy="raise it (ulimit -d unlimited, LimitDATA=infinity)",
    ),
)

_OWN_TASKS = 5
"""The most threads and processes that the master has at one time: for its log, admin port, cycle, disk and checker."""
_WORKER_TASKS = 3
"""The threads and processes of a worker: the process, its log, and its watch of the master."""
_SMALL_STACK = 64 * 1024
"""Octets of a test thread's stack. They are few, because the test is of the number of threads, and not of the address
space.
"""


def raise_process_limits(workers: int) -> str | None:
    """Raise each soft limit to its hard one, and log those that are still low. Returns why a server of so many workers
    cannot start; None if it can."""
    for limit in _LIMITS:
        soft = _raise(limit.number)
        if soft == resource.RLIM_INFINITY or soft >= limit.enough:
            continue
        if soft < limit.least:
            return f"the limit of the {limit.name} is {soft}, and {limit.least} are needed: {limit.remedy}"
        log.warning(
            "A limit of the process is low", what=limit.name, limit=soft, effect=limit.effect, remedy=limit.remedy
        )
    return _too_few_tasks(workers)


def _raise(limit: int) -> int:
    """Raise the soft limit to the hard one. Returns the soft limit."""
    _, hard = resource.getrlimit(limit)
    with suppress(ValueError, OSError):
        resource.setrlimit(limit, (hard, hard))
    return resource.getrlimit(limit)[0]


def _too_few_tasks(workers: int) -> str | None:
    """The fault in the number of processes and threads, and the remedy; None if there are enough."""
    _raise(resource.RLIMIT_NPROC)
    needed = _OWN_TASKS + _WORKER_TASKS * workers
    started = _startable(needed)
    if started == needed:
        return None
    return (
        f"{started} more processes or threads can be started, and {needed} are needed for {workers} workers: raise the "
        "limit of processes (ulimit -u, LimitNPROC=, TasksMax=, the container runtime's pids limit), or lower WORKERS"
    )


def _startable(wanted: int) -> int:
    """The number of ``wanted`` threads that can run at one time."""
    over = threading.Event()
    threads = [threading.Thread(target=over.wait, daemon=True) for _ in range(wanted)]
    running = []
    stack = threading.stack_size(_SMALL_STACK)
    try:
        for thread in threads:
            thread.start()
            running.append(thread)
    except RuntimeError:  # "can't start new thread"
        pass
    finally:
        threading.stack_size(stack)
        over.set()
        for thread in running:
            thread.join()
    return len(running)
