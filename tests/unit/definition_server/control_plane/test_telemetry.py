"""What is exported where: endpoints by the standard variables, and spans of sampled calls; no exporter is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.support.environments import failure, load
from tests.support.fakes import service_status

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
def test_the_standard_variables_say_what_is_exported_where(
    variables: dict[str, str], endpoints: tuple[str | None, str | None]
) -> None:
    named = {
        name if name.startswith("OTEL_") else f"OTEL_EXPORTER_OTLP_{name}": each for name, each in variables.items()
    }
    settings = load(**named)
    assert settings.otlp_endpoints == endpoints
    telemetry = create_telemetry(settings, service_status)
    assert (telemetry is None) == (endpoints == (None, None))


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    (problem,) = failure(OTEL_EXPORTER_OTLP_ENDPOINT="collector:4318").problems
    assert "it is no URL of HTTP" in str(problem)


def test_a_password_in_an_endpoint_and_the_header_fields_are_not_shown() -> None:
    settings = load(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://user:s3cret@collector:4318",
        OTEL_EXPORTER_OTLP_HEADERS="authorization=Bearer t0ken",
    )
    shown = effective(settings)
    assert shown["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://********@collector:4318"
    assert "s3cret" not in str(shown)
    assert "t0ken" not in str(shown)


def test_other_variables_of_the_standard_are_not_taken_for_misspelled(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_a_failure_is_logged_once_until_another_or_a_success(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[str, dict[str, Any]]] = []

    def note(level: str) -> Callable[..., None]:
        return lambda message, **fields: logged.append((message, fields))

    from definition_server.control_plane import telemetry as module

    class Log:
        warning, info = staticmethod(note("warning")), staticmethod(note("info"))

    monkeypatch.setattr(module, "log", Log)
    telemetry = Telemetry(load(OTEL_EXPORTER_OTLP_ENDPOINT="http://u:p4ss@c:1"), service_status)
    for problem in ("no connection", "no connection", "status 401", None, None):
        telemetry._report("traces", problem)
    assert [(message, fields.get("error")) for message, fields in logged] == [
        ("Telemetry is not exported", "no connection"),
        ("Telemetry is not exported", "status 401"),
        ("Telemetry is exported again", None),
    ]
    assert "p4ss" not in str(logged)
