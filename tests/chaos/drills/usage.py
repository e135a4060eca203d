"""Memory, descriptors and threads of processes, from /proc."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tests.chaos.drills.model import Usage


def usage(pids: Iterable[int]) -> Usage:
    """The resource usage of all processes together. If a process ends during this, the values that were already read
    are included."""
    memory_bytes = rss = descriptors = threads = processes = 0
    memfds: set[int] = set()
    for pid in pids:
        root = Path(f"/proc/{pid}")
        try:
            memory = _fields(root / "smaps_rollup")
            status = _fields(root / "status")
            found = [path for path in (root / "fd").iterdir() if not _is_reserve(path)]
            memfds |= _memfds(root, found)
        except (FileNotFoundError, ProcessLookupError):
            continue
        memory_bytes += (memory["Pss_Anon"] + memory["Pss_Shmem"]) * 1024
        rss += memory["Rss"] * 1024
        threads += status["Threads"]
        descriptors += len(found)
        processes += 1
    return Usage(memory_bytes, rss, descriptors, threads, len(memfds), processes)


def _is_reserve(descriptor: Path) -> bool:
    """Whether the descriptor belongs to the master's reserve for its own work: descriptors of /dev/null, which are
    closed while it works.
    """
    try:
        return str(descriptor.readlink()) == "/dev/null"
    except (FileNotFoundError, ProcessLookupError):
        return True  # the descriptor was closed since


def _fields(path: Path) -> dict[str, int]:
    """The lines ``Name: number …`` of a file of /proc."""
    found = {}
    for line in path.read_text(errors="replace").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            found[name] = int(words[0])
    return found


def _memfds(root: Path, descriptors: list[Path]) -> set[int]:
    """Inodes of the snapshots that are open or mapped."""
    found = set()
    for path in descriptors:
        try:
            if str(path.readlink()).startswith("/memfd:avap-snapshot"):
                found.add(path.stat().st_ino)
        except (FileNotFoundError, ProcessLookupError):
            continue
    for line in (root / "maps").read_text(errors="replace").splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/memfd:avap-snapshot"):
            found.add(int(words[4]))
    return found
