"""The last-known-good snapshot: stored after each publication, and published if the database is down at the start.

The store blocks, so its operations run in threads of their own (`disk`). A cycle waits for a write only for a limited
time, so that a disk that hangs does not stop the cycle for ever.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial

from definition_server.catalog.signing import SignatureError, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.disk import OnDisk, on_disk
from definition_server.control_plane.publisher import Publication, key_id_of, published_again
from definition_server.control_plane.store import SnapshotStore, StoreError
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)

PATIENCE_SECONDS = 5.0
"""Seconds for which a cycle waits for the disk. Then the cycle ends and the write continues; no other write begins
before it has ended.
"""


class LastKnownGood:
    """Saves publications to a store and loads the stored one."""

    def __init__(
        self,
        store: SnapshotStore,
        background: Background,
        on_stored_late: Callable[[], None],
        disk: OnDisk = on_disk,
    ) -> None:
        """``on_stored_late`` is called when a write that `save` no longer waited for has succeeded."""
        self._disk = disk
        self.store = store
        self._on_stored_late = on_stored_late
        self._background = background
        self._saving: asyncio.Future[None] | None = None
        self.loaded_as_it_is = False
        """Whether the file on disk has the loaded snapshot exactly as it was loaded, signed with the present key."""

    @property
    def busy(self) -> bool:
        """Whether an earlier snapshot is still being written."""
        return self._saving is not None and not self._saving.done()

    async def save(self, publication: Publication, signer: Signer | None) -> None:
        """Replace the stored snapshot by ``publication``, with the MAC of ``signer``.

        Raises:
            StoreError: if it is not stored, or not within `PATIENCE_SECONDS`.
        """
        if self.busy:
            raise StoreError("the disk has not finished writing an earlier snapshot", Reason.DISK_HANGS)
        # The write has a descriptor of its own, because that of the publication is closed at the next publication.
        descriptor = os.dup(publication.descriptor)
        try:
            saving = self._saving = self._disk(partial(_save_and_close, self.store, descriptor, signer))
        except RuntimeError as fault:
            os.close(descriptor)
            raise StoreError(f"no thread can be started: {fault}", Reason.MACHINE_LIMIT) from None
        # This calls `wait` and does not await the future: if the future's exception were raised through this frame, it
        # would keep the publication in memory as long as `_saving` is kept, and then until the garbage collector runs.
        done, _ = await asyncio.wait((saving,), timeout=PATIENCE_SECONDS)
        if not done:
            saving.add_done_callback(self._on_late_end)
            raise StoreError(f"the disk did not finish within {PATIENCE_SECONDS:g} s", Reason.DISK_HANGS)
        error = saving.exception()
        if isinstance(error, StoreError):
            raise StoreError(str(error), error.reason)
        if error is not None:
            raise error

    async def load(self, signer: Signer | None) -> Snapshot | None:
        """The stored snapshot, signed by ``signer``; None if there is none. Waits for as long as the disk hangs.

        Raises:
            NotOurs: if somebody else may have written it.
            StoreError: if it is not usable.
        """
        try:
            loaded = await self._disk(partial(_load_and_close, self.store, signer))
        except RuntimeError as error:
            raise StoreError(f"no thread can be started: {error}", Reason.MACHINE_LIMIT) from None
        if loaded is None:
            return None
        self.loaded_as_it_is = loaded.footer.key_id == key_id_of(signer)
        if self.loaded_as_it_is:
            return loaded
        # The snapshot was signed with the previous key, or in another version of the packages, or there is no key now.
        try:
            again = await self._background.run(published_again, loaded, signer, loaded.generation)
        except (SignatureError, OSError) as error:
            raise StoreError(f"it cannot be signed again: {error}") from error
        os.close(again.descriptor)
        return again.snapshot

    def _on_late_end(self, saving: asyncio.Future[None]) -> None:
        """Called when a write has ended that no cycle waits for any more."""
        if saving.cancelled():
            return
        error = saving.exception()
        if error is None:
            self._on_stored_late()
        else:
            log_store_failure(str(error))


def log_store_failure(error: str) -> None:
    """Log that a snapshot could not be stored. This is the only place that logs it."""
    log.error(
        "Last-known-good snapshot not stored",
        error=error,
        remedy="check space, permissions and mount of SNAPSHOT_DIR; each cycle tries again",
    )


def _save_and_close(store: SnapshotStore, descriptor: int, signer: Signer | None) -> None:
    try:
        store.save(descriptor, signer)
    finally:
        os.close(descriptor)


def _load_and_close(store: SnapshotStore, signer: Signer | None) -> Snapshot | None:
    """Closes the descriptor in the disk's thread. When the disk answers, nothing may await the result any more, and
    then no other code would close the descriptor. The memory itself is unmapped when the snapshot is released.
    """
    loaded = store.load(signer)
    if loaded is None:
        return None
    os.close(loaded[1])
    return loaded[0]
