"""Latencies as HdrHistograms: values in ns, three significant digits, from 100 ns to an hour.

A generator stores every latency as a float and counts the latencies afterwards, because recording one in a histogram
takes a microsecond.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from tests.support.hdr import HdrHistogram

UNIT = "ns"
PERCENTILES = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9}
_PER_MS = {"ns": 1e6, "µs": 1e3, "us": 1e3, "ms": 1.0}
_STEP = 100
"""Latencies are rounded to multiples of this value (in ns) before they are counted. It is a thousandth of the shortest
call."""
_LONGEST = 3600 * 10**9


def empty() -> HdrHistogram:
    """A histogram without values."""
    return HdrHistogram(1, _LONGEST, 3)


def counted(seconds: Iterable[float]) -> HdrHistogram:
    """A histogram of latencies in seconds. A value below 0 counts as 0, and a value above an hour as an hour."""
    made = empty()
    steps_per_second = 1e9 / _STEP
    for steps, count in Counter([int(value * steps_per_second) for value in seconds]).items():
        made.record_value(min(max(steps * _STEP, 0), _LONGEST), count)
    return made


def merged(encoded: Iterable[str]) -> HdrHistogram:
    """The sum of histograms in the format of `encode`."""
    made = empty()
    for each in encoded:
        made.add(_decoded(each))
    return made


def encode(histogram: HdrHistogram) -> str:
    """HdrHistogram's V2 format, compressed, as base64."""
    encoded = histogram.encode()
    return encoded.decode() if isinstance(encoded, bytes) else str(encoded)


def latency(histogram: HdrHistogram) -> dict[str, float]:
    """Percentiles and the maximum in ms; empty if the histogram has no value."""
    if not histogram.get_total_count():
        return {}
    values = histogram.get_percentile_to_value_dict(list(PERCENTILES.values()))
    found = {name: round(values[percentile] / 1e6, 4) for name, percentile in PERCENTILES.items()}
    return found | {"max": round(histogram.get_max_value() / 1e6, 4)}


def share_above(encoded: str, unit: str, milliseconds: float) -> float:
    """The share of values above ``milliseconds``, to the histogram's three digits; 0 if the histogram is empty.

    Raises:
        ValueError: for a ``unit`` other than ns, µs and ms.
    """
    if unit not in _PER_MS:
        raise ValueError(f"histogram_unit {unit!r} is not one of {', '.join(_PER_MS)}")
    limit = milliseconds * _PER_MS[unit]
    above = total = 0
    for item in _decoded(encoded).get_recorded_iterator():
        total += item.count_added_in_this_iter_step
        if item.value_iterated_to > limit:
            above += item.count_added_in_this_iter_step
    return above / total if total else 0.0


@lru_cache(maxsize=8)
def _decoded(encoded: str) -> HdrHistogram:
    return HdrHistogram.decode(encoded)
