"""The memory that this process may use.

A container's memory limit is set on its cgroup; the machine's total memory does not show it. Sources: Linux
``admin-guide/cgroup-v2.rst`` (``memory.max``, ``memory.high``) and ``cgroup-v1/memory.rst``
(``memory.limit_in_bytes``).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from definition_server.cpus import cgroup_path, read_text

_LEAST = 64 * 1024 * 1024
_MOST = 2**31 - 1
"""The most octets of a catalogue, because no protobuf implementation serializes a message above 2 GiB."""

_SHARE = 4
"""The granted memory divided by this number is the size of the largest catalogue. A publication needs memory for three
catalogues: the encoded one, the one in shared memory, and the previous one, which workers keep until they have the new
one. The fourth part is for all other memory."""


def default_catalogue_bytes(root: Path = Path("/")) -> int:
    """The largest catalogue for which the granted memory suffices."""
    granted = granted_memory(root)
    return _MOST if granted is None else min(_MOST, max(_LEAST, granted // _SHARE))


def granted_memory(root: Path = Path("/")) -> int | None:
    """Octets granted: the minimum of the machine's memory and of the cgroups' limits; None if neither is known.

    ``root`` is the directory that holds ``proc`` and ``sys``.
    """
    return min([*_limits_v2(root), *_limits_v1(root), *_machine(root)], default=None)


def _limits_v2(root: Path) -> Iterator[int]:
    """The limits of the process's own cgroup and of its ancestors."""
    base = root / "sys/fs/cgroup"
    folder = base / cgroup_path(root, controller="").lstrip("/")
    for level in (folder, *folder.parents):
        for file in ("memory.max", "memory.high"):
            yield from _number(read_text(level / file))
        if level == base:
            break


def _limits_v1(root: Path) -> Iterator[int]:
    own = cgroup_path(root, controller="memory").lstrip("/")
    # Inside a container the controller's mount point is the container's own group, so the group's path is not below it.
    for folder in (root / "sys/fs/cgroup/memory" / own, root / "sys/fs/cgroup/memory"):
        yield from _number(read_text(folder / "memory.limit_in_bytes"))


def _machine(root: Path) -> Iterator[int]:
    for line in read_text(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            yield from (1024 * kibibytes for kibibytes in _number(line.split()[1]))


def _number(text: str) -> Iterator[int]:
    word = text.strip()
    if word.isdecimal() and int(word):
        yield int(word)
