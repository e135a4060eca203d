"""``/metrics`` shows exactly the names and labels that existing dashboards and alerts query, with every status at zero
from the start, in text that Prometheus' own parsers accept. Histograms are cumulative, and the status is read only at a
scrape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from definition_server.ipc.stats import LATENCY_BOUNDS, METHODS, STATUSES, unshared_slot
from definition_server.observability.metrics import StatusCollector, create_registry
from definition_server.observability.reasons import HOLDING, Reason
from definition_server.observability.status import (
    CatalogStatus,
    RequestStatus,
    ServiceStatus,
    SyncStatus,
    WorkerStatus,
)

VERSION_HASH = "ab" * 32

REQUESTS = RequestStatus(
    by_status={"200": 5, "400": 0, "401": 3, "404": 2, "500": 0, "503": 1},
    bounds_seconds=(0.0005, 0.1, 1.0),
    latency={"GetCommand": (4, 3, 0, 2), "SyncCatalog": (0, 0, 0, 0)},
    latency_sum_seconds={"GetCommand": 7.25, "SyncCatalog": 0.0},
)

RUNNING = ServiceStatus(
    version="1.2.3",
    started_at=1_700_000_000.5,
    ready=True,
    stopping=False,
    catalog=CatalogStatus(9, VERSION_HASH, 30, 4096, 1_700_000_001.5, 1_700_000_002.5),
    sync=SyncStatus(
        cycles={"published": 2, "unchanged": 40, "failed": 1},
        last_outcome="unchanged",
        last_attempt=1_700_000_100.0,
        last_success=1_700_000_090.0,
        last_error=None,
        last_duration_seconds=0.25,
        age_seconds=10.0,
        restored_age_seconds=None,
        store_error=None,
        source_rows=33,
        unserved={"null_name": 1, "duplicate": 2},
        suspect={"interface_not_json_array": 4},
        rows_held={"code_invalid": 2},
        rows_unchecked=5,
        held_reason=Reason.CATALOGUE_SHRUNK,
        held_since=1_700_000_095.0,
        pinned="command",
        pinned_until=1_700_009_000.0,
        pinned_missing=True,
        history_entries=3,
    ),
    workers=(
        WorkerStatus(0, 100, "serving", 9, VERSION_HASH, 30, 0.5, 0, False, 16, "free"),
        WorkerStatus(1, None, "down", 0, "", 0, None, 7, True),
    ),
    requests=REQUESTS,
    keys_last_used={"old": 1_700_000_080.0, "new": 0.0},
    certificates_expire={"server": 1_800_000_000.0},
)

STARTING = replace(
    RUNNING,
    ready=False,
    catalog=None,
    workers=(),
    sync=replace(RUNNING.sync, cycles={}, last_success=None, age_seconds=None, unserved={}, suspect={}, source_rows=0),
)


def families(status: ServiceStatus) -> dict[str, Metric]:
    """The service's metrics by name, parsed from the scraped text."""
    registry = CollectorRegistry()
    registry.register(StatusCollector(lambda: status))
    return {family.name: family for family in parse_text(generate_latest(registry).decode())}


Labels = tuple[tuple[str, str], ...]


def samples(status: ServiceStatus) -> dict[tuple[str, Labels], float]:
    """(Name, labels) → value."""
    found = [sample for family in families(status).values() for sample in family.samples]
    values = {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for sample in found}
    assert len(values) == len(found), "a series appears twice"
    return values


# -- the names of the contract -----------------------------------------------------------------------------------------


def test_the_size_of_the_cache_is_a_gauge_without_labels() -> None:
    family = families(RUNNING)["avap_cache_size"]
    assert (family.type, [(sample.name, sample.labels, sample.value) for sample in family.samples]) == (
        "gauge",
        [("avap_cache_size", {}, 30.0)],
    )


