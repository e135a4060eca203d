"""Lines are written in order by a thread. If the reader stops, fails or ends, lines may be lost, but the caller never
waits."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from tests.support.polling import until

from definition_server.observability import line_writer
from definition_server.observability.line_writer import MOST_LINES, LineWriter

pytestmark = pytest.mark.usefixtures("nothing_is_left")

GAP = "-- {} missing --\n"


class Sink:
    """A pipe whose reading a test controls, and the writer at its other end."""

    def __init__(self) -> None:
        self.reading, self.writing = os.pipe()
        self.writer = LineWriter(self.writing)
        self.writer.use_gap(lambda missing: GAP.format(missing).encode())

    def fill(self) -> int:
        """Fill the pipe, so that a ``write`` blocks. Returns the octets."""
        size = fcntl.fcntl(self.writing, fcntl.F_GETPIPE_SZ)
        return os.write(self.writing, b"x" * (size - 1) + b"\n")

    def read(self, octets: int) -> bytes:
        got = b""
        while len(got) < octets:
            got += os.read(self.reading, octets - len(got))
        return got

    def read_lines(self, last: str) -> list[str]:
        """Every line up to one that is ``last``."""
        got = b""
        while not got.endswith(f"{last}\n".encode()):
            got += os.read(self.reading, 65536)
        return got.decode().splitlines()

    def reopen(self) -> None:
        """Another reader for the same writer: the old pipe's descriptor becomes the new one's."""
        os.close(self.reading)
        self.reading, writing = os.pipe()
        os.dup2(writing, self.writing)
        os.close(writing)


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    try:
        yield made
    finally:
        os.close(made.reading)  # a write that blocks fails now
        made.writer.close(10)
        os.close(made.writing)


def put(writer: LineWriter, *names: object) -> None:
    for name in names:
        writer.put(f"{name}\n".encode())


def test_lines_are_written_in_order_by_another_thread(sink: Sink) -> None:
    put(sink.writer, *range(500))
    assert sink.read_lines("499") == [str(number) for number in range(500)]
    assert sink.writer.flush(10)
    assert (sink.writer.waiting, sink.writer.dropped) == (0, 0)


def test_no_thread_is_started_before_the_first_line() -> None:
    writer = LineWriter(1)
    assert writer.flush(1)
    assert "log-writer" not in [thread.name for thread in threading.enumerate()]


def test_held_lines_are_written_after_the_release(sink: Sink) -> None:
    held = LineWriter(sink.writing, hold=True)
    put(held, "a", "b")
    assert held.waiting == 2
    assert "log-writer" not in [thread.name for thread in threading.enumerate()]
    held.release()
    put(held, "c")
    assert sink.read_lines("c") == ["a", "b", "c"]
    held.close(10)


def test_a_pipe_that_is_not_read_delays_no_caller_and_loses_no_line_within_the_limit_of_the_queue(sink: Sink) -> None:
    filled = sink.fill()
    started = time.thread_time()
    put(sink.writer, *range(1000))
    assert time.thread_time() - started < 5  # the call must return at all
    assert sink.writer.waiting == 1000
    assert not sink.writer.flush(0.01)
    sink.read(filled)
    assert sink.read_lines("999") == [str(number) for number in range(1000)]
    assert sink.writer.dropped == 0


def test_lines_beyond_the_limit_of_the_queue_are_counted_and_reported_at_their_place(sink: Sink) -> None:
    filled = sink.fill()
    put(sink.writer, *range(MOST_LINES + 30))
    assert (sink.writer.waiting, sink.writer.dropped) == (MOST_LINES, 30)
    sink.read(filled)
    lines = sink.read_lines(GAP.format(30).strip())
    assert lines == [*(str(number) for number in range(MOST_LINES)), "-- 30 missing --"]
    put(sink.writer, "next")
    assert sink.read_lines("next") == ["next"]
    assert sink.writer.dropped == 30


def test_a_gap_is_reported_before_the_first_line_after_it(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "MOST_LINES", 3)
    filled = sink.fill()
    put(sink.writer, *"abcde")
    monkeypatch.setattr(line_writer, "MOST_LINES", 4)
    put(sink.writer, *"fg")
    sink.read(filled)
    assert sink.read_lines("-- 1 missing --") == ["a", "b", "c", "-- 2 missing --", "f", "-- 1 missing --"]


def test_the_octets_that_wait_are_limited_too(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_writer, "MOST_OCTETS", 10)
    sink.fill()
    put(sink.writer, "12345678", "next")
    assert sink.writer.dropped == 1


def test_lines_for_a_reader_that_is_gone_are_lost_and_the_next_reader_gets_their_number(sink: Sink) -> None:
    os.close(sink.reading)
    sink.reading = os.dup(0)
    put(sink.writer, "a", "b")
    until(lambda: sink.writer.dropped == 2, "two lines are lost")
    sink.reopen()
    put(sink.writer, "c")
    assert sink.read_lines("c") == ["-- 2 missing --", "c"]


def test_a_non_blocking_pipe_that_is_full_loses_nothing(sink: Sink) -> None:
    os.set_blocking(sink.writing, False)
    filled = sink.fill()
    put(sink.writer, "a", "b")
    sink.read(filled)
    assert sink.read_lines("b") == ["a", "b"]
    assert sink.writer.dropped == 0


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | OSError], None]:
    """Scripts the next results of ``os.write``: octets that are taken, or an error."""
    results: list[int | OSError] = []
    write = os.write

    def scripted(descriptor: int, data: bytes) -> int:
        result = results.pop(0) if results and threading.current_thread().name == "log-writer" else len(data)
        if isinstance(result, OSError):
            raise result
        return write(descriptor, data[:result])

    monkeypatch.setattr(os, "write", scripted)
    monkeypatch.setattr(line_writer, "_RETRY_SECONDS", 0.001)
    return results.append


@pytest.mark.parametrize("number", [28, 122, 105, 12], ids=["ENOSPC", "EDQUOT", "ENOBUFS", "ENOMEM"])
def test_a_full_disk_is_tried_again_until_it_takes_the_line(
    sink: Sink, failing: Callable[[int | OSError], None], number: int
) -> None:
    for _ in range(3):
        failing(OSError(number, "full"))
    put(sink.writer, "a", "b")
    assert sink.read_lines("b") == ["a", "b"]
    assert sink.writer.dropped == 0


@pytest.mark.parametrize("number", [5, 9, 32, 25], ids=["EIO", "EBADF", "EPIPE", "ENOTTY"])
def test_a_line_that_cannot_be_written_is_counted_and_the_next_one_is_written(
    sink: Sink, failing: Callable[[int | OSError], None], number: int
) -> None:
    failing(OSError(number, "gone"))
    failing(OSError(number, "gone"))  # the report of the lost line
    put(sink.writer, "a")
    until(lambda: sink.writer.dropped == 1, "the line is lost")
    put(sink.writer, "b")
    assert sink.read_lines("b") == ["-- 1 missing --", "b"]


def test_a_line_that_was_written_in_part_does_not_run_into_the_next(
    sink: Sink, failing: Callable[[int | OSError], None]
) -> None:
    failing(2)
    failing(OSError(5, "gone"))
    failing(OSError(5, "gone"))
    put(sink.writer, "abcd")
    until(lambda: sink.writer.dropped == 1, "the line is lost")
    put(sink.writer, "next")
    assert sink.read_lines("next") == ["ab", "-- 1 missing --", "next"]


def test_a_bug_loses_a_line_but_does_not_end_the_thread(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    bugs = [MemoryError(), ValueError()]

    def failing_write(descriptor: int, data: bytes) -> int:
        if bugs and threading.current_thread().name == "log-writer":
            raise bugs.pop()
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", failing_write)
    put(sink.writer, "a")
    until(lambda: sink.writer.dropped == 1, "the line is lost")
    put(sink.writer, "b", "c")
    assert sink.read_lines("c")[-1] == "c"
    assert sink.writer.flush(10)
    assert sink.writer.waiting == 0


def test_a_partial_write_is_continued(sink: Sink, failing: Callable[[int | OSError], None]) -> None:
    failing(1)
    failing(2)
    put(sink.writer, "abcd")
    assert sink.read_lines("abcd") == ["abcd"]


def test_lines_are_written_without_a_thread_if_none_can_be_started(sink: Sink, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    put(sink.writer, "a", "b" * 10_000)
    assert sink.writer.waiting == 2
    assert sink.writer.flush(10)
    assert sink.read_lines("b" * 10_000) == ["a", "b" * 10_000]
    sink.fill()
    put(sink.writer, "c")
    assert not sink.writer.flush(0.01)


def test_a_forked_child_does_not_write_its_parents_lines(sink: Sink) -> None:
    program = """if True:
        import os, sys, fcntl
        from definition_server.observability.logs import configure_logs, flush_logs, get_logger
        size = fcntl.fcntl(1, fcntl.F_GETPIPE_SZ)
        os.write(1, b"x" * (size - 1) + b"\\n")
        configure_logs("production", "INFO")
        get_logger("x").info("parent")
        child = os.fork()
        if child == 0:
            get_logger("x").info("child")
            sys.exit(0)
        os.write(2, b"ready\\n")
        os.waitpid(child, 0)
    """
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        assert process.stderr.readline() == b"ready\n"
        text = process.stdout.read().decode()
        assert process.wait(60) == 0
    assert (text.count('"parent"'), text.count('"child"')) == (1, 1)
