"""Accidents are held, also across a restart, and published once they are accepted; a pin counts until it ends, and what
came meanwhile is served then. Everything works without the database, and no disk holds it up.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.support.fakes import FakeClock, FakeSource
from tests.support.leftovers import nothing_left, open_descriptors
from tests.support.logs import LogLines, captured_logs, logged
from tests.support.loop import eventually, promptly
from tests.support.snapshots import row

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.guard import Thresholds
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import catalogue_disk, catalogue_guard, served_catalogue, stored_catalogue
from definition_server.control_plane.disk import on_disk
from definition_server.control_plane.freshness import RestartReason
from definition_server.control_plane.history import History
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publications import (
    InvalidRequest,
    PublicationError,
    Publications,
    UnknownVersion,
)
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.store import SnapshotStore, StoreError
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome
from definition_server.control_plane.wishes import Pin, Policy, Wishes, WishesFile
from definition_server.observability.reasons import Reason

T = TypeVar("T")

HELD = "Catalogue held"
ALL = tuple(row(f"c{number:02}") for number in range(40))
FEW = ALL[:4]


class Disk:
    """A disk that hangs while `works` is not set."""

    def __init__(self) -> None:
        self.works = threading.Event()
        self.works.set()

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]:
        def when_it_works() -> T:
            assert self.works.wait(60)
            return work()

        return on_disk(when_it_works)


class Server:
    """A synchronizer with everything in SNAPSHOT_DIR; `restart` replaces it, as a new process would."""

    def __init__(self, directory: Path | None, source: FakeSource) -> None:
        self.directory = directory
        self.source = source
        self.clock = FakeClock()
        self.disk = Disk()
        self.policy = Policy()
        self.signer: Signer | None = None
        self.keep = 10
        self.options: dict[str, Any] = {}
        self.generations: list[int] = []
        self.versions: list[str] = []
        self._start()

    def _start(self) -> None:
        directory = self.directory
        self.publisher = Publisher()
        self.publisher.on_publish(lambda publication: self.generations.append(publication.snapshot.generation))
        self.publisher.on_publish(lambda publication: self.versions.append(publication.snapshot.version_hash))
        self.synchronizer = Synchronizer(
            self.source,
            self.publisher,
            signer=self.signer,
            store=None if directory is None else SnapshotStore(directory),
            history=None if directory is None else History(directory, self.keep, self.clock),
            wishes=None if directory is None else WishesFile(directory),
            policy=lambda: self.policy,
            clock=self.clock,
            disk=self.disk,
            **self.options,
        )
        self.syncs = 0
        self.publications = Publications(
            self.synchronizer.catalogue, signer=lambda: self.signer, sync_soon=self._sync_soon, clock=self.clock
        )

    def _sync_soon(self) -> None:
        self.syncs += 1

    def restart(self) -> None:
        self.close()
        self.generations, self.versions = [], []
        self._start()

    def close(self) -> None:
        self.synchronizer.close()
        self.publisher.close()

    async def written(self) -> None:
        """Wait until no thread works on the disk."""
        await eventually(lambda: not any(thread.name == "disk" for thread in threading.enumerate()), "the disk is idle")
        await asyncio.sleep(0)

    async def cycle(self, *rows: Row) -> Outcome:
        """A cycle, over ``rows`` if there are any. A second later than the one before."""
        self.clock.advance(1)
        if rows:
            self.source.replace(*rows)
        outcome = await promptly(self.synchronizer.cycle(lambda _: 60.0))
        await self.written()
        return outcome

    @property
    def served(self) -> Snapshot:
        assert self.publisher.current is not None
        return self.publisher.current.snapshot

    @property
    def version(self) -> str:
        return self.served.version_hash

    @property
    def held(self) -> str:
        assert self.synchronizer.state.held is not None
        return self.synchronizer.state.held.version_hash


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path, FakeSource(*ALL))
    yield server
    server.disk.works.set()
    await server.written()
    server.close()


@pytest.fixture
async def diskless() -> AsyncIterator[Server]:
    server = Server(None, FakeSource(*ALL))
    yield server
    server.close()


@pytest.fixture
def logs() -> Iterator[LogLines]:
    with captured_logs() as lines:
        yield lines


async def change(server: Server, code: str) -> str:
    """Publish the table with other code in one row. Returns the version."""
    assert await server.cycle(row("c00", code), *ALL[1:]) is Outcome.PUBLISHED
    return server.version


# -- held ------------------------------------------------------------------------------------------------------------


async def test_a_mass_delete_is_held_in_the_cycle_that_reads_it_and_in_each_one_after(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    good = server.version
    assert await server.cycle(*FEW) is Outcome.HELD
    assert server.version == good
    (line,) = logged(logs, HELD, log_level="error")
    assert line["version_hash"] == server.held
    assert server.held[:8] in line["remedy"]
    assert line["commands"] == tuple(f"c{number:02}" for number in range(4, 14))
    assert line["reason"] is Reason.CATALOGUE_SHRUNK
    state = server.synchronizer.state
    since = state.held and state.held.since
    rows = server.source.rows_given
    assert await server.cycle() is Outcome.HELD
    assert state.last_reason is Reason.CATALOGUE_SHRUNK
    assert state.held
    assert state.held.since == since
    assert server.source.rows_given == rows, "an unchanged table is not read again"
    assert len(logged(logs, HELD)) == 2


async def test_a_mass_delete_is_held_across_a_restart_and_the_stored_catalogue_served(server: Server) -> None:
    await server.cycle()
    good = server.version
    server.source.replace(*FEW)
    server.restart()
    assert await server.cycle() is Outcome.HELD
    assert server.versions == []
    assert await server.synchronizer.restore()
    assert server.versions == [good]
    assert await server.cycle() is Outcome.HELD
    await server.publications.accept(server.held[:8])
    assert server.served.count == 4


@pytest.mark.parametrize("file", ["missing", "damaged"])
async def test_the_history_stands_in_for_an_unusable_last_known_good_file(server: Server, file: str) -> None:
    await server.cycle()
    await change(server, "new")
    newest = server.version
    path = SnapshotStore(server.directory or Path()).path
    path.unlink() if file == "missing" else path.write_bytes(b"x" * 500)
    server.source.replace(*FEW)
    server.restart()
    assert await server.cycle() is Outcome.HELD
    assert await server.synchronizer.restore()
    assert server.version == newest


async def test_an_accepted_catalogue_is_published_at_once_without_the_database(server: Server) -> None:
    await server.cycle()
    await server.cycle(*FEW)
    server.source.fail(SourceError("down"))
    assert await server.cycle() is Outcome.FAILED
    held = server.held
    await promptly(server.publications.accept(held))
    assert (server.version, server.served.generation) == (held, 2)
    assert server.synchronizer.state.held is None
    assert server.syncs == 1, "a cycle finds out whether the table still has it"
    await server.written()
    server.restart()
    assert await server.synchronizer.restore()
    assert server.version == held


async def test_an_accepted_hash_is_used_up_by_its_publication(server: Server) -> None:
    server.options = {"limits": Thresholds()}
    await server.cycle()
    await server.cycle()
    emptied = await server.cycle(Row(1, None, None, None, b"x"))
    assert emptied is Outcome.HELD
    await server.publications.accept(server.held)
    assert server.served.count == 0
    await server.cycle(*ALL)
    assert server.served.count == 40
    assert await server.cycle(Row(1, None, None, None, b"x")) is Outcome.HELD, "each time"


@pytest.mark.parametrize("down", [False, True], ids=["database up", "database down"])
async def test_a_hash_in_the_policy_releases_what_is_held_in_the_next_cycle(server: Server, down: bool) -> None:
    await server.cycle()
    await server.cycle(*FEW)
    server.policy = Policy(accept=(server.held[:16],))
    if down:
        server.source.fail(SourceError("down"))
    assert await server.cycle() is (Outcome.FAILED if down else Outcome.PUBLISHED)
    assert server.served.count == 4


async def test_a_hash_that_the_policy_accepts_beforehand_is_never_held(server: Server) -> None:
    await server.cycle()
    await server.cycle(*FEW)
    server.policy = Policy(accept=(server.held,))
    server.restart()
    assert await server.cycle() is Outcome.PUBLISHED


async def test_a_mended_table_is_served_in_the_next_cycle_and_the_held_one_forgotten(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    held = server.held
    assert await server.cycle(*ALL) is Outcome.UNCHANGED
    assert server.synchronizer.state.held is None
    assert server.version == good
    assert logged(logs, "Catalogue no longer held", version_hash=held)
    with pytest.raises(UnknownVersion, match="No catalogue is held now"):
        await server.publications.accept(held)


@pytest.mark.parametrize("with_disk", [True, False], ids=["history", "this run"])
async def test_the_exact_return_to_an_earlier_version_is_never_held(
    server: Server, diskless: Server, with_disk: bool
) -> None:
    server = server if with_disk else diskless
    await server.cycle()
    doubled = [row(f"big{number}", "x" * 200_000) for number in range(20)]
    assert await server.cycle(*ALL, *doubled) is Outcome.HELD
    await server.publications.accept(server.held)
    if with_disk:
        await server.written()
        server.restart()
        assert await server.synchronizer.restore()
    server.source.replace(*FEW)
    assert await server.cycle() is Outcome.HELD, "no version that was published"
    assert await server.cycle(*ALL) is Outcome.PUBLISHED


async def test_gradual_losses_are_held_once_they_add_up_within_the_window(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(f"c{number:03}") for number in range(200)]
    await server.cycle(*rows)
    assert await server.cycle(*rows[:165]) is Outcome.PUBLISHED
    assert await server.cycle(*rows[:137]) is Outcome.HELD
    assert await server.cycle(*rows[:160]) is Outcome.PUBLISHED, "five commands"
    monkeypatch.setattr(catalogue_guard, "WINDOW_SECONDS", -1.0)
    assert await server.cycle(*rows[:129]) is Outcome.PUBLISHED, "an old baseline does not count"


async def test_a_change_of_the_signing_key_is_no_change_of_the_content(server: Server) -> None:
    await server.cycle()
    version = server.version
    server.signer = Signer("key")
    server.synchronizer.use_signer(server.signer)
    assert await server.cycle() is Outcome.PUBLISHED
    assert server.version == version


async def test_a_held_catalogue_does_not_keep_a_rotated_key_from_the_served_one(server: Server) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    server.signer = Signer("key")
    server.synchronizer.use_signer(server.signer)
    assert await server.cycle() is Outcome.HELD
    assert server.version == good
    code = server.served.get("c00")
    assert code is not None
    assert server.signer.unpack(code.code) == b"pass"
    await server.publications.accept(server.held)
    code = server.served.get("c00")
    assert code is not None
    assert server.signer.unpack(code.code) == b"pass"


class HoldingGate:
    """Holds the rows of ``names``."""

    unsure = False

    def __init__(self) -> None:
        self.names: frozenset[bytes] = frozenset()
        self.last_good: list[str | None] = []

    async def apply(self, builder: SnapshotBuilder, last_good: Snapshot | None) -> frozenset[bytes]:
        self.last_good.append(None if last_good is None else last_good.version_hash)
        return self.names

    def prepare(self) -> None: ...

    def cycle_ended(self, newest: Snapshot | None) -> None: ...


async def test_many_rows_held_at_once_hold_the_catalogue_and_once_accepted_the_next_change_passes(
    server: Server,
) -> None:
    gate = HoldingGate()
    server.options = {"gate": gate}
    server.restart()
    await server.cycle()
    first = server.version
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "new"), *ALL[:39]) is Outcome.HELD
    assert server.synchronizer.state.last_reason is Reason.TOO_MANY_ROWS_HELD
    await server.publications.accept(server.held)
    assert await server.cycle(row("c39", "newer"), *ALL[:39]) is Outcome.PUBLISHED
    server.source.replace(row("c39", "newest"), *ALL[:39])
    await server.written()
    server.restart()
    assert await server.cycle() is Outcome.PUBLISHED, "known across a restart"
    assert gate.last_good[:2] == [None, first]
    assert gate.last_good[-1] is not None, "the stored one"


# -- a disk that hangs -----------------------------------------------------------------------------------------------


async def test_a_start_with_a_hanging_disk_waits_for_a_bounded_time_and_says_so(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    server.disk.works.clear()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions, "the table is served")
    assert logged(logs, "Stored catalogue and pins not known in time", log_level="error")
    server.disk.works.set()
    assert await promptly(cycling) is Outcome.PUBLISHED


async def test_a_pin_that_a_slow_disk_remembers_counts_once_the_disk_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_disk, "LOAD_PATIENCE_SECONDS", 0.05)
    server.disk.works.clear()
    server.restart()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions == [new], "the table is served")
    server.disk.works.set()
    await promptly(cycling)
    await server.written()
    await server.cycle()
    assert server.version == old
    assert server.generations == sorted(set(server.generations))


async def test_a_publication_before_the_disk_has_answered_does_not_overwrite_the_pin_there(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    gate = HoldingGate()
    gate.names = frozenset({b"c00"})  # a count of held rows is noted beside the pin
    server.options["gate"] = gate
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_disk, "LOAD_PATIENCE_SECONDS", 0.05)
    server.disk.works.clear()
    server.restart()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions == [new], "the table is served")
    await promptly(cycling)
    server.disk.works.set()
    await server.written()
    assert WishesFile(server.directory).read().pinned == Pin(old)


async def test_a_pin_or_an_end_of_it_that_the_disk_does_not_know_is_noted_until_it_does(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = server.synchronizer.state
    await server.cycle()

    def fail(*_: object) -> None:
        raise StoreError("the disk is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(WishesFile, "write", fail)
        assert await server.publications.pin(server.version, None) is not None
        assert state.pin_unsaved
        assert await server.publications.unpin() is not None
        assert not state.pin_unsaved
        await server.publications.pin(server.version, None)
    await server.cycle()
    assert not state.pin_unsaved
    monkeypatch.setattr(WishesFile, "write", fail)
    await server.publications.unpin()
    assert state.pin_unsaved


async def test_a_pin_that_would_end_after_all_time_is_refused(server: Server) -> None:
    await server.cycle()
    with pytest.raises(InvalidRequest, match="year 9999"):
        await server.publications.pin(server.version, 9e18)
    assert server.synchronizer.state.pin is None


async def test_a_hanging_disk_delays_neither_accept_nor_pin(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    held = server.held
    server.disk.works.clear()
    accepting = asyncio.create_task(server.publications.accept(held))
    await eventually(lambda: server.version == held, "published")
    pinning = asyncio.create_task(server.publications.pin(held, None))
    await eventually(lambda: server.synchronizer.state.pin, "pinned")
    server.disk.works.set()
    await promptly(asyncio.gather(accepting, pinning))
    assert good != held


async def test_an_acceptance_before_the_disk_has_answered_does_not_take_the_pin_there_away(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_disk, "LOAD_PATIENCE_SECONDS", 0.05)
    server.disk.works.clear()
    server.restart()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions == [new], "the table is served")
    await promptly(cycling)
    assert await promptly(server.synchronizer.cycle(lambda _: 60.0)) is Outcome.UNCHANGED
    server.source.replace(*FEW)
    assert await promptly(server.synchronizer.cycle(lambda _: 60.0)) is Outcome.HELD
    held = server.held
    await promptly(server.publications.accept(held))
    assert server.version == held
    server.disk.works.set()
    await server.written()
    await server.cycle()
    assert server.version == old, "the pin counts once the disk has answered"
    await server.written()
    assert WishesFile(server.directory).read() == Wishes(pinned=Pin(old)), "and the acceptance is used up"


async def test_a_pin_before_the_disk_has_answered_is_stored_when_it_has(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_disk, "LOAD_PATIENCE_SECONDS", 0.05)
    server.disk.works.clear()
    server.restart()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions == [new], "the table is served")
    await promptly(cycling)
    note = await promptly(server.publications.pin(new, None))
    assert note is not None
    assert "not answered" in note
    assert server.synchronizer.state.pin_unsaved
    server.disk.works.set()
    await eventually(lambda: not server.synchronizer.state.pin_unsaved, "stored")
    assert WishesFile(server.directory).read().pinned == Pin(new)
    assert server.version == new


async def test_rows_held_before_a_slow_disk_has_answered_are_not_mistaken_for_those_of_an_earlier_run(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = HoldingGate()
    server.options = {"gate": gate}
    server.restart()
    await server.cycle()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    await server.cycle(row("c39", "new"), *ALL[:39])
    await server.publications.accept(server.held)
    await server.written()
    gate.names = frozenset()  # mended while the server is down, by the content that was served
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_disk, "LOAD_PATIENCE_SECONDS", 0.05)
    server.disk.works.clear()
    server.restart()
    await promptly(server.synchronizer.cycle(lambda _: 60.0))
    server.disk.works.set()
    await server.written()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "newer"), *ALL[:39]) is Outcome.HELD


@pytest.mark.parametrize("restart", [False, True], ids=["same run", "restart"])
async def test_rows_that_were_mended_by_the_content_that_is_served_count_as_held_no_more(
    server: Server, restart: bool
) -> None:
    gate = HoldingGate()
    server.options = {"gate": gate}
    server.restart()
    await server.cycle()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    await server.cycle(row("c39", "new"), *ALL[:39])
    await server.publications.accept(server.held)
    gate.names = frozenset()
    server.synchronizer.read_again()
    assert await server.cycle() is Outcome.UNCHANGED, "the same content, and no row of it is held"
    if restart:
        await server.written()
        server.restart()
        await server.synchronizer.restore()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "newer"), *ALL[:39]) is Outcome.HELD


async def test_a_count_of_held_rows_belongs_to_its_catalogue_alone(server: Server) -> None:
    """The disk took the one and not the other."""
    assert server.directory is not None
    gate = HoldingGate()
    server.options = {"gate": gate}
    await server.cycle()
    await server.written()
    WishesFile(server.directory).write(Wishes(rows_held=12, rows_held_in="ab" * 32))
    server.restart()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "new"), *ALL[:39]) is Outcome.HELD


# -- orders that are interrupted -------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pin", "unpin", "accept"])
async def test_an_order_whose_client_leaves_is_carried_out_to_its_end(server: Server, order: str) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    if order == "unpin":
        await server.publications.pin(old, None)
    await server.cycle(*FEW)
    held = server.held
    await server.written()
    orders: dict[str, Coroutine[Any, Any, Any]] = {
        "pin": server.publications.pin(old, None),
        "unpin": server.publications.unpin(),
        "accept": server.publications.accept(held),
    }
    async with server.synchronizer.catalogue._lock:  # a cycle publishes meanwhile
        giving = asyncio.create_task(orders.pop(order))
        for unused in orders.values():
            unused.close()
        await asyncio.sleep(0.01)
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
        assert giving.cancelled()
    expected = {"pin": old, "unpin": new, "accept": held}[order]
    await eventually(lambda: server.version == expected, "carried out")
    await eventually(lambda: not server.publications._orders, "ended")
    kept = WishesFile(server.directory).read()
    assert kept == Wishes(pinned=Pin(old) if order == "pin" else None)


async def test_a_failure_of_an_order_whose_client_left_is_logged(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.cycle()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(server.synchronizer.catalogue, "_settle", fail)
    async with server.synchronizer.catalogue._lock:
        giving = asyncio.create_task(server.publications.pin(server.version, None))
        await asyncio.sleep(0.01)
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
    await eventually(lambda: logged(logs, "Unexpected failure of an operator's order", log_level="error"), "logged")
    logs.clear()  # the frames of the exception have the catalogue


async def test_a_pin_by_command_is_not_undone_by_a_slow_load_for_the_pin_before_it(server: Server) -> None:
    await server.cycle()
    first = server.version
    second = await change(server, "second")
    await change(server, "third")
    catalogue = server.synchronizer.catalogue
    load, loading, go_on = catalogue.disk.load_version, asyncio.Event(), asyncio.Event()

    async def slow(version: str, signer: Signer | None) -> Snapshot | None:
        found = await load(version, signer)
        if version == first:
            loading.set()
            await go_on.wait()
        return found

    catalogue.disk.load_version = slow  # type: ignore[method-assign]
    server.policy = Policy(pin=Pin(first))
    following = asyncio.create_task(catalogue.follow())
    await promptly(loading.wait())
    async with catalogue._lock:
        pinning = asyncio.create_task(server.publications.pin(second, None))
        await eventually(lambda: catalogue.wishes().pin == Pin(second), "pinned")
        go_on.set()
        await asyncio.sleep(0.01)
    await promptly(asyncio.gather(following, pinning))
    assert server.version == second


async def test_no_descriptor_is_left_where_descriptors_run_out_in_the_midst_of_a_publication(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.cycle()
    await server.cycle(row("c00", "warm"), *ALL[1:])

    def none_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    def snapshots() -> int:
        gc.collect()  # a mapping has a descriptor of its own, and the frames of an exception keep the mapping
        return sum("avap-snapshot" in path for path in open_descriptors().values())

    before = snapshots()
    with monkeypatch.context() as patch:
        patch.setattr(served_catalogue.os, "dup", none_left)
        for number in range(3):
            assert await server.cycle(row("c00", f"new{number}"), *ALL[1:]) is Outcome.FAILED
    assert snapshots() == before
    assert await server.cycle() is Outcome.PUBLISHED


# -- pinned ----------------------------------------------------------------------------------------------------------


async def test_a_pin_serves_an_old_version_under_a_new_generation_and_the_newest_is_served_when_it_ends(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    server.source.fail(SourceError("down"))
    assert await server.cycle() is Outcome.FAILED
    assert await promptly(server.publications.pin(old[:8], None)) is None
    assert (server.version, server.served.generation) == (old, 3)
    assert logged(logs, "Catalogue pinned", version_hash=old)
    assert await server.cycle(row("c00", "newest"), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == old
    newest = server.synchronizer.state.newest_version
    assert await promptly(server.publications.unpin()) is None
    assert server.version == newest != old
    assert server.generations == [1, 2, 3, 4]
    with pytest.raises(PublicationError, match="nothing is pinned"):
        await server.publications.unpin()


async def test_a_pin_survives_restarts_without_the_database_and_its_end_serves_the_newest(server: Server) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    newest = await server.cycle(row("c01", "newest"), row("c00", "new"), *ALL[2:])
    assert newest is Outcome.UNCHANGED
    for _ in range(2):
        await server.written()
        server.restart()
        server.source.fail(SourceError("down"))
        await server.cycle()
        assert await server.synchronizer.restore()
        assert server.versions == [old]
        assert server.synchronizer.state.pin is not None
    await server.publications.unpin()
    assert server.version not in (old, new), "the newest that passed, not what the pin replaced"
    await server.written()
    server.restart()
    await server.cycle()
    assert old not in server.versions


async def test_a_restart_under_a_pin_with_the_database_up_never_serves_the_table(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    server.restart()
    await server.cycle()
    assert server.versions == [old]


async def test_a_pin_expires_by_itself(server: Server, logs: LogLines) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, server.clock.now + 0.05)
    assert server.version == old
    server.clock.advance(0.06)
    await eventually(lambda: server.version == new, "the newest again")
    assert logged(logs, "Pin has ended", version_hash=old)
    assert server.synchronizer.state.pin is None


async def test_a_pin_that_expired_while_the_server_was_down_does_not_count(server: Server) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, server.clock.now + 3600)
    await server.written()
    server.clock.advance(3601)
    server.restart()
    await server.cycle()
    assert server.versions == [new]


async def test_what_is_held_under_a_pin_can_be_accepted_and_is_served_after_it(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    assert await server.cycle(*FEW) is Outcome.HELD
    held = server.held
    await server.publications.accept(held)
    assert server.version == old
    await server.publications.unpin()
    assert server.version == held


async def test_a_key_rotated_under_a_pin_signs_the_pinned_catalogue(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.publications.pin(old, None)
    server.signer = Signer("key")
    server.synchronizer.use_signer(server.signer)
    await server.cycle()
    assert server.version == old
    definition = server.served.get("c00")
    assert definition is not None
    assert server.signer.unpack(definition.code) == b"pass"
    await server.publications.unpin()
    definition = server.served.get("c00")
    assert definition is not None
    assert server.signer.unpack(definition.code) == b"new"


@pytest.mark.parametrize("database", ["up", "down"])
async def test_a_key_rotated_under_a_pin_leaves_pin_pinned_and_newest_on_disk_under_the_new_key(
    server: Server, database: str
) -> None:
    server.signer = Signer("old key")
    server.restart()
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    if database == "down":
        server.source.fail(SourceError("down"))
    server.signer = Signer("new key")
    server.synchronizer.use_signer(server.signer)
    for _ in range(2):
        await server.cycle()
    await server.written()
    server.restart()
    server.source.fail(SourceError("down"))
    await server.cycle()
    assert await server.synchronizer.restore()
    assert server.versions == [old]
    await server.publications.unpin()
    assert server.version == new


@pytest.mark.parametrize("key", [None, "our key"], ids=["no key", "key"])
async def test_a_pin_that_a_stranger_wrote_counts_only_where_there_is_no_key(
    server: Server, logs: LogLines, key: str | None
) -> None:
    assert server.directory is not None
    server.signer = None if key is None else Signer(key)
    server.restart()
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.written()
    WishesFile(server.directory).write(Wishes((old,), Pin(old)))
    server.restart()
    await server.cycle()
    assert server.version == (old if key is None else new)
    lines = logged(logs, "Pins and accepted catalogues not read", log_level="error")
    assert [("MAC" in line["error"], "AVAP_INTERNAL_KEY" in line["remedy"]) for line in lines] == (
        [] if key is None else [(True, True)]
    )
    if key is not None:
        await server.publications.pin(new, None)
        await server.written()
        assert server.directory.joinpath("wishes.json.refused").exists(), "kept as evidence"
        server.restart()
        server.source.replace(row("c00", "newest"), *ALL[1:])
        await server.cycle()
        assert server.version == new, "ours counts"


async def test_what_the_disk_did_not_take_is_stored_while_the_database_is_down(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    await server.cycle()
    old = server.version
    await change(server, "new")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    server.source.fail(SourceError("down"))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert await server.publications.pin(old, None) is not None
        await server.written()
    assert await server.cycle() is Outcome.FAILED
    assert WishesFile(server.directory).read().pinned == Pin(old)
    assert not server.synchronizer.state.pin_unsaved


async def test_a_pin_in_the_policy_counts_from_the_next_cycle_and_a_pin_by_command_goes_first(server: Server) -> None:
    await server.cycle()
    first = server.version
    second = await change(server, "second")
    third = await change(server, "third")
    server.policy = Policy(pin=Pin(first[:12]))
    server.source.fail(SourceError("down"))
    await server.cycle()
    assert server.version == first
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert pin.source == "policy"
    await server.publications.pin(second, None)
    assert server.version == second
    with pytest.raises(PublicationError, match="PUBLICATION_POLICY"):
        await server.publications.unpin()
    assert server.version == first
    server.policy = Policy()
    await server.cycle()
    assert server.version == third


async def test_a_policy_that_pins_an_unknown_version_is_logged_once_and_what_is_served_stays(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    version = server.version
    server.policy = Policy(pin=Pin("ab" * 32))
    for code in ("new", "newer"):
        assert await server.cycle(row("c00", code), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == version
    assert len(logged(logs, "Pinned catalogue not served", log_level="error")) == 1
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert pin.missing
    server.policy = Policy()
    assert await server.cycle() is Outcome.UNCHANGED
    assert server.version != version, "the newest"


async def test_a_new_server_under_an_unknown_pin_follows_the_table_until_it_knows_the_version(
    server: Server, logs: LogLines
) -> None:
    await server.cycle()
    wanted = server.version
    await server.written()
    assert server.directory is not None
    history = server.directory / "history"
    elsewhere = [path.rename(server.directory / path.name) for path in history.iterdir()]
    SnapshotStore(server.directory).path.unlink()
    server.policy = Policy(pin=Pin(wanted[:8]))
    server.source.replace(row("c00", "first"), *ALL[1:])
    server.restart()
    assert await server.cycle() is Outcome.PUBLISHED
    assert await server.cycle(row("c00", "second"), *ALL[1:]) is Outcome.PUBLISHED
    assert len(set(server.versions)) == 2
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert (pin.missing, pin.vain) == (True, True)
    [line] = logged(logs, "Pinned catalogue not served", log_level="error")
    assert line["effect"].startswith("the table is followed")
    for path in elsewhere:
        path.rename(history / path.name)
    await server.synchronizer.catalogue.disk.list_history()
    await server.cycle()
    assert server.version == wanted, "known, it counts"
    assert await server.cycle(row("c00", "third"), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == wanted
    pin = server.synchronizer.state.pin
    assert pin is not None
    assert (pin.missing, pin.vain) == (False, False)


async def test_an_unknown_pin_in_place_of_an_unknown_one_keeps_what_is_served(server: Server) -> None:
    server.policy = Policy(pin=Pin("ab" * 32))
    await server.cycle()
    server.policy = Policy(pin=Pin("cd" * 32))
    version = server.version
    assert await server.cycle(row("c00", "new"), *ALL[1:]) is Outcome.UNCHANGED
    assert server.version == version


@pytest.mark.parametrize("began", ["before anything was served", "on a server that served"])
async def test_a_restart_under_a_pin_of_an_unknown_version_is_safe_where_it_changes_nothing(
    server: Server, began: str
) -> None:
    proof = Proof(server.synchronizer.state, interval=60.0, stores=True, clock=server.clock, now=server.clock)
    server.synchronizer.observer = proof
    unknown = Policy(pin=Pin("ab" * 32))
    server.policy = unknown if began.startswith("before") else Policy()
    await server.cycle()
    server.policy = unknown
    await server.cycle(row("c00", "new"), *ALL[1:])
    proof.tick(published=True, serving=True)
    restart, before = proof.verdict().restart, server.version
    expected = RestartReason.STORED if began.startswith("before") else RestartReason.PIN_NOT_STORED
    assert (restart.safe, restart.reason) == (expected is RestartReason.STORED, expected)
    server.restart()
    await server.cycle()
    assert (server.version == before) == restart.safe, "as was promised"


async def test_without_a_directory_what_is_served_can_be_pinned_and_the_answer_says_for_how_long(
    diskless: Server,
) -> None:
    await diskless.cycle()
    version = diskless.version
    note = await diskless.publications.pin(version, None)
    assert note is not None
    assert "SNAPSHOT_DIR" in note
    await diskless.cycle(row("c00", "new"), *ALL[1:])
    assert diskless.version == version


async def test_a_full_disk_is_said_and_the_pin_counts_and_is_kept_later(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.cycle()
    version = server.version

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        note = await server.publications.pin(version, None)
        await server.written()
    assert note is not None
    assert "No space left" in note
    assert logged(logs, "Pins and accepted catalogues not stored", log_level="error")
    await server.cycle()
    server.restart()
    await server.cycle(row("c00", "new"), *ALL[1:])
    assert server.versions == [version]


# -- requests --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["", "abc", "a" * 65, "A" * 64, "zz" * 16, "../etc", "\0" * 8, "é" * 10])
async def test_what_names_no_version_is_refused(server: Server, version: str) -> None:
    await server.cycle()
    for request in (
        server.publications.accept(version),
        server.publications.pin(version, None),
        server.publications.export(version),
        server.publications.diff(version, server.version),
    ):
        with pytest.raises(InvalidRequest, match="8 to 64 digits"):
            await request  # type: ignore[misc]


async def test_a_pin_of_what_is_held_names_accept_and_an_acceptance_of_what_was_published_names_pin(
    server: Server,
) -> None:
    await server.cycle()
    good = server.version
    await server.cycle(*FEW)
    held = server.held
    with pytest.raises(PublicationError, match=f"is held .*accept {held[:16]}"):
        await server.publications.pin(held[:8], None)
    assert server.synchronizer.state.pin is None
    with pytest.raises(UnknownVersion, match=f"published before. Held is {held}. .*pin {good[:8]}"):
        await server.publications.accept(good[:8])
    await server.publications.accept(held)
    assert await server.publications.pin(held[:8], None) is None, "it passed"


async def test_an_unknown_version_is_answered_with_those_that_exist(server: Server) -> None:
    await server.cycle()
    old = server.version
    await change(server, "new")
    await server.cycle(*FEW)
    for request in (
        server.publications.pin("ab" * 32, None),
        server.publications.export("ab" * 32),
        server.publications.diff("ab" * 32, old),
    ):
        with pytest.raises(UnknownVersion, match=old[:16]):
            await request  # type: ignore[misc]
    with pytest.raises(UnknownVersion, match=server.held):
        await server.publications.accept("ab" * 32)
    with pytest.raises(UnknownVersion, match="published before"):
        await server.publications.accept(old)
    with pytest.raises(UnknownVersion, match="is held"):
        await server.publications.pin(server.held, None)
    with pytest.raises(InvalidRequest, match="past"):
        await server.publications.pin(old, server.clock.now)


async def test_versions_can_be_listed_compared_and_exported_the_held_one_included(server: Server) -> None:
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.cycle(*FEW)
    history = await server.publications.history()
    assert [entry.version_hash for entry in history] == [new, old]
    assert [entry.definitions for entry in history] == [40, 40]
    before, after, changes = await server.publications.diff(old[:8], new[:8])
    assert (before, after, changes.changed) == (old, new, ("c00",))
    _, _, changes = await server.publications.diff(new, server.held)
    assert len(changes.removed) == 36
    assert (await server.publications.export(old)).version_hash == old
    assert (await server.publications.export(None)).version_hash == new


async def test_the_history_keeps_the_last_ones_and_never_loses_what_is_pinned(server: Server) -> None:
    server.keep = 3
    server.restart()
    await server.cycle()
    first = server.version
    await server.publications.pin(first, None)
    for number in range(6):
        await server.cycle(row("c00", f"v{number}"), *ALL[1:])
    kept = [entry.version_hash for entry in await server.publications.history()]
    assert len(kept) == 4
    assert kept[-1] == first
    assert server.synchronizer.state.history_entries == 4
