"""The gate in the sync cycle: bad rows never reach clients, a first start waits for a limited time, and cycles always
continue."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.fakes import FakeClock, FakeSource
from tests.support.gate import CheckerHere, refresh
from tests.support.leftovers import nothing_left
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually
from tests.support.snapshots import row

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.content_check import Flaw
from definition_server.catalog.gate import Gate
from definition_server.control_plane import row_gate
from definition_server.control_plane.background import Background
from definition_server.control_plane.checker import Content, Judgement
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.row_gate import RowGate
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome

HELD = "Commands are held at their last good version"


class Bench:
    """A synchronizer with a gate; its checker runs in this process."""

    def __init__(self, *, first_rows: int = 500, patient: CheckerHere | None = None) -> None:
        self.source = FakeSource(row("if"), row("else"))
        self.publisher = Publisher()
        self.checker = CheckerHere()
        self.gate = RowGate(
            Gate(), self.checker, patient=patient, clock=FakeClock(), first_seconds=0, first_rows=first_rows
        )
        self.synchronizer = Synchronizer(self.source, self.publisher, gate=self.gate)
        self.read_again = 0
        self.gate.on_bad_rows_served(self._read_again)

    def _read_again(self) -> None:
        self.read_again += 1
        self.synchronizer.read_again()

    async def cycle(self) -> Outcome:
        return await self.synchronizer.cycle(lambda _: 1.0)

    @property
    def codes(self) -> dict[str, str]:
        """Name → code of the catalogue, as a strict client reads it."""
        assert self.publisher.current is not None
        return refresh(self.publisher.current.snapshot)

    async def close(self) -> None:
        await self.gate.close()
        self.synchronizer.close()
        self.publisher.close()
        # In the present turn the loop still refers to the awaited task, and so to its exception, its frame and a
        # catalogue.
        await asyncio.sleep(0)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    with nothing_left():
        bench = Bench()
        yield bench
        await bench.close()


async def test_a_bad_row_is_held_while_others_advance_in_the_same_cycle(bench: Bench, logs: LogLines) -> None:
    await bench.cycle()
    bench.source.replace(row("if", "while"), row("else", "new = 1"))
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.codes == {"if": "pass", "else": "new = 1"}
    (line,) = logged(logs, HELD, log_level="warning")
    assert (line["count"], line["held"], line["commands"][0]["name"]) == (1, 1, "if")
    assert [held.name for held in bench.gate.held] == ["if"]
    assert bench.synchronizer.state.findings.held == {"code_invalid": 1}


async def test_a_bad_row_alone_changes_nothing_and_is_reported_once(bench: Bench, logs: LogLines) -> None:
    await bench.cycle()
    bench.source.replace(row("if", "while"), row("else"))
    assert await bench.cycle() is Outcome.UNCHANGED
    bench.source.touch()
    assert await bench.cycle() is Outcome.UNCHANGED
    assert len(logged(logs, HELD)) == 1
    bench.source.replace(row("if", "mended = 1"), row("else"))
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.codes["if"] == "mended = 1"
    assert logged(logs, "Commands are no longer held")[0]["names"] == ("if",)


async def test_at_most_ten_commands_are_named(bench: Bench, logs: LogLines) -> None:
    rows = [row(f"c{n}") for n in range(100)]
    bench.source.replace(*rows)
    await bench.cycle()
    bench.source.replace(*(row(f"c{n}", "if") for n in range(12)), *rows[12:])
    await bench.cycle()
    (line,) = logged(logs, HELD)
    assert (line["count"], len(line["commands"])) == (12, 10)


async def test_unchanged_rows_are_not_judged_again(bench: Bench) -> None:
    bench.source.replace(row("if", "one = 1"), row("else", "two = 2"))
    await bench.cycle()
    assert len(bench.checker.judged) == 2
    bench.source.replace(row("if", "new = 1"), row("else", "two = 2"))
    await bench.cycle()
    assert [content.code for content in bench.checker.judged[2:]] == [b"new = 1"]


async def test_a_first_start_waits_for_some_rows_and_the_remaining_rows_are_judged_while_serving(
    logs: LogLines,
) -> None:
    with nothing_left():
        bench = Bench(first_rows=64)
        bench.source.replace(*(row(f"c{n}", f"x = {n}") for n in range(300)), row("zz", "if"))
        assert await bench.cycle() is Outcome.PUBLISHED
        assert bench.publisher.current is not None
        assert bench.publisher.current.snapshot.count == 301
        assert bench.synchronizer.state.findings.unchecked > 0
        await eventually(lambda: bench.read_again == 1, "the rest is judged")
        assert bench.checker.low_priority
        assert await bench.cycle() is Outcome.PUBLISHED
        assert len(bench.codes) == 300
        assert bench.gate.pending == bench.synchronizer.state.findings.unchecked == 0
        (line,) = logged(logs, "Rows that were served unchecked are checked")
        assert (line["bad"], line["unchecked"]) == (1, 0)
        await bench.cycle()
        assert bench.read_again == 1
        await bench.close()


@pytest.mark.parametrize("starts", [True, False], ids=["", "none can be started"])
async def test_remaining_rows_are_judged_by_the_patient_checker_and_doubtful_ones_again_by_the_other_checker(
    starts: bool,
) -> None:
    with nothing_left():
        patient = CheckerHere()
        patient.refusal = "" if starts else "no process"
        patient.judgements[b"x = 200"] = patient.judgements[b"x = 201"] = Judgement(Flaw.CODE, lasting=False)
        bench = Bench(first_rows=64, patient=patient)
        bench.checker.judgements[b"x = 201"] = Judgement(Flaw.CODE)
        bench.source.replace(*(row(f"c{n:03}", f"x = {n}") for n in range(300)))
        await bench.cycle()
        before = len(bench.checker.judged)
        assert not patient.judged
        await eventually(lambda: bench.read_again == 1, "the rest is judged")
        assert len(bench.checker.judged) - before == (2 if starts else 300 - before)
        assert len(patient.judged) == (300 - before if starts else 0)
        await bench.cycle()
        assert bench.codes.keys() == {f"c{n:03}" for n in range(300) if n != 201}
        await bench.close()


class SlowChecker(CheckerHere):
    """A checker that takes a while for each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[float, float]] = []
        """When each batch began and ended."""

    async def check(self, contents: Sequence[Content]) -> list[Judgement]:
        began = time.monotonic()
        await asyncio.sleep(0.01)
        judged = await super().check(contents)
        self.batches.append((began, time.monotonic()))
        return judged


