"""The master as a whole, without workers and without a database: how it ends."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import end

from definition_server.control_plane import master
from definition_server.control_plane.supervisor import Supervisor
from definition_server.settings import Settings

SETTINGS = Settings.model_validate(
    {
        "DATABASE_URL": "postgresql://u:x@127.0.0.1:1/db",
        "METRICS_HOST": "127.0.0.1",
        "METRICS_PORT": 0,
        "DRAIN_WAIT_SECONDS": 0,
        "WORKERS": 2,
    }
)


@pytest.fixture
async def server() -> AsyncIterator[Any]:
    """A master that has not been started."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        made = master._Master(SETTINGS, holder, None, hangup_stops=False)
        yield made
        await made._leave([asyncio.create_task(asyncio.sleep(0))])


@pytest.mark.parametrize(("bug", "code"), [(True, 1), (False, 0)], ids=["a task fails", "a signal"])
def test_a_master_exits_with_1_after_a_bug_and_with_0_after_a_signal(
    bug: bool, code: int, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    def work(self: Any) -> Iterator[Any]:
        yield fail() if bug else asyncio.Event().wait()

    monkeypatch.setattr(master._Master, "_forever", work)
    monkeypatch.setattr(Supervisor, "start", lambda self: None)
    monkeypatch.setattr(master, "_exit_at_the_latest", lambda seconds, code: None)

    async def run() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            server = master._Master(SETTINGS, holder, None, hangup_stops=False)
            if not bug:
                asyncio.get_running_loop().call_soon(server._on_stop, signal.SIGTERM)
            return await server.run()

    assert asyncio.run(run()) == code
    assert len(logged(logs, "The master failed; leaving")) == int(bug)
    assert logged(logs, "Stopped")


@pytest.mark.parametrize(("serving", "any_serves"), [(0, False), (1, True), (2, True)])
async def test_freshness_is_judged_by_whether_any_worker_serves(server: Any, serving: int, any_serves: bool) -> None:
    seen: list[dict[str, bool]] = []
    server._proof = SimpleNamespace(tick=lambda **facts: seen.append(facts))
    server._supervisor = SimpleNamespace(
        serving=serving, report_freshness=lambda fresh: None, drain=server._supervisor.drain
    )
    proving = asyncio.create_task(server._prove())
    await asyncio.sleep(0)
    await end(proving)
    assert seen == [{"published": False, "serving": any_serves}]


@pytest.mark.parametrize(("serving", "waits"), [(2, 0.0), (1, 2.0)])
async def test_operators_are_served_once_every_worker_serves_or_two_seconds_have_passed(
    server: Any, monkeypatch: pytest.MonkeyPatch, serving: int, waits: float
) -> None:
    now = [100.0]

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(asyncio, "sleep", sleep)
    server._supervisor = SimpleNamespace(serving=serving, drain=server._supervisor.drain)
    await server._workers_serve()
    monkeypatch.undo()
    assert now[0] - 100 == pytest.approx(waits, abs=0.05)


def test_a_master_reads_a_policy_file_only_where_there_is_one(tmp_path: Path) -> None:
    for path in (None, tmp_path / "policy.toml"):
        settings = SETTINGS.model_copy(update={"publication_policy": path})
        made = master._Master._make_policy(SimpleNamespace(_settings=settings))  # type: ignore[arg-type]
        assert (made is None) is (path is None)
