"""Writes the Grafana dashboard: ``python deploy/grafana/dashboard.py`` (needs the extra ``dev``).

The dashboard is this list of rows and panels; definition-server.json is made from it and kept beside it, so that using
the dashboard needs no Python. A test fails where the two differ, and runs every query on a real Prometheus.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders.common import VizLegendOptions, VizTooltipOptions
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    DynamicConfigValue,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

OUTPUT = Path(__file__).with_name("definition-server.json")
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
HERE = 'job=~"$job", instance=~"$instance"'
"""The selection of the variables; ``<HERE>`` in a query, alone or before further matchers."""

STAT, GRAPH, HEAT, TABLE = "stat", "timeseries", "heatmap", "table"
WIDTH = 24
"""Columns of Grafana's grid."""


@dataclass(frozen=True)
class Shown:
    """One panel. ``queries``: (PromQL, legend). ``steps``: (from this value on, colour)."""

    title: str
    text: str
    runbook: str
    queries: tuple[tuple[str, str], ...]
    unit: str = "short"
    kind: str = GRAPH
    columns: int = 8
    steps: tuple[tuple[float, str], ...] = ()
    least: float | None = 0


AT_A_GLANCE = (
    Shown(
        "Ready", "Number of instances that serve a catalogue.", "server-down",
        (("sum(avap_ready{<HERE>})", "ready"),), kind=STAT, columns=4, steps=((0, "red"), (1, "green")),
    ),
    Shown(
        "Definitions", "The smallest number that an instance serves.", "table-damaged",
        (("min(avap_cache_size{<HERE>})", "definitions"),), kind=STAT, columns=4, steps=((0, "red"), (100, "green")),
    ),
    Shown(
        "Catalogues", "Number of version hashes that are served. More than 1 for longer than two cycles is a fault.",
        "replicas-differ", (("count(count by (version_hash) (avap_snapshot_info{<HERE>}))", "versions"),),
        kind=STAT, columns=4, steps=((0, "red"), (1, "green"), (2, "orange")),
    ),
    Shown(
        "Oldest change check", "Time since the last successful cycle, of the instance where it is longest.",
        "database-unreachable", (("max(avap_sync_age_seconds{<HERE>})", "age"),), unit="s", kind=STAT, columns=4,
        steps=((0, "green"), (180, "orange"), (1800, "red")),
    ),
    Shown(
        "Calls", "Calls a second, all outcomes.", "slow-answers",
        (("sum(rate(avap_requests_total{<HERE>}[$__rate_interval]))", "calls"),), unit="reqps", kind=STAT, columns=4,
    ),
    Shown(
        "Slowest P95", "In the worker, of the slower method. Without queues, HTTP/2 and the network.",
        "slow-answers",
        (
            (
                "max(histogram_quantile(0.95, sum by (le, method) "
                "(rate(avap_request_duration_seconds_bucket{<HERE>}[$__rate_interval]))))", "P95",
            ),
        ),
        unit="s", kind=STAT, columns=4, steps=((0, "green"), (0.005, "orange"), (0.05, "red")),
    ),
)  # fmt: skip

TRAFFIC = (
    Shown(
        "Calls by outcome", "200 OK, 400 not protobuf, 401 wrong key, 404 unknown name, 500 a bug, 503 no catalogue.",
        "clients", (("sum by (status) (rate(avap_requests_total{<HERE>}[$__rate_interval]))", "{{status}}"),),
        unit="reqps",
    ),
    Shown(
        "Calls by method", "Calls that reached the service, refused ones included.", "slow-answers",
        (
            (
                "sum by (method) (rate(avap_request_duration_seconds_count{<HERE>}[$__rate_interval]))",
                "{{method}}",
            ),
        ),
        unit="reqps",
    ),
    Shown(
        "Calls by instance", "If uneven, clients keep old connections: lower MAX_CONNECTION_AGE_SECONDS.",
        "slow-answers",
        (("sum by (instance) (rate(avap_requests_total{<HERE>}[$__rate_interval]))", "{{instance}}"),), unit="reqps",
    ),
)  # fmt: skip

