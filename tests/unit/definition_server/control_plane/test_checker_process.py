"""The functions of the checker process, run in this process: its limits, its start, and its answers row by row."""

from __future__ import annotations

import codecs
import inspect
import os
import resource
import socket
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from definition_server.catalog.content_check import ANSWER, FUNCTION, INTERFACE, READY, Flaw
from definition_server.control_plane import checker_process as module
from definition_server.jail.confinement import Extent

MIB = 1024 * 1024
INFINITY = resource.RLIM_INFINITY


class Limits:
    """The limits of a process; the test plays the process."""

    def __init__(self, hard: int = INFINITY) -> None:
        self.hard = hard
        self.set: dict[int, tuple[int, int]] = {}

    def getrlimit(self, limit: int) -> tuple[int, int]:
        return self.set.get(limit, (self.hard, self.hard))

    def setrlimit(self, limit: int, values: tuple[int, int]) -> None:
        self.set[limit] = values


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Limits:
    made = Limits()
    monkeypatch.setattr(resource, "getrlimit", lambda limit: made.getrlimit(limit))
    monkeypatch.setattr(resource, "setrlimit", lambda limit, values: made.setrlimit(limit, values))
    return made


@pytest.mark.parametrize(("size", "seconds"), [(0, 2), (MIB - 1, 2), (MIB, 3), (4 * MIB, 6)])
def test_a_row_has_two_seconds_and_one_for_each_mebibyte(size: int, seconds: int) -> None:
    assert module.cpu_seconds(size) == seconds


@pytest.mark.parametrize(
    ("hard", "soft"), [(INFINITY, 18), (100, 18), (17, 17)], ids=["no limit", "a high limit", "a low limit"]
)
def test_each_row_gets_its_own_time_within_the_limit_of_the_process(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, hard: int, soft: int
) -> None:
    limits.hard = hard
    monkeypatch.setattr(module, "time", SimpleNamespace(process_time=lambda: 12.7))
    module._allow(3 * MIB)
    assert limits.set == {resource.RLIMIT_CPU: (soft, hard)}


@pytest.mark.parametrize(
    ("hard", "memory", "files", "others"), [(INFINITY, 512 * MIB, 16, 0), (100, 100, 16, 0), (7, 7, 7, 0)]
)
def test_memory_files_and_processes_are_limited_and_lower_limits_stay(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, hard: int, memory: int, files: int, others: int
) -> None:
    limits.hard = hard
    steps: list[Any] = []
    monkeypatch.setattr(module.os, "open", lambda *each: steps.append(each) or 5)
    monkeypatch.setattr(module.os, "write", lambda *each: steps.append(each))
    monkeypatch.setattr(module.os, "close", steps.append)
    module._limit()
    assert limits.set == {
        resource.RLIMIT_AS: (memory, memory), resource.RLIMIT_NOFILE: (files, files),
        resource.RLIMIT_CORE: (others, others), resource.RLIMIT_FSIZE: (others, others),
        resource.RLIMIT_NPROC: (others, others),
    }  # fmt: skip
    assert steps == [("/proc/self/oom_score_adj", os.O_WRONLY), (5, b"1000"), 5]


