"""Servers with one defect each, which breaks a promise about the database."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.control_plane import postgres, propagation, served_catalogue, sync, table_reading
from definition_server.control_plane.publisher import to_shared_memory
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.sync_state import Outcome

_LEAK_BYTES = 24 << 20


def _after_each_cycle(act: Callable[[sync.Synchronizer, Outcome], None]) -> None:
    cycle = sync.Synchronizer.cycle

    async def then_act(
        self: sync.Synchronizer, next_attempt_in: Callable[[Outcome], float], *, unconditional: bool = False
    ) -> Outcome:
        outcome = await cycle(self, next_attempt_in, unconditional=unconditional)
        act(self, outcome)
        return outcome

    sync.Synchronizer.cycle = then_act


def fails_closed() -> None:
    """Serves nothing while the database cannot be read, so that no answer is old."""

    def empty(self: sync.Synchronizer, outcome: Outcome) -> None:
        if outcome is Outcome.FAILED:
            publisher = self.catalogue._publisher
            built = SnapshotBuilder().build(generation=publisher.next_generation, created_at_ns=0)
            publisher.publish(to_shared_memory(built))

    _after_each_cycle(empty)


def dies_of_it() -> None:
    """Exits when the database cannot be read, and relies on a supervisor."""

    def die(_: sync.Synchronizer, outcome: Outcome) -> None:
        if outcome is Outcome.FAILED:
            os._exit(1)

    _after_each_cycle(die)


def leaks() -> None:
    """Leaks memory in every failed cycle."""
    kept: list[bytearray] = []

    def keep(_: sync.Synchronizer, outcome: Outcome) -> None:
        if outcome is Outcome.FAILED:
            kept.append(bytearray(os.urandom(1)) * _LEAK_BYTES)

    _after_each_cycle(keep)


def keeps_dead_connection() -> None:
    """Never connects a second time."""

    connect, connected = postgres.PostgresSource._connect, []

    async def once(self: postgres.PostgresSource) -> postgres.AsyncConnection[Any]:
        if connected:
            raise postgres.psycopg.OperationalError("the connection is closed")
        connected.append(await connect(self))
        return connected[0]

    postgres.PostgresSource._connect = once


def waits_for_ever() -> None:
    """Has no timeout for the database's answer."""

    async def limited(
        _: postgres.PostgresSource, work: Coroutine[Any, Any, object], limit: float | None = None
    ) -> object:
        return await work

    postgres.PostgresSource._limited = limited


def accepts_empty() -> None:
    """Treats every table as intended, even an emptied table: nothing is held."""

    async def let_pass(*_: object) -> None:
        return None

    served_catalogue.ServedCatalogue._judge = let_pass


def forgets_rotation() -> None:
    """Does not use a new password after SIGHUP."""

    async def use_url(_: postgres.PostgresSource, url: str) -> None:
        return None

    postgres.PostgresSource.use_url = use_url


def never_looks_again() -> None:
    """Reads once over a second connection and treats every later change check as unchanged."""
    begin = postgres._Reading.begin

    async def always_the_same(self: postgres._Reading, **_: bool) -> None:
        await begin(self)
        if not self.fingerprint.startswith("1/"):
            self.fingerprint = "the same"

    postgres._Reading.begin = always_the_same


def publishes_half() -> None:
    """Publishes the rows read so far when the reading is interrupted, and holds nothing."""
    accepts_empty()
    batches = postgres._Reading.batches

    async def as_far_as_it_goes(self: postgres._Reading, *ranges: Any) -> AsyncIterator[list[Row]]:
        try:
            async for rows in batches(self, *ranges):
                yield rows
        except (SourceError, postgres.psycopg.Error, TimeoutError):
            return

    postgres._Reading.batches = as_far_as_it_goes


def reads_by_page() -> None:
    """Reads the rows page by page, each page in its own transaction, so that no lock is held during the reading."""
    accepts_empty()

    async def no_ranges(self: postgres._Reading, before: object) -> None:
        pass

    async def pages(self: postgres._Reading, *ranges: Any) -> AsyncIterator[list[Row]]:
        connection = self._connection
        start = 0
        while True:
            await connection.rollback()
            cursor = postgres._raw(connection.cursor(binary=True))
            statement = self.plan.rows_sql(0, self._limits.definition)
            await cursor.execute(f"{statement} ORDER BY name LIMIT 500 OFFSET {start}")
            rows = await cursor.fetchall()
            if not rows:
                return
            yield [self.plan.row(row, too_large=False) for row in rows]
            start += len(rows)
            await asyncio.sleep(0.1)  # the table may change between two parts

    postgres._Reading.ranges = no_ranges
    postgres._Reading.batches = pages


def serves_what_policies_leave() -> None:
    """Reads the rows that row-level security shows, and treats them as the whole table."""
    postgres.SETTINGS_SQL = postgres.SETTINGS_SQL.replace("'row_security', 'off'", "'row_security', 'on'")


def sees_rows_alone() -> None:
    """Checks for changes only by the versions of rows, and not by the tables of the rows."""
    table_reading._VERSION_IN_TABLE = table_reading._VERSION_IN_TABLE.replace("tableoid::bigint", "0")
    row = postgres._Reading._row

    async def without_state(self: postgres._Reading, statement: Any) -> tuple[Any, ...]:
        found = await row(self, statement)
        return (found[0], b"") if statement is postgres.SHAPE_SQL else found

    postgres._Reading._row = without_state


def loses_the_pin_in_a_cycle() -> None:
    """Serves the catalogue of the last cycle, even if an operator has pinned another one."""

    def unpin(self: sync.Synchronizer, _: Outcome) -> None:
        self.catalogue._wishes.pin(None)

    _after_each_cycle(unpin)


def times_the_check_that_finds_a_change() -> None:
    """Measures a change from the check that found it, and not from the last check that did not find it."""
    change_read = propagation.Propagation.change_read

    def from_this_check(self: propagation.Propagation) -> None:
        change_read(self)
        if self._previous is not None:
            self._previous = self._check

    propagation.Propagation.change_read = from_this_check


def measures_two_checks_back() -> None:
    """Measures the delay of a change from a wrong check, which was long before the last check that did not find the
    change."""
    add = propagation.Propagation._add

    def later(self: propagation.Propagation, seconds: float) -> None:
        add(self, seconds + 2.0)

    propagation.Propagation._add = later
