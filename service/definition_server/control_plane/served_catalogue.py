"""Which catalogue is served: the newest that passed the guard, or the one that an operator pinned.

Three catalogues matter. The *newest* is the last one that passed the guard. The *served* one is the same, unless a pin
names another. The *held* one was read and did not pass; it waits until an operator accepts it, or the table changes.
The served catalogue changes under one lock, and nothing waits for a disk under this lock. So no catalogue is published
after a newer one, except by a pin, and generations only rise. A pinned catalogue is published under a new generation
too, because workers and clients distinguish publications by it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.catalogue_disk import CatalogueDisk
from definition_server.control_plane.catalogue_guard import REASONS, CatalogueGuard
from definition_server.control_plane.delayed_release import DelayedRelease
from definition_server.control_plane.held_candidate import HeldCandidate
from definition_server.control_plane.operator_wishes import OperatorWishes
from definition_server.control_plane.pinned_catalogue import PinnedCatalogue
from definition_server.control_plane.publication_log import log_broadcast, log_findings
from definition_server.control_plane.publisher import (
    Publication,
    Publisher,
    key_id_of,
    prepare,
    published_again,
)
from definition_server.control_plane.resident_memory import give_back
from definition_server.control_plane.stored_catalogue import StoredCatalogue
from definition_server.control_plane.sync_state import SyncState
from definition_server.control_plane.wishes import Merged, Pin, Policy
from definition_server.observability.logs import get_logger
from definition_server.observability.tracing import span

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

_VERSIONS_REMEMBERED = 1000


@dataclass(frozen=True, slots=True)
class _Advance:
    """The record of a catalogue that became the newest."""

    to_keep: Publication
    """The publication, with a descriptor of its own."""
    served_before: Snapshot | None
    published: bool
    seconds: float
    """Seconds that the cycle took until the catalogue became the newest."""
    accepted: bool
    rows_held: int


class ServedCatalogue:
    """Publishes the newest catalogue or the pinned one, and keeps both on disk."""

    def __init__(
        self,
        publisher: Publisher,
        background: Background,
        state: SyncState,
        disk: CatalogueDisk,
        guard: CatalogueGuard,
        *,
        signer: Signer | None,
        policy: Callable[[], Policy] = Policy,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            publisher: Publishes the served catalogue.
            background: The thread for CPU-heavy work.
            state: Shows the held and the pinned catalogue.
            disk: Keeps catalogues and wishes.
            guard: Judges catalogues.
            signer: Signs a catalogue that is published again.
            policy: Returns the present declarations of the policy file.
            clock: Seconds since the epoch.
        """
        self._publisher = publisher
        self._background = background
        self._state = state
        self.disk = disk
        self._guard = guard
        self._signer = signer
        self._clock = clock
        self._lock = asyncio.Lock()
        self._delayed_release = DelayedRelease(background)
        self._newest: Snapshot | None = None
        self._versions: dict[str, None] = {}
        self._wishes = OperatorWishes(disk, policy, clock, lambda: self._signer)
        self._stored = StoredCatalogue(disk, self._wishes, lambda: self._signer)
        self._held = HeldCandidate(state, clock)
        self._pinned = PinnedCatalogue(
            self._wishes,
            disk,
            state,
            served=lambda: self.served,
            newest=lambda: self._newest,
            signer=lambda: self._signer,
            on_end=self.follow,
            clock=clock,
        )

    def close(self) -> None:
        """Release all catalogues. No cycle may be under way."""
        self._delayed_release.close()
        for part in (self._pinned, self._stored, self._held):
            part.close()
        self._newest = None
        self.disk.close()

    def use_signer(self, signer: Signer | None) -> None:
        """Sign with another key from now on."""
        self.disk.rotate(self._signer, signer)
        self._signer = signer

    @property
    def served(self) -> Snapshot | None:
        """The served catalogue."""
        current = self._publisher.current
        return None if current is None else current.snapshot

    def _serves(self) -> bool:
        return self._publisher.current is not None

    @property
    def newest(self) -> Snapshot | None:
        """The newest catalogue that passed the guard. After a start it is the stored catalogue until one has passed."""
        # `or` would not do, because an empty catalogue is false.
        return self._stored.snapshot if self._newest is None else self._newest

    @property
    def candidate(self) -> Snapshot | None:
        """The held catalogue."""
        return self._held.snapshot

    async def in_background(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of CPU-heavy ``work``, which runs in the background thread."""
        return await self._background.run(work, *args, **kwargs)

    def wishes(self) -> Merged:
        """The present wishes of operators, given by command and by policy."""
        return self._wishes.now()

    def knows(self, version: str) -> bool:
        """Whether ``version`` was published before, as far as the history goes back."""
        return version in self._versions or any(version == entry.version_hash for entry in self.disk.entries)

    # -- the files of an earlier run -----------------------------------------------------------------------------------

    def recall(self) -> asyncio.Task[None]:
        """Read the files of an earlier run, once. The task ends when the disk has answered."""
        return self._stored.recall()

    async def restore(self) -> bool:
        """Publish the stored snapshot, or the pinned one, if nothing is served yet and it is undamaged.

        Returns:
            Whether it was published.
        """
        if self._serves():
            return False
        await asyncio.shield(self.recall())
        await self._pinned.find()
        async with self._lock:
            if self._serves() or (self.newest is None and self._pinned.snapshot is None):
                return False
            self._newest = self.newest
            self._stored.forget()
            await self._settle()
            if self.served is None:
                return False
            self._log_restored(self.served)
        return True

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

    async def recalled(self) -> None:
        """Wait until the files of an earlier run are read, for a limited time, because a disk may hang."""
        if self._newest is None:
            await self._stored.recalled()

    async def last_good(self) -> Snapshot | None:
        """`newest`, signed with the present key, so that a command of it can be served again unchanged."""
        newest = self.newest
        if newest is None or newest.footer.key_id == key_id_of(self._signer):
            return newest
        again = await self._background.run(published_again, newest, self._signer, newest.generation)
        os.close(again.descriptor)
        async with self._lock:
            if self._newest is newest:
                self._newest = again.snapshot
        return again.snapshot

    # -- a catalogue that was read -------------------------------------------------------------------------------------

    async def offer(
        self, builder: SnapshotBuilder, elapsed: Callable[[], float], rows_held: AbstractSet[bytes] = frozenset()
    ) -> bool:
        """Publish, store and log the catalogue of ``builder``, unless the same is served, or the guard holds it.

        Args:
            builder: Has the rows.
            elapsed: The seconds that the cycle has taken, for the log.
            rows_held: The commands whose row the gate holds.

        Returns:
            Whether anything was published.

        Raises: Held: if it must be accepted first.
        """
        await self._pinned.find()
        async with self._lock:
            newest = self._newest
            with span("build") as step:
                write = await self._background.run(
                    prepare,
                    builder,
                    None if newest is None else newest.footer,
                    generation=self._publisher.next_generation,
                    created_at_ns=int(self._clock() * 1e9),
                )
                step.set(definitions=builder.count)
            if write is None:
                assert newest is not None
                version = newest.version_hash
                self._held.release("the table has the served content again")
                settled = await self._settle()
            else:
                publication = await self._background.run(write)
                with _closed_on_failure(publication):
                    await self._judge(publication.snapshot, builder, rows_held)
                    log_findings(builder.findings, publication.snapshot)
                advance = await self._advance(publication, elapsed, len(rows_held))
                settled = None
        if settled is None:
            return await self._keep(advance, builder)
        await self._wishes.note_fewer_held(version, len(rows_held))
        await self.store_again()
        return settled

    async def _judge(self, candidate: Snapshot, builder: SnapshotBuilder, rows_held: AbstractSet[bytes]) -> None:
        """Raise `Held` if the guard does not let ``candidate`` pass."""
        version = candidate.version_hash
        if self.wishes().accepts(version):
            return
        with span("guard") as step:
            judgement = await self._guard.judge(
                candidate,
                self.newest,
                changed=builder.changed_since(self.newest),
                builder=builder,
                held=rows_held,
                held_before=0 if self.newest is None else self._wishes.rows_held_in(self.newest.version_hash),
                now=asyncio.get_running_loop().time(),
                excused=self.knows,
            )
            step.set(passed=judgement is None)
            if judgement is not None:
                step.event("catalogue held", version_hash=version, reason=REASONS[judgement.concern])
        if judgement is not None:
            self._held.hold(candidate, judgement, builder.findings.source_rows, len(rows_held))

    def cycle_ended(self) -> None:
        """Release the resident pages of the newest catalogue, which may have been read to judge or compare rows."""
        if self._newest is not None:
            self._background.soon(partial(give_back, self._newest, heap=False))

    def still_held(self) -> None:
        """Raise `Held` if a catalogue is held. For a cycle in which the table has not changed."""
        self._held.check()

    async def accept(self, version: str) -> None:
        """Publish the held catalogue. The caller has checked that its hash is ``version``."""
        started = asyncio.get_running_loop().time()
        # Published first and stored afterwards, so that a disk that hangs does not delay it.
        self._wishes.accept(version)
        if not await self.release(lambda: asyncio.get_running_loop().time() - started):
            await self._wishes.save()

    async def release(self, elapsed: Callable[[], float]) -> bool:
        """Publish the held catalogue if it has been accepted. Returns whether it was published."""
        async with self._lock:
            candidate = self._held.snapshot
            if candidate is None or not self.wishes().accepts(candidate.version_hash):
                return False
            generation = max(self._publisher.next_generation, candidate.generation)
            publication = await self._background.run(published_again, candidate, self._signer, generation)
            advance = await self._advance(publication, elapsed, self._held.rows_held)
        return await self._keep(advance)

    async def _advance(self, publication: Publication, elapsed: Callable[[], float], rows_held: int) -> _Advance:
        """Make ``publication``, which passed the guard, the newest. Serve it, unless a pin is in effect. Owns its
        descriptor.
        """
        snapshot, before = publication.snapshot, self.newest
        version = snapshot.version_hash
        accepted = self.wishes().accepts(version)
        now = asyncio.get_running_loop().time()
        with _closed_on_failure(publication):
            await self._guard.passed(snapshot, before, now, excused=accepted or self.knows(version))
            # A descriptor for storing, because that of the publication is closed at the next publication.
            to_keep = Publication(snapshot, os.dup(publication.descriptor))
        served_before = self.served
        self._newest = snapshot
        self._stored.forget()
        self._note_version(version)
        self._held.release("it was accepted" if accepted else "another version passed")
        self._pinned.show()
        published = self._target() is snapshot
        if published:
            self._publish(publication)
        else:
            os.close(publication.descriptor)
            with _closed_on_failure(to_keep):
                await self._settle()
        return _Advance(to_keep, served_before, published, elapsed(), accepted, rows_held)

    async def _keep(self, advance: _Advance, builder: SnapshotBuilder | None = None) -> bool:
        """Store and log the result of `_advance`. Runs without the lock, because a disk may hang.

        Args:
            advance: The result of `_advance`.
            builder: Has built the catalogue; None: it was held meanwhile, and its builder is gone.

        Returns:
            Whether it was published.
        """
        snapshot = advance.to_keep.snapshot
        changed = None if builder is None else builder.changed_since(advance.served_before)
        try:
            with span("store"):
                self.disk.add(advance.to_keep, self._signer, self._spare())
                await self.disk.save(advance.to_keep, self._signer)
        finally:
            os.close(advance.to_keep.descriptor)
        await self._wishes.note_passed(snapshot.version_hash, accepted=advance.accepted, rows_held=advance.rows_held)
        if advance.published:
            counts = await self._background.run(
                log_broadcast, advance.served_before, snapshot, advance.seconds, changed
            )
            self._state.note_changes(snapshot.version_hash, counts)
        else:
            log.info("Catalogue waits for the end of the pin", version_hash=snapshot.version_hash, count=snapshot.count)
        # The encoded rows have been freed by now.
        self._background.soon(partial(give_back, snapshot, heap=changed is None))
        await self._guard.prepare(snapshot, builder)
        return advance.published

    def _spare(self) -> frozenset[str]:
        """The versions that the history must not lose."""
        known = {
            snapshot.version_hash
            for snapshot in (self.served, self._newest, self._pinned.snapshot)
            if snapshot is not None
        }
        pin = self.wishes().pin
        if pin is not None:
            known |= {entry.version_hash for entry in self.disk.entries if pin.names(entry.version_hash)}
        return frozenset(known)

    def _note_version(self, version: str) -> None:
        self._versions.pop(version, None)
        self._versions[version] = None
        while len(self._versions) > _VERSIONS_REMEMBERED:
            del self._versions[next(iter(self._versions))]

    async def store_again(self) -> None:
        """Store again a catalogue that could not be stored before, or that was stored with another key."""
        await self._wishes.save_again()
        newest = self._newest
        if newest is None:
            return
        not_in_history = self.disk.lacks(newest.version_hash)
        signed = newest.footer.key_id == key_id_of(self._signer)
        not_stored = self._state.store_error is not None or not signed or not self.disk.has_stored(newest)
        if not not_stored and not not_in_history:
            return
        async with self._lock:
            again = await self._newest_again()
        try:
            if not_in_history:
                self.disk.add(again, self._signer, self._spare())
            if not_stored:
                await self.disk.save(again, self._signer)
        finally:
            os.close(again.descriptor)

    async def _newest_again(self) -> Publication:
        """The newest catalogue under the present key, with a descriptor of its own."""
        newest, current = self._newest, self._publisher.current
        assert newest is not None
        signed = newest.footer.key_id == key_id_of(self._signer)
        if current is not None and signed and current.snapshot.footer.same_octets(newest.footer):
            return Publication(current.snapshot, os.dup(current.descriptor))
        again = await self._background.run(published_again, newest, self._signer, newest.generation)
        self._newest = again.snapshot
        return again

    # -- the served catalogue ------------------------------------------------------------------------------------------

    async def follow(self, *, sign_again: bool = True) -> bool:
        """Apply the operators' wishes: serve the catalogue of a new pin, or the newest one if a pin has ended.

        Args:
            sign_again: Publish the same catalogue again if the signing key was rotated.

        Returns:
            Whether anything was published.
        """
        await self._pinned.find()
        async with self._lock:
            return await self._settle(sign_again=sign_again)

    async def pin(self, pin: Pin | None, pinned: Snapshot | None) -> str | None:
        """Pin ``pinned``, or follow the table again.

        Returns:
            The reason why this would not survive a restart; None if it would.
        """
        self._wishes.pin(pin)
        self._pinned.change(pin, pinned)
        await self._pinned.find()  # a pin of the policy file may be in effect now
        async with self._lock:
            await self._settle()
            current = self._publisher.current
            if pin is not None and current is not None:
                # The pin must survive a restart, so the catalogue is stored again, in case it was about to be removed
                # from the history.
                self.disk.add(current, self._signer, self._spare())
        return await self._wishes.save()

    def _target(self) -> Snapshot | None:
        """The catalogue that is to be served."""
        pin = self.wishes().pin
        pinned = None if pin is None else self._pinned.in_memory(pin)
        if pinned is not None:
            return pinned
        served = self.served
        return self._newest if pin is None or served is None or self._pinned.is_vain(pin) else served

    async def _settle(self, *, sign_again: bool = True) -> bool:
        """Publish the catalogue that is to be served, if another one is served, or the same one with another key.
        Returns whether anything was published."""
        self._pinned.show()
        target, served = self._target(), self.served
        if target is None:
            return False
        if (
            served is not None
            and served.version_hash == target.version_hash
            and (not sign_again or served.footer.key_id == key_id_of(self._signer))
        ):
            return False
        generation = target.generation if served is None else max(self._publisher.next_generation, target.generation)
        publication = await self._background.run(published_again, target, self._signer, generation)
        if served is not None and served.version_hash != target.version_hash:
            log.warning(
                "Another catalogue is served",
                version_hash=target.version_hash,
                generation=generation,
                instead_of=served.version_hash,
                pinned=self._state.pin is not None,
            )
        elif served is not None:
            log.info("Served catalogue is signed again", version_hash=target.version_hash, generation=generation)
            # Its file still has the MAC of the old key, and a pin must survive a restart.
            self.disk.add(publication, self._signer, self._spare())
        if target is self._newest:
            self._newest = publication.snapshot
        self._publish(publication)
        return True

    def _publish(self, publication: Publication) -> None:
        previous, snapshot = self._publisher.current, publication.snapshot
        with span("publish") as step:
            step.set(generation=snapshot.generation, version_hash=snapshot.version_hash, definitions=snapshot.count)
            self._publisher.publish(publication)
        self._background.lower_priority()
        self._note_version(snapshot.version_hash)
        if previous is not None:
            self._delayed_release.take(previous.snapshot)


@contextmanager
def _closed_on_failure(publication: Publication) -> Iterator[None]:
    """Closes the descriptor of ``publication`` if the body raises an exception."""
    try:
        yield
    except BaseException:
        os.close(publication.descriptor)
        raise
