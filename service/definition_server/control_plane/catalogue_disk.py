"""Everything that the server keeps in SNAPSHOT_DIR: the last-known-good snapshot, the history, the operators' wishes.

A disk may hang for ever, so each wait of a cycle or a start has a time limit, and a failed write is repeated later.
Without SNAPSHOT_DIR, history and wishes are kept in memory only, until the process ends.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from definition_server.catalog.signing import UNSIGNED, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.disk import OnDisk, on_disk
from definition_server.control_plane.history import History, HistoryEntry
from definition_server.control_plane.last_known_good import LastKnownGood, log_store_failure
from definition_server.control_plane.publisher import Publication, key_id_of
from definition_server.control_plane.store import NotOurs, SnapshotStore, StoreError
from definition_server.control_plane.sync_state import SyncState
from definition_server.control_plane.wishes import Wishes, WishesFile
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)

T = TypeVar("T")

RECALL_PATIENCE_SECONDS = 2.0
"""Seconds for which a first publication waits for the files of an earlier run."""

LOAD_PATIENCE_SECONDS = 5.0
"""Seconds for which an operator's request waits until a file of the history is read, or until the operator's wish is
stored.
"""


class CatalogueDisk:
    """Reads and writes SNAPSHOT_DIR beside the event loop."""

    def __init__(
        self,
        background: Background,
        state: SyncState,
        *,
        store: SnapshotStore | None,
        history: History | None,
        wishes: WishesFile | None,
        latest_generation: Callable[[], int],
        disk: OnDisk = on_disk,
    ) -> None:
        """``latest_generation`` returns the number of the newest snapshot. A write that ends late has stored an
        outdated snapshot if its number is another one.
        """
        self._state = state
        self._store = store
        self._history = history
        self._wishes = wishes
        self._disk = disk
        self._latest_generation = latest_generation
        self._last_known_good = None if store is None else LastKnownGood(store, background, self._on_stored_late, disk)
        self._missing: str | None = None
        """The path at which a last-known-good file was expected and not found."""
        self._saving_generation = 0
        self._saving = self._stored = _NOTHING
        self._adding: asyncio.Future[list[HistoryEntry]] | None = None
        self._to_add: Callable[[], list[HistoryEntry]] | None = None
        self._rotating = asyncio.Lock()
        self._rotations: set[asyncio.Task[None]] = set()
        self._discard: Callable[[], None] | None = None
        self._wishes_unsaved: Wishes | None = None
        self._wishes_on_disk = Wishes()
        self._wishes_key = UNSIGNED
        """Id of the key whose MAC the stored wishes have."""
        self._wishes_saving: asyncio.Future[None] | None = None
        self._reported: set[str] = set()
        self.entries: tuple[HistoryEntry, ...] = ()
        """The entries of the history that have been read or added so far; the newest first."""

    def close(self) -> None:
        """Begin no more writes, and do not wait for those that have begun."""
        for task in self._rotations:
            task.cancel()
        if self._discard is not None:
            self._discard()
        self._to_add = self._discard = None

    @property
    def keeps_history(self) -> bool:
        """Whether there is a history on disk."""
        return self._history is not None and self._history.keep > 0

    # -- the last-known-good snapshot ----------------------------------------------------------------------------------

    async def load(self, signer: Signer | None) -> Snapshot | None:
        """The stored snapshot. If there is no usable snapshot, log this and return None. Waits for a disk that
        hangs.
        """
        if self._last_known_good is None or self._store is None:
            return None
        try:
            snapshot = await self._last_known_good.load(signer)
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
        if self._store.others_may_write():
            log.warning(
                "Every user may write to SNAPSHOT_DIR",
                path=str(self._store.path.parent),
                remedy="take that right away (chmod o-w), unless no other user can reach it",
            )
        if snapshot is None:
            self._missing = str(self._store.path)
            return None
        self._stored = _identity(snapshot) if self._last_known_good.loaded_as_it_is else _NOTHING
        return snapshot

    def report_missing(self) -> None:
        """Log that there is no last-known-good file. This is normal at a first start, but not if there is a history."""
        if self._missing is None:
            return
        if self.entries:
            log.warning("No last-known-good snapshot", path=self._missing, first_start=False)
        else:
            log.info("No last-known-good snapshot", path=self._missing, first_start=True)

    def has_stored(self, snapshot: Snapshot) -> bool:
        """Whether ``snapshot``, with its present signatures, is stored as last-known-good; True without a disk."""
        return self._last_known_good is None or self._stored == _identity(snapshot)

    async def save(self, publication: Publication, signer: Signer | None) -> None:
        """Store ``publication`` as last-known-good. A disk that hangs delays this cycle for a limited time, and does
        not delay other cycles.
        """
        if self._last_known_good is None:
            return
        try:
            if not self._last_known_good.busy:
                self._saving_generation = publication.snapshot.generation
                self._saving = _identity(publication.snapshot)
            await self._last_known_good.save(publication, signer)
        except StoreError as error:
            self._store_failed(error)
            log_store_failure(str(error))
            return
        self._stored = self._saving
        if self._state.store_error is not None:
            log.info("Last-known-good snapshot stored again", generation=publication.snapshot.generation)
        self._state.store_error = self._state.store_reason = None

    def _store_failed(self, error: StoreError) -> None:
        self._state.store_error, self._state.store_reason = str(error), error.reason

    def _on_stored_late(self) -> None:
        """Called when a slow disk has finished a write. If it wrote an older catalogue than the served one, that one is
        stored next."""
        self._stored = self._saving
        if self._saving_generation == self._latest_generation():
            self._state.store_error = self._state.store_reason = None
            log.info("Last-known-good snapshot stored again", generation=self._saving_generation)

    # -- the history ---------------------------------------------------------------------------------------------------

    async def list_history(self) -> None:
        """Bring `entries` up to date. Waits for as long as the disk hangs. Logs if the directory cannot be read."""
        if self._history is None:
            return
        try:
            self._listed(await self._on_disk(self._history.entries))
        except StoreError as error:
            self._report_history(str(error))

    def _listed(self, entries: list[HistoryEntry]) -> None:
        self.entries = tuple(entries)
        self._state.history_entries = len(self.entries)
        # Problems that are over are no longer remembered, so that they are logged if they return.
        self._reported &= self._take_problems()

    def _take_problems(self) -> set[str]:
        """Log the problems of single files. Returns these problems."""
        problems = set() if self._history is None else set(self._history.take_problems())
        for problem in sorted(problems):
            self._report_history(problem)
        return problems

    def _report_history(self, problem: str) -> None:
        """Log ``problem``, unless it was logged before and has lasted since."""
        if problem not in self._reported:
            self._reported.add(problem)
            log.error(
                "History of catalogues not usable in part",
                error=problem,
                remedy="check space, permissions and mount of SNAPSHOT_DIR/history",
            )

    def add(self, publication: Publication, signer: Signer | None, spare: frozenset[str]) -> None:
        """Keep ``publication`` in the history, without waiting. While the disk is busy, one publication is queued: the
        newest.
        """
        history = self._history
        if history is None or history.keep < 1:
            return
        descriptor = os.dup(publication.descriptor)
        version = publication.snapshot.version_hash
        if self._discard is not None:
            self._discard()
        self._to_add = partial(_add_and_close, history, descriptor, version, signer, spare)
        self._discard = partial(os.close, descriptor)
        self._add_next()

    def _add_next(self) -> None:
        if self._to_add is None or (self._adding is not None and not self._adding.done()):
            return
        work, discard = self._to_add, self._discard
        self._to_add = self._discard = None
        try:
            self._adding = self._disk(work)
        except RuntimeError as fault:
            if discard is not None:
                discard()
            self._report_history(f"no thread can be started: {fault}")
            return
        self._adding.add_done_callback(self._on_added)

    def _on_added(self, adding: asyncio.Future[list[HistoryEntry]]) -> None:
        if adding.cancelled():
            return
        error = adding.exception()
        if error is not None:
            self._report_history(str(error))
            self._take_problems()
        else:
            self._listed(adding.result())
        self._add_next()

    def rotate(self, old: Signer | None, new: Signer | None) -> None:
        """After a rotation of the signing key: give the history's files the MAC of the ``new`` key, without waiting.

        Files without a MAC stay without one: they are valid only while there is no key.
        """
        if self._history is None or old is None or new is None:
            return
        task = asyncio.get_running_loop().create_task(self._sign_history_again(self._history, old, new))
        self._rotations.add(task)
        task.add_done_callback(self._rotations.discard)

    async def _sign_history_again(self, history: History, old: Signer, new: Signer) -> None:
        async with self._rotating:  # one rotation runs at a time
            try:
                await self._on_disk(partial(history.sign_again, old, new))
            except StoreError as error:
                self._report_history(str(error))
            self._take_problems()

    def lacks(self, version: str) -> bool:
        """Whether ``version`` is missing from a history that should have it. False while a write is under way, which
        may add it.
        """
        busy = self._adding is not None and not self._adding.done()
        return self.keeps_history and not busy and all(version != entry.version_hash for entry in self.entries)

    async def load_version(self, version: str, signer: Signer | None) -> Snapshot | None:
        """The catalogue ``version`` (a whole hash) of the history, verified; None if it is not there.

        Raises:
            StoreError: if it is not usable, or the disk does not answer within `LOAD_PATIENCE_SECONDS`.
        """
        if self._history is None:
            return None
        return await self._within(LOAD_PATIENCE_SECONDS, partial(_load_and_close, self._history, version, signer))

    # -- wishes --------------------------------------------------------------------------------------------------------

    async def read_wishes(self, signer: Signer | None) -> Wishes:
        """The wishes of operators in an earlier run. A file that is damaged or not ours is logged and treated as
        missing.
        """
        if self._wishes is None:
            return Wishes()
        try:
            wishes = await self._on_disk(partial(self._wishes.read, signer))
        except StoreError as error:
            remedy = "give them again with `definition-server pin` and `definition-server accept`"
            if isinstance(error, NotOurs):
                remedy += (
                    "; and find out who wrote the file, unless this follows an upgrade or a change of AVAP_INTERNAL_KEY"
                )
            log.error("Pins and accepted catalogues not read", error=str(error), remedy=remedy)
            return Wishes()
        # With two keys it is not known which key made the MAC, so the wishes are written again.
        either = signer is not None and signer.previous is not None
        self._wishes_on_disk, self._wishes_key = wishes, UNSIGNED if either else key_id_of(signer)
        return wishes

    async def save_wishes(self, wishes: Wishes, signer: Signer | None) -> str | None:
        """Keep ``wishes``, with the MAC of ``signer``. Returns the reason why the wishes are not on disk (they are
        effective nevertheless); None if they are.
        """
        problem = await self._save_wishes(wishes, signer)
        if problem is None:
            self._wishes_on_disk, self._wishes_key = wishes, key_id_of(signer)
        newest = self._wishes_unsaved or wishes  # the wishes may have changed meanwhile
        self._state.pin_unsaved = newest.pinned != self._wishes_on_disk.pinned
        return problem

    def note_pin_unsaved(self, *, unsaved: bool) -> None:
        """Note whether a pin, or the end of a pin, waits for a disk that has not answered yet."""
        self._state.pin_unsaved = unsaved

    async def _save_wishes(self, wishes: Wishes, signer: Signer | None) -> str | None:
        if self._wishes is None:
            return "SNAPSHOT_DIR is not set"
        self._wishes_unsaved = wishes
        if self._wishes_saving is not None and not self._wishes_saving.done():
            return "the disk has not finished an earlier write"
        problem = await self._write_wishes(partial(self._wishes.write, wishes, signer))
        if problem is None:
            if self._wishes_unsaved is wishes:
                self._wishes_unsaved = None
            return None
        log.error(
            "Pins and accepted catalogues not stored",
            error=problem,
            effect="they are in effect until the server ends",
            remedy="check space, permissions and mount of SNAPSHOT_DIR",
        )
        return problem

    async def _write_wishes(self, write: Callable[[], None]) -> str | None:
        """The reason why ``write`` did not succeed in time; None if it did."""
        try:
            saving = self._wishes_saving = self._disk(write)
        except RuntimeError as fault:
            return f"no thread can be started: {fault}"
        saving.add_done_callback(_forget)
        done, _ = await asyncio.wait((saving,), timeout=LOAD_PATIENCE_SECONDS)
        if not done:
            return f"the disk did not finish within {LOAD_PATIENCE_SECONDS:g} s"
        error = saving.exception()
        return None if error is None else str(error)

    async def save_wishes_again(self, signer: Signer | None) -> None:
        """Repeat a write of the wishes that failed. Wishes that have the MAC of another key are written again too."""
        unsaved = self._wishes_unsaved
        if unsaved is None and self._wishes_on_disk != Wishes() and self._wishes_key != key_id_of(signer):
            unsaved = self._wishes_on_disk
        if unsaved is not None and self._wishes is not None:
            await self.save_wishes(unsaved, signer)

    # -- waiting -------------------------------------------------------------------------------------------------------

    async def _on_disk(self, work: Callable[[], T]) -> T:
        try:
            return await self._disk(work)
        except RuntimeError as fault:
            raise StoreError(f"no thread can be started: {fault}", Reason.MACHINE_LIMIT) from None

    async def _within(self, seconds: float, work: Callable[[], T]) -> T:
        waiting = asyncio.ensure_future(self._on_disk(work))
        waiting.add_done_callback(_forget)
        done, _ = await asyncio.wait((waiting,), timeout=seconds)
        if not done:
            raise StoreError(f"the disk did not answer within {seconds:g} s", Reason.DISK_HANGS)
        return waiting.result()


_NOTHING = (b"", b"")


def _identity(snapshot: Snapshot) -> tuple[bytes, bytes]:
    """The properties by which two stored files are compared: their answers and the key, but not the generation."""
    return snapshot.footer.content_digest, snapshot.footer.key_id


def _forget(late: asyncio.Future[T]) -> None:
    """Retrieve the exception of a future that is no longer awaited, so that asyncio does not log it."""
    if not late.cancelled():
        late.exception()


def _add_and_close(
    history: History, descriptor: int, version: str, signer: Signer | None, spare: frozenset[str]
) -> list[HistoryEntry]:
    try:
        history.add(descriptor, version, signer, spare)
    finally:
        os.close(descriptor)
    return history.entries()


def _load_and_close(history: History, version: str, signer: Signer | None) -> Snapshot | None:
    loaded = history.load(version, signer)
    if loaded is None:
        return None
    os.close(loaded[1])
    return loaded[0]
