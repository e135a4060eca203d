"""The operator's commands without a server: the arguments that they accept, and how an answer is shown."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import socket
import threading
from contextlib import ExitStack, redirect_stdout, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from definition_server.cli import control, control_output, control_socket, exits
from definition_server.cli.main import cli
from definition_server.cli.status import _print_status_tables, _since, _status_facts
from definition_server.rpc import avap_control_pb2 as pb


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, arguments, env=environment)


COMMANDS = [("status",), ("history",), ("diff", "a" * 8, "b" * 8), ("accept", "a" * 8), ("unpin",), ("sync",)]
COMMANDS += [("roll",), ("pin", "a" * 8, "--for", "2h")]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_without_a_server_each_command_names_the_path_and_a_remedy(arguments: tuple[str, ...], tmp_path: Path) -> None:
    for made in (False, True):
        if made:  # the file that a killed server left behind
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(str(tmp_path / "control.sock"))
        found = run(*arguments, SNAPSHOT_DIR=str(tmp_path))
        assert found.exit_code == 69, found.output
        assert str(tmp_path / "control.sock") in found.output
        assert "CONTROL_SOCKET" in found.output


ODD_NAMES = {
    "blank": "a b",
    "percent_escape": "a%41",
    "query": "a?b",
    "fragment": "a#b",
    "colon": "a:b",
    "not_ascii": "\u00e9",
    "not_utf_8": os.fsdecode(b"a\xffb"),
}


@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
def test_a_command_calls_the_socket_at_exactly_its_path(tmp_path: Path, name: str) -> None:
    called: list[str] = []

    def close_the_first(listening: socket.socket) -> None:
        with suppress(OSError):
            connection, _ = listening.accept()
            connection.close()
            called.append(os.fsdecode(listening.getsockname()))

    with ExitStack() as stack:
        threads = []
        for path in (tmp_path / name, *({tmp_path / "a", tmp_path / "aA"})):
            listening = stack.enter_context(socket.socket(socket.AF_UNIX))
            listening.bind(os.fsencode(path))
            listening.listen()
            threads.append(threading.Thread(target=close_the_first, args=(listening,)))
            threads[-1].start()
            stack.callback(listening.shutdown, socket.SHUT_RDWR)
        assert run("status", "--socket", str(tmp_path / name), "--timeout", "20").exit_code == 69
    for thread in threads:
        thread.join(20)
    assert called == [str(tmp_path / name)]


def test_a_master_that_does_not_answer_in_time_is_named_as_stopped_or_busy(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "control.sock"))
        listening.listen()  # the kernel accepts connections for a process that is stopped
        found = run("status", "--timeout", "0.2", SNAPSHOT_DIR=str(tmp_path))
    assert found.exit_code == 69
    assert "the master is stopped or busy" in found.output
    assert "definition-server status" not in found.output, "the remedy is the command that has just failed"


def test_a_socket_in_a_directory_of_another_account_is_refused_with_the_account_to_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, **_: object) -> os.stat_result:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    with monkeypatch.context() as refused:  # root, as whom tests may run, may read every directory
        refused.setattr(control_socket.Path, "stat", refuse)
        found = run("status", "--socket", str(tmp_path / "control.sock"))
    assert found.exit_code == 4
    assert f"as uid {os.geteuid()}, may not reach {tmp_path / 'control.sock'}" in found.output
    assert "Start it" not in found.output


def test_a_socket_path_without_a_directory_is_shown_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path / "control.sock") in run("status", "--socket", "control.sock").output


def test_a_command_without_a_socket_path_asks_for_the_path(tmp_path: Path) -> None:
    found = run("status")
    assert found.exit_code == 78
    assert "SNAPSHOT_DIR" in found.output
    assert run("status", "--socket", str(tmp_path / "x")).exit_code == 69
    (tmp_path / "file").write_text("")
    assert run("status", "--socket", str(tmp_path / "file")).exit_code == 2


@pytest.mark.parametrize("text", ["", "1234567", "g" * 8, "a" * 65, "../../etc", "12345678\n9"])
def test_a_text_that_is_not_a_version_is_refused_before_the_server_is_called(text: str) -> None:
    assert run("accept", "--socket", "x", "--", text).exit_code == 2


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("2h", 7200), ("1h30m", 5400), ("7d", 604_800), ("1w", 604_800)]
)
def test_the_length_of_a_pin_is_read_in_every_unit(text: str, seconds: int) -> None:
    end = control._end_of(text, None)
    assert abs((end - datetime.now(UTC)).total_seconds() - seconds) < 5


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "1.5h", "0s", "2 h", "9999999999w", "2h!", "\u0662h"])
def test_a_length_that_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(click.UsageError):
        control._end_of(text, None)


@pytest.mark.parametrize("text", ["tomorrow", "2001-01-01T00:00Z", "2999-01-01T00:00Z", "2026-12-01T00:00", "\x1b[31m"])
def test_an_end_that_is_not_understood_is_refused_without_control_characters(text: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        control._end_of(None, text)
    assert "\x1b" not in refused.value.message


def test_a_pin_needs_exactly_one_end() -> None:
    soon = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    assert control._end_of(None, soon).tzinfo is UTC
    for both in ((None, None), ("1h", soon)):
        with pytest.raises(click.UsageError):
            control._end_of(*both)


def full_status() -> pb.Status:
    now = 1_764_460_800
    status = pb.Status(server_version="1.2.3", pid=7, ready=True)
    status.engine = "compiled"
    status.started_at.seconds = now
    status.served.version_hash, status.served.definitions, status.served.generation = "ab" * 32, 189, 4
    status.served.created_at.seconds = now
    status.fresh, status.freshness_reason = False, "the last successful check is older than two intervals of the sync"
    status.safe_to_restart.safe, status.safe_to_restart.reason = True, "the same catalogue is stored"
    status.sync.last_outcome, status.sync.last_error = "failed", "the server closed the connection " * 6
    status.sync.cycles["failed"] = 1 << 40
    status.pin.version_hash, status.pin.source = "ab" * 32, "command"
    status.held_catalogue.version_hash, status.held_catalogue.reason = "cd" * 32, "188 of 189 commands would vanish"
    status.held_commands.add(name="\x1b[31mred", reason="code_invalid", hash_served="ef" * 32)
    status.database.hosts.extend(["a.example:5432", "b.example:5432"])
    status.database.name, status.database.role, status.database.connected_to = "avap", "reader", "b.example:5432"
    status.workers.add(number=0, pid=8, state="serving", version_hash="ab" * 32)
    status.keys.add(id="default")
    status.certificates.add(name="server").expires.seconds = now
    status.history.add(version_hash="ab" * 32, served=True, definitions=189)
    status.notices.append("the last-known-good snapshot is not stored: no space left on the device")
    return status


class Answering:
    """A stand-in for the `Master` service with one answer."""

    def __init__(self, path: Path, timeout: float) -> None:
        pass

    def call(self, method: str, request: object) -> pb.Status:
        return full_status()


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_socket, "Master", Answering)


def test_status_in_a_pipe_shows_each_value_on_its_own_line(answering: None) -> None:
    shown = run("status", "--socket", "x").output
    for text in ("ab" * 32, "cd" * 32, "code_invalid", "default", "safe to restart", "not stored", "until `unpin`"):
        assert text in shown
    assert "\x1b" not in shown
    assert "2025-11-30T00:00:00Z" in shown


def test_every_table_in_a_pipe_begins_with_the_names_of_its_columns(answering: None) -> None:
    blocks = run("status", "--socket", "x").output.split("\n\n")[1:]
    heads = {block.splitlines()[0]: block.splitlines()[1].split("\t") for block in blocks}
    assert heads["workers:"] == ["worker", "pid", "state", "version", "connections", "restarts", "jail"]
    assert heads["held commands:"] == ["name", "reason", "since", "served", "refused"]
    assert heads["history:"] == ["", "version", "published", "definitions", "changes"]
    assert heads["keys:"] == ["id", "last used"]
    assert heads["certificates:"] == ["name", "expires"]


@pytest.mark.parametrize("columns", [40, 60])
def test_on_a_narrow_terminal_no_column_is_cut_off_and_no_word_broken(
    answering: None, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    for module in (control_output, exits):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
    shown = run("status", "--socket", "x", COLUMNS=str(columns), TERM="dumb").output
    _, _, tables = shown.partition("\nheld commands")
    assert [line for line in tables.splitlines() if len(line) > columns] == []
    for text in ("code_invalid", "efefefef", "serving", "abababababababab", "2025-11-30T00:00:00Z", "not yet", "189"):
        assert text in tables
    assert re.search(r"connections: +0\n" if columns == 40 else "connections", tables)


def test_status_shows_which_form_of_the_engine_runs() -> None:
    assert dict(_status_facts(full_status()))["engine"] == "compiled"
    assert "engine" not in dict(_status_facts(pb.Status(server_version="1.2.3"))), "an older server does not say it"


def test_status_shows_which_database_is_read_and_with_which_role() -> None:
    facts = dict(_status_facts(full_status()))
    assert facts["database"] == "avap at a.example:5432, b.example:5432 (connected to b.example:5432) as reader"


def test_status_breaks_no_word_at_80_columns(answering: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (control_output, exits):
        monkeypatch.setattr(module, "on_terminal", lambda: True)
    shown = run("status", "--socket", "x", COLUMNS="80", TERM="dumb").output
    whole = " ".join(shown.split())
    assert "the server closed the connection the server closed the connection" in whole
    facts = shown.partition("held commands")[0].splitlines()
    assert [line for line in facts if len(line) > 80 and len(line.split()) > 2] == []
    assert all(len(line) <= 80 for line in shown.partition("held commands")[2].splitlines())


def test_a_fresh_status_with_a_pin_states_that_the_table_is_not_served() -> None:
    status = full_status()
    status.fresh, status.freshness_reason = True, ""
    assert "not served because of the pin" in dict(_status_facts(status))["fresh"]
    status.pin.missing = True
    assert dict(_status_facts(status))["fresh"] == "yes"


def test_since_shows_the_time_of_publication_and_not_of_building() -> None:
    served = pb.Served(version_hash="ab" * 32, generation=4)
    served.created_at.seconds, served.published_at.seconds = 1_764_460_800, 1_764_464_400
    assert _since(served, 1_764_464_402) == (
        "2025-11-30T01:00:00Z (2 s ago), built 2025-11-30T00:00:00Z (60 minutes ago), generation 4"
    )


def test_a_held_catalogue_is_shown_with_the_commands_to_compare_and_accept_it(answering: None) -> None:
    shown = run("status", "--socket", "x").output
    assert "diff abababab cdcdcdcd" in shown
    assert "accept cdcdcdcd" in shown
    assert "mend the table" in shown


def test_times_in_the_table_of_held_commands_are_not_broken_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_output, "on_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    status = pb.Status()
    held = status.held_commands.add(name="a" * 60, reason="interface_invalid", hash_served="ef" * 32)
    held.since.seconds = 1_764_460_800
    printed = io.StringIO()
    with redirect_stdout(printed):
        _print_status_tables(status)
    assert "2025-11-30T00:00:00Z" in printed.getvalue()
    assert all(len(line) <= 80 for line in printed.getvalue().splitlines())


def test_json_has_numbers_for_numbers_and_iso_8601_for_times(answering: None) -> None:
    value = json.loads(run("status", "--socket", "x", "--json").output)
    assert value["sync"]["cycles"] == {"failed": 1 << 40}
    assert value["served"]["definitions"] == 189
    assert value["started_at"] == "2025-11-30T00:00:00Z"
    assert value["history"][0]["definitions"] == 189
    assert "all_workers_at" not in value["served"]


def test_the_former_command_sync_runs_fetch_and_names_it() -> None:
    found = run("sync", "--out", "x", "--port", "1", API_KEY="k")
    assert "`fetch`" in found.output
    assert found.exit_code == 69
