"""A real Prometheus scrapes a real server: every query of the dashboard and of the rules returns its series.

The server is busy and not in perfect health: right and wrong keys, unknown names, malformed requests, rows left out.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.client import Client, failure
from tests.support.load import Load
from tests.support.polling import until
from tests.support.prometheus import Document, Prometheus, selectors, shipped_rules
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.server import ServerProcess
from tests.support.table import Table

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "definition-server.json"
PANELS: list[Document] = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
QUERIES = [pytest.param(panel, target, id=f"{panel['title']}-{target['refId']}") for panel in PANELS
           for target in panel["targets"]]  # fmt: skip
RULES = shipped_rules()
COMMANDS = [f"command{number}" for number in range(150)]
NATIVE_ONLY = ("avap_connections",)
"""The prefix of the metrics that only the native transport has."""
TLS_ONLY = "avap_certificate_expiry_timestamp_seconds"
"""A metric that this server lacks, because it has no TLS; `tests/integration/test_key_rotation.py` reads it."""
NOT_OURS = ("kube_", "job:avap_cache_size:expected")
"""Metrics of kube-state-metrics, and the series that an installation with a small catalogue records."""
VARIABLES = {"$__rate_interval": "2s", "$job": ".*", "$instance": ".*"}


class Calls:
    """Calls of every outcome except UNAVAILABLE and INTERNAL, until closed; a context manager."""

    def __init__(self, port: int, table: Table) -> None:
        """``table`` is changed all the time, so that there are publications to measure."""
        self._port = port
        self._table = table
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._loads = (
            Load(port, COMMANDS, rate=100),
            Load(port, ["nothing"], rate=20, connections=1),
            Load(port, COMMANDS, rate=40, connections=1, key="wrong"),
        )

    def __enter__(self) -> Calls:
        for load in self._loads:
            load.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(30)
        for load in self._loads:
            load.__exit__()
        assert not self._loads[0].result.failed

    def _run(self) -> None:
        with Client(self._port) as client:
            while not self._stop.wait(0.2):
                client.sync()
                failure(client.raw, "GetCommand", b"\xff\xff")
                self._table.run("UPDATE obex_dapl_functions SET code = code || '#' WHERE name = 'command1'")


Scraped = tuple[Prometheus, str]


@pytest.fixture(scope="module")
def scraped(transport: str, postgres: DatabaseServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    """Prometheus scraping a busy server of each transport in turn, and the name of the transport."""
    name = f"prometheus_{transport}"
    table = Table(create_database(postgres.url, name))
    table.add_commands(len(COMMANDS))
    table.add([(None, "function", "[]", "pass"), ("text", "function", "not json", "pass")])
    # The bad rows are more than a twentieth of all, so they are served as suspect: the versions of Python may differ.
    table.add((f"odd{number}", "function", "[]", "if") for number in range(10))
    with ExitStack() as stack:
        stack.callback(drop_database, postgres.url, name)
        kept = str(tmp_path_factory.mktemp("kept"))
        settings = {
            "TRANSPORT": transport,
            "SNAPSHOT_DIR": kept,
            "SYNC_INTERVAL_SECONDS": "0.5",
            "GATE_INTERFACE": "off",
        }
        server = stack.enter_context(ServerProcess(table.url, **settings)).wait_ready()
        stack.enter_context(Calls(server.port, table))
        directory = tmp_path_factory.mktemp("prometheus")
        yield stack.enter_context(Prometheus(directory, [server.metrics_port])), transport


def concrete(expression: str) -> str:
    """The query with the values of Grafana's variables."""
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def finite(series: list[Document]) -> bool:
    """Whether each series has a number."""
    values = [[float(value) for _, value in one.get("values", [one.get("value")])] for one in series]
    return bool(series) and all(any(map(math.isfinite, numbers)) for numbers in values)


def answer(prometheus: Prometheus, target: Document) -> list[Document]:
    expression = concrete(target["expr"])
    return prometheus.query(expression) if target.get("instant") else prometheus.query_range(expression)


@pytest.mark.parametrize(("panel", "target"), QUERIES)
def test_every_query_of_the_dashboard_has_data_of_the_right_shape(
    scraped: Scraped, panel: dict[str, Any], target: dict[str, Any]
) -> None:
    prometheus, transport = scraped
    if transport != "native" and any(name in target["expr"] for name in NATIVE_ONLY):
        assert "Native transport only" in panel["description"]
        assert answer(prometheus, target) == []
        return
    series = until(
        lambda: finite(found := answer(prometheus, target)) and found, f"data for {concrete(target['expr'])}"
    )
    assert isinstance(series, list)
    labels = [one["metric"] for one in series]
    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        assert all(one.get(label) for one in labels), f"a legend without {label}: {labels}"
    if panel["type"] == "stat":
        assert len(series) == 1, "a stat shows one number"
    if panel["type"] == "heatmap":
        assert len({one["le"] for one in labels}) == len(series) > 3
    if panel["type"] == "table":
        (shown,) = (
            each["options"]["include"]["names"] for each in panel["transformations"] if "include" in each["options"]
        )
        assert f"Value #{target['refId']}" in shown or target["refId"] == "A"
        columns = [name for name in shown if not name.startswith("Value #")] if target["refId"] == "A" else ["instance"]
        assert all(one.get(column) for one in labels for column in columns)


