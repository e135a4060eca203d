"""What a client that does no harm feels of others' attacks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from perf.targets.processes import forget_peak, peak_resident, resident
from perf.targets.target import TargetFailed, Worker

VICTIM: dict[str, Any] = {
    "kind": "open", "connections": 4, "rate": 4000.0, "warmup": 0.3, "spread": 100, "stamped": True,
}  # fmt: skip
"""The load that it makes. The attacker works in its loop, thousands of connections a second: what that delays is not
the server's doing, so latency ends where the answer arrives in the kernel."""
MB = 1 << 20

Result = dict[str, Any]


class Looks:
    """Measurements of one victim, alone and beside attacks in turn."""

    def __init__(self, served: Worker, measure: Callable[..., Result], failures: tuple[type[Exception], ...]) -> None:
        """
        Args:
            served: The worker that is attacked.
            measure: ``measure(attack=name)`` loads it as a victim does, beside the attack if a name is given.
            failures: What it may raise.
        """
        self._served, self._measure, self._failures = served, measure, failures
        self._first = resident(served.target.pid)
        self._alone: list[Result] = []
        self._beside: dict[str, list[Result]] = {}
        self._errors: dict[str, str] = {}

    def take(self, names: Sequence[str]) -> None:
        """One look beside each attack, and one alone before, between and after."""
        before = self._look("")
        for name in names:
            attacked = self._look(name)
            after = self._look("")
            if before and attacked and after:
                attacked["calm_p99"] = [each["latency"]["p99"] for each in (before, after)]
                self._beside.setdefault(name, []).append(attacked)
            before = after

    def seen(self, name: str) -> bool:
        """Whether there is a measurement beside that attack."""
        return name in self._beside

    def ratio(self, name: str) -> float:
        """The median P99 beside the attack ÷ the median P99 alone, of the looks before and after each."""
        looks = self._beside[name]
        calm = [p99 for each in looks for p99 in each["calm_p99"]]
        return statistics.median(each["latency"]["p99"] for each in looks) / statistics.median(calm)

    def calm(self) -> tuple[float, Any]:
        """Milliseconds: the median of all looks at the victim alone."""
        if not self._alone:
            raise TargetFailed(self._errors.get("", "no measurement"))
        return statistics.median(each["latency"]["p99"] for each in self._alone), self._alone

    def row(self, name: str) -> tuple[float, Any]:
        """What a row says of an attack."""
        if not self.seen(name):
            raise TargetFailed(self._errors.get(name) or self._errors.get("") or "no measurement")
        return self.ratio(name), self._beside[name]

    def grown(self, name: str) -> float | None:
        """The most that the worker had over what it had at first, in MB, during the attack."""
        peaks = [each["peak"] for each in self._beside.get(name, ())]
        return (max(peaks) - self._first) / MB if peaks else None

    def _look(self, name: str) -> Result:
        """One measurement; empty where it failed."""
        try:
            if not self._served.alive:
                raise TargetFailed("the worker is dead")
            forget_peak(self._served.target.pid)
            result = self._measure(attack=name)
        except self._failures as error:
            self._errors[name] = str(error)[:300]
            return {}
        result["peak"] = peak_resident(self._served.target.pid)
        if not name:
            self._alone.append(result)
        return result
