"""How many open files the master needs for its own work: the limit is judged at the start, and not by a worker that
cannot be replaced at night.

The admin port takes a fixed share of the limit at most (`admin_port`), and the master accepts no other connections. So
where the limit covers these needs, a worker that dies is replaced, and cycles go on, whatever clients do.
"""

from __future__ import annotations

_OWN = 48
"""Standard streams, event loop, log, listeners, database (4), snapshots being built, served, replaced and restored (8),
the stored file (3), certificates, and what a start of a process needs for a moment (8)."""

_PER_WORKER = 8
"""Control socket, stats page, process and a spare one; twice, because a roll runs a worker beside its successor."""

_ADMIN_SHARE = 8
"""One of so many goes to the admin port at most."""


def descriptors_needed(workers: int) -> int:
    """The least limit of open files for a master with ``workers``."""
    own = _OWN + _PER_WORKER * workers
    return own * _ADMIN_SHARE // (_ADMIN_SHARE - 1)


def too_few(limit: int, workers: int) -> str | None:
    """What is wrong with ``limit``, and what to do; None where it is enough. A negative limit is none."""
    needed = descriptors_needed(workers)
    if limit < 0 or limit >= needed:
        return None
    return (
        f"the limit of open files is {limit}, and {needed} are needed for {workers} workers. "
        "Raise it (ulimit -n, LimitNOFILE=, or the container runtime's nofile), or lower WORKERS."
    )
