"""The median of several measurements and its confidence interval."""

from __future__ import annotations

import random
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st
from perf.harness.statistics import coverage, least_samples, median_interval

FIGURES = st.floats(min_value=-1e9, max_value=1e9)


def test_95_percent_needs_at_least_six_samples() -> None:
    assert least_samples(0.95) == 6
    assert least_samples(0.5) == 2
    assert median_interval([1, 2, 3, 4, 5]) == (3, -inf, inf)
    assert median_interval([1, 2, 3, 4, 5, 6]) == (3.5, 1, 6)


def test_one_sample_has_an_infinite_interval() -> None:
    assert median_interval([7]) == (7, -inf, inf)


def test_coverage_agrees_with_published_tables() -> None:
    # From Conover's table of confidence intervals of a median: for n = 10, from the second smallest to the second
    # largest: 97.85 %.
    assert coverage(10, 2) == pytest.approx(0.9785, abs=1e-4)
    assert coverage(6, 1) == pytest.approx(0.96875)


@given(st.lists(FIGURES, min_size=1, max_size=60))
def test_the_median_lies_within_its_interval_and_order_does_not_matter(samples: list[float]) -> None:
    middle, low, high = median_interval(samples)
    assert low <= middle <= high
    shuffled = random.Random(1).sample(samples, len(samples))
    assert median_interval(shuffled) == (middle, low, high)


def test_the_interval_contains_the_true_median_as_often_as_stated() -> None:
    chance = random.Random(4)
    hits = 0
    for _ in range(2000):
        samples = [chance.lognormvariate(0, 1) for _ in range(9)]  # skewed, as times are; its median is 1
        _, low, high = median_interval(samples)
        hits += low <= 1 <= high
    assert hits / 2000 >= 0.94


def test_no_samples_and_an_impossible_confidence_are_refused() -> None:
    with pytest.raises(ValueError, match="needs samples"):
        median_interval([])
    with pytest.raises(ValueError, match="confidence"):
        median_interval([1.0], 1.0)
