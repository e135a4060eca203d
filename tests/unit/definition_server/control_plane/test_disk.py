"""Disk work runs in its own thread, which returns a result or an error; both are dropped if nobody waits for them."""

from __future__ import annotations

import asyncio
import threading

import pytest
from tests.support.loop import promptly

from definition_server.control_plane.disk import on_disk


async def test_disk_work_runs_in_a_daemon_thread_and_its_result_is_returned() -> None:
    found = await promptly(on_disk(threading.current_thread))
    assert found is not threading.current_thread()
    assert (found.name, found.daemon) == ("disk", True)
    assert await promptly(on_disk(lambda: None)) is None


@pytest.mark.parametrize("error", [ValueError("a fault"), KeyboardInterrupt("an end")], ids=repr)
async def test_an_exception_of_disk_work_is_returned(error: BaseException) -> None:
    def fail() -> None:
        raise error

    future = on_disk(fail)
    await asyncio.wait((future,))
    assert future.exception() is error


async def test_the_result_of_cancelled_disk_work_is_dropped() -> None:
    untold: list[object] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: untold.append(context))
    works, began = threading.Event(), threading.Event()

    def work() -> int:
        began.set()
        assert works.wait(60)
        return 5

    for wanted in (True, False):
        future = on_disk(work)
        assert began.wait(60)
        (thread,) = (each for each in threading.enumerate() if each.name == "disk")
        if not wanted:
            future.cancel()
        works.set()
        thread.join(60)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert future.done()
        assert future.cancelled() is not wanted
        works.clear()
        began.clear()
    assert untold == []


def test_disk_work_that_ends_after_its_loop_raises_nothing() -> None:
    works = threading.Event()

    def work() -> None:
        assert works.wait(60)

    async def leave() -> None:
        on_disk(work)

    asyncio.run(leave())
    failures: list[threading.ExceptHookArgs] = []
    hook, threading.excepthook = threading.excepthook, failures.append
    try:
        (thread,) = (each for each in threading.enumerate() if each.name == "disk")
        works.set()
        thread.join(60)
    finally:
        threading.excepthook = hook
    assert failures == []