LATENCY = (
    Shown(
        "GetCommand in the worker", "From the request's arrival to the ready answer.", "slow-answers",
        tuple(
            (
                f"histogram_quantile({share}, sum by (le) (rate(avap_request_duration_seconds_bucket"
                '{<HERE>, method="GetCommand"}[$__rate_interval])))',
                f"P{share * 100:g}",
            )
            for share in (0.5, 0.95, 0.99)
        ),
        unit="s",
    ),
    Shown(
        "SyncCatalog in the worker", "The same for whole catalogues, without sending them.", "slow-answers",
        tuple(
            (
                f"histogram_quantile({share}, sum by (le) (rate(avap_request_duration_seconds_bucket"
                '{<HERE>, method="SyncCatalog"}[$__rate_interval])))',
                f"P{share * 100:g}",
            )
            for share in (0.5, 0.95, 0.99)
        ),
        unit="s",
    ),
    Shown(
        "GetCommand, distribution", "Calls a second in each bucket.", "slow-answers",
        (
            (
                'sum by (le) (rate(avap_request_duration_seconds_bucket{<HERE>, method="GetCommand"}'
                "[$__rate_interval]))",
                "{{le}}",
            ),
        ),
        unit="s", kind=HEAT, least=None,
    ),
)  # fmt: skip

FRESHNESS = (
    Shown(
        "Time since the table was read", "A sawtooth of SYNC_INTERVAL_SECONDS is normal; a rising line is a fault.",
        "database-unreachable", (("avap_sync_age_seconds{<HERE>}", "{{instance}}"),), unit="s",
        steps=((0, "transparent"), (180, "orange"), (1800, "red")),
    ),
    Shown(
        "Cycles by outcome", "Per interval of the graph. held: the guard keeps the catalogue from being published.",
        "database-unreachable",
        (("sum by (outcome) (increase(avap_sync_cycles_total{<HERE>}[$__rate_interval]))", "{{outcome}}"),),
    ),
    Shown(
        "Duration of the last cycle", "A change check takes milliseconds, a reading seconds.", "database-slow",
        (("avap_sync_duration_seconds{<HERE>}", "{{instance}}"),), unit="s",
    ),
    Shown(
        "Rows and definitions", "Rows of the last reading minus rows left out must equal the definitions served.",
        "table-damaged",
        (
            ("avap_source_rows{<HERE>}", "{{instance}} rows"),
            ("avap_cache_size{<HERE>}", "{{instance}} served"),
        ),
        columns=12,
    ),
    Shown(
        "Age of the catalogue", "Since it was built. Rises as long as the table does not change.", "replicas-differ",
        (("time() - avap_snapshot_created_timestamp_seconds{<HERE>}", "{{instance}}"),), unit="s", least=None,
        columns=12,
    ),
    Shown(
        "What each instance serves", "Instances of one table must show one hash; since when, and whether it is fresh.",
        "replicas-differ",
        (
            (
                "max by (instance, version_hash, version) "
                "(avap_snapshot_info{<HERE>} * on (job, instance) group_left (version) avap_build_info{<HERE>})", "",
            ),
            ("max by (instance) (avap_snapshot_published_timestamp_seconds{<HERE>}) * 1000", ""),
            ("max by (instance) (avap_fresh{<HERE>})", ""),
            ("max by (instance) (avap_sync_age_seconds{<HERE>})", ""),
            ("max by (instance) (avap_ready{<HERE>})", ""),
        ),
        kind=TABLE, columns=24,
    ),
)  # fmt: skip

