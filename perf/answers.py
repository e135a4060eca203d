"""Answers, checked octet for octet, at a cost that lets one core check 100,000 and more in a second.

The first answer of a kind is taken apart and judged: HTTP status, gRPC status and message, every octet of the body.
If its header blocks mean the same whatever the HPACK table holds, what it looked like on the wire becomes a `Shape`,
and an answer of that kind is from then on compared as a whole: ``identifier.join(pieces)``. Whatever differs (other
frame borders, other blocks, frames of several answers mixed) is taken apart and judged again, so a shape is
only ever a short cut to the same verdict.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from struct import pack
from urllib.parse import unquote_to_bytes

from hpack.exceptions import HPACKError
from hpack.hpack import Decoder

from perf import wire


class WrongAnswer(Exception):
    """An answer that is not the expected one, or a connection that ended before it."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What has to be answered: a message where ``status`` is 0, else a text."""

    status: int
    content: bytes

    def judge(self, answer: Answer) -> None:
        """Compare the parsed ``answer``.

        Raises:
            WrongAnswer: naming the first difference.
        """
        if answer.fields.get(b":status") != b"200":
            raise WrongAnswer(f"HTTP status {answer.fields.get(b':status')!r}")
        if answer.fields.get(b"grpc-status") != b"%d" % self.status:
            told = answer.fields.get(b"grpc-message")
            raise WrongAnswer(f"gRPC status {answer.fields.get(b'grpc-status')!r} {told!r}")
        if self.status == 0 and bytes(answer.body) != wire.message(self.content):
            raise WrongAnswer(f"a body of {len(answer.body)} octets, not the expected {5 + len(self.content)}")
        if self.status and unquote_to_bytes(answer.fields.get(b"grpc-message", b"")) != self.content:
            raise WrongAnswer(f"message {answer.fields.get(b'grpc-message')!r}")


@dataclass(slots=True)
class Answer:
    """One answer while its frames arrive."""

    frames: list[tuple[int, int, bytes]] = field(default_factory=list)
    fields: dict[bytes, bytes] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)

    def add(self, kind: int, flags: int, payload: bytes, decoder: Decoder) -> bool:
        """Take one frame in. Whether it was the last.

        Raises:
            WrongAnswer: for a frame that ends the answer early.
        """
        if kind == wire.DATA:
            self.body += payload
        elif kind == wire.HEADERS and flags & wire.END_HEADERS:
            try:
                self.fields.update(decoder.decode(payload, raw=True))
            except HPACKError as error:
                raise WrongAnswer(f"header block: {error!r}") from error
        else:
            raise WrongAnswer(f"frame of type {kind}, payload {payload[:8].hex()}")
        self.frames.append((kind, flags, payload))
        return bool(flags & wire.END_STREAM)


class Shape:
    """How the answers of one kind look: the answer to one request, from which those to others follow."""

    def __init__(self, model: Expected, frames: list[tuple[int, int, bytes]]) -> None:
        self._model = model
        self._frames = frames

    @classmethod
    def of(cls, model: Expected, frames: list[tuple[int, int, bytes]]) -> Shape | None:
        """The shape of the judged answer ``frames``; None where it need not be the next one's."""
        decoder = Decoder()
        kinds = [kind for kind, _, _ in frames]
        if kinds not in ([wire.HEADERS], [wire.HEADERS, wire.DATA, wire.HEADERS]):
            return None
        for kind, _, payload in frames:
            if kind == wire.HEADERS:
                try:
                    decoder.decode(payload, raw=True)
                except HPACKError:
                    return None
        return None if decoder.header_table.dynamic_entries else cls(model, frames)

    def pieces(self, expected: Expected) -> tuple[bytes, ...]:
        """The octets of the answer ``expected``, to be joined by the stream identifier."""
        pieces = [b""]
        for kind, flags, payload in self._frames:
            content = payload
            if kind == wire.DATA:
                content = wire.message(expected.content)
            elif expected.status and len(expected.content) == len(self._model.content):
                content = payload.replace(self._model.content, expected.content)
            pieces[-1] += pack(">I", len(content))[1:] + bytes((kind, flags))
            pieces.append(content)
        return tuple(pieces)


class Call:
    """One request and what has to be answered; the same object serves any number of times."""

    __slots__ = ("expected", "octets", "pieces", "request")

    def __init__(self, request: bytes, expected: Expected) -> None:
        self.request = wire.message(request)
        self.expected = expected
        self.octets = len(self.request)
        self.pieces: tuple[bytes, ...] | None = None
        """Of the answer, once its shape is known."""


class Shapes:
    """What has been learned about a server's answers, by gRPC status."""

    def __init__(self) -> None:
        self._known: dict[int, Shape] = {}
        self._calls: dict[int, list[Call]] = {}
        self.taken_apart = 0
        """Answers that were judged frame by frame."""

    def expect(self, calls: list[Call]) -> None:
        """Give ``calls`` their pieces as soon as the shape of their answers is known."""
        for call in calls:
            self._calls.setdefault(call.expected.status, []).append(call)

    def judged(self, expected: Expected, answer: Answer) -> None:
        """Learn from an answer that was right."""
        self.taken_apart += 1
        if expected.status in self._known:
            return
        shape = Shape.of(expected, answer.frames)
        if shape is not None:
            self._known[expected.status] = shape
            for call in self._calls.get(expected.status, ()):
                call.pieces = shape.pieces(call.expected)
