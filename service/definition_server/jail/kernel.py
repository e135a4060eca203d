"""System calls for which Python has no function, by ctypes."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import NamedTuple

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

PR_GET_DUMPABLE, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 3, 4, 38


class Architecture(NamedTuple):
    """The numbers of a processor architecture that seccomp needs (``linux/audit.h``, ``asm/unistd.h``)."""

    name: str
    audit: int
    """``AUDIT_ARCH_…``: the value that the kernel reports with every system call."""
    seccomp: int
    """The number of ``seccomp(2)``."""


X86_64 = Architecture("x86_64", 0xC000003E, 317)
AARCH64 = Architecture("aarch64", 0xC00000B7, 277)


def architecture() -> Architecture | None:
    """The architecture of this process; None if there are no tables for it (also for a 32-bit interpreter)."""
    if sys.maxsize < 2**32 or sys.platform != "linux":
        return None
    return {"x86_64": X86_64, "aarch64": AARCH64, "arm64": AARCH64}.get(os.uname().machine)


def call(number: int, *arguments: object) -> int:
    """``syscall(2)``. Integers are passed as 64-bit words.

    Raises:
        OSError: with the kernel's errno.
    """
    words = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def prctl(option: int, value: int = 0) -> int:
    """``prctl(2)`` with one value.

    Raises:
        OSError: with the kernel's errno.
    """
    rest = [ctypes.c_ulong(0)] * 3
    result = int(_libc.prctl(ctypes.c_int(option), ctypes.c_ulong(value), *rest))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def hide_process() -> None:
    """Hide memory, environment and descriptors of this process from other processes of its user, and disable core
    dumps.

    ``PR_SET_DUMPABLE`` 0 (prctl(2)): the files of ``/proc/PID`` belong to root, and ptrace(2) is refused to a process
    without ``CAP_SYS_PTRACE``. The setting lasts until the next ``exec``.
    """
    prctl(PR_SET_DUMPABLE, 0)