WORKERS = (
    Shown(
        "Workers that serve", "By instance.", "workers",
        (("sum by (instance) (avap_worker_up{<HERE>})", "{{instance}}"),), columns=6,
    ),
    Shown(
        "Restarts", "Unexpected ends of workers in an hour.", "workers",
        (("sum by (instance, worker) (increase(avap_worker_restarts_total{<HERE>}[1h]))", "{{instance}} {{worker}}"),),
        columns=6,
    ),
    Shown(
        "Heartbeat age", "A worker's event loop beats four times a second. At HEARTBEAT_TIMEOUT_SECONDS it is killed.",
        "workers", (("max by (instance) (avap_worker_heartbeat_age_seconds{<HERE>})", "{{instance}}"),), unit="s",
        columns=6,
    ),
    Shown(
        "Generations behind", "Of the worker that is furthest behind.", "workers",
        (
            (
                "max by (instance) (avap_snapshot_generation{<HERE>}"
                " - on (job, instance) group_right () avap_worker_generation{<HERE>})",
                "{{instance}}",
            ),
        ),
        columns=6, least=None,
    ),
)  # fmt: skip

MEMORY = (
    Shown(
        "Memory of the master", "Resident, without the workers: see the container's memory for the total.",
        "machine-limits",
        (("process_resident_memory_bytes{<HERE>} and on (job, instance) avap_ready", "{{instance}}"),), unit="bytes",
        columns=6,
    ),
    Shown(
        "Size of the catalogue", "One copy for all workers; two while a new one is published.",
        "machine-limits", (("avap_snapshot_bytes{<HERE>}", "{{instance}}"),), unit="bytes", columns=6,
    ),
    Shown(
        "CPU of the master", "Nearly none between changes of the table; one core while it publishes.",
        "slow-answers",
        (("rate(process_cpu_seconds_total{<HERE>}[$__rate_interval]) and on (job, instance) avap_ready",
          "{{instance}}"),),
        columns=6,
    ),
    Shown(
        "Connections per allowed file", "Of the worker with the most. At 100 % they wait. Native transport only.",
        "machine-limits",
        (
            (
                "max by (instance) (avap_connections{<HERE>}"
                " / on (job, instance) group_left () process_max_fds{<HERE>})",
                "{{instance}}",
            ),
        ),
        unit="percentunit", columns=6,
    ),
)  # fmt: skip

REFUSALS = (
    Shown(
        "Calls refused", "All outcomes except OK. Connections that the engine ends before a call are only in the log.",
        "clients",
        (
            (
                'sum by (instance, status) (rate(avap_requests_total{<HERE>, status!="200"}[$__rate_interval]))',
                "{{instance}} {{status}}",
            ),
        ),
        unit="reqps", columns=6,
    ),
    Shown(
        "Connections by worker", "At MAX_CONNECTIONS (16384) further ones wait. Native transport only.",
        "machine-limits", (("avap_connections{<HERE>}", "{{instance}} {{worker}}"),), columns=6,
    ),
    Shown(
        "Rows left out or suspect", "By reason. `Rows not served` in the log names examples.", "table-damaged",
        (
            ("max by (reason) (avap_rows_unserved{<HERE>}) > 0", "left out: {{reason}}"),
            ("max by (reason) (avap_rows_suspect{<HERE>}) > 0", "suspect: {{reason}}"),
        ),
        columns=6,
    ),
    Shown(
        "Fallbacks in use", "1: the last-known-good file is served, or that file is not up to date.",
        "last-known-good",
        (
            ("avap_last_known_good_served{<HERE>}", "{{instance}} served from file"),
            ("avap_snapshot_store_failed{<HERE>}", "{{instance}} file not stored"),
        ),
        columns=6,
    ),
)  # fmt: skip

