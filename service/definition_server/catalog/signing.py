"""The signed package that language servers verify before they run a definition.

Layout: ``b"AVAP"`` · version ``uint16`` big-endian · payload length ``uint32`` big-endian · HMAC-SHA-256 (32 bytes)
over those 10 octets and the payload · payload.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

MAGIC = b"AVAP"
VERSION = 1
_HEADER = struct.Struct(">4sHI")
_MAC_SIZE = 32
OVERHEAD = _HEADER.size + _MAC_SIZE
"""Octets that a package adds to its payload."""

UNSIGNED = bytes(8)
"""The key id of an unsigned snapshot."""


class SignatureError(ValueError):
    """Octets that are not a signed package, or that were signed with another key."""


class Signer:
    """Signs payloads with one key."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()
        # Distinguishes two keys in a stored snapshot, and reveals nothing about either.
        self.key_id = hmac.digest(self._key, b"AVAP definition server: key id", hashlib.sha256)[:8]

    def pack(self, payload: bytes) -> bytes:
        """The signed package around ``payload`` (below 4 GiB)."""
        header = _HEADER.pack(MAGIC, VERSION, len(payload))
        signed = header + payload
        return header + hmac.digest(self._key, signed, hashlib.sha256) + payload

    def unpack(self, package: bytes) -> bytes:
        """The payload of ``package``.

        Raises:
            SignatureError: where the package is damaged or was signed with another key.
        """
        payload = payload_of(package)
        expected = hmac.digest(self._key, package[: _HEADER.size] + payload, hashlib.sha256)
        if not hmac.compare_digest(expected, package[_HEADER.size : OVERHEAD]):
            raise SignatureError("the signature does not match: damaged, or signed with another key")
        return payload


def payload_of(package: bytes) -> bytes:
    """The payload of ``package``. The signature is not verified.

    Raises:
        SignatureError: where the header is not that of a package of this version, or the length disagrees.
    """
    if len(package) < OVERHEAD:
        raise SignatureError(f"{len(package)} bytes are too short for a signed package")
    magic, version, length = _HEADER.unpack_from(package)
    if magic != MAGIC or version != VERSION:
        raise SignatureError(f"magic {magic!r} version {version}, expected {MAGIC!r} version {VERSION}")
    if length != len(package) - OVERHEAD:
        raise SignatureError(f"the header says {length} bytes of payload, {len(package) - OVERHEAD} are there")
    return package[OVERHEAD:]
