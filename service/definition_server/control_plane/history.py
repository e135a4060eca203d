"""The history: the catalogues that were published last, one file each, named by the hash of the catalogue.

The files have the format of the last-known-good file and pass the same checks before anything in them is served: owner,
mode, checksums and, with AVAP_INTERNAL_KEY, the MAC. The name must be the hash of the content. A file's time of
modification is when the catalogue was last published. When the key is rotated, a running server verifies the files with
the old key once more, and gives them the MAC of the new key. A server that starts with both keys does the same.
Everything here blocks; run it in a thread of `disk`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from definition_server.catalog.layout import SnapshotError
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.store import SnapshotStore, StoreError, has_mac_of, read_footer
from definition_server.observability.reasons import Reason

DIRECTORY = "history"
_SUFFIX = ".avapsnap"
_ABANDONED_SECONDS = 3600.0
_FILE = re.compile(r"([0-9a-f]{64})\.avapsnap")


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """A catalogue in the history, as its footer describes it."""

    version_hash: str
    definitions: int
    created_at: float
    """When it was built, seconds since the epoch."""
    published_at: float
    """When it was last published, seconds since the epoch."""


class History:
    """Keeps the last ``keep`` catalogues in ``directory``."""

    def __init__(self, directory: Path, keep: int, clock: Callable[[], float] = time.time) -> None:
        self.directory = directory / DIRECTORY
        self.keep = keep
        self._clock = clock
        self.problems: list[str] = []
        """The faults that `entries` and `add` have found since the last `take_problems`: of single files, and of the
        removal of old files.
        """

    def take_problems(self) -> list[str]:
        """Return `problems` and empty it."""
        taken, self.problems = self.problems, []
        return taken

    def entries(self) -> list[HistoryEntry]:
        """The kept catalogues, the newest first. A damaged or foreign file is left out, and noted in `problems`.

        Raises:
            StoreError: if the directory cannot be read.
        """
        found = []
        try:
            names = [path.name for path in self.directory.iterdir()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"cannot read {self.directory}: {error.strerror}", Reason.DISK_FAILED) from error
        for name in names:
            match = _FILE.fullmatch(name)
            if match is None:
                continue
            entry = self._entry(match[1])
            if entry is not None:
                found.append(entry)
        return sorted(found, key=lambda entry: (-entry.published_at, entry.version_hash))

    def _entry(self, version: str) -> HistoryEntry | None:
        path = self._path(version)
        try:
            footer, modified = read_footer(path)
        except FileNotFoundError:
            return None
        except (StoreError, SnapshotError, OSError) as error:
            self.problems.append(f"{path} is not used: {error}")
            return None
        if footer.version_hash.hex() != version:
            self.problems.append(f"{path} is not used: it holds another catalogue ({footer.version_hash.hex()})")
            return None
        return HistoryEntry(version, footer.count, footer.created_at_ns / 1e9, modified)

    def add(self, descriptor: int, version: str, signer: Signer | None, spare: Collection[str] = ()) -> None:
        """Keep the snapshot in the sealed memory behind ``descriptor``, and remove the oldest beyond `keep`.

        Args:
            descriptor: The memory.
            version: The hash of the catalogue in it.
            signer: Makes the MAC.
            spare: Versions that are never removed: the served and the pinned one.

        Raises:
            StoreError: if it cannot be written.
        """
        if self.keep < 1:
            return
        self._store(version).save(descriptor, signer)
        now = self._clock()
        with suppress(OSError):
            os.utime(self._path(version), (now, now))
        self.prune({*spare, version})

    def prune(self, spare: Collection[str]) -> None:
        """Remove the oldest files beyond `keep`, except those in ``spare``."""
        try:
            entries = self.entries()
        except StoreError as error:
            self.problems.append(str(error))
            return
        for entry in entries[self.keep :]:
            if entry.version_hash in spare:
                continue
            try:
                self._path(entry.version_hash).unlink(missing_ok=True)
            except OSError as error:
                self.problems.append(f"cannot remove {self._path(entry.version_hash)}: {error.strerror}")
        self._remove_temporaries()

    def _remove_temporaries(self) -> None:
        """Remove the temporary files of a writer that was killed."""
        for temporary in self.directory.glob("*.tmp"):
            with suppress(OSError):
                if self._clock() - temporary.lstat().st_mtime > _ABANDONED_SECONDS:
                    temporary.unlink()

    def load(self, version: str, signer: Signer | None) -> tuple[Snapshot, int] | None:
        """The catalogue ``version`` (a whole hash), verified, with the descriptor of its memory; None if it is not in
        the history.

        Raises:
            StoreError: if the file is damaged, may have been written by another program, or holds another catalogue.
        """
        store = self._store(version)
        loaded = store.load(signer)
        if loaded is not None and loaded[0].version_hash != version:
            os.close(loaded[1])
            raise StoreError(f"{store.path} is not used: it holds another catalogue ({loaded[0].version_hash})")
        return loaded

    def sign_again(self, old: Signer, new: Signer) -> None:
        """Replace the MAC of ``old`` in each file by the MAC of ``new``, so that the file can be served after a
        rotation.

        A file without the MAC of ``old`` stays as it is. A file that cannot be written is noted in `problems`.

        Raises:
            StoreError: if the directory cannot be read.
        """
        for entry in self.entries():
            try:
                # The end of the file, which has the MAC, is read first: a start repeats this, and then most files
                # already have the new MAC.
                ours = has_mac_of(self._path(entry.version_hash), old)
                loaded = self.load(entry.version_hash, old) if ours else None
            except (StoreError, OSError):
                continue
            if loaded is None:
                continue
            _, descriptor = loaded
            try:
                self._store(entry.version_hash).save(descriptor, new)
                os.utime(self._path(entry.version_hash), (entry.published_at, entry.published_at))
            except (StoreError, OSError) as error:
                self.problems.append(str(error))
            finally:
                os.close(descriptor)

    def _store(self, version: str) -> SnapshotStore:
        return SnapshotStore(self.directory, version + _SUFFIX)

    def _path(self, version: str) -> Path:
        return self.directory / (version + _SUFFIX)
