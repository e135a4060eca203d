"""Checks that a test leaves nothing behind: descriptors, threads, child processes."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.polling import until


def open_descriptors(pid: int | str = "self") -> dict[int, str]:
    """Descriptor → the file that it refers to, of this process or another."""
    found = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found[int(entry.name)] = str(entry.readlink())
        except FileNotFoundError:
            continue  # closed since the listing, like the descriptor of the listing itself
    return found


def descriptors_before() -> dict[int, str]:
    """`open_descriptors`, for a later comparison. The garbage collector runs first, because in the middle of a test it
    would close descriptors that an earlier test has left behind.
    """
    gc.collect()
    return open_descriptors()


def child_processes() -> set[int]:
    """Children of this process, zombies included."""
    children: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            children |= {int(pid) for pid in path.read_text().split()}
        except OSError:
            continue  # the thread has just ended
    return children


@contextmanager
def nothing_left(*, c_core: bool = False) -> Iterator[None]:
    """Fail if the block leaves a descriptor, a thread or a child process behind.

    ``c_core``: gRPC's C-core runs in this process. It never frees its descriptors and threads, so only children are
    checked.
    """
    descriptors, threads, children = set(open_descriptors()), set(threading.enumerate()), child_processes()
    yield

    def seen() -> list[object]:
        found: list[object] = [*sorted(child_processes() - children)]
        if not c_core:
            found += [what for number, what in open_descriptors().items() if number not in descriptors]
            found += [thread for thread in threading.enumerate() if thread not in threads]
        return found

    def left() -> list[object]:
        # Objects in reference cycles are collected first. A collection takes long, so it runs only if something seems
        # to be left.
        if seen():
            gc.collect()
        return seen()

    until(lambda: not left(), lambda: f"left behind: {left()}", seconds=10)
