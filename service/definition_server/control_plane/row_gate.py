"""The gate in the sync cycle: passes the rows of a review to the checker, and logs changes.

Before the first publication it judges for a limited time, so that a large catalogue is not delayed. It begins with the
first rows while the others are still being read. The other rows are judged while they are served. If a bad row is found
then, the table is read again, and the next publication holds the row or leaves it out.

If no checker can be started, changed rows are served unchecked: the catalogue is then no worse than without a gate,
whereas holding every change would stop all updates. The rows are judged as soon as a checker can be started.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from itertools import islice
from typing import ParamSpec, Protocol, TypeVar

from definition_server.catalog.builder import RowFacts, SnapshotBuilder
from definition_server.catalog.content_check import Flaw
from definition_server.catalog.definition import Row as TableRow
from definition_server.catalog.gate import Change, Gate, Held, Review, facts_of, reason_of
from definition_server.catalog.signing import UNSIGNED
from definition_server.catalog.snapshot import Snapshot
from definition_server.catalog.validation import Findings, reason_not_served
from definition_server.control_plane.background import Background
from definition_server.control_plane.checker import CannotCheck, Content, Judgement
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

FIRST_SECONDS, FIRST_ROWS = 0.2, 500
"""Before the first publication, rows are judged until both limits are exceeded."""
FIRST_LONGEST_SECONDS = 30.0
"""Then the first publication waits no longer, however few rows are judged: 500 hostile rows, or a checker that hangs,
would take many minutes. A checker may take half of it to start (`checker.START_SECONDS`)."""
_BATCH_ROWS, _BATCH_OCTETS = 64, 1024 * 1024
_NAMES_LOGGED = 10
_PAUSES = 3.0
"""The pause in seconds for each second in which rows were judged that are served already. A scheduler that divides CPUs
among groups of processes (cgroups, sessions) charges the workers' group for the checker's CPU time, whatever the
checker's priority in the group is."""
_LONGEST_PAUSE = 1.0
"""The longest pause in seconds. It is limited because a batch may have taken long without using a CPU: it may have
waited for a CPU, or have been stopped.
"""

Row = tuple[bytes, RowFacts, bytes]
"""Name, content and key of a row."""


class RowChecker(Protocol):
    """The interface of a judge of contents, such as `checker.Checker`."""

    async def check(self, contents: Sequence[Content]) -> list[Judgement]:
        """The judgement of each content. Raises `CannotCheck` if no process can be started."""

    async def prepare(self) -> None:
        """Begin to start the process that `check` needs."""

    def lower_priority(self) -> None:
        """Lower the priority below that of processes that serve."""

    async def close(self) -> None:
        """End the process."""


class _Budget:
    """The limit of the judging for which a first publication waits."""

    def __init__(self, rows: int, seconds: float, longest: float) -> None:
        """The budget is spent when both its rows and its seconds are spent, or after ``longest`` seconds."""
        self._rows, self._seconds = rows, seconds
        self.longest = longest
        """Seconds that are left at most."""

    @property
    def spent(self) -> bool:
        """Whether no more rows are judged before the publication."""
        return (self._rows <= 0 and self._seconds <= 0) or self.longest <= 0

    def take(self, rows: int, seconds: float) -> None:
        """Note that ``rows`` were judged in ``seconds``."""
        self._rows -= rows
        self._seconds -= seconds
        self.longest -= seconds


