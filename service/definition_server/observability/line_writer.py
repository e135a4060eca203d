"""Writes log lines from a thread of its own, so that no caller waits for stdout.

stdout may stop accepting octets at any time: a pipe whose reader hangs, a terminal on which Ctrl-S was pressed, a full
disk. A ``write(2)`` then blocks, and an event loop that logs would block with it. So callers put whole lines into a
bounded queue, and one thread writes them in order, each by one ``write(2)``: lines of up to PIPE_BUF octets from
several processes are never mixed in a pipe (``pipe(7)``).

If the queue is full, new lines are dropped and counted; the oldest lines are kept, because they show the cause. As soon
as lines can be written again, one line at the place of the gap reports the number of dropped lines. If the reader is
gone (EPIPE), the current line is lost. On a full disk no line is lost until the queue is full: the thread tries the
line again every second.

The queue is a `queue.SimpleQueue`, whose ``put`` is reentrant: a destructor or a signal handler may log while its
thread is already logging.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

MOST_LINES = 10_000
MOST_OCTETS = 8 * 1024 * 1024
"""The most lines (`MOST_LINES`) and octets that wait in one process. A line has about 200 octets, so `MOST_LINES` is
normally reached first.
"""
_RETRY_SECONDS = 1.0
"""Seconds between two attempts to write to a full disk."""
_RETRIED = frozenset((errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS, errno.ENOMEM))
_PIPE_BUF = select.PIPE_BUF


class LineWriter:
    """Writes lines to ``descriptor``.

    The first line starts the thread, unless ``hold`` is set: then lines wait until `release`. A process that confines
    itself uses this, because the confinement affects only threads that are started after it.
    """

    def __init__(self, descriptor: int, *, hold: bool = False) -> None:
        self._descriptor = descriptor
        self._held = hold
        self._begin()

    def use_gap(self, gap: Callable[[int], bytes]) -> None:
        """Report missing lines by a line that ``gap`` renders from their number."""
        self._gap = gap

    def _begin(self) -> None:
        """Set the state of a process that has not written a line."""
        self._queue: SimpleQueue[bytes | int | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # Only one side writes each number. The callers write the following numbers, one at a time under the handler's
        # lock:
        self._accepted = self._accepted_octets = 0
        self._refused = self._refused_in_queue = 0
        # The thread writes the following numbers:
        self._taken = self._taken_octets = 0
        self._refused_reported = 0
        self._lost = self._lost_reported = 0
        self._torn = False
        self._deadline: float | None = None

    def begin_again(self) -> None:
        """Forget all lines. This is for a forked child, which has no such thread. The parent writes the lines."""
        self._begin()

    @property
    def dropped(self) -> int:
        """Number of lines that were dropped."""
        return self._refused + self._lost

    @property
    def waiting(self) -> int:
        """Number of lines that wait."""
        return self._accepted - self._taken

    def put(self, line: bytes) -> None:
        """Queue ``line``, which ends with a line feed, to be written after the lines before it. Never blocks."""
        octets = self._accepted_octets - self._taken_octets
        if self.waiting >= MOST_LINES or octets + len(line) > MOST_OCTETS:
            self._refused += 1
            return
        if self._refused > self._refused_in_queue:
            self._refused_in_queue = self._refused
            self._queue.put(self._refused)
        self._accepted += 1
        self._accepted_octets += len(line)
        self._queue.put(line)
        self._start()

    def release(self) -> None:
        """Start the thread now, even if no line waits. Later there may be no memory for a thread, and then ``start``
        can hang (it waits for a thread that ended before it reported that it runs; seen with Python 3.11)."""
        self._held = False
        self._start()

    def flush(self, seconds: float) -> bool:
        """Wait until all lines so far are written, at most for ``seconds``. Returns whether they are."""
        if not self.waiting:
            return True
        self._held = False
        self._start()
        if self._thread is None:
            return self._write_here(time.monotonic() + seconds)
        written = threading.Event()
        self._queue.put(written)
        return written.wait(seconds)

    def _start(self) -> None:
        if self._thread is not None or self._held:
            return
        thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
        self._thread = thread  # set before the thread runs, because starting a thread may log
        try:
            thread.start()
        except RuntimeError:
            # A limit of processes is reached, or the interpreter is ending. The lines wait for the next attempt.
            self._thread = None

    def close(self, seconds: float) -> bool:
        """Like `flush`, and then end the thread. Later lines start another thread."""
        written = self.flush(seconds)
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(seconds)
        return written

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                self._take(item)
            except Exception:  # noqa: BLE001 - a bug, or no memory: it costs one line, and not all later lines
                self._lost += 1

    def _take(self, item: bytes | int | threading.Event) -> None:
        """Write the next line, or first report the lines that were refused before it, or handle the mark of a flush."""
        if isinstance(item, threading.Event):
            item.set()
            return
        if isinstance(item, int):
            self._report(item)
            return
        try:
            if self._lost > self._lost_reported:
                self._report(self._refused_reported)
            if not self._write(item):
                self._lost += 1
        finally:
            self._taken += 1
            self._taken_octets += len(item)
        if self._queue.empty():
            self._report(self._refused)

    def _report(self, refused: int) -> None:
        """Write a line with the number of missing lines: the lost ones, and the first ``refused`` refused ones."""
        lost = self._lost
        missing = refused - self._refused_reported + lost - self._lost_reported
        if missing and self._write(self._gap(missing)):
            self._refused_reported, self._lost_reported = refused, lost

    def _write(self, line: bytes) -> bool:
        """Write all of ``line``, however long that takes. Returns False if it cannot be written."""
        rest = memoryview(b"\n" + line if self._torn else line)
        whole = len(rest)
        while rest:
            try:
                rest = rest[self._write_some(rest) :]
            except BlockingIOError:
                # Another process has made the pipe non-blocking, for all its users.
                self._wait_writable(None)
            except OSError as error:
                if error.errno in _RETRIED and self._deadline is None:
                    time.sleep(_RETRY_SECONDS)
                    continue
                self._torn = self._torn or len(rest) < whole
                return False
        self._torn = False
        return True

    def _write_some(self, rest: memoryview) -> int:
        if self._deadline is None:
            return os.write(self._descriptor, rest)
        if not self._wait_writable(self._deadline - time.monotonic()):
            raise TimeoutError
        # poll(2) guarantees room only for PIPE_BUF octets.
        return os.write(self._descriptor, rest[:_PIPE_BUF])

    def _wait_writable(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))

    def _write_here(self, deadline: float) -> bool:
        """Write the waiting lines in the calling thread, if no thread can be started any more."""
        self._deadline = deadline
        lost = self._lost
        try:
            while self._lost == lost:
                item = self._queue.get_nowait()
                if item is not None:
                    self._take(item)
            return False
        except Empty:
            return True
        finally:
            self._deadline = None
