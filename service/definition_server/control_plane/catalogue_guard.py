"""Applies the guard: compares each catalogue that was read with the newest that passed, and with its baseline.

The baseline is the catalogue that was the newest before the first change of the last `WINDOW_SECONDS`. So a table that
loses some commands in every cycle is held once the losses of that time exceed the threshold. The baseline is not kept
across a restart: then the first comparison is with the stored catalogue.

Two kinds of catalogue pass without a comparison: one that an operator has accepted, and one that is in the history, so
that a change can always be undone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.guard import DEFAULTS, Contents, Judgement, Thresholds, judge
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.observability.reasons import Reason

WINDOW_SECONDS = 3600.0
_ALL_PERCENT = 100.0

REASONS = {
    "emptied": Reason.TABLE_EMPTY,
    "shrunk": Reason.CATALOGUE_SHRUNK,
    "grown": Reason.CATALOGUE_GROWN,
    "rows_held": Reason.TOO_MANY_ROWS_HELD,
    "changed": Reason.CATALOGUE_CHANGED,
}
"""`Concern` → why the cycle was held."""


class CatalogueGuard:
    """Judges catalogues, and remembers those that passed."""

    def __init__(self, background: Background, *, limits: Thresholds = DEFAULTS, allow_empty: bool = False) -> None:
        self._background = background
        self._limits = limits
        # Hashes are collected only if a limit needs them.
        self._with_hashes = limits.changed_percent < _ALL_PERCENT
        self._allow_empty = allow_empty
        # Contents instead of snapshots, so that a replaced snapshot is not kept in memory.
        self._newest: Contents | None = None
        self._weighed: Contents | None = None
        self._baseline: tuple[float, Contents] | None = None

    async def judge(
        self,
        candidate: Snapshot,
        before: Snapshot | None,
        *,
        changed: Iterable[bytes] | None = None,
        builder: SnapshotBuilder | None = None,
        held: AbstractSet[bytes],
        held_before: int,
        now: float,
        excused: Callable[[str], bool],
    ) -> Judgement | None:
        """The reason why ``candidate`` must wait; None if it may be published.

        Args:
            candidate: The catalogue that was read.
            before: The newest catalogue that passed; None if there is none.
            changed: The names that may differ between the two; None: any name.
            builder: Has built ``candidate``, which need not be read then; None: it is not at hand.
            held: The commands whose row the gate holds.
            held_before: The number of commands that it held in ``before``.
            now: Seconds of the loop's clock.
            excused: Returns whether a version was accepted, or published before.
        """
        if not candidate.count:
            empty = Contents(candidate.version_hash, frozenset(), 0)
            served = None if before is None else await self._contents(before)
            return None if self._allow_empty else judge(empty, served, limits=self._limits)
        if before is None or candidate.version_hash == before.version_hash or excused(candidate.version_hash):
            return None
        served = await self._contents(before)
        if changed is None:
            contents = await self._background.run(self._contents_of, candidate, builder)
        else:
            contents = await self._background.run(served.after, candidate, changed, with_hashes=self._with_hashes)
        self._weighed = contents
        return judge(
            contents,
            served,
            self._baseline_at(now),
            held=held,
            held_before=held_before,
            limits=self._limits,
        )

    async def passed(self, candidate: Snapshot, before: Snapshot | None, now: float, *, excused: bool) -> None:
        """Note that ``candidate`` replaces ``before`` as the newest catalogue.

        Args:
            candidate: The catalogue that passed.
            before: The one that it replaces.
            now: Seconds of the loop's clock.
            excused: Whether it passed without a comparison. Later catalogues are then compared with it.
        """
        if before is None or candidate.version_hash == before.version_hash:
            return
        if excused:
            self._baseline = None
        elif self._baseline_at(now) is None:
            self._baseline = now, await self._contents(before)
        if self._weighed is not None and self._weighed.version == candidate.version_hash:
            self._newest = self._weighed
        self._weighed = None

    async def prepare(self, newest: Snapshot, builder: SnapshotBuilder | None = None) -> None:
        """Note the contents of ``newest``, with which the next catalogue will be compared, unless they are known.

        They come from ``builder``, which has built ``newest``. Without a builder the snapshot is read: ten seconds of
        CPU time and more for a million commands.
        """
        await self._contents(newest, builder)

    def _baseline_at(self, now: float) -> Contents | None:
        """The baseline; None if it is too old."""
        if self._baseline is None or now - self._baseline[0] > WINDOW_SECONDS:
            return None
        return self._baseline[1]

    async def _contents(self, snapshot: Snapshot, builder: SnapshotBuilder | None = None) -> Contents:
        if self._newest is None or self._newest.version != snapshot.version_hash:
            self._newest = await self._background.run(self._contents_of, snapshot, builder)
        return self._newest

    def _contents_of(self, snapshot: Snapshot, builder: SnapshotBuilder | None) -> Contents:
        if builder is None:
            return Contents.of(snapshot, with_hashes=self._with_hashes)
        return Contents.built(snapshot, builder.digests(), builder.blank, with_hashes=self._with_hashes)