async def test_each_batch_of_the_remaining_rows_is_followed_by_a_pause_of_three_times_its_duration() -> None:
    with nothing_left():
        patient = SlowChecker()
        bench = Bench(first_rows=64, patient=patient)
        bench.source.replace(*(row(f"c{n}", f"x = {n}") for n in range(300)))
        await bench.cycle()
        await eventually(lambda: not bench.gate.pending, "the rest is judged")
        assert len(patient.batches) >= 3
        for (began, ended), (next_began, _) in pairwise(patient.batches):
            assert next_began - ended > 2.9 * (ended - began)
        await bench.close()


async def test_a_batch_that_took_long_is_not_followed_by_a_long_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_left():
        patient, longest, slept, sleep = SlowChecker(), 0.003, [], asyncio.sleep

        async def note(seconds: float) -> None:
            slept.append(seconds)
            await sleep(seconds)

        monkeypatch.setattr(row_gate, "_LONGEST_PAUSE", longest)
        bench = Bench(first_rows=64, patient=patient)
        bench.source.replace(*(row(f"c{n}", f"x = {n}") for n in range(300)))
        await bench.cycle()
        monkeypatch.setattr(row_gate.asyncio, "sleep", note)
        await eventually(lambda: not bench.gate.pending, "the rest is judged")
        assert slept.count(longest) == len(patient.batches) >= 3
        await bench.close()


async def test_rows_that_changed_before_the_remaining_rows_were_judged_are_judged_before_they_are_served() -> None:
    with nothing_left():
        bench = Bench(first_rows=64)
        rows = [row(f"c{n}", f"x = {n}") for n in range(300)]
        bench.source.replace(*rows)
        await bench.cycle()
        bench.source.replace(*rows[:-1], row("c299", "if"))
        await bench.cycle()
        assert bench.codes["c299"] == "x = 299"
        await bench.close()


