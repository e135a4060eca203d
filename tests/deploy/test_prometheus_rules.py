"""The rules are valid, each alert has unit tests in which it fires and is silent, and the numbers are the server's
defaults.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from tests.support.prometheus import RULES, SHIPPED, Document, program, shipped_alerts, shipped_rules

from definition_server.settings import Settings

ROOT = SHIPPED.parents[1]
TESTS = sorted((SHIPPED / "tests").glob("*.yml"))
ALERTS = shipped_alerts()
FIRING = 'group by (alertname) (ALERTS{alertstate="firing"})'


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [program("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scenarios() -> list[Document]:
    return [test for path in TESTS for test in yaml.safe_load(path.read_text())["tests"]]


def told(moment: Document) -> set[str]:
    """Names of the alerts that a scenario expects at a moment."""
    return {re.findall(r'alertname="(\w+)"', sample["labels"])[0] for sample in moment["exp_samples"]}


def test_promtool_accepts_the_rules_and_the_configuration() -> None:
    assert "rules found" in promtool("check", "rules", *RULES)
    promtool("check", "config", SHIPPED / "prometheus.yml")


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_unit_tests_of_the_alerts_pass(path: Path) -> None:
    promtool("test", "rules", path)


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_fires_and_is_silent_in_some_scenario(alert: str) -> None:
    moments = [scenario["promql_expr_test"] for scenario in scenarios()]
    assert all(moment["expr"] == FIRING for test in moments for moment in test), "every moment lists all firing alerts"
    turning = [
        test
        for test in moments
        if any(alert in told(moment) for moment in test) and any(alert not in told(moment) for moment in test)
    ]
    assert turning


def test_no_scenario_expects_an_alert_that_does_not_exist() -> None:
    assert {name for s in scenarios() for moment in s["promql_expr_test"] for name in told(moment)} <= ALERTS.keys()


@pytest.mark.parametrize("alert", ALERTS)
def test_every_alert_has_severity_description_and_runbook(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["labels"].keys() == {"severity"}
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert 60 < len(rule["annotations"]["description"]) < 300
    assert (ROOT / rule["annotations"]["runbook_url"]).is_file()


def test_numbers_of_the_rules_are_the_defaults_of_the_settings() -> None:
    """A changed default must also be changed in the alerts."""
    text = "\n".join(path.read_text() for path in RULES)
    fields = Settings.model_fields
    assert f"> 3 * {fields['sync_interval_seconds'].default:g}\n" in text
    assert f"> 0.8 * {fields['max_connections'].default}\n" in text
    port = yaml.safe_load((SHIPPED / "prometheus.yml").read_text())["scrape_configs"][0]["dns_sd_configs"][0]["port"]
    assert port == fields["metrics_port"].default


def test_the_alerts_of_the_operations_guide_exist_with_their_thresholds() -> None:
    assert ALERTS["DefinitionServerCacheSmall"]["expr"].startswith("(avap_cache_size < 100 unless on (job) ")
    assert ALERTS["DefinitionServerUnauthorizedFlood"]["expr"] == 'rate(avap_requests_total{status="401"}[1m]) > 10'
    assert "avap_start_time_seconds" in ALERTS["DefinitionServerRestarts"]["expr"]
    restarted = ALERTS["DefinitionServerContainerRestarted"]["expr"]
    assert restarted.startswith('kube_pod_container_status_restarts_total{container="definition-server"} > 0')


def test_the_error_budget_is_that_of_the_objective() -> None:
    """99.99 %: 14.4 times the budget's rate uses a fiftieth of 30 days in an hour, 6 times a twentieth in six hours."""
    budget = f"{1 - 0.9999:.4f}"
    fast, slow = (ALERTS[f"DefinitionServerErrorBudget{each}"]["expr"] for each in ("Fast", "Slow"))
    assert fast.count(f"> 14.4 * {budget}") == 2
    assert slow.count(f"> 6 * {budget}") == 2
    assert slow.count(f"> {budget}") == 2
    assert round(14.4 * 1 / (30 * 24), 6) == 0.02
    assert round(6 * 6 / (30 * 24), 6) == 0.05
    for window in re.findall(r"ratio_rate(\w+)", fast + slow):
        (rule,) = [r for r in shipped_rules() if r.get("record") == f"job:avap_failed_calls:ratio_rate{window}"]
        assert rule["expr"].count(f"[{window}]") == 2


def test_no_critical_alert_fires_three_minutes_after_the_repair() -> None:
    """One scenario causes every critical fault, and repairs all of them 40 minutes after its start."""
    (scenario,) = [test for test in scenarios() if test["name"].startswith("every critical alert is silent")]
    broken, repaired = scenario["promql_expr_test"]
    critical = {name for name, rule in ALERTS.items() if rule["labels"]["severity"] == "critical"}
    assert (broken["eval_time"], repaired["eval_time"]) == ("40m", "43m")
    assert told(broken) >= critical
    assert not told(repaired) & critical
    assert all("keep_firing_for" not in ALERTS[name] for name in critical)


def test_every_recorded_series_is_used() -> None:
    recorded = {rule["record"] for rule in shipped_rules() if "record" in rule}
    assert recorded <= set(re.findall(r"[\w]+:[\w:]+", "\n".join(rule["expr"] for rule in ALERTS.values())))
