"""Cycles run at once on request, otherwise at the interval, and sooner while nothing is served. A start without a
database publishes the last-known-good snapshot.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, closing
from itertools import pairwise
from pathlib import Path

import pytest
from tests.support.fakes import FakeSource
from tests.support.logs import LogLines, logged
from tests.support.loop import end, eventually, other_tasks
from tests.support.snapshots import published, row

from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import served_catalogue, sync_loop
from definition_server.control_plane.publisher import Publication, Publisher
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_loop import SyncLoop

pytestmark = pytest.mark.usefixtures("nothing_is_left")

NEVER = 3600.0
"""An interval or a patience that is longer than any test waits."""

RESTORED = "Serving the last-known-good snapshot"

StartLoop = Callable[..., SyncLoop]


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(row("if"))


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    """A store that holds generation 7 with the command ``old``."""
    store = SnapshotStore(tmp_path)
    publication = published("old", generation=7)
    store.save(publication.descriptor)
    os.close(publication.descriptor)
    return store


@pytest.fixture
async def start(source: FakeSource, publisher: Publisher) -> AsyncIterator[StartLoop]:
    """Start a loop. It is cancelled when the test ends, and no task may be left then."""
    tasks: list[asyncio.Task[None]] = []
    synchronizers: list[Synchronizer] = []
    stack = ExitStack()
    before = other_tasks()

    def started(
        *,
        interval: float = NEVER,
        patience: float = NEVER,
        store: SnapshotStore | None = None,
        share: Callable[[], float] = lambda: 1.0,
    ) -> SyncLoop:
        synchronizer = Synchronizer(source, publisher, store=store)
        synchronizers.append(synchronizer)
        stack.callback(synchronizer.close)
        loop = SyncLoop(synchronizer, publisher, interval=interval, patience=patience, share=share)
        tasks.append(asyncio.create_task(loop.run()))
        return loop

    yield started
    # Not cancelled in the middle of storing, because storing would continue in its own thread.
    for state in (synchronizer.state for synchronizer in synchronizers):
        await eventually(lambda: sum(state.cycles.values()) == source.looks, "the end of the cycle")  # noqa: B023 - awaited here
    for task in tasks:
        assert not task.done(), "the loop never returns"
        await end(task)
    await eventually(lambda: not other_tasks() - before, lambda: f"tasks left: {other_tasks() - before}")
    stack.close()


def serves(publisher: Publisher, name: str) -> Callable[[], bool]:
    """Whether the command is published."""
    return lambda: publisher.current is not None and publisher.current.snapshot.get(name) is not None


def delays(logs: LogLines) -> list[float]:
    return [line["next_attempt_in_seconds"] for line in logged(logs, "Sync failed")]


# -- the schedule ----------------------------------------------------------------------------------------------------


async def test_a_requested_sync_runs_at_once(start: StartLoop, source: FakeSource, publisher: Publisher) -> None:
    loop = start(interval=NEVER)
    await eventually(serves(publisher, "if"), "the first cycle")
    source.replace(row("else"))
    loop.sync_soon()
    await eventually(serves(publisher, "else"), "the second cycle")
    assert source.looks == 2


async def test_a_requested_sync_reads_a_table_that_seems_unchanged(
    start: StartLoop, source: FakeSource, publisher: Publisher
) -> None:
    loop = start(interval=NEVER)
    await eventually(serves(publisher, "if"), "the first cycle")
    source.rows = (row("else"),)  # the fingerprint is the same
    loop.sync_soon()
    await eventually(serves(publisher, "else"), "the second cycle")


async def test_the_cycle_after_an_unscheduled_one_follows_in_a_share_of_the_interval(
    start: StartLoop, source: FakeSource
) -> None:
    shares = [0.0, 0.0]
    loop = start(interval=NEVER, share=lambda: shares.pop())
    await eventually(lambda: source.looks == 2, "the second cycle, at once")
    assert shares == [0.0]
    loop.sync_soon()
    await eventually(lambda: source.looks == 4, "the requested cycle, and one at once after it")
    assert not shares


async def test_a_request_during_a_cycle_runs_another_cycle_afterwards(
    start: StartLoop, source: FakeSource, publisher: Publisher
) -> None:
    source.answers.clear()
    loop = start()
    await eventually(lambda: source.looks == 1, "the first cycle begun")
    loop.sync_soon()
    source.answers.set()
    await eventually(lambda: source.looks == 2, "the second cycle")


async def test_several_requests_at_once_run_one_cycle(
    start: StartLoop, source: FakeSource, publisher: Publisher
) -> None:
    loop = start()
    await eventually(serves(publisher, "if"), "the first cycle")
    for _ in range(5):
        loop.sync_soon()
    await eventually(lambda: source.looks == 2, "the second cycle")
    for _ in range(100):  # many more turns than a cycle without changes takes
        await asyncio.sleep(0)
    assert source.looks == 2


async def test_without_requests_one_cycle_runs_per_interval(
    start: StartLoop, source: FakeSource, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[float] = []
    read = source.read

    def noting_read() -> object:
        begun.append(time.monotonic())
        return read()

    monkeypatch.setattr(source, "read", noting_read)
    start(interval=0.05)
    await eventually(lambda: len(begun) >= 5, "five cycles")
    assert all(later - earlier >= 0.045 for earlier, later in pairwise(begun))


async def test_the_duration_of_a_cycle_is_part_of_its_interval(
    start: StartLoop, source: FakeSource, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[float] = []
    wait_for = asyncio.wait_for

    async def noting_wait_for(work: asyncio.Future[bool], timeout: float) -> bool:
        turns.append(timeout)
        return await wait_for(work, timeout)

    source.answers.clear()
    start(interval=NEVER)
    await eventually(lambda: source.looks == 1, "the first cycle begun")
    begun = time.monotonic()
    await eventually(lambda: time.monotonic() - begun >= 0.2, "a slow cycle")
    monkeypatch.setattr(asyncio, "wait_for", noting_wait_for)
    source.answers.set()
    await eventually(lambda: turns, "the pause after it")
    assert turns[0] <= NEVER - 0.2


async def test_a_cancellation_during_the_first_cycle_cancels_the_cycle(
    source: FakeSource, publisher: Publisher, logs: LogLines
) -> None:
    source.answers.clear()
    before = other_tasks()
    with closing(Synchronizer(source, publisher)) as synchronizer:
        running = asyncio.create_task(SyncLoop(synchronizer, publisher, interval=NEVER, patience=NEVER).run())
        await eventually(lambda: source.looks == 1, "the first cycle begun")
        await end(running)
        left = other_tasks() - before
        for task in left:
            await end(task)
    assert not left
    assert not logs


async def test_the_seconds_to_the_next_cycle_are_known_except_while_one_runs(
    start: StartLoop, source: FakeSource, publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.answers.clear()
    loop = start(interval=NEVER)
    await eventually(lambda: source.looks == 1, "the first cycle begun")
    assert loop.seconds_to_next is None
    source.answers.set()
    seconds = await eventually(lambda: loop.seconds_to_next, "its end")
    assert NEVER - 60 < seconds <= NEVER
    assert loop._next_at is not None
    loop._next_at -= 2 * NEVER
    assert loop.seconds_to_next == 0.0


# -- while nothing is served -----------------------------------------------------------------------------------------


async def test_while_nothing_is_served_the_attempts_back_off(
    start: StartLoop, source: FakeSource, publisher: Publisher, logs: LogLines
) -> None:
    for _ in range(8):
        source.fail(SourceError("down"))
    loop = start(interval=60.0)
    for failures in range(1, 8):
        await eventually(lambda: len(delays(logs)) == failures, f"failure {failures}")  # noqa: B023 - asked at once
        loop.sync_soon()
    await eventually(lambda: len(delays(logs)) == 8, "the last failure")
    assert delays(logs) == [0.5, 1, 2, 4, 8, 16, 30, 30]


async def test_the_back_off_never_passes_the_interval(
    start: StartLoop, source: FakeSource, publisher: Publisher, logs: LogLines
) -> None:
    for _ in range(4):
        source.fail(SourceError("down"))
    start(interval=0.02)
    await eventually(serves(publisher, "if"), "recovery")
    assert delays(logs) == [0.02] * 4


async def test_a_start_that_failed_is_repeated_long_before_the_interval(
    start: StartLoop, source: FakeSource, publisher: Publisher
) -> None:
    source.fail(SourceError("down"))
    start(interval=NEVER)
    await eventually(serves(publisher, "if"), "the second attempt")


async def test_an_empty_table_at_start_is_checked_again_soon(
    start: StartLoop, source: FakeSource, publisher: Publisher, logs: LogLines
) -> None:
    source.replace()
    start(interval=NEVER)
    (line,) = await eventually(lambda: logged(logs, "Catalogue held"), "the refusal")
    assert line["next_attempt_in_seconds"] == 0.5


async def test_a_failure_while_a_catalogue_is_served_waits_for_the_interval(
    start: StartLoop, source: FakeSource, publisher: Publisher, logs: LogLines
) -> None:
    loop = start(interval=NEVER)
    await eventually(serves(publisher, "if"), "the first cycle")
    source.fail(SourceError("down"))
    loop.sync_soon()
    await eventually(lambda: delays(logs), "the failure")
    assert delays(logs) == [NEVER]


# -- a start without a database --------------------------------------------------------------------------------------


async def test_a_first_cycle_that_fails_is_followed_by_the_last_known_good_snapshot(
    start: StartLoop, source: FakeSource, publisher: Publisher, store: SnapshotStore, logs: LogLines
) -> None:
    source.fail(SourceError("down"))
    start(interval=NEVER, patience=NEVER, store=store)
    await eventually(serves(publisher, "old"), "the last-known-good snapshot")
    await eventually(lambda: logged(logs, RESTORED), "the log line about it")


async def test_a_disk_that_hangs_during_the_restore_does_not_delay_cycles(
    start: StartLoop, source: FakeSource, publisher: Publisher, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk_works, asked = threading.Event(), threading.Event()
    load = store.load

    def hang(signer: Signer | None = None) -> tuple[Snapshot, int] | None:
        asked.set()
        assert disk_works.wait(60)
        return load(signer)

    monkeypatch.setattr(store, "load", hang)
    source.fail(SourceError("no route to host"))
    loop = start(interval=0.05, store=store)
    try:
        await eventually(asked.is_set, "the restore begins")
        source.replace(row("if"))
        loop.sync_soon()
        await eventually(serves(publisher, "if"), "the table is served")
        source.replace(row("else"))
        loop.sync_soon()
        await eventually(serves(publisher, "else"), "cycles go on")
    finally:
        disk_works.set()
    await eventually(lambda: not any(t.name == "disk" for t in threading.enumerate()), "the disk answers")
    assert serves(publisher, "else")(), "the snapshot that was loaded late is not served"


async def test_the_last_known_good_snapshot_is_served_while_the_first_cycle_hangs(
    start: StartLoop, source: FakeSource, publisher: Publisher, store: SnapshotStore
) -> None:
    source.answers.clear()
    start(interval=NEVER, patience=0.05, store=store)
    await eventually(serves(publisher, "old"), "the last-known-good snapshot")
    source.answers.set()
    await eventually(serves(publisher, "if"), "the table")
    assert publisher.current is not None
    assert publisher.current.snapshot.generation == 8
    assert source.looks == 1, "the cycle that hung was not cancelled"


async def test_the_last_known_good_snapshot_is_not_served_before_the_time_limit_of_the_first_cycle(
    start: StartLoop, source: FakeSource, publisher: Publisher, store: SnapshotStore
) -> None:
    source.answers.clear()
    begun = time.monotonic()
    start(interval=NEVER, patience=0.3, store=store)
    await eventually(serves(publisher, "old"), "the last-known-good snapshot")
    assert time.monotonic() - begun >= 0.3
    source.answers.set()
    await eventually(serves(publisher, "if"), "the table")


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), ZeroDivisionError("a bug")], ids=repr)
async def test_a_restore_that_fails_is_logged_once_and_tried_again(
    start: StartLoop,
    source: FakeSource,
    publisher: Publisher,
    store: SnapshotStore,
    logs: LogLines,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(sync_loop, "RESTORE_AGAIN_SECONDS", 0.01)
    again, failures = served_catalogue.published_again, 0

    def fail(snapshot: Snapshot, signer: Signer | None, generation: int) -> Publication:
        nonlocal failures
        failures += 1
        if failures <= 3:
            raise error.with_traceback(None)
        return again(snapshot, signer, generation)

    monkeypatch.setattr(served_catalogue, "published_again", fail)
    source.fail(SourceError("down"))
    start(interval=NEVER, patience=NEVER, store=store)
    await eventually(serves(publisher, "old"), "the last-known-good snapshot, at the fourth attempt")
    await eventually(lambda: logged(logs, RESTORED), "the log line about it")
    assert len(logged(logs, "Stored catalogue not served; tried again", log_level="error")) == 1
    logs.clear()  # the frames of the exception refer to the catalogue
    error.__traceback__ = None


async def test_a_database_that_answers_in_time_prevents_the_restore(
    start: StartLoop, source: FakeSource, publisher: Publisher, store: SnapshotStore, logs: LogLines
) -> None:
    generations: list[int] = []
    publisher.on_publish(lambda publication: generations.append(publication.snapshot.generation))
    loop = start(interval=NEVER, patience=NEVER, store=store)
    await eventually(serves(publisher, "if"), "the table")
    loop.sync_soon()
    await eventually(lambda: source.looks == 2, "the second cycle, after any restore")
    assert generations == [1]
    assert not logged(logs, RESTORED)


async def test_after_a_restore_the_next_cycle_follows_soon(
    start: StartLoop, source: FakeSource, publisher: Publisher, store: SnapshotStore, logs: LogLines
) -> None:
    source.fail(SourceError("down"))
    start(interval=NEVER, store=store)
    await eventually(serves(publisher, "if"), "the second attempt")
    assert logged(logs, RESTORED)