def test_requests_are_a_counter_by_status_in_http_terms() -> None:
    text = generate_latest(create_registry(lambda: RUNNING)).decode()
    assert "# TYPE avap_requests_total counter" in text
    lines = [line for line in text.splitlines() if line.startswith("avap_requests")]
    assert lines == [
        'avap_requests_total{status="200"} 5.0',
        'avap_requests_total{status="400"} 0.0',
        'avap_requests_total{status="401"} 3.0',
        'avap_requests_total{status="404"} 2.0',
        'avap_requests_total{status="500"} 0.0',
        'avap_requests_total{status="503"} 1.0',
    ]


def test_every_status_and_method_is_present_at_zero_before_the_first_request() -> None:
    """An alert on a rate needs the series before its first failure."""
    fresh = unshared_slot().read()
    requests = RequestStatus(fresh.requests, LATENCY_BOUNDS, fresh.latency, fresh.latency_sum_seconds)
    values = samples(replace(STARTING, requests=requests))
    for status in ("200", "400", "401", "404", "500", "503"):
        assert values["avap_requests_total", (("status", status),)] == 0
    for method in METHODS:
        assert values["avap_request_duration_seconds_count", (("method", method),)] == 0
    assert len(STATUSES) == sum(name == "avap_requests_total" for name, _ in values)


def test_a_held_catalogue_and_a_pin_are_shown_and_their_absence_is_0_or_no_sample() -> None:
    values = samples(RUNNING)
    assert values["avap_catalogue_held", (("reason", "catalogue_shrunk"),)] == 1
    assert values["avap_catalogue_held", (("reason", "table_empty"),)] == 0
    assert values["avap_pin_expiry_timestamp_seconds", ()] == 1_700_009_000
    assert (values["avap_catalogue_pinned", ()], values["avap_pin_missing", ()]) == (1, 1)
    free = samples(replace(RUNNING, sync=replace(RUNNING.sync, held_reason=None, held_since=None, pinned=None)))
    assert free["avap_catalogue_held", (("reason", "catalogue_shrunk"),)] == 0
    assert free["avap_catalogue_pinned", ()] == 0
    assert ("avap_catalogue_held_since_timestamp_seconds", ()) not in free


NAMES = {
    "avap_build_info": {"version"},
    "avap_start_time_seconds": set(),
    "avap_ready": set(),
    "avap_fresh": set(),
    "avap_restart_safe": set(),
    "avap_propagation_seconds_bucket": {"le"},
    "avap_propagation_seconds_count": set(),
    "avap_propagation_seconds_sum": set(),
    "avap_cache_size": set(),
    "avap_snapshot_bytes": set(),
    "avap_snapshot_generation": set(),
    "avap_snapshot_created_timestamp_seconds": set(),
    "avap_snapshot_published_timestamp_seconds": set(),
    "avap_snapshot_info": {"version_hash"},
    "avap_sync_cycles_total": {"outcome"},
    "avap_sync_failed": {"reason"},
    "avap_sync_last_success_timestamp_seconds": set(),
    "avap_sync_age_seconds": set(),
    "avap_sync_duration_seconds": set(),
    "avap_source_rows": set(),
    "avap_last_known_good_served": set(),
    "avap_snapshot_store_failed": set(),
    "avap_catalogue_held": {"reason"},
    "avap_catalogue_held_since_timestamp_seconds": set(),
    "avap_catalogue_pinned": set(),
    "avap_pin_missing": set(),
    "avap_pin_expiry_timestamp_seconds": set(),
    "avap_history_snapshots": set(),
    "avap_rows_unserved": {"reason"},
    "avap_rows_suspect": {"reason"},
    "avap_rows_held": {"reason"},
    "avap_rows_unchecked": set(),
    "avap_worker_generation": {"worker"},
    "avap_worker_snapshot_info": {"worker", "version_hash"},
    "avap_worker_up": {"worker"},
    "avap_worker_heartbeat_age_seconds": {"worker"},
    "avap_worker_restarts_total": {"worker"},
    "avap_worker_crash_loop": {"worker"},
    "avap_key_last_used_timestamp_seconds": {"key_id"},
    "avap_certificate_expiry_timestamp_seconds": {"certificate"},
    "avap_worker_jailed": {"worker"},
    "avap_connections": {"worker"},
    "avap_connections_full": {"worker"},
    "avap_log_lines_dropped_total": set(),
    "avap_log_lines_waiting": set(),
    "avap_requests_total": {"status"},
    "avap_request_duration_seconds_bucket": {"method", "le"},
    "avap_request_duration_seconds_count": {"method"},
    "avap_request_duration_seconds_sum": {"method"},
}
"""Dashboards query these names. A name or label may be added here, but none may be changed or removed."""


