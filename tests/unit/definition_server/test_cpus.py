"""The number of granted CPUs is the minimum of the affinity mask and of the cgroup quotas of all ancestors, of either
version. A fraction is rounded down, but to one CPU at least.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from definition_server.cpus import granted_cpus

V2 = "0::/kubepods/pod1/container\n"
V1 = "12:memory:/docker/c1\n4:cpu,cpuacct:/docker/c1\n1:name=systemd:/docker/c1\n"


@pytest.fixture(autouse=True)
def _sixty_four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 64)


def allow(monkeypatch: pytest.MonkeyPatch, cpus: int) -> None:
    """Let the affinity mask hold ``cpus``."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)) if pid == 0 else set())


def write(root: Path, path: str, text: str) -> None:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="ascii")


def v2(root: Path, quotas: dict[str, str], cgroup: str = V2) -> Path:
    """A unified hierarchy: folder → content of ``cpu.max``."""
    write(root, "proc/self/cgroup", cgroup)
    for folder, text in quotas.items():
        write(root, f"sys/fs/cgroup/{folder}/cpu.max", text)
    return root


def v1(root: Path, quotas: dict[str, tuple[str, str]], cgroup: str = V1) -> Path:
    """The cpu controller of version 1: folder → quota and period."""
    write(root, "proc/self/cgroup", cgroup)
    for folder, (quota, period) in quotas.items():
        write(root, f"sys/fs/cgroup/cpu/{folder}/cpu.cfs_quota_us", quota)
        write(root, f"sys/fs/cgroup/cpu/{folder}/cpu.cfs_period_us", period)
    return root


OWN = "kubepods/pod1/container"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("400000 100000\n", 4),
        ("200000 50000\n", 4),
        ("450000 100000\n", 4),
        ("399999 100000\n", 3),
        ("150000 100000\n", 1),
        ("50000 100000\n", 1),
        ("1000 100000\n", 1),
        ("12800000 100000\n", 64),
        ("max 100000\n", 64),
        ("max\n", 64),
        ("", 64),
    ],
)
def test_the_quota_of_a_unified_cgroup_is_rounded_down_but_never_to_nothing(
    text: str, expected: int, tmp_path: Path
) -> None:
    assert granted_cpus(v2(tmp_path, {OWN: text})) == expected


def test_the_affinity_mask_limits_the_cpus_of_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = v2(tmp_path, {OWN: "400000 100000\n"})
    for allowed, expected in ((1, 1), (3, 3), (4, 4), (5, 4)):
        allow(monkeypatch, allowed)
        assert granted_cpus(root) == expected


@pytest.mark.parametrize(
    "quotas",
    [
        {OWN: "800000 100000", "kubepods/pod1": "300000 100000"},
        {OWN: "max 100000", "kubepods/pod1": "max 100000", "kubepods": "300000 100000"},
        {OWN: "300000 100000", "kubepods": "1600000 100000"},
        {OWN: "800000 100000", "": "300000 100000"},  # the mount itself, as a container's namespace shows it
        {"kubepods": "300000 100000"},  # no quota file at the process's own level
    ],
)
def test_the_smallest_quota_of_all_ancestors_is_used(quotas: dict[str, str], tmp_path: Path) -> None:
    assert granted_cpus(v2(tmp_path, quotas)) == 3


def test_cgroups_that_are_not_ancestors_do_not_count(tmp_path: Path) -> None:
    quotas = {OWN: "800000 100000", "kubepods/pod2": "100000 100000", "kubepods/pod1/other": "100000 100000"}
    assert granted_cpus(v2(tmp_path, quotas)) == 8


def test_a_container_in_its_own_namespace_reads_the_mount(tmp_path: Path) -> None:
    assert granted_cpus(v2(tmp_path, {"": "200000 100000"}, cgroup="0::/\n")) == 2


def test_a_process_moved_out_of_its_namespace_still_reads_the_mount(tmp_path: Path) -> None:
    root = v2(tmp_path, {"": "200000 100000"}, cgroup="0::/../../other\n")
    assert granted_cpus(root) == 2


@pytest.mark.parametrize(
    ("quotas", "expected"),
    [
        ({"docker/c1": ("400000\n", "100000\n")}, 4),
        ({"": ("250000\n", "100000\n")}, 2),  # a container sees its own group at the mount
        ({"docker/c1": ("-1\n", "100000\n")}, 64),
        ({"docker/c1": ("-1\n", "100000\n"), "": ("200000\n", "100000\n")}, 2),
        ({"docker/c1": ("10000\n", "100000\n")}, 1),
        ({}, 64),
    ],
)
def test_the_quota_of_a_version_1_cgroup_counts(
    quotas: dict[str, tuple[str, str]], expected: int, tmp_path: Path
) -> None:
    assert granted_cpus(v1(tmp_path, quotas)) == expected


def test_of_two_hierarchies_the_tighter_one_counts(tmp_path: Path) -> None:
    v1(tmp_path, {"docker/c1": ("300000", "100000")})
    assert granted_cpus(v2(tmp_path, {OWN: "600000 100000"}, cgroup=V1 + V2)) == 3
    assert granted_cpus(v2(tmp_path, {OWN: "200000 100000"}, cgroup=V1 + V2)) == 2


def test_without_any_cgroup_the_affinity_mask_alone_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert granted_cpus(tmp_path) == 64
    allow(monkeypatch, 7)
    assert granted_cpus(tmp_path) == 7


def test_on_this_machine_the_answer_is_within_the_affinity_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 1 <= granted_cpus() <= len(os.sched_getaffinity(0))
