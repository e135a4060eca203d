"""A worker gives freed memory back to the kernel: the conditions, and the effect on resident memory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from definition_server.data_plane import allocator
from definition_server.data_plane.allocator import INTERVAL_SECONDS, NOTABLE_GROWTH, FreedMemory, freed_memory

MB = 1024 * 1024


class Process:
    """A process whose memory and CPU time the test sets."""

    def __init__(self) -> None:
        self.resident, self.in_use = 40 * MB, 40 * MB
        self.now = self.cpu_seconds = 0.0
        self.freed = FreedMemory(lambda: self.resident, self._give_back)
        self.check()

    def _give_back(self, done: Callable[[], None]) -> None:
        self.resident = self.in_use
        done()

    def check(self, *, busy: float = 0.1) -> bool:
        self.now += 1
        self.cpu_seconds += busy
        return self.freed.check(self.now, self.cpu_seconds)


@pytest.fixture
def process() -> Process:
    return Process()


def test_memory_is_given_back_in_the_first_quiet_second_after_it_was_freed(process: Process) -> None:
    process.resident += 90 * MB
    assert not process.check(busy=0.9)
    assert process.check()
    assert process.resident == process.in_use


def test_no_memory_is_given_back_if_the_process_has_grown_little(process: Process) -> None:
    process.resident += NOTABLE_GROWTH - 1
    assert not any(process.check() for _ in range(100))


def test_no_memory_is_given_back_while_memory_is_being_filled(process: Process) -> None:
    for _ in range(20):
        process.resident += 2 * MB
        assert not process.check()
    assert process.check()


def test_no_memory_is_given_back_while_the_process_is_busy(process: Process) -> None:
    process.resident += 90 * MB
    assert not any(process.check(busy=0.6) for _ in range(100))


def test_returning_memory_that_is_in_use_is_tried_at_growing_intervals(process: Process) -> None:
    process.resident += 90 * MB
    process.in_use = process.resident
    assert sum(process.check() for _ in range(600)) <= 8
    assert sum(process.check() for _ in range(6000)) <= 11


def test_memory_that_is_freed_after_a_call_without_effect_is_given_back(process: Process) -> None:
    process.resident += 90 * MB
    process.in_use = process.resident
    for _ in range(3):
        process.check()
    process.in_use = 40 * MB
    for _ in range(12):
        process.check()
    assert process.resident == process.in_use


def test_memory_that_grows_again_and_again_is_given_back_at_intervals(process: Process) -> None:
    times = 0
    for _ in range(100):
        process.resident = max(process.resident, process.in_use + 2 * NOTABLE_GROWTH)
        times += process.check() or process.check()
    assert 0.8 * 200 / INTERVAL_SECONDS < times <= 200 / INTERVAL_SECONDS


def test_growth_is_measured_from_the_lowest_level(process: Process) -> None:
    process.resident = process.in_use = 20 * MB
    process.check()
    process.resident += NOTABLE_GROWTH
    assert [process.check(), process.check()] == [False, True]


def test_no_memory_is_given_back_without_a_function_of_the_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    assert freed_memory() is None


def test_no_memory_is_given_back_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_STATM", "/nowhere/statm")
    assert freed_memory() is None


PROGRAM = """
import threading
from definition_server.data_plane.allocator import freed_memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 // 1_000_000

freed = freed_memory()
if freed is None:
    print(-1)
else:
    freed.check(0.0, 0.0)
    before = resident()
    held = [(b"x" * (65_000 + number), b"y" * (2_000 + number)) for number in range(1000)]
    for number in range(1000):
        held[number] = held[number][1]
    grown = resident() - before
    freed.check(1.0, 0.1)
    assert freed.check(2.0, 0.2)
    for thread in threading.enumerate():
        if thread.name == "memory-return":
            thread.join()
    print(grown, resident() - before)
