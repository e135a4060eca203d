"""Queues frames to be sent: control frames and ready answers are sent at once, stream data as the peer's windows allow.

Two places hold output. `Outbound.out` is a list of pieces in their final order; the next `take` returns all of them.
Stream data waits in the streams' own queues and is taken from them in turn (round robin, one quantum each), so that a
catalogue of 200 MB and a one-line answer share a connection fairly. Only trailers wait behind their stream's data. Only
this module appends to ``out``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from grpc_h2.connection.flow_control import FlowControl
from grpc_h2.connection.state import ResponseState
from grpc_h2.connection.stream import Piece, Stream
from grpc_h2.wire import frames
from grpc_h2.wire.hpack import DEFAULT_TABLE_SIZE, encode_size_update

_QUANTUM: Final = 64 * 1024
_LARGEST_FRAME: Final = 64 * 1024
"""The most octets in a frame; peers may allow 16 MiB. In a frame of this size the header is negligible already, and
longer frames delay a PING behind them."""
_COPIED: Final = 4096
"""Pieces up to this size are joined with their neighbours; larger ones are passed on without a copy."""

_END_QUEUED: Final = ResponseState.END_QUEUED
_NO_TABLE: Final = encode_size_update(0)
"""A size update to 0, because our blocks never refer to a dynamic table."""


class Outbound:
    """The sending half of a connection."""

    __slots__ = (
        "_data_frames",
        "_flow",
        "_max_frame",
        "_uncopied",
        "held",
        "out",
        "paused",
        "ready",
        "size_update_due",
        "unsent",
        "waiting",
    )

    def __init__(self, flow: FlowControl) -> None:
        self._flow = flow
        self.out: list[bytes] = []
        self.ready = 0
        """Octets of DATA in the whole answers that ``out`` holds."""
        self.paused = False
        """Whether the transport accepts no more output."""
        self.size_update_due = False
        """The peer allows a smaller HPACK table than the 4096 octets a connection starts with, and we have not yet
        announced that we use none (RFC 7541 section 4.2)."""
        self.unsent = 0
        """The octets of stream data that are queued. ``held``: the part of these octets that exists only for this
        connection."""
        self.held = 0
        self._max_frame = frames.DEFAULT_FRAME_SIZE
        self.waiting: dict[Stream, None] = {}
        """Streams whose own windows allow data to be sent; the next stream is first."""
        self._data_frames = 0
        self._uncopied = False
        """Whether ``out`` has pieces that are passed on without a copy."""

    # -- settings of the peer, and the transport ------------------------------------------------------------------

    def allow_table(self, size: int) -> None:
        """Apply the peer's SETTINGS_HEADER_TABLE_SIZE."""
        if size < DEFAULT_TABLE_SIZE:
            self.size_update_due = True

    def allow_frames(self, size: int) -> None:
        """Apply the peer's SETTINGS_MAX_FRAME_SIZE."""
        assert frames.DEFAULT_FRAME_SIZE <= size <= frames.LARGEST_FRAME_SIZE
        self._max_frame = size

    def pause(self, paused: bool) -> None:
        """Note whether the transport accepts no more output."""
        self.paused = paused

    # -- queueing -------------------------------------------------------------------------------------------------

    def control(self, *control_frames: bytes) -> None:
        """Queue control frames, which flow control does not delay."""
        self.out += control_frames

    def commit(self, replies: list[bytes], octets: int, *, uncopied: bool) -> None:
        """The fast path: queue whole answers with ``octets`` of DATA that flow control has admitted. The list belongs
        to this object from now on. ``uncopied``: whether the list has large pieces, which connections share."""
        self.ready += octets
        if uncopied:
            self._uncopied = True
        if self.out:
            self.out += replies
        else:
            self.out = replies

    def headers(self, stream: Stream, block: bytes, *, end_stream: bool) -> None:
        """Queue a header block, ahead of all stream data; with ``end_stream`` it ends the response."""
        self.out.append(self._headers(stream, block, end_stream=end_stream))
        if end_stream:
            stream.response_ended()
        else:
            stream.response_begun()

    def _headers(self, stream: Stream, block: bytes, *, end_stream: bool) -> bytes:
        if self.size_update_due:  # in the first block after the peer has made its table smaller
            self.size_update_due = False
            block = _NO_TABLE + block
        return frames.headers(stream.id, block, end_stream=end_stream, max_frame=self._max_frame)

    def data(self, stream: Stream, *pieces: Piece) -> None:
        """Queue ``pieces`` of stream data."""
        before = stream.own_unsent
        self.unsent += stream.queue(pieces)
        self.held += stream.own_unsent - before
        self.reconsider(stream)

    def reconsider(self, stream: Stream) -> None:
        """The stream's queue or window has grown."""
        if stream.unsent and stream.send_window > 0:
            self.waiting.setdefault(stream)

    def drop(self, stream: Stream) -> None:
        """Drop the data that ``stream`` has queued."""
        self.held -= stream.own_unsent
        self.unsent -= stream.drop_queue()
        self.waiting.pop(stream, None)

    def drop_all(self) -> None:
        """Drop the data that streams have queued. The streams are no longer in use."""
        self.waiting.clear()
        self.unsent = self.held = 0

    def give_back(self, octets: int) -> None:
        """``octets`` of DATA may be given back to the window."""
        increment = self._flow.give_back(octets)
        if increment:
            self.control(frames.window_update(0, increment))

    def credit(self, stream: Stream) -> None:
        """Queue WINDOW_UPDATE for ``stream`` if one is due."""
        increment = stream.window_due()
        if increment:
            self.control(frames.window_update(stream.id, increment))

    # -- sending --------------------------------------------------------------------------------------------------

    def take_out(self) -> list[Piece]:
        """The pieces of ``out``, joined unless some are large. While no stream is `waiting`, they are all output."""
        out = self.out
        if not out:
            return []
        pieces: list[Piece]
        if self._uncopied:
            self._uncopied = False
            pieces = [*out]
        else:
            pieces = [out[0] if len(out) == 1 else b"".join(out)]
        out.clear()
        self.ready = 0
        return pieces

    def take(self, budget: int) -> tuple[list[Piece], dict[Stream, None], int]:
        """The octets to write now: ``out``, then at most about ``budget`` octets of stream data.

        Returns:
            Pieces in order (small ones joined), the streams that gave data, and the number of DATA frames.
        """
        sent: dict[Stream, None] = {}
        gathered: list[Piece] = []
        small, self.out, self.ready = self.out, [], 0
        if self._uncopied:
            self._uncopied = False
            gathered += small
            small = []
        self._data_frames = 0
        waiting = self.waiting
        while waiting and budget > 0 and self._flow.send_window > 0:
            stream = next(iter(waiting))
            del waiting[stream]
            quantum = min(_QUANTUM, budget) if waiting else budget  # no other stream waits
            budget -= self._send_quantum(stream, quantum, small, gathered)
            sent[stream] = None
            if stream.unsent:
                self.reconsider(stream)
        if small:
            gathered.append(b"".join(small))
        return gathered, sent, self._data_frames

    def _send_quantum(self, stream: Stream, quantum: int, small: list[bytes], gathered: list[Piece]) -> int:
        """Move up to ``quantum`` octets from the stream's queue into frames. Returns how many octets were moved."""
        moved = 0
        largest = min(self._max_frame, _LARGEST_FRAME)
        while moved < quantum:
            size = self._send_whole_frames(stream, largest, quantum - moved, small, gathered)
            if size:
                moved += size
                continue
            before, own = stream.unsent, stream.own_unsent
            parts = stream.next_frame(min(largest, self._flow.send_window))
            if not parts:
                break
            size = before - stream.unsent
            self.held -= own - stream.own_unsent
            last = not stream.unsent and stream.response is _END_QUEUED and not stream.trailers
            small.append(frames.HEADER.pack(size >> 16, size & 0xFFFF, frames.DATA, int(last), stream.id))
            for part in parts:
                if len(part) > _COPIED:
                    gathered += (b"".join(small), part)
                    small.clear()
                else:
                    small.append(bytes(part))
            moved += size
            self._flow.spend(size)
            self._data_frames += 1
            if not stream.unsent:
                break
        self.unsent -= moved
        if not stream.unsent and stream.response is _END_QUEUED:
            if stream.trailers:
                small.append(self._headers(stream, stream.trailers, end_stream=True))
            stream.response_ended()
        return moved

    def _send_whole_frames(
        self, stream: Stream, octets: int, quantum: int, small: list[bytes], gathered: list[Piece]
    ) -> int:
        """Move as many frames of ``octets`` out of one large piece at once as fit into ``quantum``. Returns the octets
        of all these frames. A catalogue takes hundreds of frames that differ only in their content."""
        own = stream.own_unsent
        parts = stream.whole_frames(octets, min(-(-quantum // octets), self._flow.send_window // octets))
        if not parts:
            return 0
        head = frames.HEADER.pack(octets >> 16, octets & 0xFFFF, frames.DATA, 0, stream.id)
        small.append(head)
        gathered.append(b"".join(small))
        small.clear()
        frames_out: list[Piece] = [head] * (2 * len(parts) - 1)
        frames_out[::2] = parts
        gathered += frames_out
        self.held -= own - stream.own_unsent
        self._flow.spend(octets * len(parts))
        self._data_frames += len(parts)
        return octets * len(parts)

    def check_invariants(self, streams: Iterable[Stream]) -> None:
        """Assert the sums over the open ``streams``."""
        unsent = [stream for stream in streams if stream.unsent]
        assert self.unsent == sum(stream.unsent for stream in unsent)
        assert self.held == sum(stream.own_unsent for stream in unsent)
        assert self.waiting.keys() <= set(unsent), "a closed stream, or one without data, waits to send"
        assert all(stream in self.waiting for stream in unsent if stream.send_window > 0), "data would wait for ever"
