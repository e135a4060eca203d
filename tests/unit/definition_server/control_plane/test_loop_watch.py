"""The answer of ``/livez``: whether the master's event loop runs."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from tests.support.logs import LogLines, logged

from definition_server.control_plane import loop_watch
from definition_server.control_plane.loop_watch import LoopWatch
from definition_server.control_plane.supervisor import TICK_SECONDS


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock in seconds, which the test sets."""
    made = [100.0]
    monkeypatch.setattr(loop_watch, "time", SimpleNamespace(monotonic=lambda: made[0]))
    return made


def test_a_loop_that_has_not_run_for_thirty_seconds_is_a_problem(clock: list[float]) -> None:
    watch = LoopWatch()
    clock[0] += 29.9
    assert watch.problem() is None
    clock[0] += 0.1
    assert watch.problem() == "the master's event loop has not run for 30 s"


@pytest.mark.parametrize(("pause", "reported"), [(4.9, []), (5.0, [5.0]), (3600.04, [3600.0])])
async def test_a_pause_of_five_seconds_is_logged_when_it_is_over(
    pause: float, reported: list[float], clock: list[float], logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = iter([0.1, pause, 0.1])

    async def sleep(_: float) -> None:
        if (seconds := next(pauses, None)) is None:
            raise asyncio.CancelledError
        clock[0] += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    watch = LoopWatch()
    clock[0] += 60.0  # a slow start is no pause
    with pytest.raises(asyncio.CancelledError):
        await watch.run()
    lines = logged(logs, "The master did not run", log_level="warning")
    assert [line["seconds"] for line in lines] == reported
    assert all(line["effect"] and line["remedy"] for line in lines)


async def test_a_loop_that_runs_is_noted_at_every_tick(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        if len(slept) == 3:
            raise asyncio.CancelledError
        slept.append(seconds)
        clock[0] += 20.0

    monkeypatch.setattr(asyncio, "sleep", sleep)
    watch = LoopWatch()
    with pytest.raises(asyncio.CancelledError):
        await watch.run()
    assert slept == [TICK_SECONDS] * 3
    assert watch.problem() is None
    clock[0] += 30.0
    assert watch.problem() is not None
