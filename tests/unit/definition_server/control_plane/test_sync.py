"""A sync cycle publishes a changed table and nothing else. After a failure the good catalogue stays, and the log says
why.

The last-known-good store is in `test_sync_store`, the schedule in `test_sync_loop`.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
import structlog
from tests.support.fakes import FakeClock, FakeSource
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually
from tests.support.resident import resident_octets
from tests.support.snapshots import row

from definition_server.catalog import wire
from definition_server.catalog.definition import Row, Unserved
from definition_server.catalog.signing import Signer
from definition_server.catalog.validation import LARGE_DEFINITION, Suspect
from definition_server.control_plane import resident_memory, sync
from definition_server.control_plane.publisher import Publication, Publisher
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome
from definition_server.observability.logs import configure_logs

pytestmark = pytest.mark.usefixtures("nothing_is_left")

NEXT_ATTEMPT = 12.345678


@dataclass
class Bench:
    """A synchronizer and the parts around it."""

    source: FakeSource
    publisher: Publisher
    clock: FakeClock = field(default_factory=FakeClock)
    outcomes_asked: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.synchronizer = Synchronizer(self.source, self.publisher, clock=self.clock)

    def use_other_synchronizer(self, *, allow_empty: bool = False, signer: Signer | None = None) -> None:
        """Replace the synchronizer by one with another configuration and the same parts."""
        self.synchronizer.close()
        self.synchronizer = Synchronizer(
            self.source, self.publisher, allow_empty=allow_empty, signer=signer, clock=self.clock
        )

    def close(self) -> None:
        self.synchronizer.close()
        self.publisher.close()

    async def cycle(self) -> Outcome:
        """One cycle."""
        return await self.synchronizer.cycle(self._next_attempt_in)

    def _next_attempt_in(self, outcome: Outcome) -> float:
        self.outcomes_asked.append(outcome)
        return NEXT_ATTEMPT

    @property
    def served(self) -> dict[str, bytes]:
        """Name → code."""
        return {definition.name: definition.code for definition in self.publication.snapshot}

    @property
    def publication(self) -> Publication:
        assert self.publisher.current is not None
        return self.publisher.current


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(FakeSource(row("if"), row("else")), Publisher())
    yield bench
    bench.close()


async def test_the_first_cycle_publishes_the_table(bench: Bench) -> None:
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.served == {"if": b"pass", "else": b"pass"}
    assert bench.publication.snapshot.generation == 1
    assert bench.publication.snapshot.footer.created_at_ns == int(bench.clock.now * 1e9)


# -- only what changed -----------------------------------------------------------------------------------------------


async def test_no_rows_are_read_if_the_fingerprint_is_unchanged(bench: Bench) -> None:
    await bench.cycle()
    publication, rows = bench.publication, bench.source.rows_given
    assert await bench.cycle() is Outcome.UNCHANGED
    assert bench.source.looks == 2
    assert bench.source.rows_given == rows
    assert bench.publication is publication


async def test_pages_of_a_large_served_catalogue_that_a_cycle_has_read_are_given_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_memory, "NOTABLE_OCTETS", 0)
    gc.collect()  # snapshots of other tests
    others = resident_octets("avap-snapshot")
    await bench.cycle()
    await bench.synchronizer._background.run(lambda: None)  # the publication has given back its own pages before this
    assert bytes(bench.publication.snapshot.buffer)
    assert resident_octets("avap-snapshot") > others
    bench.source.replace(row("if"), row("else"))
    assert await bench.cycle() is Outcome.UNCHANGED
    await eventually(lambda: resident_octets("avap-snapshot") <= others, "the pages are given back")


async def test_a_touched_table_with_the_same_content_is_not_published_again(bench: Bench) -> None:
    await bench.cycle()
    publication = bench.publication
    bench.source.touch()
    assert await bench.cycle() is Outcome.UNCHANGED
    assert bench.source.rows_given == 4
    assert bench.publication is publication


async def test_a_touched_table_is_read_once_and_not_in_every_later_cycle(bench: Bench) -> None:
    await bench.cycle()
    bench.source.touch()
    await bench.cycle()
    await bench.cycle()
    assert bench.source.rows_given == 4


async def test_a_changed_table_is_published_as_the_next_generation(bench: Bench) -> None:
    heard: list[int] = []
    bench.publisher.on_publish(lambda publication: heard.append(publication.snapshot.generation))
    await bench.cycle()
    bench.source.replace(row("if", "new"), row("else"), row("end"))
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.served == {"if": b"new", "else": b"pass", "end": b"pass"}
    assert heard == [1, 2]
    assert bench.publication.snapshot.generation == 2


async def test_a_reading_is_closed_after_any_outcome(bench: Bench) -> None:
    for error in (None, SourceError("cut"), RuntimeError("bug")):
        if error is not None:
            bench.source.fail(error, after_rows=1)
        bench.source.touch()
        await bench.cycle()
        assert bench.source.open_readings == 0


# -- failures --------------------------------------------------------------------------------------------------------


def no_memory(*_: object) -> int:
    raise OSError(errno.EMFILE, "Too many open files")


Break = Callable[[Bench, pytest.MonkeyPatch], None]
BREAKS: dict[str, tuple[Break, str]] = {
    "source refuses": (lambda bench, _: bench.source.fail(SourceError("role lacks SELECT")), "role lacks SELECT"),
    "source is cut off": (
        lambda bench, _: bench.source.fail(SourceError("connection lost"), after_rows=1),
        "connection lost",
    ),
    "network fails": (lambda bench, _: bench.source.fail(ConnectionResetError("reset by peer")), "reset by peer"),
    "shared memory fails": (lambda _, patch: patch.setattr(os, "memfd_create", no_memory), "Too many open files"),
    "catalogue too large": (
        lambda _, patch: patch.setattr(wire, "MAX_MESSAGE", 100),
        "a protobuf message has at most 100",
    ),
    "a bug": (lambda bench, _: bench.source.fail(ZeroDivisionError("oops")), "unexpected ZeroDivisionError: oops"),
    "a bug half way": (
        lambda bench, _: bench.source.fail(KeyError("name"), after_rows=2),
        "unexpected KeyError: 'name'",
    ),
}
each_break = pytest.mark.parametrize(("breaks", "cause"), BREAKS.values(), ids=BREAKS)


@each_break
async def test_a_failed_cycle_keeps_the_publication_and_the_next_cycle_recovers(
    bench: Bench, breaks: Break, cause: str
) -> None:
    await bench.cycle()
    publication = bench.publication
    bench.source.replace(row("if", "new"), row("else"), row("end"))
    with pytest.MonkeyPatch.context() as patch:
        breaks(bench, patch)
        assert await bench.cycle() is Outcome.FAILED
    assert bench.publication is publication
    assert bench.served == {"if": b"pass", "else": b"pass"}
    os.fstat(publication.descriptor)
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.served == {"if": b"new", "else": b"pass", "end": b"pass"}
    assert bench.publication.snapshot.generation == 2


@each_break
async def test_a_failure_is_logged_with_its_cause_and_the_time_of_the_next_attempt(
    bench: Bench, logs: LogLines, monkeypatch: pytest.MonkeyPatch, breaks: Break, cause: str
) -> None:
    await bench.cycle()
    bench.source.replace(row("if", "new"), row("else"))
    breaks(bench, monkeypatch)
    await bench.cycle()
    (line,) = logged(logs, "Sync failed")
    assert line["log_level"] == "error"
    assert cause in line["error"]
    assert ("unexpected" in line["error"]) == ("unexpected" in cause), "only a bug is unexpected"
    assert line["next_attempt_in_seconds"] == 12.346
    assert line["serving_generation"] == 1


async def test_a_failure_before_the_first_publication_is_logged_as_such(bench: Bench, logs: LogLines) -> None:
    bench.source.fail(SourceError("down"))
    await bench.cycle()
    assert logged(logs, "Sync failed")[0]["serving_generation"] is None
    assert bench.publisher.current is None


async def test_a_bug_is_logged_with_its_exception(bench: Bench, logs: LogLines) -> None:
    bench.source.fail(ZeroDivisionError("oops"))
    await bench.cycle()
    assert logged(logs, "Unexpected failure in a sync cycle", log_level="error", exc_info=True)


async def test_a_cancelled_cycle_is_not_counted_as_failed(bench: Bench, logs: LogLines) -> None:
    bench.source.answers.clear()
    task = asyncio.create_task(bench.cycle())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not logs


# -- an emptied table ------------------------------------------------------------------------------------------------

GARBAGE = (Row(1, None, None, None, b"x"), Row(2, b"", None, None, b"x"), Row(3, b"if", None, None, None))
EMPTIED = pytest.mark.parametrize(
    ("rows", "found"), [((), "it is empty"), (GARBAGE, "none of its 3 rows can be served")], ids=["empty", "garbage"]
)


@EMPTIED
async def test_an_emptied_table_never_replaces_a_good_catalogue(
    bench: Bench, logs: LogLines, rows: tuple[Row, ...], found: str
) -> None:
    await bench.cycle()
    publication = bench.publication
    bench.source.replace(*rows)
    assert await bench.cycle() is Outcome.HELD
    assert bench.publication is publication
    (line,) = logged(logs, "Catalogue held", log_level="error")
    assert found in line["error"]
    assert "ALLOW_EMPTY_CATALOG" in line["remedy"]
    assert "accept" in line["remedy"]
    assert line["next_attempt_in_seconds"] == 12.346


@EMPTIED
async def test_an_empty_table_is_not_published_at_a_start(bench: Bench, rows: tuple[Row, ...], found: str) -> None:
    bench.source.replace(*rows)
    assert await bench.cycle() is Outcome.HELD
    assert bench.publisher.current is None


async def test_a_refused_table_is_checked_again_in_the_next_cycle(bench: Bench) -> None:
    bench.source.replace(*GARBAGE)
    await bench.cycle()
    assert await bench.cycle() is Outcome.HELD


@EMPTIED
async def test_an_empty_catalogue_is_published_if_it_is_allowed(
    bench: Bench, rows: tuple[Row, ...], found: str
) -> None:
    await bench.cycle()
    bench.use_other_synchronizer(allow_empty=True)
    bench.source.replace(*rows)
    assert await bench.cycle() is Outcome.PUBLISHED
    assert bench.served == {}


# -- signing ---------------------------------------------------------------------------------------------------------


async def test_another_signing_key_rebuilds_an_unchanged_table(bench: Bench) -> None:
    await bench.cycle()
    version = bench.publication.snapshot.version_hash
    signer = Signer("a new key")
    bench.synchronizer.use_signer(signer)
    assert await bench.cycle() is Outcome.PUBLISHED
    assert {name: signer.unpack(code) for name, code in bench.served.items()} == {"if": b"pass", "else": b"pass"}
    assert bench.publication.snapshot.version_hash == version


async def test_a_signing_key_rotated_during_a_cycle_is_used_in_the_next(bench: Bench) -> None:
    signer = Signer("a new key")
    bench.source.answers.clear()
    cycle = asyncio.create_task(bench.cycle())
    await eventually(lambda: bench.source.looks, "the cycle begun")
    bench.synchronizer.use_signer(signer)
    bench.source.answers.set()
    assert await cycle is Outcome.PUBLISHED
    assert await bench.cycle() is Outcome.PUBLISHED
    assert signer.unpack(bench.served["if"]) == b"pass"


async def test_the_same_signing_key_again_rebuilds_nothing(bench: Bench) -> None:
    bench.use_other_synchronizer(signer=Signer("key"))
    await bench.cycle()
    bench.synchronizer.use_signer(Signer("key"))
    assert await bench.cycle() is Outcome.UNCHANGED
    assert bench.source.rows_given == 2


# -- log and state ---------------------------------------------------------------------------------------------------


async def test_findings_are_those_of_the_last_reading(bench: Bench, logs: LogLines) -> None:
    odd = Row(8, b"odd", None, b"[]", b"x" * LARGE_DEFINITION)
    bench.source.replace(row("if", id=1), row("if", id=2), odd, *GARBAGE)
    await bench.cycle()
    findings = bench.synchronizer.state.findings
    assert findings.source_rows == 6
    assert findings.unserved == {
        Unserved.DUPLICATE: 1,
        Unserved.NULL_NAME: 1,
        Unserved.EMPTY_NAME: 1,
        Unserved.NULL_CODE: 1,
    }
    assert findings.suspect == {Suspect.LARGER_THAN_4_MIB: 1}
    told = {line["reason"]: line for line in logged(logs, "Rows not served", log_level="warning")}
    assert told.keys() == findings.unserved.keys()
    assert told["duplicate"]["examples"] == ["id=1 name='if'"]
    (suspect,) = logged(logs, "Rows look wrong, served as they are", log_level="warning")
    assert (suspect["reason"], suspect["count"]) == ("larger_than_4_mib", 1)
    bench.source.replace(row("if"))
    await bench.cycle()
    assert not bench.synchronizer.state.findings.unserved


async def test_a_suspect_row_that_is_not_served_is_not_reported(bench: Bench, logs: LogLines) -> None:
    bench.source.replace(Row(1, b"if", None, b"[]", b"x" * LARGE_DEFINITION), row("if", id=2))
    await bench.cycle()
    assert not logged(logs, "Rows look wrong, served as they are")


TOO_LARGE = "The catalogue passes 4 MiB; SyncCatalog reaches only clients that raise their receive limit"


@pytest.mark.parametrize(("above", "warns"), [(0, False), (1, True)])
async def test_a_body_above_4_mib_logs_a_warning(bench: Bench, logs: LogLines, above: int, warns: bool) -> None:
    bench.source.replace(row("large", "x" * LARGE_DEFINITION))
    await bench.cycle()
    overhead = len(bench.publication.snapshot.body) - LARGE_DEFINITION
    logs.clear()
    bench.source.replace(row("large", "x" * (LARGE_DEFINITION - overhead + above)))
    await bench.cycle()
    assert len(bench.publication.snapshot.body) == LARGE_DEFINITION + above
    assert [line["bytes"] for line in logged(logs, TOO_LARGE, log_level="warning")] == [LARGE_DEFINITION + 1] * warns


async def test_the_log_line_of_a_publication_has_the_fields_of_the_contract(
    bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level, raises = root.handlers[:], root.level, logging.raiseExceptions
    configure_logs("production", "INFO")
    try:
        await bench.cycle()
    finally:
        structlog.configure(**before)
        root.handlers[:], logging.raiseExceptions = handlers, raises
        root.setLevel(level)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (line,) = [line for line in lines if line["msg"] == "Definitions Broadcasted"]
    assert list(line)[:4] == ["ts", "level", "msg", "pid"]
    assert (line["level"], line["pid"]) == ("INFO", os.getpid())
    assert (line["count"], line["generation"]) == (2, 1)
    assert line["version_hash"] == bench.publication.snapshot.version_hash
    assert (line["added"], line["removed"], line["changed"]) == (2, 0, 0)
    assert isinstance(line["duration_ms"], float)
    assert line["duration_ms"] > 0
    assert line["duration_ms"] == round(line["duration_ms"], 1)


async def test_the_log_line_of_a_publication_lists_the_changes(bench: Bench, logs: LogLines) -> None:
    bench.source.replace(row("kept"), row("changed"), row("removed"))
    await bench.cycle()
    bench.source.replace(row("kept"), row("changed", "new"), *(row(f"added{n:02}") for n in range(12)))
    await bench.cycle()
    line = logged(logs, "Definitions Broadcasted", log_level="info")[-1]
    assert (line["added"], line["removed"], line["changed"]) == (12, 1, 1)
    assert (line["removed_names"], line["changed_names"]) == (("removed",), ("changed",))
    assert line["added_names"] == tuple(f"added{n:02}" for n in range(10))


async def test_the_state_counts_the_outcomes_of_cycles(bench: Bench) -> None:
    state = bench.synchronizer.state
    await bench.cycle()
    await bench.cycle()
    seen_well = bench.clock.now
    bench.clock.advance(60)
    bench.source.fail(SourceError("down"))
    await bench.cycle()
    assert state.cycles == {Outcome.PUBLISHED: 1, Outcome.UNCHANGED: 1, Outcome.FAILED: 1, Outcome.HELD: 0}
    assert (state.last_outcome, state.last_error) == (Outcome.FAILED, "down")
    assert (state.last_success, state.last_attempt) == (seen_well, bench.clock.now)
    assert bench.outcomes_asked == [Outcome.PUBLISHED, Outcome.UNCHANGED, Outcome.FAILED]
    bench.clock.advance(60)
    await bench.cycle()
    assert (state.last_success, state.last_error) == (bench.clock.now, None)


# -- reading without a change of the fingerprint -----------------------------------------------------------------------


async def test_an_unconditional_cycle_reads_a_table_whose_fingerprint_is_the_same() -> None:
    source, publisher = FakeSource(row("if", "pass")), Publisher()
    synchronizer = Synchronizer(source, publisher)
    try:
        await synchronizer.cycle(lambda _: 1.0)
        source.rows = (row("if", "changed"),)
        assert await synchronizer.cycle(lambda _: 1.0) is Outcome.UNCHANGED
        assert source.rows_given == 1
        assert await synchronizer.cycle(lambda _: 1.0, unconditional=True) is Outcome.PUBLISHED
        assert await synchronizer.cycle(lambda _: 1.0, unconditional=True) is Outcome.UNCHANGED
    finally:
        synchronizer.close()
        publisher.close()


async def test_the_table_is_read_when_the_last_reading_has_the_age_of_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, late = asyncio.get_running_loop(), 0.0
    clock = loop.time
    monkeypatch.setattr(loop, "time", lambda: clock() + late)
    source, publisher = FakeSource(row("if", "pass")), Publisher()
    synchronizer = Synchronizer(source, publisher, full_read_interval=3600)
    try:
        await synchronizer.cycle(lambda _: 1.0)
        source.rows = (row("if", "changed"),)
        late = 3500
        assert await synchronizer.cycle(lambda _: 1.0) is Outcome.UNCHANGED
        late = 3700
        assert await synchronizer.cycle(lambda _: 1.0) is Outcome.PUBLISHED
        assert await synchronizer.cycle(lambda _: 1.0) is Outcome.UNCHANGED
        assert source.rows_given == 2
    finally:
        synchronizer.close()
        publisher.close()


async def test_rows_that_differ_only_in_their_ids_are_published() -> None:
    source, publisher = FakeSource(row("if", id=1)), Publisher()
    synchronizer = Synchronizer(source, publisher)
    try:
        await synchronizer.cycle(lambda _: 1.0)
        before = publisher.current
        source.replace(row("if", id=2))
        assert await synchronizer.cycle(lambda _: 1.0) is Outcome.PUBLISHED
        after = publisher.current
        assert before is not None
        assert after is not None
        assert before.snapshot.version_hash == after.snapshot.version_hash
        definition = after.snapshot.get("if")
        assert definition is not None
        assert definition.internal_id == 2
    finally:
        synchronizer.close()
        publisher.close()


def test_an_error_names_the_limit_of_a_file_that_is_too_large_and_else_the_text_of_the_kernel() -> None:
    assert "ulimit -f" in sync._text(OSError(errno.EFBIG, "File too large"))
    assert sync._text(OSError(errno.ENOSPC, "No space left on device")) == "[Errno 28] No space left on device"
    assert sync._text(SourceError("no route")) == "no route"


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (MemoryError(), "no memory is left"),
        (RuntimeError("can't start new thread"), "no thread can be started: memory, or the number of processes, is"),
        (RuntimeError("a bug"), None),
        (ValueError("can't start new thread"), None),
    ],
    ids=["memory", "thread", "another fault", "another class"],
)
def test_a_lack_of_resources_is_not_logged_as_a_bug(failure: Exception, text: str | None) -> None:
    found = sync._limit_met(failure)
    assert found is None if text is None else found is not None and found.startswith(text)
