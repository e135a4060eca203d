"""Reads the protocols that a TLS client offers (ALPN, RFC 7301) from its ClientHello.

Python's ``ssl`` cannot refuse a client that does not offer h2: it completes the handshake without a protocol. So the
offer is read before the handshake begins. For a client that is refused, this also saves the CPU time of the handshake.
"""

from __future__ import annotations

from collections.abc import Iterator

_RECORD = 5
_HANDSHAKE = 0x16
_CLIENT_HELLO = 1
_ALPN = 16


def offered_protocols(octets: bytes) -> tuple[bytes, ...] | None:
    """The protocols that the ClientHello in ``octets`` offers, empty if it has no such extension.

    None if ``octets`` are incomplete or are not a ClientHello; the handshake deals with both cases.
    """
    try:
        return _offered(_message(octets))
    except (IndexError, ValueError):
        return None


def _message(octets: bytes) -> bytes:
    """The ClientHello's body, joined from its records (RFC 8446 section 5.1)."""
    joined, position = bytearray(), 0
    while octets[position] == _HANDSHAKE:
        length = int.from_bytes(octets[position + 3 : position + _RECORD], "big")
        fragment = octets[position + _RECORD : position + _RECORD + length]
        joined += fragment
        position += _RECORD + length
        if len(joined) >= 4 and len(joined) - 4 >= int.from_bytes(joined[1:4], "big"):
            break
        if not length or len(fragment) < length:
            raise ValueError("incomplete")
    if joined[0] != _CLIENT_HELLO:
        raise ValueError("not a ClientHello")
    return bytes(joined[4:])


def _offered(hello: bytes) -> tuple[bytes, ...]:
    """The fields of RFC 8446 section 4.1.2, in order: version, random, session id, cipher suites, compression methods,
    extensions."""
    position = 2 + 32
    position += 1 + hello[position]
    position += 2 + int.from_bytes(hello[position : position + 2], "big")
    position += 1 + hello[position]
    for kind, content in _extensions(hello[position + 2 :]):
        if kind == _ALPN:
            return tuple(_names(content[2:]))
    return ()


def _extensions(octets: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while position + 4 <= len(octets):
        kind, length = (int.from_bytes(octets[at : at + 2], "big") for at in (position, position + 2))
        yield kind, octets[position + 4 : position + 4 + length]
        position += 4 + length


def _names(octets: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(octets):
        length = octets[position]
        yield octets[position + 1 : position + 1 + length]
        position += 1 + length
