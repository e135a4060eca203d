"""The sync cycle: look, and only where something changed read, check, build, publish, store.

Every failure ends in the same place: the workers go on with what they have, the log says what failed and when the next
attempt is, and the next cycle starts from scratch.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

from definition_server.catalog.builder import CatalogTooLarge, SnapshotBuilder, rows_of
from definition_server.catalog.definition import Row
from definition_server.catalog.signing import UNSIGNED, SignatureError, Signer
from definition_server.catalog.snapshot import Snapshot, diff
from definition_server.catalog.validation import LARGE_DEFINITION, Findings
from definition_server.control_plane.background import Background
from definition_server.control_plane.delayed_release import DelayedRelease
from definition_server.control_plane.publisher import Publication, Publisher, to_shared_memory
from definition_server.control_plane.schedule import Backoff
from definition_server.control_plane.source import DefinitionSource, SourceError
from definition_server.control_plane.store import SnapshotStore, StoreError
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

_STORE_PATIENCE_SECONDS = 30.0
_NAMES_TOLD = 10


class Outcome(StrEnum):
    """How a cycle ended."""

    UNCHANGED = "unchanged"
    PUBLISHED = "published"
    REFUSED = "refused"
    FAILED = "failed"


@dataclass(slots=True)
class SyncState:
    """What the cycles so far amount to; times are seconds since the epoch."""

    cycles: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))
    last_outcome: Outcome | None = None
    last_attempt: float | None = None
    last_success: float | None = None
    """When the table was last seen to be what is served."""
    last_error: str | None = None
    last_duration_seconds: float = 0.0
    store_error: str | None = None
    restored_age_seconds: float | None = None
    """Age of the last-known-good snapshot that was served for want of a database; None once rows were read."""
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
        self._store = store
        self._allow_empty = allow_empty
        self._clock = clock
        self._fingerprint: str | None = None
        self._storing: asyncio.Future[None] | None = None
        self._publishing = asyncio.Lock()
        self._background = Background()
        self._retirement = DelayedRelease(self._background)
        self.state = SyncState()

    def close(self) -> None:
        """End the background thread. No cycle may be under way."""
        self._retirement.close()
        self._background.close()

    def use_signer(self, signer: Signer | None) -> None:
        """Sign with another key from the next cycle on, which then rebuilds."""
        if _key_id(signer) != _key_id(self._signer):
            self._signer = signer
            self._fingerprint = None

    async def cycle(self, next_attempt_in: Callable[[Outcome], float]) -> Outcome:
        """Bring what is served level with the table.

        Args:
            next_attempt_in: asked once, with the outcome, for the seconds until the next cycle (logged).
        """
        started = time.monotonic()
        self.state.last_attempt = self._clock()
        error: str | None = None
        try:
            outcome = await self._look(started)
        except (SourceError, OSError, CatalogTooLarge) as failure:
            outcome, error = Outcome.FAILED, str(failure)
        except Refused as refusal:
            outcome, error = Outcome.REFUSED, str(refusal)
        except Exception as bug:  # ours; it must cost this cycle, never the master
            log.exception("Unexpected failure in a sync cycle")
            outcome, error = Outcome.FAILED, f"unexpected {type(bug).__name__}: {bug}"
        self.state.last_duration_seconds = time.monotonic() - started
        self.state.cycles[outcome] += 1
        self.state.last_outcome, self.state.last_error = outcome, error
        if error is None:
            self.state.last_success = self._clock()
            self.state.restored_age_seconds = None
        delay = next_attempt_in(outcome)
        if error is not None:
            current = self._publisher.current
            log.error(
                "Sync failed" if outcome is Outcome.FAILED else "Sync refused",
                error=error,
                serving_generation=None if current is None else current.snapshot.generation,
                next_attempt_in_seconds=round(delay, 3),
            )
        return outcome

    async def _look(self, started: float) -> Outcome:
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
        # A key that was rotated meanwhile is still to be signed with: then the next cycle must not find all unchanged.
        self._fingerprint = fingerprint if signer is self._signer else None
        return Outcome.PUBLISHED if published else Outcome.UNCHANGED

    async def _encode(self, builder: SnapshotBuilder, rows: list[Row]) -> None:
        """Give one batch to ``builder``. Not while the next is fetched: they would fight over the interpreter lock."""
        if self._serves():
            await self._background.run(builder.add, rows)
        else:
            # Nobody is answered yet, so nobody is to be given way to, and here it is a quarter of a second faster.
            builder.add(rows)

    def _refuse_empty(self, builder: SnapshotBuilder) -> None:
        """Raises `Refused` where the table has nothing to serve: an emptied table breaks every client at once."""
        if builder.count or self._allow_empty:
            return
        rows = builder.findings.source_rows
        found = f"none of its {rows} rows can be served" if rows else "it is empty"
        raise Refused(
            f"obex_dapl_functions: {found}; the catalogue stays as it is. "
            "If that is meant, set ALLOW_EMPTY_CATALOG=true."
        )

    async def _publish(self, builder: SnapshotBuilder, started: float) -> bool:
        """Publish what ``builder`` holds unless it is what is served already. Returns whether it did."""
        previous = self._publisher.current
        built = await self._background.run(
            builder.build, generation=self._publisher.next_generation, created_at_ns=int(self._clock() * 1e9)
        )
        if previous is not None and _same(previous.snapshot, built.footer.version_hash, built.footer.key_id):
            return False
        publication = await self._background.run(to_shared_memory, built)
        self._publisher.publish(publication)
        if previous is not None:
            self._retirement.take(previous.snapshot)
        self._background.give_way()
        duration = time.monotonic() - started
        _tell_findings(builder.findings, publication.snapshot)
        await self._save(publication)
        await self._background.run(
            _tell_broadcast, None if previous is None else previous.snapshot, publication.snapshot, duration
        )
        return True

    async def _save(self, publication: Publication) -> None:
        """Store ``publication`` as last-known-good. A disk that hangs holds up this cycle for a while, no other one."""
        if self._store is None:
            return
        if self._storing is not None and not self._storing.done():
            self._tell_store_error("the disk has not finished writing an earlier snapshot")
            return
        # A descriptor of its own: the publication's closes with the next publication.
        descriptor = os.dup(publication.descriptor)
        self._storing = asyncio.ensure_future(asyncio.to_thread(_save_and_close, self._store, descriptor))
        # Waited for, not awaited: an exception raised through this frame would keep the publication in memory while
        # `_storing` is kept, and beyond that until the garbage collector comes.
        done, _ = await asyncio.wait((self._storing,), timeout=_STORE_PATIENCE_SECONDS)
        if not done:
            self._storing.add_done_callback(_take_note)
            self._tell_store_error(f"the disk did not finish within {_STORE_PATIENCE_SECONDS:g} s")
        elif isinstance(error := self._storing.exception(), StoreError):
            self._tell_store_error(str(error))
        elif error is not None:
            raise error
        else:
            if self.state.store_error is not None:
                log.info("Last-known-good snapshot stored again", generation=publication.snapshot.generation)
            self.state.store_error = None

    async def _store_again(self) -> None:
        """Try once more to store what is served, where that failed before."""
        if self.state.store_error is not None and self._publisher.current is not None:
            await self._save(self._publisher.current)

    def _serves(self) -> bool:
        return self._publisher.current is not None

    def _tell_store_error(self, error: str) -> None:
        self.state.store_error = error
        log.error("Last-known-good snapshot not stored", error=error, remedy="check SNAPSHOT_DIR")

    def _tell_unusable(self, error: str) -> None:
        self.state.store_error = error
        log.error("Last-known-good snapshot not usable", error=error, remedy="the next publication replaces it")

    async def restore(self) -> bool:
        """Publish the last-known-good snapshot, if nothing is served yet and there is a sound one.

        Returns:
            Whether it was published.
        """
        if self._store is None or self._serves():
            return False
        publication = await self._load(self._store)
        if publication is None:
            return False
        # Loaded before the lock is taken: a disk that hangs must not hold up the database's rows.
        async with self._publishing:
            if self._serves():
                os.close(publication.descriptor)
                return False
            self._publisher.publish(publication)
        self._tell_restored(publication.snapshot)
        return True

    async def _load(self, store: SnapshotStore) -> Publication | None:
        """The stored snapshot, signed as it is to be now; None, and a log line, where there is none to use."""
        try:
            loaded = await asyncio.to_thread(store.load)
        except StoreError as error:
            self._tell_unusable(str(error))
            return None
        if loaded is None:
            log.warning("No last-known-good snapshot", path=str(store.path))
            return None
        publication = Publication(*loaded)
        if publication.snapshot.footer.key_id != _key_id(self._signer):
            try:
                publication = await self._background.run(_sign_again, publication, self._signer)
            except (SignatureError, OSError) as error:
                self._tell_unusable(f"it cannot be signed again: {error}")
                return None
        return publication

    def _tell_restored(self, snapshot: Snapshot) -> None:
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


def _take_note(storing: asyncio.Future[None]) -> None:
    """Of a snapshot whose storing nobody waits for any more."""
    error = None if storing.cancelled() else storing.exception()
    if error is not None:
        log.error("Last-known-good snapshot not stored", error=str(error), remedy="check SNAPSHOT_DIR")


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


def _key_id(signer: Signer | None) -> bytes:
    return UNSIGNED if signer is None else signer.key_id


def _same(snapshot: Snapshot, version_hash: bytes, key_id: bytes) -> bool:
    return (snapshot.footer.version_hash, snapshot.footer.key_id) == (version_hash, key_id)


def _tell_findings(findings: Findings, snapshot: Snapshot) -> None:
    for reason, count in findings.unserved.items():
        log.warning("Rows not served", reason=reason, count=count, examples=findings.examples[reason])
    for suspect, count in findings.suspect.items():
        log.warning(
            "Rows look wrong, served as they are",
            reason=suspect,
            count=count,
            examples=findings.examples[suspect],
        )
    if len(snapshot.body) > LARGE_DEFINITION:
        log.warning(
            "The catalogue passes 4 MiB; SyncCatalog reaches only clients that raise their receive limit",
            bytes=len(snapshot.body),
            remedy="set grpc.max_receive_message_length (or its like) in the clients",
        )


def _tell_broadcast(previous: Snapshot | None, snapshot: Snapshot, duration: float) -> None:
    changes: dict[str, object] = {"added": snapshot.count, "removed": 0, "changed": 0}
    if previous is not None:
        difference = diff(previous, snapshot)
        for kind in ("added", "removed", "changed"):
            names = getattr(difference, kind)
            changes[kind] = len(names)
            if names:
                changes[f"{kind}_names"] = names[:_NAMES_TOLD]
    log.info(
        "Definitions Broadcasted",
        count=snapshot.count,
        duration_ms=round(duration * 1000, 1),
        generation=snapshot.generation,
        version_hash=snapshot.version_hash,
        bytes=snapshot.size,
        **changes,
    )


class SyncLoop:
    """Runs cycles for ever: on a schedule, and at once when asked."""

    def __init__(
        self,
        synchronizer: Synchronizer,
        publisher: Publisher,
        *,
        interval: float,
        patience: float,
        share: Callable[[], float] = random.random,
    ) -> None:
        """``interval``: seconds from one cycle's start to the next one's. ``patience``: seconds that the first cycle
        has before the last-known-good snapshot is served. ``share``: 0 to 1, how much of the interval passes after a
        cycle out of turn (the first, one that was asked for). It is a matter of chance, so that replicas that were
        started or told together do not read the table together for ever."""
        self._synchronizer = synchronizer
        self._publisher = publisher
        self._interval = interval
        self._share = share
        self._patience = patience
        self._backoff = Backoff(first=min(0.5, interval), most=min(30.0, interval))
        self._delay = interval
        self._out_of_turn = True
        self._asked = asyncio.Event()

    def sync_soon(self) -> None:
        """Start the next cycle at once."""
        self._asked.set()

    async def run(self) -> None:
        """Never returns."""
        first = asyncio.create_task(self._cycle())
        try:
            await asyncio.wait((first,), timeout=self._patience)
            await self._synchronizer.restore()
            started = await first
        except asyncio.CancelledError:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            raise
        while True:
            elapsed = time.monotonic() - started
            with suppress(TimeoutError):
                await asyncio.wait_for(self._asked.wait(), max(0.0, self._delay - elapsed))
            self._out_of_turn = self._asked.is_set()
            self._asked.clear()
            started = await self._cycle()

    async def _cycle(self) -> float:
        """One cycle. Returns when it started (monotonic seconds)."""
        started = time.monotonic()
        await self._synchronizer.cycle(self._next_delay)
        return started

    def _next_delay(self, outcome: Outcome) -> float:
        """Seconds until the next cycle. While nothing is served every second counts, so it comes sooner."""
        if outcome in (Outcome.FAILED, Outcome.REFUSED) and self._publisher.current is None:
            self._delay = self._backoff.next()
        else:
            self._delay = self._interval * (self._share() if self._out_of_turn else 1)
        return self._delay
