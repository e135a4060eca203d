"""Heavy work runs in one thread, in order, beside the event loop, and from some point on behind the workers."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest
from tests.support.leftovers import nothing_left
from tests.support.loop import promptly

from definition_server.control_plane.background import Background


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


def niceness() -> int:
    """Of the calling thread."""
    return os.getpriority(os.PRIO_PROCESS, 0)


async def test_work_gets_its_arguments_and_gives_its_result(background: Background) -> None:
    assert await background.run(int, "ff", base=16) == 255


async def test_what_the_work_raises_reaches_the_caller(background: Background) -> None:
    with pytest.raises(ZeroDivisionError):
        await background.run(divmod, 1, 0)


async def test_the_event_loop_turns_while_work_is_done(background: Background) -> None:
    turned = threading.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    assert await promptly(background.run(turned.wait, 10))


async def test_work_is_done_one_after_the_other_in_the_order_it_came(background: Background) -> None:
    done: list[int] = []
    threads = await asyncio.gather(
        *(background.run(lambda n=n: done.append(n) or threading.get_ident()) for n in range(20))
    )
    assert done == list(range(20))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_only_its_thread_gives_way_and_only_once(background: Background) -> None:
    before = niceness()
    assert await background.run(niceness) == before
    background.give_way()
    background.give_way()
    assert await background.run(niceness) == min(19, before + 5)
    assert niceness() == before, "workers inherit the main thread's value"


async def test_closing_does_not_wait_for_work_that_hangs() -> None:
    background = Background()
    begun, released = threading.Event(), threading.Event()

    def hang() -> bool:
        begun.set()
        return released.wait(60)

    hanging = asyncio.create_task(background.run(hang))
    assert await asyncio.to_thread(begun.wait, 10)
    waiting = asyncio.create_task(background.run(int))
    await asyncio.sleep(0)
    background.close()
    assert not hanging.done()
    with pytest.raises(asyncio.CancelledError):
        await promptly(waiting)
    released.set()
    assert await promptly(hanging)
