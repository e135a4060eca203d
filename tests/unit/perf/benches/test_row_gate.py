"""The verdict on the effect that a first check has on other clients."""

from __future__ import annotations

import pytest
from perf.benches.row_gate import judged


def test_the_figure_is_the_median_of_the_ratios_within_each_round() -> None:
    # The machine becomes three times slower in the second round, but not because of the check.
    row = judged("p99", [1.0, 3.0, 1.0], [1.2, 3.6, 9.0], [1.0, 3.0, 1.0], promised=True)
    assert row.value == pytest.approx(1.2)
    assert row.kept


def test_a_check_that_delays_the_victim_too_much_misses_the_promise() -> None:
    row = judged("p99", [1.0, 1.1, 1.0], [1.7, 1.6, 1.8], [1.1, 1.0, 1.0], promised=True)
    assert row.kept is False
    assert row.verdict == "**missed**"


def test_there_is_no_verdict_if_the_figures_alone_vary_as_much_as_the_limit() -> None:
    row = judged("p99", [1.0, 1.0, 2.0], [1.2, 1.2, 1.2], [2.0, 2.0, 1.0], promised=True)
    assert row.value is None
    assert row.kept is False
    assert "× 2.00" in row.verdict


def test_a_figure_without_a_promise_has_no_verdict() -> None:
    assert judged("p50", [1.0], [9.0], [1.0], promised=False).kept is None
