"""Export of traces and metrics to an OpenTelemetry collector, if the settings name one
(``OTEL_EXPORTER_OTLP_ENDPOINT``).

**Off** is the default, and costs nothing: no module of OpenTelemetry is imported, no span is made, and workers count
calls as if this module did not exist. **On**, a thread of the master takes the finished spans every second and the
metrics at their interval. Nothing waits for that thread: it begins once the workers serve, its queues are bounded and
drop data that do not fit, and at the end of the server it has two seconds. A collector that is down, slow or refuses
data causes one log line, and another line when it works again.

Workers have no network access for an export. They send the calls that they sample over the control socket
(`CallsSampled`).
"""

from __future__ import annotations

import asyncio
import importlib.util
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from definition_server import __version__
from definition_server.environment import without_user_information
from definition_server.ipc.messages import CallsSampled
from definition_server.ipc.stats import METHODS, STATUSES
from definition_server.observability.logs import get_logger
from definition_server.observability.status import ServiceStatus
from definition_server.observability.tracing import Recorder, new_trace, record_to
from definition_server.settings import Settings

if TYPE_CHECKING:
    from definition_server.observability.otlp import Exporter

log = get_logger(__name__)

SERVICE_NAME = "avap-definition-server"
"""The service name, unless ``OTEL_SERVICE_NAME`` or ``OTEL_RESOURCE_ATTRIBUTES`` gives another."""
LAST_EXPORT_SECONDS = 2.0
"""Seconds for which the end of the server waits for the last export."""
_TICK_SECONDS = 1.0
_RPC_SERVICE = "avap.DefinitionEngine"
_GRPC_STATUS = {"200": 0, "400": 3, "401": 16, "404": 5, "500": 13, "503": 14}


class Telemetry:
    """The export of one master."""

    def __init__(self, settings: Settings, read: Callable[[], ServiceStatus]) -> None:
        """``read`` returns the present status; it is called from the exporting thread."""
        self._settings = settings
        self._read = read
        self._recorder = Recorder()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telemetry", daemon=True)
        self._problems: dict[str, str | None] = {}
        record_to(self._recorder)

    def start(self) -> None:
        """Begin to export."""
        try:
            self._thread.start()
        except RuntimeError as error:  # no thread can be started: the limit of processes is reached
            record_to(None)
            log.error("Telemetry is not exported", error=str(error))

    async def stop(self) -> None:
        """Export the queued data, and end. Returns after `LAST_EXPORT_SECONDS` at the latest."""
        self._stopping.set()
        deadline = time.monotonic() + LAST_EXPORT_SECONDS
        while self._thread.is_alive() and time.monotonic() < deadline:  # noqa: ASYNC110 - of a thread
            await asyncio.sleep(0.01)
        record_to(None)

    def calls_sampled(self, worker: int, calls: CallsSampled) -> None:
        """Export the ``calls`` that worker ``worker`` has answered as spans. Each call is a trace of its own."""
        for method, status, ended, elapsed in zip(
            calls.methods, calls.statuses, calls.ended_ns, calls.elapsed_ns, strict=True
        ):
            name, outcome = METHODS[method], STATUSES[status]
            span = new_trace(f"{_RPC_SERVICE}/{name}", ended - elapsed, ended)
            span.of_a_call = True
            span.attributes = {
                "rpc.system": "grpc",
                "rpc.service": _RPC_SERVICE,
                "rpc.method": name,
                "rpc.grpc.status_code": _GRPC_STATUS[outcome],
                "avap.status": outcome,
                "avap.worker": worker,
                "avap.one_call_in": self._settings.trace_one_call_in,
            }
            if outcome.startswith("5"):
                span.failure = outcome
            self._recorder.put(span)

    def _run(self) -> None:
        try:
            exporter = self._exporter()
            self._export(exporter)
        except Exception as bug:  # any error of the SDK about its variables, or a bug of ours
            record_to(None)
            log.error("Telemetry is not exported", remedy="see the variables OTEL_…", exc_info=bug)

    def _exporter(self) -> Exporter:
        # Imported here, because OpenTelemetry is large and optional.
        from definition_server.observability.otlp import Exporter, Target, parse_headers

        settings = self._settings
        headers = settings.otel_exporter_otlp_headers
        attributes = {
            "service.name": SERVICE_NAME,
            "service.version": __version__,
            "service.instance.id": self._read().hostname,
        }
        target = Target(*settings.otlp_endpoints, {} if headers is None else parse_headers(headers.get_secret_value()))
        return Exporter(target, attributes, self._report)

    def _export(self, exporter: Exporter) -> None:
        from definition_server.observability.metrics import create_registry

        registry = create_registry(self._read)
        started_ns = int(self._read().started_at * 1e9)
        interval = self._settings.otel_metric_export_interval / 1000
        due = time.monotonic()
        stopping = False
        while not stopping:
            stopping = self._stopping.wait(min(_TICK_SECONDS, interval))
            exporter.put(self._recorder.take())
            if stopping or time.monotonic() >= due:
                due = time.monotonic() + interval
                exporter.export_metrics(registry.collect(), started_ns)
        exporter.close()

    def _report(self, signal: str, problem: str | None) -> None:
        """Log that an export failed, unless the previous one failed for the same reason; and log when an export
        succeeds again.
        """
        before = self._problems.get(signal)
        self._problems[signal] = problem
        if problem is not None and problem != before:
            log.warning(
                "Telemetry is not exported",
                signal=signal,
                endpoint=without_user_information(self._settings.otlp_endpoints[signal == "metrics"] or ""),
                error=problem,
                effect="none for clients; /metrics has the same numbers",
            )
        elif problem is None and before is not None:
            log.info("Telemetry is exported again", signal=signal, spans_dropped=self._recorder.dropped)


def create_telemetry(settings: Settings, read: Callable[[], ServiceStatus]) -> Telemetry | None:
    """The export that ``settings`` request. None if they request none, or if the export cannot be set up, which is
    logged.
    """
    if settings.otlp_endpoints == (None, None):
        return None
    if settings.otel_exporter_otlp_protocol != "http/protobuf":
        log.warning(
            "Telemetry is not exported",
            error=f"OTEL_EXPORTER_OTLP_PROTOCOL={settings.otel_exporter_otlp_protocol} is not supported",
            remedy="set it to http/protobuf, and the endpoint to the collector's port for that, mostly 4318",
        )
        return None
    if importlib.util.find_spec("opentelemetry") is None:
        log.warning(
            "Telemetry is not exported",
            error="OpenTelemetry is not installed",
            remedy="pip install 'avap-definition-server[otel]', or unset the variables OTEL_EXPORTER_OTLP_…",
        )
        return None
    return Telemetry(settings, read)
