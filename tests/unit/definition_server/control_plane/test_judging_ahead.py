"""The first rows of a first reading are judged while the others are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from tests.support.fakes import FakeSource
from tests.support.gate import CheckerHere
from tests.support.logs import captured_logs, logged
from tests.support.loop import eventually
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import HoldingGate

from definition_server.catalog.builder import RowFacts, SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.gate import Gate
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.checker import Content, Judgement
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.row_gate import RowGate
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome

FIRST_ROWS = 100


class Checker(CheckerHere):
    """A checker that judges only while `works` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.works = asyncio.Event()
        self.works.set()

    async def check(self, contents: Sequence[Content]) -> list[Judgement]:
        await self.works.wait()
        return await super().check(contents)

    @property
    def names(self) -> list[bytes]:
        return [content.name for content in self.judged]


class Bench:
    """A gate, and readings that give it rows in two batches."""

    def __init__(self, **limits: float) -> None:
        self.checker = Checker()
        self.gate = RowGate(Gate(), self.checker, first_seconds=0, first_rows=FIRST_ROWS, **limits)

    def read(self, first: Sequence[Row], *others: Row) -> SnapshotBuilder:
        self.gate.prepare()
        builder = SnapshotBuilder(known=self.gate.served)
        for rows in (first, others):
            self.gate.rows_read(rows)
            builder.add(rows)
        return builder

    async def judged(self, number: int) -> None:
        await eventually(lambda: len(self.checker.judged) == number, f"{number} rows are judged")


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    yield made
    await made.gate.close()


def rows(number: int, begin: int = 0) -> list[Row]:
    return [row(f"c{n:03}", f"x = {n}") for n in range(begin, begin + number)]


async def test_verdicts_given_during_the_reading_are_used_after_it(bench: Bench) -> None:
    builder = bench.read([row("bad", "if"), row("good", "x = 1"), row("", "x = 2"), row("none")._replace(code=None)])
    await bench.judged(2)
    await bench.gate.apply(builder, None)
    assert bench.checker.names == [b"bad", b"good"], (
        "no row is judged twice, and no row that cannot be served is judged"
    )
    assert builder.digests().keys() == {b"good"}
    assert builder.findings.unserved["code_invalid"] == 1


async def test_the_review_waits_for_rows_that_are_being_judged(bench: Bench) -> None:
    bench.checker.works.clear()
    builder = bench.read([row("bad", "if"), row("good")])
    review = asyncio.create_task(bench.gate.apply(builder, None))
    await eventually(lambda: bench.gate._ahead is None, "the review has begun")
    assert not review.done()
    bench.checker.works.set()
    await review
    assert bench.checker.names == [b"bad", b"good"]


@pytest.mark.parametrize(
    ("first", "others", "ahead", "all_in_all"),
    [(300, 50, 128, 128), (64, 300, 64, 128), (10, 20, 10, 30), (10, 300, 10, 138)],
    ids=["enough at once", "some more afterwards", "fewer rows than the limit", "a small batch"],
)
async def test_rows_judged_during_the_reading_count_towards_the_rows_that_a_start_waits_for(
    first: int, others: int, ahead: int, all_in_all: int, bench: Bench
) -> None:
    """Rows are judged 64 at a time, until 100 or more are judged."""
    builder = bench.read(rows(first), *rows(others, first))
    await bench.judged(ahead)
    await bench.gate.apply(builder, None)
    assert len(bench.checker.judged) == all_in_all
    assert builder.findings.unchecked == first + others - all_in_all


@pytest.mark.parametrize("begun_ahead", [True, False])
async def test_a_checker_that_hangs_holds_up_the_first_publication_only_for_the_longest_time(begun_ahead: bool) -> None:
    """Its rows are served unchecked; they are judged while they are served."""
    bench = Bench(first_longest=0.05)
    bench.checker.works.clear()
    builder = bench.read([row("bad", "if"), *rows(200)])
    if begun_ahead:
        await eventually(lambda: bench.gate._ahead is not None and bench.gate._ahead.done(), "no more is judged ahead")
    await asyncio.wait_for(bench.gate.apply(builder, None), 10.0)
    assert bench.checker.judged == []
    assert builder.findings.unchecked == 201
    found: list[int] = []
    bench.gate.on_bad_rows_served(lambda: found.append(1))
    bench.checker.works.set()
    bench.gate.cycle_ended(Snapshot(builder.build(generation=1, created_at_ns=1).to_bytes()))
    await eventually(lambda: found == [1], "the bad row is found")
    await bench.gate.close()


