"""Shared memory without names: a sealed ``memfd`` transports a snapshot from the master to every worker.

The seals (``fcntl(2)``, F_ADD_SEALS) make the memory immutable for all processes, the master included, so that a worker
may map it and rely on its size and content. The machine holds one copy, however many workers there are.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from mmap import MAP_SHARED, PROT_READ, mmap

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

_BATCH_PIECES = 1024
"""The most pieces in one ``writev``: IOV_MAX of Linux."""
_BATCH_OCTETS = 1 << 20
"""The octets from which pieces are written together without waiting for more pieces: the caller's generator can free
each piece when the next one is requested.
"""


class NotSealedError(ValueError):
    """The memory could still change, or is empty, so it is not mapped."""


def create_sealed(name: str, pieces: Iterable[bytes | memoryview]) -> int:
    """A sealed memfd that holds ``pieces`` one after the other. The caller closes the descriptor.

    Raises:
        OSError: if memory or descriptors are exhausted.
    """
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        for batch in _batches(pieces):
            _write_all(descriptor, batch)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _batches(pieces: Iterable[bytes | memoryview]) -> Iterator[list[bytes | memoryview]]:
    batch: list[bytes | memoryview] = []
    octets = 0
    for piece in pieces:
        batch.append(piece)
        octets += len(piece)
        if len(batch) == _BATCH_PIECES or octets >= _BATCH_OCTETS:
            yield batch
            batch, octets = [], 0
    if batch:
        yield batch


def _write_all(descriptor: int, pieces: list[bytes | memoryview]) -> None:
    """Write all of ``pieces``. The kernel copies them without an intermediate buffer; a call may write only a part."""
    written = os.writev(descriptor, pieces)
    for piece in pieces:
        if written >= len(piece):
            written -= len(piece)
            continue
        rest = memoryview(piece)[written:]
        written = 0
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def map_sealed(descriptor: int) -> mmap:
    """Map a sealed memfd for reading. The mapping outlives the descriptor.

    Raises:
        NotSealedError: if a seal is missing, or the memory is empty.
        OSError: if the memory cannot be mapped.
    """
    seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    if seals & SEALS != SEALS:
        raise NotSealedError(f"seals {seals:#x} found, {SEALS:#x} expected")
    if os.fstat(descriptor).st_size == 0:
        raise NotSealedError("the memory is empty")
    return mmap(descriptor, 0, flags=MAP_SHARED, prot=PROT_READ)
