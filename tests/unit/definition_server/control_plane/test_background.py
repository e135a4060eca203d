"""Heavy work runs in order in one thread next to the event loop; after the start, its priority is lower than that of
the workers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
from tests.support.loop import promptly

from definition_server.control_plane.background import Background

pytestmark = pytest.mark.usefixtures("nothing_is_left")


@pytest.fixture
def background() -> Iterator[Background]:
    background = Background()
    yield background
    background.close()


async def test_work_receives_its_arguments_and_returns_its_result(background: Background) -> None:
    assert await background.run(int, "ff", base=16) == 255


async def test_an_exception_of_work_is_raised_to_the_caller(background: Background) -> None:
    with pytest.raises(ZeroDivisionError):
        await background.run(divmod, 1, 0)


async def test_the_event_loop_runs_while_work_is_done(background: Background) -> None:
    turned = threading.Event()
    asyncio.get_running_loop().call_soon(turned.set)
    assert await promptly(background.run(turned.wait, 10))


async def test_work_runs_one_after_the_other_in_the_order_given(background: Background) -> None:
    done: list[int] = []
    threads = await asyncio.gather(
        *(background.run(lambda n=n: done.append(n) or threading.get_ident()) for n in range(20))
    )
    assert done == list(range(20))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


async def test_the_priority_is_lowered_once(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    lowered: list[tuple[int, ...]] = []
    monkeypatch.setattr(os, "setpriority", lambda *given: lowered.append(given))
    for _ in range(3):
        background.lower_priority()
    await background.run(int)
    assert lowered == [(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0) + 5)]


GIVING_WAY = """
import asyncio, os
from definition_server.control_plane.background import Background

def niceness():
    return os.getpriority(os.PRIO_PROCESS, 0)

async def main():
    background = Background()
    before = niceness(), await background.run(niceness)
    background.lower_priority()
    background.lower_priority()
    print(*before, niceness(), await background.run(niceness))

asyncio.run(main())
"""


def test_only_the_background_thread_has_a_lower_priority() -> None:
    # In a process of its own, because a process may not raise its priority again.
    program = subprocess.run([sys.executable, "-c", GIVING_WAY], capture_output=True, text=True, timeout=60, check=True)
    main_before, thread_before, main, thread = map(int, program.stdout.split())
    assert main == main_before, "workers inherit the main thread's value"
    assert thread_before == main_before
    assert thread == min(19, main_before + 5)


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
