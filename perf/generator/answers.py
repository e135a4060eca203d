"""Checks answers octet by octet, in so little time that one core checks more than 100,000 answers a second.

**Judging.** Every answer is split into frames and judged: HTTP status, gRPC status and message, every octet of the
body. A header block that consists only of table entries, or that did not change the HPACK table when it was decoded,
keeps its meaning until another block changes the table, so it is decoded once (`HeaderBlocks`). The hpack library
decodes the rest.

**Shapes.** If all header blocks of an answer keep their meaning, the answer's octets become a shape. From then on,
answers of that gRPC status on that connection are compared with the shape as a whole, until the table changes. An
answer that differs (other frame boundaries, other blocks, frames of several answers interleaved) is split into frames
and judged again, so a shape never changes the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import pack
from urllib.parse import unquote_to_bytes

from hpack.exceptions import HPACKError
from hpack.hpack import Decoder
from tests.support import wire

Fields = dict[bytes, bytes]
Frames = list[tuple[int, int, bytes]]

DIFFERS, INCOMPLETE = -1, -2
"""Results of `MessageShape.after` and `ErrorShape.after` that are not positions."""
STATUSES = 17
"""The number of gRPC status codes, 0 to 16."""
_PADDED, _PRIORITY = 0x8, 0x20


class WrongAnswer(Exception):
    """An answer differs from the expected one, or the connection ended before the answer."""


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected answer: a message if ``status`` is 0, otherwise the text of the error."""

    status: int
    content: bytes

    def judge(self, first: Fields, last: Fields, body: bytes) -> None:
        """Compare an answer: its first header block, its last (possibly the same one), the octets of its DATA.

        Raises:
            WrongAnswer: with the first difference.
        """
        if first.get(b":status") != b"200":
            raise WrongAnswer(f"HTTP status {_text(first.get(b':status'))}")
        if last.get(b"grpc-status") != b"%d" % self.status:
            got = f"gRPC status {_text(last.get(b'grpc-status'))} {_text(last.get(b'grpc-message'))}"
            raise WrongAnswer(f"{got}, expected {self.status}")
        if self.status:
            if unquote_to_bytes(last.get(b"grpc-message", b"")) != self.content:
                got = f"the message {_text(last.get(b'grpc-message'))}"
                raise WrongAnswer(f"{got}, expected {_text(self.content)}")
        elif len(body) != 5 + len(self.content):
            raise WrongAnswer(f"a body of {len(body)} octets, expected {5 + len(self.content)}")
        elif not (body.startswith(prefix(len(self.content))) and body.endswith(self.content)):
            raise WrongAnswer(f"a body of the right length ({len(body)} octets) with other content")


def _text(value: bytes | None) -> str:
    return "nothing" if value is None else repr(value.decode(errors="replace")[:200])


def prefix(length: int) -> bytes:
    """The prefix of an uncompressed gRPC message of ``length`` octets."""
    return b"\0" + pack(">I", length)


class Call:
    """One request and its expected answer; the same object can be sent any number of times.

    ``block``: its header block, if it differs from the connection's usual one; literals only, so that its meaning does
    not depend on the HPACK table.
    """

    __slots__ = ("block", "content", "expected", "length", "octets", "request", "status")

    def __init__(self, request: bytes, expected: Expected, block: bytes = b"") -> None:
        self.request = wire.message(request)
        self.octets = len(self.request)
        self.block = block
        self.expected = expected
        self.status, self.content, self.length = expected.status, expected.content, len(expected.content)


class HeaderBlocks:
    """Decodes the header blocks of one connection; a block that cannot change the table is decoded once."""

    def __init__(self) -> None:
        self._decoder = Decoder()
        self._table = self._decoder.header_table
        self._known: dict[bytes, Fields] = {}
        self.version = 0
        """Counts the changes of the table. The meaning of a block holds as long as this number stays the same."""

    def fields(self, block: bytes) -> Fields:
        """The fields of ``block``. All callers share the result: do not change it.

        Raises:
            WrongAnswer: if the block cannot be decoded.
        """
        found = self._known.get(block)
        if found is not None:
            return found
        try:
            # RFC 7541 §6.1: one octet from 0x81 to 0xfe is one field of a table.
            if min(block, default=0) > 0x80 and 0xFF not in block:
                found = dict(map(self._entry, block))
            else:
                before = self._state()
                found = {bytes(name): bytes(value) for name, value in self._decoder.decode(block, raw=True)}
                if self._changed(before):
                    self._known.clear()
                    self.version += 1
                    return found
        except HPACKError as error:
            raise WrongAnswer(f"a header block that cannot be decoded: {error!r}") from error
        if len(self._known) < 10_000:
            self._known[block] = found
        return found

    def _entry(self, octet: int) -> tuple[bytes, bytes]:
        name, value = self._table.get_by_index(octet & 0x7F)
        return bytes(name), bytes(value)

    def _state(self) -> tuple[int, object, int]:
        entries = self._table.dynamic_entries
        return len(entries), entries[0] if entries else None, self._table.maxsize

    def _changed(self, before: tuple[int, object, int]) -> bool:
        """Whether an entry was inserted or evicted. In both cases the newest entry is another object, or there are
        fewer entries."""
        count, newest, size = self._state()
        return count != before[0] or newest is not before[1] or size != before[2]


