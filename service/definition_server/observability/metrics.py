"""Metric names, and the collector that fills them from a `ServiceStatus` when Prometheus scrapes.

Existing dashboards and alerts query ``avap_cache_size`` and ``avap_requests_total{status=…}`` under exactly these names
and labels. The master does not count: the counters are those of the workers' stats pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate

from prometheus_client import GC_COLLECTOR, PLATFORM_COLLECTOR, PROCESS_COLLECTOR, CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from definition_server.observability.reasons import HOLDING, Reason
from definition_server.observability.status import CatalogStatus, LogStatus, RequestStatus, ServiceStatus, SyncStatus


class StatusCollector(Collector):
    """Renders the status that ``read`` returns."""

    def __init__(self, read: Callable[[], ServiceStatus]) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """Return no metrics, because registration must not read the status of a service that is still being
        constructed.
        """
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric of the service."""
        status = self._read()
        yield InfoMetricFamily("avap_build", "Version of the server.", value={"version": status.version})
        yield _gauge("avap_start_time_seconds", "Start of the master, seconds since the epoch.", status.started_at)
        yield _gauge("avap_ready", "1 if the service is ready (see /readyz).", status.ready)
        yield from _proof(status)
        yield from _catalog(status.catalog)
        yield from _sync(status.sync)
        yield from _workers(status)
        yield from _requests(status.requests)
        text = "When an API key was last presented, seconds since the epoch; 0: not since the start."
        name = "avap_key_last_used_timestamp_seconds"
        yield _labelled(GaugeMetricFamily, name, text, "key_id", status.keys_last_used)
        text = "When the first certificate of the file expires, seconds since the epoch."
        name = "avap_certificate_expiry_timestamp_seconds"
        yield _labelled(GaugeMetricFamily, name, text, "certificate", status.certificates_expire)
        yield from _logs(status.logs)


