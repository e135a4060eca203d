"""The effect of attacks on the latency of another client, the victim."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from perf.targets.processes import forget_peak, peak_resident, resident
from perf.targets.target import TargetFailed, Worker

VICTIM: dict[str, Any] = {
    "kind": "open", "connections": 4, "rate": 4000.0, "warmup": 0.3, "spread": 100, "stamped": True,
}  # fmt: skip
"""The load of the victim. The attacker runs in the same event loop and makes thousands of connections a second, which
delays the victim's reading. The server does not cause that delay, so latency ends when the answer arrives in the
kernel."""
MB = 1 << 20

Result = dict[str, Any]


class VictimMeasurements:
    """Measurements of one victim, alternately alone and during an attack."""

    def __init__(self, served: Worker, measure: Callable[..., Result], failures: tuple[type[Exception], ...]) -> None:
        """
        Args:
            served: The worker that is attacked.
            measure: ``measure(attack=name)`` measures the victim's load, during the attack if a name is given.
            failures: The exceptions that ``measure`` raises for an invalid run.
        """
        self._served, self._measure, self._failures = served, measure, failures
        self._first = resident(served.target.pid)
        self._alone: list[Result] = []
        self._beside: dict[str, list[Result]] = {}
        self._errors: dict[str, str] = {}

    def take(self, names: Sequence[str]) -> None:
        """Make one measurement during each attack, and measure the victim alone before, between and after them."""
        before = self._measurement("")
        for name in names:
            attacked = self._measurement(name)
            after = self._measurement("")
            if before and attacked and after:
                attacked["calm_p99"] = [each["latency"]["p99"] for each in (before, after)]
                self._beside.setdefault(name, []).append(attacked)
            before = after

    def seen(self, name: str) -> bool:
        """Whether the victim has been measured during the attack."""
        return name in self._beside

    def ratio(self, name: str) -> float:
        """The median P99 during the attack ÷ the median P99 alone. The latter is from the measurements before and after
        each attack."""
        beside = self._beside[name]
        calm = [p99 for each in beside for p99 in each["calm_p99"]]
        attacked = [each["latency"]["p99"] for each in beside]
        return float(statistics.median(attacked) / statistics.median(calm))

    def calm(self) -> tuple[float, Any]:
        """The median of all measurements of the victim alone, in milliseconds."""
        if not self._alone:
            raise TargetFailed(self._errors.get("", "no measurement"))
        return statistics.median(each["latency"]["p99"] for each in self._alone), self._alone

    def row(self, name: str) -> tuple[float, Any]:
        """The value and the details of an attack's row."""
        if not self.seen(name):
            raise TargetFailed(self._errors.get(name) or self._errors.get("") or "no measurement")
        return self.ratio(name), self._beside[name]

    def grown(self, name: str) -> float | None:
        """The largest growth of the worker's memory during the attack, in MB above its first measurement."""
        peaks = [each["peak"] for each in self._beside.get(name, ())]
        return (max(peaks) - self._first) / MB if peaks else None

    def _measurement(self, name: str) -> Result:
        """One measurement; empty if it failed."""
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
