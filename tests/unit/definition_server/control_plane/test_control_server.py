"""The control socket: the cost of its clients is limited."""

from __future__ import annotations

import asyncio
import threading
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


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def hanging(*_: object) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("fault", ["no thread", "a disk that hangs"])
async def test_a_socket_is_open_after_a_fault_as_it_was_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """Whether there is one and it was not looked at for a while, or there was none yet."""
    monkeypatch.setattr(control_server, "Server", Recorder)
    server = ControlServer(tmp_path / "control.sock", dict)

    async def fails() -> None:
        with monkeypatch.context() as patch:
            if fault == "no thread":
                patch.setattr(threading.Thread, "start", no_thread)
            else:
                patch.setattr(control_server, "on_disk", hanging)
                patch.setattr(control_server, "_DISK_SECONDS", 0.05)
            await server._ensure()
        if server._opening is not None:
            server._opening.cancel()
            server._opening = None

    await fails()
    assert server.state == "unavailable"
    assert server.problem is not None
    assert "thread" in server.problem or "disk" in server.problem
    await server._ensure()
    assert server.state == "open"
    await fails()
    await server._ensure()
    assert server.state == "open"
    await server.close()
