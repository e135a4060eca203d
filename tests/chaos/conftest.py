"""Stages for drills, and their table at the end of the run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.drills.run import PLAYED, RED
from tests.chaos.drills.stage import Stage, open_stage
from tests.chaos.drills.table import text_table, to_json
from tests.support.providers import DatabaseServer

MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(transport: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStage]:
    """``make_stage(database=None, rows=100, size=200, broken="", **settings)``, on each transport in turn.

    Without a database: one of the session's server, which no drill may break.
    """
    with ExitStack() as stack:
        count = 0

        def make(database: DatabaseServer | None = None, **options: Any) -> Stage:
            nonlocal count
            count += 1
            directory = tmp_path / f"stage{count}"
            directory.mkdir()
            chosen = {"transport": transport} | options
            server = request.getfixturevalue("postgres") if database is None else database
            return stack.enter_context(open_stage(server, directory, **chosen))

        yield make


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The tables of all drills that were played; as JSON too, into the file that ``DRILLS_JSON`` names."""
    if PLAYED:
        terminalreporter.section("drills")
        terminalreporter.write_line(text_table(PLAYED))
    if RED:
        terminalreporter.section("drills on servers that are broken on purpose: each must be BROKEN")
        terminalreporter.write_line(text_table(RED))
    if path := os.environ.get("DRILLS_JSON"):
        told = {"drills": [to_json(each) for each in PLAYED], "red": [to_json(each) for each in RED]}
        Path(path).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
