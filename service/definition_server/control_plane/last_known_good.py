"""The last-known-good snapshot: stored after each publication, published where the database is down at start.

The store blocks, so its operations run in threads; and a cycle waits for a write only for a limited time, so that a
disk that hangs does not stop it for ever.
"""

from __future__ import annotations

import asyncio
import os

from definition_server.catalog.builder import SnapshotBuilder, rows_of
from definition_server.catalog.signing import UNSIGNED, SignatureError, Signer
from definition_server.control_plane.background import Background
from definition_server.control_plane.publisher import Publication, to_shared_memory
from definition_server.control_plane.store import SnapshotStore, StoreError
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)

PATIENCE_SECONDS = 30.0
"""How long a cycle waits for the disk. The write continues beyond it, and no other starts before it has ended."""


class LastKnownGood:
    """Saves publications to a store and loads the stored one."""

    def __init__(self, store: SnapshotStore, background: Background) -> None:
        self.store = store
        self._background = background
        self._saving: asyncio.Future[None] | None = None

    async def save(self, publication: Publication) -> None:
        """Replace the stored snapshot by ``publication``.

        Raises:
            StoreError: where it is not stored, or not within `PATIENCE_SECONDS`.
        """
        if self._saving is not None and not self._saving.done():
            raise StoreError("the disk has not finished writing an earlier snapshot", Reason.DISK_HANGS)
        # A descriptor of its own: the publication's closes with the next publication.
        descriptor = os.dup(publication.descriptor)
        self._saving = asyncio.ensure_future(asyncio.to_thread(_save_and_close, self.store, descriptor))
        # Waited for, not awaited: an exception raised through this frame would keep the publication in memory while
        # `_saving` is kept, and beyond that until the garbage collector runs.
        done, _ = await asyncio.wait((self._saving,), timeout=PATIENCE_SECONDS)
        if not done:
            self._saving.add_done_callback(_log_late_failure)
            raise StoreError(f"the disk did not finish within {PATIENCE_SECONDS:g} s", Reason.DISK_HANGS)
        error = self._saving.exception()
        if isinstance(error, StoreError):
            raise StoreError(str(error), error.reason)
        if error is not None:
            raise error

    async def load(self, signer: Signer | None) -> Publication | None:
        """The stored snapshot, signed by ``signer``; None where there is none.

        Raises:
            StoreError: where it is not usable.
        """
        loaded = await asyncio.to_thread(self.store.load)
        if loaded is None:
            return None
        publication = Publication(*loaded)
        if publication.snapshot.footer.key_id == key_id_of(signer):
            return publication
        try:
            return await self._background.run(_sign_again, publication, signer)
        except (SignatureError, OSError) as error:
            raise StoreError(f"it cannot be signed again: {error}") from error


def key_id_of(signer: Signer | None) -> bytes:
    """The key id that a snapshot signed by ``signer`` has."""
    return UNSIGNED if signer is None else signer.key_id


def log_store_failure(error: str) -> None:
    """The one log line for a snapshot that could not be stored."""
    log.error("Last-known-good snapshot not stored", error=error, remedy="check SNAPSHOT_DIR")


def _log_late_failure(saving: asyncio.Future[None]) -> None:
    """Log the failure of a write that no cycle waits for any more."""
    error = None if saving.cancelled() else saving.exception()
    if error is not None:
        log_store_failure(str(error))


def _save_and_close(store: SnapshotStore, descriptor: int) -> None:
    try:
        store.save(descriptor)
    finally:
        os.close(descriptor)


def _sign_again(publication: Publication, signer: Signer | None) -> Publication:
    """The same definitions under another signing key (or none); closes the old descriptor."""
    try:
        builder = SnapshotBuilder(signer)
        builder.add(rows_of(publication.snapshot))
        footer = publication.snapshot.footer
        return to_shared_memory(builder.build(generation=footer.generation, created_at_ns=footer.created_at_ns))
    finally:
        os.close(publication.descriptor)
