"""Octets that a client sends: frames (RFC 9113 §4.1) and header blocks (RFC 7541), encoded before a measurement.

A request is a sequence of pieces with the stream identifier between them, so that one ``identifier.join(pieces)``
completes it. If header blocks differ from call to call (by a deadline that never repeats), they differ in one place
only, and the octets around it repeat after some dozens of calls: `BlockCycle` holds them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import chain, cycle
from struct import pack

from hpack.hpack import Decoder
from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
ACK = END_STREAM = 0x1
END_HEADERS = 0x4
HEAD = 9
INITIAL_WINDOW = 65_535
WIDE_WINDOW = 2**30 - 1
"""The windows of h2load, which are so large that flow control never limits an answer."""

GET_COMMAND = b"/avap.DefinitionEngine/GetCommand"
SYNC_CATALOG = b"/avap.DefinitionEngine/SyncCatalog"

Field = tuple[bytes, bytes]
FRESH = b"grpc-timeout"
"""The field whose value differs in every call."""

_FRESH_VALUE = 8
_FRESH_HUFFMAN = 6
"""Octets of ``4999976u`` and of its Huffman code (seven digits of five or six bits, ``u`` of six)."""
_TABLE_SIZE = 4096
_ENTRY_OVERHEAD = 32
_STATIC = {entry: number for number, entry in enumerate(HeaderTable.STATIC_TABLE, 1)}
_STATIC_NAMES = {name: number for (name, _), number in reversed(_STATIC.items())}
_huffman = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH)


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"", length: int | None = None) -> bytes:
    """One frame (RFC 9113 §4.1), legal or not: nothing is checked. ``length`` is written in place of the payload's real
    length."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes((kind, flags)) + pack(">I", stream) + payload


