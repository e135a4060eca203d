"""The standard variables decide the exports and their endpoints, and sampled calls become spans. No exporter is
started.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.environments import failure, load
from tests.support.fakes import service_status
from tests.support.logs import captured_logs, logged

from definition_server.control_plane import telemetry as module
from definition_server.control_plane.telemetry import Telemetry, create_telemetry
from definition_server.environment import effective, notices
from definition_server.ipc.messages import CallsSampled
from definition_server.observability import tracing
from definition_server.observability.tracing import record_to
from definition_server.settings import Settings

BASE = "http://collector:4318"
TRACES, METRICS = f"{BASE}/v1/traces", f"{BASE}/v1/metrics"


@pytest.fixture(autouse=True)
def no_recorder() -> Iterator[None]:
    yield
    record_to(None)


@pytest.mark.parametrize(
    ("variables", "endpoints"),
    [
        ({}, (None, None)),
        ({"ENDPOINT": BASE}, (TRACES, METRICS)),
        ({"ENDPOINT": f"{BASE}/"}, (TRACES, METRICS)),
        ({"TRACES_ENDPOINT": "http://t/x"}, ("http://t/x", None)),
        ({"ENDPOINT": BASE, "METRICS_ENDPOINT": "https://m/x"}, (TRACES, "https://m/x")),
        ({"ENDPOINT": BASE, "OTEL_TRACES_EXPORTER": "none"}, (None, METRICS)),
        ({"ENDPOINT": BASE, "OTEL_METRICS_EXPORTER": "none"}, (TRACES, None)),
        ({"ENDPOINT": BASE, "OTEL_SDK_DISABLED": "true"}, (None, None)),
    ],
    ids=["unset", "base", "slash", "traces", "both", "no-traces", "no-metrics", "disabled"],
)
def test_the_standard_variables_decide_the_exports_and_their_endpoints(
    variables: dict[str, str], endpoints: tuple[str | None, str | None]
) -> None:
    named = {
        name if name.startswith("OTEL_") else f"OTEL_EXPORTER_OTLP_{name}": each for name, each in variables.items()
    }
    settings = load(**named)
    assert settings.otlp_endpoints == endpoints
    telemetry = create_telemetry(settings, service_status)
    assert (telemetry is None) == (endpoints == (None, None))


def test_an_endpoint_that_is_not_a_url_is_refused() -> None:
    (problem,) = failure(OTEL_EXPORTER_OTLP_ENDPOINT="collector:4318").problems
    assert "it is not an HTTP URL" in str(problem)


def test_a_password_in_an_endpoint_and_the_header_fields_are_not_shown() -> None:
    settings = load(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://user:s3cret@collector:4318",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer t0ken",
    )
    shown = effective(settings)
    assert shown["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://********@collector:4318"
    assert "s3cret" not in str(shown)
    assert "t0ken" not in str(shown)


def test_other_variables_of_the_standard_are_not_reported_as_misspelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "5")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://x")
    assert [notice for notice in notices(Settings) if notice.variable.startswith("OTEL_")] == []


def test_a_sampled_call_is_a_span_of_its_own_with_its_status() -> None:
    telemetry = Telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT=BASE, TRACE_ONE_CALL_IN="7"), service_status)
    telemetry.calls_sampled(2, CallsSampled((0, 1), (3, 4), (5000, 6000), (1000, 500)))
    missing, broken = tracing._recorders[0].take()
    assert (missing.name, missing.start_ns, missing.end_ns) == ("avap.DefinitionEngine/GetCommand", 4000, 5000)
    assert missing.of_a_call
    assert missing.attributes["rpc.grpc.status_code"] == 5
    assert (missing.attributes["avap.worker"], missing.attributes["avap.one_call_in"]) == (2, 7)
    assert (missing.failure, broken.failure) == (None, "500")
    assert missing.trace_id != broken.trace_id


def test_a_failure_is_logged_once_until_another_failure_or_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[tuple[str, dict[str, Any]]] = []

    def note(level: str) -> Callable[..., None]:
        return lambda message, **fields: noted.append((message, fields))

    class Log:
        warning, info = staticmethod(note("warning")), staticmethod(note("info"))

    monkeypatch.setattr(module, "log", Log)
    telemetry = Telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT="http://u:p4ss@c:1"), service_status)
    for problem in (None, "no connection", "no connection", "status 401", None, None):
        telemetry._report("traces", problem)
    assert [(message, fields.get("error")) for message, fields in noted] == [
        ("Telemetry is not exported", "no connection"),
        ("Telemetry is not exported", "status 401"),
        ("Telemetry is exported again", None),
    ]
    assert "p4ss" not in str(noted)


class Exporter:
    """An exporter that notes the data that it gets."""

    def __init__(self, *given: Any) -> None:
        self.given = given
        self.spans: list[int] = []
        self.metrics: list[int] = []
        self.closed = 0

    def put(self, spans: Any) -> None:
        self.spans.append(len(spans))

    def export_metrics(self, families: Any, started_ns: int) -> None:
        assert list(families)
        self.metrics.append(started_ns)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT=BASE, OTEL_METRIC_EXPORT_INTERVAL="2500"), service_status)


def test_spans_are_exported_every_second_metrics_at_their_interval_and_both_at_the_end(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waited = [100.0], list[float]()

    def wait(seconds: float) -> bool:
        waited.append(seconds)
        now[0] += seconds
        return len(waited) == 8

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(telemetry._stopping, "wait", wait)
    exporter = Exporter()
    telemetry.calls_sampled(2, CallsSampled((0,), (3,), (5000,), (1000,)))
    telemetry._export(exporter)
    assert waited == [1.0] * 8
    assert exporter.spans == [1, 0, 0, 0, 0, 0, 0, 0]
    assert exporter.metrics == [1_700_000_000 * 10**9] * 4, "after 1, 4, 7 s, and at the end"
    assert exporter.closed == 1


def test_an_interval_below_a_second_applies_to_spans_too(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT=BASE, OTEL_METRIC_EXPORT_INTERVAL="200"), service_status)
    waited: list[float] = []
    monkeypatch.setattr(made._stopping, "wait", lambda seconds: waited.append(seconds) or len(waited) == 3)
    made._export(Exporter())
    assert waited == [0.2] * 3


async def test_a_thread_that_cannot_be_started_is_logged_and_nothing_is_recorded(telemetry: Telemetry) -> None:
    def refuse() -> None:
        raise RuntimeError("can't start new thread")

    telemetry._thread = SimpleNamespace(start=refuse, is_alive=lambda: False)
    with captured_logs() as lines:
        telemetry.start()
    assert logged(lines, "Telemetry is not exported", error="can't start new thread", log_level="error")
    assert not tracing._recorders
    record_to(telemetry._recorder)
    await telemetry.stop()
    assert telemetry._stopping.is_set()
    assert not tracing._recorders, "nothing is recorded after the end"


async def test_the_end_waits_two_seconds_for_the_last_export(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, slept = [100.0], list[float]()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    telemetry._thread = SimpleNamespace(is_alive=lambda: True)
    await telemetry.stop()
    assert now[0] == pytest.approx(102.0, abs=0.015)
    assert set(slept) == {0.01}


def test_a_bug_of_the_exporter_is_logged_and_ends_the_recording(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(telemetry, "_exporter", fail)
    assert telemetry._thread.daemon, "the thread does not delay the end of the process"
    with captured_logs() as lines:
        telemetry._run()
    assert logged(lines, "Telemetry is not exported", remedy="see the variables OTEL_…", log_level="error")
    assert not tracing._recorders


@pytest.mark.parametrize(
    ("header", "headers"), [(None, {}), ("authorization=Bearer%20t", {"authorization": "Bearer t"})]
)
def test_the_exporter_is_named_and_gets_endpoints_and_header_fields(
    header: str | None, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    otlp = pytest.importorskip("definition_server.observability.otlp")
    monkeypatch.setattr(otlp, "Exporter", Exporter)
    variables = {} if header is None else {"OTEL_EXPORTER_OTLP_HEADERS": header}
    made = Telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT=BASE, **variables), service_status)
    exported: list[Any] = []
    monkeypatch.setattr(made, "_export", exported.append)
    made._run()
    (exporter,) = exported
    target, attributes, report = exporter.given
    assert target == otlp.Target(TRACES, METRICS, headers)
    assert attributes["service.name"] == "avap-definition-server"
    assert attributes["service.instance.id"] == "replica-0"
    assert report == made._report


@pytest.mark.parametrize(
    ("variables", "error"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc is not supported"),
        ({}, "OpenTelemetry is not installed"),
    ],
)
def test_an_export_that_is_not_possible_is_logged_and_left_out(
    variables: dict[str, str], error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with captured_logs() as lines:
        assert create_telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT=BASE, **variables), service_status) is None
    assert logged(lines, "Telemetry is not exported", error=error, log_level="warning")
