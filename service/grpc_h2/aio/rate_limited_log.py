"""Log lines about what clients do wrong, so many a second: nobody may make a server write without end."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

BURST = 20
PER_SECOND = 2.0


class RateLimitedLog:
    """Writes to a log, at most `BURST` lines at once and `PER_SECOND` in the long run.

    What is left out is counted, and the next line tells it as ``left_out``. Time is an argument, in seconds.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._tokens = float(BURST)
        self._then = 0.0
        self._left_out = 0

    def tell(self, now: float, level: int, message: str, peer: Callable[[], str], **fields: Any) -> None:
        """Log ``message`` about ``peer()``, which is asked only then, or count it."""
        self._tokens = min(BURST, self._tokens + max(0.0, now - self._then) * PER_SECOND)
        self._then = now
        if self._tokens < 1:
            self._left_out += 1
            return
        self._tokens -= 1
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        self._log.log(level, message, extra={"peer": peer(), **fields})
