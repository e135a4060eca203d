"""The stats pages: one page of sealed memory per worker process, with 64-bit counters.

A worker is the only writer of its page, and adds without a lock. The worker maps the page before its first client
connects, and reports this to the master, which then seals the memory against every further writer (`StatsPage.seal`).
The master can only read the page, and so can the other workers, which need the connection count before they accept a
connection. So a faulty worker damages only its own page; `control_plane.worker_stats` checks the values. The master
never maps a page: it reads the page by ``pread``, which cannot fail with SIGBUS.

Two values of one page may differ by one request, but each value is consistent, because an aligned 64-bit store is
atomic.
"""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_left
from dataclasses import dataclass
from enum import IntEnum
from mmap import MAP_SHARED, PROT_READ, mmap

STATUSES = ("200", "400", "401", "404", "500", "503")
"""Request outcomes in HTTP terms, as the metric labels them."""

METHODS = ("GetCommand", "SyncCatalog")

LATENCY_BOUNDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the latency buckets in seconds. One more bucket counts longer times."""

REFUSALS = ("peer_limit", "full", "evicted", "no_call")
"""The reasons why a connection was refused or closed although its client made no mistake, in the order of
`grpc_h2.Refusal`.
"""

BUCKETS = len(LATENCY_BOUNDS) + 1
"""The number of latency buckets of a method."""
_HASH_WORDS = 4
_WORD = 8
_SEALED_SIZE = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_F_SEAL_FUTURE_WRITE = 0x0010
"""The seal that forbids further writable mappings and ``write``; existing mappings stay writable (``fcntl(2)``, since
Linux 5.1). The constant is missing in the module ``fcntl``."""


class Word(IntEnum):
    """The position of each value in a slot."""

    PID = 0
    HEARTBEAT = 1
    GENERATION = 2
    ENTRIES = 3
    ACCEPTING = 4
    CONNECTIONS = 5
    OPENED = 6
    VERSION_HASH = 7
    REQUESTS = VERSION_HASH + _HASH_WORDS
    LATENCY = REQUESTS + len(STATUSES)
    NANOSECONDS = LATENCY + len(METHODS) * BUCKETS
    ROOM = NANOSECONDS + len(METHODS)
    REFUSED = ROOM + 1
    LINES_DROPPED = REFUSED + len(REFUSALS)
    END = LINES_DROPPED + 1


SLOT_SIZE = Word.END * _WORD
# Indexing with a plain int is several times faster than with a member of an IntEnum.
_HEARTBEAT, _ACCEPTING, _CONNECTIONS, _OPENED = (
    int(word) for word in (Word.HEARTBEAT, Word.ACCEPTING, Word.CONNECTIONS, Word.OPENED)
)
_REQUESTS, _FIRST_BUCKET, _NANOSECONDS = int(Word.REQUESTS), int(Word.LATENCY), int(Word.NANOSECONDS)
_BOUNDS_NS = tuple(int(bound * 1e9) for bound in LATENCY_BOUNDS)


class Room(IntEnum):
    """Whether a worker has room for another connection."""

    FREE = 0
    FULL = 1
    """The worker has the most connections allowed. Idle connections without an authorized call are closed in favour of
    new ones."""
    TAKEN = 2
    """The worker has the most connections allowed, and an authorized call was made on each."""


@dataclass(frozen=True, slots=True)
class SlotReading:
    """The values of a page at one moment."""

    pid: int
    heartbeat_ns: int
    generation: int
    entries: int
    version_hash: str
    accepting: bool
    """Whether the worker accepts new connections."""
    connections: int
    """Connections that are open now."""
    opened: int
    """Connections that the worker has accepted so far."""
    requests: dict[str, int]
    """Status → requests."""
    latency: dict[str, tuple[int, ...]]
    """Method → requests per bucket of `LATENCY_BOUNDS`, not cumulated."""
    latency_sum_seconds: dict[str, float]
    room: Room
    refused: dict[str, int]
    """Reason → connections."""
    lines_dropped: int = 0
    """Log lines of the worker that were dropped."""


class Slot:
    """One worker's counters."""

    def __init__(self, words: memoryview) -> None:
        self._words = words

    def start(self, pid: int, now_ns: int) -> None:
        """Note the start of the process that maps the page."""
        self._words[Word.HEARTBEAT] = now_ns
        self._words[Word.PID] = pid

    def beat(self, now_ns: int) -> None:
        """Note that the worker's event loop runs. ``now_ns`` is CLOCK_MONOTONIC; readers only compare whether it has
        changed.
        """
        self._words[Word.HEARTBEAT] = now_ns

    def serve(self, generation: int, entries: int, version_hash: bytes) -> None:
        """Note the snapshot that the worker serves from now on."""
        for number in range(_HASH_WORDS):
            word = version_hash[number * _WORD : (number + 1) * _WORD]
            self._words[Word.VERSION_HASH + number] = int.from_bytes(word, "little")
        self._words[Word.ENTRIES] = entries
        self._words[Word.GENERATION] = generation

    def count(self, method: int, status: int, elapsed_ns: int) -> None:
        """Count one request. Arguments: indices into `METHODS` and `STATUSES`, and its duration."""
        self.count_many(method, status, 1, elapsed_ns)

    def count_many(self, method: int, status: int, number: int, elapsed_ns: int) -> None:
        """Count ``number`` requests with the same outcome, each answered in ``elapsed_ns``."""
        words = self._words
        words[_REQUESTS + status] += number
        words[_FIRST_BUCKET + method * BUCKETS + bisect_left(_BOUNDS_NS, elapsed_ns)] += number
        words[_NANOSECONDS + method] += number * elapsed_ns

    def start_accepting(self) -> None:
        """Note that the worker accepts new connections from now on."""
        self._words[Word.ACCEPTING] = 1

    def stop_accepting(self) -> None:
        """Note that the worker accepts no more connections, because it drains."""
        self._words[Word.ACCEPTING] = 0

    def connected(self, connections: int, opened: int) -> None:
        """Note the present number of connections, and ``opened``, the number accepted since the last call."""
        self._words[Word.CONNECTIONS] = connections
        self._words[Word.OPENED] += opened

    def set_room(self, room: Room) -> None:
        """Note the worker's room for another connection."""
        self._words[Word.ROOM] = room

    def refused(self, reason: int) -> None:
        """Count a connection that the worker has refused or closed, by its index into `REFUSALS`."""
        self._words[Word.REFUSED + reason] += 1

    def lines_dropped(self, lines: int) -> None:
        """Note the number of the worker's log lines that were dropped since its start."""
        self._words[Word.LINES_DROPPED] = lines

    def load(self) -> tuple[bool, int, int, int]:
        """The values by which other workers decide: accepting, connections, opened, heartbeat in nanoseconds."""
        words = self._words
        return words[_ACCEPTING] == 1, words[_CONNECTIONS], words[_OPENED], words[_HEARTBEAT]

    def read(self) -> SlotReading:
        """All values."""
        return read_words(self._words)


