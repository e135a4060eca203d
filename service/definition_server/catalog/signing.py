"""The signed package that language servers verify before they run a definition.

Layout: ``b"AVAP"`` · version ``uint16`` big-endian · payload length ``uint32`` big-endian · HMAC-SHA-256 (32 bytes) ·
payload. The content that the HMAC covers depends on the version:

- **1**: the 10 octets before the HMAC, and the payload. So the package of one command also verifies as the package of
  any other.
- **2**: the 10 octets before the HMAC, the *binding*, and the payload. The binding is name, type, interface and hash of
  the ``CommandResponse`` that carries the package, in this order. Each is written as its length (``uint32`` big-endian)
  and its UTF-8 octets. A package then verifies only in the answer that it was made for.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from dataclasses import dataclass

MAGIC = b"AVAP"
VERSIONS = (1, 2)
_BOUND = 2
_LENGTH = struct.Struct(">I")
_HEADER = struct.Struct(">4sHI")
_MAC_SIZE = 32
OVERHEAD = _HEADER.size + _MAC_SIZE
"""Octets that a package adds to its payload."""

UNSIGNED = bytes(8)
"""The key id of an unsigned snapshot."""


class SignatureError(ValueError):
    """Octets that are not a signed package, or that were signed with another key."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The fields that a package of version 2 is bound to: the other fields of its ``CommandResponse``, as UTF-8."""

    name: bytes
    type: bytes
    interface: bytes
    hash: bytes
    """64 hexadecimal digits."""

    def octets(self) -> bytes:
        """The binding as octets that the HMAC covers."""
        return b"".join(_LENGTH.pack(len(part)) + part for part in (self.name, self.type, self.interface, self.hash))


class Signer:
    """Signs payloads with one key, in packages of one version."""

    def __init__(self, key: str, version: int = 1, *, previous: Signer | None = None) -> None:
        """
        Args:
            key: The key.
            version: One of `VERSIONS`.
            previous: A signer with the previous key. Files whose MAC was made with the previous key are still valid,
                but nothing is signed with that key.
        """
        self.previous = previous
        self._key = key.encode()
        self._version = version
        # The key id in a stored snapshot differs between keys and between versions, and reveals nothing about the keys.
        purpose = b"AVAP definition server: key id" + (b"" if version == 1 else b" %d" % version)
        self.key_id = hmac.digest(self._key, purpose, hashlib.sha256)[:8]
        self._file_key = hmac.digest(self._key, b"AVAP definition server: last-known-good file", hashlib.sha256)
        self._wishes_key = hmac.digest(self._key, b"AVAP definition server: wishes", hashlib.sha256)

    def pack(self, payload: bytes, binding: Binding | None = None) -> bytes:
        """The signed package around ``payload`` (below 4 GiB). Version 2 needs ``binding``; version 1 ignores it."""
        header = _HEADER.pack(MAGIC, self._version, len(payload))
        return header + self._mac(header, binding, payload) + payload

    def unpack(self, package: bytes, binding: Binding | None = None) -> bytes:
        """The payload of ``package``, which came with ``binding``.

        Raises:
            SignatureError: if the package is damaged, belongs to another command, has the other version, or was
                signed with another key.
        """
        payload = payload_of(package)
        header = package[: _HEADER.size]
        if _HEADER.unpack(header)[1] != self._version:
            raise SignatureError(f"it is not of version {self._version}")
        if not hmac.compare_digest(self._mac(header, binding, payload), package[_HEADER.size : OVERHEAD]):
            raise SignatureError("the signature does not match: damaged, or signed with another key")
        return payload

    def _mac(self, header: bytes, binding: Binding | None, payload: bytes) -> bytes:
        assert binding is not None or self._version != _BOUND, "version 2 binds a package to its command"
        bound = binding.octets() if binding is not None and self._version == _BOUND else b""
        return hmac.digest(self._key, header + bound + payload, hashlib.sha256)

    def file_mac(self, footer: bytes) -> bytes:
        """The HMAC of a stored snapshot with this ``footer``, with a key that is derived from the signing key."""
        return hmac.digest(self._file_key, footer, hashlib.sha256)

    def made_file_mac(self, mac: bytes, footer: bytes) -> bool:
        """Whether ``mac`` is the `file_mac` of ``footer`` with the present or the previous key."""
        if hmac.compare_digest(mac, self.file_mac(footer)):
            return True
        return self.previous is not None and self.previous.made_file_mac(mac, footer)

    def made_wishes_mac(self, mac: bytes, octets: bytes) -> bool:
        """Whether ``mac`` is the `wishes_mac` of ``octets`` with the present or the previous key."""
        if hmac.compare_digest(mac, self.wishes_mac(octets)):
            return True
        return self.previous is not None and self.previous.made_wishes_mac(mac, octets)

    def wishes_mac(self, octets: bytes) -> bytes:
        """The HMAC of the file of operators' wishes, with another derived key, so that no snapshot's MAC is valid for
        it.
        """
        return hmac.digest(self._wishes_key, octets, hashlib.sha256)


def payload_of(package: bytes) -> bytes:
    """The payload of ``package``. The signature is not verified.

    Raises:
        SignatureError: if the header is not that of a package of a known version, or the length disagrees.
    """
    if len(package) < OVERHEAD:
        raise SignatureError(f"{len(package)} bytes are too short for a signed package")
    magic, version, length = _HEADER.unpack_from(package)
    if magic != MAGIC or version not in VERSIONS:
        raise SignatureError(f"magic {magic!r} version {version}, expected {MAGIC!r} version 1 or 2")
    if length != len(package) - OVERHEAD:
        raise SignatureError(f"the header says {length} bytes of payload, {len(package) - OVERHEAD} are there")
    return package[OVERHEAD:]
