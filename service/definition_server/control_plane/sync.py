"""The sync cycle: if the table has changed, read it, judge each row and then the whole catalogue, publish the catalogue
and store it.

Each step is a part of its own: `TableReader` reads and encodes, `Gate` judges rows, `CatalogueGuard` judges the whole,
`ServedCatalogue` publishes, `CatalogueDisk` stores. Every failure has the same result: the workers continue with their
catalogue, the log shows the failure and the time of the next attempt, and the next cycle starts from the beginning.
"""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Protocol

from definition_server.catalog.builder import CatalogTooLarge, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.guard import DEFAULTS, Thresholds
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.catalogue_disk import CatalogueDisk
from definition_server.control_plane.catalogue_guard import CatalogueGuard
from definition_server.control_plane.disk import OnDisk, on_disk
from definition_server.control_plane.held_candidate import Held
from definition_server.control_plane.history import History
from definition_server.control_plane.publisher import Publisher, key_id_of
from definition_server.control_plane.served_catalogue import ServedCatalogue
from definition_server.control_plane.source import DefinitionSource, SourceError
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync_state import Outcome, SyncState
from definition_server.control_plane.table_reader import ReadTable, TableReader
from definition_server.control_plane.wishes import Policy, WishesFile
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason
from definition_server.observability.tracing import span

log = get_logger(__name__)

_NAMES_SHOWN = 10


class Gate(Protocol):
    """Judges each row before the catalogue is judged as a whole."""

    unsure: bool
    """Whether the last verdicts are provisional, so that the rows must be judged again even if the table does not
    change.
    """

    @property
    def served(self) -> Mapping[bytes, bytes]:
        """Name → content hash of every command that is served since the last `apply`, which replaces this mapping."""

    async def apply(self, builder: SnapshotBuilder, last_good: Snapshot | None) -> AbstractSet[bytes]:
        """Let ``builder`` serve, hold or leave out each of its rows.

        Args:
            builder: The encoded rows of one reading.
            last_good: The newest catalogue that passed, from which the last good version of a command is taken. None if
                there is none.

        Returns:
            The names that are served in an earlier version because their row is held.
        """

    def prepare(self) -> None:
        """Prepare for `apply`, which follows: rows are being read."""

    def rows_read(self, rows: Sequence[Row]) -> None:
        """Note ``rows``, a part of the table. Their content may be judged while other rows are read."""

    def cycle_ended(self, newest: Snapshot | None) -> None:
        """Judge the rows of ``newest`` that passed without a verdict, while they are served."""


class CycleObserver(Protocol):
    """An observer of the sync cycles."""

    def check_begins(self) -> None:
        """Called before the table is checked."""

    def change_read(self) -> None:
        """Called when the table has changed and was read. A publication before the end of the cycle publishes this
        change.
        """

    def cycle_ended(self, outcome: Outcome, reason: Reason | None, next_attempt_in: float) -> None:
        """Called at the end of a cycle. ``reason``: why it failed; ``next_attempt_in``: seconds until the next one."""


