"""Take memory, CPU, descriptors, disk or time away from processes. Each change is undone when its context ends.

Some changes need root or writable control groups of the kernel; otherwise `Unavailable` is raised.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

_CGROUPS = Path("/sys/fs/cgroup")
_NAME = "definition-server-drill"
_PERIOD_MICROSECONDS = 100_000
"""CFS distributes CPU time per period: the kernel's default, which container runtimes use."""
_LEAST_QUOTA_MICROSECONDS = 1000

_FAKETIME = "*/faketime/libfaketime.so.1"
_FAKETIME_HOMES = (Path("/usr/lib"), Path("/usr/local/lib"))
_SHARED_MEMORY = Path("/dev/shm")
_SITE = Path(__file__).parent / "broken_process"


class Unavailable(Exception):
    """This machine or this user cannot make the fault; the message names the missing requirement."""


Need = Callable[[], object]
"""Raises `Unavailable` if a fault cannot be made here."""


def have(need: Need | None) -> None:
    """If a requirement of a fault is missing, skip the test, or fail it in CI (``CI`` is set)."""
    if need is None:
        return
    try:
        need()
    except Unavailable as error:
        if os.environ.get("CI"):
            pytest.fail(f"this drill cannot run here: {error}", pytrace=False)
        pytest.skip(f"this drill cannot run here: {error}")


# -- control groups ----------------------------------------------------------------------------------------------------


