"""The dashboard is the output of its source, is valid by Grafana's own types, and can be read.

`test_prometheus_live.py` shows on a real Prometheus that its queries have data.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from deploy.grafana.dashboard import build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

ROOT = Path(__file__).parents[2]
WRITTEN = ROOT / "deploy/grafana/definition-server.json"
RUNBOOKS = ROOT / "docs/runbooks"
DASHBOARD: dict[str, Any] = json.loads(WRITTEN.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
each_panel = pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
UNITS = {"s", "short", "reqps", "bytes", "percentunit"}
"""Units of Grafana that our metrics have: Prometheus's base units and plain counts."""


def test_the_dashboard_is_the_output_of_its_source() -> None:
    assert WRITTEN.read_text() == build(), "stale: run python deploy/grafana/dashboard.py"


def unknown_fields(written: Any, known: Any, at: str = "") -> list[str]:
    """The paths of values in ``written`` that Grafana's types do not keep."""
    if isinstance(written, dict) and isinstance(known, dict):
        return [
            lost
            for key, value in written.items()
            for lost in (unknown_fields(value, known[key], f"{at}.{key}") if key in known else [f"{at}.{key}"])
        ]
    if isinstance(written, list) and isinstance(known, list) and len(written) == len(known):
        return [
            lost
            for i, pair in enumerate(zip(written, known, strict=True))
            for lost in unknown_fields(*pair, f"{at}[{i}]")
        ]
    return [] if written == known else [at]


def through_the_types(dashboard: dict[str, Any]) -> Any:
    return json.loads(json.dumps(Dashboard.from_json(dashboard), cls=JSONEncoder))


OF_THE_PLUGIN = {"titleFormat", "textFormat", "useValueForTime"}
"""Fields of an annotation that Grafana's Prometheus plugin reads; the types of the dashboard do not have them."""


def test_grafana_knows_every_field_of_the_dashboard() -> None:
    unknown = unknown_fields(DASHBOARD, through_the_types(DASHBOARD))
    assert sorted(unknown) == sorted(f".annotations.list[0].{field}" for field in OF_THE_PLUGIN)


def test_publications_are_annotations_at_the_time_of_the_metric() -> None:
    (annotation,) = DASHBOARD["annotations"]["list"]
    assert annotation["datasource"]["uid"] == "${datasource}"
    assert annotation["enable"] is annotation["useValueForTime"] is True
    assert annotation["textFormat"] == "{{version_hash}}"
    assert annotation["expr"].endswith("* 1000")


def test_the_table_of_instances_shows_version_time_and_freshness_of_each() -> None:
    (table,) = (panel for panel in PANELS if panel["type"] == "table")
    organize = next(each["options"] for each in table["transformations"] if each["id"] == "organize")
    columns = sorted(organize["indexByName"], key=organize["indexByName"].__getitem__)
    assert [organize["renameByName"][column] for column in columns] == [
        "instance", "serves", "since", "fresh", "table read before", "ready", "program",
    ]  # fmt: skip
    queries = {f"Value #{target['refId']}": target["expr"] for target in table["targets"]}
    for column, metric in (("since", "avap_snapshot_published_timestamp"), ("fresh", "avap_fresh")):
        (field,) = (name for name, shown in organize["renameByName"].items() if shown == column)
        assert metric in queries[field]


def test_a_field_that_grafana_does_not_know_is_detected() -> None:
    broken = json.loads(WRITTEN.read_text())
    broken["panels"][1]["tittle"] = broken["panels"][1].pop("title")
    assert ".panels[1].tittle" in unknown_fields(broken, through_the_types(broken))


def test_panels_have_distinct_ids_and_do_not_overlap() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: dict[tuple[int, int], str] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["title"]) == panel["title"]


def test_rows_are_in_the_order_of_an_investigation() -> None:
    rows = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert [row["title"] for row in rows] == [
        "At a glance", "Traffic", "Latency", "Freshness", "Publication", "Workers", "Memory and limits",
        "Refusals and fallbacks",
    ]  # fmt: skip
    assert all(above["gridPos"]["y"] < below["gridPos"]["y"] for above, below in pairwise(rows))


@each_panel
def test_every_panel_has_a_description_and_links_its_runbook(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    (link,) = panel["links"]
    folder, _, page = link["url"].partition("/")
    assert folder == "${runbooks}"
    assert (RUNBOOKS / page).is_file()


@each_panel
def test_every_query_uses_the_selected_data_source_and_instances(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [target["refId"] for target in panel["targets"]] == list("ABCDE"[: len(panel["targets"])])
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"]
        # A metric without the selection would show the data of another installation.
        assert target["expr"].count('{job=~"$job", instance=~"$instance"') >= 1


def test_the_data_source_and_the_address_of_the_runbooks_can_be_selected() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert [*variables] == ["datasource", "job", "instance", "runbooks"]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for name in ("job", "instance"):
        assert variables[name]["datasource"]["uid"] == "${datasource}"
        assert variables[name]["multi"] is variables[name]["includeAll"] is True
    assert variables["runbooks"]["type"] == "textbox"


# -- provisioning ------------------------------------------------------------------------------------------------------

OF_A_PROVIDER = {
    "name", "orgId", "folder", "folderUid", "type", "disableDeletion", "allowUiUpdates", "updateIntervalSeconds",
    "options",
}  # fmt: skip
OF_A_DATA_SOURCE = {"name", "orgId", "uid", "type", "access", "url", "isDefault", "editable", "version", "jsonData"}
"""As pkg/services/provisioning of Grafana's source reads them; it drops other fields silently."""


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / "deploy" / path).read_text(encoding="utf-8"))


def test_grafana_reads_the_provisioned_files_where_compose_mounts_them() -> None:
    folder = "grafana/provisioning"
    dashboards, sources = (
        read(f"{folder}/dashboards/definition-server.yml"),
        read(f"{folder}/datasources/prometheus.yml"),
    )
    assert dashboards["apiVersion"] == sources["apiVersion"] == 1
    (provider,), (source,) = dashboards["providers"], sources["datasources"]
    assert provider.keys() <= OF_A_PROVIDER
    assert source.keys() <= OF_A_DATA_SOURCE
    scraped = read("prometheus/prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"] == {"timeInterval": scraped}
    grafana = read("compose/grafana.yaml")["services"]["grafana"]
    mounts = dict(volume.split(":")[:2] for volume in grafana["volumes"])
    home = f"{provider['options']['path']}/{WRITTEN.name}"
    assert mounts == {f"./{folder}": "/etc/grafana/provisioning", f"./grafana/{WRITTEN.name}": home}
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == home
    service, _, port = source["url"].removeprefix("http://").partition(":")
    assert service in grafana["depends_on"]
    assert port == "9090"