class Synchronizer:
    """Runs cycles, one at a time. Not thread-safe."""

    def __init__(
        self,
        source: DefinitionSource,
        publisher: Publisher,
        *,
        signer: Signer | None = None,
        store: SnapshotStore | None = None,
        history: History | None = None,
        wishes: WishesFile | None = None,
        policy: Callable[[], Policy] = Policy,
        gate: Gate | None = None,
        limits: Thresholds = DEFAULTS,
        allow_empty: bool = False,
        full_read_interval: float = math.inf,
        clock: Callable[[], float] = time.time,
        background: Background | None = None,
        disk: OnDisk = on_disk,
    ) -> None:
        """
        Args:
            source: Has the rows.
            publisher: Publishes the catalogues.
            signer: Signs code and stored files.
            store: Keeps the last-known-good snapshot.
            history: Keeps the last catalogues.
            wishes: Keeps the wishes that operators give by command.
            policy: Returns the present declarations of the policy file.
            gate: Judges rows. If None, every row that can become a definition is served.
            limits: The largest changes that need no operator.
            allow_empty: Whether an emptied table is served.
            full_read_interval: Seconds after which the table is read even if no change was found.
            clock: Seconds since the epoch.
            background: The thread for CPU-heavy work.
            disk: Runs functions that block on a disk.
        """
        self.observer: CycleObserver | None = None
        """The observer of the cycles, if there is one."""
        self._signer = signer
        self._gate = gate
        self._clock = clock
        self._background = background or Background()
        self.state = SyncState()
        self._reader = TableReader(
            source,
            self._background,
            on_change=None if gate is None else gate.prepare,
            on_rows=self._rows_read,
            known=None if gate is None else lambda: gate.served,
            full_read_interval=full_read_interval,
        )
        self.catalogue = ServedCatalogue(
            publisher,
            self._background,
            self.state,
            CatalogueDisk(
                self._background,
                self.state,
                store=store,
                history=history,
                wishes=wishes,
                latest_generation=lambda: publisher.next_generation - 1,
                disk=disk,
            ),
            CatalogueGuard(self._background, limits=limits, allow_empty=allow_empty),
            signer=signer,
            policy=policy,
            clock=clock,
        )

    def close(self) -> None:
        """End the background thread. No cycle may be under way."""
        self.catalogue.close()
        self._background.close()

    def use_signer(self, signer: Signer | None) -> None:
        """Sign with another key from the next cycle on. The next cycle builds the snapshot again."""
        if key_id_of(signer) != key_id_of(self._signer):
            self._signer = signer
            self.catalogue.use_signer(signer)
            self._reader.forget()

    def read_again(self) -> None:
        """Read the table in the next cycle, even if it has not changed."""
        self._reader.forget()

    async def restore(self) -> bool:
        """Publish the last-known-good snapshot, if nothing is served yet and it is undamaged.

        Returns:
            Whether it was published.
        """
        return await self.catalogue.restore()

    async def cycle(self, next_attempt_in: Callable[[Outcome], float], *, unconditional: bool = False) -> Outcome:
        """Make the served catalogue agree with the table.

        Args:
            next_attempt_in: Takes the outcome and returns the seconds until the next cycle, for the log. Called once.
            unconditional: Read the table even if its fingerprint has not changed.
        """
        with span("sync cycle", unconditional=unconditional) as step:
            outcome = await self._cycle(next_attempt_in, unconditional=unconditional)
            served, reason = self.catalogue.served, self.state.last_reason
            step.set(outcome=outcome, reason=reason, generation=None if served is None else served.generation)
            if outcome is Outcome.FAILED:
                step.fail(reason or outcome)
        return outcome

    async def _cycle(self, next_attempt_in: Callable[[Outcome], float], *, unconditional: bool) -> Outcome:
        now = asyncio.get_running_loop().time
        started = now()
        self.state.last_attempt = self._clock()
        if self.observer is not None:
            self.observer.check_begins()
        error: str | None = None
        reason: Reason | None = None
        try:
            outcome = await self._run(lambda: now() - started, unconditional=unconditional)
        except (SourceError, OSError, CatalogTooLarge) as failure:
            outcome, error, reason = Outcome.FAILED, _text(failure), _reason(failure)
        except Held as held:
            outcome, error, reason = Outcome.HELD, str(held), held.held.reason
        except Exception as bug:  # a bug of ours fails this cycle, but does not end the master
            outcome, error, reason = Outcome.FAILED, _limit_met(bug), Reason.MACHINE_LIMIT
            if error is None:
                log.exception("Unexpected failure in a sync cycle")
                error, reason = f"unexpected {type(bug).__name__}: {bug}", Reason.INTERNAL_ERROR
        if error is not None:
            await self._after_failure()
        if self._gate is not None:
            self._gate.cycle_ended(self.catalogue.newest)
        self.catalogue.cycle_ended()
        self.state.last_duration_seconds = now() - started
        delay = next_attempt_in(outcome)
        self._note(outcome, error, reason, delay)
        if self.observer is not None:
            self.observer.cycle_ended(outcome, reason, delay)
        return outcome

    async def _run(self, elapsed: Callable[[], float], *, unconditional: bool) -> Outcome:
        catalogue = self.catalogue
        if catalogue.served is None:
            catalogue.recall()
        else:
            await catalogue.follow(sign_again=False)
        released = await catalogue.release(elapsed)
        signer = self._signer
        table = await self._reader.read(signer, serving=catalogue.served is not None, unconditional=unconditional)
        if table is None:
            await catalogue.store_again()
            catalogue.still_held()
            return Outcome.PUBLISHED if released else Outcome.UNCHANGED
        self.state.findings = table.builder.findings
        if self.observer is not None:
            self.observer.change_read()
        await catalogue.recalled()
        rows_held = await self._judge_rows(table.builder)
        try:
            published = await catalogue.offer(table.builder, elapsed, rows_held)
        except Held:
            await self._dealt_with(table, signer)
            raise
        await self._dealt_with(table, signer)
        return Outcome.PUBLISHED if published or released else Outcome.UNCHANGED

    async def _dealt_with(self, table: ReadTable, signer: Signer | None) -> None:
        # If the signing key was rotated meanwhile, or a verdict is provisional, the next cycle must read the table
        # again.
        if signer is self._signer and (self._gate is None or not self._gate.unsure):
            await self._reader.remember(table, (self.catalogue.newest, self.catalogue.candidate))
        else:
            self._reader.forget()

    def _rows_read(self, rows: Sequence[Row]) -> None:
        # If there is an earlier catalogue, most rows are the same as in it, and are judged while they are served.
        if self._gate is not None and self.catalogue.newest is None:
            self._gate.rows_read(rows)

    async def _judge_rows(self, builder: SnapshotBuilder) -> AbstractSet[bytes]:
        if self._gate is None:
            return frozenset()
        with span("gate") as step:
            held = await self._gate.apply(builder, await self.catalogue.last_good())
            step.set(held=len(held), left_out=builder.findings.unserved.total())
            if held:
                names = sorted(held)[:_NAMES_SHOWN]
                step.event("commands held", names=", ".join(name.decode(errors="replace") for name in names))
        return held

    async def _after_failure(self) -> None:
        """Called if nothing new was published: apply the wishes of operators, and a rotated signing key."""
        try:
            if self.catalogue.served is not None:
                await self.catalogue.follow()
                await self.catalogue.store_again()
        except Exception:
            log.exception("Unexpected failure in a sync cycle")

    def _note(self, outcome: Outcome, error: str | None, reason: Reason | None, delay: float) -> None:
        """Record the end of a cycle, and log a failure."""
        self.state.cycles[outcome] += 1
        self.state.last_outcome, self.state.last_error, self.state.last_reason = outcome, error, reason
        if error is None:
            self.state.last_success = self._clock()
            self.state.restored_age_seconds = None
            return
        served = self.catalogue.served
        held = self.state.held
        generation = None if served is None else served.generation
        if outcome is Outcome.HELD and held is not None:
            log.error(
                "Catalogue held",
                error=error,
                reason=reason,
                version_hash=held.version_hash,
                commands=held.names,
                remedy=f"if this is intended, run `definition-server accept {held.version_hash[:16]}`"
                + ("" if held.definitions else ", or set ALLOW_EMPTY_CATALOG=true")
                + "; otherwise mend the table",
                serving_generation=generation,
                next_attempt_in_seconds=round(delay, 3),
            )
            return
        log.error(
            "Sync failed",
            error=error,
            reason=reason,
            serving_generation=generation,
            next_attempt_in_seconds=round(delay, 3),
        )


def _limit_met(failure: Exception) -> str | None:
    """The resource that the machine lacks, for an error that shows such a lack and is not an `OSError`."""
    if isinstance(failure, MemoryError):
        return "no memory is left"
    if isinstance(failure, RuntimeError) and "start new thread" in str(failure):
        return "no thread can be started: memory, or the number of processes, is limited"
    return None


def _text(failure: SourceError | OSError | CatalogTooLarge) -> str:
    """The text of ``error`` for the log. If it is the kernel's message, which names no remedy, our remedy is added."""
    if isinstance(failure, OSError) and failure.errno == errno.EFBIG:
        return "the catalogue is larger than the limit of file sizes. Raise that limit (ulimit -f, LimitFSIZE=)."
    return str(failure)


def _reason(failure: SourceError | OSError | CatalogTooLarge) -> Reason:
    if isinstance(failure, SourceError):
        return failure.reason
    return Reason.CATALOGUE_TOO_LARGE if isinstance(failure, CatalogTooLarge) else Reason.MACHINE_LIMIT