def test_no_name_or_label_is_lost() -> None:
    found: dict[str, set[str]] = {}
    for name, labels in samples(RUNNING):
        found.setdefault(name, set()).update(label for label, _ in labels)
    assert found == NAMES


def test_every_metric_has_a_help_text() -> None:
    assert [name for name, family in families(RUNNING).items() if not family.documentation.endswith(".")] == []


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("avap_build_info", {"version": "1.2.3"}, 1),
        ("avap_start_time_seconds", {}, 1_700_000_000.5),
        ("avap_ready", {}, 1),
        ("avap_snapshot_bytes", {}, 4096),
        ("avap_snapshot_generation", {}, 9),
        ("avap_snapshot_created_timestamp_seconds", {}, 1_700_000_001.5),
        ("avap_snapshot_published_timestamp_seconds", {}, 1_700_000_002.5),
        ("avap_snapshot_info", {"version_hash": VERSION_HASH}, 1),
        ("avap_sync_cycles_total", {"outcome": "unchanged"}, 40),
        ("avap_sync_last_success_timestamp_seconds", {}, 1_700_000_090.0),
        ("avap_sync_age_seconds", {}, 10),
        ("avap_sync_duration_seconds", {}, 0.25),
        ("avap_source_rows", {}, 33),
        ("avap_last_known_good_served", {}, 0),
        ("avap_snapshot_store_failed", {}, 0),
        ("avap_rows_unserved", {"reason": "duplicate"}, 2),
        ("avap_rows_suspect", {"reason": "interface_not_json_array"}, 4),
        ("avap_rows_held", {"reason": "code_invalid"}, 2),
        ("avap_rows_unchecked", {}, 5),
        ("avap_worker_generation", {"worker": "0"}, 9),
        ("avap_worker_snapshot_info", {"worker": "0", "version_hash": VERSION_HASH}, 1),
        ("avap_worker_up", {"worker": "0"}, 1),
        ("avap_worker_up", {"worker": "1"}, 0),
        ("avap_worker_heartbeat_age_seconds", {"worker": "0"}, 0.5),
        ("avap_worker_restarts_total", {"worker": "0"}, 0),
        ("avap_worker_restarts_total", {"worker": "1"}, 7),
        ("avap_worker_crash_loop", {"worker": "0"}, 0),
        ("avap_worker_crash_loop", {"worker": "1"}, 1),
        ("avap_key_last_used_timestamp_seconds", {"key_id": "old"}, 1_700_000_080.0),
        ("avap_key_last_used_timestamp_seconds", {"key_id": "new"}, 0),
        ("avap_certificate_expiry_timestamp_seconds", {"certificate": "server"}, 1_800_000_000.0),
        ("avap_connections", {"worker": "0"}, 16),
    ],
)
def test_a_metric_has_the_value_of_the_status(name: str, labels: dict[str, str], value: float) -> None:
    assert samples(RUNNING)[name, tuple(sorted(labels.items()))] == value


def test_a_worker_without_a_process_has_no_heartbeat() -> None:
    assert ("avap_worker_heartbeat_age_seconds", (("worker", "1"),)) not in samples(RUNNING)


@pytest.mark.parametrize("state", ["starting", "waiting", "draining", "down"])
def test_only_a_serving_worker_is_up(state: str) -> None:
    workers = (replace(RUNNING.workers[0], state=state),)
    assert samples(replace(RUNNING, workers=workers))["avap_worker_up", (("worker", "0"),)] == 0


