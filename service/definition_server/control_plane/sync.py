"""The sync cycle: check the table for changes; where there are any, read, check, build, publish and store.

Every failure has the same result: the workers continue with what they have, the log says what failed and when the next
attempt is, and the next cycle starts from the beginning.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from definition_server.catalog.builder import CatalogTooLarge, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import Findings
from definition_server.control_plane.background import Background
from definition_server.control_plane.delayed_release import DelayedRelease
from definition_server.control_plane.last_known_good import LastKnownGood, key_id_of, log_store_failure
from definition_server.control_plane.publication_log import log_broadcast, log_findings
from definition_server.control_plane.publisher import Publication, Publisher, to_shared_memory
from definition_server.control_plane.source import DefinitionSource, SourceError
from definition_server.control_plane.store import NotOurs, SnapshotStore, StoreError
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)


class Outcome(StrEnum):
    """How a cycle ended."""

    UNCHANGED = "unchanged"
    PUBLISHED = "published"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(slots=True)
class SyncState:
    """The result of the cycles so far; times are seconds since the epoch."""

    cycles: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    last_outcome: Outcome | None = None
    last_attempt: float | None = None
    last_success: float | None = None
    """When the table and the served catalogue last agreed."""
    last_error: str | None = None
    """The text, for the log alone."""
    last_reason: Reason | None = None
    last_duration_seconds: float = 0.0
    store_error: str | None = None
    """The text, for the log alone."""
    store_reason: Reason | None = None
    restored_age_seconds: float | None = None
    """Age of the last-known-good snapshot where that is served without a database; None once rows were read."""
    findings: Findings = field(default_factory=Findings)


class Refused(Exception):
    """The rows were read, but publishing them would do harm."""


class Synchronizer:
    """Runs cycles. One at a time; not thread-safe."""

    def __init__(
        self,
        source: DefinitionSource,
        publisher: Publisher,
        *,
        signer: Signer | None = None,
        store: SnapshotStore | None = None,
        allow_empty: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._source = source
        self._publisher = publisher
        self._signer = signer
        self._allow_empty = allow_empty
        self._clock = clock
        self._fingerprint: str | None = None
        self._publishing = asyncio.Lock()
        self._background = Background()
        self._delayed_release = DelayedRelease(self._background)
        self._last_known_good = None if store is None else LastKnownGood(store, self._background, self._on_stored_late)
        self._saving_generation = 0
        self.state = SyncState()

    def close(self) -> None:
        """End the background thread. No cycle may be under way."""
        self._delayed_release.close()
        self._background.close()

    def use_signer(self, signer: Signer | None) -> None:
        """Sign with another key from the next cycle on. That cycle rebuilds the snapshot."""
        if key_id_of(signer) != key_id_of(self._signer):
            self._signer = signer
            self._fingerprint = None

    async def cycle(self, next_attempt_in: Callable[[Outcome], float]) -> Outcome:
        """Make the served catalogue agree with the table.

        Args:
            next_attempt_in: Called once, with the outcome; returns the seconds until the next cycle, for the log.
        """
        started = time.monotonic()
        self.state.last_attempt = self._clock()
        error: str | None = None
        reason: Reason | None = None
        try:
            outcome = await self._run(started)
        except (SourceError, OSError, CatalogTooLarge) as failure:
            outcome, error, reason = Outcome.FAILED, str(failure), _reason(failure)
        except Refused as refusal:
            outcome, error, reason = Outcome.REFUSED, str(refusal), Reason.TABLE_EMPTY
        except Exception as bug:  # a bug of ours fails this cycle, but does not end the master
            log.exception("Unexpected failure in a sync cycle")
            outcome, error = Outcome.FAILED, f"unexpected {type(bug).__name__}: {bug}"
            reason = Reason.INTERNAL_ERROR
        self.state.last_duration_seconds = time.monotonic() - started
        self.state.cycles[outcome] += 1
        self.state.last_outcome, self.state.last_error, self.state.last_reason = outcome, error, reason
        if error is None:
            self.state.last_success = self._clock()
            self.state.restored_age_seconds = None
        delay = next_attempt_in(outcome)
        if error is not None:
            current = self._publisher.current
            log.error(
                "Sync failed" if outcome is Outcome.FAILED else "Sync refused",
                error=error,
                reason=reason,
                serving_generation=None if current is None else current.snapshot.generation,
                next_attempt_in_seconds=round(delay, 3),
            )
        return outcome

    async def _run(self, started: float) -> Outcome:
        signer = self._signer
        builder = None
        async with self._source.read() as reading:
            fingerprint = reading.fingerprint
            if fingerprint != self._fingerprint:
                builder = SnapshotBuilder(signer)
                async for rows in reading.batches():
                    await self._encode(builder, rows)
        if builder is None:
            await self._store_again()
            return Outcome.UNCHANGED
        self.state.findings = builder.findings
        self._refuse_empty(builder)
        async with self._publishing:
            published = await self._publish(builder, started)
        # Where the signing key was rotated meanwhile, the next cycle must not find the table unchanged.
        self._fingerprint = fingerprint if signer is self._signer else None
        return Outcome.PUBLISHED if published else Outcome.UNCHANGED

    async def _encode(self, builder: SnapshotBuilder, rows: list[Row]) -> None:
        """Give one batch to ``builder``. The next is fetched afterwards: both contend for the interpreter lock."""
        if self._serves():
            await self._background.run(builder.add, rows)
        else:
            # No calls are answered yet that could be delayed, and in this thread it is a quarter of a second faster.
            builder.add(rows)

    def _refuse_empty(self, builder: SnapshotBuilder) -> None:
        """Raise `Refused` where the table has nothing to serve: an emptied table breaks every client at once."""
        if builder.count or self._allow_empty:
            return
        rows = builder.findings.source_rows
        found = f"none of its {rows} rows can be served" if rows else "it is empty"
        raise Refused(
            f"obex_dapl_functions: {found}; the catalogue stays as it is. "
            "If this is intended, set ALLOW_EMPTY_CATALOG=true."
        )

    async def _publish(self, builder: SnapshotBuilder, started: float) -> bool:
        """Publish, store and log what ``builder`` holds, unless the same is served already. Returns whether it did."""
        publication = await self._build(builder)
        if publication is None:
            return False
        previous = self._replace(publication)
        duration = time.monotonic() - started
        log_findings(builder.findings, publication.snapshot)
        await self._save(publication)
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

    async def _save(self, publication: Publication) -> None:
        """Store ``publication`` as last-known-good. A disk that hangs delays this cycle for a while, and no other."""
        if self._last_known_good is None:
            return
        try:
            if not self._last_known_good.busy:
                self._saving_generation = publication.snapshot.generation
            await self._last_known_good.save(publication, self._signer)
        except StoreError as error:
            self._store_failed(error)
            log_store_failure(str(error))
            return
        if self.state.store_error is not None:
            log.info("Last-known-good snapshot stored again", generation=publication.snapshot.generation)
        self.state.store_error = self.state.store_reason = None

    def _store_failed(self, error: StoreError) -> None:
        self.state.store_error, self.state.store_reason = str(error), error.reason

    def _on_stored_late(self) -> None:
        """A slow disk has finished. What it has written may be older than what is served; then that is stored next."""
        if self._saving_generation == self._publisher.next_generation - 1:
            self.state.store_error = self.state.store_reason = None
            log.info("Last-known-good snapshot stored again", generation=self._saving_generation)

    async def _store_again(self) -> None:
        """Store what is served, where that has failed before."""
        if self.state.store_error is not None and self._publisher.current is not None:
            await self._save(self._publisher.current)

    def _serves(self) -> bool:
        return self._publisher.current is not None

    async def restore(self) -> bool:
        """Publish the last-known-good snapshot, if nothing is served yet and there is a sound one.

        Returns:
            Whether it was published.
        """
        if self._last_known_good is None or self._serves():
            return False
        publication = await self._load(self._last_known_good)
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

    async def _load(self, last_known_good: LastKnownGood) -> Publication | None:
        """The stored snapshot. If there is no usable one, log that and return None."""
        try:
            publication = await last_known_good.load(self._signer)
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
        self.state.restored_age_seconds = age
        log.warning(
            "Serving the last-known-good snapshot",
            reason=self.state.last_error or "the database has not answered yet",
            age_seconds=round(age, 1),
            count=snapshot.count,
            generation=snapshot.generation,
            version_hash=snapshot.version_hash,
        )


def _reason(failure: SourceError | OSError | CatalogTooLarge) -> Reason:
    if isinstance(failure, SourceError):
        return failure.reason
    return Reason.CATALOGUE_TOO_LARGE if isinstance(failure, CatalogTooLarge) else Reason.MACHINE_LIMIT


def _same(snapshot: Snapshot, version_hash: bytes, key_id: bytes) -> bool:
    return (snapshot.footer.version_hash, snapshot.footer.key_id) == (version_hash, key_id)
