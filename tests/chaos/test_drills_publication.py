"""Drills of publication. A client that accepts a catalogue only as a whole, as the AVAP language server does, can
refresh after any change of the table. Each drill is also played on a server without the protection, and must fail
there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from tests.conftest import StartServer
from tests.support import wire
from tests.support.client import Client
from tests.support.operator_command import answer
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

COMMANDS = 40
INTERVAL = 0.3
LATE_SECONDS = 30.0

pytestmark = pytest.mark.any_transport

UNGATED = {"GATE_CODE": "off", "GATE_INTERFACE": "off"}
UNGUARDED = {"GUARD_MAX_REMOVED_PERCENT": "100", "GUARD_MAX_GROWTH_PERCENT": "1000000"}


class StrictClient(threading.Thread):
    """A client that refreshes all the time; it compiles and parses all definitions in one ``try``."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._ends = threading.Event()
        self.catalogue: dict[str, str] = {}
        """Name → code, of the last refresh that succeeded."""
        self.refreshes = 0
        self.failures: list[str] = []

    def run(self) -> None:
        """Refresh until `stop`."""
        with Client(self._port) as client:
            while not self._ends.wait(0.05):
                try:
                    commands = client.sync().commands
                    for command in commands:
                        compile(command.code, command.name, "exec")
                        if not isinstance(json.loads(command.interface_json), list):
                            raise TypeError(f"{command.name}: no list")
                    self.catalogue = {command.name: command.code.decode() for command in commands}
                    self.refreshes += 1
                except (SyntaxError, ValueError, TypeError, grpc.RpcError) as error:
                    self.failures.append(f"{type(error).__name__}: {error}")

    def stop(self) -> None:
        """End the thread."""
        self._ends.set()
        self.join(30)


@contextmanager
def strict_client(server: ServerProcess) -> Iterator[StrictClient]:
    client = StrictClient(server.port)
    client.start()
    try:
        until(lambda: client.refreshes > 2, server.tail)
        yield client
    finally:
        client.stop()


@pytest.fixture
def filled(table: Table) -> Table:
    table.add_commands(COMMANDS)
    return table


@pytest.fixture
def usual_settings(tmp_path: Path) -> dict[str, str]:
    return {"SYNC_INTERVAL_SECONDS": str(INTERVAL), "SNAPSHOT_DIR": str(tmp_path), "WORKERS": "2"}


def update(table: Table, number: int, code: str) -> None:
    table.run("UPDATE obex_dapl_functions SET code = %s WHERE name = %s", (code, f"command{number}"))


def poison(table: Table) -> None:
    """Write a row that does not compile, a row whose interface does not parse, and two good changes."""
    table.run(
        "UPDATE obex_dapl_functions SET code = CASE name WHEN 'command0' THEN 'if' WHEN 'command1' THEN code "
        "ELSE 'x = 1' END, interface = CASE name WHEN 'command1' THEN '{not json' ELSE interface END "
        "WHERE name IN ('command0', 'command1', 'command2', 'command3')"
    )


def test_a_poisoned_row_stops_no_refresh_and_the_others_advance(filled: Table, start_server: StartServer) -> None:
    server = start_server(filled.url).wait_ready()
    with strict_client(server) as client:
        good = client.catalogue
        poison(filled)
        until(lambda: client.catalogue["command3"] == "x = 1", server.tail, seconds=LATE_SECONDS)
        assert client.catalogue["command2"] == "x = 1"
        assert client.catalogue["command0"] == good["command0"]
        assert client.catalogue["command1"] == good["command1"]
        assert sum(server.metric("avap_rows_held", reason=why) for why in ("code_invalid", "interface_invalid")) == 2
        update(filled, 0, "x = 2")
        until(lambda: client.catalogue["command0"] == "x = 2", server.tail, seconds=LATE_SECONDS)
    assert client.failures == []


def test_without_the_gate_a_poisoned_row_stops_every_refresh(filled: Table, start_server: StartServer) -> None:
    server = start_server(filled.url, **UNGATED).wait_ready()
    with strict_client(server) as client:
        poison(filled)
        until(lambda: len(client.failures) > 2, server.tail, seconds=LATE_SECONDS)
        assert client.catalogue["command3"] != "x = 1"


