"""The last-known-good snapshot is written to a disk that the test plays; the server waits for a write for a limited
time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged
from tests.support.snapshots import published

from definition_server.catalog.signing import Signer
from definition_server.control_plane.last_known_good import LastKnownGood
from definition_server.control_plane.publisher import Publication
from definition_server.control_plane.store import StoreError
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")


class Store:
    """A store that notes the calls of `save`."""

    def __init__(self) -> None:
        self.saved: list[Signer | None] = []

    def save(self, descriptor: int, signer: Signer | None) -> None:
        os.fstat(descriptor)
        self.saved.append(signer)

    def load(self, signer: Signer | None) -> None:
        return None


class Bench:
    def __init__(self) -> None:
        self.store = Store()
        self.works: list[tuple[Callable[[], Any], asyncio.Future[Any]]] = []
        self.late = 0
        self.good = LastKnownGood(
            cast(Any, self.store), cast(Any, None), self._on_stored_late, cast(Any, self._on_disk)
        )
        self.publication: Publication = published("if")

    def _on_stored_late(self) -> None:
        self.late += 1

    def _on_disk(self, work: Callable[[], Any]) -> asyncio.Future[Any]:
        self.works.append((work, asyncio.get_running_loop().create_future()))
        return self.works[-1][1]

    async def begin(self, signer: Signer | None = None) -> asyncio.Task[None]:
        """A save that the disk has not answered."""
        saving = asyncio.create_task(self.good.save(self.publication, signer))
        await asyncio.sleep(0)
        return saving

    def answer(self, error: BaseException | None = None) -> None:
        """Run the last work that the disk was given; it ends with ``error`` if there is one."""
        work, future = self.works[-1]
        work()
        future.set_result(None) if error is None else future.set_exception(error)


@pytest.fixture
async def bench() -> Any:
    made = Bench()
    yield made
    os.close(made.publication.descriptor)
    del made.publication


async def test_a_save_uses_its_own_descriptor_and_ends_when_the_disk_has_written(bench: Bench) -> None:
    key = Signer("key")
    assert not bench.good.busy
    saving = await bench.begin(key)
    assert bench.good.busy
    os.close(bench.publication.descriptor)  # as the next publication does
    bench.answer()
    await saving
    assert bench.store.saved == [key]
    assert not bench.good.busy
    bench.publication = published("if")


async def test_a_save_is_refused_while_the_disk_still_writes(bench: Bench) -> None:
    saving = await bench.begin()
    with pytest.raises(StoreError, match="the disk has not finished writing an earlier snapshot") as refused:
        await bench.good.save(bench.publication, None)
    assert refused.value.reason is Reason.DISK_HANGS
    assert len(bench.works) == 1
    bench.answer()
    await saving


async def test_a_failure_of_the_disk_is_raised_with_its_reason(bench: Bench) -> None:
    saving = await bench.begin()
    bench.answer(StoreError("the disk is full", Reason.DISK_FAILED))
    with pytest.raises(StoreError, match="the disk is full") as failed:
        await saving
    assert failed.value.reason is Reason.DISK_FAILED
    assert not bench.good.busy


async def test_no_descriptor_is_left_open_if_no_thread_can_be_started(bench: Bench) -> None:
    def refuse(_: object) -> Any:
        raise RuntimeError("can't start new thread")

    bench.good = LastKnownGood(cast(Any, bench.store), cast(Any, None), pytest.fail, refuse)
    for work in (bench.good.save(bench.publication, None), bench.good.load(None)):
        with pytest.raises(StoreError, match="no thread can be started: can't start new thread") as failed:
            await work
        assert failed.value.reason is Reason.MACHINE_LIMIT


@pytest.mark.parametrize("how", ["written", "failed", "given up"])
async def test_a_save_fails_after_five_seconds_and_its_late_end_is_reported(
    bench: Bench, how: str, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    wait = asyncio.wait

    async def at_once(tasks: Any, timeout: float) -> Any:
        limits.append(timeout)
        return await wait(tasks, timeout=0)

    with monkeypatch.context() as patch:
        patch.setattr(asyncio, "wait", at_once)
        with pytest.raises(StoreError, match="the disk did not finish within 5 s") as late:
            await bench.good.save(bench.publication, None)
    assert limits == [5.0]
    assert late.value.reason is Reason.DISK_HANGS
    assert (bench.late, logs) == (0, [])
    if how == "given up":
        work, future = bench.works[-1]
        work()
        future.cancel()
    else:
        bench.answer(StoreError("the disk is full") if how == "failed" else None)
    await asyncio.sleep(0)
    assert bench.late == (how == "written")
    failures = logged(logs, "Last-known-good snapshot not stored", log_level="error", error="the disk is full")
    assert len(failures) == (how == "failed")


async def test_loading_returns_none_if_nothing_is_stored(bench: Bench) -> None:
    loading = asyncio.create_task(bench.good.load(None))
    await asyncio.sleep(0)
    work, future = bench.works[-1]
    future.set_result(work())
    assert await loading is None
    assert not bench.good.loaded_as_it_is
