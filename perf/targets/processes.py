"""Figures from /proc about the processes under test, and the CPUs on which they run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time that all threads of ``pids`` have taken so far, in steps of a clock tick (10 ms)."""
    ticks = 0
    for pid in pids:
        # The name, in parentheses, may contain any character; utime and stime are fields 14 and 15 of proc(5).
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def precise_cpu_seconds(pids: Iterable[int]) -> float:
    """Like `cpu_seconds`, but to the nanosecond: the CPU-time clock of each process (``clock_getcpuclockid(3)``).

    Raises:
        ProcessLookupError: if one of the processes has ended.
    """
    found = 0.0
    for pid in pids:
        try:
            # The kernel's MAKE_PROCESS_CPUCLOCK(pid, CPUCLOCK_SCHED): all threads, without their children.
            found += time.clock_gettime((~pid << 3) | 2)
        except OSError as error:
            raise ProcessLookupError(f"process {pid} has ended") from error
    return found


def scheduled(pid: int) -> tuple[float, float]:
    """Seconds that the main thread of ``pid`` has run so far, and seconds during which it was ready but another thread
    had its CPU (``/proc/PID/schedstat``, proc_pid_schedstat(5))."""
    ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    return ran / 1e9, waited / 1e9


def user_seconds(pids: Iterable[int]) -> float:
    """User time that all threads of ``pids`` have taken so far, in steps of a clock tick."""
    ticks = 0
    for pid in pids:
        ticks += int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    return ticks / _TICKS


def softirq_seconds(cpus: Iterable[int]) -> float:
    """Time that ``cpus`` have spent in soft interrupts (network and others) for any process, in steps of a tick.

    Most kernels also count it in the system time of the process that was interrupted.
    """
    wanted = {f"cpu{cpu}" for cpu in cpus}
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    return sum(int(line[6]) + int(line[7]) for line in lines if line and line[0] in wanted) / _TICKS


def is_alive(pid: int) -> bool:
    """Whether the process exists and has not ended (a zombie has ended)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def resident(pid: int) -> int:
    """The resident octets of the process now."""
    return _status(pid, "VmRSS:")


def peak_resident(pid: int) -> int:
    """The most resident octets since `forget_peak`, or since the start."""
    return _status(pid, "VmHWM:")


def private(pid: int) -> int:
    """Private resident octets of the process: without the snapshot, which all workers share, and other files."""
    return _status(pid, "RssAnon:")


def forget_peak(pid: int) -> None:
    """Reset the peak to the present resident size (``proc(5)``, clear_refs)."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def _status(pid: int, label: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(label))


_CHECKER = b"control_plane.checker_process"
"""Part of the command line of the process that judges rows. That process runs only at times, and serves no client."""


def children(pid: int) -> list[int]:
    """All processes that descend from ``pid``, itself included; without the definition server's checker."""
    found = [pid]
    for parent in found:
        found += [int(child) for child in _children(parent) if not _is_checker(child)]
    return found


def checkers(pid: int) -> list[int]:
    """The processes that judge rows for the master ``pid``: at most one for cycles, and one that works while the server
    serves."""
    return [int(child) for child in _children(pid) if _is_checker(child)]


def _children(pid: int) -> list[str]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [child for task in tasks for child in (task / "children").read_text().split()]


def _is_checker(pid: str) -> bool:
    try:
        return _CHECKER in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False  # the process has ended, which the caller notices


def on_cpu(cpu: int, command: list[str]) -> list[str]:
    """``command``, bound to one CPU from its first instruction on."""
    return ["taskset", "-c", str(cpu), *command]