def test_before_the_first_snapshot_metrics_without_a_value_have_no_sample() -> None:
    values = samples(STARTING)
    assert values["avap_cache_size", ()] == values["avap_snapshot_generation", ()] == values["avap_ready", ()] == 0
    names = {name for name, _ in values}
    for name in (
        "avap_snapshot_info",
        "avap_snapshot_created_timestamp_seconds",
        "avap_snapshot_published_timestamp_seconds",
        "avap_sync_last_success_timestamp_seconds",
        "avap_sync_age_seconds",
        "avap_worker_up",
    ):
        assert name not in names


def test_the_reason_why_the_last_cycle_failed_is_one_and_all_others_are_zero() -> None:
    for failed in (Reason.DATABASE_REFUSED_LOGIN, Reason.PERMISSION_DENIED, Reason.TABLE_EMPTY, None):
        values = samples(replace(RUNNING, sync=replace(RUNNING.sync, last_error=failed)))
        found = {labels[0][1]: value for (name, labels), value in values.items() if name == "avap_sync_failed"}
        assert found.keys() == set(Reason) - set(HOLDING)
        assert {reason for reason, value in found.items() if value} == ({failed} - {None} - set(HOLDING))


def test_the_restored_snapshot_and_a_failed_store_have_metrics() -> None:
    values = samples(
        replace(RUNNING, sync=replace(RUNNING.sync, restored_age_seconds=0.0, store_error=Reason.DISK_FAILED))
    )
    assert values["avap_last_known_good_served", ()] == 1
    assert values["avap_snapshot_store_failed", ()] == 1


def test_the_buckets_of_a_histogram_are_cumulated() -> None:
    name = "avap_request_duration_seconds"
    values = {key: value for key, value in samples(RUNNING).items() if key[0].startswith(name)}
    found: dict[str, dict[float, float]] = {}
    for (sample, labels), value in values.items():
        if sample == f"{name}_bucket":
            found.setdefault(dict(labels)["method"], {})[float(dict(labels)["le"])] = value
    assert found == {
        "GetCommand": {0.0005: 4, 0.1: 7, 1.0: 7, float("inf"): 9},
        "SyncCatalog": {0.0005: 0, 0.1: 0, 1.0: 0, float("inf"): 0},
    }
    assert values[f"{name}_count", (("method", "GetCommand"),)] == 9
    assert values[f"{name}_sum", (("method", "GetCommand"),)] == 7.25


def test_a_histogram_whose_buckets_do_not_match_its_bounds_is_a_bug_that_shows() -> None:
    requests = replace(REQUESTS, latency={**REQUESTS.latency, "GetCommand": (1, 2)})
    with pytest.raises(ValueError, match="zip"):
        samples(replace(RUNNING, requests=requests))


# -- the whole exposition ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [RUNNING, STARTING], ids=["running", "starting"])
@pytest.mark.parametrize(
    ("expose", "parse"),
    [(generate_latest, parse_text), (openmetrics.generate_latest, parse_openmetrics)],
    ids=["text", "OpenMetrics"],
)
def test_the_whole_exposition_parses_in_both_formats(
    status: ServiceStatus,
    expose: Callable[[CollectorRegistry], bytes],
    parse: Callable[[str], list[Metric]],
) -> None:
    """Prometheus requests OpenMetrics and accepts the text format too."""
    found = list(parse(expose(create_registry(lambda: status)).decode()))
    names = {sample.name for family in found for sample in family.samples}
    assert {"avap_cache_size", "avap_requests_total", "process_resident_memory_bytes", "python_info"} <= names


def test_labels_of_any_text_survive_the_exposition() -> None:
    odd = 'a"b\\c\nd ñ'
    values = samples(replace(RUNNING, version=odd))
    assert values["avap_build_info", (("version", odd),)] == 1


def test_the_status_is_read_at_every_scrape_and_not_before() -> None:
    reads = []

    def read() -> ServiceStatus:
        reads.append(1)
        return RUNNING

    registry = create_registry(read)
    assert len(reads) == 0
    for scrape in (1, 2):
        generate_latest(registry)
        assert len(reads) == scrape
