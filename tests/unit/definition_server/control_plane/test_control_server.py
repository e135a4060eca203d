"""The control socket: it is opened again after any change of its file, and its clients are limited."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import end, eventually

from definition_server.control_plane import control_server, control_socket
from definition_server.control_plane.control_server import SERVICE, ControlServer
from definition_server.control_plane.control_socket import ControlSocket, SocketUnusable

OPEN, UNAVAILABLE = "Control socket open", "No control socket; the server serves without it"


class Engine:
    """A stand-in for the engine's server: it notes its arguments and the calls of its methods."""

    made: list[Engine]

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.started = False
        self.stopped: list[float] = []
        self.listening: Any = None
        Engine.made.append(self)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        assert (service, handlers) == (SERVICE, {})

    def add_listener(self, listening: Any, *, objection: Any) -> None:
        self.listening, self.objection = listening, objection

    async def start(self) -> None:
        self.started = True

    async def stop(self, grace: float) -> None:
        self.stopped.append(grace)
        if self.listening is not None:
            self.listening.close()


class Bench:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.server = ControlServer(path, dict, workers=lambda: {4711})

    @property
    def engines(self) -> list[Engine]:
        return Engine.made

    async def check(self) -> str:
        """Do the work that `run` does every five seconds. Returns the state afterwards."""
        await self.server._ensure()
        return self.server.state


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    Engine.made = []
    monkeypatch.setattr(control_server, "Server", Engine)
    made = Bench(tmp_path / "control.sock")
    yield made
    await made.server.close()


async def test_requests_connections_and_calls_on_the_control_socket_are_limited(bench: Bench) -> None:
    await bench.check()
    (engine,) = bench.engines
    limits = engine.options.pop("limits")
    assert (limits.max_message, limits.max_buffered, limits.max_unread) == (16_384, 65_536, 262_144)
    assert limits.max_held == 4_194_304
    assert engine.options == {"max_connections": 32, "max_concurrent_calls": 16, "first_call_timeout": 10.0}


async def test_the_socket_is_served_once_it_is_open_and_as_long_as_its_file_is_in_place(
    bench: Bench, logs: LogLines
) -> None:
    assert (bench.server.state, bench.server.problem) == ("unavailable", "it is not open yet")
    for _ in range(2):
        assert await bench.check() == "open"
    assert bench.server.problem is None
    (engine,) = bench.engines
    assert engine.started
    assert engine.stopped == []
    assert logged(logs, OPEN, path=str(bench.path), log_level="info") == logs


async def test_a_worker_that_connects_to_the_control_socket_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_server, "stranger", lambda peer, workers: f"{peer} beside {set(workers)}")
    await bench.check()
    assert bench.engines[0].objection("a peer") == "a peer beside {4711}"


async def test_a_socket_whose_file_was_removed_is_replaced(bench: Bench, logs: LogLines) -> None:
    await bench.check()
    bench.path.unlink()
    assert await bench.check() == "open"
    first, second = bench.engines
    assert first.stopped == [0.2]
    assert second.started
    assert second.stopped == []
    assert len(logged(logs, OPEN)) == 2
    assert bench.path.is_socket()


