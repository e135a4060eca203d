"""``python -m perf``: one command, whose help names every measurement and what it needs."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from perf import commands
from perf.commands import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_main_that_takes_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"{name}: {COMMANDS[name].does}.\n")
    assert COMMANDS[name].takes in told
    assert COMMANDS[name].needs in told
    assert "usage: python -m perf " in told


def test_help_without_a_command_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for name, each in COMMANDS.items():
        assert f"  {name} " in told
        assert each.takes in told
        assert each.needs in told


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == commands.UNKNOWN
    assert "usage: python -m perf COMMAND" in capsys.readouterr().out


def test_an_unknown_command_is_answered_with_those_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mesure"]) == commands.UNKNOWN
    told = capsys.readouterr()
    assert told.out == ""
    assert "'mesure'" in told.err
    assert "measure, report, witness" in told.err


def test_options_reach_the_command_after_its_own_first_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    found = SimpleNamespace(main=lambda arguments: given.append(arguments) or 7)
    monkeypatch.setattr(commands, "import_module", lambda name: found)
    assert main(["attacks", "--quick"]) == 7
    assert given == [["--only", "attacks", "--name", "native-attacks", "--quick"]]


STARTED_BY_OTHERS = {
    "perf.commands", "perf.__main__",
    "perf.benches.delayed", "perf.benches.steady_load", "perf.generator.process", "perf.harness.serve",
    "perf.harness.reference_work", "perf.harness.slowed", "perf.peers.grpcio.server",
}  # fmt: skip
"""Modules with a ``main`` that a measurement starts as a process of its own; and the command itself."""


def test_every_module_with_a_main_is_a_command_or_started_by_one() -> None:
    """A measurement that only its own module name starts would be missing in the help."""
    root = Path(commands.__file__).parent
    found = {
        "perf." + ".".join(path.relative_to(root).with_suffix("").parts)
        for path in root.rglob("*.py")
        if re.search(r"^def main\(|^if __name__ ==", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert found == {each.module for each in COMMANDS.values()} | STARTED_BY_OTHERS
