"""A disk that hangs delays neither a publication nor an operator's command. When the disk answers, its files are
used."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Coroutine
from typing import Any

import pytest
from tests.support.leftovers import open_descriptors
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually, promptly, turns
from tests.support.snapshots import row
from tests.unit.definition_server.control_plane.publication_server import (
    ALL,
    FEW,
    HoldingGate,
    Server,
    change,
)

from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import catalogue_disk, last_known_good, served_catalogue, stored_catalogue
from definition_server.control_plane.publications import (
    InvalidRequest,
)
from definition_server.control_plane.source import SourceError
from definition_server.control_plane.store import StoreError
from definition_server.control_plane.sync_state import Outcome
from definition_server.control_plane.wishes import Pin, Policy, Wishes, WishesFile
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")


def wait_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for a disk takes longer than 0.05 s from now on."""
    monkeypatch.setattr(stored_catalogue, "RECALL_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(last_known_good, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(catalogue_disk, "LOAD_PATIENCE_SECONDS", 0.05)


async def pinned(server: Server) -> tuple[str, str]:
    """Publish two versions and pin the first. Returns both."""
    await server.cycle()
    old = server.version
    new = await change(server, "new")
    await server.publications.pin(old, None)
    await server.written()
    return old, new


async def started_on_a_hanging_disk(
    server: Server, table: str, monkeypatch: pytest.MonkeyPatch
) -> asyncio.Task[Outcome]:
    """Start again while the disk does not answer, until the version of the ``table`` is served. Returns the cycle."""
    wait_little(monkeypatch)
    server.disk.works.clear()
    server.restart()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions == [table], "the table is served")
    return cycling


