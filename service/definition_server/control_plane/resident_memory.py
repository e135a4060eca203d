"""Keeps the master small after it has read, written or compared a large catalogue.

Otherwise two kinds of memory would stay resident. The first are freed blocks: glibc keeps them in its heap, which
shrinks by itself only from its end (malloc_trim(3)), and after a first reading they are as large as the catalogue. The
second are the pages of a mapped snapshot that were read: they count as memory of the process, although the snapshot is
shared and in memory only once.
"""

from __future__ import annotations

from definition_server.catalog.snapshot import Snapshot

NOTABLE_OCTETS = 16 << 20
"""For a catalogue of fewer octets no memory is released, because the cost would exceed the benefit."""


def give_back_heap() -> None:
    """Return the freed pages of the heap to the kernel. This takes some 0.2 ms for each MB, during which no thread can
    get a large block.

    Without glibc (musl returns memory by itself) nothing is done.
    """
    import ctypes  # imported only for a large catalogue, so that a small server starts without it

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def give_back(snapshot: Snapshot, *, heap: bool) -> None:
    """If ``snapshot`` is large, release its resident pages and, with ``heap``, the freed pages of the heap."""
    if snapshot.size >= NOTABLE_OCTETS:
        snapshot.release_pages()
        if heap:
            give_back_heap()
