"""The families of Prometheus in OTLP's form, and the header fields of an export."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.metrics.export import Gauge, Histogram, Sum
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily

from definition_server.observability.otlp import metrics_of, parse_headers


def test_a_counter_is_a_monotonic_sum_under_its_name_on_the_page() -> None:
    family = CounterMetricFamily("avap_requests", "Calls.", labels=("status",))
    family.add_metric(("200",), 5, created=1.0)
    (metric,) = metrics_of(family, 1, 2)
    assert metric.name == "avap_requests_total"
    assert isinstance(metric.data, Sum)
    assert metric.data.is_monotonic
    (point,) = metric.data.data_points
    assert (point.attributes, point.value, point.start_time_unix_nano, point.time_unix_nano) == (
        {"status": "200"},
        5.0,
        1,
        2,
    )


def test_a_gauge_and_an_info_are_gauges() -> None:
    (gauge,) = metrics_of(GaugeMetricFamily("avap_ready", "Ready.", value=1), 1, 2)
    (info,) = metrics_of(InfoMetricFamily("avap_build", "Version.", value={"version": "1"}), 1, 2)
    assert isinstance(gauge.data, Gauge)
    assert isinstance(info.data, Gauge)
    assert (info.name, info.data.data_points[0].attributes) == ("avap_build_info", {"version": "1"})


def test_buckets_are_not_cumulated_and_labels_are_series() -> None:
    family = HistogramMetricFamily("avap_request_duration_seconds", "Time.", labels=("method",))
    family.add_metric(("a",), buckets=[("0.1", 2), ("1.0", 5), ("+Inf", 6)], sum_value=3.5)
    family.add_metric(("b",), buckets=[("0.1", 0), ("1.0", 0), ("+Inf", 0)], sum_value=0)
    (metric,) = metrics_of(family, 1, 2)
    assert isinstance(metric.data, Histogram)
    first, second = metric.data.data_points
    assert (first.attributes, first.count, first.sum) == ({"method": "a"}, 6, 3.5)
    assert (list(first.bucket_counts), list(first.explicit_bounds)) == ([2, 3, 1], [0.1, 1.0])
    assert (second.count, list(second.bucket_counts)) == (0, [0, 0, 0])


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("authorization=Bearer%20abc,x-a=1", {"authorization": "Bearer abc", "x-a": "1"}),
        ("Authorization=Basic dTpw==", {"authorization": "Basic dTpw=="}),
        (" a = b , , c", {"a": "b"}),
    ],
    ids=["encoded", "plain", "blanks"],
)
def test_header_fields_are_parsed_from_the_variable(text: str, fields: dict[str, str]) -> None:
    assert parse_headers(text) == fields
