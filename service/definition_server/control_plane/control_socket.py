"""The Unix socket of the operator's commands: it replaces the file of a master that has ended, never the file of a
running master.

The file is made with mode 0600, whatever the umask is, so the kernel lets only this account connect (and root). When a
peer connects, its uid is checked too (SO_PEERCRED, unix(7)), because the mode may have been changed since.

A file on which no process listens was left behind by a killed master, and is replaced. A file on which a process
listens belongs to another instance, and is not changed. If two instances start at the same moment, a lock on the
directory makes one wait for the other. The lock leaves no file. Every function here blocks; run it in a thread.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from grpc_h2 import BACKLOG

LONGEST_PATH = 107
"""The most octets of the path: ``sun_path`` has 108, and the last one is a zero (unix(7))."""
_MODE = 0o600
_PROBE_SECONDS = 1.0
_LOCK_SECONDS = 2.0
_LOCK_PAUSE_SECONDS = 0.02
_PEER_CREDENTIALS = struct.Struct("3i")
"""``struct ucred``: pid, uid, gid (unix(7))."""


class SocketUnusable(Exception):
    """The socket cannot be opened. ``remedy`` is advice for the operator."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy

    @staticmethod
    def because_of(error: OSError, path: Path) -> SocketUnusable:
        """The kernel's refusal to open or serve ``path``."""
        return SocketUnusable(f"{path}: {error.strerror or error}", _remedy(error))


@dataclass(frozen=True, slots=True)
class ControlSocket:
    """A listening socket, and the file that leads to it."""

    path: Path
    listening: socket.socket
    file: tuple[int, int]
    """Device and inode."""

    @property
    def in_place(self) -> bool:
        """Whether ``path`` still leads to this socket."""
        return _identity(self.path) == self.file

    def remove(self) -> None:
        """Remove the file, unless another one has taken its place."""
        with suppress(OSError):
            if self.in_place:
                self.path.unlink()


def open_socket(path: Path) -> ControlSocket:
    """Listen on ``path``. Makes its directory.

    Raises:
        SocketUnusable: if that is not possible.
    """
    length = len(os.fsencode(path))
    if length > LONGEST_PATH:
        raise SocketUnusable(
            f"{path} has {length} octets; the path of a Unix socket has at most {LONGEST_PATH}",
            "set CONTROL_SOCKET to a shorter path",
        )
    try:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    except OSError as error:
        raise SocketUnusable.because_of(error, path) from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file gets the mode of the socket. The umask cannot be used, because it belongs to the whole process.
        os.fchmod(listening.fileno(), _MODE)
        with _locked(path.parent):
            _make_room(path)
            listening.bind(str(path))
            listening.listen(BACKLOG)
            file = _identity(path)
        if file is None:
            raise SocketUnusable(f"{path} was removed as soon as it was made", "find out which program removes it")
    except OSError as error:
        listening.close()
        raise SocketUnusable.because_of(error, path) from error
    except BaseException:
        listening.close()
        raise
    return ControlSocket(path, listening, file)


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free space on that disk, or set CONTROL_SOCKET to a path on another one"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n, LimitNOFILE=)"
    if error.errno in (errno.ENOMEM, errno.ENOBUFS):
        return "raise the memory limit"
    return "set CONTROL_SOCKET to a path in a directory that the server may write to"


def _make_room(path: Path) -> None:
    """Remove a socket on which no process listens.

    Raises:
        SocketUnusable: if ``path`` is something else, or in use.
        OSError: if it cannot be removed.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise SocketUnusable(f"{path} exists already, and is not a socket", "move it away, or set CONTROL_SOCKET")
    if _somebody_listens(path):
        raise SocketUnusable(
            f"another instance listens on {path}",
            "give each instance a SNAPSHOT_DIR or a CONTROL_SOCKET of its own; this one takes over when the other ends",
        )
    path.unlink(missing_ok=True)


def _somebody_listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:
            return True  # the socket's backlog is full, or it belongs to another account: we must not remove it
    return True


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a lock on ``directory``. If its file system has no locks, or the lock is not free in time, continue without
    it.
    """
    number = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() < deadline:
                    time.sleep(_LOCK_PAUSE_SECONDS)
                    continue
            except OSError:
                pass  # a file system without locks
            break
        yield
    finally:
        os.close(number)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def stranger(connection: socket.socket, workers: Collection[int] = ()) -> str | None:
    """The reason why a peer may not give commands; None if the peer runs under this account or as root, and is not one
    of ``workers``.

    A worker in the jail cannot connect at all. A worker without a jail has our uid, so only its process id shows that
    it must be refused.
    """
    octets = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, _ = _PEER_CREDENTIALS.unpack(octets)
    if pid in workers:
        return f"process {pid} is a worker, which may not control its server"
    if uid in (0, os.geteuid()):
        return None
    return f"uid {uid} (process {pid}) may not control a server of uid {os.geteuid()}"
