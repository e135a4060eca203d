"""Layout of a snapshot: ``body`` · ``index`` · ``footer``, all integers little-endian.

- ``body``: a serialized ``avap.CatalogResponse`` (commands sorted by the UTF-8 bytes of their names, then
  ``total_count`` and ``version_hash``).
- ``index``: a power-of-two count of 24-octet slots (hash, offset, length): an open-addressing hash table with linear
  probing from a command's name to its ``CommandResponse`` in the body. A slot of length 0 is free (no answer is empty).
- ``footer``: `Footer`, 160 octets at the very end, so that a reader finds it from the size alone. It carries a SHA-256
  of everything before the footer, and one of the footer itself.

SHA-256 and not a CRC, because a CRC is sure to find an error only up to some burst length. With the CPU's instructions
SHA-256 costs 0.5 ms per MB, once per file.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

MAGIC = b"AVAPSNAP"
FORMAT = 1

SLOT = struct.Struct("<QQQ")
"""One index slot: hash of the name, offset and length of the answer in the body."""

# magic, format, reserved, generation, created-at (ns since the epoch), commands, body length, slots,
# key id, version hash, SHA-256 of body and index
_FIELDS = struct.Struct("<8sIIQQQQQ8s32s32s")
_DIGEST_SIZE = 32
_HASH_SIZE = 8
_HASHED_TOGETHER = 4096
"""The hashes of so many names are computed together. Computing all at once would take more memory."""
FOOTER_SIZE = _FIELDS.size + _DIGEST_SIZE


class SnapshotError(ValueError):
    """Octets that are not a complete, undamaged snapshot. The message names the check that failed."""


@dataclass(frozen=True, slots=True)
class Footer:
    """The facts about a snapshot that can be read without reading its body."""

    generation: int
    created_at_ns: int
    count: int
    body_length: int
    slots: int
    key_id: bytes
    version_hash: bytes
    content_digest: bytes

    def same_octets(self, other: Footer) -> bool:
        """Whether both snapshots have the same body and index, and so the same octets in every answer.

        Equal version hashes do not show that, because ids and signatures are not part of them.
        """
        return (self.content_digest, self.key_id) == (other.content_digest, other.key_id)

    def pack(self) -> bytes:
        """The footer's octets. The last of them are the footer's own digest."""
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT,
            0,
            self.generation,
            self.created_at_ns,
            self.count,
            self.body_length,
            self.slots,
            self.key_id,
            self.version_hash,
            self.content_digest,
        )
        return fields + hashlib.sha256(fields).digest()

    @classmethod
    def unpack(cls, buffer: memoryview) -> Footer:
        """The footer of the snapshot in ``buffer``, checked. ``buffer`` has the snapshot and nothing else. O(1).

        Raises:
            SnapshotError: if a check fails.
        """
        return cls.unpack_end(buffer[-FOOTER_SIZE:], len(buffer))

    @classmethod
    def unpack_end(cls, end: memoryview, total: int) -> Footer:
        """The footer in ``end``, checked, of a snapshot of ``total`` octets.

        Raises:
            SnapshotError: if a check fails.
        """
        if len(end) < FOOTER_SIZE:
            raise SnapshotError(f"truncated: {len(end)} bytes are shorter than the footer ({FOOTER_SIZE})")
        octets = bytes(end)
        magic, version, _, *values = _FIELDS.unpack_from(octets)
        if magic != MAGIC:
            raise SnapshotError(f"magic: {magic!r} found where {MAGIC!r} was expected: truncated, or no snapshot")
        if version != FORMAT:
            raise SnapshotError(f"format: version {version} found, this program reads version {FORMAT}")
        if hashlib.sha256(octets[: _FIELDS.size]).digest() != octets[_FIELDS.size :]:
            raise SnapshotError("footer checksum: the footer is damaged")
        footer = cls(*values)
        footer._check_sizes(total)
        return footer

    def _check_sizes(self, total: int) -> None:
        expected = self.body_length + self.slots * SLOT.size + FOOTER_SIZE
        if total != expected:
            raise SnapshotError(f"size: {total} bytes found, the footer says {expected}")
        if self.slots.bit_count() != 1 or self.slots <= self.count:
            raise SnapshotError(f"index: {self.slots} slots cannot hold {self.count} commands")


def slot_count(commands: int) -> int:
    """Slots for ``commands``: a power of two that leaves at least half of them free, which keeps probe runs short."""
    return 1 << max(3, (2 * commands - 1).bit_length())


def name_hash(name: bytes) -> int:
    """64-bit hash of a name, the same in every process (Python's own ``hash`` is seeded per process)."""
    return int.from_bytes(blake2b(name, digest_size=_HASH_SIZE).digest(), "little")


def name_hashes(names: Sequence[bytes]) -> array[int]:
    """`name_hash` of each of ``names``."""
    hashes, start = array("Q"), blake2b(digest_size=_HASH_SIZE)
    for first in range(0, len(names), _HASHED_TOGETHER):
        octets = []
        for name in names[first : first + _HASHED_TOGETHER]:
            state = start.copy()  # copying a hash object takes less time than making one
            state.update(name)
            octets.append(state.digest())
        hashes.frombytes(b"".join(octets))
    if sys.byteorder == "big":
        hashes.byteswap()
    return hashes
