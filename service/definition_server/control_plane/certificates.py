"""Reads from PEM files when certificates expire.

`ssl` reports the date only for a certificate that was verified, and an expired certificate cannot be verified. So this
module reads the date itself, by the structure of RFC 5280, section 4.1.
"""

from __future__ import annotations

import re
import ssl
from datetime import UTC, datetime
from pathlib import Path

_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)

_SEQUENCE, _VERSION = 0x30, 0xA0
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18


def earliest_expiry(path: Path) -> float | None:
    """The time when the first of the certificates in a PEM file expires, in seconds since the epoch. None if it is not
    known.

    A chain is valid until any of its certificates expires.
    """
    try:
        found = [_expiry(ssl.PEM_cert_to_DER_cert(pem.decode())) for pem in _CERTIFICATE.findall(path.read_bytes())]
    except (OSError, ValueError, IndexError):
        return None
    return min(found, default=None)


def _expiry(der: bytes) -> float:
    """
    Raises:
        ValueError, IndexError: if ``der`` is not a certificate.
    """
    fields = _items(_items(_items(der)[0][1])[0][1])
    if fields[0][0] == _VERSION:
        fields = fields[1:]
    _serial, _algorithm, _issuer, (kind, validity), *_ = fields
    if kind != _SEQUENCE:
        raise ValueError("no validity")
    tag, octets = _items(validity)[1]
    text = octets.decode("ascii")
    if tag == _UTC_TIME:  # the year has two digits: 50 to 99 mean 1950 to 1999
        text = ("19" if int(text[:2]) >= 50 else "20") + text
    elif tag != _GENERALIZED_TIME:
        raise ValueError("no time")
    return datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=UTC).timestamp()


def _items(octets: bytes) -> list[tuple[int, bytes]]:
    """The (tag, content) pairs of a constructed value in DER."""
    found = []
    at = 0
    while at < len(octets):
        tag, length = octets[at], octets[at + 1]
        at += 2
        if length & 0x80:
            count = length & 0x7F
            length = int.from_bytes(octets[at : at + count], "big")
            at += count
        if at + length > len(octets):
            raise ValueError("a value is cut off")
        found.append((tag, octets[at : at + length]))
        at += length
    return found