def test_the_annotation_of_publications_is_the_time_of_each_version_in_milliseconds(scraped: Scraped) -> None:
    prometheus, _ = scraped
    (annotation,) = json.loads(DASHBOARD.read_text())["annotations"]["list"]
    series = until(lambda: prometheus.query(concrete(annotation["expr"])), "a publication")
    assert isinstance(series, list)
    for one in series:
        assert re.fullmatch("[0-9a-f]{64}", one["metric"]["version_hash"])
        assert abs(float(one["value"][1]) / 1000 - float(one["value"][0])) < 600


def test_the_panels_show_the_outcomes_and_reasons_of_the_test(scraped: Scraped) -> None:
    """The panels must show the outcomes and reasons of this test's traffic and table, and not only some data."""
    prometheus, _ = scraped
    by_title = {panel["title"]: panel for panel in PANELS}

    def shown(title: str, label: str, number: int = 0) -> set[str]:
        series = answer(prometheus, by_title[title]["targets"][number])
        return {one["metric"][label] for one in series if float(one["values"][-1][1]) > 0}

    until(lambda: shown("Calls by outcome", "status") == {"200", "400", "401", "404"}, "four outcomes")
    until(lambda: shown("Calls by method", "method") == {"GetCommand", "SyncCatalog"}, "both methods")
    assert shown("Rows left out or suspect", "reason") == {"null_name"}
    assert "code_invalid_here" in shown("Rows left out or suspect", "reason", 1)


def test_the_variables_of_the_dashboard_list_the_instance(scraped: Scraped) -> None:
    prometheus, _ = scraped
    asked = [v["query"] for v in json.loads(DASHBOARD.read_text())["templating"]["list"] if v["type"] == "query"]
    assert len(asked) == 2
    for query in asked:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", query).groups()
        values = until(partial(prometheus.api, f"label/{label}/values", {"match[]": concrete(metric)}), query)
        assert len(values) == 1
        assert label == "instance" or values == ["definition-server"]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("alert") or rule["record"])
def test_every_series_of_a_rule_exists(scraped: Scraped, rule: dict[str, Any]) -> None:
    """An alert on a metric that is not exported never fires."""
    prometheus, transport = scraped
    asked = selectors(rule["expr"])
    assert asked or NOT_OURS[0] in rule["expr"]
    absent = NATIVE_ONLY if transport != "native" else ()
    for selector in {each for each in asked if not each.startswith((TLS_ONLY, *NOT_OURS, *absent))}:
        until(partial(prometheus.query, selector), f"a series {selector}")
    if "record" in rule:
        until(lambda: finite(prometheus.query(rule["record"])), f"numbers of {rule['record']}")


def test_prometheus_evaluates_every_rule_without_an_error(scraped: Scraped) -> None:
    prometheus, _ = scraped
    rules = until(
        lambda: all(rule["health"] != "unknown" for rule in prometheus.rules()) and prometheus.rules(), "evaluations"
    )
    assert isinstance(rules, list)
    assert len(rules) == len(RULES)
    assert {rule["name"]: rule.get("lastError") for rule in rules if rule["health"] != "ok"} == {}


def test_only_the_flood_of_wrong_keys_fires_and_its_text_is_complete(scraped: Scraped) -> None:
    prometheus, _ = scraped
    alert = prometheus.wait_firing("DefinitionServerUnauthorizedFlood")
    assert prometheus.alerts().keys() == {"DefinitionServerUnauthorizedFlood"}
    assert re.fullmatch(
        r"127\.0\.0\.1:\d+ gets [\d.]+ calls a second with a wrong key\.", alert["annotations"]["summary"]
    )
    # These alerts are pending, because their `for` has not passed yet: a twentieth of unknown names, and a steady wrong
    # key. None is critical. A machine that pauses for a moment causes other alerts, which disappear.
    expected = {
        "DefinitionServerUnauthorizedSteady", "DefinitionServerUnknownNames", "DefinitionServerRowsUnserved",
    }  # fmt: skip
    until(lambda: prometheus.alerts("pending").keys() <= expected, lambda: str(prometheus.alerts("pending")))
