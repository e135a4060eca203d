"""The control socket: the cost of its clients is limited."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.support.loop import eventually

from definition_server.control_plane import control_server
from definition_server.control_plane.control_server import SERVICE, ControlServer


class Recorder:
    """Stands for the engine's server, and notes the arguments with which it is made."""

    made: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        Recorder.made = options

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        assert (service, handlers) == (SERVICE, {})

    def add_listener(self, listening: Any, *, objection: Any) -> None:
        listening.close()

    async def start(self) -> None:
        pass

    async def stop(self, grace: float) -> None:
        assert grace <= 0.2


async def test_requests_connections_and_calls_on_the_control_socket_are_limited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "Server", Recorder)
    server = ControlServer(tmp_path / "control.sock", dict)
    running = asyncio.create_task(server.run())
    await eventually(lambda: server.state == "open", "the socket is open")
    await server.close()
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    limits = Recorder.made.pop("limits")
    assert (limits.max_message, limits.max_buffered, limits.max_unread) == (16_384, 65_536, 262_144)
    assert limits.max_held == 4_194_304
    assert Recorder.made == {"max_connections": 32, "max_concurrent_calls": 16, "first_call_timeout": 10.0}