def read_words(words: memoryview) -> SlotReading:
    """The values of the `SLOT_SIZE` octets behind ``words``, a view of unsigned 64-bit integers."""
    version = b"".join(words[Word.VERSION_HASH + number].to_bytes(_WORD, "little") for number in range(_HASH_WORDS))
    return SlotReading(
        pid=words[Word.PID],
        heartbeat_ns=words[Word.HEARTBEAT],
        generation=words[Word.GENERATION],
        entries=words[Word.ENTRIES],
        version_hash=version.hex() if any(version) else "",
        accepting=words[Word.ACCEPTING] == 1,
        connections=words[Word.CONNECTIONS],
        opened=words[Word.OPENED],
        requests={status: words[Word.REQUESTS + i] for i, status in enumerate(STATUSES)},
        latency={
            method: tuple(words[Word.LATENCY + i * BUCKETS : Word.LATENCY + (i + 1) * BUCKETS])
            for i, method in enumerate(METHODS)
        },
        latency_sum_seconds={method: words[Word.NANOSECONDS + i] / 1e9 for i, method in enumerate(METHODS)},
        room=Room(min(words[Word.ROOM], Room.TAKEN)),
        refused={reason: words[Word.REFUSED + i] for i, reason in enumerate(REFUSALS)},
        lines_dropped=words[Word.LINES_DROPPED],
    )


class StatsPage:
    """One worker's page in the master, with the descriptor that the worker inherits."""

    def __init__(self) -> None:
        """A page of zeros whose size is fixed.

        Raises:
            OSError: if memory or descriptors are exhausted.
        """
        self.descriptor = os.memfd_create("definition-server-stats", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.descriptor, SLOT_SIZE)
            fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALED_SIZE)
        except BaseException:
            os.close(self.descriptor)
            raise

    def seal(self) -> None:
        """Leave the page writable only for processes that have mapped it.

        Raises:
            OSError: if the page cannot be sealed, because the worker has sealed it in another way.
        """
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)

    def read(self) -> SlotReading:
        """The present values as the worker wrote them, unchecked."""
        octets = os.pread(self.descriptor, SLOT_SIZE, 0)
        return read_words(memoryview(octets).cast("Q"))

    def close(self) -> None:
        """Close the descriptor. The worker's mapping stays valid."""
        os.close(self.descriptor)


def map_own(descriptor: int) -> Slot:
    """A worker's own page, writable. Closes ``descriptor``: the mapping stays.

    Raises:
        OSError: if the page cannot be mapped.
    """
    try:
        return Slot(memoryview(mmap(descriptor, SLOT_SIZE)).cast("Q"))
    finally:
        os.close(descriptor)


def map_peer(descriptor: int) -> Slot:
    """Another worker's page, which can only be read. Closes ``descriptor``.

    Raises:
        OSError: if the page cannot be mapped.
        ValueError: if the page is too short.
    """
    try:
        return Slot(memoryview(mmap(descriptor, SLOT_SIZE, flags=MAP_SHARED, prot=PROT_READ)).cast("Q"))
    finally:
        os.close(descriptor)


def unshared_slot() -> Slot:
    """A slot in this process's own memory, for a server without a master (the warm-up, tests)."""
    return Slot(memoryview(bytearray(SLOT_SIZE)).cast("Q"))
