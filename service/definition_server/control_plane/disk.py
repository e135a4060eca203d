"""Runs work on a disk in a thread of its own.

A disk may hang for ever, such as a network mount whose server is away, and a thread in such a call cannot be ended. So
each call runs in a new daemon thread: it does not keep the process from ending, and no other work waits for that
thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol, TypeVar

T = TypeVar("T")


class OnDisk(Protocol):
    """Runs blocking work beside the event loop, as `on_disk` does."""

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """The result of ``work``."""


def on_disk(work: Callable[[], T]) -> asyncio.Future[T]:
    """The result of ``work``, which runs in a thread of its own.

    Raises:
        RuntimeError: if no thread can be started.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]  # the result, where there is no error

    def run() -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - passed on
            failure = error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=run, name="disk", daemon=True).start()
    return future
