"""The last-known-good snapshot on disk: it is written whole or not at all, and read only if it is undamaged."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from tempfile import mkstemp

from definition_server.catalog.layout import SnapshotError
from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import create_sealed, map_sealed
from definition_server.observability.reasons import Reason

FILE_NAME = "last-known-good.avapsnap"

_TEMPORARY_SUFFIX = ".tmp"
_ABANDONED_SECONDS = 3600.0
_CHUNK = 8 * 1024 * 1024


class StoreError(Exception):
    """The last-known-good snapshot cannot be stored or loaded. The message is for the log: it names the file."""

    def __init__(self, message: str, reason: Reason = Reason.SNAPSHOT_UNUSABLE) -> None:
        super().__init__(message)
        self.reason = reason


class SnapshotStore:
    """Keeps one snapshot in ``directory``."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / FILE_NAME

    def save(self, descriptor: int) -> None:
        """Replace the stored snapshot by the sealed memory behind ``descriptor``.

        Temporary file, ``fsync``, rename, ``fsync`` of the directory: a reader, also after a power failure, finds the
        old file or the new one. Blocks; run it in a thread.

        Raises:
            StoreError: where that fails. The old file is then unchanged.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._remove_temporaries()
            # A unique name, and readable by its owner alone: the file holds the code of a whole platform.
            number, name = mkstemp(_TEMPORARY_SUFFIX, f"{self.path.stem}.", self.path.parent)
            temporary = Path(name)
            try:
                with os.fdopen(number, "wb") as file:
                    _copy(descriptor, file.fileno())
                    os.fsync(file.fileno())
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

    def load(self) -> tuple[Snapshot, int] | None:
        """The stored snapshot, copied to sealed memory and then verified; with the memory's descriptor.

        Returns:
            None where there is no file. The caller closes the descriptor.

        Raises:
            StoreError: where the file cannot be read or a check fails.
        """
        try:
            with self.path.open("rb") as file:
                descriptor = create_sealed("avap-snapshot", iter(lambda: file.read(_CHUNK), b""))
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot read {self.path}: {error.strerror}", Reason.DISK_FAILED) from error
        try:
            # Verified after copying: then the octets that were checked are those that will be served, whatever writes
            # the file meanwhile.
            snapshot = Snapshot(map_sealed(descriptor))
            snapshot.verify()
        except (SnapshotError, OSError, ValueError) as error:
            os.close(descriptor)
            raise StoreError(f"{self.path} is not usable: {error}") from error
        return snapshot, descriptor

    def _remove_temporaries(self) -> None:
        """Remove the files of a writer that was killed. A recent one may be another server's, on the same directory."""
        for temporary in self.path.parent.glob(f"{self.path.stem}.*{_TEMPORARY_SUFFIX}"):
            with suppress(FileNotFoundError):
                if time.time() - temporary.stat().st_mtime > _ABANDONED_SECONDS:
                    temporary.unlink()


def _copy(source: int, target: int) -> None:
    """All of ``source`` into ``target``, inside the kernel."""
    size = os.fstat(source).st_size
    offset = 0
    while offset < size:
        offset += os.sendfile(target, source, offset, size - offset)