PUBLICATION = (
    Shown(
        "Stale instances", "1: what the instance serves may be out of date; /freshz states why. Clients are served.",
        "stale", (("1 - avap_fresh{<HERE>}", "{{instance}}"),), columns=6,
    ),
    Shown(
        "From the table to the last worker", "Upper bound, which contains one interval of change checks.", "stale",
        (
            (
                "histogram_quantile(0.95, sum by (le) (increase(avap_propagation_seconds_bucket{<HERE>}[1h])))", "P95",
            ),
        ),
        unit="s", columns=6,
    ),
    Shown(
        "Held rows", "Commands that are served in their last good version, by the reason against their row.",
        "table-damaged", (("max by (reason) (avap_rows_held{<HERE>})", "{{reason}}"),), columns=6,
    ),
    Shown(
        "Held catalogue", "1: the guard keeps a catalogue from being published, by reason. `accept` releases it.",
        "table-damaged", (("max by (reason) (avap_catalogue_held{<HERE>})", "{{reason}}"),), columns=6,
    ),
    Shown(
        "Pinned", "1: a pin is in effect, or the pinned version is not known to the instance.", "pinned",
        (
            ("avap_catalogue_pinned{<HERE>}", "{{instance}} pinned"),
            ("avap_pin_missing{<HERE>}", "{{instance}} not known"),
        ),
        columns=6,
    ),
    Shown(
        "A restart would lose something", "1: do not restart this instance; `restart.reason` in /statusz says why.",
        "stale", (("1 - avap_restart_safe{<HERE>}", "{{instance}}"),), columns=6,
    ),
    Shown(
        "Workers not confined", "Number of workers by instance. Without a value: JAIL=off.", "workers",
        (("count by (instance) (avap_worker_jailed{<HERE>}) - sum by (instance) (avap_worker_jailed{<HERE>})",
          "{{instance}}"),),
        columns=6,
    ),
    Shown(
        "Log lines dropped", "Lines within an hour that stdout did not take.", "machine-limits",
        (("increase(avap_log_lines_dropped_total{<HERE>}[1h])", "{{instance}}"),), columns=6,
    ),
)  # fmt: skip

FLEET = {
    "instance": "instance", "version_hash": "serves", "Value #B": "since", "Value #C": "fresh",
    "Value #D": "table read before", "Value #E": "ready", "version": "program",
}  # fmt: skip
"""Of the table of instances: field → column, in their order. ``Value #B`` is that of the second query."""
FLEET_UNITS = {"since": "dateTimeAsIso", "table read before": "s"}
PUBLICATIONS = (
    "min by (version_hash) (avap_snapshot_published_timestamp_seconds{<HERE>}"
    " * on (job, instance) group_left (version_hash) avap_snapshot_info{<HERE>}) * 1000"
)
"""The annotation of publications: when the first instance served each version, in milliseconds."""

ROWS = (
    ("At a glance", AT_A_GLANCE),
    ("Traffic", TRAFFIC),
    ("Latency", LATENCY),
    ("Freshness", FRESHNESS),
    ("Publication", PUBLICATION),
    ("Workers", WORKERS),
    ("Memory and limits", MEMORY),
    ("Refusals and fallbacks", REFUSALS),
)

Panel = stat.Panel | timeseries.Panel | heatmap.Panel | table.Panel


def query(shown: Shown, expression: str, legend: str, ref: str) -> prometheus.Dataquery:
    """A query of a panel; stats and tables ask for this moment, graphs for a range."""
    made = prometheus.Dataquery().expr(expression.replace("<HERE>", HERE)).legend_format(legend or "__auto").ref_id(ref)
    made = made.datasource(SOURCE)
    if shown.kind == TABLE:
        return made.instant().format(PromQueryFormat.TABLE)
    if shown.kind == HEAT:
        return made.range().format(PromQueryFormat.HEATMAP)
    return made.instant() if shown.kind == STAT else made.range()


def empty_panel(shown: Shown) -> Panel:
    """The panel's kind, with the fields that only that kind has."""
    if shown.kind == STAT:
        return stat.Panel().graph_mode(BigValueGraphMode.NONE)
    if shown.kind == HEAT:
        return heatmap.Panel().color(heatmap_colour()).mode(TooltipDisplayMode.SINGLE)
    if shown.kind == TABLE:
        return fleet_table()
    legend = VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM).show_legend(True)
    tooltip = VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING)
    return timeseries.Panel().legend(legend).tooltip(tooltip).fill_opacity(8)


