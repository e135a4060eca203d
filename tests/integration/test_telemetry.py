"""Traces and metrics by OTLP, from a real server to a real receiver. Neither a misbehaving collector nor a missing one
changes anything for clients."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.collector import Collector
from tests.support.families import sample
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

TOKEN = "the-token-of-the-collector"
STEPS = {"check", "read", "gate", "build", "guard", "publish", "store", "hand over"}
SECRETS = ("test-key", TOKEN, "postgresql://")

pytestmark = pytest.mark.any_transport


def exporting(collector: Collector, **more: str) -> dict[str, str]:
    """Settings of a server that exports to ``collector``, without waiting for long."""
    return {
        "WORKERS": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint,
        "OTEL_EXPORTER_OTLP_HEADERS": f"authorization=Bearer%20{TOKEN}",
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_EXPORTER_OTLP_TIMEOUT": "2",
        **more,
    }


def test_a_publication_is_one_trace_from_the_check_to_the_last_worker(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(3)
    with Collector() as collector:
        server = start_server(
            table.url,
            **exporting(collector, SNAPSHOT_DIR=str(tmp_path), OTEL_RESOURCE_ATTRIBUTES="deployment.environment=test"),
        ).wait_ready()
        until(lambda: collector.named("hand over"), "the first trace")
        table.add([("bad", "function", "[]", "pass")])
        server.wait_count(4)
        table.run("UPDATE obex_dapl_functions SET code = 'if' WHERE name = 'bad'")
        table.add([("another", "function", "[]", "pass")])
        server.wait_count(5)
        whole = STEPS | {"sync cycle"}
        traces = until(
            lambda: [
                trace
                for span in collector.named("gate")
                if span.attributes["held"] == 1 and (trace := collector.trace(span)).keys() == whole
            ],
            "a trace of every step, with a held row",
        )
        trace = traces[0]
        root = trace["sync cycle"]
        assert root.parent_id == b""
        assert {name: trace[name].parent_id for name in STEPS - {"hand over"}} == dict.fromkeys(
            STEPS - {"hand over"}, root.span_id
        )
        assert trace["hand over"].parent_id == trace["publish"].span_id
        assert root.attributes["outcome"] == "published"
        assert trace["gate"].events["commands held"] == {"names": "bad"}
        assert trace["publish"].attributes["version_hash"] == server.statusz()["catalog"]["version_hash"]
        assert trace["publish"].attributes["generation"] == trace["hand over"].attributes["generation"]
        assert collector.resource["service.name"] == "avap-definition-server"
        assert collector.resource["deployment.environment"] == "test"
        assert collector.resource["service.version"] == server.statusz()["version"]
        assert {headers["authorization"] for headers in collector.headers} == {f"Bearer {TOKEN}"}
        shown = repr([(span.attributes, span.events) for span in collector.spans]) + repr(collector.resource)
        assert [secret for secret in SECRETS if secret in shown] == []
        for pid in server.worker_pids():
            assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()


@pytest.mark.thorough  # waits for cycles
def test_a_cycle_that_fails_and_a_catalogue_that_is_held_are_marked(table: Table, start_server: StartServer) -> None:
    table.add_commands(20)
    with Collector() as collector:
        server = start_server(table.url, **exporting(collector)).wait_ready()
        table.run("DELETE FROM obex_dapl_functions WHERE id > 5")
        server.wait_log("Catalogue held")
        held = until(lambda: [each for each in collector.named("guard") if not each.attributes["passed"]], "a held one")
        assert held[0].events["catalogue held"]["reason"] == server.statusz()["sync"]["held_reason"]
        table.run("ALTER TABLE obex_dapl_functions RENAME TO away")
        failed = until(lambda: [each for each in collector.named("sync cycle") if each.failed], "a failed cycle")
        assert failed[0].attributes["reason"] == "table_missing"


def test_metrics_have_the_names_and_values_of_the_page(table: Table, start_server: StartServer) -> None:
    table.add_commands(3)
    with Collector() as collector:
        server = start_server(table.url, **exporting(collector)).wait_ready()
        with Client(server.port) as client:
            for _ in range(5):
                client.get("command0")
        until(
            lambda: ({"status": "200"}, 5.0) in collector.metrics.get("avap_requests_total", []),
            lambda: f"the calls: {collector.metrics.get('avap_requests_total')}",
        )
        assert collector.kinds["avap_requests_total"] == "sum"
        assert collector.metrics["avap_cache_size"] == [({}, 3.0)]
        assert collector.kinds["avap_request_duration_seconds"] == "histogram"
        assert ({"method": "GetCommand"}, 5) in collector.metrics["avap_request_duration_seconds"]
        page = server.http("/metrics")[1]
        names = {line.split(" ")[2] for line in page.splitlines() if line.startswith("# TYPE ")}
        with_samples = {name for name in names if re.search(rf"^{name}(_bucket)?[ {{]", page, re.MULTILINE)}
        assert len(with_samples) > 30
        assert {
            name for name in with_samples if name not in collector.metrics and not name.endswith("_created")
        } == set()


@pytest.mark.every_transport
def test_one_call_in_many_is_a_span_with_its_status(table: Table, transport: str, start_server: StartServer) -> None:
    table.add_commands(3)
    with Collector() as collector:
        server = start_server(
            table.url, **exporting(collector, TRACE_ONE_CALL_IN="10", TRANSPORT=transport)
        ).wait_ready()
        with Client(server.port) as client:
            for _ in range(40):
                client.get("command0")
        until(lambda: len(collector.named("avap.DefinitionEngine/GetCommand")) >= 3, "sampled calls")
        server.wait_metric(40, "avap_requests_total", status="200")
        spans = collector.named("avap.DefinitionEngine/GetCommand")
        assert 3 <= len(spans) <= 4
        assert {span.kind for span in spans} == {2}
        assert {span.attributes["rpc.grpc.status_code"] for span in spans} == {0}
        assert all(0 <= span.seconds < 5 for span in spans)
        assert len({span.trace_id for span in spans}) == len(spans)


@pytest.mark.thorough  # takes seconds
@pytest.mark.parametrize("fault", sample(["silent", "down", "refusing"]))
def test_a_collector_that_misbehaves_changes_nothing_for_clients(
    table: Table, start_server: StartServer, fault: str
) -> None:
    table.add_commands(3)
    with Collector() as collector:
        if fault == "silent":
            collector.answers.clear()
        collector.status = 401 if fault == "refusing" else 200
        more = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://user:pass@127.0.0.1:9"} if fault == "down" else {}
        server = start_server(table.url, **exporting(collector, TRACE_ONE_CALL_IN="1") | more).wait_ready()
        with Client(server.port) as client:
            line = server.wait_log("Telemetry is not exported")
            assert line["error"] in ("no connection", "no answer in time", "status 401")
            for number in range(3):
                assert client.get("command0").name == "command0"
                table.add([(f"new{number}", "function", "[]", "pass")])
                server.wait_count(4 + number, seconds=5)
        assert server.http("/readyz")[0] == 200
        assert len(server.logged("Telemetry is not exported")) <= 2, "one line for each signal"
        assert [secret for secret in (*SECRETS, "pass@") if secret in server.tail(1000)] == []
        if fault == "refusing":
            collector.status = 200
            server.wait_log("Telemetry is exported again", signal="metrics")
        began = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0
        assert time.monotonic() - began < 8
        assert not [line for line in server.lines if line["level"] in ("ERROR", "FATAL")]


def test_without_an_endpoint_no_process_imports_opentelemetry(table: Table) -> None:
    table.add_commands(3)
    modules = imported(table, TRACE_ONE_CALL_IN="1")
    assert "definition_server.data_plane.worker" in modules
    assert [name for name in modules if name.startswith(("opentelemetry", "requests", "urllib3"))] == []
    assert not modules & {
        "definition_server.control_plane.telemetry",
        "definition_server.data_plane.call_sampling",
        "definition_server.observability.otlp",
    }


def imported(table: Table, **settings: str) -> set[str]:
    """The modules that the processes of a server import until it has served a call."""
    with ServerProcess(table.url, WORKERS="1", JAIL="off", PYTHONPROFILEIMPORTTIME="1", **settings) as server:
        server.wait_ready()
        with Client(server.port) as client:
            client.get("command0")
        server.wait_log("Definitions Broadcasted")
        lines = list(server.other_output)
    return {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time:")}


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL=grpc is not supported"),
        ({"PYTHONPATH": "hidden"}, "OpenTelemetry is not installed"),
    ],
    ids=["protocol", "extra"],
)
def test_telemetry_that_cannot_be_exported_is_logged_and_does_not_stop_the_server(
    table: Table, start_server: StartServer, tmp_path: Path, settings: dict[str, str], error: str
) -> None:
    table.add_commands(3)
    if "PYTHONPATH" in settings:  # has the effect of an extra that is not installed: its package is found, but is empty
        hide = tmp_path / "sitecustomize.py"
        hide.write_text("import sys\nsys.modules['opentelemetry'] = None\n")
        settings = {"PYTHONPATH": os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))}
    server = start_server(
        table.url, WORKERS="1", OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", **settings
    ).wait_ready()
    assert server.wait_log("Telemetry is not exported")["error"] == error
    with Client(server.port) as client:
        assert client.get("command0").name == "command0"