async def test_what_is_judged_ahead_counts_for_its_own_reading_even_if_it_begins_late(bench: Bench) -> None:
    """Without a background thread, `apply` runs before the task that was made for the first rows."""
    builder = bench.read(rows(300))
    await bench.gate.apply(builder, None)
    assert len(bench.checker.judged) == 128
    await bench.gate.apply(bench.read(rows(300, 1000)), None)
    assert len(bench.checker.judged) == 256, "the next reading has a whole budget"


async def test_rows_of_a_later_reading_are_judged_only_after_all_rows_are_read(bench: Bench) -> None:
    await bench.gate.apply(bench.read(rows(2)), None)
    builder = bench.read([*rows(1), row("new", "y = 1")])
    await asyncio.sleep(0)
    assert len(bench.checker.judged) == 2
    await bench.gate.apply(builder, None)
    assert bench.checker.names[2:] == [b"new"]


async def test_rows_that_an_earlier_run_has_stored_are_not_waited_for(bench: Bench) -> None:
    stored = SnapshotBuilder()
    stored.add(rows(5))
    snapshot = Snapshot(stored.build(generation=1, created_at_ns=1).to_bytes())
    bench.checker.works.clear()
    builder = bench.read(rows(5))
    await asyncio.wait_for(bench.gate.apply(builder, snapshot), 5.0)
    assert builder.findings.unchecked == 5
    await bench.gate.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "judging that is no longer needed ends with the gate"


async def test_after_a_reading_that_failed_the_rows_of_the_next_are_judged(bench: Bench) -> None:
    bench.read(rows(FIRST_ROWS))
    await bench.judged(FIRST_ROWS)
    await asyncio.sleep(0)
    builder = bench.read(rows(FIRST_ROWS, FIRST_ROWS))
    await bench.judged(2 * FIRST_ROWS)
    await bench.gate.apply(builder, None)
    assert builder.findings.unchecked == 0


async def test_rows_are_served_unchecked_and_one_error_is_logged_if_the_checker_fails(bench: Bench) -> None:
    bench.checker.refusal = "no process"
    with captured_logs() as lines:
        builder = bench.read(rows(3))
        await bench.gate.apply(builder, None)
    assert builder.findings.unchecked == 3
    assert len(logged(lines, "Rows cannot be checked; changed ones are served unchecked", log_level="error")) == 1


async def test_a_gate_without_checks_judges_nothing() -> None:
    checker = Checker()
    gate = RowGate(Gate("off", "off"), checker)
    gate.rows_read(rows(3))
    assert gate._ahead is None
    await gate.close()


def test_row_facts_of_a_row_equal_those_of_the_builder() -> None:
    for kind, interface, code in ((None, None, b""), (b"module", b"[1]", b"x = 1"), (b"", b"", b"y")):
        given = row("c")._replace(type=kind, interface=interface, code=code)
        builder = SnapshotBuilder()
        builder.add([given])
        assert RowFacts.of(given) == builder.row_facts(b"c")


async def test_the_gate_gets_rows_during_a_reading_only_until_the_first_publication() -> None:
    gate, publisher = HoldingGate(), Publisher()
    source = FakeSource(row("a"), row("b"))
    synchronizer = Synchronizer(source, publisher, gate=gate)
    source.fail(SourceError("gone"), after_rows=1)
    assert await synchronizer.cycle(lambda _: 1.0) is Outcome.FAILED
    assert [each.name for each in gate.rows] == [b"a"]
    assert await synchronizer.cycle(lambda _: 1.0) is Outcome.PUBLISHED
    assert [each.name for each in gate.rows] == [b"a", b"a", b"b"]
    source.replace(row("a", "new = 1"), row("b"))
    assert await synchronizer.cycle(lambda _: 1.0) is Outcome.PUBLISHED
    assert len(gate.rows) == 3
    synchronizer.close()
    publisher.close()
