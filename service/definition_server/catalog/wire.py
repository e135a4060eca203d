"""The part of the protobuf wire format that snapshots use.

Source: protobuf.dev, "Encoding". Tags are ``field number << 3 | wire type``. All fields used here are
length-delimited (wire type 2), except ``CatalogResponse.total_count`` and the numbers of ``CommandResponse`` (varint,
wire type 0).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

_TYPE_MASK = 0x07
LENGTH_DELIMITED = 2
VARINT = 0

NAME, TYPE, INTERFACE_JSON, CODE, HASH, INTERNAL_ID, AVBC_CODE, AVBC_VERSION = 1, 2, 3, 4, 5, 6, 7, 8
"""Field numbers of ``CommandResponse``. ``CommandRequest`` has NAME too."""

COMMANDS, TOTAL_COUNT, VERSION_HASH = 1, 2, 3
"""Field numbers of ``CatalogResponse``."""

MAX_MESSAGE = 2**31 - 1
"""No protobuf implementation serializes a message above 2 GiB."""

UINT64 = 2**64 - 1
"""``value & UINT64`` is the form in which a varint carries a number below 0."""

_REMEMBERED_BELOW = 1 << 14
"""The first value whose varint has three octets."""

_LEAST_OF_TWO, _MOST_OF_TWO = 3 + (1 << 7), 3 + _REMEMBERED_BELOW - 1
"""Octets of the shortest and the longest field whose length is a varint of two octets."""


class _Varints(dict[int, bytes]):
    """Value → varint. A varint of one or two octets is kept here once it was used: nearly every length in a catalogue
    has one.
    """

    def __missing__(self, value: int) -> bytes:
        if value < 1 << 7:
            self[value] = encoded = bytes((value,))
        elif value < _REMEMBERED_BELOW:
            self[value] = encoded = bytes((value & 0x7F | 0x80, value >> 7))
        elif value < 1 << 21:  # for example the ids of a large table
            encoded = bytes((value & 0x7F | 0x80, value >> 7 & 0x7F | 0x80, value >> 14))
        else:
            octets = bytearray()
            while value > 127:
                octets.append(value & 0x7F | 0x80)
                value >>= 7
            octets.append(value)
            encoded = bytes(octets)
        return encoded


VARINTS = _Varints()
"""Each value in base 128, least significant group first. Values are not negative."""

varint = VARINTS.__getitem__
"""The varint of a value."""


class WireError(ValueError):
    """Octets that are not the expected protobuf message."""


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field; empty if ``value`` is empty, because proto3 omits default values."""
    if not value:
        return b""
    return varint(number << 3 | LENGTH_DELIMITED) + varint(len(value)) + value


def content_length(size: int) -> int:
    """The octets of the content of a length-delimited field of ``size`` octets, whose tag has one octet."""
    length = size - 2
    while 1 + len(varint(length)) + length > size:
        length -= 1
    return length


def content_lengths(sizes: Iterable[int]) -> list[int]:
    """`content_length` of each of ``sizes``."""
    # The varint of the length of nearly every field has two octets.
    return [size - 3 if _LEAST_OF_TWO <= size <= _MOST_OF_TWO else content_length(size) for size in sizes]


def fits_int32(value: int) -> bool:
    """Whether ``value`` fits into a signed 32-bit number."""
    return -(2**31) <= value < 2**31


def int32(value: int) -> int:
    """The ``int32`` that the varint ``value`` stands for: its lower 32 bits, as a signed number."""
    low = value & 0xFFFF_FFFF
    return low - 2**32 if low >= 2**31 else low


def read_varint(buffer: memoryview | bytes, position: int) -> tuple[int, int]:
    """The varint at ``position`` and the position after it.

    Raises:
        WireError: if the varint does not end within ten octets or within the buffer.
    """
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(buffer):
            break
        octet = buffer[position]
        position += 1
        value |= (octet & 0x7F) << shift
        if octet < 128:
            return value, position
    raise WireError(f"no varint ends before position {position}")


def fields(buffer: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The fields of a message: (number, varint value or 0, content).

    Raises:
        WireError: for a wire type that the catalogue does not use, or a length beyond the buffer.
    """
    position = 0
    while position < len(buffer):
        tag, position = read_varint(buffer, position)
        if tag & _TYPE_MASK == VARINT:
            value, position = read_varint(buffer, position)
            yield tag >> 3, value, buffer[:0]
        elif tag & _TYPE_MASK == LENGTH_DELIMITED:
            length, position = read_varint(buffer, position)
            if length > len(buffer) - position:
                raise WireError(f"a field of {length} bytes at {position} runs past the end {len(buffer)}")
            yield tag >> 3, 0, buffer[position : position + length]
            position += length
        else:
            raise WireError(f"wire type {tag & _TYPE_MASK} before position {position}")
