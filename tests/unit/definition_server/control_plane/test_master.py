"""The master as a whole, without workers and without a database: how it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.logs import LogLines, logged

from definition_server.control_plane import master
from definition_server.settings import Settings


@pytest.mark.parametrize(("bug", "code"), [(True, 1), (False, 0)], ids=["a task fails", "a signal"])
def test_a_master_exits_with_1_after_a_bug_and_with_0_after_a_signal(
    bug: bool, code: int, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    async def fail() -> None:
        raise RuntimeError("a bug")

    def work(self: Any) -> Iterator[Any]:
        yield fail() if bug else asyncio.Event().wait()

    monkeypatch.setattr(master._Master, "_forever", work)
    monkeypatch.setattr(master.Supervisor, "start", lambda self: None)
    monkeypatch.setattr(master, "_exit_at_the_latest", lambda seconds, code: None)
    settings = Settings.model_validate(
        {
            "DATABASE_URL": "postgresql://u:x@127.0.0.1:1/db",
            "METRICS_HOST": "127.0.0.1",
            "METRICS_PORT": 0,
            "DRAIN_WAIT_SECONDS": 0,
            "WORKERS": 1,
        }
    )

    async def run() -> Any:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            server = master._Master(settings, holder, None, hangup_stops=False)
            if not bug:
                asyncio.get_running_loop().call_soon(server._on_stop, master.signal.SIGTERM)
            return await server.run()

    assert asyncio.run(run()) == code
    assert len(logged(logs, "The master failed; leaving")) == int(bug)
    assert logged(logs, "Stopped")