class RowGate:
    """Applies a `Gate` to the rows of each reading of the table."""

    def __init__(
        self,
        gate: Gate,
        checker: RowChecker,
        *,
        patient: RowChecker | None = None,
        background: Background | None = None,
        clock: Callable[[], float] = time.time,
        first_seconds: float = FIRST_SECONDS,
        first_rows: int = FIRST_ROWS,
        first_longest: float = FIRST_LONGEST_SECONDS,
        logs: bool = True,
    ) -> None:
        """
        Args:
            gate: Remembers verdicts.
            checker: Judges contents.
            patient: Judges contents that are served already. If None, ``checker`` judges them.
            background: The thread in which the rows of a large catalogue are compared. If None, the event loop's
                thread.
            clock: Seconds since the epoch.
            first_seconds: See `FIRST_SECONDS`.
            first_rows: See `FIRST_ROWS`.
            first_longest: See `FIRST_LONGEST_SECONDS`.
            logs: Whether changes are logged. (False for a command, which reports them itself.)
        """
        self._gate = gate
        self._checker = checker
        self._patient = patient
        self._background = background
        self._clock = clock
        self._first_seconds = first_seconds
        self._first_rows = first_rows
        self._first_longest = first_longest
        self._logs = logs
        self._unchecked = ""
        self._findings = Findings()
        self._preparing: asyncio.Task[None] | None = None
        self._budget = self._whole_budget()
        """Of the next review."""
        self._ahead: asyncio.Task[None] | None = None
        """The task that judges the first rows while others are read."""
        self._rest: asyncio.Task[None] | None = None
        self._on_bad_rows_served: Callable[[], None] = lambda: None
        self._unsure_since = False
        self.unsure = False
        """Whether a row was refused although another cause is possible, so that it must be judged again."""

    @property
    def held(self) -> tuple[Held, ...]:
        """The commands that are held at their last good version, in name order."""
        return tuple(self._gate.held.values())

    @property
    def served(self) -> Mapping[bytes, bytes]:
        """Name → content hash of every command that is served since the last `apply`, which replaces this mapping."""
        return self._gate.served

    @property
    def pending(self) -> int:
        """Number of rows that are served and not judged yet."""
        return len(self._gate.pending)

    def on_bad_rows_served(self, action: Callable[[], None]) -> None:
        """Call ``action`` when rows that are served were found bad, so that the table must be read again."""
        self._on_bad_rows_served = action

    def prepare(self) -> None:
        """Begin to start the checker: rows that changed are being read."""
        if self._gate.checks and (self._preparing is None or self._preparing.done()):
            self._preparing = asyncio.create_task(self._checker.prepare())
        if self._ahead is not None and self._ahead.done():  # the review of a reading that failed
            self._ahead, self._budget = None, self._whole_budget()

    def rows_read(self, rows: Sequence[TableRow]) -> None:
        """Begin to judge ``rows`` if they are the first rows ever read, so that `apply` need not wait for their
        verdicts.
        """
        gate = self._gate
        if gate.checks and gate.first and not gate.served and self._ahead is None:
            self._ahead = asyncio.create_task(self._judge_ahead(rows, self._budget))

    def _whole_budget(self) -> _Budget:
        return _Budget(self._first_rows, self._first_seconds, self._first_longest)

    async def _judge_ahead(self, rows: Iterable[TableRow], budget: _Budget) -> None:
        gate = self._gate

        def unknown() -> Iterator[Row]:
            for row in rows:
                if reason_not_served(row) is None:
                    facts, name = RowFacts.of(row), row.name or b""
                    key = gate.key(name, facts.interface, facts.code)
                    if gate.known(key) is None:
                        yield name, facts, key

        with suppress(CannotCheck):  # `apply` lets the same rows be judged, and reports the failure
            await self._judge(unknown(), lambda *_: None, budget)

    async def apply(self, builder: SnapshotBuilder, last_good: Snapshot | None) -> AbstractSet[bytes]:
        """Let ``builder`` serve, hold or leave out each of its rows.

        Args:
            builder: The rows of one reading.
            last_good: The newest catalogue that passed, from which the last good version of a command is taken. None:
                there is none.

        Returns:
            The names that are served in an earlier version because their row is held.
        """
        gate = self._gate
        self._findings = builder.findings
        review = await self._in_background(Review, gate, builder, last_good)  # copies the hashes of all rows
        if gate.checks:
            await self._in_background(review.find_changed)
            budget, self._budget = self._budget, self._whole_budget()
            if self._ahead is not None and not review.complete:
                ahead, self._ahead = self._ahead, None
                await ahead
            try:
                await self._judge(review.unjudged(), review.note, budget if gate.first else None)
                await self._judge(review.doubtful(), review.note_last)
                self._note_checking("")
            except CannotCheck as error:
                self._note_checking(str(error))
        self.unsure, self._unsure_since = self._unsure_since, False
        replaced = [gate.served]
        change = review.settle(self._clock())
        builder.comparison_is_over()
        self._release(replaced)
        if self._logs:
            _log_change(change, gate)
        return gate.held.keys()

    async def _judge(
        self, rows: Iterable[Row], note: Callable[[bytes, Flaw], None], budget: _Budget | None = None
    ) -> None:
        """Judge ``rows``, until the ``budget`` is spent if there is one."""
        now = asyncio.get_running_loop().time
        for batch in _batches(rows):
            if budget is not None and budget.spent:
                return
            begun = now()
            try:
                async with asyncio.timeout(None if budget is None else budget.longest):
                    await self._judge_batch(batch, note, self._checker.check)
            except TimeoutError:
                batch = []  # its rows are judged while they are served
            if budget is not None:
                budget.take(len(batch), now() - begun)

    async def _judge_batch(
        self,
        batch: list[Row],
        note: Callable[[bytes, Flaw], None],
        check: Callable[[Sequence[Content]], Awaitable[list[Judgement]]],
    ) -> None:
        checks = self._gate.checks
        contents = [Content(checks, name, facts.interface, facts.code) for name, facts, _ in batch]
        for (name, _, key), judgement in zip(batch, await check(contents), strict=True):
            if judgement.lasting:
                self._gate.remember(key, judgement.flaws)
            elif reason_of(judgement.flaws) is not None:
                self._unsure_since = True
            note(name, judgement.flaws)

    async def _check_patiently(self, contents: Sequence[Content]) -> list[Judgement]:
        """Judge contents that are served already.

        On busy CPUs the patient checker may get no CPU for a long time, and then be late with a row that has no flaw.
        So its uncertain verdicts are judged again by the other checker, which gets its share of the CPUs.
        """
        if self._patient is None:
            return await self._checker.check(contents)
        try:
            judged = await self._patient.check(contents)
        except CannotCheck:
            return await self._checker.check(contents)
        unsure = [number for number, judgement in enumerate(judged) if not judgement.lasting]
        if unsure:
            again = await self._checker.check([contents[number] for number in unsure])
            for number, judgement in zip(unsure, again, strict=True):
                judged[number] = judgement
        return judged

    def cycle_ended(self, newest: Snapshot | None) -> None:
        """Judge the rows of ``newest`` that passed without a verdict, while they are served."""
        if newest is None:
            return
        self._checker.lower_priority()
        if self._gate.pending and (self._rest is None or self._rest.done()):
            self._rest = asyncio.create_task(self._judge_rest(newest))

    async def _judge_rest(self, newest: Snapshot) -> None:
        gate, bad, now = self._gate, 0, asyncio.get_running_loop().time

        def note(name: bytes, flaws: Flaw) -> None:
            nonlocal bad
            bad += gate.note_pending(name, waiting[name], flaws)
            self._findings.unchecked = len(gate.pending)

        try:
            waiting = await self._in_background(gate.pending.copy)
            for names in _slices(waiting):
                # In the thread of lower priority, so that this does not delay the workers.
                rows = await self._in_background(_served_rows, newest, names, waiting, gate.key)
                unknown = []
                for row in rows:
                    name, _, key = row
                    known = gate.known(key)
                    if gate.pending.get(name) != waiting[name]:
                        continue
                    if known is None:
                        unknown.append(row)
                    else:
                        note(name, known)
                for batch in _batches(unknown):
                    began = now()
                    await self._judge_batch(batch, note, self._check_patiently)
                    # On busy CPUs a batch takes longer, and the pause becomes longer too.
                    await asyncio.sleep(min(_PAUSES * (now() - began), _LONGEST_PAUSE))
            self._note_checking("")
        except CannotCheck as error:
            self._note_checking(str(error))
            return
        except Exception:  # a bug of ours: the rows stay unchecked, and cycles continue
            log.exception("Unexpected failure in judging rows")
            return
        log.info("Rows that were served unchecked are checked", bad=bad, unchecked=len(gate.pending) - bad)
        if bad:
            self._on_bad_rows_served()

    async def _in_background(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if self._background is None:
            return work(*args, **kwargs)
        return await self._background.run(work, *args, **kwargs)

    def _release(self, replaced: list[dict[bytes, bytes]]) -> None:
        """Free the tables in ``replaced``, which holds the last reference to them. They may have a million rows."""
        if self._background is not None:
            self._background.soon(replaced.clear)

    async def close(self) -> None:
        """End the checker."""
        tasks = [task for task in (self._rest, self._preparing, self._ahead) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # A cancelled task keeps its frame, and so the catalogue, in memory.
        self._rest = self._preparing = self._ahead = None
        await self._checker.close()
        if self._patient is not None:
            await self._patient.close()

    def _note_checking(self, error: str) -> None:
        """Log once that rows cannot be judged, and once that they can be judged again."""
        if error and not self._unchecked and self._logs:
            log.error(
                "Rows cannot be checked; changed ones are served unchecked",
                error=error,
                remedy="see the limits of processes and memory of this machine or container; it is tried again",
            )
        elif self._unchecked and not error:
            log.info("Rows are checked again")
        self._unchecked = error


def _slices(names: Iterable[bytes]) -> Iterator[list[bytes]]:
    """``names`` in pieces of `_BATCH_ROWS`."""
    left = iter(names)
    while piece := list(islice(left, _BATCH_ROWS)):
        yield piece


def _served_rows(
    newest: Snapshot,
    names: Iterable[bytes],
    digests: Mapping[bytes, bytes],
    key: Callable[[bytes, bytes, bytes], bytes],
) -> list[Row]:
    """The ``names`` that ``newest`` serves with these content hashes."""
    signed = newest.footer.key_id != UNSIGNED
    found = []
    for name in names:
        message = newest.answer(name)
        if message is not None and message[-64:] == digests[name]:
            facts = facts_of(message, signed=signed)
            found.append((name, facts, key(name, facts.interface, facts.code)))
    return found


def _batches(rows: Iterable[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    octets = 0
    for row in rows:
        batch.append(row)
        octets += len(row[1].interface) + len(row[1].code)
        if len(batch) == _BATCH_ROWS or octets >= _BATCH_OCTETS:
            yield batch
            batch, octets = [], 0
    if batch:
        yield batch


def _log_change(change: Change, gate: Gate) -> None:
    """Log the changes by a review, if there are any."""
    if change.held:
        log.warning(
            "Commands are held at their last good version",
            count=len(change.held),
            held=len(gate.held),
            commands=[
                {
                    "name": held.name,
                    "reason": str(held.reason),
                    "served": held.hash_served,
                    "refused": held.hash_refused,
                }
                for held in change.held[:_NAMES_LOGGED]
            ],
            remedy="correct the rows; the next cycle serves them",
        )
    if change.released:
        log.info(
            "Commands are no longer held",
            count=len(change.released),
            held=len(gate.held),
            names=change.released[:_NAMES_LOGGED],
        )
    if change.left_out:
        log.warning(
            "Commands are left out: no good version is known",
            count=len(change.left_out),
            commands=[{"name": name, "reason": str(reason)} for name, reason in change.left_out[:_NAMES_LOGGED]],
            remedy="correct the rows; the next cycle serves them",
        )
    if change.tolerated:
        log.warning(
            "Much of the catalogue does not compile with the server's Python; it is served as it is",
            count=change.tolerated,
            remedy="run the server with the Python version of the executors, or set GATE_CODE",
        )
