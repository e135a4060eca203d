"""The last-known-good snapshot on disk: it is written as a whole or not at all, and is used only if it is undamaged and
was written by this server.

A program that can write the file decides what the server serves, and signs, while the database is down. So the file is
read only if it is a regular file of this user to which no other user may write. With AVAP_INTERNAL_KEY the file must
also carry our MAC: ``snapshot`` · ``b"AVAPLKG1"`` · HMAC-SHA-256 over the snapshot's footer, which holds the digest of
all the rest. The key of the MAC is derived from AVAP_INTERNAL_KEY. A file that is refused for one of these reasons is
not overwritten: the next publication moves it aside.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from mmap import mmap
from pathlib import Path
from tempfile import mkdtemp, mkstemp
from typing import BinaryIO

from definition_server.catalog.layout import FOOTER_SIZE, Footer, SnapshotError
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import create_sealed, map_sealed
from definition_server.observability.reasons import Reason

FILE_NAME = "last-known-good.avapsnap"

REFUSED_SUFFIX = ".refused"
"""The suffix of a file that somebody else may have written and that was moved aside."""
_MAC_MAGIC = b"AVAPLKG1"
_MAC_SIZE = len(_MAC_MAGIC) + 32
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NOCTTY | os.O_NONBLOCK
"""Flags to open a file without following a symbolic link, and without waiting for the writer of a FIFO."""

_TEMPORARY_SUFFIX = ".tmp"
_ABANDONED_SECONDS = 3600.0
_CHUNK = 8 * 1024 * 1024


class StoreError(Exception):
    """The last-known-good snapshot cannot be stored or loaded. The message is for the log, and names the file."""

    def __init__(self, message: str, reason: Reason = Reason.SNAPSHOT_UNUSABLE) -> None:
        super().__init__(message)
        self.reason = reason


class NotOurs(StoreError):
    """The file may have been written by another user or program, so it is not used."""


class OwnFile:
    """A file that only this server writes, as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._not_ours = False

    def _replace(self, write: Callable[[BinaryIO], object]) -> None:
        """Replace the file by one that ``write`` fills, or leave it as it is.

        Temporary file, ``fsync``, rename, ``fsync`` of the directory: a reader finds the old file or the new one, even
        after a power failure. Blocks; run it in a thread.

        Raises:
            StoreError: if that fails. The old file is then unchanged.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_temporaries()
            # The name is unique. Only the owner can read the file, because it holds the code of a whole platform.
            number, name = mkstemp(_TEMPORARY_SUFFIX, f"{self.path.stem}.", self.path.parent)
            temporary = Path(name)
            try:
                with os.fdopen(number, "wb") as file:
                    write(file)
                    file.flush()
                    os.fsync(number)
                make_room(self.path, refused=self._not_ours)
                self._not_ours = False
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
            directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise StoreError(f"cannot write {self.path}: {error.strerror}", Reason.DISK_FAILED) from error

    def _remove_temporaries(self) -> None:
        """Remove the files of a writer that was killed. A recent file stays, because another server may be writing it
        to the same directory.
        """
        for temporary in self.path.parent.glob(f"{self.path.stem}.*{_TEMPORARY_SUFFIX}"):
            with suppress(OSError):  # the file is gone, a directory, or of another account: storing matters more
                if time.time() - temporary.lstat().st_mtime > _ABANDONED_SECONDS:
                    temporary.unlink()

    def _refused(self, reason: str) -> NotOurs:
        self._not_ours = True
        return NotOurs(f"{self.path} is not used: {reason}")

    def _check_owner(self, found: os.stat_result) -> None:
        fault = fault_of_owner(found)
        if fault is not None:
            raise self._refused(fault)


class SnapshotStore(OwnFile):
    """Keeps one snapshot in ``directory``, in the file ``name``."""

    def __init__(self, directory: Path, name: str = FILE_NAME) -> None:
        super().__init__(directory / name)

    def save(self, descriptor: int, signer: Signer | None = None) -> None:
        """Replace the stored snapshot by the sealed memory behind ``descriptor``, with the MAC of ``signer``. Blocks;
        run it in a thread.

        Raises:
            StoreError: if that fails. The old file is then unchanged.
        """

        def write(file: BinaryIO) -> None:
            _copy(descriptor, file.fileno())
            if signer is not None:
                footer = os.pread(descriptor, FOOTER_SIZE, os.fstat(descriptor).st_size - FOOTER_SIZE)
                # os.write is not used: when the disk becomes full, it may write only a part of the MAC, and only its
                # result would show that.
                file.write(_MAC_MAGIC + signer.file_mac(footer))

        self._replace(write)

    def load(self, signer: Signer | None = None) -> tuple[Snapshot, int] | None:
        """The stored snapshot, copied to sealed memory and then verified; with the memory's descriptor.

        Args:
            signer: If given, the file must have a MAC that this signer accepts.

        Returns:
            None if there is no file. The caller closes the descriptor.

        Raises:
            NotOurs: if somebody else may have written the file.
            StoreError: if the file cannot be read or a check fails.
        """
        try:
            number = os.open(self.path, OPEN_FLAGS)
            try:
                self._check_owner(os.fstat(number))
                _footer(number)  # checked before the copy, because a file of another kind may have any size
                descriptor, mac = _read(number)
            finally:
                os.close(number)
        except FileNotFoundError:
            return None
        except SnapshotError as error:
            raise StoreError(f"{self.path} is not usable: {error}") from error
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise self._refused("it is a symbolic link") from None
            raise StoreError(f"cannot read {self.path}: {error.strerror}", Reason.DISK_FAILED) from error
        try:
            # The copy is verified, and not the file: so the octets that were checked are those that will be served,
            # even if the file is written meanwhile.
            snapshot = Snapshot(map_sealed(descriptor))
            snapshot.verify()
            self._check_mac(snapshot, mac, signer)
        except (SnapshotError, OSError, ValueError) as error:
            os.close(descriptor)
            raise StoreError(f"{self.path} is not usable: {error}") from error
        except NotOurs:
            os.close(descriptor)
            raise
        return snapshot, descriptor

    def _check_mac(self, snapshot: Snapshot, mac: bytes | None, signer: Signer | None) -> None:
        if signer is None:
            return
        if mac is None:
            raise self._refused("it has no MAC: it was not written by a server with AVAP_INTERNAL_KEY")
        if not signer.made_file_mac(mac, bytes(snapshot.buffer[-FOOTER_SIZE:])):
            raise self._refused("its MAC is not ours: it was changed, or written with another AVAP_INTERNAL_KEY")

    def others_may_write(self) -> bool:
        """Whether every user may replace files in the directory. The files themselves are checked one by one in any
        case.
        """
        try:
            mode = self.path.parent.stat().st_mode
        except OSError:
            return False
        return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX


def fault_of_owner(found: os.stat_result) -> str | None:
    """The reason why another user may have written a file; None if no other user can have."""
    if not stat.S_ISREG(found.st_mode):
        return "it is not a regular file"
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, and the server runs as {os.geteuid()}"
    if found.st_mode & _OTHERS_MAY_WRITE:
        return f"others may write it (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def make_room(path: Path, *, refused: bool) -> None:
    """Move the file at ``path`` aside before it is replaced, if it was ``refused`` or somebody else may have written
    it, whether or not it was read. A directory is moved too, because a file cannot replace it.

    Raises:
        OSError: if it cannot be moved.
    """
    with suppress(FileNotFoundError):
        if refused or fault_of_owner(path.lstat()) is not None:
            keep_aside(path)


def keep_aside(path: Path, suffix: str = REFUSED_SUFFIX) -> Path:
    """Move the file or directory at ``path`` out of the way, and keep it as evidence. It gets its old name with
    ``suffix``, and replaces a file that was kept under that name before. If a directory has that name, it is moved into
    a new directory.

    Returns:
        Where it is.

    Raises:
        OSError: if it cannot be moved.
    """
    kept = path.with_name(path.name + suffix)
    try:
        path.replace(kept)
    except FileNotFoundError:
        pass
    except OSError:
        room = Path(mkdtemp(prefix=f"{kept.name}.", dir=path.parent))
        kept = room / path.name
        try:
            path.replace(kept)
        except OSError:
            room.rmdir()
            raise
    return kept


def read_footer(path: Path) -> tuple[Footer, float]:
    """The footer of the stored snapshot at ``path``, and the file's time of modification. The content is not verified.

    Raises:
        FileNotFoundError: if there is no such file.
        NotOurs: if somebody else may have written it.
        SnapshotError: if it is not a snapshot, or its size or footer is damaged.
        OSError: if it cannot be read.
    """
    number = os.open(path, OPEN_FLAGS)
    try:
        found = os.fstat(number)
        fault = fault_of_owner(found)
        if fault is not None:
            raise NotOurs(fault)
        return _footer(number), found.st_mtime
    finally:
        os.close(number)


def _footer(file: int) -> Footer:
    """The footer of the stored snapshot in the open ``file``. It must agree with the size of the file.

    Raises:
        SnapshotError: if it is not a snapshot, or its size or footer is damaged.
    """
    size = os.fstat(file).st_size
    end = os.pread(file, FOOTER_SIZE + _MAC_SIZE, max(0, size - FOOTER_SIZE - _MAC_SIZE))
    octets = without_mac(end)
    return Footer.unpack_end(octets[-FOOTER_SIZE:], size - (len(end) - len(octets)))


def has_mac_of(path: Path, signer: Signer) -> bool:
    """Whether the stored snapshot at ``path`` has the MAC of the present or the previous key of ``signer``. Reads only
    the end of the file.

    Raises:
        OSError: if it cannot be read.
    """
    number = os.open(path, OPEN_FLAGS)
    try:
        size = FOOTER_SIZE + _MAC_SIZE
        end = os.pread(number, size, max(0, os.fstat(number).st_size - size))
    finally:
        os.close(number)
    footer, magic, mac = end[:FOOTER_SIZE], end[FOOTER_SIZE:-32], end[-32:]
    return len(end) == size and magic == _MAC_MAGIC and signer.made_file_mac(mac, footer)


def without_mac(octets: bytes | mmap) -> memoryview:
    """The snapshot in the octets of a stored file."""
    view = memoryview(octets)
    return view[:-_MAC_SIZE] if bytes(view[-_MAC_SIZE:]).startswith(_MAC_MAGIC) else view


def _read(file: int) -> tuple[int, bytes | None]:
    """Sealed memory with the snapshot in the open ``file``, and the file's MAC if it has one."""
    left = os.fstat(file).st_size
    end = os.pread(file, _MAC_SIZE, max(0, left - _MAC_SIZE))
    mac = end[len(_MAC_MAGIC) :] if len(end) == _MAC_SIZE and end.startswith(_MAC_MAGIC) else None
    if mac is not None:
        left -= _MAC_SIZE

    def chunks() -> Iterator[bytes]:
        nonlocal left
        while left and (chunk := os.read(file, min(left, _CHUNK))):
            left -= len(chunk)
            yield chunk

    return create_sealed("avap-snapshot", chunks()), mac


def _copy(source: int, target: int) -> None:
    """Copy all of ``source`` into ``target``, inside the kernel."""
    size = os.fstat(source).st_size
    offset = 0
    while offset < size:
        offset += os.sendfile(target, source, offset, size - offset)
