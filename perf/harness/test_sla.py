"""The gates of ``sla.toml``, each as one test: ``PERF_SET=quick pytest perf -m perf``."""

from __future__ import annotations

import pytest

from perf.harness import sla
from perf.harness.run import Session

# All gates share one measurement; the first test waits for it.
pytestmark = [pytest.mark.perf, pytest.mark.timeout(3600)]


def test_gate(gate: sla.Gate, measured: Session) -> None:
    """The gate is kept. A missed gate and an invalid one fail with different texts."""
    left_out = [each["why"] for each in measured.skipped if each["what"] == f"gate: {gate.name}"]
    if left_out:
        pytest.skip(left_out[0])
    (verdict,) = [each for each in measured.verdicts if each.gate == gate]
    assert verdict.verdict == sla.KEPT, f"{verdict.verdict.upper()}: {verdict.reason}; samples {verdict.samples}"