class Answer:
    """One answer while its frames arrive."""

    __slots__ = ("_body", "_first", "_last", "frames", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        """Version of the table when the answer began."""
        self.frames: Frames = []
        self._first: Fields | None = None
        self._last: Fields = {}
        self._body: list[bytes] = []

    def add(self, kind: int, flags: int, payload: bytes, blocks: HeaderBlocks) -> bool:
        """Add one frame. Returns whether it was the answer's last frame.

        Raises:
            WrongAnswer: for a frame that ends the answer early, or that does not belong in an answer.
        """
        content = payload[1 : len(payload) - payload[0]] if flags & _PADDED and payload else payload
        if kind == wire.DATA:
            self._body.append(content)
        elif kind == wire.HEADERS and flags & wire.END_HEADERS and not flags & _PRIORITY:
            self._last = blocks.fields(content)
            if self._first is None:
                self._first = self._last
        elif kind == wire.RST_STREAM:
            raise WrongAnswer(f"the call was reset with HTTP/2 error {int.from_bytes(payload, 'big')}")
        else:
            raise WrongAnswer(f"a frame of type {kind} with flags {flags:#x} within an answer: {payload[:8].hex()}")
        self.frames.append((kind, flags, payload))
        return bool(flags & wire.END_STREAM)

    def judge(self, expected: Expected) -> None:
        """Compare the whole answer. Raises `WrongAnswer` if it differs from the expected answer."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        expected.judge(self._first or {}, self._last, body)


class MessageShape:
    """The shape of an answer with a message: HEADERS, DATA, HEADERS."""

    __slots__ = ("_after", "_before", "_block", "_data", "_head")

    def __init__(self, frames: Frames) -> None:
        (_, flags, block), (_, data, _), (_, end, trailers) = frames
        self._head, self._block = _head(len(block), wire.HEADERS, flags), block
        self._data = data
        self._after = (_head(len(trailers), wire.HEADERS, end), trailers)
        self._before: dict[int, tuple[bytes, bytes, bytes]] = {}
        """Length of the content → the pieces before it, to be joined by the stream identifier."""

    def after(self, buffer: bytes, at: int, identifier: bytes, call: Call) -> int:
        """The position after the answer to ``call`` that begins at ``at``; otherwise `DIFFERS` or `INCOMPLETE`."""
        wanted = identifier.join(self._before.get(call.length) or self._prepared(call.length))
        if not buffer.startswith(wanted, at):
            return _missing(buffer, at, wanted)
        at += len(wanted)
        if not buffer.startswith(call.content, at):
            return _missing(buffer, at, call.content)
        at += call.length
        wanted = identifier.join(self._after)
        return at + len(wanted) if buffer.startswith(wanted, at) else _missing(buffer, at, wanted)

    def _prepared(self, length: int) -> tuple[bytes, bytes, bytes]:
        made = self._head, self._block + _head(5 + length, wire.DATA, self._data), prefix(length)
        self._before[length] = made
        return made


class ErrorShape:
    """The shape of an answer with an error: one HEADERS frame whose block holds the text as a literal."""

    __slots__ = ("_head", "_left", "_length", "_right")

    def __init__(self, frames: Frames, content: bytes) -> None:
        ((_, flags, block),) = frames
        self._head = _head(len(block), wire.HEADERS, flags)
        self._left, _, self._right = block.partition(content)
        self._length = len(content)

    def after(self, buffer: bytes, at: int, identifier: bytes, call: Call) -> int:
        """Like `MessageShape.after`. A text of another length differs, because its header block differs."""
        if call.length != self._length:
            return DIFFERS
        wanted = identifier.join((self._head, self._left + call.content + self._right))
        return at + len(wanted) if buffer.startswith(wanted, at) else _missing(buffer, at, wanted)


Shape = MessageShape | ErrorShape


def shape_of(expected: Expected, frames: Frames) -> Shape | None:
    """The shape of an answer that was judged to be right; None if the next answer may have another form."""
    if any(flags & _PADDED for _, flags, _ in frames):
        return None
    kinds = [kind for kind, _, _ in frames]
    if expected.status == 0:
        return MessageShape(frames) if kinds == [wire.HEADERS, wire.DATA, wire.HEADERS] else None
    if kinds == [wire.HEADERS] and expected.content and frames[0][2].count(expected.content) == 1:
        return ErrorShape(frames, expected.content)
    return None


def _head(length: int, kind: int, flags: int) -> bytes:
    """The octets of a frame before the stream identifier."""
    return pack(">I", length)[1:] + bytes((kind, flags))


def _missing(buffer: bytes, at: int, wanted: bytes) -> int:
    """The reason why ``wanted`` is not at the position: `INCOMPLETE` if the rest of it may still arrive, otherwise
    `DIFFERS`."""
    rest = len(buffer) - at
    return INCOMPLETE if rest < len(wanted) and wanted.startswith(buffer[at:]) else DIFFERS
