"""A limit for log lines that untrusted clients cause, so that clients cannot make the server write without end."""

from __future__ import annotations

BURST = 20
PER_SECOND = 2.0


class LineLimit:
    """Admits `BURST` lines at once, and `PER_SECOND` in the long run. The caller passes the time, in seconds."""

    def __init__(self) -> None:
        self._tokens = float(BURST)
        self._then = 0.0
        self._left_out = 0

    def admit(self, now: float) -> dict[str, int] | None:
        """None if a line may not be written; otherwise its additional fields: ``left_out``, if lines before it were not
        written.
        """
        self._tokens = min(BURST, self._tokens + max(0.0, now - self._then) * PER_SECOND)
        self._then = now
        if self._tokens < 1:
            self._left_out += 1
            return None
        self._tokens -= 1
        left_out, self._left_out = self._left_out, 0
        return {"left_out": left_out} if left_out else {}