async def test_without_a_checker_cycles_continue_and_rows_are_judged_later(bench: Bench, logs: LogLines) -> None:
    await bench.cycle()
    bench.checker.refusal = "no process"
    bench.source.replace(row("if", "while"), row("else", "new = 1"))
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.synchronizer.state.findings.unchecked == 2
    await bench.cycle()
    assert len(logged(logs, "Rows cannot be checked; changed ones are served unchecked", log_level="error")) == 1
    bench.checker.refusal = ""
    await bench.cycle()
    await eventually(lambda: bench.read_again == 1, "the rows are judged")
    assert len(logged(logs, "Rows are checked again")) == 1
    await bench.cycle()
    assert bench.codes == {"else": "new = 1"}
    assert bench.synchronizer.state.findings.unchecked == 0


async def test_a_row_whose_verdict_does_not_last_is_judged_again(bench: Bench) -> None:
    await bench.cycle()
    bench.checker.judgements[b"slow = 1"] = Judgement(Flaw.CODE, lasting=False)
    bench.source.replace(row("if", "slow = 1"), row("else"))
    await bench.cycle()
    assert bench.codes["if"] == "pass"
    await bench.cycle()
    assert bench.codes["if"] == "pass"
    assert bench.gate.unsure
    bench.checker.judgements.clear()
    await bench.cycle()  # the table has not changed, so without another check a good row would wait for an hour
    assert bench.codes["if"] == "slow = 1"
    judged = len(bench.checker.judged)
    assert not bench.gate.unsure
    await bench.cycle()
    assert len(bench.checker.judged) == judged


