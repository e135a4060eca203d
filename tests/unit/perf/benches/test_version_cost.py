"""The comparison of workers with and without the version in their answers, without any worker."""

from __future__ import annotations

import pytest
from perf.benches.version_cost import AGAIN, WITH, WITHOUT, lines, ratio


def test_the_ratio_is_the_median_of_pairs_within_its_interval() -> None:
    first = [float(100 + step) for step in range(-14, 15)]
    median, low, high = ratio(first, [100.0] * len(first))
    assert median == 1.0
    # Ranks 10 and 20 of 29, as the binomial distribution gives them for 95 %.
    assert (low, high) == (0.95, 1.05)


def test_pairs_cancel_a_load_that_slows_both_workers() -> None:
    assert ratio([10.0, 20.0, 40.0], [5.0, 10.0, 20.0]) == (2.0, 2.0, 2.0)


def test_groups_that_lost_a_worker_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])


def test_the_lines_show_each_load_and_the_noise_of_equal_workers() -> None:
    shown = lines({"one at a time": {WITH: [10.0, 10.0], WITHOUT: [9.8, 9.8], AGAIN: [9.8, 9.8]}})
    assert shown == [
        "one at a time: with 10.00 µs, without 9.80 µs, without, again 9.80 µs",
        "  without / with: 0.980 (0.980-0.980)",
        "  two equal workers: 1.000 (1.000-1.000)",
    ]
