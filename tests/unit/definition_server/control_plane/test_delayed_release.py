"""A replaced snapshot is kept for a while and released in the background. Only one is kept at a time."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from array import array
from collections.abc import Iterator

import pytest
from tests.support.loop import eventually
from tests.support.snapshots import opened

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import delayed_release
from definition_server.control_plane.background import Background
from definition_server.control_plane.delayed_release import DelayedRelease

pytestmark = pytest.mark.usefixtures("nothing_is_left")


class Memory:
    """A snapshot's memory, and the thread in which it was released."""

    def __init__(self) -> None:
        self.freed_in: list[int] = []
        self._memory = array("B", opened("if").buffer)

    def snapshot(self) -> Snapshot:
        """Returns the memory. May be called once; afterwards the bench has no reference to it."""
        memory = self.__dict__.pop("_memory")
        weakref.finalize(memory, lambda: self.freed_in.append(threading.get_ident()))
        return Snapshot(memoryview(memory))


@pytest.fixture
def release() -> Iterator[DelayedRelease]:
    background = Background()
    release = DelayedRelease(background)
    yield release
    release.close()
    background.close()


async def test_a_snapshot_is_held_for_its_time_and_released_in_the_background(
    release: DelayedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delayed_release, "HOLD_SECONDS", 0.2)
    memory = Memory()
    began = asyncio.get_running_loop().time()
    release.take(memory.snapshot())
    await eventually(lambda: memory.freed_in, "the end")
    assert asyncio.get_running_loop().time() - began >= 0.2
    assert memory.freed_in != [threading.get_ident()]


async def test_no_more_than_one_snapshot_is_held(release: DelayedRelease) -> None:
    memories = [Memory() for _ in range(5)]
    for memory in memories:
        release.take(memory.snapshot())
    await eventually(lambda: all(memory.freed_in for memory in memories[:4]), "the earlier snapshots were freed")
    assert not memories[4].freed_in
    assert all(memory.freed_in != [threading.get_ident()] for memory in memories[:4])


async def test_a_failed_cycles_exception_does_not_keep_a_snapshot_in_memory(
    release: DelayedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delayed_release, "HOLD_SECONDS", 0.2)
    memory = Memory()

    def fail(served: Snapshot) -> Snapshot:
        try:
            raise OSError("the database is away")
        except OSError as error:
            kept = error  # the traceback of the exception refers to this frame, which refers to the snapshot
        assert kept
        return served

    gc.disable()  # a garbage collection could run at any moment
    try:
        release.take(fail(memory.snapshot()))
        await eventually(lambda: memory.freed_in, "the end")
    finally:
        gc.enable()


async def test_close_releases_the_held_snapshot_at_once(release: DelayedRelease) -> None:
    memory = Memory()
    release.take(memory.snapshot())
    release.close()
    assert memory.freed_in
    release.close()


async def test_a_snapshot_is_held_for_its_full_time_even_if_an_earlier_one_was_due(
    release: DelayedRelease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delayed_release, "HOLD_SECONDS", 1.5)
    loop = asyncio.get_running_loop()
    release.take(Memory().snapshot())
    due = asyncio.Event()
    loop.call_later(0.2, due.set)
    await due.wait()
    memory, began = Memory(), loop.time()
    release.take(memory.snapshot())
    await eventually(lambda: memory.freed_in, "the end")
    assert loop.time() - began >= 1.5


async def test_close_cancels_the_release_that_was_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delayed_release, "HOLD_SECONDS", 0.05)
    loop = asyncio.get_running_loop()
    faults: list[dict[str, object]] = []
    loop.set_exception_handler(lambda _, context: faults.append(context))
    background = Background()
    release = DelayedRelease(background)
    release.take(Memory().snapshot())
    release.close()
    background.close()
    due = asyncio.Event()
    loop.call_later(0.1, due.set)
    await due.wait()
    assert faults == []
