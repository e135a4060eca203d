"""gRPC's length-prefixed messages: one octet of flags, four of length, the message (PROTOCOL-HTTP2.md).

Messages and DATA frames are not aligned: a frame may hold a part of one or many. `MessageReader` joins the pieces in
one buffer, copies no octet more than twice even if the pieces are small, and judges a message by its prefix, before any
octet of the message is kept.

One frame of 16 KiB may hold 3,276 empty messages, or 650 compressed ones that inflate a thousandfold. So a reader
extracts a bounded number of messages at a time and keeps the rest: see `MessageReader.more`.
"""

from __future__ import annotations

import zlib
from struct import Struct
from typing import Final

from grpc_h2.rpc.faults import CallFault
from grpc_h2.rpc.status import StatusCode

DEFAULT_LIMIT: Final = 4 * 1024 * 1024
"""The most octets of a received message: gRPC's usual default."""

ENCODINGS: Final = ("identity", "deflate", "gzip")
"""The encodings that can be read, as the value of ``grpc-accept-encoding``; the same encodings as grpcio reads."""

MESSAGES_AT_ONCE: Final = 64
"""The most messages that one call of `MessageReader.feed` returns, in some 50 µs."""
INFLATIONS_AT_ONCE: Final = 8
"""The most compressed messages that one call of `MessageReader.feed` returns: a new inflater takes 5 µs."""
INFLATED_AT_ONCE: Final = 16 * 1024
"""The number of inflated octets after which the next compressed message waits for another call. Inflating them takes
some 40 µs."""

PREFIX_SIZE: Final = 5
"""Octets before each message on the wire."""
_PREFIX: Final = Struct(">BI")
assert _PREFIX.size == PREFIX_SIZE

# zlib's window bits: adding 16 selects the gzip wrapper (RFC 1952). Without it, zlib uses the wrapper of RFC 1950,
# which both HTTP and gRPC call "deflate".
_WINDOW_BITS: Final = {"gzip": 31, "deflate": 15}
# A response is compressed for a slow line, not for an archive: level 6 takes twice the time and saves only 5 % more.
_LEVEL: Final = 3


