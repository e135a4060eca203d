"""An OpenTelemetry collector for tests: it receives OTLP over HTTP and keeps the exports, or misbehaves."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True)
class ReceivedSpan:
    """A span as it arrived."""

    name: str
    trace_id: bytes
    span_id: bytes
    parent_id: bytes
    kind: int
    seconds: float
    failed: bool
    attributes: dict[str, Any]
    events: dict[str, dict[str, Any]]


class Collector:
    """An OTLP/HTTP receiver on a port of 127.0.0.1. A context.

    ``status``: the answer to every export. ``answers``: while it is not set, no export is answered.
    """

    def __init__(self) -> None:
        self.status = 200
        self.answers = threading.Event()
        self.answers.set()
        self.spans: list[ReceivedSpan] = []
        self.metrics: dict[str, list[tuple[dict[str, Any], float]]] = {}
        """Name → labels and value (of a histogram: its count) of each point of the newest export."""
        self.kinds: dict[str, str] = {}
        self.resource: dict[str, Any] = {}
        self.headers: list[dict[str, str]] = []
        self.requests = 0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests += 1
                collector.answers.wait()
                if collector.status == 200:
                    collector.headers.append({name.lower(): value for name, value in self.headers.items()})
                    collector.take(self.path, body)
                self.send_response(collector.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.answers.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def take(self, path: str, body: bytes) -> None:
        """Keep the content of an export."""
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                self.resource = _values(resource.resource.attributes)
                self.spans += [_span(each) for scope in resource.scope_spans for each in scope.spans]
        elif path == "/v1/metrics":
            for each in ExportMetricsServiceRequest.FromString(body).resource_metrics:
                self.resource = _values(each.resource.attributes)
                for metrics in each.scope_metrics:
                    for metric in metrics.metrics:
                        self._keep(metric)

    def _keep(self, metric: Any) -> None:
        kind = self.kinds[metric.name] = metric.WhichOneof("data")
        points = getattr(metric, kind).data_points
        self.metrics[metric.name] = [
            (_values(point.attributes), point.count if kind == "histogram" else point.as_double) for point in points
        ]

    def named(self, name: str) -> list[ReceivedSpan]:
        """The spans of that name, in the order of arrival."""
        return [span for span in self.spans if span.name == name]

    def trace(self, span: ReceivedSpan) -> dict[str, ReceivedSpan]:
        """The spans of the same trace, by name."""
        return {each.name: each for each in self.spans if each.trace_id == span.trace_id}


def _span(span: Any) -> ReceivedSpan:
    return ReceivedSpan(
        span.name,
        span.trace_id,
        span.span_id,
        span.parent_span_id,
        span.kind,
        (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9,
        span.status.code == 2,
        _values(span.attributes),
        {event.name: _values(event.attributes) for event in span.events},
    )


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
