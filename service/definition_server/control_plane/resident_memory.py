"""Keeps the master small after it has read, written or compared a large catalogue.

Two things would stay resident otherwise. glibc keeps freed blocks in its heap, which shrinks by itself only from its
end (malloc_trim(3)): after a first reading as much as the catalogue has. And whatever was read of a mapped snapshot
counts as memory of the process, although the snapshot is shared and in memory once.
"""

from __future__ import annotations

from definition_server.catalog.snapshot import Snapshot

NOTABLE_OCTETS = 16 << 20
"""Of a smaller catalogue nothing is given back: it would cost more than it is worth."""


def give_back_heap() -> None:
    """Return the freed pages of the heap to the kernel. Some 0.2 ms for each MB, in which no thread gets a large block.

    Without glibc (musl returns memory by itself) nothing is done.
    """
    import ctypes  # only where a catalogue is large: a small server starts without it

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back(snapshot: Snapshot, *, heap: bool) -> None:
    """Give back what is resident of ``snapshot``, where it is large, and what was freed of the ``heap``."""
    if snapshot.size >= NOTABLE_OCTETS:
        snapshot.release_pages()
        if heap:
            give_back_heap()
