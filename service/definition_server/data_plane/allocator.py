"""How a worker's C library keeps memory that was freed.

glibc serves blocks below a threshold from a heap, which can only shrink from its end: one small block that lives there
keeps everything before it resident. The threshold begins at 128 KiB and rises to the size of each larger block that is
freed (``M_MMAP_THRESHOLD``, mallopt(3)). Thousands of connections of an attacker, each with blocks of some 64 kB (input
that waits), so left 70 to 110 MB resident in a worker that held no connection any more. With a fixed, lower threshold
such blocks are mappings of their own, and the kernel has them back as soon as they are freed.
"""

from __future__ import annotations

import ctypes

LARGEST_BLOCK_OF_THE_HEAP = 32 * 1024
"""Octets. An honest request or answer is smaller, and does not pay for a mapping; what an attacker can make us hold per
connection is larger."""
_M_MMAP_THRESHOLD = -3


def return_large_blocks() -> bool:
    """Give freed blocks above `LARGEST_BLOCK_OF_THE_HEAP` back to the kernel, from now on. Returns False where the C
    library has no such setting (musl: it does so anyway)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, LARGEST_BLOCK_OF_THE_HEAP))