async def test_a_socket_that_cannot_be_opened_is_reported_once_for_each_problem_and_opened_later(
    bench: Bench, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = ["the disk is full", "the disk is full", "another instance listens on it"]
    opened = control_server.open_socket

    def open_socket(path: Path) -> ControlSocket:
        if problems:
            raise SocketUnusable(problems.pop(0), "free space")
        return opened(path)

    monkeypatch.setattr(control_server, "open_socket", open_socket)
    for _ in range(3):
        assert await bench.check() == "unavailable"
    assert bench.server.problem == "another instance listens on it"
    assert [(line["error"], line["remedy"]) for line in logged(logs, UNAVAILABLE, log_level="warning")] == [
        ("the disk is full", "free space"), ("another instance listens on it", "free space"),
    ]  # fmt: skip
    assert bench.engines == []
    assert await bench.check() == "open"


async def test_one_thread_waits_for_a_disk_that_hangs_and_the_socket_opens_when_it_answers(
    bench: Bench, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    works, attempts = threading.Event(), []
    opened = control_server.open_socket

    def open_socket(path: Path) -> ControlSocket:
        attempts.append(path)
        assert works.wait(60)
        return opened(path)

    monkeypatch.setattr(control_server, "open_socket", open_socket)
    monkeypatch.setattr(control_server, "_DISK_SECONDS", 0.01)
    for _ in range(2):
        assert await bench.check() == "unavailable"
    (line,) = logged(logs, UNAVAILABLE)
    assert (line["error"], line["remedy"]) == (
        f"{bench.path}: the disk does not answer", "set CONTROL_SOCKET to a path on another disk",
    )  # fmt: skip
    works.set()
    await eventually(lambda: bench.server._opening is not None and bench.server._opening.done(), "the disk answers")
    assert await bench.check() == "open"
    assert attempts == [bench.path]


async def test_the_end_of_the_server_removes_the_file_and_ends_the_calls(bench: Bench) -> None:
    await bench.check()
    await bench.server.close()
    assert bench.engines[0].stopped == [0.2]
    assert not bench.path.exists()
    await bench.server.close()
    assert bench.engines[0].stopped == [0.2]


async def test_a_socket_that_opens_after_the_end_of_the_server_is_closed_and_its_file_removed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = threading.Event()
    opened = control_server.open_socket
    late: list[ControlSocket] = []

    def open_socket(path: Path) -> ControlSocket:
        assert works.wait(60)
        late.append(opened(path))
        return late[0]

    monkeypatch.setattr(control_server, "open_socket", open_socket)
    monkeypatch.setattr(control_server, "_DISK_SECONDS", 0.01)
    await bench.check()
    await bench.server.close()
    works.set()
    await eventually(lambda: late and late[0].listening.fileno() == -1, "it is closed")
    assert not bench.path.exists()


@pytest.mark.parametrize("error", [OSError("failed"), None], ids=["failed", "cancelled"])
async def test_an_attempt_that_fails_after_the_end_leaves_nothing(error: OSError | None) -> None:
    opening: asyncio.Future[ControlSocket] = asyncio.get_running_loop().create_future()
    opening.cancel() if error is None else opening.set_exception(error)
    await asyncio.wait((opening,))
    control_server._discard(opening)


async def test_a_machine_without_descriptors_is_a_named_problem_and_no_bug(
    bench: Bench, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be missing for the socket, and for the engine or its modules."""

    def no_descriptor(*_: object) -> Any:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(control_socket.socket, "socket", no_descriptor)
        assert await bench.check() == "unavailable"
    with monkeypatch.context() as patch:
        patch.setattr(bench.server, "_handlers", no_descriptor)
        assert await bench.check() == "unavailable"
        assert not bench.path.exists()
    (line,) = logged(logs, UNAVAILABLE)
    assert (line["error"], line["remedy"]) == (
        f"{bench.path}: Too many open files", "raise the limit of open files (ulimit -n, LimitNOFILE=)",
    )  # fmt: skip
    assert await bench.check() == "open"


async def test_the_file_is_checked_every_five_seconds_even_after_a_bug(
    bench: Bench, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    forever = asyncio.Event()

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            await forever.wait()

    def handlers() -> Any:
        if not slept:
            raise KeyError("a bug")
        return {}

    bench.server._handlers = handlers
    monkeypatch.setattr(control_server, "asyncio", SimpleNamespace(**vars(asyncio) | {"sleep": sleep}))
    running = asyncio.create_task(bench.server.run())
    await eventually(lambda: len(slept) == 2, "the second attempt")
    assert slept == [5.0, 5.0]
    assert len(logged(logs, "Unexpected failure of the control socket", log_level="error")) == 1
    assert bench.server.state == "open", "the socket that was opened before the bug does not prevent this"
    await end(running)


def no_thread(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def hanging(*_: object) -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("fault", ["no thread", "a disk that hangs"])
async def test_a_fault_of_a_check_does_not_change_whether_the_socket_is_open(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The cases: a socket that was not checked for a while, and no socket yet."""

    async def fails() -> None:
        with monkeypatch.context() as patch:
            if fault == "no thread":
                patch.setattr(threading.Thread, "start", no_thread)
            else:
                patch.setattr(control_server, "on_disk", hanging)
                patch.setattr(control_server, "_DISK_SECONDS", 0.05)
            await bench.check()
        if bench.server._opening is not None:
            bench.server._opening.cancel()
            bench.server._opening = None

    await fails()
    assert bench.server.state == "unavailable"
    assert bench.server.problem is not None
    assert "thread" in bench.server.problem or "disk" in bench.server.problem
    assert await bench.check() == "open"
    await fails()
    assert await bench.check() == "open"
