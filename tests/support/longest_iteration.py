"""Measures the longest iteration of a server's event loop."""

from __future__ import annotations

import time

from tests.support.native_server import ServerThread


class LongestIteration:
    """The most CPU time that one iteration of a server's loop takes while the context is open."""

    def __init__(self, running: ServerThread) -> None:
        self._loop = running.loop
        self._running = running
        self._on = True
        self.seconds = 0.0

    def __enter__(self) -> LongestIteration:
        self._running.call(self._begin)
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False

    def _begin(self) -> None:
        self._last = time.thread_time()
        self._loop.call_soon(self._tick)

    def _tick(self) -> None:
        now = time.thread_time()
        self.seconds = max(self.seconds, now - self._last)
        self._last = now
        if self._on:
            self._loop.call_soon(self._tick)
