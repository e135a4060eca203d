"""``python -m perf``: one command, whose help lists every measurement with its requirements."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from perf import commands
from perf.commands import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_that_accepts_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{name}: {COMMANDS[name].does}.\n")
    assert COMMANDS[name].takes in told
    assert COMMANDS[name].needs in told
    assert "usage: python -m perf " in told


def test_help_without_a_command_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for name, each in COMMANDS.items():
        assert f"  {name} " in told
        assert each.takes in told
        assert each.needs in told


def test_a_missing_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == commands.UNKNOWN
    assert "usage: python -m perf COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_refused_with_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesure"]) == commands.UNKNOWN
    told = capsys.readouterr()
    assert told.out == ""
    assert "'mesure'" in told.err
    assert "measure, report, witness" in told.err


def test_options_follow_the_command_s_own_first_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    found = SimpleNamespace(main=lambda arguments: given.append(arguments) or 7)
    monkeypatch.setattr(commands, "import_module", lambda name: found)
    assert main(["floods", "--quick"]) == 7
    assert given == [["--only", "attacks", "--name", "native-attacks", "--quick"]]


STARTED_BY_OTHERS = {
    "perf.commands", "perf.__main__",
    "perf.benches.delayed", "perf.benches.steady_load", "perf.generator.process", "perf.harness.serve",
    "perf.generator.victim", "perf.attackers.process",
    "perf.harness.reference_work", "perf.harness.slowed", "perf.peers.grpcio.server",
}  # fmt: skip
"""Modules with a ``main`` that a measurement starts as a separate process, and the command itself."""


def test_every_module_with_a_main_is_a_command_or_started_by_one() -> None:
    """A measurement that is not a command is missing from the help."""
    root = Path(commands.__file__).parent
    found = {
        "perf." + ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if re.search(r"^def main\(|^if __name__ ==", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == {each.module for each in COMMANDS.values()} | STARTED_BY_OTHERS
