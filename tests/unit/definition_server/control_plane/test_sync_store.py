"""The sync cycle and the last-known-good file: every publication is stored, and a disk never stops a cycle. A start
without a database serves the stored snapshot, unless the snapshot is damaged or older than the served catalogue.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from tests.support.fakes import FakeClock, FakeSource
from tests.support.logs import LogLines, logged
from tests.support.loop import end, eventually, promptly
from tests.support.snapshots import published, row

from definition_server.catalog.signing import Binding, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import delayed_release, last_known_good
from definition_server.control_plane.background import Background
from definition_server.control_plane.history import History
from definition_server.control_plane.last_known_good import LastKnownGood
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.store import SnapshotStore, StoreError
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome

pytestmark = pytest.mark.usefixtures("nothing_is_left")

NOT_STORED = "Last-known-good snapshot not stored"
NOT_USABLE = "Last-known-good snapshot not usable"
RESTORED = "Serving the last-known-good snapshot"


Make = Callable[..., Synchronizer]


class HangingStore(SnapshotStore):
    """A store whose disk hangs until ``disk_works`` is set."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.disk_works = threading.Event()
        self.saves = 0

    def save(self, descriptor: int, signer: Signer | None = None) -> None:
        self.saves += 1
        assert self.disk_works.wait(60)
        super().save(descriptor, signer)

    def load(self, signer: Signer | None = None) -> tuple[Snapshot, int] | None:
        assert self.disk_works.wait(60)
        return super().load(signer)


@pytest.fixture
def source() -> FakeSource:
    return FakeSource(row("if"), row("else"))


@pytest.fixture
def store(tmp_path: Path) -> SnapshotStore:
    return SnapshotStore(tmp_path)


@pytest.fixture
async def hanging(tmp_path: Path) -> AsyncIterator[HangingStore]:
    store = HangingStore(tmp_path)
    yield store
    store.disk_works.set()  # before the loop closes, because closing waits for its threads


@pytest.fixture
def make(source: FakeSource, publisher: Publisher) -> Iterator[Make]:
    """Make a synchronizer; it is closed when the test ends."""
    with ExitStack() as stack:

        def made(store: SnapshotStore | None = None, **how: Any) -> Synchronizer:
            return stack.enter_context(closing(Synchronizer(source, publisher, store=store, **how)))

        yield made


async def cycle(synchronizer: Synchronizer, *, unconditional: bool = False) -> Outcome:
    return await synchronizer.cycle(lambda _: 60.0, unconditional=unconditional)


def stored(store: SnapshotStore) -> bytes:
    """The octets of the file, which must pass all checks."""
    loaded = store.load()
    assert loaded is not None
    os.close(loaded[1])
    return bytes(loaded[0].buffer)


def current(publisher: Publisher) -> Snapshot:
    assert publisher.current is not None
    return publisher.current.snapshot


def keep(store: SnapshotStore, *names: str, **how: object) -> Snapshot:
    """Store a snapshot of ``names``, as an earlier run of the server did."""
    publication = published(*names, **how)
    store.save(publication.descriptor, how.get("signer"))
    os.close(publication.descriptor)
    return publication.snapshot


# -- storing ---------------------------------------------------------------------------------------------------------


async def test_every_publication_is_stored_as_it_is_served(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore
) -> None:
    synchronizer = make(store)
    for names in (["if"], ["if", "else"]):
        source.replace(*map(row, names))
        assert await cycle(synchronizer) is Outcome.PUBLISHED
        assert stored(store) == bytes(current(publisher).buffer)


