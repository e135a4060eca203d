"""A decoder for tests, and the header blocks that it decodes."""

from __future__ import annotations

from grpc_h2.wire import hpack
from grpc_h2.wire.hpack import Decoder

LARGE = 1 << 30


def decoder(max_table_size: int = 4096, *, max_list_size: int = LARGE, max_fields: int = LARGE) -> Decoder:
    return Decoder(max_list_size=max_list_size, max_fields=max_fields, max_table_size=max_table_size)


def literal(name: bytes, value: bytes, pattern: int = 0x40) -> bytes:
    return b"".join(
        (
            bytes([pattern]),
            hpack.encode_integer(len(name), 127, 0),
            name,
            hpack.encode_integer(len(value), 127, 0),
            value,
        )
    )