async def test_a_start_with_a_hanging_disk_waits_for_a_bounded_time_and_logs_that(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_little(monkeypatch)
    server.disk.works.clear()
    cycling = asyncio.create_task(server.synchronizer.cycle(lambda _: 60.0))
    await eventually(lambda: server.versions, "the table is served")
    assert logged(logs, "Stored catalogue and pins not known in time", log_level="error")
    server.disk.works.set()
    assert await promptly(cycling) is Outcome.PUBLISHED


async def test_a_pin_on_a_slow_disk_takes_effect_when_the_disk_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = await pinned(server)
    cycling = await started_on_a_hanging_disk(server, new, monkeypatch)
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
    old, new = await pinned(server)
    gate = HoldingGate()
    gate.names = frozenset({b"c00"})  # the file holds a count of held rows together with the pin
    server.options["gate"] = gate
    await promptly(await started_on_a_hanging_disk(server, new, monkeypatch))
    server.disk.works.set()
    await server.written()
    assert WishesFile(server.directory).read().pinned == Pin(old)


async def test_a_notice_reports_a_pin_or_its_end_until_it_is_stored_on_disk(
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


async def test_a_pin_whose_end_is_too_far_in_the_future_is_refused(server: Server) -> None:
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


async def test_an_acceptance_before_the_disk_has_answered_keeps_the_pin_on_disk(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    old, new = await pinned(server)
    await promptly(await started_on_a_hanging_disk(server, new, monkeypatch))
    assert await promptly(server.synchronizer.cycle(lambda _: 60.0)) is Outcome.UNCHANGED
    server.source.replace(*FEW)
    assert await promptly(server.synchronizer.cycle(lambda _: 60.0)) is Outcome.HELD
    held = server.held
    await promptly(server.publications.accept(held))
    assert server.version == held
    server.disk.works.set()
    await server.written()
    await server.cycle()
    assert server.version == old, "the pin is in effect once the disk has answered"
    await server.written()
    assert WishesFile(server.directory).read() == Wishes(pinned=Pin(old)), "the acceptance is used up"


async def test_a_pin_that_was_made_before_the_disk_answered_is_stored_once_it_answers(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert server.directory is not None
    _, new = await pinned(server)
    await promptly(await started_on_a_hanging_disk(server, new, monkeypatch))
    note = await promptly(server.publications.pin(new, None))
    assert note is not None
    assert "not answered" in note
    assert server.synchronizer.state.pin_unsaved
    server.disk.works.set()
    await eventually(lambda: not server.synchronizer.state.pin_unsaved, "stored")
    assert WishesFile(server.directory).read().pinned == Pin(new)
    assert server.version == new


async def test_rows_held_before_a_slow_disk_answers_are_not_counted_as_rows_of_an_earlier_run(
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
    gate.names = frozenset()  # while the server is down, the rows get the content that was served
    wait_little(monkeypatch)
    server.disk.works.clear()
    server.restart()
    await promptly(server.synchronizer.cycle(lambda _: 60.0))
    server.disk.works.set()
    await server.written()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "newer"), *ALL[:39]) is Outcome.HELD


@pytest.mark.parametrize("restart", [False, True], ids=["same run", "restart"])
async def test_rows_that_get_their_served_content_again_are_no_longer_counted_as_held(
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


async def test_a_count_of_held_rows_applies_only_to_its_catalogue(server: Server) -> None:
    """The disk has stored the wishes but not the catalogue."""
    assert server.directory is not None
    gate = HoldingGate()
    server.options = {"gate": gate}
    await server.cycle()
    await server.written()
    WishesFile(server.directory).write(Wishes(rows_held=12, rows_held_in="ab" * 32))
    server.restart()
    gate.names = frozenset(b"c%02d" % number for number in range(12))
    assert await server.cycle(row("c39", "new"), *ALL[:39]) is Outcome.HELD


# -- interrupted commands --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["pin", "unpin", "accept"])
async def test_a_command_is_completed_even_if_its_client_leaves(server: Server, order: str) -> None:
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
        await eventually(lambda: server.publications._orders, "the order has begun")
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
        assert giving.cancelled()
    expected = {"pin": old, "unpin": new, "accept": held}[order]
    await eventually(lambda: server.version == expected, "carried out")
    await eventually(lambda: not server.publications._orders, "ended")
    kept = WishesFile(server.directory).read()
    assert kept == Wishes(pinned=Pin(old) if order == "pin" else None)


async def test_a_failure_of_a_command_is_logged_if_its_client_has_left(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    await server.cycle()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(server.synchronizer.catalogue, "_settle", fail)
    async with server.synchronizer.catalogue._lock:
        giving = asyncio.create_task(server.publications.pin(server.version, None))
        await eventually(lambda: server.publications._orders, "the order has begun")
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)
    await eventually(lambda: logged(logs, "Unexpected failure of an operator's order", log_level="error"), "logged")
    logs.clear()  # the frames of the exception refer to the catalogue


async def test_a_pin_by_command_is_not_undone_by_a_slow_load_for_the_previous_pin(server: Server) -> None:
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

    catalogue.disk.load_version = slow
    server.policy = Policy(pin=Pin(first))
    following = asyncio.create_task(catalogue.follow())
    await promptly(loading.wait())
    async with catalogue._lock:
        pinning = asyncio.create_task(server.publications.pin(second, None))
        await eventually(lambda: catalogue.wishes().pin == Pin(second), "pinned")
        go_on.set()
        await turns()
    await promptly(asyncio.gather(following, pinning))
    assert server.version == second


async def test_no_descriptor_is_left_if_descriptors_run_out_during_a_publication(
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
    # The thread releases its last work a little later, so the work of `before` may be counted although it has ended.
    await eventually(lambda: snapshots() <= before, lambda: f"{before} snapshots, there are {snapshots()}")
    assert await server.cycle() is Outcome.PUBLISHED


async def test_a_history_of_zero_versions_is_complete(server: Server) -> None:
    server.keep = 0
    server.restart()
    await server.cycle()
    await server.written()
    assert not server.synchronizer.catalogue.disk.lacks(server.version)


# -- a start with another key ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows", [True, False], ids=["that_knows_the_key_of_before", "that_does_not"])
async def test_a_start_with_another_key_keeps_the_files_on_disk(server: Server, knows: bool) -> None:
    old = Signer("old key")
    server.signer = old
    server.restart()
    await server.cycle(*ALL)
    first = server.version
    second = await change(server, "second")
    third = await change(server, "third")
    await server.publications.pin(second, None)
    await server.cycle(*FEW)
    await server.written()
    for _ in range(4):
        server.source.fail(SourceError("away", Reason.DATABASE_UNREACHABLE))

    server.signer = Signer("new key", previous=old if knows else None)
    server.restart()
    if not knows:
        assert not await server.synchronizer.restore()
        return
    assert await server.synchronizer.restore()
    assert server.version == second, "the pin is in effect"
    for _ in range(2):
        await server.cycle()

    server.signer = Signer("new key")  # the previous key is removed
    server.restart()
    assert await server.synchronizer.restore()
    assert server.version == second
    assert server.served.footer.key_id == server.signer.key_id
    await server.publications.unpin()
    assert server.version == third, "the last-known-good snapshot is used"
    await server.publications.pin(first, None)
    assert server.version == first, "the history is used"
    assert server.directory is not None
    assert not list(server.directory.rglob("*.refused"))


async def test_a_snapshot_of_neither_the_present_nor_the_previous_key_is_not_restored(server: Server) -> None:
    server.signer = Signer("another key")
    server.restart()
    await server.cycle(*ALL)
    await server.written()
    for _ in range(4):
        server.source.fail(SourceError("away", Reason.DATABASE_UNREACHABLE))
    server.signer = Signer("new key", previous=Signer("old key"))
    server.restart()
    assert not await server.synchronizer.restore()
