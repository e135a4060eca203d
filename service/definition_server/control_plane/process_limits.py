"""The kernel's limits of a process (getrlimit(2)) beside that of open files: raised, judged and named at the start.

The command line, a service manager or a container runtime sets them, often for all that it starts. Each limit here ends
or maims a server that lasts: the size of files counts for memory without a name too (memfd_create(2)), in which
snapshots go to the workers; CPU time ends the process for good; address space keeps the checker from compiling rows. A
soft limit is raised to the hard one, which needs no right. What is left is refused where nothing could be served, and
logged else.
"""

from __future__ import annotations

import resource
from contextlib import suppress
from dataclasses import dataclass

from definition_server.observability.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Limit:
    name: str
    number: int
    enough: int
    """From this value on nothing is said."""
    least: int
    """Below this the server cannot serve at all."""
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
        effect="the kernel ends each process of the server that has used so many seconds",
        remedy="raise it (ulimit -t unlimited, LimitCPU=infinity)",
    ),
    _Limit(
        "address space",
        resource.RLIMIT_AS,
        enough=4096 * _MIB,
        least=0,
        effect="rows may not be checked, and larger catalogues not be published",
        remedy="raise it (ulimit -v unlimited, LimitAS=infinity) and limit the memory of the container or unit instead",
    ),
)


def raise_process_limits() -> str | None:
    """Raise each soft limit to its hard one, and log what is still low. Returns why the server cannot start; None if it
    can."""
    for limit in _LIMITS:
        _, hard = resource.getrlimit(limit.number)
        with suppress(ValueError, OSError):
            resource.setrlimit(limit.number, (hard, hard))
        soft = resource.getrlimit(limit.number)[0]
        if soft == resource.RLIM_INFINITY or soft >= limit.enough:
            continue
        if soft < limit.least:
            return f"the limit of the {limit.name} is {soft}, and {limit.least} are needed: {limit.remedy}"
        log.warning(
            "A limit of the process is low", what=limit.name, limit=soft, effect=limit.effect, remedy=limit.remedy
        )
    return None
