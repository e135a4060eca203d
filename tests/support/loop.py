"""Waiting in a coroutine without fixed sleeps, and the other tasks of its loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from tests.support.polling import DEADLINE_SECONDS, Wait

T = TypeVar("T")


async def eventually(what: Callable[[], T], told: str | Callable[[], str], *, seconds: float = DEADLINE_SECONDS) -> T:
    """`polling.until` for a coroutine: the loop runs between two calls of ``what``."""
    wait = Wait(told, seconds)
    while True:
        answer = what()
        if answer:
            return answer
        await asyncio.sleep(wait.pause())


async def turns() -> None:
    """Wait for far more turns of the loop than it needs for what has arrived and for what is due."""
    for _ in range(20):
        await asyncio.sleep(0)


async def promptly(work: Awaitable[T], *, seconds: float = DEADLINE_SECONDS) -> T:
    """The result of ``work``, which must arrive within ``seconds``."""
    return await asyncio.wait_for(work, seconds)


def other_tasks() -> set[asyncio.Task[Any]]:
    """Unfinished tasks of the running loop, except the calling one."""
    return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}


async def end(task: asyncio.Task[Any]) -> None:
    """Cancel ``task`` and wait for its end."""
    task.cancel()
    await asyncio.wait((task,))
