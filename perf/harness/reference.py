"""Measures the speed of interpreter and kernel during a run: `reference_work.py` runs on the server's CPU at the same
time as the server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from perf.targets.processes import on_cpu
from perf.targets.target import SERVER_CPU, TargetFailed

_PROGRAM = Path(__file__).with_name("reference_work.py")
_END_SECONDS = 10.0

Burst = Sequence[float]
"""Time of the burst, ``python_us``, ``kernel_us``."""


class Meter:
    """The reference work, from the start of the block to `stop`."""

    def __enter__(self) -> Meter:
        # -I -S prevent that the environment or site-packages affect the measurement.
        self._process = subprocess.Popen(
            on_cpu(SERVER_CPU, [sys.executable, "-I", "-S", str(_PROGRAM)]),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        return self

    def stop(self) -> list[Burst]:
        """End the work. Returns its bursts.

        Raises:
            TargetFailed: if the work has failed.
        """
        try:
            output, errors = self._process.communicate("", timeout=_END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TargetFailed("the reference work does not end") from error
        if self._process.returncode:
            raise TargetFailed(f"the reference work fails: {errors[-300:].strip()}")
        found: list[Burst] = json.loads(output)
        return found

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


def during(bursts: Sequence[Burst], begin: float, end: float) -> dict[str, float]:
    """The speed between two instants: the means of ``python_us`` and ``kernel_us``, and the number of ``bursts``."""
    there = [burst for burst in bursts if begin <= burst[0] <= end]
    count = len(there)
    python, kernel = (sum(burst[at] for burst in there) / count if count else 0.0 for at in (1, 2))
    return {"python_us": python, "kernel_us": kernel, "bursts": count}


def beside(run: Callable[[Callable[[], None]], dict[str, Any]], meter: Callable[[], Meter] = Meter) -> dict[str, Any]:
    """Call ``run`` while the reference work runs. Returns its result with the machine's speed under the key
    ``reference``.

    Args:
        run: Gets a function to call when its measurement begins. If it does not call this function, the speed is that
            at its end.
    """
    began: list[float] = []
    with meter() as work:
        made = run(lambda: began.append(monotonic()))
        end = monotonic()
        try:
            bursts = work.stop()
        except TargetFailed as error:
            return made | {"valid": False, "reason": str(error), "fault": "harness"}
    seconds = made.get("seconds") or 0.0
    begin = began[0] if began else end - seconds
    return made | {"reference": during(bursts, begin, min(end, begin + seconds))}