def delete_most(table: Table) -> None:
    table.run("DELETE FROM obex_dapl_functions WHERE name <> 'command0'")


def double(table: Table) -> None:
    """Add a copy of each row under another name, with large code: over 1 MiB more."""
    table.run(
        "INSERT INTO obex_dapl_functions (name, type, interface, code) "
        "SELECT name || '_copy', type, interface, '#' || repeat('x', 60000) FROM obex_dapl_functions"
    )


@pytest.mark.parametrize("accident", [delete_most, double], ids=["mass_delete", "doubled_table"])
def test_an_accident_is_held_and_the_client_keeps_the_whole_catalogue(
    filled: Table, start_server: StartServer, accident: object
) -> None:
    assert callable(accident)
    server = start_server(filled.url).wait_ready()
    with strict_client(server) as client:
        before = client.catalogue
        accident(filled)
        server.wait_log("Catalogue held")
        refreshes = client.refreshes
        until(lambda: client.refreshes > refreshes + 5, server.tail, seconds=LATE_SECONDS)
        assert client.catalogue == before
        until(lambda: server.metric("avap_fresh") == 0, server.tail)
        assert server.statusz()["ready"]
        with Client(server.port) as probe:
            until(lambda: probe.health("avap.freshness") == "NOT_SERVING", server.tail)
            assert probe.health() == "SERVING"
        filled.run("TRUNCATE obex_dapl_functions")
        filled.add_commands(COMMANDS)
        until(lambda: server.metric("avap_fresh") == 1, server.tail, seconds=LATE_SECONDS)
        until(
            lambda: (
                [event["kind"] for event in server.statusz()["events"]][:2] == ["catalogue_released", "catalogue_held"]
            ),
            server.tail,
        )
    assert client.failures == []
    assert client.catalogue == before


@pytest.mark.parametrize(
    ("accident", "left"), [(delete_most, 1), (double, 2 * COMMANDS)], ids=["mass_delete", "doubled_table"]
)
def test_without_the_guard_an_accident_reaches_the_client(
    filled: Table, start_server: StartServer, accident: object, left: int
) -> None:
    assert callable(accident)
    server = start_server(filled.url, **UNGUARDED).wait_ready()
    with strict_client(server) as client:
        accident(filled)
        until(lambda: len(client.catalogue) == left, server.tail, seconds=LATE_SECONDS)


# -- changes that no row shows -----------------------------------------------------------------------------------------

BROKEN = str(Path(__file__).parent / "broken")


def defect(name: str) -> dict[str, str]:
    """The settings of a server with a defect of `broken/database_variants.py`."""
    return {"PYTHONPATH": BROKEN, "PYTHON_DRILL_BROKEN": name}


@contextmanager
def reader(table: Table) -> Iterator[str]:
    """A URL for a role that reads the table and owns nothing, so that policies apply to the role."""
    parts = urlsplit(table.url)
    name = f"drill_reader_{parts.path[1:]}"
    table.run(f"CREATE ROLE {name} LOGIN PASSWORD 'reader'; GRANT SELECT ON obex_dapl_functions TO {name}")
    host = f"{parts.hostname}:{parts.port}" if parts.port else parts.hostname or ""
    try:
        yield parts._replace(netloc=f"{name}:reader@{host}").geturl()
    finally:
        table.run(f"DROP OWNED BY {name}; DROP ROLE {name}")


def hide_half(table: Table) -> None:
    table.run("CREATE POLICY half ON obex_dapl_functions USING (id % 2 = 0)")
    table.run("ALTER TABLE obex_dapl_functions ENABLE ROW LEVEL SECURITY")


def test_rows_that_a_policy_hides_are_still_served(filled: Table, start_server: StartServer) -> None:
    with reader(filled) as url:
        server = start_server(url).wait_ready()
        with strict_client(server) as client:
            before = client.catalogue
            hide_half(filled)
            until(lambda: server.statusz()["sync"]["last_error"] == "rows_hidden", server.tail, seconds=LATE_SECONDS)
            refreshes = client.refreshes
            until(lambda: client.refreshes > refreshes + 5, server.tail, seconds=LATE_SECONDS)
            assert client.catalogue == before
            until(lambda: server.metric("avap_fresh") == 0, server.tail, seconds=LATE_SECONDS)
            filled.run("ALTER TABLE obex_dapl_functions DISABLE ROW LEVEL SECURITY")
            update(filled, 3, "x = 3")
            until(lambda: client.catalogue["command3"] == "x = 3", server.tail, seconds=LATE_SECONDS)
        assert client.failures == []


