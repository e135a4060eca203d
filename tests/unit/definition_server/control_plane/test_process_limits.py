"""Limits under which nothing can be served are refused at the start, with their remedy."""

from __future__ import annotations

import threading

import pytest

from definition_server.control_plane.process_limits import raise_process_limits


def allow_threads(monkeypatch: pytest.MonkeyPatch, most: int) -> list[threading.Thread]:
    """Let the kernel refuse every thread after ``most``. Returns those that were started."""
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) >= most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    return started


@pytest.mark.parametrize("most", [0, 2, 7])
def test_a_start_is_refused_where_too_few_threads_and_processes_can_be_started(
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


def test_threads_that_were_tried_end_and_threads_have_their_stack_again(monkeypatch: pytest.MonkeyPatch) -> None:
    started, stack = allow_threads(monkeypatch, 1000), threading.stack_size()
    assert raise_process_limits(workers=4) is None
    assert len(started) == 17
    assert not any(thread.is_alive() for thread in started)
    assert threading.stack_size() == stack
