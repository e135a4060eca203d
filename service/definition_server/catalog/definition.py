"""A command's definition, as rows hold it and as the wire carries it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

from definition_server.catalog import wire

DEFAULT_TYPE = b"function"
DEFAULT_INTERFACE = b"[]"


class Row(NamedTuple):
    """One row of the source table. Text is undecoded bytes: a database may hold what is not UTF-8."""

    id: int
    name: bytes | None
    type: bytes | None
    interface: bytes | None
    code: bytes | None


@dataclass(frozen=True, slots=True)
class Definition:
    """One served definition. ``code`` is as served: source, or the signed package around it."""

    name: str
    type: str
    interface_json: str
    code: bytes
    hash: str


def content_fields(name: bytes, kind: bytes, interface: bytes, code: bytes) -> bytes:
    """Fields 1 to 4 of ``CommandResponse``, in order. All but ``code`` are not empty."""
    varint = wire.varint
    # One join and the tags spelt out (field << 3 | 2): this runs once per row of every rebuild.
    return b"".join(
        (b"\x0a", varint(len(name)), name, b"\x12", varint(len(kind)), kind)
        + (b"\x1a", varint(len(interface)), interface)
        + ((b"\x22", varint(len(code)), code) if code else ())
    )


def content_hash(content: bytes) -> bytes:
    """Hex SHA-256 of a definition's content: `content_fields` with the *unsigned* code.

    The wire form is unambiguous (every field carries its length), and leaving the signature out gives two servers
    with different signing keys the same value for the same row.
    """
    return hashlib.sha256(content).hexdigest().encode("ascii")


def parse_definition(message: memoryview) -> Definition:
    """The definition in a serialized ``CommandResponse``.

    Raises:
        WireError: where ``message`` is none.
    """
    values = {number: bytes(content) for number, _, content in wire.fields(message)}
    try:
        return Definition(
            name=values.get(wire.NAME, b"").decode(),
            type=values.get(wire.TYPE, b"").decode(),
            interface_json=values.get(wire.INTERFACE_JSON, b"").decode(),
            code=values.get(wire.CODE, b""),
            hash=values.get(wire.HASH, b"").decode(),
        )
    except UnicodeDecodeError as error:
        raise wire.WireError(f"a string field is not UTF-8: {error}") from error