"""


def test_freed_blocks_of_input_are_not_resident_any_more() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    if done.stdout == "-1\n":
        pytest.skip("the C library has no malloc_trim")
    kept, left = map(int, done.stdout.split())
    assert kept > 50, "otherwise it would not be necessary to give memory back"
    assert left < 33


@pytest.mark.parametrize(("growth", "still"), [(MB - 1, True), (MB, False), (MB // 2, True)])
def test_growth_of_a_mebibyte_between_two_checks_means_that_memory_is_being_filled(
    process: Process, growth: int, still: bool
) -> None:
    process.resident += 90 * MB
    assert not process.check(), "the memory has just grown"
    process.resident += growth
    assert process.check() == still


@pytest.mark.parametrize(("returned", "seconds"), [(4 * MB, 5), (4 * MB - 1, 10)])
def test_the_interval_doubles_if_less_than_four_mebibytes_were_returned(
    process: Process, returned: int, seconds: int
) -> None:
    waited = []
    for _ in range(3):
        process.resident += 90 * MB
        process.in_use = process.resident - returned
        waited.append(1)
        while not process.check():
            waited[-1] += 1
    assert waited[1:] == [5, seconds], "the first return decides how long the third one waits"


@pytest.mark.parametrize(("growth", "given_back"), [(16 * MB - 1, False), (16 * MB, True)])
def test_memory_is_given_back_only_after_growth_of_sixteen_mebibytes(
    process: Process, growth: int, given_back: bool
) -> None:
    process.resident += growth
    process.check()
    assert process.check() is given_back


@pytest.mark.parametrize(("busy", "given_back"), [(0.499, True), (0.5, False)])
def test_a_process_that_uses_half_a_core_is_busy(process: Process, busy: float, given_back: bool) -> None:
    process.resident += 90 * MB
    process.check(busy=0.0)  # so that the sum of CPU seconds is exact
    assert process.check(busy=busy) is given_back


def test_half_a_core_is_measured_over_the_time_since_the_last_check(process: Process) -> None:
    process.resident += 90 * MB
    process.check()
    process.now += 1
    assert process.check(busy=0.9), "in two seconds"


def test_intervals_double_up_to_ten_minutes(process: Process) -> None:
    process.resident += 90 * MB
    process.in_use = process.resident
    instants = [process.now for _ in range(3000) if process.check()]
    waited = [later - earlier for earlier, later in pairwise(instants)]
    assert waited == [5, 10, 20, 40, 80, 160, 320, 600, 600, 600]


def test_the_measured_memory_is_resident_memory_that_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    page = 4096
    monkeypatch.setattr(allocator.os, "sysconf", {"SC_PAGESIZE": page}.__getitem__)
    freed = freed_memory()
    if freed is None:
        pytest.skip("the C library has no malloc_trim")
    read = [b"900 700 300 1 0 500 0\n", b"", b"900 x 300\n"]
    monkeypatch.setattr(allocator.os, "pread", lambda *_: read.pop(0))
    assert freed._resident() == 400 * page
    assert freed._resident() == freed._resident() == 0, "memory that cannot be read does not count as growth"


def test_memory_is_given_back_by_a_daemon_thread_and_kept_if_no_thread_can_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: SimpleNamespace(malloc_trim=trimmed.append))
    freed = freed_memory()
    assert freed is not None
    made: list[dict[str, Any]] = []

    class Thread:
        def __init__(self, **given: Any) -> None:
            self.given = given

        def start(self) -> None:
            if made:
                raise RuntimeError("can't start new thread")
            made.append(self.given)

    monkeypatch.setattr(allocator.threading, "Thread", Thread)
    done: list[str] = []
    for _ in range(2):
        freed._give_back(lambda: done.append("done"))
    (given,) = made
    assert (given["name"], given["daemon"]) == ("memory-return", True)
    given["target"](*given["args"])
    assert (trimmed, done) == ([0], ["done"])
