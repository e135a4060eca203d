"""The command line as a whole: every command is listed and has help, and secrets of the settings are masked."""

from __future__ import annotations

import os

import click
import pytest
from click.testing import CliRunner, Result

from definition_server.cli import client
from definition_server.cli.main import cli
from definition_server.cli.reference import settings_page

ENVIRONMENT = {"DATABASE_URL": "postgresql://u:s3cret@db/avap", "API_KEY": "s3cret", "SYNC_INTERVAL_SECONDS": "0.5"}


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(cli, arguments, env=environment)


@pytest.mark.parametrize(
    "command",
    [
        "accept",
        "capacity",
        "config",
        "demo",
        "diff",
        "export",
        "fetch",
        "get",
        "health",
        "history",
        "pin",
        "proto",
        "roll",
        "serve",
        "snapshot",
        "status",
        "sync",
        "unpin",
        "validate",
    ],
)
def test_every_command_is_listed_and_has_help(command: str) -> None:
    assert f"  {command} " in run("--help").output
    told = run(command, "--help")
    assert told.exit_code == 0
    assert told.output.startswith("Usage: ")


def test_help_of_serve_names_every_setting_of_the_declaration() -> None:
    told = run("serve", "--help").output
    for variable in ("DATABASE_URL (or DATABASE_URL_FILE)", "APP_ENV, NODE_ENV", "DRAIN_WAIT_SECONDS  [5]"):
        assert variable in told


@pytest.mark.parametrize("command", ["demo", "export", "serve", "get", "status", "sync"])
def test_no_help_page_is_wider_than_80_columns(command: str) -> None:
    told = run(command, "--help", COLUMNS="80").output
    assert [line for line in told.splitlines() if len(line) > 80] == []


def test_help_of_the_demo_has_its_own_defaults() -> None:
    told = run("demo", "--help").output
    assert "    DATABASE_URL" not in told
    assert "API_KEY (or API_KEY_FILE)  [made at each start]" in told
    assert "    HOST  [127.0.0.1]" in told


def test_help_of_export_names_the_variables_of_both_its_sources() -> None:
    told = run("export", "--help").output
    assert "API_KEY (or API_KEY_FILE)" in told
    assert "CONTROL_SOCKET" in told


def test_config_shows_the_effective_settings_and_no_secret() -> None:
    told = run("config", **ENVIRONMENT)
    assert told.exit_code == 0
    assert "********" in told.output
    assert "s3cret" not in told.output
    lines = dict(line.split() for line in told.output.splitlines() if len(line.split()) == 2)
    assert lines["SYNC_INTERVAL_SECONDS"] == "0.5"
    assert lines["SNAPSHOT_DIR"] == "unset"


def test_config_prints_the_reference_page_without_any_environment() -> None:
    assert run("config", "--reference").output == settings_page()


def test_an_unknown_command_is_a_usage_error() -> None:
    told = run("nonsense")
    assert told.exit_code == 2
    assert "No such command" in told.output


def test_grpc_logs_nothing_in_a_command_but_may_log_in_its_child_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str | None] = []

    def load(name: str) -> object:
        seen.append(os.environ.get("GRPC_VERBOSITY"))
        return client

    monkeypatch.setattr("definition_server.cli.main.import_module", load)
    for given, expected in ((None, "NONE"), ("DEBUG", "DEBUG")):
        monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
        if given is not None:
            monkeypatch.setenv("GRPC_VERBOSITY", given)
        assert cli.get_command(click.Context(cli), "get") is client.get
        assert seen.pop() == expected
        assert os.environ.get("GRPC_VERBOSITY") == given
