"""What several measurements say together: a median and between which limits it lies, without a belief about the noise.

The interval is the one between two order statistics: the median of any continuous distribution lies below the smallest
of ``n`` samples with probability ``2 ** -n``, and so on by the binomial distribution (Conover, Practical Nonparametric
Statistics, section 3.2). It asks nothing of the noise but that the samples are independent, which is what taking them
in turns is for. With fewer than six samples no interval reaches 95 %, and there is none: that is how "no verdict from
a single run" is kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from math import comb, inf
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A median, and between which limits that of the whole population lies."""

    median: float
    low: float
    high: float


def median_interval(samples: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The median of ``samples`` and the narrowest symmetrical interval that holds the true one with ``confidence``.

    Where there are too few samples (see `least_samples`) the interval is everything: minus to plus infinity.

    Raises:
        ValueError: without samples, or for a confidence not between 0 and 1.
    """
    if not samples:
        raise ValueError("no samples: no median")
    ordered = sorted(samples)
    middle = statistics.median(ordered)
    rank = _rank(len(ordered), confidence)
    if rank == 0:
        return Interval(middle, -inf, inf)
    return Interval(middle, ordered[rank - 1], ordered[-rank])


def least_samples(confidence: float = CONFIDENCE) -> int:
    """How many samples an interval needs: 6 for 95 %."""
    count = 1
    while _rank(count, confidence) == 0:
        count += 1
    return count


def coverage(count: int, rank: int) -> float:
    """Probability that the true median lies between the ``rank``-th smallest and largest of ``count`` samples."""
    return 1 - 2 * sum(comb(count, k) for k in range(rank)) / float(2**count)


def _rank(count: int, confidence: float) -> int:
    """The highest rank whose coverage is at least ``confidence``; 0 where there is none."""
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence of {confidence!r}: it lies between 0 and 1")
    rank = 0
    while 2 * (rank + 1) <= count and coverage(count, rank + 1) >= confidence:
        rank += 1
    return rank
