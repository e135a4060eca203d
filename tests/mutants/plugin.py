"""A pytest plugin, ``-p tests.mutants.plugin``: which tests run, in which order, and what they show.

Without options it does nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import coverage
import pytest
from coverage.config import CoverageConfig

_CHILDREN = "COVERAGE_PROCESS_CONFIG"
"""The variable by which coverage measures child processes."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mutants")
    group.addoption("--selection", type=Path, help="run only the tests whose ids, or functions, the file lists (JSON)")
    group.addoption("--outcomes", type=Path, help="write test id -> [outcome, seconds, error] there (JSON)")


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("outcomes")
    if path is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(path))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the selected tests, in the order of the selection. An id without parameters selects the whole function."""
    path: Path | None = config.getoption("selection")
    if path is None:
        return
    places = {name: place for place, name in enumerate(json.loads(path.read_text("utf-8")))}

    def place(item: pytest.Item) -> int | None:
        return places.get(item.nodeid, places.get(item.nodeid.partition("[")[0]))

    config.hook.pytest_deselected(items=[item for item in items if place(item) is None])
    items[:] = sorted((item for item in items if place(item) is not None), key=lambda item: place(item) or 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """If coverage is measured, note for each line the test that runs it, in this process or in a child process."""
    measured = coverage.Coverage.current()
    if measured is None:
        return (yield)
    measured.switch_context(item.nodeid)
    if (children := os.environ.get(_CHILDREN)) is not None:
        config = CoverageConfig.deserialize(children)
        config.context = item.nodeid
        os.environ[_CHILDREN] = config.serialize()
    result = yield
    measured.switch_context("")
    return result


class Outcomes:
    """Writes the outcome of each test, at the end of the session."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._of: dict[str, list[Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a phase of a test: the worst outcome is kept, and the seconds are added up."""
        outcome = self._of.setdefault(report.nodeid, ["passed", 0.0, ""])
        outcome[1] = round(outcome[1] + report.duration, 3)
        if report.failed:
            outcome[0], outcome[2] = "failed", report.longreprtext[-400:]
        elif report.skipped and outcome[0] == "passed":
            outcome[0] = "skipped"

    def pytest_sessionfinish(self) -> None:
        self._path.write_text(json.dumps(self._of), "utf-8")