class ControlGroup:
    """A control group of ours under one controller of cgroup v1 (``/sys/fs/cgroup/<controller>``).

    Only version 1 is supported: the machine on which these drills were written has no other version, so version 2 is
    untested.
    """

    def __init__(self, controller: str) -> None:
        """Create the group.

        Raises: Unavailable: there is no such controller, or it cannot be written.
        """
        self._parent = _CGROUPS / controller
        self.path = self._parent / f"{_NAME}-{os.getpid()}"
        if not (self._parent / "cgroup.clone_children").exists():
            raise Unavailable(f"no cgroup v1 controller {controller} at {self._parent}")
        try:
            self.path.mkdir()
        except OSError as error:
            raise Unavailable(
                f"{self.path} cannot be made ({error.strerror}): needs root and a writable cgroup"
            ) from None

    def set(self, name: str, value: int) -> None:
        """Write one of the group's files."""
        (self.path / name).write_text(str(value))

    def counter(self, file: str, name: str) -> int:
        """The number under ``name`` in one of the group's files."""
        for line in (self.path / file).read_text().splitlines():
            found, _, value = line.partition(" ")
            if found == name:
                return int(value)
        raise KeyError(f"{name} in {self.path / file}")

    def take(self, pids: Iterable[int]) -> None:
        """Move processes into the group. Memory that they already hold stays charged to their old group."""
        for pid in pids:
            with suppress(ProcessLookupError):
                (self.path / "cgroup.procs").write_text(str(pid))

    def close(self) -> None:
        """Move the group's processes to its parent, and remove the group."""
        for pid in (self.path / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (self._parent / "cgroup.procs").write_text(pid)
        self.path.rmdir()


def needs_cgroup(controller: str) -> Need:
    """Check that the controller exists and may be used."""
    return lambda: ControlGroup(controller).close()


@contextmanager
def memory_refused(pid: int) -> Iterator[ControlGroup]:
    """Give ``pid`` no more pages: the next one that it touches triggers the kernel's OOM killer.

    Raises:
        Unavailable: see `ControlGroup`.
    """
    group = ControlGroup("memory")
    try:
        group.set("memory.limit_in_bytes", 0)
        group.take([pid])
        yield group
    finally:
        group.close()


@contextmanager
def cpu_limited(pids: Sequence[int], cpus: float) -> Iterator[ControlGroup]:
    """Limit the processes to ``cpus`` CPUs together, like a container with that limit.

    Raises:
        Unavailable: see `ControlGroup`.
    """
    group = ControlGroup("cpu")
    try:
        group.set("cpu.cfs_period_us", _PERIOD_MICROSECONDS)
        group.set("cpu.cfs_quota_us", max(_LEAST_QUOTA_MICROSECONDS, int(cpus * _PERIOD_MICROSECONDS)))
        group.take(pids)
        yield group
    finally:
        group.close()


@contextmanager
def no_further_threads(pids: Iterable[int]) -> Iterator[ControlGroup]:
    """The processes can start neither a thread nor a process, as when a container's limit of processes is reached.

    Raises:
        Unavailable: see `ControlGroup`.
    """
    group = ControlGroup("pids")
    try:
        group.take(pids)
        group.set("pids.max", 0)
        yield group
    finally:
        group.close()


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU time that the processes have used so far."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


# -- resource limits ---------------------------------------------------------------------------------------------------


@contextmanager
def limited(pids: Sequence[int], what: int, soft: int) -> Iterator[None]:
    """Set the soft limit ``what`` (``resource.RLIMIT_…``) of the processes to ``soft``; ended processes are skipped."""
    before: dict[int, tuple[int, int]] = {}
    try:
        for pid in pids:
            with suppress(ProcessLookupError):
                before[pid] = found = resource.prlimit(pid, what)
                resource.prlimit(pid, what, (soft, found[1]))
        yield
    finally:
        for pid, found in before.items():
            with suppress(ProcessLookupError):
                resource.prlimit(pid, what, found)


def address_space(pid: int) -> int:
    """Octets of address space that a process has."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


# -- disk --------------------------------------------------------------------------------------------------------------


@contextmanager
def mounted_over(directory: Path, options: str) -> Iterator[None]:
    """Mount a small file system on ``directory``.

    Args:
        directory: exists.
        options: for ``mount -t tmpfs -o``.

    Raises: Unavailable: this user may not mount.
    """
    command = ["mount", "-t", "tmpfs", "-o", options, "definition-server-drill", str(directory)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    if made.returncode:
        raise Unavailable(f"a disk drill mounts a tmpfs, which needs root: {made.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


def needs_mount() -> None:
    """Raises `Unavailable` if this user may not mount."""
    with TemporaryDirectory() as directory, mounted_over(Path(directory), "size=4k"):
        pass


def fill(path: Path) -> None:
    """Write to ``path`` until its file system is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(b"\0" * 4096)


# -- clock -------------------------------------------------------------------------------------------------------------


def faketime() -> Path:
    """Path of the library. Raises `Unavailable` without it."""
    for home in _FAKETIME_HOMES:
        for path in home.glob(_FAKETIME):
            return path
    raise Unavailable("libfaketime is missing (Debian package libfaketime)")


class Clock:
    """A settable wall clock for processes; monotonic clocks are not affected, as with an NTP step.

    The machine's clock is not changed, because other programs use it. libfaketime (Debian package) reads the offset
    from a file. Its variables would not reach the workers, whose environment is scrubbed, so ``sitecustomize`` of
    ``broken_process`` restarts every interpreter under the library. A context manager: it removes what the library
    leaves in shared memory.
    """

    def __init__(self, file: Path) -> None:
        """``file``: the file for the offset.

        Raises: Unavailable: libfaketime is missing.
        """
        self._file = file
        self._shared_before: set[Path] = set()
        self.settings = {
            "PYTHONPATH": str(_SITE),
            "PYTHON_DRILL_CLOCK": str(file),
            "PYTHON_DRILL_CLOCK_LIBRARY": str(faketime()),
        }
        """Variables for the server's environment."""
        self.jump(0)

    def __enter__(self) -> Clock:
        self._shared_before = _left_by_the_library()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for path in _left_by_the_library() - self._shared_before:
            path.unlink(missing_ok=True)

    def jump(self, seconds: int) -> None:
        """Set the offset of the clock; the library reads it once a second."""
        set_clock(self._file, seconds)


def set_clock(file: Path, seconds: int) -> None:
    """Write the offset for processes that use the clock of ``file``."""
    new = file.with_suffix(".new")
    new.write_text(f"{seconds:+d}\n")
    new.replace(file)


def _left_by_the_library() -> set[Path]:
    return {*_SHARED_MEMORY.glob("faketime_shm_*"), *_SHARED_MEMORY.glob("sem.faketime_sem_*")}
