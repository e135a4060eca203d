"""Code that is empty or only white space. A command with such code does nothing, so the guard counts it as removed."""

from __future__ import annotations

from definition_server.catalog import wire

LONGEST_BLANK = 1024
"""Code of more octets than this counts as not blank, without being examined."""

_CODE_TAG = wire.CODE << 3 | wire.LENGTH_DELIMITED


def is_blank(code: bytes) -> bool:
    """Whether ``code``, unsigned, is blank."""
    return len(code) <= LONGEST_BLANK and not code.strip()


def has_blank_code(message: bytes, overhead: int) -> bool:
    """Whether the code of ``message``, a ``CommandResponse``, is blank. ``overhead``: octets before the code in a
    signed package, 0 if it is not signed.
    """
    length, start = wire.read_varint(message, 1)
    return has_blank_code_after(memoryview(message), start + length, overhead)


def has_blank_code_after(message: memoryview, position: int, overhead: int) -> bool:
    """`has_blank_code`. ``position``: where the type begins, directly behind the name."""
    for _ in range(2):  # skip type and interface, which are always present
        length, start = wire.read_varint(message, position + 1)
        position = start + length
    if position >= len(message) or message[position] != _CODE_TAG:
        return True
    length, start = wire.read_varint(message, position + 1)
    return length - overhead <= LONGEST_BLANK and is_blank(bytes(message[start + overhead : start + length]))
