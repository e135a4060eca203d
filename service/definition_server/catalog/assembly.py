"""Assembles the parts of a snapshot other than the messages of its commands: version hash, tail of the body and index.

The version hash and the index are not computed from the start: they continue from those of the previous snapshot after
the commands that both snapshots begin with.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat

from definition_server.catalog import wire
from definition_server.catalog.layout import SLOT
from definition_server.catalog.previous_build import Arrangement, Hash

_HASHED_TOGETHER = 1024
"""So many names, with their hashes, are joined and then hashed in one call: a call for each name would cost more than
the copy.
"""

_CHUNK_OCTETS = 1 << 20
"""Octets of a chunk that is hashed and written at once. The allocator would return the memory of a larger chunk to the
kernel each time.
"""
_LONG_OCTETS = 64 << 10
"""A piece of more octets than this is not joined with other pieces, which would copy it."""

_SLOT_NUMBERS = SLOT.size // 8
"""A slot of the index has so many numbers of 64 bits."""


def version_hash(
    names: Sequence[bytes],
    digests: Mapping[bytes, bytes],
    states: list[Hash],
    before: Sequence[Hash],
    unchanged: int,
) -> bytes:
    """SHA-256 over ``name NUL hash`` of every definition; a PostgreSQL text cannot contain NUL.

    Args:
        names: The names, in order.
        digests: Their hashes.
        states: An empty list, to which the state of the hash before each `_HASHED_TOGETHER` names is appended.
        before: The states of the previous snapshot.
        unchanged: How many of the first names are the same in the previous snapshot, with the same hashes.
    """
    states += before[: unchanged // _HASHED_TOGETHER + 1]
    digest = states[-1].copy() if states else hashlib.sha256()
    for start in range(_HASHED_TOGETHER * max(0, len(states) - 1), len(names), _HASHED_TOGETHER):
        if start >= _HASHED_TOGETHER * len(states):
            states.append(digest.copy())
        some = names[start : start + _HASHED_TOGETHER]
        digest.update(b"".join(chain.from_iterable(zip(some, repeat(b"\0"), map(digests.__getitem__, some)))))
    return digest.digest()


def catalog_tail(count: int, version: bytes) -> bytes:
    """The fields of ``CatalogResponse`` that follow its commands: the number of commands, and the version hash."""
    total = bytes([wire.TOTAL_COUNT << 3 | wire.VARINT]) + wire.varint(count) if count else b""
    return total + wire.field(wire.VERSION_HASH, version.hex().encode("ascii"))


def slots(count: int, hashes: Iterable[int]) -> Iterator[int]:
    """The slot of each name in an index of ``count`` slots, in the order of ``hashes``."""
    mask = count - 1
    taken = bytearray(count)
    for hashed in hashes:
        slot = hashed & mask
        while taken[slot]:
            slot = (slot + 1) & mask
        taken[slot] = 1
        yield slot


def index(count: int, arrangement: Arrangement) -> memoryview:
    """The index, of ``count`` slots."""
    octets = bytearray(count * SLOT.size)
    put, size = SLOT.pack_into, SLOT.size
    parts = (arrangement.slots, arrangement.hashes, arrangement.offsets, arrangement.lengths)
    for slot, hashed, offset, length in zip(*parts, strict=True):
        put(octets, slot * size, hashed, offset, length)
    return memoryview(octets)  # not copied: the index has a twentieth of the octets of a large catalogue


def index_after(index: memoryview, arrangement: Arrangement, unchanged: int) -> memoryview:
    """A copy of ``index`` with the places from ``arrangement``, which has the same names. The first ``unchanged``
    places have not changed.
    """
    octets = array("Q")
    octets.frombytes(index)
    if sys.byteorder == "big":  # the integers of a snapshot are little-endian
        octets.byteswap()
    parts = (arrangement.slots[unchanged:], arrangement.offsets[unchanged:], arrangement.lengths[unchanged:])
    for slot, offset, length in zip(*parts, strict=True):
        slot *= _SLOT_NUMBERS
        octets[slot + 1] = offset
        octets[slot + 2] = length
    if sys.byteorder == "big":
        octets.byteswap()
    return memoryview(octets).cast("B")


def chunks(pieces: list[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """``pieces``, one after the other, in chunks of about 1 MiB. Removes each piece from the list, so that its memory
    can be freed.
    """
    pieces.reverse()
    while pieces:
        if len(pieces[-1]) > _LONG_OCTETS:
            piece = memoryview(pieces.pop())
            for start in range(0, len(piece), _CHUNK_OCTETS):
                yield piece[start : start + _CHUNK_OCTETS]
            del piece
            continue
        some, room = [], _CHUNK_OCTETS
        while pieces and room > 0 and (size := len(pieces[-1])) <= _LONG_OCTETS:
            some.append(pieces.pop())
            room -= size
        yield b"".join(some)
