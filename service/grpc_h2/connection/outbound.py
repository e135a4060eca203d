"""What goes out: control frames and ready answers at once, stream data as the peer's windows allow.

Two places hold output. ``out`` is a list of small pieces whose order is final; whatever is in it is handed over whole
by the next `Sender.take`. Stream data waits in the streams' own queues, and is taken from them in turn (round robin,
one quantum each), so that a catalogue of 200 MB and a one-line answer share a connection fairly. Trailers wait behind
their stream's data; nothing else does.
"""

from __future__ import annotations

from collections import deque

from grpc_h2.connection.flow_control import grown
from grpc_h2.connection.stream import Stream
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault

_QUANTUM = 64 * 1024
_LARGEST_FRAME = 64 * 1024
"""Peers may allow 16 MiB; a frame this long already makes headers negligible, and longer ones delay the PING behind."""

Piece = bytes | memoryview


class Sender:
    """The sending half of a connection."""

    __slots__ = ("_round", "data_frames", "initial_window", "max_frame", "out", "size_update_due", "unsent", "window")

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.window = frames.DEFAULT_WINDOW
        """Octets of DATA that the connection may still send."""
        self.initial_window = frames.DEFAULT_WINDOW
        self.max_frame = frames.DEFAULT_FRAME_SIZE
        self.size_update_due = False
        """The peer allows a smaller HPACK table than the 4096 octets a connection starts with, and has not been told
        that we use none (RFC 7541 section 4.2)."""
        self._round: deque[Stream] = deque()
        self.unsent = 0
        """Octets of stream data queued."""
        self.data_frames = 0
        """DATA frames sent, since somebody last looked."""

    # -- what the peer says ---------------------------------------------------------------------------------------

    def allow_table(self, size: int) -> None:
        """SETTINGS_HEADER_TABLE_SIZE."""
        if size < 4096:
            self.size_update_due = True

    def change_initial_window(self, size: int, streams: dict[int, Stream]) -> None:
        """SETTINGS_INITIAL_WINDOW_SIZE: shifts the window of every stream, below zero too (section 6.9.2).

        Raises:
            ConnectionFault: FLOW_CONTROL_ERROR where a window passes 2^31 - 1.
        """
        shift = size - self.initial_window
        self.initial_window = size
        if not shift:
            return
        for stream in streams.values():
            window = grown(stream.send_window, shift)
            if window is None:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "SETTINGS makes a stream's window too large")
            stream.send_window = window
            self._enter_round(stream)

    def grow(self, increment: int) -> None:
        """WINDOW_UPDATE of the connection.

        Raises:
            ConnectionFault: FLOW_CONTROL_ERROR where it passes 2^31 - 1.
        """
        window = grown(self.window, increment)
        if window is None:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window passes 2^31 - 1")
        self.window = window

    def grow_stream(self, stream: Stream, increment: int) -> None:
        """WINDOW_UPDATE of a stream.

        Raises:
            StreamFault: FLOW_CONTROL_ERROR where it passes 2^31 - 1.
        """
        window = grown(stream.send_window, increment)
        if window is None:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "the stream's window passes 2^31 - 1")
        stream.send_window = window
        self._enter_round(stream)

    # -- what is to be sent ---------------------------------------------------------------------------------------

    def block(self, block: bytes) -> bytes:
        """``block`` as it may be sent now: the first one after the peer shrank its table begins with a size update."""
        if self.size_update_due:
            self.size_update_due = False
            return b"\x20" + block  # size 0: our blocks never refer to a dynamic table
        return block

    def headers(self, stream: Stream, block: bytes, *, end_stream: bool) -> None:
        """Queue a header block, ahead of all stream data."""
        data = frames.headers(stream.id, self.block(block), end_stream=end_stream, max_frame=self.max_frame)
        self.out.append(data)

    def data(self, stream: Stream, *pieces: Piece) -> None:
        """Queue ``pieces`` of stream data."""
        for piece in pieces:
            if len(piece):
                stream.queue.append(piece)
                stream.unsent += len(piece)
                self.unsent += len(piece)
        self._enter_round(stream)

    def drop(self, stream: Stream) -> None:
        """Forget what ``stream`` has queued."""
        self.unsent -= stream.unsent
        stream.unsent = 0
        stream.queue.clear()

    def forget(self) -> None:
        """Forget what any stream has queued."""
        self._round.clear()
        self.unsent = 0

    def _enter_round(self, stream: Stream) -> None:
        if not stream.queued and stream.queue and stream.send_window > 0:
            stream.queued = True
            self._round.append(stream)

    @property
    def can_send(self) -> bool:
        """Whether stream data could go out now."""
        return bool(self._round) and self.window > 0

    @property
    def streaming(self) -> bool:
        """Whether a stream waits for its turn to send data."""
        return bool(self._round)

    def take_out(self) -> list[Piece]:
        """``out``, joined: all there is while nobody is `streaming`."""
        out = self.out
        if not out:
            return []
        pieces: list[Piece] = [out[0] if len(out) == 1 else b"".join(out)]
        out.clear()
        return pieces

    def take(self, budget: int) -> tuple[list[Piece], list[Stream]]:
        """What can be written now: ``out``, then at most about ``budget`` octets of stream data.

        Returns:
            Pieces in order (small ones joined), and the streams that gave data.
        """
        sent: list[Stream] = []
        if not self._round:
            return self.take_out(), sent
        gathered: list[Piece] = []
        small, self.out = self.out, []
        while self._round and budget > 0 and self.window > 0:
            stream = self._round.popleft()
            stream.queued = False
            if not stream.queue:
                continue
            budget -= self._send_quantum(stream, min(_QUANTUM, budget), small, gathered)
            sent.append(stream)
            self._enter_round(stream)
        if small:
            gathered.append(b"".join(small))
        return gathered, sent

    def _send_quantum(self, stream: Stream, quantum: int, small: list[bytes], gathered: list[Piece]) -> int:
        """Move up to ``quantum`` octets from the stream's queue into frames. Returns how many."""
        moved = 0
        queue = stream.queue
        while queue and moved < quantum:
            piece = queue[0]
            size = min(len(piece), stream.send_window, self.window, self.max_frame, _LARGEST_FRAME)
            if size <= 0:
                break
            # Neighbours share a frame where they fit whole: a message's five-octet prefix is no frame of its own.
            parts = [_first(queue, size)]
            if size == len(piece):
                room = min(stream.send_window, self.window, self.max_frame, _LARGEST_FRAME) - size
                while queue and room > 0:
                    part = _first(queue, room)
                    parts.append(part)
                    size += len(part)
                    room -= len(part)
            last = not queue and stream.trailers == b""
            small.append(frames.HEADER.pack(size >> 16, size & 0xFFFF, frames.DATA, int(last), stream.id))
            for part in parts:
                if len(part) > 4096:
                    gathered += (b"".join(small), part)
                    small.clear()
                else:
                    small.append(bytes(part))
            moved += size
            stream.send_window -= size
            self.window -= size
            stream.unsent -= size
            self.data_frames += 1
        self.unsent -= moved
        if not queue and stream.trailers is not None:
            if stream.trailers:
                small.append(
                    frames.headers(stream.id, self.block(stream.trailers), end_stream=True, max_frame=self.max_frame)
                )
            stream.ended = True
        return moved


def _first(queue: deque[Piece], most: int) -> Piece:
    """The first piece of ``queue``, or as much of it as is allowed: taken out. Not a view before it has to be one."""
    piece = queue[0]
    if len(piece) <= most:
        return queue.popleft()
    view = memoryview(piece)
    queue[0] = view[most:]
    return view[:most]