def create_registry(read: Callable[[], ServiceStatus]) -> CollectorRegistry:
    """A registry with the service's metrics and those of the master process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StatusCollector(read))
    for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
        registry.register(collector)
    return registry


def _gauge(name: str, text: str, value: float | None) -> GaugeMetricFamily:
    """A gauge without labels. The gauge has no sample if there is no value yet."""
    if value is None:
        return GaugeMetricFamily(name, text, labels=())
    return GaugeMetricFamily(name, text, value=float(value))


def _labelled(
    cls: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    label: str,
    values: dict[str, float] | dict[str, int],
) -> Metric:
    family = cls(name, text, labels=(label,))
    for key, value in values.items():
        family.add_metric((key,), value)
    return family


def _proof(status: ServiceStatus) -> Iterator[Metric]:
    yield _gauge("avap_fresh", "1 if the served catalogue is up to date (see /freshz).", status.freshness.fresh)
    yield _gauge(
        "avap_restart_safe",
        "1 if the server would serve the same catalogue after a restart (see /statusz).",
        status.restart.safe,
    )
    text = "Time from the last check that did not find a change to the last worker's acknowledgement of the change."
    histogram = HistogramMetricFamily("avap_propagation_seconds", text, labels=())
    measured = status.propagation
    bounds = [*(f"{bound:g}" for bound in measured.bounds_seconds), "+Inf"]
    buckets = list(zip(bounds, accumulate(measured.counts), strict=True))
    histogram.add_metric((), buckets, measured.sum_seconds)
    yield histogram


def _catalog(catalog: CatalogStatus | None) -> Iterator[Metric]:
    yield _gauge("avap_cache_size", "Definitions served.", catalog.definitions if catalog else 0)
    yield _gauge("avap_snapshot_bytes", "Size of the published snapshot.", catalog.bytes if catalog else 0)
    yield _gauge("avap_snapshot_generation", "Number of the publication.", catalog.generation if catalog else 0)
    yield _gauge(
        "avap_snapshot_created_timestamp_seconds",
        "When the published snapshot was built, seconds since the epoch.",
        catalog.created_at if catalog else None,
    )
    yield _gauge(
        "avap_snapshot_published_timestamp_seconds",
        "When the published snapshot was published, seconds since the epoch: it is served since then.",
        catalog.published_at if catalog else None,
    )
    info = InfoMetricFamily("avap_snapshot", "Version hash of the published snapshot.")
    if catalog is not None:
        info.add_metric((), {"version_hash": catalog.version_hash})
    yield info


def _sync(sync: SyncStatus) -> Iterator[Metric]:
    yield _labelled(CounterMetricFamily, "avap_sync_cycles", "Sync cycles by outcome.", "outcome", sync.cycles)
    text = "1 for the reason why the last cycle failed; all 0 after a success."
    failed = {reason.value: int(sync.last_error is reason) for reason in Reason if reason not in HOLDING}
    yield _labelled(GaugeMetricFamily, "avap_sync_failed", text, "reason", failed)
    yield _gauge(
        "avap_sync_last_success_timestamp_seconds",
        "When the table and the served catalogue last agreed, seconds since the epoch.",
        sync.last_success,
    )
    yield _gauge("avap_sync_age_seconds", "Time since the last successful cycle.", sync.age_seconds)
    yield _gauge("avap_sync_duration_seconds", "Duration of the last cycle.", sync.last_duration_seconds)
    yield _gauge("avap_source_rows", "Rows at the last reading of the table.", sync.source_rows)
    yield _gauge(
        "avap_last_known_good_served",
        "1 while the last-known-good snapshot is served because the database has not answered.",
        sync.restored_age_seconds is not None,
    )
    yield _gauge("avap_snapshot_store_failed", "1 if the snapshot could not be stored.", bool(sync.store_error))
    text = "1 while the guard holds a catalogue, which an operator must accept, by reason."
    held = {reason.value: int(sync.held_reason is reason) for reason in HOLDING}
    yield _labelled(GaugeMetricFamily, "avap_catalogue_held", text, "reason", held)
    yield _gauge(
        "avap_catalogue_held_since_timestamp_seconds",
        "When the catalogue was first held, seconds since the epoch.",
        sync.held_since,
    )
    yield _gauge("avap_catalogue_pinned", "1 while a pin is in effect.", sync.pinned is not None)
    yield _gauge("avap_pin_missing", "1 while the pinned catalogue is not known here.", sync.pinned_missing)
    yield _gauge(
        "avap_pin_expiry_timestamp_seconds", "When the pin ends by itself, seconds since the epoch.", sync.pinned_until
    )
    yield _gauge("avap_history_snapshots", "Catalogues in the history.", sync.history_entries)
    text = "Rows not served at the last reading, by reason."
    yield _labelled(GaugeMetricFamily, "avap_rows_unserved", text, "reason", sync.unserved)
    text = "Rows that look wrong and are served, at the last reading, by reason."
    yield _labelled(GaugeMetricFamily, "avap_rows_suspect", text, "reason", sync.suspect)
    text = "Commands served in their last good version because their row is bad, by reason."
    yield _labelled(GaugeMetricFamily, "avap_rows_held", text, "reason", sync.rows_held)
    text = "Rows that are served although their content was not checked yet."
    yield _gauge("avap_rows_unchecked", text, sync.rows_unchecked)


def _workers(status: ServiceStatus) -> Iterator[Metric]:
    generation = GaugeMetricFamily("avap_worker_generation", "Generation a worker serves.", labels=("worker",))
    served = InfoMetricFamily("avap_worker_snapshot", "Version hash that a worker serves.", labels=("worker",))
    up = GaugeMetricFamily("avap_worker_up", "1 if a worker serves a snapshot.", labels=("worker",))
    beat = GaugeMetricFamily("avap_worker_heartbeat_age_seconds", "Age of the last heartbeat.", labels=("worker",))
    restarts = CounterMetricFamily(
        "avap_worker_restarts", "Worker processes that ended by themselves or failed to start.", labels=("worker",)
    )
    loop = GaugeMetricFamily("avap_worker_crash_loop", "1 while a worker crashes again and again.", labels=("worker",))
    jailed = GaugeMetricFamily(
        "avap_worker_jailed",
        "1 if a worker is confined by Landlock and seccomp; no sample with JAIL=off.",
        labels=("worker",),
    )
    connections = GaugeMetricFamily("avap_connections", "Connections that a worker holds.", labels=("worker",))
    text = "1 if a worker holds MAX_CONNECTIONS, 2 if all of them have made an authorized call."
    room = GaugeMetricFamily("avap_connections_full", text, labels=("worker",))
    for worker in status.workers:
        label = (str(worker.worker),)
        generation.add_metric(label, worker.generation)
        served.add_metric(label, {"version_hash": worker.version_hash})
        up.add_metric(label, worker.state == "serving")
        if worker.heartbeat_age_seconds is not None:
            beat.add_metric(label, worker.heartbeat_age_seconds)
        restarts.add_metric(label, worker.restarts)
        loop.add_metric(label, worker.crash_loop)
        if worker.jail != "off":
            jailed.add_metric(label, worker.jail == "full")
        if worker.connections is not None:
            connections.add_metric(label, worker.connections)
        if worker.room is not None:
            room.add_metric(label, ("free", "full", "taken").index(worker.room))
    yield from (generation, served, up, beat, restarts, loop, jailed, connections, room)


def _requests(requests: RequestStatus) -> Iterator[Metric]:
    text = "Requests by outcome, in HTTP terms."
    yield _labelled(CounterMetricFamily, "avap_requests", text, "status", requests.by_status)
    text = "Connections refused or closed although the client made no mistake, by reason."
    yield _labelled(CounterMetricFamily, "avap_connections_refused", text, "reason", requests.refused_connections)
    text = "Time from reading a request to its answer, in the worker."
    histogram = HistogramMetricFamily("avap_request_duration_seconds", text, labels=("method",))
    bounds = [*(f"{bound:g}" for bound in requests.bounds_seconds), "+Inf"]
    for method, counts in requests.latency.items():
        buckets = list(zip(bounds, accumulate(counts), strict=True))
        histogram.add_metric((method,), buckets, requests.latency_sum_seconds[method])
    yield histogram


def _logs(logs: LogStatus) -> Iterator[Metric]:
    text = "Log lines of the master and the workers that were dropped."
    yield CounterMetricFamily("avap_log_lines_dropped", text, value=logs.dropped_lines)
    yield _gauge("avap_log_lines_waiting", "Log lines of the master that stdout has not taken yet.", logs.waiting_lines)