async def test_a_bug_in_judging_the_remaining_rows_is_logged_and_cycles_continue(
    monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    with nothing_left():
        bench = Bench(first_rows=64)
        bench.source.replace(*(row(f"c{n}", f"x = {n}") for n in range(130)))
        monkeypatch.setattr(row_gate, "_served_rows", lambda *_: 1 // 0)
        await bench.cycle()
        await eventually(lambda: logged(logs, "Unexpected failure in judging rows", log_level="error"), "the line")
        assert bench.gate.pending > 0
        assert not logged(logs, "Rows that were served unchecked are checked")
        monkeypatch.undo()
        await bench.cycle()
        await eventually(lambda: not bench.gate.pending, "the rest is judged")
        await bench.close()


async def test_commands_without_a_good_version_are_left_out_and_ten_are_named(bench: Bench, logs: LogLines) -> None:
    good = [row(f"c{number:02}") for number in range(40)]
    bench.source.replace(*good)
    await bench.cycle()
    bench.source.replace(*good, *(row(f"new{number:02}", "if") for number in range(11)))
    await bench.cycle()
    (line,) = logged(logs, "Commands are left out: no good version is known", log_level="warning")
    assert line["count"] == 11
    assert [each["name"] for each in line["commands"]] == [f"new{number:02}" for number in range(10)]
    assert line["commands"][0]["reason"] == "code_invalid"


async def test_much_code_that_is_refused_at_a_first_start_is_served_and_logged_once_with_a_remedy(
    bench: Bench, logs: LogLines
) -> None:
    bench.source.replace(*(row(f"c{number}", "if") for number in range(6)))
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.publisher.current is not None
    assert bench.publisher.current.snapshot.count == 6
    bench.source.touch()
    await bench.cycle()
    (line,) = [line for line in logs if line["log_level"] == "warning" and "does not compile" in line["event"]]
    assert line["count"] == 6
    assert "the Python version of the executors" in line["remedy"]


async def test_the_gate_works_after_a_cancelled_cycle(bench: Bench) -> None:
    await bench.cycle()
    bench.source.replace(row("if", "while"), row("else", "new = 1"))
    bench.source.answers.clear()
    task = asyncio.create_task(bench.cycle())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    bench.source.answers.set()
    await bench.cycle()
    assert bench.codes == {"if": "pass", "else": "new = 1"}


async def test_the_number_of_unchecked_rows_falls_while_the_remaining_rows_are_judged() -> None:
    seen: list[int] = []

    class Watching(CheckerHere):
        async def check(self, contents: Sequence[Content]) -> list[Judgement]:
            seen.append(bench.synchronizer.state.findings.unchecked)
            return await super().check(contents)

    with nothing_left():
        patient = Watching()
        bench = Bench(first_rows=64, patient=patient)
        bench.source.replace(*(row(f"c{n:03}", f"x = {n}") for n in range(300)))
        await bench.cycle()
        unchecked = bench.synchronizer.state.findings.unchecked
        await eventually(lambda: bench.synchronizer.state.findings.unchecked == 0, "the rest is judged")
        assert seen == list(range(unchecked, 0, -64))
        await bench.close()


async def test_a_row_found_bad_while_a_review_compares_rows_is_refused_by_the_next_review() -> None:
    class Found(dict[bytes, tuple[bytes, Flaw]]):
        """Another thread may add a row between two steps of an iteration, and after it."""

        def items(self) -> Any:
            for item in super().items():
                note("else")
                yield item

        def copy(self) -> dict[bytes, tuple[bytes, Flaw]]:
            copied = super().copy()
            note("else")
            return copied

    def note(name: str) -> None:
        gate.note_pending(name.encode(), gate.pending[name.encode()], Flaw.CODE)

    gate = Gate()
    rows = RowGate(gate, CheckerHere(), first_seconds=0, first_rows=0, logs=False)

    async def review() -> SnapshotBuilder:
        builder = SnapshotBuilder(known=gate.served)
        builder.add([row("if"), row("else"), row("for")])
        await rows.apply(builder, None)
        return builder

    await review()
    gate.found = Found()
    note("if")
    assert (await review()).digests().keys() == {b"else", b"for"}
    assert b"else" not in (await review()).digests()
    await rows.close()


async def test_the_loop_does_not_touch_each_row_of_a_large_catalogue_for_one_changed_row() -> None:
    """Most rows are not judged yet. The loop's CPU time is compared with that of copying the rows' hashes."""
    background = Background()
    gate = RowGate(Gate(), CheckerHere(), background=background, first_seconds=0, first_rows=0, logs=False)
    rows = [row(f"c{number}", "x") for number in range(100_000)]
    spent, copying = [], []
    for change in range(4):
        builder = SnapshotBuilder(known=gate.served)
        await background.run(builder.add, [row("changed", f"x = {change}"), *rows])
        begun = time.thread_time()
        await gate.apply(builder, None)
        spent.append(time.thread_time() - begun)
        begun = time.thread_time()
        builder.digests()  # copied, and freed at once
        copying.append(time.thread_time() - begun)
    assert gate.pending == 100_001
    assert min(spent[1:]) < min(copying) / 2
    await gate.close()
    background.close()


async def test_the_hashes_that_a_reading_was_compared_with_are_released_with_its_review(bench: Bench) -> None:
    class Hashes(dict[bytes, bytes]):
        """A table to which there can be a weak reference."""

    known = Hashes({b"if": b"another"})
    reference = weakref.ref(known)
    builder = SnapshotBuilder(known=known)
    builder.add([row("if")])
    del known
    await bench.gate.apply(builder, None)
    assert reference() is None


def test_a_batch_has_64_rows_or_a_mebibyte() -> None:
    def rows(count: int, octets: int) -> list[Any]:
        facts = SimpleNamespace(interface=b"i" * (octets // 4), code=b"c" * (octets - octets // 4))
        return [(b"name", facts, b"key")] * count

    def sizes(given: list[Any]) -> list[int]:
        return [len(batch) for batch in row_gate._batches(given)]

    assert sizes(rows(130, 8)) == [64, 64, 2]
    assert sizes(rows(5, 1 << 19)) == [2, 2, 1]
    assert sizes(rows(3, 1 << 20)) == [1, 1, 1]
    assert sizes(rows(3, (1 << 20) - 1)) == [2, 1]
    assert sizes([]) == []
    assert [len(piece) for piece in row_gate._slices([b"n"] * 65)] == [64, 1]
