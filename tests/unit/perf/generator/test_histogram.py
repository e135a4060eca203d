"""Histograms of latencies: counted, added up, shown in ms."""

from __future__ import annotations

import pytest
from perf.generator import histogram
from tests.support.hdr import HdrHistogram


def test_percentiles_are_those_of_the_values() -> None:
    told = histogram.latency(histogram.counted(number / 1e6 for number in range(1, 100_001)))
    wanted = {"p50": 50.0, "p90": 90.0, "p95": 95.0, "p99": 99.0, "p999": 99.9, "max": 100.0}
    assert told == pytest.approx(wanted, rel=0.002)


def test_a_histogram_without_values_has_no_percentiles() -> None:
    assert histogram.latency(histogram.counted([])) == {}


def test_values_out_of_range_are_counted_at_the_ends_of_the_range() -> None:
    made = histogram.counted([-1.0, 1e9])
    assert made.get_total_count() == 2
    assert made.get_max_value() == pytest.approx(3600e9, rel=0.001)


def test_histograms_of_several_processes_are_added_up() -> None:
    parts = [histogram.encode(histogram.counted([value] * count)) for value, count in ((0.001, 30), (0.002, 10))]
    whole = histogram.merged([*parts, *parts])
    assert whole.get_total_count() == 80
    assert histogram.share_above(histogram.encode(whole), "ns", 1.5) == 0.25


def test_an_encoded_histogram_has_hdrhistogram_s_own_format() -> None:
    text = histogram.encode(histogram.counted([0.004]))
    assert isinstance(text, str)
    assert text.startswith("HISTFAA")
    assert HdrHistogram.decode(text).get_max_value() == pytest.approx(4e6, rel=0.001)


@pytest.mark.parametrize(("unit", "value"), [("ns", 3_000_000), ("µs", 3000), ("ms", 3)])
def test_the_share_above_a_limit_respects_the_unit(unit: str, value: int) -> None:
    made = HdrHistogram(1, 3600 * 10**9, 3)
    made.record_value(value, 3)
    made.record_value(value // 3, 1)
    text = histogram.encode(made)
    assert histogram.share_above(text, unit, 2.0) == 0.75
    assert histogram.share_above(text, unit, 4.0) == 0.0


def test_the_share_of_an_empty_histogram_is_0_and_an_unknown_unit_is_refused() -> None:
    empty = histogram.encode(histogram.empty())
    assert histogram.share_above(empty, "ns", 1.0) == 0.0
    with pytest.raises(ValueError, match="fortnights"):
        histogram.share_above(empty, "fortnights", 1.0)
