"""Open files for the master's own work: the limit is judged at the start, and some of them are reserved.

With a limit below `descriptors_needed` the server does not start; otherwise the low limit would be noticed only when a
worker cannot be replaced. The admin port uses at most a fixed share of the limit (`admin_port`), and the master accepts
no other connections. So clients cannot use up the descriptors that the master needs.

`DescriptorReserve` is for needs that no calculation foresees, such as a leak in a library. It holds descriptors of
``/dev/null``, and closes them while the master starts a process, runs a cycle or reads its files. It does not help
against a leak that takes the freed descriptors each time, nor against a limit that is lowered below the numbers of the
open descriptors. In these cases cycles fail, and the served catalogue stays.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from definition_server.observability.logs import get_logger

log = get_logger(__name__)

RESERVED = 24
"""The most descriptors that the master's work opens at one time: the start of a process (7: control socket 2, stats
page, its standard input, asyncio's pipe 2, pidfd), and at the same time a cycle: a connection to the database (4), a
snapshot built (2), its file and directory (3). The rest is room for a second worker that starts."""

_HELD = 24
"""Descriptors that an idle master has open: 16 for standard streams, event loops, log, listeners, database, and the
snapshots that are served, replaced and restored. With TLS, 3 more for the last good certificate, key and authorities,
and another 3 while these are replaced.
"""

_PER_WORKER = 8
"""A worker process needs three descriptors (control socket, stats page, process) and a spare one. A worker number needs
twice as many, because in a roll a worker and its successor run at the same time.
"""

_ADMIN_SHARE = 8
"""The admin port gets at most this part of the descriptors: one of so many."""


def descriptors_needed(workers: int) -> int:
    """The lowest limit of open files that suffices for a master with ``workers`` workers."""
    own = _HELD + RESERVED + _PER_WORKER * workers
    return own * _ADMIN_SHARE // (_ADMIN_SHARE - 1)


def too_few(limit: int, workers: int) -> str | None:
    """The fault of ``limit`` and its remedy; None if it suffices. A negative limit means that there is no limit."""
    needed = descriptors_needed(workers)
    if limit < 0 or limit >= needed:
        return None
    return (
        f"the limit of open files is {limit}, and {needed} are needed for {workers} workers. "
        "Raise it (ulimit -n, LimitNOFILE=, or the container runtime's nofile), or lower WORKERS."
    )


class DescriptorReserve:
    """Descriptors that no other code can take. May be used in one thread only."""

    def __init__(self, count: int = RESERVED) -> None:
        """Takes ``count`` descriptors, or fewer if no more are free."""
        self._count = count
        self._held: list[int] = []
        self._borrowers = 0
        self._complete = True
        self._fill()

    @contextmanager
    def lent(self) -> Iterator[None]:
        """A context in which the reserved descriptors are free for other code. Several may be entered at the same
        time.
        """
        self._borrowers += 1
        self._release()
        try:
            yield
        finally:
            self._borrowers -= 1
            if not self._borrowers:
                self._fill()

    def close(self) -> None:
        """Free the descriptors for good."""
        self._count = 0
        self._release()

    def _release(self) -> None:
        while self._held:
            os.close(self._held.pop())

    def _fill(self) -> None:
        with suppress(OSError):
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY))
        complete = len(self._held) == self._count
        if complete is self._complete:
            return
        self._complete = complete
        if complete:
            log.info("The reserve of open files is complete again")
        else:
            log.error(
                "Open files run out: the reserve for workers and cycles is not complete",
                reserved=len(self._held),
                wanted=self._count,
                remedy="list the master's open files (ls -l /proc/PID/fd); raise the limit of open files (nofile)",
            )
