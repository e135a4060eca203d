"""The number of CPUs that this process may use.

A container's CPU limit is a cgroup quota, which ``os.cpu_count()`` and the affinity mask do not show: with
``cpu.max = 400000 100000`` (Kubernetes: 4000m) a 64-core node grants four. Sources: Linux
``admin-guide/cgroup-v2.rst`` (``cpu.max``) and ``scheduler/sched-bwc.rst`` (``cpu.cfs_quota_us``).
"""

from __future__ import annotations

import os
from pathlib import Path


def granted_cpus(root: Path = Path("/")) -> int:
    """CPUs granted: the minimum of the affinity mask and of the cgroup quotas, rounded down; at least 1.

    The number is rounded down because a process group with more busy threads than its quota is throttled for the rest
    of every period, which increases the tail latency. ``root`` is the directory that holds ``proc`` and ``sys``.
    """
    allowed = len(os.sched_getaffinity(0))
    quotas = [quota for quota in (_quota_v2(root), _quota_v1(root)) if quota is not None]
    return max(1, min([allowed, *(int(quota) for quota in quotas)]))


def _quota_v2(root: Path) -> float | None:
    """The smallest ``cpu.max`` of the process's own cgroup and its ancestors, in CPUs."""
    base = root / "sys/fs/cgroup"
    folder = base / cgroup_path(root, controller="").lstrip("/")
    quotas = []
    for level in (folder, *folder.parents):
        words = read_text(level / "cpu.max").split()
        if len(words) == 2 and words[0] != "max":
            quotas.append(int(words[0]) / int(words[1]))
        if level == base:
            break
    return min(quotas, default=None)


def _quota_v1(root: Path) -> float | None:
    own = cgroup_path(root, controller="cpu").lstrip("/")
    # Inside a container the controller's mount point is the container's own group, so the group's path is not below it.
    for folder in (root / "sys/fs/cgroup/cpu" / own, root / "sys/fs/cgroup/cpu"):
        quota, period = (
            read_text(folder / "cpu.cfs_quota_us").strip(),
            read_text(folder / "cpu.cfs_period_us").strip(),
        )
        if quota and period and int(quota) > 0:
            return int(quota) / int(period)
    return None


def cgroup_path(root: Path, controller: str) -> str:
    """The path in ``/proc/self/cgroup`` for ``controller`` ("" is the unified hierarchy)."""
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return path
    return "/"


def read_text(path: Path) -> str:
    """The content of ``path``; empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
