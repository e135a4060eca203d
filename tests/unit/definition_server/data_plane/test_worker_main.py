"""The start and the end of a worker process: the order of its steps, its parts, and its exit codes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.logs import captured_logs, logged

from definition_server.data_plane import worker as module
from definition_server.data_plane.confine import CannotConfine
from definition_server.ipc import messages
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.stats import StatsPage
from definition_server.ipc.tls_files import TlsFiles

CONFIG = messages.Configure(
    "127.0.0.1", 0, "native", False, 0.0, 4, "development", "WARNING", 7.0, max_connections=9, trace_one_call_in=2
)


class Process:
    """Runs `main` in the process of the test; each step of the start is noted, and has no effect."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.master, self._theirs = Channel.pair()
        self.page = StatsPage()
        self.steps: list[Any] = []
        self.given: tuple[Any, ...] = ()
        self.failure: Exception | None = None
        for name in ("reserve_standard_descriptors", "leave_signals_to_the_master", "release_logs", "WarmUp",
                     "freed_memory", "configure_logs", "_leave_at_the_latest"):  # fmt: skip
            monkeypatch.setattr(module, name, self._noted(name))
        monkeypatch.setattr(module, "Confinement", self._confinement)
        monkeypatch.setattr(module, "_run", self._run)
        monkeypatch.setattr(module, "Worker", lambda *given: given)

    def _noted(self, name: str) -> Any:
        def noted(*arguments: Any, **options: Any) -> str:
            self.steps.append((name, *arguments[-2:], *options.items()))
            return name

        return noted

    def _confinement(self, config: messages.Configure, *, tls: bool) -> Any:
        self.steps.append(("Confinement", tls))
        return SimpleNamespace(enter=self._enter)

    def _enter(self) -> None:
        self.steps.append("enter")
        if self.failure is not None:
            raise self.failure

    async def _run(self, make: Callable[[], tuple[Any, ...]]) -> int:
        self.steps.append("run")
        self.given = make()
        assert self.received() == [messages.Mapped()]
        return 42

    def received(self) -> list[messages.Message]:
        """The messages that the worker has sent."""
        found = []
        while (each := self.master.receive()) is not None:
            found.append(each[0])
        return found

    def start(self, *listeners: int) -> int:
        """The exit code."""
        arguments = (self._theirs.detach(), os.dup(self.page.descriptor), *listeners)
        return module.main([str(each) for each in arguments])

    def close(self) -> None:
        """Close the master's descriptors."""
        self._theirs.close()
        self.master.close()
        self.page.close()


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    made = Process(monkeypatch)
    yield made
    made.close()


def names(steps: list[Any]) -> list[str]:
    return [step if isinstance(step, str) else step[0] for step in steps]


def test_sockets_and_files_are_opened_before_the_confinement_and_threads_and_the_loop_start_after_it(
    process: Process,
) -> None:
    process.master.send(CONFIG)
    assert process.start() == 42
    assert names(process.steps) == [
        "reserve_standard_descriptors", "leave_signals_to_the_master", "configure_logs", "configure_logs", "WarmUp",
        "freed_memory", "Confinement", "enter", "release_logs", "_leave_at_the_latest", "run",
    ]  # fmt: skip
    held, configured = (step[1:] for step in process.steps if step[0] == "configure_logs")
    assert held == ("production", "INFO", ("hold", True)), "a log line would start a thread"
    assert configured == ("development", "WARNING")
    with pytest.raises(ChannelClosed):
        process.received()


def test_a_worker_is_run_with_what_it_received_and_inherited(process: Process) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    address = listening.getsockname()
    with TlsFiles.seal(b"certificate", b"key") as files:
        process.master.send(CONFIG, *files.descriptors)
    assert process.start(listening.detach()) == 42
    _, slot, config, listener, balancer, _, warm_up, freed, tls, sampled = process.given
    assert config == CONFIG
    assert listener.getsockname() == address
    listener.close()
    assert tls.octets()[0] == b"certificate"
    tls.close()
    assert (warm_up, freed) == ("WarmUp", "freed_memory")
    assert ("Confinement", True) in process.steps
    assert balancer._limit == 9
    assert (balancer._slot, sampled._slot) == (slot, slot)
    reading = process.page.read()
    assert reading.pid == os.getpid()
    assert reading.heartbeat_ns > 0


@pytest.mark.parametrize("seconds", [0.0, 7.0])
def test_a_worker_without_a_master_has_five_seconds_more_than_its_drain(process: Process, seconds: float) -> None:
    process.master.send(replace(CONFIG, drain_timeout_seconds=seconds, trace_one_call_in=0))
    assert process.start() == 42
    assert process.given[3] is None, "no listener was inherited"
    assert process.given[8:] == (None, None), "neither TLS nor sampling"
    assert ("Confinement", False) in process.steps
    (watch,) = (step for step in process.steps if step[0] == "_leave_at_the_latest")
    assert watch[-1] == seconds + 5.0


def test_a_worker_that_cannot_be_confined_or_fails_logs_that_and_has_an_exit_code_for_it(process: Process) -> None:
    process.master.send(CONFIG)
    process.failure = CannotConfine("JAIL is require")
    with captured_logs() as lines:
        assert process.start() == 3
    assert logged(lines, "Worker cannot start", error="JAIL is require", log_level="critical")
    assert names(process.steps)[-1] == "enter", "nothing is started"


def test_a_bug_at_the_start_is_logged_with_its_traceback_and_ends_the_worker_with_1(process: Process) -> None:
    process.master.send(CONFIG)
    process.failure = KeyError("a bug")
    with captured_logs() as lines:
        assert process.start() == 1
    (line,) = logged(lines, "Worker failed", log_level="critical")
    assert line["exc_info"] is process.failure


def test_without_a_configuration_nothing_is_started(process: Process) -> None:
    with captured_logs():
        assert process.start() == 3
    assert names(process.steps)[-1] == "configure_logs"
    with pytest.raises(ChannelClosed):  # the worker has sent nothing, and its end is closed
        process.received()
