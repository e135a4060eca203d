"""Writes log lines from a thread of its own, so that no caller waits for stdout.

stdout may stop taking octets at any time: a pipe whose reader stands still, a terminal on which somebody pressed
Ctrl-S, a full disk. A ``write(2)`` then blocks, and an event loop that logs would block with it. So callers put whole
lines into a bounded queue, and one thread writes them in order, each by one ``write(2)``: lines of up to PIPE_BUF
octets from several processes are never mixed up in a pipe (``pipe(7)``).

Where the queue is full, new lines are dropped and counted: the oldest lines name the cause. As soon as lines flow
again, one line reports their number at the place of the gap. A reader that is gone (EPIPE) costs the line at hand.
A full disk costs nothing until the queue is full: the thread tries the line again every second.

The queue is a `queue.SimpleQueue`, whose ``put`` is reentrant: a destructor or a signal handler may log while its own
thread is in the midst of logging.
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
"""The most that waits in one process. A line has about 200 octets, so `MOST_LINES` is normally met first."""
_RETRY_SECONDS = 1.0
"""Between two attempts to write to a full disk."""
_RETRIED = frozenset((errno.ENOSPC, errno.EDQUOT, errno.ENOBUFS, errno.ENOMEM))
_PIPE_BUF = select.PIPE_BUF


class LineWriter:
    """Writes lines to ``descriptor``.

    The thread is started by the first line, unless ``hold`` is set: then lines wait until `release`. A process that
    restricts itself uses that, because restrictions bind only the threads that are started after them.
    """

    def __init__(self, descriptor: int, *, hold: bool = False) -> None:
        self._descriptor = descriptor
        self._held = hold
        self._begin()

    def use_gap(self, gap: Callable[[int], bytes]) -> None:
        """Report lines that are missing by the line that ``gap`` renders for their number."""
        self._gap = gap

    def _begin(self) -> None:
        """The state of a process that has written nothing."""
        self._queue: SimpleQueue[bytes | int | threading.Event | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # Each number is written by one side only. The callers, whom the handler's lock serialises:
        self._accepted = self._accepted_octets = 0
        self._refused = self._refused_in_queue = 0
        # The thread:
        self._taken = self._taken_octets = 0
        self._refused_reported = 0
        self._lost = self._lost_reported = 0
        self._torn = False
        self._deadline: float | None = None

    def begin_again(self) -> None:
        """Forget everything: in a forked child the thread does not exist, and the parent writes the lines."""
        self._begin()

    @property
    def dropped(self) -> int:
        """Lines that were not written and never will be."""
        return self._refused + self._lost

    @property
    def waiting(self) -> int:
        """Lines that are not written yet."""
        return self._accepted - self._taken

    def put(self, line: bytes) -> None:
        """Write ``line``, which ends with a line feed, as soon as the lines before it are written. Never blocks."""
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
        """Start the thread now, also where no line waits: later there may be no memory for it, and then ``start`` can
        hang (a thread that ends before it has said that it runs is waited for; seen with Python 3.11)."""
        self._held = False
        self._start()

    def flush(self, seconds: float) -> bool:
        """Wait until every line so far is written, at most for ``seconds``. Returns whether they are."""
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
        self._thread = thread  # before it runs: starting one may log
        try:
            thread.start()
        except RuntimeError:
            # A limit of processes, or the interpreter is ending. The lines wait for the next attempt.
            self._thread = None

    def close(self, seconds: float) -> bool:
        """As `flush`, and end the thread. Lines that come later start another."""
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
            except Exception:  # noqa: BLE001 - a bug, or no memory: it costs a line, and not all that come later
                self._lost += 1

    def _take(self, item: bytes | int | threading.Event) -> None:
        """Write one line; or report the lines that were refused before the next one; or note that this is reached."""
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
        """Write how many lines are missing: those lost, and the first ``refused`` of those refused."""
        lost = self._lost
        missing = refused - self._refused_reported + lost - self._lost_reported
        if missing and self._write(self._gap(missing)):
            self._refused_reported, self._lost_reported = refused, lost

    def _write(self, line: bytes) -> bool:
        """Write ``line`` whole, however long that takes. Returns False where that is not possible."""
        rest = memoryview(b"\n" + line if self._torn else line)
        whole = len(rest)
        while rest:
            try:
                rest = rest[self._write_some(rest) :]
            except BlockingIOError:
                # Somebody made the pipe non-blocking, for all its users.
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
        # poll(2) promises room for PIPE_BUF octets, and no more.
        return os.write(self._descriptor, rest[:_PIPE_BUF])

    def _wait_writable(self, seconds: float | None) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(None if seconds is None else max(0.0, seconds) * 1000))

    def _write_here(self, deadline: float) -> bool:
        """Write what waits from the calling thread, where no thread can be started any more."""
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