class MessageReader:
    """Splits a stream's DATA into messages.

    Call `feed` for each piece, then with an empty piece while `more` is true, and `finish` at END_STREAM. The first
    `CallFault` ends the reader: every later call raises the same fault, and messages before it in the same piece are
    dropped.
    """

    __slots__ = ("_buffer", "_encoding", "_fault", "_inflated", "_limit", "_most", "_size", "more")

    def __init__(self, limit: int = DEFAULT_LIMIT, encoding: str = "identity", *, unary: bool = False) -> None:
        """
        Args:
            limit: The most octets of a message, both as it is sent and when it is inflated.
            encoding: The request's ``grpc-encoding``.
            unary: The request is one message: a second message is refused at its first octet.
        """
        self._limit = limit
        self._encoding = encoding
        self._most: int | None = 1 if unary else None  # messages that may still arrive; None: any number
        self._buffer = bytearray()
        self._size = 0  # octets of prefix and message, once the buffer holds a prefix
        self._inflated = 0  # octets inflated in this call of `feed`
        self._fault: tuple[int, str] | None = None
        self.more = False
        """Whether the octets that are held may contain whole messages: call `feed` again before any other method."""

    def expect_one(self) -> None:
        """The request turns out to be unary: only one more message is allowed. No effect if messages have arrived
        already; in that case the recipient of the messages must refuse surplus ones."""
        if self._most is None:
            self._most = 1

    @property
    def buffered(self) -> int:
        """The octets of an unfinished message that are held, including its prefix."""
        return len(self._buffer)

    def feed(self, data: bytes | bytearray | memoryview = b"") -> list[bytes]:
        """Take in a piece of DATA, without padding. Returns the messages that are now whole: all of them, unless `more`
        is true.

        Raises `CallFault`: 8 for a message over the limit, 12 for an unknown encoding or a second message of a unary
        request, 13 for invalid flags or invalid compressed octets.
        """
        if self._fault is not None:
            raise CallFault(*self._fault)
        try:
            return self._cut(data)
        except CallFault as fault:
            # The exception itself is not kept, because its traceback holds frames, whose variables may hold a whole
            # inflated message.
            self._fault = fault.status, fault.message
            self._buffer = bytearray()
            self.more = False
            raise

    def finish(self) -> None:
        """The client has ended its side. Raises `CallFault` 13 if a message is not whole."""
        if self._fault is not None:
            raise CallFault(*self._fault)
        if self._buffer:
            self._buffer = bytearray()
            self._fault = StatusCode.INTERNAL, "the request ended within a message"
            raise CallFault(*self._fault)

    def _cut(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        messages: list[bytes] = []
        self._inflated = 0
        if self.more:
            self.more = False
            self._size = 0
            data = bytes(self._buffer + data)
            self._buffer.clear()
        position, end = 0, len(data)
        if self._buffer:
            position = self._fill(data, messages)
        compressed = 0
        while end - position >= PREFIX_SIZE:
            flag, length = _PREFIX.unpack_from(data, position)
            self._judge(flag, length)
            start = position + PREFIX_SIZE
            if end - start < length:
                self._size = PREFIX_SIZE + length
                break
            compressed += flag
            if (
                len(messages) >= MESSAGES_AT_ONCE
                or compressed > INFLATIONS_AT_ONCE
                or (flag and self._inflated >= INFLATED_AT_ONCE)
            ):
                self.more = True
                break
            position = start + length
            payload = bytes(data[start:position])
            messages.append(self._message(flag, payload))
        if position < end:
            self._buffer += data[position:]
        return messages

    def _fill(self, data: bytes | bytearray | memoryview, messages: list[bytes]) -> int:
        """Add octets to the unfinished message. Returns how many octets of ``data`` were used."""
        buffer, position = self._buffer, 0
        if len(buffer) < PREFIX_SIZE:
            position = PREFIX_SIZE - len(buffer)
            buffer += data[:position]
            if len(buffer) < PREFIX_SIZE:
                return len(data)
            flag, length = _PREFIX.unpack_from(buffer)
            self._judge(flag, length)
            self._size = PREFIX_SIZE + length
        until = position + self._size - len(buffer)
        buffer += data[position:until]
        if len(buffer) == self._size:
            flag = buffer[0]
            del buffer[:PREFIX_SIZE]  # moves the start of the buffer, not the octets
            messages.append(self._message(flag, bytes(buffer)))
            buffer.clear()
        return min(until, len(data))

    def _judge(self, flag: int, length: int) -> None:
        if self._most == 0:
            raise _second_message()
        if flag > 1:
            raise CallFault(StatusCode.INTERNAL, f"message with reserved flags: {flag:#04x}")
        if length > self._limit:
            raise _too_large(length, self._limit)
        if flag == 1 and self._encoding not in _WINDOW_BITS:
            if self._encoding == "identity":
                raise CallFault(StatusCode.INTERNAL, "compressed message without grpc-encoding")
            raise CallFault(StatusCode.UNIMPLEMENTED, f"grpc-encoding {self._encoding[:32]!a} is not supported")

    def _message(self, flag: int, payload: bytes) -> bytes:
        if self._most is not None:
            self._most -= 1
        if not flag:
            return payload
        message = decompress(payload, self._encoding, self._limit)
        self._inflated += len(message)
        return message


def decompress(payload: bytes, encoding: str, limit: int) -> bytes:
    """Inflate a message to at most ``limit`` octets; ``encoding`` is "gzip" or "deflate".

    Raises `CallFault`: 8 for a larger message (8 KiB can inflate to 8 MiB), 13 for corrupt, missing or surplus octets.
    """
    inflater = zlib.decompressobj(_WINDOW_BITS[encoding])
    try:
        # One octet more than allowed is inflated, to distinguish "too large" from "exactly the limit".
        message = inflater.decompress(payload, limit + 1)
    except zlib.error:
        raise CallFault(StatusCode.INTERNAL, "compressed message is corrupt") from None
    if len(message) > limit:
        length = len(message)
        del message  # otherwise the traceback would keep the message in memory
        raise _too_large(length, limit)
    if not inflater.eof or inflater.unused_data:
        raise CallFault(StatusCode.INTERNAL, "compressed message is cut, or something follows it")
    return message


def compress_gzip(message: bytes | memoryview) -> bytes:
    """The payload of a message sent with the compressed flag under ``grpc-encoding: gzip``."""
    deflater = zlib.compressobj(_LEVEL, zlib.DEFLATED, _WINDOW_BITS["gzip"])
    return deflater.compress(message) + deflater.flush()


def message_prefix(length: int, compressed: bool = False) -> bytes:
    """The five octets that precede a message of ``length`` octets (PROTOCOL-HTTP2.md, Length-Prefixed-Message)."""
    return _PREFIX.pack(compressed, length)


def frame_message(message: bytes, compress: bool = False) -> bytes:
    """A message with its prefix; ``compress``: gzip, which the initial metadata must have announced."""
    payload = compress_gzip(message) if compress else message
    return _PREFIX.pack(compress, len(payload)) + payload


def plain_message(payload: bytes) -> bytes | None:
    """The message in ``payload`` if ``payload`` is one whole, uncompressed message with its prefix; otherwise None."""
    if len(payload) < PREFIX_SIZE:
        return None
    flag, length = _PREFIX.unpack_from(payload)
    return None if flag or length != len(payload) - PREFIX_SIZE else payload[PREFIX_SIZE:]


def _second_message() -> CallFault:
    return CallFault(StatusCode.UNIMPLEMENTED, "More than one message in a unary request")


def _too_large(length: int, limit: int) -> CallFault:
    return CallFault(StatusCode.RESOURCE_EXHAUSTED, f"received message larger than max ({length} vs. {limit})")
