"""The granted memory is the minimum of the machine's memory and of the limits of cgroups, of either version. The
largest catalogue may take a quarter of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from definition_server.memory_limit import default_catalogue_bytes, granted_memory

MIB = 1024 * 1024
GIB = 1024 * MIB


def machine(root: Path, cgroup: str = "0::/pods/own\n", **files: str) -> Path:
    """A directory with ``proc`` and ``sys``; names in ``files`` have ``__`` for ``/``."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal:       {16 * GIB // 1024} kB\nMemFree: 1 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        folder, _, file = name.replace("__", "/").rpartition("/")
        path = root / "sys/fs/cgroup" / folder / file.replace("_", ".", 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "granted"),
    [
        ({}, 16 * GIB),
        ({"pods__own__memory_max": "max\n"}, 16 * GIB),
        ({"pods__own__memory_max": f"{GIB}\n"}, GIB),
        ({"pods__own__memory_max": f"{GIB}\n", "pods__memory_max": f"{GIB // 2}\n"}, GIB // 2),
        ({"pods__own__memory_max": f"{GIB}\n", "pods__own__memory_high": f"{GIB // 4}\n"}, GIB // 4),
        ({"pods__own__memory_max": f"{64 * GIB}\n"}, 16 * GIB),
        ({"memory_max": "nonsense\n"}, 16 * GIB),
    ],
)
def test_the_smallest_limit_counts(tmp_path: Path, files: dict[str, str], granted: int) -> None:
    assert granted_memory(machine(tmp_path, **files)) == granted


@pytest.mark.parametrize("folder", ["memory/docker/c1", "memory"])
def test_limits_of_cgroups_version_1_count_inside_and_outside_a_container(tmp_path: Path, folder: str) -> None:
    root = machine(tmp_path, "12:memory:/docker/c1\n4:cpu,cpuacct:/docker/c1\n")
    path = root / "sys/fs/cgroup" / folder / "memory.limit_in_bytes"
    path.parent.mkdir(parents=True)
    path.write_text(f"{GIB}\n")
    assert granted_memory(root) == GIB


def test_a_machine_without_these_files_has_an_unknown_memory_limit(tmp_path: Path) -> None:
    assert granted_memory(tmp_path) is None
    assert default_catalogue_bytes(tmp_path) == 2**31 - 1


@pytest.mark.parametrize(
    ("granted", "catalogue"), [(GIB, 256 * MIB), (100 * MIB, 64 * MIB), (16 * GIB, 2**31 - 1), (64 * GIB, 2**31 - 1)]
)
def test_the_largest_catalogue_is_a_quarter_within_bounds(tmp_path: Path, granted: int, catalogue: int) -> None:
    assert default_catalogue_bytes(machine(tmp_path, pods__own__memory_max=f"{granted}\n")) == catalogue
