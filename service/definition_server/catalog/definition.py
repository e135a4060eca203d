"""The definition of a command, in two forms: as a row of the table, and in the wire format."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from definition_server.catalog import wire

LONGEST_ASKED_FOR = 4093
"""Octets of the longest name that fits into a request of 4,096 octets."""
_LONGEST_SHOWN = 200

DEFAULT_TYPE = b"function"
DEFAULT_INTERFACE = b"[]"


class Unserved(StrEnum):
    """Why a row is not served."""

    NULL_NAME = "null_name"
    EMPTY_NAME = "empty_name"
    NULL_CODE = "null_code"
    INVALID_ENCODING = "invalid_encoding"
    DUPLICATE = "duplicate"
    INVALID_ID = "invalid_id"
    TOO_LARGE = "too_large"
    INTERFACE_INVALID = "interface_invalid"
    CODE_INVALID = "code_invalid"


class Row(NamedTuple):
    """One row of the source table. Texts are undecoded octets, because a database may hold text that is not UTF-8."""

    id: int | None
    """None if the id is not a 64-bit integer; `fault` then has the reason, unless the row was rebuilt from a
    snapshot.
    """
    name: bytes | None
    type: bytes | None
    interface: bytes | None
    code: bytes | None
    avbc_code: bytes | None = None
    """The bytecode that belongs to ``code``, if there is any."""
    avbc_version: int | None = None
    """The version of ``avbc_code``, a signed 32-bit number."""
    fault: Unserved | None = None
    """The reason why the source could not read the row as it is; None if it could."""
    range: int | None = None
    """The range of the source that the row is in; None if the source was read without ranges."""


def shown(name: bytes) -> str:
    """A name as logs and pages show it. Only the beginning of a long name is shown: a table may hold a name of a
    mebibyte.
    """
    text = name[: 4 * _LONGEST_SHOWN].decode(errors="replace")
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 1] + "…"


@dataclass(frozen=True, slots=True)
class Definition:
    """One served definition. ``code`` is as served: source, or the signed package around it."""

    name: str
    type: str
    interface_json: str
    code: bytes
    hash: str
    internal_id: int = 0
    """The id of the row; 0 if it has no id, or one that does not fit into 32 bits."""
    avbc_code: bytes = b""
    avbc_version: int = 0


def content_fields(name: bytes, kind: bytes, interface: bytes, code: bytes) -> bytes:
    """Fields 1 to 4 of ``CommandResponse``, in order. Only ``code`` may be empty."""
    # Written as a single join with literal tags (field << 3 | 2), because this runs for each row of a full reading.
    varints = wire.VARINTS
    of_name, of_kind, of_interface = varints[len(name)], varints[len(kind)], varints[len(interface)]
    if not code:
        return b"".join((b"\x0a", of_name, name, b"\x12", of_kind, kind, b"\x1a", of_interface, interface))
    of_code = varints[len(code)]
    return b"".join(
        (b"\x0a", of_name, name, b"\x12", of_kind, kind, b"\x1a", of_interface, interface, b"\x22", of_code, code)
    )


def id_field(row_id: int | None) -> bytes:
    """Field 6 of ``CommandResponse``; empty if ``row_id`` is 0 (proto3 omits it) or does not fit into the field's 32
    bits.
    """
    if not row_id or not wire.fits_int32(row_id):
        return b""
    return b"\x30" + wire.varint(row_id & wire.UINT64)


def bytecode_fields(code: bytes, version: int | None) -> bytes:
    """Fields 7 and 8 of ``CommandResponse``, of a row with bytecode."""
    return wire.field(wire.AVBC_CODE, code) + (b"\x40" + wire.varint(version & wire.UINT64) if version else b"")


def content_hash(content: bytes) -> bytes:
    """Hex SHA-256 of a definition's content: `content_fields` with the *unsigned* code, then `bytecode_fields`.

    The row's id is not part of it.

    The wire form is unambiguous, because every field carries its length. Without the signature, two servers with
    different signing keys have the same hash for the same row.
    """
    return hashlib.sha256(content).hexdigest().encode("ascii")


def parse_definition(message: memoryview) -> Definition:
    """The definition that a serialized ``CommandResponse`` holds.

    Raises:
        WireError: if ``message`` is not a ``CommandResponse``.
    """
    values: dict[int, bytes] = {}
    numbers: dict[int, int] = {}
    for number, value, content in wire.fields(message):
        values[number] = bytes(content)
        numbers[number] = value
    try:
        return Definition(
            name=values.get(wire.NAME, b"").decode(),
            type=values.get(wire.TYPE, b"").decode(),
            interface_json=values.get(wire.INTERFACE_JSON, b"").decode(),
            code=values.get(wire.CODE, b""),
            hash=values.get(wire.HASH, b"").decode(),
            internal_id=wire.int32(numbers.get(wire.INTERNAL_ID, 0)),
            avbc_code=values.get(wire.AVBC_CODE, b""),
            avbc_version=wire.int32(numbers.get(wire.AVBC_VERSION, 0)),
        )
    except UnicodeDecodeError as error:
        raise wire.WireError(f"a string field is not UTF-8: {error}") from error
