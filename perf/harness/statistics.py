"""The median of several measurements and its confidence interval, without assumptions about the noise's distribution.

The interval lies between two order statistics: the median of any continuous distribution lies below the smallest of
``n`` samples with probability ``2 ** -n``, and so on by the binomial distribution (Conover, Practical Nonparametric
Statistics, section 3.2). It requires only that the samples are independent, which is why they are taken in interleaved
rounds. With fewer than six samples no interval reaches 95 %, so a single run never gives a verdict.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import comb, inf
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """The median of the samples, and the limits between which the population's median lies."""

    median: float
    low: float
    high: float


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of ``samples``, and the narrowest symmetrical interval that contains the true median with
    ``confidence``.

    With too few samples (see `least_samples`) the interval is infinite on both sides.

    Raises:
        ValueError: without samples, or for a confidence that is not between 0 and 1.
    """
    if not samples:
        raise ValueError("a median needs samples")
    ordered = sorted(samples)
    middle = statistics.median(ordered)
    rank = _rank(len(ordered), confidence)
    if rank == 0:
        return Interval(middle, -inf, inf)
    return Interval(middle, ordered[rank - 1], ordered[-rank])


def least_samples(confidence: float = CONFIDENCE) -> int:
    """The number of samples that an interval needs: 6 for 95 %."""
    count = 1
    while _rank(count, confidence) == 0:
        count += 1
    return count


def coverage(count: int, rank: int) -> float:
    """Probability that the true median lies between the ``rank``-th smallest and largest of ``count`` samples."""
    return 1 - 2 * sum(comb(count, k) for k in range(rank)) / float(2**count)


def _rank(count: int, confidence: float) -> int:
    """The highest rank whose coverage is at least ``confidence``; 0 if there is no such rank."""
    if not 0 < confidence < 1:
        raise ValueError(f"the confidence must lie between 0 and 1, not {confidence!r}")
    rank = 0
    while 2 * (rank + 1) <= count and coverage(count, rank + 1) >= confidence:
        rank += 1
    return rank