def fleet_table() -> table.Panel:
    """One line for each instance, of the answers to several queries."""
    order = {name: place for place, name in enumerate(FLEET)}
    made = table.Panel().transformations(
        [
            DataTransformerConfig(id_val="merge", options={}),
            DataTransformerConfig(id_val="filterFieldsByName", options={"include": {"names": list(FLEET)}}),
            DataTransformerConfig(id_val="organize", options={"indexByName": order, "renameByName": FLEET}),
        ]
    )
    for column, unit in FLEET_UNITS.items():
        made = made.override_by_name(column, [DynamicConfigValue(id_val="unit", value=unit)])
    words = {"type": "value", "options": {"0": {"text": "no", "color": "red"}, "1": {"text": "yes", "color": "green"}}}
    for column in ("fresh", "ready"):
        made = made.override_by_name(column, [DynamicConfigValue(id_val="mappings", value=[words])])
    return made


def heatmap_colour() -> heatmap.HeatmapColorOptions:
    """The more calls, the darker."""
    return heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Oranges").steps(64)


def panel(shown: Shown, number: int) -> Panel:
    """A panel of the dashboard."""
    made = empty_panel(shown).id(number).title(shown.title).description(shown.text).datasource(SOURCE)
    made = made.span(shown.columns).height(4 if shown.kind == STAT else 8).unit(shown.unit)
    for ref, (expression, legend) in zip("ABCDE", shown.queries, strict=False):
        made = made.with_target(query(shown, expression, legend, ref))
    if shown.least is not None:
        made = made.min(shown.least)
    if shown.steps:
        # The first step has no value: it holds for everything below the second.
        steps = [Threshold(value=None if i == 0 else at, color=c) for i, (at, c) in enumerate(shown.steps)]
        made = made.thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    link = dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK).target_blank(True)
    return made.links([link.url(f"${{runbooks}}/{shown.runbook}.md")])


def variables() -> list[dashboard.DatasourceVariable | dashboard.QueryVariable | dashboard.TextBoxVariable]:
    """The data source, the jobs and instances to show, and the address of the runbooks."""

    def labels(name: str, of: str) -> dashboard.QueryVariable:
        every = VariableOption(selected=True, text="All", value="$__all")
        made = dashboard.QueryVariable(name).label(name).datasource(SOURCE).query(f"label_values({of}, {name})")
        made = made.refresh(VariableRefresh.ON_TIME_RANGE_CHANGED).sort(VariableSort.ALPHABETICAL_ASC)
        return made.multi(True).include_all(True).all_value(".*").current(every)

    runbooks = dashboard.TextBoxVariable("runbooks").label("runbooks").default_value("docs/runbooks")
    runbooks = runbooks.description("Address of the project's docs/runbooks, without a slash at the end")
    return [
        dashboard.DatasourceVariable("datasource").label("data source").type("prometheus"),
        labels("job", "avap_ready"),
        labels("instance", 'avap_ready{job=~"$job"}'),
        runbooks,
    ]


def build() -> str:
    """The dashboard as JSON text."""
    made = dashboard.Dashboard("Definition server").uid("avap-definition-server").tags(["avap", "definition-server"])
    made = made.description("AVAP definition server: traffic, latency, freshness, workers, memory, refusals.")
    made = made.time("now-3h", "now").refresh("30s").timezone("browser").tooltip(DashboardCursorSync.CROSSHAIR)
    index = dashboard.DashboardLink("Runbooks").type(DashboardLinkType.LINK).target_blank(True)
    made = made.variables(list(variables())).links([index.url("${runbooks}/README.md")])
    number = 0
    for title, panels in ROWS:
        number += 1
        made = made.with_row(dashboard.Row(title).id(number))
        for shown in panels:
            number += 1
            made = made.with_panel(panel(shown, number))
    made = made.annotation(
        dashboard.AnnotationQuery()
        .name("Publications")
        .datasource(SOURCE)
        .enable(True)
        .icon_color("blue")
        .expr(PUBLICATIONS.replace("<HERE>", HERE))
    )
    document = json.loads(json.dumps(made.build(), cls=JSONEncoder))
    # Fields of the Prometheus plugin, which the types of the dashboard do not know: the value is the time.
    document["annotations"]["list"][0] |= {
        "titleFormat": "Publication", "textFormat": "{{version_hash}}", "useValueForTime": True,
    }  # fmt: skip
    return json.dumps(document, indent=2, sort_keys=True) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(build(), encoding="utf-8")
