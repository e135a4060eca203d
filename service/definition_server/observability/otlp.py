"""Export of spans and metrics by OTLP over HTTP, with OpenTelemetry's SDK. Imported only if the export is on.

`tracing` supplies spans with their own ids; a provider of the SDK converts them to its spans, so that its sampler,
limits, batches and bounded queue apply (``OTEL_TRACES_SAMPLER``, ``OTEL_BSP_*``). Metrics are those of ``/metrics``,
under the same names: the families that Prometheus would get, in OTLP's form.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from prometheus_client.core import Metric as Family
from prometheus_client.samples import Sample

from definition_server.observability.tracing import Span

SCOPE = "definition_server"
_BUCKET, _COUNT, _SUM, _TOTAL, _CREATED = "_bucket", "_count", "_sum", "_total", "_created"


@dataclass(frozen=True, slots=True)
class Target:
    """The target of the export. An endpoint is a complete URL; None: that signal is not exported."""

    traces: str | None
    metrics: str | None
    headers: Mapping[str, str]


Report = Callable[[str, str | None], None]
"""Signal (``traces`` or ``metrics``), and the reason why the last export failed; None if the collector accepted it."""
_NOT_SENT = "it could not be sent"


def parse_headers(text: str) -> dict[str, str]:
    """The ``name=value`` pairs of ``OTEL_EXPORTER_OTLP_HEADERS``, separated by commas, percent-encoded or not."""
    pairs = (each.partition("=") for each in text.split(","))
    return {name.strip().lower(): unquote(value.strip()) for name, separator, value in pairs if separator}


class _GivenIds(IdGenerator):
    """An id generator of the SDK that returns the ids that the present span already has."""

    def __init__(self) -> None:
        self.trace_id = self.span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _Session(requests.Session):
    """A session that records why its last request failed, in a text from this module."""

    problem: str | None = None

    def send(self, request: requests.PreparedRequest, **options: Any) -> requests.Response:
        try:
            response = super().send(request, **options)
        except requests.exceptions.SSLError:
            self.problem = "TLS failed"
            raise
        except requests.exceptions.ReadTimeout:
            self.problem = "no answer in time"
            raise
        except requests.exceptions.RequestException:
            self.problem = "no connection"
            raise
        self.problem = None if response.ok else f"status {response.status_code}"
        return response


class _Reported(SpanExporter):
    """An exporter that reports the result of each export."""

    def __init__(self, exporter: SpanExporter, session: _Session, report: Report) -> None:
        self._exporter = exporter
        self._session = session
        self._report = report

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = self._exporter.export(spans)
        self._report("traces", None if result is SpanExportResult.SUCCESS else self._session.problem or _NOT_SENT)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)


class Exporter:
    """Exports to one collector. To be used in one thread; the SDK has another thread, which sends spans."""

    def __init__(self, target: Target, attributes: Mapping[str, str], report: Report) -> None:
        """
        Args:
            target: The collector.
            attributes: The attributes of the resource; those of the environment (``OTEL_SERVICE_NAME``,
                ``OTEL_RESOURCE_ATTRIBUTES``) take precedence.
            report: Called with the result of each export.
        """
        # The SDK's log lines are suppressed, because they quote the collector's answers and addresses, and are repeated
        # at each attempt. `report` replaces them.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        defaults = dict(attributes)
        self._resource = Resource(defaults).merge(Resource.create())
        if str(self._resource.attributes.get("service.name")).startswith("unknown_service"):
            self._resource = self._resource.merge(Resource({"service.name": defaults["service.name"]}))
        self._report = report
        self._ids = _GivenIds()
        self._provider = None if target.traces is None else self._make_provider(target.traces, target.headers)
        self._session = _Session()
        self._metrics = (
            None
            if target.metrics is None
            else OTLPMetricExporter(target.metrics, headers=dict(target.headers), session=self._session)
        )

    def _make_provider(self, endpoint: str, headers: Mapping[str, str]) -> TracerProvider:
        provider = TracerProvider(resource=self._resource, id_generator=self._ids, shutdown_on_exit=False)
        session = _Session()
        exporter = _Reported(OTLPSpanExporter(endpoint, headers=dict(headers), session=session), session, self._report)
        provider.add_span_processor(BatchSpanProcessor(exporter))
        return provider

    def put(self, spans: Iterable[Span]) -> None:
        """Have ``spans`` exported with the next batch."""
        if self._provider is None:
            return
        tracer = self._provider.get_tracer(SCOPE)
        for span in spans:
            self._ids.trace_id, self._ids.span_id = span.trace_id, span.span_id
            context = None
            if span.parent_id is not None:
                parent = SpanContext(span.trace_id, span.parent_id, False, TraceFlags(TraceFlags.SAMPLED))
                context = set_span_in_context(NonRecordingSpan(parent))
            kind = SpanKind.SERVER if span.of_a_call else SpanKind.INTERNAL
            copy = tracer.start_span(span.name, context, kind, span.attributes, start_time=span.start_ns)
            for event in span.events:
                copy.add_event(event.name, event.attributes, event.at_ns)
            if span.failure is not None:
                copy.set_status(Status(StatusCode.ERROR, span.failure))
            copy.end(span.end_ns)

    def export_metrics(self, families: Iterable[Family], started_ns: int) -> None:
        """Export ``families`` now. Counters started at ``started_ns``. Blocks until the collector has answered."""
        if self._metrics is None:
            return
        converted = [metric for family in families for metric in metrics_of(family, started_ns, time.time_ns())]
        scope = ScopeMetrics(InstrumentationScope(SCOPE), converted, "")
        data = MetricsData([ResourceMetrics(self._resource, [scope], "")])
        result = self._metrics.export(data)
        self._report("metrics", None if result is MetricExportResult.SUCCESS else self._session.problem or _NOT_SENT)

    def close(self) -> None:
        """Export the queued spans, and end. Blocks until the collector has answered."""
        if self._provider is not None:
            self._provider.shutdown()
        if self._metrics is not None:
            self._metrics.shutdown()


def metrics_of(family: Family, started_ns: int, now_ns: int) -> Iterator[Metric]:
    """The metrics of a Prometheus family, under the names of its samples."""
    if family.type == "histogram":
        yield Metric(family.name, family.documentation, family.unit, _histogram(family, started_ns, now_ns))
        return
    by_name: dict[str, list[NumberDataPoint]] = {}
    for sample in family.samples:
        if not sample.name.endswith(_CREATED):
            by_name.setdefault(sample.name, []).append(_number(sample, started_ns, now_ns))
    for name, points in by_name.items():
        counts = family.type == "counter" and name.endswith(_TOTAL)
        data = Sum(points, AggregationTemporality.CUMULATIVE, is_monotonic=True) if counts else Gauge(points)
        yield Metric(name, family.documentation, family.unit, data)


def _number(sample: Sample, started_ns: int, now_ns: int) -> NumberDataPoint:
    return NumberDataPoint(dict(sample.labels), started_ns, now_ns, float(sample.value))


def _histogram(family: Family, started_ns: int, now_ns: int) -> Histogram:
    series: dict[tuple[tuple[str, str], ...], dict[str, list[Sample]]] = {}
    for sample in family.samples:
        labels = tuple(sorted((name, value) for name, value in sample.labels.items() if name != "le"))
        series.setdefault(labels, {}).setdefault(sample.name.removeprefix(family.name), []).append(sample)
    points = []
    for labels, parts in series.items():
        buckets = parts.get(_BUCKET, [])
        cumulated = [int(sample.value) for sample in buckets]
        counts = [count - before for before, count in zip([0, *cumulated], cumulated, strict=False)]
        bounds = [float(sample.labels["le"]) for sample in buckets[:-1]]
        total = sum(sample.value for sample in parts.get(_SUM, []))
        unknown: Any = None  # least and greatest: optional in OTLP
        total_count = cumulated[-1] if cumulated else 0
        points.append(
            HistogramDataPoint(dict(labels), started_ns, now_ns, total_count, total, counts, bounds, unknown, unknown)
        )
    return Histogram(points, AggregationTemporality.CUMULATIVE)
