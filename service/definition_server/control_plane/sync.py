"""The sync cycle: read the table where it has changed, judge each row and then the catalogue, publish and store it.

Each step is a part of its own: `TableReader` reads and encodes, `Gate` judges rows, `ServedCatalogue` builds, publishes
and stores. Every failure has the same result: the workers continue with what they have, the log says what failed and
when the next attempt is, and the next cycle starts from the beginning.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

from definition_server.catalog.builder import CatalogTooLarge, SnapshotBuilder
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.last_known_good import key_id_of
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.served_catalogue import ServedCatalogue
from definition_server.control_plane.source import DefinitionSource, SourceError
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync_state import Outcome, SyncState
from definition_server.control_plane.table_reader import TableReader
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)


class Gate(Protocol):
    """Judges each row before the catalogue is judged as a whole."""

    async def apply(self, builder: SnapshotBuilder, last_good: Snapshot | None) -> None:
        """Let ``builder`` serve, hold or leave out each of its rows.

        Args:
            builder: The encoded rows of one reading.
            last_good: The newest catalogue that passed, from which the last good version of a command is taken. None:
                there is none.
        """


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
        gate: Gate | None = None,
        allow_empty: bool = False,
        clock: Callable[[], float] = time.time,
        background: Background | None = None,
    ) -> None:
        """
        Args:
            source: Has the rows.
            publisher: Serves the catalogues.
            signer: Signs code and stored files.
            store: Keeps the last-known-good snapshot.
            gate: Judges rows. None: every row that can be carried is served.
            allow_empty: An emptied table is served.
            clock: Seconds since the epoch.
            background: The thread for CPU-heavy work.
        """
        self._publisher = publisher
        self._signer = signer
        self._gate = gate
        self._allow_empty = allow_empty
        self._clock = clock
        self._background = background or Background()
        self.state = SyncState()
        self._reader = TableReader(source, self._background)
        self._catalogue = ServedCatalogue(publisher, self._background, self.state, store=store, clock=clock)

    def close(self) -> None:
        """End the background thread. No cycle may be under way."""
        self._catalogue.close()
        self._background.close()

    def use_signer(self, signer: Signer | None) -> None:
        """Sign with another key from the next cycle on. That cycle rebuilds the snapshot."""
        if key_id_of(signer) != key_id_of(self._signer):
            self._signer = signer
            self._reader.forget()

    async def restore(self) -> bool:
        """Publish the last-known-good snapshot, if nothing is served yet and there is a sound one.

        Returns:
            Whether it was published.
        """
        return await self._catalogue.restore(self._signer)

    async def cycle(self, next_attempt_in: Callable[[Outcome], float], *, unconditional: bool = False) -> Outcome:
        """Make the served catalogue agree with the table.

        Args:
            next_attempt_in: Called once, with the outcome; returns the seconds until the next cycle, for the log.
            unconditional: Read the table, whether its fingerprint has changed or not.
        """
        now = asyncio.get_running_loop().time
        started = now()
        self.state.last_attempt = self._clock()
        error: str | None = None
        reason: Reason | None = None
        try:
            outcome = await self._run(lambda: now() - started, unconditional=unconditional)
        except (SourceError, OSError, CatalogTooLarge) as failure:
            outcome, error, reason = Outcome.FAILED, str(failure), _reason(failure)
        except Refused as refusal:
            outcome, error, reason = Outcome.REFUSED, str(refusal), Reason.TABLE_EMPTY
        except Exception as bug:  # a bug of ours fails this cycle, but does not end the master
            log.exception("Unexpected failure in a sync cycle")
            outcome, error = Outcome.FAILED, f"unexpected {type(bug).__name__}: {bug}"
            reason = Reason.INTERNAL_ERROR
        self.state.last_duration_seconds = now() - started
        self._note(outcome, error, reason, next_attempt_in(outcome))
        return outcome

    async def _run(self, elapsed: Callable[[], float], *, unconditional: bool) -> Outcome:
        signer = self._signer
        table = await self._reader.read(signer, serving=self._catalogue.served is not None, unconditional=unconditional)
        if table is None:
            await self._catalogue.store_again(self._signer)
            return Outcome.UNCHANGED
        self.state.findings = table.builder.findings
        await self._judge_rows(table.builder)
        self._judge_catalogue(table.builder)
        published = await self._catalogue.publish(table.builder, signer, elapsed)
        # Where the signing key was rotated meanwhile, the next cycle must not find the table unchanged.
        if signer is self._signer:
            self._reader.remember(table)
        else:
            self._reader.forget()
        return Outcome.PUBLISHED if published else Outcome.UNCHANGED

    async def _judge_rows(self, builder: SnapshotBuilder) -> None:
        if self._gate is not None:
            await self._gate.apply(builder, self._catalogue.served)

    def _judge_catalogue(self, builder: SnapshotBuilder) -> None:
        """Raise `Refused` where the table has nothing to serve: an emptied table breaks every client at once."""
        if builder.count or self._allow_empty:
            return
        rows = builder.findings.source_rows
        found = f"none of its {rows} rows can be served" if rows else "it is empty"
        raise Refused(
            f"obex_dapl_functions: {found}; the catalogue stays as it is. "
            "If this is intended, set ALLOW_EMPTY_CATALOG=true."
        )

    def _note(self, outcome: Outcome, error: str | None, reason: Reason | None, delay: float) -> None:
        """Record the end of a cycle, and log a failure."""
        self.state.cycles[outcome] += 1
        self.state.last_outcome, self.state.last_error, self.state.last_reason = outcome, error, reason
        if error is None:
            self.state.last_success = self._clock()
            self.state.restored_age_seconds = None
            return
        served = self._catalogue.served
        log.error(
            "Sync failed" if outcome is Outcome.FAILED else "Sync refused",
            error=error,
            reason=reason,
            serving_generation=None if served is None else served.generation,
            next_attempt_in_seconds=round(delay, 3),
        )


def _reason(failure: SourceError | OSError | CatalogTooLarge) -> Reason:
    if isinstance(failure, SourceError):
        return failure.reason
    return Reason.CATALOGUE_TOO_LARGE if isinstance(failure, CatalogTooLarge) else Reason.MACHINE_LIMIT
