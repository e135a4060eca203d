"""Stages for drills, and the table of their outcomes at the end of a run, also with several processes (xdist)."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.chaos.drills.model import Outcome
from tests.chaos.drills.run import PLAYED, RED
from tests.chaos.drills.stage import Stage, open_stage
from tests.chaos.drills.table import text_table, to_json
from tests.support.providers import DatabaseServer

MakeStage = Callable[..., Stage]

_PROPERTY = "drills"
_TOLD: tuple[list[Outcome], list[Outcome]] = ([], [])
"""Outcomes on the real server, and on servers with a deliberate defect; in the process that prints the table."""


@pytest.fixture
def make_stage(transport: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MakeStage]:
    """``make_stage(database=None, rows=100, size=200, broken="", **settings)``, on each transport in turn.

    Without ``database``, the stage uses a database on the session's server, which no drill may break.
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the outcomes of a test's drills to its report, which xdist sends to the main process."""
    report = yield
    if call.when == "call" and (PLAYED or RED):
        report.user_properties.append((_PROPERTY, pickle.dumps((PLAYED, RED))))
        PLAYED.clear()
        RED.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == _PROPERTY and report.when == "call":
            assert isinstance(value, bytes)
            for told, outcomes in zip(_TOLD, pickle.loads(value), strict=True):
                told.extend(outcomes)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables of all drills of this run, and write them as JSON to the file that ``DRILLS_JSON`` names."""
    played, red = (sorted(told, key=lambda each: (each.kind, each.transport, each.database)) for told in _TOLD)
    if played:
        terminalreporter.section("drills")
        terminalreporter.write_line(text_table(played))
    if red:
        terminalreporter.section("drills on servers with a deliberate defect: each must be BROKEN")
        terminalreporter.write_line(text_table(red))
    if (path := os.environ.get("DRILLS_JSON")) and (played or red):
        told = {"drills": [to_json(each) for each in played], "red": [to_json(each) for each in red]}
        Path(path).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
