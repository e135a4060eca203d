"""Alert drills: a fault, a real server, a real Prometheus with the rules in fast motion, and the alert fires.

Fast motion means: `for` is a second, and multiples of SYNC_INTERVAL_SECONDS are multiples of the interval of the test's
server.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.prometheus import Document, Prometheus
from tests.support.providers import DatabaseServer, create_database
from tests.support.server import ServerProcess
from tests.support.table import Table

INTERVAL = 0.5
COMMANDS = 120


def in_quick_motion(document: Document) -> Document:
    """The alert rules with short waits."""
    for group in document["groups"]:
        for rule in group["rules"]:
            if "for" in rule:
                rule["for"] = "1s"
            rule["expr"] = rule["expr"].replace("* 60", f"* {INTERVAL}")
    return document


@pytest.fixture
def start(start_server: StartServer) -> Callable[[Table], ServerProcess]:
    """A server on the table; it serves."""
    return lambda table: start_server(table.url, SYNC_INTERVAL_SECONDS=str(INTERVAL)).wait_ready()


def filled(url: str) -> Table:
    table = Table(url)
    table.add_commands(COMMANDS)
    return table


def test_a_dead_database_raises_only_the_alerts_on_the_age(
    frail_postgres: DatabaseServer, start: Callable[[Table], ServerProcess], tmp_path: Path
) -> None:
    server = start(filled(create_database(frail_postgres.url, "dead")))
    with Prometheus(tmp_path, [server.metrics_port], in_quick_motion) as prometheus, Client(server.port) as client:
        prometheus.wait_quiet("avap_sync_age_seconds")
        frail_postgres.stop_hard()
        stale = prometheus.wait_firing("DefinitionServerSyncStale")
        assert stale["labels"]["severity"] == "warning"
        assert client.get("command7").name == "command7"
        long = prometheus.wait_firing("DefinitionServerSyncStaleForLong", seconds=40)
        assert long["labels"]["severity"] == "critical"
        assert "has not read the table for" in long["annotations"]["summary"]
        prometheus.wait_firing("DefinitionServerStale")
        firing = prometheus.alerts().keys() - {"DefinitionServerRestartUnsafe"}  # without SNAPSHOT_DIR
        assert firing == {"DefinitionServerSyncStale", "DefinitionServerSyncStaleForLong", "DefinitionServerStale"}
        assert client.get("command7").name == "command7", "and clients have noticed nothing"
        frail_postgres.start_again()
        prometheus.wait_resolved("DefinitionServerSyncStale")
        prometheus.wait_resolved("DefinitionServerSyncStaleForLong")


@pytest.mark.transports
def test_an_emptied_table_raises_alerts_even_though_the_cache_size_stays(
    table: Table, start: Callable[[Table], ServerProcess], tmp_path: Path
) -> None:
    table.add_commands(COMMANDS)
    server = start(table)
    with Prometheus(tmp_path, [server.metrics_port], in_quick_motion) as prometheus:
        prometheus.wait_quiet('avap_sync_cycles_total{outcome="held"} == 0')
        table.run("TRUNCATE obex_dapl_functions")
        prometheus.wait_firing("DefinitionServerCatalogueHeld")
        prometheus.wait_firing("DefinitionServerSourceNotServed")
        assert "DefinitionServerCacheSmall" not in prometheus.alerts()
        assert server.metric("avap_cache_size") == COMMANDS
        table.add_commands(COMMANDS)
        prometheus.wait_resolved("DefinitionServerSourceNotServed")


@pytest.mark.transports
def test_servers_on_two_databases_raise_the_alert_about_different_catalogues(
    postgres: DatabaseServer, table: Table, start: Callable[[Table], ServerProcess], tmp_path: Path
) -> None:
    table.add_commands(COMMANDS)
    first, second = start(table), start(table)
    other = filled(create_database(postgres.url, "differs"))
    with Prometheus(tmp_path, [first.metrics_port, second.metrics_port], in_quick_motion) as prometheus:
        prometheus.wait_quiet("job:avap_versions:count == 1 and on () count(avap_snapshot_info) == 2")
    other.run("UPDATE obex_dapl_functions SET code = 'other' WHERE name = 'command7'")
    (tmp_path / "again").mkdir()
    third = start(other)
    targets = [first.metrics_port, third.metrics_port]
    with Prometheus(tmp_path / "again", targets, in_quick_motion) as prometheus:
        alert = prometheus.wait_firing("DefinitionServerReplicasDiffer")
        assert alert["annotations"]["summary"] == "2 different catalogues are served."
        assert prometheus.alerts().keys() == {"DefinitionServerReplicasDiffer"}
