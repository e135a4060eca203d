"""Pins, acceptances, releases and exports on a real server, by command and by policy file."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from tests.conftest import StartServer
from tests.support.load import Load
from tests.support.operator_command import answer, run
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

pytestmark = [pytest.mark.any_transport, pytest.mark.slow]

MANY = 40


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "snapshots"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """A policy file in the form of a mounted ConfigMap of Kubernetes: a link through a directory that is swapped."""
    swap(tmp_path / "policy", "")
    return tmp_path / "policy" / "policy.toml"


def swap(folder: Path, text: str) -> None:
    data = folder / f"..{time.time_ns()}"
    data.mkdir(parents=True)
    (data / "policy.toml").write_text(text)
    (folder / "..new").symlink_to(data.name)
    (folder / "..new").replace(folder / "..data")
    if not (folder / "policy.toml").is_symlink():
        (folder / "policy.toml").symlink_to("..data/policy.toml")


@pytest.fixture
def server(start_server: StartServer, table: Table, directory: Path, policy: Path) -> ServerProcess:
    table.add_commands(MANY)
    running = start_server(table.url, SNAPSHOT_DIR=str(directory), PUBLICATION_POLICY=str(policy)).wait_ready()
    running.wait_log("Control socket open")
    return running


def served(server: ServerProcess) -> set[str]:
    return {worker["version_hash"] for worker in server.statusz()["workers"]}


def publish(server: ServerProcess, change: Callable[[], None]) -> tuple[str, str]:
    """The versions before and after ``change`` of the table."""
    [before] = served(server)
    change()
    until(lambda: served(server).isdisjoint({before}), server.tail)
    until(lambda: len(served(server)) == 1, server.tail)
    return before, next(iter(served(server)))


def test_a_mass_delete_is_held_and_accept_releases_it_on_every_worker_within_a_second(
    server: ServerProcess, table: Table, directory: Path
) -> None:
    table.run("DELETE FROM obex_dapl_functions WHERE name <> 'command1'")
    held = server.wait_log("Catalogue held")["version_hash"]
    assert answer("status", directory=directory)["held_catalogue"]["version_hash"] == held
    assert server.statusz()["catalog"]["definitions"] == MANY
    refused = run("accept", "0" * 64, directory=directory)
    assert refused.returncode == 3
    assert held in refused.stderr
    accepted = answer("accept", held[:8], directory=directory)
    assert accepted["version_hash"] == held
    assert accepted["seconds"] < 1
    assert served(server) == {held}
    assert "held_catalogue" not in answer("status", directory=directory)


def test_a_pin_reaches_every_worker_within_a_second_and_after_it_the_table_is_served(
    server: ServerProcess, table: Table, directory: Path
) -> None:
    before, after = publish(server, lambda: table.add_commands(1, start=MANY))
    difference = answer("diff", before[:8], after, directory=directory)
    assert difference["added"] == [f"command{MANY}"]
    versions = answer("history", directory=directory)["versions"]
    assert [each["version_hash"] for each in versions] == [after, before]
    assert versions[0]["changes"] == {"added": 1, "removed": 0, "changed": 0}
    pinned = answer("pin", before[:12], "--for", "1h", directory=directory)
    assert pinned["version_hash"] == before
    assert pinned["seconds"] < 1
    assert served(server) == {before}
    status = answer("status", directory=directory)
    assert status["pin"]["version_hash"] == before
    assert status["pin"]["source"] == "command"
    table.add_commands(1, start=MANY + 1)
    cycles = server.statusz()["sync"]["cycles"]["published"]
    until(lambda: sum(server.statusz()["sync"]["cycles"].values()) > cycles + 3, server.tail)
    assert served(server) == {before}
    released = answer("unpin", directory=directory)
    assert released["definitions"] == MANY + 2
    assert run("unpin", directory=directory).returncode == 1


@pytest.mark.thorough  # takes seconds
def test_a_pin_survives_a_restart_without_a_database_and_expires_by_itself(
    start_server: StartServer, server: ServerProcess, table: Table, directory: Path
) -> None:
    before, after = publish(server, lambda: table.add_commands(1, start=MANY))
    answer("pin", before, "--for", "1h", directory=directory)
    server.end()
    away = start_server(
        "postgresql://nobody@127.0.0.1:1/none",
        SNAPSHOT_DIR=str(directory),
        CONNECT_TIMEOUT_SECONDS="0.5",
    ).wait_ready()
    away.wait_log("Control socket open")
    assert served(away) == {before}
    pinned = answer("pin", after, "--for", "3s", directory=directory)
    assert pinned["version_hash"] == after
    assert pinned["seconds"] < 1
    assert served(away) == {after}
    until(lambda: "pin" not in answer("status", directory=directory), away.tail)
    away.end()


@pytest.mark.thorough  # takes seconds
def test_a_policy_swapped_by_symlink_pins_and_one_that_does_not_parse_changes_nothing(
    server: ServerProcess, table: Table, directory: Path, policy: Path
) -> None:
    before, after = publish(server, lambda: table.add_commands(1, start=MANY))
    started = time.monotonic()
    swap(policy.parent, f'[pin]\nversion = "{before}"\n')
    until(lambda: served(server) == {before}, server.tail)
    pinned_after = time.monotonic() - started
    assert answer("status", directory=directory)["pin"]["source"] == "policy"
    swap(policy.parent, "[pin\n")
    server.wait_log("Publication policy not usable; the previous one stays")
    assert served(server) == {before}
    assert any("PUBLICATION_POLICY" in notice for notice in answer("status", directory=directory)["notices"])
    refused = run("unpin", directory=directory)
    assert refused.returncode == 1
    assert "PUBLICATION_POLICY" in refused.stderr
    swap(policy.parent, "")
    until(lambda: served(server) == {after}, server.tail)
    assert answer("status", directory=directory)["notices"] == []
    assert pinned_after < 5  # it takes a second on an idle machine


@pytest.mark.thorough  # takes seconds
def test_a_policy_accepts_a_held_catalogue(server: ServerProcess, table: Table, policy: Path) -> None:
    table.run("DELETE FROM obex_dapl_functions WHERE name <> 'command1'")
    held = server.wait_log("Catalogue held")["version_hash"]
    swap(policy.parent, f'accept = ["{held[:8]}"]\n')
    until(lambda: served(server) == {held}, server.tail)


@pytest.mark.thorough  # seconds of load
def test_pins_under_load_fail_no_call(server: ServerProcess, table: Table, directory: Path) -> None:
    before, after = publish(server, lambda: table.add_commands(1, start=MANY))
    with Load(server.port, ["command1", "command2"], rate=100) as load:
        for version in (before, after, before, after):
            assert answer("pin", version, "--for", "1h", directory=directory)["version_hash"] == version
    assert load.result.offered > 50, load.result
    assert load.result.answered == load.result.offered, load.result
    assert not load.result.failed, load.result


def test_a_held_command_is_named_with_its_reason_and_hashes(
    server: ServerProcess, table: Table, directory: Path
) -> None:
    table.run("UPDATE obex_dapl_functions SET code = 'def broken(' WHERE name = 'command1'")
    [held] = until(lambda: answer("status", directory=directory)["held_commands"], server.tail)
    assert (held["name"], held["reason"]) == ("command1", "code_invalid")
    assert held["since"].endswith("Z")
    assert {len(held["hash_served"]), len(held["hash_refused"])} == {64}
    assert "command1" in run("status", directory=directory).stdout


@pytest.mark.thorough  # takes seconds
def test_a_pin_takes_effect_despite_a_full_disk_and_the_answer_states_that_it_is_not_stored(
    server: ServerProcess, table: Table, directory: Path
) -> None:
    [version] = served(server)
    moved = directory.rename(directory.with_name("moved"))
    directory.touch()  # has the effect of a full disk: nothing can be stored in a file
    pinned = answer("pin", version, "--for", "1h", "--socket", str(moved / "control.sock"), directory=directory)
    assert pinned["version_hash"] == version
    assert "wishes.json" in pinned["note"]


@pytest.mark.thorough  # takes seconds
def test_a_version_of_the_history_restores_the_table(server: ServerProcess, table: Table, directory: Path) -> None:
    before, _ = publish(
        server, lambda: table.run("UPDATE obex_dapl_functions SET code = 'pass' WHERE name = 'command3'")
    )
    done = run("export", "--sql", "--history", before[:8], directory=directory)
    assert done.returncode == 0, done.stderr
    with psycopg.connect(table.url, autocommit=True) as connection:
        connection.execute(done.stdout.encode())
    until(lambda: served(server) == {before}, server.tail)
