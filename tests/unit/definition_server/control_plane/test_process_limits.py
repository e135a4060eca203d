"""The limits of the process are raised if that is allowed. A low limit is logged. If a limit is too low for serving,
the start ends with a remedy.
"""

from __future__ import annotations

import resource
import threading

import pytest
from tests.support.logs import LogLines, logged

from definition_server.control_plane import process_limits
from definition_server.control_plane.process_limits import raise_process_limits

MIB = 1 << 20
GIB = 1 << 30


def allow_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> list[threading.Thread]:
    """Let the kernel refuse every thread after ``most``. Returns the threads that were started."""
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) >= most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return started


@pytest.mark.parametrize("most", [0, 2, 7])
def test_a_start_is_refused_if_too_few_threads_and_processes_can_be_started(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = allow_threads(monkeypatch, most)
    problem = raise_process_limits(workers=1)
    assert problem is not None
    assert problem.startswith(f"{most} more processes or threads can be started, and 8 are needed for 1 workers")
    assert "ulimit -u" in problem
    assert "lower WORKERS" in problem
    assert len(started) == most
    assert not any(thread.is_alive() for thread in started)


def test_the_threads_of_the_trial_end_and_the_stack_size_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    started, stack = allow_threads(monkeypatch, 1000), threading.stack_size()
    assert raise_process_limits(workers=4) is None
    assert len(started) == 17
    assert not any(thread.is_alive() for thread in started)
    assert threading.stack_size() == stack


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[int, int]]:
    """The soft and hard limits of a simulated process, by the number of the limit; at first nothing is limited."""
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    values = dict.fromkeys(range(16), unlimited)
    monkeypatch.setattr(resource, "getrlimit", values.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", values.__setitem__)
    return values


@pytest.mark.parametrize("number", [resource.RLIMIT_FSIZE, resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_a_limit_below_four_gib_is_logged_and_one_of_four_gib_is_not(
    limits: dict[int, tuple[int, int]], number: int, logs: LogLines
) -> None:
    limits[number] = (4 * GIB, 4 * GIB)
    assert raise_process_limits(workers=1) is None
    assert not logged(logs, "A limit of the process is low")
    limits[number] = (4 * GIB - 1, 4 * GIB - 1)
    assert raise_process_limits(workers=1) is None
    (line,) = logged(logs, "A limit of the process is low")
    assert line["limit"] == 4 * GIB - 1


def test_a_soft_limit_is_raised_to_the_hard_one(limits: dict[int, tuple[int, int]], logs: LogLines) -> None:
    limits[resource.RLIMIT_CPU] = (10, resource.RLIM_INFINITY)
    assert raise_process_limits(workers=1) is None
    assert limits[resource.RLIMIT_CPU] == (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert not logged(logs, "A limit of the process is low")


def test_files_of_less_than_one_mib_end_the_start(limits: dict[int, tuple[int, int]]) -> None:
    limits[resource.RLIMIT_FSIZE] = (MIB - 1, MIB - 1)
    assert "1048576 are needed" in (raise_process_limits(workers=1) or "")
    limits[resource.RLIMIT_FSIZE] = (MIB, MIB)
    assert raise_process_limits(workers=1) is None


def test_a_limit_below_its_threshold_is_reported_and_a_higher_limit_is_not() -> None:
    gib, mib = 1 << 30, 1 << 20
    assert [(each.name, each.least, each.enough) for each in process_limits._LIMITS] == [
        ("size of a file", mib, 4 * gib), ("CPU time", 0, 1 << 40), ("address space", 512 * mib, 4 * gib),
        ("data", 128 * mib, 4 * gib),
    ]  # fmt: skip