def window_update(stream: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame."""
    return frame(WINDOW_UPDATE, 0, stream, pack(">I", increment))


def settings(*pairs: tuple[int, int]) -> bytes:
    """A SETTINGS frame of (identifier, value) pairs."""
    return frame(SETTINGS, 0, 0, b"".join(pack(">HI", *pair) for pair in pairs))


def opening() -> bytes:
    """The first flight of a client that never lets flow control limit an answer."""
    return PREFACE + settings((4, WIDE_WINDOW)) + window_update(0, WIDE_WINDOW - INITIAL_WINDOW)


def message(content: bytes, flag: int = 0) -> bytes:
    """A length-prefixed message of gRPC; ``flag`` 1: compressed."""
    return bytes((flag,)) + pack(">I", len(content)) + content


def command_request(name: bytes) -> bytes:
    """A serialized ``CommandRequest`` of a name below 128 octets."""
    return b"\x0a" + bytes((len(name),)) + name


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """RFC 7541 §5.1, with the high bits of the first octet given."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((first | value,))
    octets = [first | limit]
    value -= limit
    while value >= 128:
        octets.append(128 | value & 127)
        value >>= 7
    return bytes((*octets, value))


def string(text: bytes) -> bytes:
    """A string by RFC 7541 §5.2; Huffman-coded if that is shorter, as in grpc-go."""
    coded = _huffman.encode(text)
    return integer(len(coded), 7, 0x80) + coded if len(coded) < len(text) else integer(len(text), 7) + text


def literal_block(fields: Sequence[Field]) -> bytes:
    """A block of literals without indexing and without Huffman coding, whose meaning does not depend on the table."""
    return b"".join(b"\0" + integer(len(name), 7) + name + integer(len(value), 7) + value for name, value in fields)


def call_fields(
    authority: bytes, path: bytes, key: bytes, *, fresh: bool = False, scheme: bytes = b"http"
) -> list[Field]:
    """The fields of a call in grpc-go's order; with ``fresh``, a deadline whose value is filled in per call."""
    deadline = [(FRESH, b"")] if fresh else []
    return [
        (b":method", b"POST"), (b":scheme", scheme), (b":path", path), (b":authority", authority),
        (b"content-type", b"application/grpc"), (b"user-agent", b"grpc-go/1.33.3"), (b"te", b"trailers"),
        *deadline, (b"x-avap-auth", key),
    ]  # fmt: skip


class HeaderEncoder:
    """grpc-go's encoder: a field in a table is sent as its index, any other is inserted (§6.2.1).

    A field that the table can no longer hold is evicted, and inserted again when it is needed. If every call has a new
    deadline, ``:path`` and its neighbours are evicted after about 70 calls.
    """

    def __init__(self) -> None:
        self._entries: list[Field] = []  # the newest first
        self._size = 0

    @property
    def state(self) -> tuple[Field, ...]:
        """The table, with all deadlines taken as equal; equal states give equal blocks."""
        return tuple(self._entries)

    def encode(self, fields: Sequence[Field]) -> tuple[bytes, bytes]:
        """The octets of the block before and after the value of `FRESH`; without `FRESH`, all are before."""
        parts = [b"", b""]
        at = 0
        for name, value in fields:
            if name == FRESH:
                parts[at] += self._insert(name, value, _FRESH_VALUE) + integer(_FRESH_HUFFMAN, 7, 0x80)
                at = 1
            elif (index := self._index(name, value)) is not None:
                parts[at] += integer(index, 7, 0x80)
            else:
                parts[at] += self._insert(name, value, len(value)) + string(value)
        return parts[0], parts[1]

    def _index(self, name: bytes, value: bytes) -> int | None:
        if (name, value) in _STATIC:
            return _STATIC[name, value]
        if (name, value) in self._entries:
            return 62 + self._entries.index((name, value))
        return None

    def _insert(self, name: bytes, value: bytes, length: int) -> bytes:
        """A literal with indexing, up to its value; inserts the entry into the table."""
        names = [known for known, _ in self._entries]
        index = _STATIC_NAMES.get(name) or (62 + names.index(name) if name in names else 0)
        self._entries.insert(0, (name, value))
        self._size += len(name) + length + _ENTRY_OVERHEAD
        while self._size > _TABLE_SIZE:
            gone, content = self._entries.pop()
            self._size -= len(gone) + (_FRESH_VALUE if gone == FRESH else len(content)) + _ENTRY_OVERHEAD
        return integer(index, 6, 0x40) + (b"" if index else string(name))


class BlockCycle:
    """The header blocks of one connection's calls: some initial ones, then a cycle that repeats."""

    def __init__(self, fields: Sequence[Field]) -> None:
        self.fields = list(fields)
        self.fresh = any(name == FRESH for name, _ in fields)
        encoder = HeaderEncoder()
        seen: dict[tuple[Field, ...], int] = {}
        blocks: list[tuple[bytes, bytes]] = []
        while encoder.state not in seen:
            seen[encoder.state] = len(blocks)
            blocks.append(encoder.encode(fields))
        start = seen[encoder.state]
        self.first, self.repeated = blocks[:start], blocks[start:]

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        return chain(self.first, cycle(self.repeated))

    def check(self, deadlines: Sequence[bytes]) -> None:
        """Decode more than twice as many blocks as this object holds, with the hpack library.

        Raises:
            ValueError: if a block decodes to wrong fields.
        """
        decoder, blocks = Decoder(), iter(self)
        for number in range(2 * (len(self.first) + len(self.repeated)) + 2):
            before, after = next(blocks)
            code = deadlines[number % len(deadlines)] if self.fresh else b""
            decoded = decoder.decode(before + code + after, raw=True)
            told = [(bytes(name), b"" if name == FRESH else bytes(value)) for name, value in decoded]
            if told != self.fields:
                raise ValueError(f"block {number} means {told}")


def deadlines(spread: int, seed: int = 1) -> list[bytes]:
    """Huffman codes of ``4999999u`` and the ``spread`` values below it, each once, in an order without pattern.

    grpc-go sends the rest of 5 s in microseconds: the spread is the time between making the context and writing the
    frame. 1,000 is a client with little load; with 100,000 no memo can remember the blocks.
    """
    values = [b"%du" % (4_999_999 - number) for number in range(spread)]
    random.Random(seed).shuffle(values)
    return [_huffman.encode(value) for value in values]
