"""Landlock (landlock(7)): refuses to open, make, change or remove files, and to make TCP connections.

The ABI version of the kernel determines the accesses that the kernel can refuse; the refusal of all of them is
requested. Open files, and descriptors that arrive later over a socket, stay usable. Unnamed memory (memfd_create(2))
can be opened through ``/proc/self/fd``, because it is not in a mounted file system. A restriction applies to the
calling thread and the threads and processes that it starts afterwards, so it must be made before the first other
thread.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable

from definition_server.jail.kernel import PR_SET_NO_NEW_PRIVS, call, prctl

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_RULE_PATH_BENEATH, _RULE_NET_PORT = 1, 2

_FILES_1 = (1 << 13) - 1
_READ_FILE = 1 << 2
_REFER, _TRUNCATE, _IOCTL_DEV = 1 << 13, 1 << 14, 1 << 15
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1
_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1 << 0, 1 << 1


class _Ruleset(ctypes.Structure):
    """``struct landlock_ruleset_attr``."""

    _fields_ = (("files", ctypes.c_uint64), ("net", ctypes.c_uint64), ("scoped", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    """``struct landlock_path_beneath_attr``."""

    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("access", ctypes.c_uint64), ("parent", ctypes.c_int32))


class _NetPort(ctypes.Structure):
    """``struct landlock_net_port_attr``."""

    _fields_ = (("access", ctypes.c_uint64), ("port", ctypes.c_uint64))


def abi_version() -> int:
    """The ABI version of the running kernel; 0 if it has no Landlock, or a container's filter refuses it."""
    try:
        return call(_CREATE_RULESET, 0, 0, _ASK_VERSION)
    except OSError:
        return 0


def refused_by(abi: int) -> tuple[int, int, int]:
    """The accesses that an ABI version can refuse: file accesses, network accesses, scopes; as bits of
    ``linux/landlock.h``."""
    files = _FILES_1
    if abi >= 2:
        files |= _REFER
    if abi >= 3:
        files |= _TRUNCATE
    if abi >= 5:
        files |= _IOCTL_DEV
    net = _BIND_TCP | _CONNECT_TCP if abi >= 4 else 0
    scopes = _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if abi >= 6 else 0
    return files, net, scopes


def restrict(abi: int, *, bind_ports: Iterable[int] = (), readable: Iterable[str] = ()) -> None:
    """Restrict the calling thread for good. It may still bind TCP sockets to ``bind_ports`` and read the files
    ``readable``.

    Raises:
        OSError: if the kernel refuses the restriction.
    """
    files, net, scopes = refused_by(abi)
    # A kernel refuses a structure that is longer than its own if the rest is not zero, so each version gets its own
    # length.
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    ruleset = call(_CREATE_RULESET, ctypes.byref(_Ruleset(files, net, scopes)), size, 0)
    try:
        for path in readable:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, ctypes.byref(_PathBeneath(_READ_FILE, parent)), 0)
            finally:
                os.close(parent)
        for port in bind_ports if net else ():
            call(_ADD_RULE, ruleset, _RULE_NET_PORT, ctypes.byref(_NetPort(_BIND_TCP, port)), 0)
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        call(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
