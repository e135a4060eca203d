"""Code of a test inside a real, confined worker, as an attacker could run it after taking over the worker.

Only tests put this directory on ``PYTHONPATH``. On `TRY` a worker tries everything in `_attempts`, and writes a log
line ``Attempts`` with the outcome of each: ``done``, or the name of the errno. When it is confined it writes a log line
``Confined`` with the number of its threads, and after that a log line ``Imported`` for each import.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRY = signal.SIGRTMIN + 1
"""A signal that tests use; workers ignore all signals that a terminal or a service manager sends."""

_libc = ctypes.CDLL(None, use_errno=True)
_NUMBERS = {"x86_64": 0, "aarch64": 1}
SYSTEM_CALLS: dict[str, tuple[int, int]] = {
    # x86-64, aarch64
    "execve": (59, 221), "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "pidfd_open": (434, 434), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "bpf": (321, 280),
    "mount": (165, 40), "umount2": (166, 39), "unshare": (272, 97), "setns": (308, 268), "chroot": (161, 51),
    "pivot_root": (155, 41), "userfaultfd": (323, 282), "perf_event_open": (298, 241), "keyctl": (250, 219),
    "add_key": (248, 217), "kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264), "openat2": (437, 437), "kcmp": (312, 272),
    "process_madvise": (440, 440), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122), "setpriority": (141, 140), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "memfd_create": (319, 279), "inotify_init1": (294, 26), "fanotify_init": (300, 262),
    "personality": (135, 92), "setuid": (105, 146), "setgid": (106, 144), "setrlimit": (160, 164),
    "ftruncate": (77, 46), "chdir": (80, 49), "getdents64": (217, 61), "fchmod": (91, 52), "fchown": (93, 55),
    "fsopen": (430, 430), "fsmount": (432, 432), "open_tree": (428, 428), "move_mount": (429, 429),
    "mount_setattr": (442, 442), "landlock_create_ruleset": (444, 444), "vmsplice": (278, 75), "splice": (275, 76),
}  # fmt: skip


def _tried(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except Exception as error:
        return repr(error)
    return "done"


def _call(number: int) -> Callable[[], object]:
    def attempt() -> None:
        # All arguments are -1, so that without a filter each call fails with another errno, and none does harm.
        if _libc.syscall(ctypes.c_long(number), *[ctypes.c_long(-1)] * 6) < 0:
            raise OSError(ctypes.get_errno(), "")

    return attempt


def _attempts() -> dict[str, Callable[[], object]]:
    master = os.getppid()
    column = _NUMBERS[os.uname().machine]
    stored = os.environ.get("PYTHON_TEST_STORED", "/nonexistent")
    found: dict[str, Callable[[], object]] = {f"call {name}": _call(n[column]) for name, n in SYSTEM_CALLS.items()}
    return found | {
        "open for reading": lambda: Path("/etc/passwd").read_bytes(),
        "open for writing": lambda: Path("/tmp/written-by-a-worker").write_bytes(b"x"),
        "open with O_PATH": lambda: os.open("/etc/passwd", os.O_PATH),
        "open its own stdout's file": lambda: os.open("/proc/self/fd/1", os.O_WRONLY),
        "list a directory": lambda: os.listdir("/"),
        "read the master's environment": lambda: Path(f"/proc/{master}/environ").read_bytes(),
        "read the master's memory": lambda: Path(f"/proc/{master}/mem").open("rb"),
        "list the master's descriptors": lambda: os.listdir(f"/proc/{master}/fd"),
        "read the stored snapshot": lambda: Path(stored).read_bytes(),
        "write the stored snapshot": lambda: Path(stored).write_bytes(b"x"),
        "remove the stored snapshot": lambda: os.unlink(stored),
        "rename the stored snapshot": lambda: os.rename(stored, f"{stored}.moved"),
        "change the stored snapshot's mode": lambda: os.chmod(stored, 0o777),
        "change the stored snapshot's times": lambda: os.utime(stored),
        "truncate the stored snapshot": lambda: os.truncate(stored, 0),
        "link the stored snapshot": lambda: os.link(stored, f"{stored}.linked"),
        "make a symbolic link": lambda: os.symlink("/etc/passwd", "/tmp/linked-by-a-worker"),
        "make a directory": lambda: os.mkdir("/tmp/made-by-a-worker"),
        "make a FIFO": lambda: os.mkfifo("/tmp/fifo-by-a-worker"),
        "read a link": lambda: os.readlink("/proc/self/exe"),
        "look at a path": lambda: os.stat("/etc/passwd"),
        "make a TCP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM),
        "make an IPv6 socket": lambda: socket.socket(socket.AF_INET6, socket.SOCK_STREAM),
        "make a UDP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        "make a Unix socket": lambda: socket.socket(socket.AF_UNIX, socket.SOCK_STREAM),
        "make a netlink socket": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        "connect": _connect,
        "connect by sending": _connect_by_sending,
        "listen": lambda: _with_socketpair(lambda end: end.listen()),
        "bind": lambda: _with_socketpair(lambda end: end.bind("\0bound-by-a-worker")),
        "signal the master": lambda: os.kill(master, signal.SIGHUP),
        "probe the master": lambda: os.kill(master, 0),
        "signal the process group": lambda: os.kill(0, signal.SIGHUP),
        "signal everybody": lambda: os.kill(-1, 0),
        "signal init": lambda: os.kill(1, 0),
        "fork": os.fork,
        "spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}),
        "exec": lambda: os.execv("/bin/true", ["true"]),
        "become readable again": lambda: _raised(_libc.prctl(4, 1, 0, 0, 0)),
        "limit the master's memory": lambda: _raised(_libc.prlimit(master, 9, None, None)),
        "have signals sent to the master": lambda: _own_signals(master),
    }


def _raised(result: int) -> None:
    if result < 0:
        raise OSError(ctypes.get_errno(), "")


def _own_signals(master: int) -> None:
    with socket.socketpair()[0] as end:
        fcntl.fcntl(end, fcntl.F_SETOWN, master)


def _with_socketpair(attempt: Callable[[socket.socket], object]) -> None:
    first, second = socket.socketpair()
    with first, second:
        attempt(first)


def _connect() -> None:
    _with_socketpair(lambda end: end.connect("\0anything"))


def _connect_by_sending() -> None:
    _with_socketpair(lambda end: end.sendto(b"x", socket.MSG_FASTOPEN, "\0anything"))


def _report(number: int, frame: object) -> None:
    # A process that is not confined would do all of this.
    outcomes = {name: _tried(attempt) for name, attempt in _ATTEMPTS.items()} if _CONFINED else {}
    try:
        raise RuntimeError("an exception with a traceback")
    except RuntimeError as error:
        sys.modules["definition_server.observability.logs"].get_logger(__name__).error("Logged", exc_info=error)
    _write({"msg": "Attempts", "pid": os.getpid(), "outcomes": outcomes})
    with contextlib.suppress(ImportError):
        importlib.import_module("colorsys")  # an import that the log must show


def _write(line: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        os.write(1, json.dumps(line).encode() + b"\n")


def _watch_imports() -> None:
    class Watcher:
        """The first finder that is called for each module that is not loaded. It finds none."""

        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> None:
            if _CONFINED:
                _write({"msg": "Imported", "name": name})

    sys.meta_path.insert(0, Watcher)
    from definition_server.jail.confinement import Jail

    enter = Jail.enter

    def enter_and_note(self: Any) -> list[str]:
        threads = len(os.listdir("/proc/self/task"))
        signal.signal(TRY, _report)  # a worker ignores this signal from its start on
        failures = enter(self)
        _CONFINED.append(True)
        _write({"msg": "Confined", "threads": threads})
        return failures

    Jail.enter = enter_and_note  # type: ignore[method-assign]  # to note it


_CONFINED: list[bool] = []
_ATTEMPTS: dict[str, Callable[[], object]] = {}
if "definition_server.data_plane.worker" in " ".join(sys.orig_argv):
    _ATTEMPTS = _attempts()
    _watch_imports()
