"""A log of clients' faults with a limited rate, so that no client can make the server write without end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

BURST = 20
PER_SECOND = 2.0
REPORT_SECONDS = 10.0
"""The number of lines that were left out is logged so many seconds after the first of them, unless another line has
reported it before."""


class RateLimitedLog:
    """Writes to a logger, at most `BURST` lines at once and `PER_SECOND` in the long run.

    Further lines are counted, and the next line that is written has their number as ``left_out``. The caller passes the
    time, in seconds.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._tokens = float(BURST)
        self._then = 0.0
        self._left_out = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def report_later(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on, report the number of lines that were left out even if no other line follows."""
        self._loop = loop

    def close(self) -> None:
        """Log the number of lines that were left out and not reported yet."""
        if self._timer is not None:
            self._timer.cancel()
            self._report()

    def log(self, now: float, level: int, message: str, peer: Callable[[], str], **fields: Any) -> None:
        """Log ``message`` about ``peer()``, or count it. ``peer`` is called only for a line that is written."""
        self._tokens = min(BURST, self._tokens + max(0.0, now - self._then) * PER_SECOND)
        self._then = now
        if self._tokens < 1:
            self._left_out += 1
            if self._loop is not None and self._timer is None:
                self._timer = self._loop.call_later(REPORT_SECONDS, self._report)
            return
        self._tokens -= 1
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        self._logger.log(level, message, extra={"peer": peer(), **fields})

    def _report(self) -> None:
        self._timer = None
        if self._left_out:
            left_out, self._left_out = self._left_out, 0
            self._logger.log(logging.WARNING, "Lines about clients were left out", extra={"left_out": left_out})
