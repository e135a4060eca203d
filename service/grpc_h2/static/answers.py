"""An answer whose octets exist before a client asks for it.

A unary answer is three frames: HEADERS, DATA, HEADERS with the trailers. Only the stream id depends on the request; it
occurs in three places. So a `StaticAnswer` keeps the pieces between those places, and ``stream_id.join(pieces)`` is the
whole encoding. A larger message takes several DATA frames, and one more piece for each of them: see
`StaticAnswer.frame`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, TypeAlias

from grpc_h2.rpc.messages import PREFIX_SIZE, message_prefix
from grpc_h2.rpc.responses import initial_block, metadata_fields, trailers_block, trailers_only_block
from grpc_h2.rpc.status import StatusCode
from grpc_h2.wire import frames
from grpc_h2.wire.hpack import encode_block

_OK_HEADERS: Final = initial_block((), None)
_OK_TRAILERS: Final = trailers_block(StatusCode.OK, "", ())
_SHORT_MESSAGE: Final = 400
"""The most characters of a status message. With at most 12 octets each, they leave 3 KiB of `MAX_TRAILERS` for
metadata."""
_MOST_METADATA: Final = 2048
LARGEST_FRAMED: Final = 20 * frames.DEFAULT_FRAME_SIZE
"""Octets of the largest message that is kept in frames, prefix included: a catalogue of some hundred commands. It is
sent whole, and other streams of the connection wait meanwhile, so this limit is little more than
`Limits.octets_per_turn`."""

Metadata: TypeAlias = tuple[tuple[str, str | bytes], ...]


@lru_cache(maxsize=16)
def _block(metadata: Metadata) -> bytes:
    """A header block of these fields alone, cached because thousands of answers have the same fields.

    Raises:
        ValueError: for metadata that may not be sent, or that exceed `_MOST_METADATA` octets.
    """
    block = encode_block(metadata_fields(metadata))
    if len(block) > _MOST_METADATA:
        raise ValueError(f"the metadata of a static answer has {len(block)} octets, and may have {_MOST_METADATA}")
    return block


class StaticAnswer:
    """The ready answer to a unary call: see `unary` and `failure`.

    ``metadata`` is sent as initial metadata, or with a failure's status (PROTOCOL-HTTP2.md, Trailers-Only). It is
    encoded once, as part of the answer.

    ``pieces`` are the frames without their stream ids, or None if the message does not fit one DATA frame that every
    peer accepts; ``size`` is the number of octets that the DATA frames use of the flow-control windows. ``answer_id``
    is the application's own number: the connection reports it each time the answer is sent.
    """

    __slots__ = ("answer_id", "block", "framed", "headers", "lasting", "message", "pieces", "size")

    def __init__(
        self,
        pieces: tuple[bytes, ...] | None,
        size: int,
        message: bytes | memoryview | None,
        block: bytes,
        answer_id: int,
        *,
        headers: bytes = _OK_HEADERS,
        lasting: bool = True,
    ) -> None:
        self.pieces = pieces
        self.framed: tuple[bytes, ...] | None = None
        """The pieces of an answer with several DATA frames, once `frame` has made them."""
        self.size = size
        self.message = message
        """The message without its prefix; None if there is only a status."""
        self.block = block
        """The terminal header block."""
        self.headers = headers
        """The initial header block of an answer with a message."""
        self.answer_id = answer_id
        self.lasting = lasting
        """Whether the same request has the same answer until the application's data changes."""

    @classmethod
    def unary(cls, message: bytes | memoryview, answer_id: int = 0, metadata: Metadata = ()) -> StaticAnswer:
        """Status OK and a serialized message. A large message is kept without a copy.

        Raises ValueError for metadata that may not be sent.
        """
        headers = _OK_HEADERS + _block(metadata) if metadata else _OK_HEADERS
        size = PREFIX_SIZE + len(message)
        if size > frames.DEFAULT_FRAME_SIZE:
            return cls(None, size, message, _OK_TRAILERS, answer_id, headers=headers)
        pieces = _pieces(headers, message)
        return cls(pieces, size, message, _OK_TRAILERS, answer_id, headers=headers)

    @classmethod
    def failure(
        cls, status: int, message: str, answer_id: int = 0, metadata: Metadata = (), *, lasting: bool = True
    ) -> StaticAnswer:
        """A gRPC status without a message: one HEADERS frame. If not ``lasting``, it is looked up anew each time.

        Raises ValueError for metadata that may not be sent.
        """
        if metadata and len(message) <= _SHORT_MESSAGE:
            block = trailers_only_block(status, message, ()) + _block(metadata)
        else:
            block = trailers_only_block(status, message, metadata)
        head = frames.head(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, len(block))
        return cls((head, block), 0, None, block, answer_id, lasting=lasting)

    def frame(self) -> None:
        """Keep a large message also in frames. The message is copied, so `LARGEST_FRAMED` is the limit."""
        assert self.message is not None
        assert self.size <= LARGEST_FRAMED
        self.framed = _pieces(self.headers, self.message)

    @property
    def data_frames(self) -> int:
        """The number of DATA frames that the answer has in ``framed``."""
        return -(-self.size // frames.DEFAULT_FRAME_SIZE)


def _pieces(headers: bytes, message: bytes | memoryview) -> tuple[bytes, ...]:
    """The frames of an answer without their stream ids: HEADERS, DATA frames that every peer accepts, trailers."""
    body = message_prefix(len(message)) + message
    sizes = [frames.DEFAULT_FRAME_SIZE] * ((len(body) - 1) // frames.DEFAULT_FRAME_SIZE)
    sizes.append(len(body) - sum(sizes))
    heads = [frames.head(frames.DATA, 0, size) for size in sizes]
    heads.append(frames.head(frames.HEADERS, frames.END_HEADERS | frames.END_STREAM, len(_OK_TRAILERS)))
    pieces = [frames.head(frames.HEADERS, frames.END_HEADERS, len(headers)), headers + heads[0]]
    begin = 0
    for size, following in zip(sizes, heads[1:], strict=True):
        pieces.append(body[begin : begin + size] + following)
        begin += size
    return (*pieces, _OK_TRAILERS)