def test_a_server_that_serves_only_the_visible_rows_loses_half_of_the_catalogue(
    filled: Table, start_server: StartServer
) -> None:
    with reader(filled) as url:
        server = start_server(url, **UNGUARDED, **defect("serves_what_policies_leave")).wait_ready()
        with strict_client(server) as client:
            hide_half(filled)
            until(lambda: len(client.catalogue) == COMMANDS // 2, server.tail, seconds=LATE_SECONDS)


PARTITIONS = """
DROP TABLE obex_dapl_functions;
CREATE TABLE obex_dapl_functions (id int, name text, type text, interface text, code text) PARTITION BY LIST (id);
CREATE TABLE present PARTITION OF obex_dapl_functions FOR VALUES IN (1);
CREATE TABLE next (LIKE present);
WITH written AS (INSERT INTO present VALUES (1, 'if', 'function', '[]', 'x = 1'))
INSERT INTO next VALUES (1, 'if', 'function', '[]', 'x = 2')
"""
"""Both rows are written by one statement: neither place nor transaction tells them apart."""

SWAP = """
BEGIN; ALTER TABLE obex_dapl_functions DETACH PARTITION present;
ALTER TABLE obex_dapl_functions ATTACH PARTITION next FOR VALUES IN (1); COMMIT
"""


@pytest.mark.parametrize("variant", ["", "sees_rows_alone"], ids=["as_it_is", "where_rows_alone_are_checked"])
def test_a_partition_that_replaces_another_is_served(table: Table, start_server: StartServer, variant: str) -> None:
    table.run(PARTITIONS)
    server = start_server(table.url, **(defect(variant) if variant else {})).wait_ready()
    with strict_client(server) as client:
        assert client.catalogue == {"if": "x = 1"}
        table.run(SWAP)
        if variant:
            cycles = server.metric("avap_sync_cycles_total", outcome="unchanged")
            until(lambda: server.metric("avap_sync_cycles_total", outcome="unchanged") > cycles + 3, server.tail)
            assert client.catalogue == {"if": "x = 1"}
        else:
            until(lambda: client.catalogue == {"if": "x = 2"}, server.tail, seconds=LATE_SECONDS)
    assert client.failures == []


# -- pins --------------------------------------------------------------------------------------------------------------


def version_of(server: ServerProcess) -> str:
    return str(server.statusz()["catalog"]["version_hash"])


def mount(directory: Path, number: int, text: str) -> Path:
    """A policy file as the kubelet mounts it: a link to a directory, which is replaced by renaming another link."""
    content = directory / f"data{number}"
    content.mkdir(parents=True)
    (content / "policy.toml").write_text(text)
    link = directory / "new"
    link.symlink_to(content)
    link.rename(directory / "current")
    path = directory / "policy.toml"
    if not path.is_symlink():
        path.symlink_to(Path("current") / "policy.toml")
    return path


@pytest.mark.parametrize("declared", [True, False], ids=["as_it_is", "where_no_policy_is_read"])
def test_a_pin_by_a_policy_that_is_swapped_by_symlink_holds_under_load(
    filled: Table, start_server: StartServer, tmp_path: Path, declared: bool
) -> None:
    policy = mount(tmp_path / "policy", 0, "")
    settings = {"PUBLICATION_POLICY": str(policy)} if declared else {}
    server = start_server(filled.url, **settings).wait_ready()
    with strict_client(server) as client:
        first, good = version_of(server), client.catalogue
        update(filled, 5, "x = 1")
        until(lambda: client.catalogue["command5"] == "x = 1", server.tail, seconds=LATE_SECONDS)
        mount(tmp_path / "policy", 1, f'[pin]\nversion = "{first}"\n')
        if not declared:
            update(filled, 6, "x = 6")
            until(lambda: client.catalogue["command6"] == "x = 6", server.tail, seconds=LATE_SECONDS)
            return
        until(lambda: client.catalogue == good, server.tail, seconds=LATE_SECONDS)
        update(filled, 6, "x = 6")
        server.wait_log("Catalogue waits for the end of the pin")
        assert client.catalogue == good
        mount(tmp_path / "policy", 2, "")
        until(lambda: client.catalogue["command6"] == "x = 6", server.tail, seconds=LATE_SECONDS)
        assert client.catalogue["command5"] == "x = 1"
    assert client.failures == []


@pytest.mark.parametrize("variant", ["", "loses_the_pin_in_a_cycle"], ids=["as_it_is", "where_a_cycle_ends_it"])
def test_a_pin_by_command_holds_while_the_table_changes_and_is_poisoned(
    filled: Table, start_server: StartServer, tmp_path: Path, variant: str
) -> None:
    server = start_server(filled.url, **(defect(variant) if variant else {})).wait_ready()
    server.wait_log("Control socket open")
    with strict_client(server) as client:
        first, good = version_of(server), client.catalogue
        update(filled, 5, "x = 1")
        until(lambda: client.catalogue["command5"] == "x = 1", server.tail, seconds=LATE_SECONDS)
        assert answer("pin", first[:12], "--for", "1h", directory=tmp_path)["version_hash"] == first
        if variant:
            until(lambda: client.catalogue["command5"] == "x = 1", server.tail, seconds=LATE_SECONDS)
            return
        refreshes = client.refreshes
        until(lambda: client.refreshes > refreshes + 1, server.tail, seconds=LATE_SECONDS)
        assert client.catalogue == good
        poison(filled)
        server.wait_log("Catalogue waits for the end of the pin")
        cycles = server.metric("avap_sync_cycles_total", outcome="unchanged")
        until(lambda: server.metric("avap_sync_cycles_total", outcome="unchanged") > cycles + 3, server.tail)
        assert client.catalogue == good
        answer("unpin", directory=tmp_path)
        until(lambda: client.catalogue["command3"] == "x = 1", server.tail, seconds=LATE_SECONDS)
        assert client.catalogue["command5"] == "x = 1"
        assert client.catalogue["command0"] == good["command0"]
    assert client.failures == []


def excesses_of(server: ServerProcess, table: Table, changes: int) -> list[float]:
    """For each of ``changes``: the measured delay minus the least possible true delay, in seconds."""
    request = wire.command_request(b"command7")
    excesses = []
    with Client(server.port) as client:
        for number in range(changes):
            code = f"x = {number} # changed"
            update(table, 7, code)
            committed = old = time.monotonic()
            while code.encode() not in client.raw("GetCommand", request):
                old = time.monotonic()
                assert old < committed + LATE_SECONDS, server.tail()
                time.sleep(0.005)  # it limits the error of `old`
            until(lambda number=number: sum(server.statusz()["propagation"]["counts"]) == number + 1, server.tail)
            # The old code was served until `old` at least, so the true delay is the difference or more.
            excesses.append(server.statusz()["propagation"]["last_seconds"] - (old - committed))
    return excesses


def is_never_less(excesses: list[float]) -> bool:
    return min(excesses) >= 0


def is_at_most_a_second_more(excesses: list[float]) -> bool:
    """The excess may be longer than the time between two checks, because some checks are late on a shared machine."""
    return sum(excess <= 1.0 for excess in excesses) >= 0.95 * len(excesses)


PROVED = {"WORKERS": "1", "SYNC_INTERVAL_SECONDS": "0.2"}


@pytest.mark.thorough  # half a minute of waiting for cycles
def test_the_measured_delay_of_100_changes_exceeds_the_true_delay_by_a_second_at_most(
    filled: Table, start_server: StartServer
) -> None:
    excesses = excesses_of(start_server(filled.url, **PROVED).wait_ready(), filled, 100)
    assert is_never_less(excesses)
    assert is_at_most_a_second_more(excesses), sorted(excesses)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("variant", "promise"),
    [
        ("times_the_check_that_finds_a_change", is_never_less),
        ("measures_two_checks_back", is_at_most_a_second_more),
    ],
    ids=["from_the_wrong_check", "from_long_before"],
)
def test_a_server_that_measures_delays_wrongly_fails_the_drill_of_delays(
    filled: Table, start_server: StartServer, variant: str, promise: Callable[[list[float]], bool]
) -> None:
    server = start_server(filled.url, **PROVED, **defect(variant)).wait_ready()
    assert not promise(excesses_of(server, filled, 10))
