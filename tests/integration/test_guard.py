"""Accidents in the table, on a real server and database: the served catalogue stays, also across a restart."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.client import Client
from tests.support.table import Table

pytestmark = [pytest.mark.any_transport, pytest.mark.slow]

MANY = 40


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: the number of workers does not matter here."""
    return {"WORKERS": "1"}


def test_rows_deleted_while_the_server_was_down_are_held_at_its_start_and_the_stored_catalogue_is_served(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add_commands(MANY)
    server = start_server(table.url, SNAPSHOT_DIR=str(tmp_path)).wait_ready()
    good = server.statusz()["catalog"]["version_hash"]
    server.end()
    table.run("DELETE FROM obex_dapl_functions WHERE name <> 'command1'")
    server = start_server(table.url, SNAPSHOT_DIR=str(tmp_path)).wait_ready()
    line = server.wait_log("Catalogue held")
    assert line["reason"] == "catalogue_shrunk"
    assert len(line["commands"]) == 10
    assert server.statusz()["catalog"]["version_hash"] == good
    assert server.statusz()["sync"]["held_reason"] == "catalogue_shrunk"
    sync = server.statusz()["sync"]
    assert (sync["held_version"], sync["held_definitions"]) == (line["version_hash"], 1)
    assert sync["held_names"] == line["commands"]
    assert f"definition-server accept {line['version_hash'][:16]}" in server.http("/")[1]
    assert server.metric("avap_catalogue_held", reason="catalogue_shrunk") == 1
    with Client(server.port) as client:
        assert len(client.sync().commands) == MANY
    table.add_commands(MANY - 2, start=2)
    table.add_commands(1, start=0)
    server.wait_log("Catalogue no longer held")
    server.wait_metric(0, "avap_catalogue_held", reason="catalogue_shrunk")  # the state is set after the line is logged


def test_a_doubled_table_is_held_and_the_pages_for_people_name_its_new_commands(
    table: Table, start_server: StartServer, tmp_path: Path
) -> None:
    table.add([(f"first{number}", "function", "[]", f"x = '{'a' * 50_000}'") for number in range(MANY)])
    server = start_server(table.url, SNAPSHOT_DIR=str(tmp_path)).wait_ready()
    table.add([(f"zyzzyva{number}", "function", "[]", f"x = '{'b' * 60_000}'") for number in range(MANY)])
    assert server.wait_log("Catalogue held")["reason"] == "catalogue_grown"
    assert server.statusz()["catalog"]["definitions"] == MANY
    for page, names in (("/", True), ("/statusz", True), ("/readyz", False), ("/metrics", False)):
        assert ("zyzzyva" in server.http(page)[1]) is names