def test_limits_are_set_even_if_the_oom_preference_cannot_be_written(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(module.os, "open", refuse)
    module._limit()
    assert len(limits.set) == 5


@pytest.mark.parametrize(
    ("good", "bad", "works"),
    [
        (Flaw.NONE, Flaw.CODE | Flaw.INTERFACE, True),
        (Flaw.NONE, Flaw.CODE, False),
        (Flaw.NONE, Flaw.NONE, False),
        (Flaw.CODE, Flaw.CODE | Flaw.INTERFACE, False),
    ],
)
def test_the_self_test_fails_if_a_process_judges_its_own_rows_wrongly(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, good: Flaw, bad: Flaw, works: bool
) -> None:
    answers, asked = [good, bad], []
    monkeypatch.setattr(module, "flaws_of", lambda *each: asked.append(each) or answers.pop(0))
    assert module._works() is works
    assert [each[0] for each in asked] == [FUNCTION | INTERFACE] * 2


def test_the_self_test_passes_with_the_real_judgement(limits: Limits) -> None:
    assert module._works()


def test_rows_are_answered_one_by_one_each_within_its_own_time(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed: list[int] = []
    monkeypatch.setattr(module, "_allow", allowed.append)
    ours, theirs = socket.socketpair()
    rows = (
        (FUNCTION | INTERFACE, b"if", b"[]", b"return 1"),
        (INTERFACE, b"else", b"{", b"if"),
        (FUNCTION, b"x", b"", b"if"),
    )
    with ours, theirs:
        for checks, *parts in rows:
            ours.sendall(module.HEADER.pack(checks, *map(len, parts)) + b"".join(parts))
        ours.shutdown(socket.SHUT_WR)
        module._deeper(theirs, 3)
        theirs.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == bytes([ANSWER, ANSWER | Flaw.INTERFACE, ANSWER | Flaw.CODE])
    assert allowed == [12, 7, 3]


def test_rows_are_judged_with_150_more_stack_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    depths: list[int] = []

    def depth(_: object) -> None:
        frame, count = inspect.currentframe(), 0
        while frame is not None:
            frame, count = frame.f_back, count + 1
        depths.append(count)

    monkeypatch.setattr(module, "_serve", depth)
    for frames in (0, 150):
        module._deeper(cast(socket.socket, None), frames)
    assert depths[1] - depths[0] == 150
    assert module._SPARE_FRAMES == 150


class Jail:
    """A jail that reaches the extent set by the test."""

    reached_extent, refused = Extent.FULL, list[str]()

    def __init__(self, _: object) -> None:
        self.reached = SimpleNamespace(extent=self.reached_extent)

    def enter(self) -> list[str]:
        return self.refused


@pytest.fixture
def start(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, bytes, list[str]]]:
    """Runs ``main``, and records its exit code, its steps, and the octets that it sends."""

    def start(*arguments: str, works: bool = True) -> tuple[int, bytes, list[str]]:
        steps: list[str] = []
        ours, theirs = socket.socketpair()
        with monkeypatch.context() as patched, ours, theirs:
            patched.setattr(module, "socket", SimpleNamespace(socket=lambda fileno: theirs if fileno == 7 else None))
            patched.setattr(module, "leave_signals_to_the_master", lambda: steps.append("signals"))
            patched.setattr(module, "_limit", lambda: steps.append("limit"))
            patched.setattr(module, "Jail", lambda kernel: steps.append("jail") or Jail(kernel))
            patched.setattr(module, "support", lambda: None)
            patched.setattr(module, "_works", lambda: works)
            patched.setattr(module, "_deeper", lambda end, frames: steps.append(f"serve at {frames}"))
            patched.setattr(codecs, "lookup", steps.append)
            code = module.main(["7", *arguments])
            ours.setblocking(False)
            try:
                sent = ours.recv(10)
            except BlockingIOError:
                sent = b""
        return code, sent, steps

    return start


def test_a_start_limits_itself_loads_codecs_enters_the_jail_and_reports(
    start: Callable[..., tuple[int, bytes, list[str]]],
) -> None:
    few = ["ascii", "cp1252", "iso8859-15", "utf-8-sig"]
    assert start("off") == (0, READY, ["signals", "limit", *few, "serve at 150"])
    assert start("auto") == (0, READY, ["signals", "limit", *few, "jail", "serve at 150"])
    code, sent, steps = start("require", module.CODINGS)
    assert (code, sent) == (0, READY)
    assert {"cp1252", "utf_8", "big5"} <= set(steps)
    assert not {"__init__", "__pycache__", "aliases"} & set(steps)


@pytest.mark.parametrize(
    ("jail", "extent", "refused", "starts"),
    [
        ("require", Extent.FULL, [], True),
        ("require", Extent.SECCOMP, [], False),
        ("require", Extent.FULL, ["no Landlock"], False),
        ("auto", Extent.NONE, ["no Landlock"], True),
    ],
)
def test_only_a_required_jail_that_is_not_complete_prevents_a_start(
    start: Callable[..., tuple[int, bytes, list[str]]], jail: str, extent: Extent, refused: list[str], starts: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Jail, "reached_extent", extent)
    monkeypatch.setattr(Jail, "refused", refused)
    code, sent, steps = start(jail)
    assert (code, sent) == ((0, READY) if starts else (1, b""))
    assert ("serve at 150" in steps) is starts


def test_a_process_that_fails_its_self_test_does_not_report(
    start: Callable[..., tuple[int, bytes, list[str]]],
) -> None:
    code, sent, steps = start("off", works=False)
    assert (code, sent, "serve at 150" in steps) == (1, b"", False)