async def test_a_failing_disk_prevents_no_publication_and_is_reported_until_it_works(
    source: FakeSource,
    publisher: Publisher,
    make: Make,
    store: SnapshotStore,
    logs: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    synchronizer = make(store)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert await cycle(synchronizer) is Outcome.PUBLISHED
    assert current(publisher).count == 2
    (line,) = logged(logs, NOT_STORED, log_level="error")
    assert "No space left on device" in line["error"]
    assert "No space left on device" in str(synchronizer.state.store_error)
    assert synchronizer.state.last_error is None
    source.replace(row("end"))
    await cycle(synchronizer)
    assert synchronizer.state.store_error is None
    assert stored(store) == bytes(current(publisher).buffer)


def snapshots_mapped() -> int:
    """The number of snapshots that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("/memfd:avap-snapshot")


async def test_a_failing_disk_keeps_no_replaced_snapshot_in_memory(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, signer: Signer | None) -> None:
        raise StoreError("No space left on device")

    monkeypatch.setattr(store, "save", full)
    monkeypatch.setattr(delayed_release, "HOLD_SECONDS", 0.1)
    synchronizer = make(store)
    gc.collect()
    before = snapshots_mapped()
    gc.disable()  # a garbage collection could run at any moment
    try:
        for name in ("if", "else", "end"):
            source.replace(row(name))
            assert await cycle(synchronizer) is Outcome.PUBLISHED
            assert await cycle(synchronizer) is Outcome.UNCHANGED  # this cycle tries to store the catalogue once more
        await eventually(lambda: snapshots_mapped() == before + 1, "the replaced snapshots are freed")
    finally:
        gc.enable()


@pytest.mark.parametrize("unconditional", [False, True], ids=["by the interval", "as sync and SIGHUP ask"])
async def test_a_failed_save_is_repeated_in_a_later_cycle_without_a_change(
    source: FakeSource,
    publisher: Publisher,
    make: Make,
    store: SnapshotStore,
    logs: LogLines,
    unconditional: bool,
) -> None:
    synchronizer = make(store)
    await synchronizer.catalogue.recall()
    directory = store.path.parent
    directory.rmdir()
    directory.touch()  # nothing can be stored in a file
    await cycle(synchronizer)
    assert synchronizer.state.store_error is not None
    directory.unlink()
    assert await cycle(synchronizer, unconditional=unconditional) is Outcome.UNCHANGED
    assert stored(store) == bytes(current(publisher).buffer)
    assert synchronizer.state.store_error is None
    assert logged(logs, "Last-known-good snapshot stored again", log_level="info", generation=1)
    before = store.path.stat().st_ino
    assert await cycle(synchronizer, unconditional=unconditional) is Outcome.UNCHANGED
    assert store.path.stat().st_ino == before, "a stored catalogue is not stored again"


async def test_the_reason_for_a_restore_is_logged(
    source: FakeSource, make: Make, store: SnapshotStore, logs: LogLines
) -> None:
    keep(store, "old")
    synchronizer = make(store)
    source.fail(SourceError("no route to host"))
    await cycle(synchronizer)
    await synchronizer.restore()
    assert logged(logs, RESTORED, reason="no route to host")


async def test_a_hanging_disk_does_not_block_cycles(
    source: FakeSource,
    publisher: Publisher,
    make: Make,
    hanging: HangingStore,
    logs: LogLines,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(last_known_good, "PATIENCE_SECONDS", 0.05)
    synchronizer = make(hanging)
    assert await promptly(cycle(synchronizer)) is Outcome.PUBLISHED
    assert synchronizer.state.store_error == "the disk did not finish within 0.05 s"
    source.replace(row("end"))
    assert await promptly(cycle(synchronizer)) is Outcome.PUBLISHED
    assert current(publisher).get("end") is not None
    assert synchronizer.state.store_error == "the disk has not finished writing an earlier snapshot"
    assert len(logged(logs, NOT_STORED, log_level="error")) == 2
    assert hanging.saves == 1, "one writer at a time"


async def test_a_disk_that_answers_after_its_load_was_cancelled_leaves_no_descriptor(hanging: HangingStore) -> None:
    hanging.disk_works.set()
    keep(hanging, "old")
    hanging.disk_works.clear()
    background = Background()
    load = asyncio.ensure_future(LastKnownGood(hanging, background, on_stored_late=lambda: None).load(None))
    await asyncio.sleep(0)  # its thread is started
    await end(load)
    background.close()  # the disk works again at the end: see `hanging` and `nothing_is_left`


async def test_a_save_that_begins_as_another_ends_is_awaited_until_its_own_end(tmp_path: Path) -> None:
    """An operator's command may store while a cycle stores."""
    writes: list[asyncio.Future[Any]] = []

    def disk(work: Callable[[], Any]) -> asyncio.Future[Any]:
        work()
        writes.append(asyncio.get_running_loop().create_future())
        return writes[-1]

    publication = published("a")
    with ExitStack() as stack:
        stack.callback(os.close, publication.descriptor)
        background = stack.enter_context(closing(Background()))
        kept = LastKnownGood(SnapshotStore(tmp_path), background, lambda: None, disk)
        first = asyncio.ensure_future(kept.save(publication, None))
        await asyncio.sleep(0)
        writes[0].set_result(None)
        second = asyncio.ensure_future(kept.save(publication, None))
        await promptly(first)
        assert not second.done()
        writes[1].set_result(None)
        await promptly(second)


async def test_a_slow_disk_that_finishes_late_is_not_reported_as_failing(
    source: FakeSource, make: Make, hanging: HangingStore, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_known_good, "PATIENCE_SECONDS", 0.05)
    synchronizer = make(hanging)
    await promptly(cycle(synchronizer))
    assert synchronizer.state.store_error is not None
    hanging.disk_works.set()
    await eventually(lambda: synchronizer.state.store_error is None, "the disk has finished")
    assert logged(logs, "Last-known-good snapshot stored again", generation=1)


async def test_a_disk_that_works_again_stores_the_next_publication(
    source: FakeSource, publisher: Publisher, make: Make, hanging: HangingStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_known_good, "PATIENCE_SECONDS", 0.05)
    synchronizer = make(hanging)
    await promptly(cycle(synchronizer))
    first = bytes(current(publisher).buffer)
    source.replace(row("end"))
    await promptly(cycle(synchronizer))
    hanging.disk_works.set()
    await eventually(hanging.path.exists, "the hung snapshot stored")
    # The publication was replaced and its descriptor closed, but the written file is whole.
    assert stored(hanging) == first
    monkeypatch.setattr(last_known_good, "PATIENCE_SECONDS", 30.0)
    source.replace(row("startLoop"))
    await promptly(cycle(synchronizer))
    assert synchronizer.state.store_error is None
    assert stored(hanging) == bytes(current(publisher).buffer)


async def test_without_a_store_nothing_is_stored_or_restored(
    source: FakeSource, publisher: Publisher, make: Make
) -> None:
    synchronizer = make()
    assert not await synchronizer.restore()
    assert await cycle(synchronizer) is Outcome.PUBLISHED
    assert synchronizer.state.store_error is None


# -- restoring -------------------------------------------------------------------------------------------------------


async def test_the_last_known_good_snapshot_is_served_and_its_age_logged(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore, logs: LogLines
) -> None:
    clock = FakeClock()
    kept = keep(store, "if", generation=7, created_at=clock.now)
    clock.advance(90)
    synchronizer = make(store, clock=clock)
    assert await synchronizer.restore()
    assert bytes(current(publisher).buffer) == bytes(kept.buffer)
    assert synchronizer.state.restored_age_seconds == 90
    (line,) = logged(logs, RESTORED, log_level="warning", reason="the database has not answered yet")
    assert (line["age_seconds"], line["count"], line["generation"]) == (90, 1, 7)
    assert line["version_hash"] == kept.version_hash


async def test_rows_from_the_table_replace_the_restored_snapshot(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore
) -> None:
    keep(store, "old", generation=7)
    synchronizer = make(store)
    await synchronizer.restore()
    assert await cycle(synchronizer) is Outcome.PUBLISHED
    assert [definition.name for definition in current(publisher)] == ["else", "if"]
    assert current(publisher).generation == 8
    assert synchronizer.state.restored_age_seconds is None


async def test_a_table_equal_to_the_restored_snapshot_is_not_published_again(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore
) -> None:
    keep(store, "if", "else", generation=7)
    synchronizer = make(store)
    await synchronizer.restore()
    assert await cycle(synchronizer) is Outcome.UNCHANGED
    assert current(publisher).generation == 7
    assert synchronizer.state.restored_age_seconds is None


async def test_a_damaged_file_is_refused(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore, logs: LogLines
) -> None:
    keep(store, "if")
    octets = bytearray(store.path.read_bytes())
    octets[20] ^= 1
    store.path.write_bytes(octets)
    synchronizer = make(store)
    assert not await synchronizer.restore()
    assert publisher.current is None
    (line,) = logged(logs, NOT_USABLE, log_level="error")
    assert "content checksum" in line["error"]
    assert "content checksum" in str(synchronizer.state.store_error)


async def test_a_first_start_has_no_file_and_does_not_warn(make: Make, store: SnapshotStore, logs: LogLines) -> None:
    assert not await make(store, history=History(store.path.parent, 3)).restore()
    assert logged(logs, "No last-known-good snapshot", log_level="info", path=str(store.path), first_start=True)
    assert [line for line in logs if line["log_level"] != "info"] == []


async def test_a_missing_file_is_a_warning_if_there_is_a_history(
    make: Make, store: SnapshotStore, logs: LogLines
) -> None:
    history = History(store.path.parent, 3)
    first = make(store, history=history)
    await cycle(first)
    await eventually(history.entries, "the catalogue is in the history")
    first.close()
    store.path.unlink()
    await make(store, history=history).catalogue.recall()
    assert logged(logs, "No last-known-good snapshot", log_level="warning", path=str(store.path), first_start=False)


async def test_nothing_is_restored_after_a_publication(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore
) -> None:
    keep(store, "old", generation=7)
    synchronizer = make(store)
    await cycle(synchronizer)
    keep(store, "old", generation=7)
    assert not await synchronizer.restore()
    assert current(publisher).get("old") is None
    assert synchronizer.state.restored_age_seconds is None


async def test_a_disk_that_hangs_while_loading_does_not_delay_the_tables_publication(
    source: FakeSource, publisher: Publisher, make: Make, hanging: HangingStore
) -> None:
    hanging.disk_works.set()
    keep(hanging, "old", generation=7)
    hanging.disk_works.clear()
    synchronizer = make(hanging)
    restoring = asyncio.create_task(synchronizer.restore())
    cycling = asyncio.create_task(cycle(synchronizer))
    await eventually(lambda: publisher.current is not None, "the table published")
    assert not restoring.done()
    hanging.disk_works.set()
    assert not await promptly(restoring)
    assert await promptly(cycling) is Outcome.PUBLISHED
    assert [definition.name for definition in current(publisher)] == ["else", "if"]
    assert synchronizer.state.restored_age_seconds is None


# -- another signing key ---------------------------------------------------------------------------------------------

OLD, NEW = Signer("old key"), Signer("new key")


def plain(code: bytes) -> bytes:
    return code


@pytest.mark.parametrize(
    ("before", "after", "unpack"),
    [(Signer("old key", 2), OLD, OLD.unpack), (OLD, None, plain)],
    ids=["another version", "no longer signed"],
)
async def test_a_snapshot_with_a_valid_mac_is_signed_with_the_present_key_and_keeps_its_content(
    source: FakeSource,
    publisher: Publisher,
    make: Make,
    store: SnapshotStore,
    before: Signer | None,
    after: Signer | None,
    unpack: Callable[[bytes], bytes],
) -> None:
    clock = FakeClock()
    kept = keep(store, "if", "else", generation=7, created_at=clock.now - 30, signer=before)
    synchronizer = make(store, signer=after, clock=clock)
    assert await synchronizer.restore()
    snapshot = current(publisher)
    assert {definition.name: unpack(definition.code) for definition in snapshot} == {"if": b"pass", "else": b"pass"}
    assert [definition.hash for definition in snapshot] == [definition.hash for definition in kept]
    assert (snapshot.version_hash, snapshot.generation) == (kept.version_hash, 7)
    assert synchronizer.state.restored_age_seconds == 30


@pytest.mark.parametrize("before", [OLD, None], ids=["signed with another key", "not signed"])
async def test_a_snapshot_without_a_valid_mac_is_not_restored_and_the_table_is_read(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore, logs: LogLines, before: Signer | None
) -> None:
    keep(store, "forged", signer=before)
    foreign = store.path.read_bytes()
    synchronizer = make(store, signer=NEW)
    assert not await synchronizer.restore()
    assert publisher.current is None
    (line,) = logged(logs, NOT_USABLE, log_level="error")
    assert "MAC" in line["error"]
    assert "the table is read instead" in line["remedy"]
    assert await cycle(synchronizer) is Outcome.PUBLISHED
    assert current(publisher).get("forged") is None
    assert store.path.with_name(store.path.name + ".refused").read_bytes() == foreign
    assert synchronizer.state.store_error is None


class BrokenSigner(Signer):
    """Signs nothing, so that its packages cannot be unpacked."""

    def pack(self, payload: bytes, binding: Binding | None = None) -> bytes:
        return payload


async def test_a_snapshot_that_cannot_be_signed_again_is_not_served(
    source: FakeSource, publisher: Publisher, make: Make, store: SnapshotStore, logs: LogLines
) -> None:
    keep(store, "if", signer=BrokenSigner("key", 2))
    synchronizer = make(store, signer=Signer("key"))
    assert not await synchronizer.restore()
    assert publisher.current is None
    assert "cannot be signed again" in str(synchronizer.state.store_error)
    assert logged(logs, NOT_USABLE, log_level="error")


async def test_a_directory_that_every_user_may_write_to_is_reported(
    make: Make, store: SnapshotStore, logs: LogLines
) -> None:
    keep(store, "if")
    store.path.parent.chmod(0o777)
    assert await make(store).restore()
    assert logged(logs, "Every user may write to SNAPSHOT_DIR", log_level="warning")


async def test_an_unreadable_store_is_logged_and_the_cycle_continues(
    make: Make, tmp_path: Path, logs: LogLines
) -> None:
    (tmp_path / "file").touch()
    store = SnapshotStore(tmp_path / "file")
    with pytest.raises(StoreError):
        store.load()
    synchronizer = make(store)
    assert not await synchronizer.restore()
    assert await cycle(synchronizer) is Outcome.PUBLISHED
    assert len(logged(logs, NOT_USABLE, log_level="error")) == 1
    assert len(logged(logs, NOT_STORED, log_level="error")) == 1
