"""Returns freed memory to the kernel when there is much freed memory and the process is mostly idle.

glibc keeps freed blocks in a heap, which shrinks by itself only from its end: one small block in use there keeps
everything before it resident. For example, thousands of connections of an attacker, each with some 64 kB of waiting
input, left 70 to 110 MB resident in a worker after they were closed. ``malloc_trim`` (malloc_trim(3)) also returns free
pages in the middle of the heap.

While ``malloc_trim`` works, it holds the heap's lock: 0.1 to 0.2 ms for each MB that it returns, measured at 8 to 12 ms
for 90 MB. So it is called only when the process has grown by `NOTABLE_GROWTH`, no longer grows and is mostly idle. Two
calls are at least `INTERVAL_SECONDS` apart, and further apart if the first returned little. They run in a thread: the
event loop waits only if it requests a block from that heap meanwhile. (Python serves objects of up to 512 octets from
memory of its own.)

A lower ``M_MMAP_THRESHOLD`` would return each block at once, but costs two system calls and page faults for each block:
under an attack with wrong keys, a fifth fewer calls were answered.

Without glibc (musl returns memory by itself), or without ``/proc``, this module does nothing.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from math import inf

NOTABLE_GROWTH = 16 * 1024 * 1024
"""The growth of resident memory, in octets above its minimum so far, from which memory is returned."""
INTERVAL_SECONDS = 5.0
"""The least seconds between two calls."""
LONGEST_INTERVAL_SECONDS = 600.0
"""The most seconds between two calls. If a call returned little, because the memory is in use, the interval doubles up
to this limit."""
_LITTLE = 4 * 1024 * 1024
CHECK_SECONDS = 1.0
"""Seconds between two checks of the resident memory, which take 5 µs each."""
_IDLE_SHARE = 0.5
"""The process counts as idle below this share of one core."""
_STILL = 1024 * 1024
"""Octets by which memory may grow between two checks and still count as constant."""
_STATM = "/proc/self/statm"
_STATM_OCTETS = 128


class FreedMemory:
    """Decides when freed memory is returned. The caller passes the time."""

    def __init__(self, resident: Callable[[], int], give_back: Callable[[Callable[[], None]], None]) -> None:
        """
        Args:
            resident: Returns the octets of resident memory of the process, without shared memory.
            give_back: Returns freed memory to the kernel, and then calls its argument, from any thread.
        """
        self._resident = resident
        self._give_back = give_back
        self._least = self._last = 0
        """Octets of resident memory: the least so far, and at the last check."""
        self._checked_at: float | None = None
        self._cpu_seconds = 0.0
        self._next_at = -inf
        self._interval = INTERVAL_SECONDS

    def check(self, now: float, cpu_seconds: float) -> bool:
        """To be called every `CHECK_SECONDS`. Returns whether memory is being returned.

        Args:
            now: Monotonic, in seconds.
            cpu_seconds: CPU time of the process so far.
        """
        resident, before = self._resident(), self._last
        checked_at, used = self._checked_at, cpu_seconds - self._cpu_seconds
        self._last, self._checked_at, self._cpu_seconds = resident, now, cpu_seconds
        self._least = resident if checked_at is None else min(self._least, resident)
        if checked_at is None or now < self._next_at or resident < self._least + NOTABLE_GROWTH:
            return False
        if used >= _IDLE_SHARE * (now - checked_at) or resident >= before + _STILL:
            return False
        self._next_at = now + self._interval
        self._give_back(self._given_back)
        return True

    def _given_back(self) -> None:
        """Set the next interval by the amount that was returned. May be called from any thread."""
        if self._last - self._resident() < _LITTLE:
            self._interval = min(2 * self._interval, LONGEST_INTERVAL_SECONDS)
        else:
            self._interval = INTERVAL_SECONDS


def freed_memory() -> FreedMemory | None:
    """The `FreedMemory` of this process; None if memory cannot be returned on this system. To be made before the
    process confines itself, because it opens a file and keeps it open."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return None
    try:
        descriptor = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    page = os.sysconf("SC_PAGESIZE")

    def resident() -> int:
        """The octets of resident memory, without shared pages (snapshots and files)."""
        try:
            fields = os.pread(descriptor, _STATM_OCTETS, 0).split()
            return (int(fields[1]) - int(fields[2])) * page
        except (OSError, ValueError, IndexError):
            return 0

    def work(done: Callable[[], None]) -> None:
        trim(0)
        done()

    def give_back(done: Callable[[], None]) -> None:
        # If no thread can be started (a limit of processes), the memory stays until one can.
        with suppress(RuntimeError):
            threading.Thread(target=work, args=(done,), name="memory-return", daemon=True).start()

    return FreedMemory(resident, give_back)
