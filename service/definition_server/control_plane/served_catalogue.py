"""The last steps of a sync cycle: build the snapshot, publish it, store it, log it. And the restore at a start.

What is served changes in this module alone, and under one lock: never is an older catalogue published after a newer.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.delayed_release import DelayedRelease
from definition_server.control_plane.last_known_good import LastKnownGood, log_store_failure
from definition_server.control_plane.publication_log import log_broadcast, log_findings
from definition_server.control_plane.publisher import Publication, Publisher, to_shared_memory
from definition_server.control_plane.store import NotOurs, SnapshotStore, StoreError
from definition_server.control_plane.sync_state import SyncState
from definition_server.observability.logs import get_logger

log = get_logger(__name__)


class ServedCatalogue:
    """Publishes what a cycle has read, and keeps it on disk."""

    def __init__(
        self,
        publisher: Publisher,
        background: Background,
        state: SyncState,
        *,
        store: SnapshotStore | None,
        clock: Callable[[], float],
    ) -> None:
        self._publisher = publisher
        self._background = background
        self._state = state
        self._clock = clock
        self._publishing = asyncio.Lock()
        self._delayed_release = DelayedRelease(background)
        self._last_known_good = None if store is None else LastKnownGood(store, background, self._on_stored_late)
        self._saving_generation = 0

    def close(self) -> None:
        """Release what is held. No cycle may be under way."""
        self._delayed_release.close()

    @property
    def served(self) -> Snapshot | None:
        """What is served now."""
        current = self._publisher.current
        return None if current is None else current.snapshot

    def _serves(self) -> bool:
        return self._publisher.current is not None

    # -- publish -------------------------------------------------------------------------------------------------------

    async def publish(self, builder: SnapshotBuilder, signer: Signer | None, elapsed: Callable[[], float]) -> bool:
        """Publish, store and log what ``builder`` holds, unless the same is served already.

        Args:
            builder: Has the rows.
            signer: Signs the stored file.
            elapsed: The seconds that the cycle has taken, for the log.

        Returns:
            Whether it was published.
        """
        async with self._publishing:
            publication = await self._build(builder)
            if publication is None:
                return False
            previous = self._replace(publication)
            duration = elapsed()
            log_findings(builder.findings, publication.snapshot)
            await self._save(publication, signer)
            await self._background.run(log_broadcast, previous, publication.snapshot, duration)
            return True

    async def _build(self, builder: SnapshotBuilder) -> Publication | None:
        """What ``builder`` holds, in shared memory; None where it is what is served already."""
        current = self._publisher.current
        built = await self._background.run(
            builder.build, generation=self._publisher.next_generation, created_at_ns=int(self._clock() * 1e9)
        )
        if current is not None and _same(current.snapshot, built.footer.version_hash, built.footer.key_id):
            return None
        return await self._background.run(to_shared_memory, built)

    def _replace(self, publication: Publication) -> Snapshot | None:
        """Serve ``publication``. Returns the snapshot before, which is held until the workers have released it."""
        previous = self._publisher.current
        self._publisher.publish(publication)
        self._background.lower_priority()
        if previous is None:
            return None
        self._delayed_release.take(previous.snapshot)
        return previous.snapshot

    # -- store ---------------------------------------------------------------------------------------------------------

    async def store_again(self, signer: Signer | None) -> None:
        """Store what is served, where that has failed before."""
        if self._state.store_error is not None and self._publisher.current is not None:
            await self._save(self._publisher.current, signer)

    async def _save(self, publication: Publication, signer: Signer | None) -> None:
        """Store ``publication`` as last-known-good. A disk that hangs delays this cycle for a while, and no other."""
        if self._last_known_good is None:
            return
        try:
            if not self._last_known_good.busy:
                self._saving_generation = publication.snapshot.generation
            await self._last_known_good.save(publication, signer)
        except StoreError as error:
            self._store_failed(error)
            log_store_failure(str(error))
            return
        if self._state.store_error is not None:
            log.info("Last-known-good snapshot stored again", generation=publication.snapshot.generation)
        self._state.store_error = self._state.store_reason = None

    def _store_failed(self, error: StoreError) -> None:
        self._state.store_error, self._state.store_reason = str(error), error.reason

    def _on_stored_late(self) -> None:
        """A slow disk has finished. What it has written may be older than what is served; then that is stored next."""
        if self._saving_generation == self._publisher.next_generation - 1:
            self._state.store_error = self._state.store_reason = None
            log.info("Last-known-good snapshot stored again", generation=self._saving_generation)

    # -- restore -------------------------------------------------------------------------------------------------------

    async def restore(self, signer: Signer | None) -> bool:
        """Publish the last-known-good snapshot, if nothing is served yet and there is a sound one.

        Returns:
            Whether it was published.
        """
        if self._last_known_good is None or self._serves():
            return False
        publication = await self._load(self._last_known_good, signer)
        if publication is None:
            return False
        # Loaded before the lock is taken: a disk that hangs must not delay the database's rows.
        async with self._publishing:
            if self._serves():
                os.close(publication.descriptor)
                return False
            self._publisher.publish(publication)
        self._log_restored(publication.snapshot)
        return True

    async def _load(self, last_known_good: LastKnownGood, signer: Signer | None) -> Publication | None:
        """The stored snapshot. If there is no usable one, log that and return None."""
        try:
            publication = await last_known_good.load(signer)
        except NotOurs as error:
            self._store_failed(error)
            log.error(
                "Last-known-good snapshot not usable",
                error=str(error),
                remedy="the table is read instead; find out who wrote the file, or, after an upgrade or a change of "
                "AVAP_INTERNAL_KEY, do nothing: the next publication moves it aside",
            )
            return None
        except StoreError as error:
            self._store_failed(error)
            log.error(
                "Last-known-good snapshot not usable", error=str(error), remedy="the next publication replaces it"
            )
            return None
        if last_known_good.store.others_may_write():
            log.warning(
                "Every user may write to SNAPSHOT_DIR",
                path=str(last_known_good.store.path.parent),
                remedy="take that right away (chmod o-w), unless no other user can reach it",
            )
        if publication is None:
            log.warning("No last-known-good snapshot", path=str(last_known_good.store.path))
        return publication

    def _log_restored(self, snapshot: Snapshot) -> None:
        age = max(0.0, self._clock() - snapshot.footer.created_at_ns / 1e9)
        self._state.restored_age_seconds = age
        log.warning(
            "Serving the last-known-good snapshot",
            reason=self._state.last_error or "the database has not answered yet",
            age_seconds=round(age, 1),
            count=snapshot.count,
            generation=snapshot.generation,
            version_hash=snapshot.version_hash,
        )


def _same(snapshot: Snapshot, version_hash: bytes, key_id: bytes) -> bool:
    return (snapshot.footer.version_hash, snapshot.footer.key_id) == (version_hash, key_id)
