"""Reads the requests of this server's methods: protobuf messages with one text in field 1, or with no field at all.

The protobuf library is not used, because it would cost a worker 5 MB and a fifth of its start time, only for messages
that hold one name. This reader refuses and accepts the same octets as the library, except for field number 0, which the
library accepts in some places. Fields that are not known are skipped, as proto3 requires.

The source is protobuf.dev, "Encoding". A request has at most `services.MAX_REQUEST` octets.
"""

from __future__ import annotations

from collections.abc import Iterator

from definition_server.catalog.wire import LENGTH_DELIMITED, VARINT, WireError, read_varint

_TEXT = 1
"""The field number of the text in ``avap.CommandRequest`` and ``grpc.health.v1.HealthCheckRequest``."""
_FIXED64, _GROUP, _GROUP_END, _FIXED32 = 1, 3, 4, 5
_FIXED_SIZES = {_FIXED64: 8, _FIXED32: 4}
_SHORT_OCTETS = 5
_LARGEST_TAG = 2**32 - 1
_DEEPEST = 100
"""The deepest nesting of groups that the protobuf library accepts."""


def text_of(request: bytes) -> bytes:
    """The text of a message with one text field: valid UTF-8; empty if the field is missing.

    Raises:
        WireError: if ``request`` is not such a message.
    """
    text = b""
    for number, kind, content in _fields(request):
        if number == _TEXT and kind == LENGTH_DELIMITED:
            try:
                content.decode()
            except UnicodeDecodeError:
                raise WireError("the text is not UTF-8") from None
            text = content  # if a field occurs twice, the last one is used
    return text


def check_empty(request: bytes) -> None:
    """Accept a message without known fields.

    Raises:
        WireError: if ``request`` is not a protobuf message.
    """
    for _ in _fields(request):
        pass


def _fields(request: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The fields of a message: (number, wire type, content of a length-delimited one)."""
    position = 0
    while position < len(request):
        number, kind, position = _tag(request, position)
        start, position = _skip(request, position, number, kind, 1)
        yield number, kind, request[start:position] if kind == LENGTH_DELIMITED else b""


def _tag(request: bytes, position: int) -> tuple[int, int, int]:
    """Number, wire type, and the position after the tag."""
    tag, after = _short_varint(request, position)
    if not 8 <= tag <= _LARGEST_TAG:  # number 0 is illegal
        raise WireError(f"no tag at {position}")
    return tag >> 3, tag & 7, after


def _short_varint(request: bytes, position: int) -> tuple[int, int]:
    """A tag or a length: a 32-bit number, in at most as many octets as such a number can take."""
    value, after = read_varint(request, position)
    if after - position > _SHORT_OCTETS:
        raise WireError(f"a tag or length of more than {_SHORT_OCTETS} octets at {position}")
    return value, after


def _skip(request: bytes, position: int, number: int, kind: int, depth: int) -> tuple[int, int]:
    """The positions at which the content of a field begins and ends."""
    start = position
    if kind == VARINT:
        _, position = read_varint(request, position)
    elif kind == LENGTH_DELIMITED:
        length, start = _short_varint(request, position)
        position = start + length
    elif kind in _FIXED_SIZES:
        position += _FIXED_SIZES[kind]
    elif kind == _GROUP and depth <= _DEEPEST:
        position = _after_group(request, position, number, depth)
    else:
        raise WireError(f"wire type {kind} before position {position}")
    if position > len(request):
        raise WireError(f"a field at {start} runs past the end {len(request)}")
    return start, position


def _after_group(request: bytes, position: int, number: int, depth: int) -> int:
    """The position after the group ``number``, which begins at ``position``."""
    while True:
        inner, kind, position = _tag(request, position)
        if kind == _GROUP_END:
            if inner != number:
                raise WireError(f"group {number} ends as group {inner}")
            return position
        _, position = _skip(request, position, inner, kind, depth + 1)
