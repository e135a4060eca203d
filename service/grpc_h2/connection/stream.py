"""One stream that could not be answered at once: the data that has arrived, and the data that waits to be sent.

A `Stream` owns its numbers: other parts read them, and change them only by its methods. It exists from its HEADERS
until both sides have ended it.

`Stream.receive_window` (octets that the client may still send), `Stream.credit` (octets to be given back by the next
WINDOW_UPDATE) and `Stream.owed` (octets of messages that no handler has taken yet) always add up to the initial window.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, Final

from grpc_h2.connection.flow_control import grown
from grpc_h2.connection.state import ResponseState, StreamState
from grpc_h2.rpc.messages import MessageReader
from grpc_h2.rpc.requests import Request
from grpc_h2.static.routes import UNKNOWN_LENGTH, Route, Router
from grpc_h2.wire.errors import ErrorCode, StreamFault
from grpc_h2.wire.frames import LARGEST_WINDOW

Piece = bytes | memoryview

# These constants save time: see `StreamState.following`.
_OPEN: Final = StreamState.OPEN
_HALF_CLOSED_REMOTE: Final = StreamState.HALF_CLOSED_REMOTE
_HALF_CLOSED_LOCAL: Final = StreamState.HALF_CLOSED_LOCAL
_CLOSED: Final = StreamState.CLOSED
_NOTHING_SENT: Final = ResponseState.NOTHING_SENT
_HEADERS_SENT: Final = ResponseState.HEADERS_SENT
_END_QUEUED: Final = ResponseState.END_QUEUED
_END_SENT: Final = ResponseState.END_SENT
_TRAILERS_ONLY: Final = ResponseState.TRAILERS_ONLY


STREAM_WEIGHT: Final = 4096
"""The octets of a stream with its handler: 1.5 kB for the stream, 2 to 3 kB for the handler's context, task and
frames."""


def _own(piece: Piece) -> int:
    """The octets that are freed together with ``piece``."""
    return len(piece) if isinstance(piece, bytes) or isinstance(piece.obj, bytes) else 0


class Stream:
    """A stream that is or was open (RFC 9113 section 5.1; see ``state.py``)."""

    __slots__ = (
        "_initial_window",
        "_queue",
        "body_left",
        "call",
        "closed",
        "credit",
        "finished",
        "handled",
        "headers_sent",
        "id",
        "message",
        "message_octets",
        "octets",
        "owed",
        "own_unsent",
        "partial",
        "reader",
        "receive_window",
        "request",
        "response",
        "route",
        "send_window",
        "state",
        "trailers",
        "unread",
        "unsent",
        "weight",
        "writable",
    )

    def __init__(
        self, stream_id: int, route: Route, send_window: int, receive_window: int, reader: MessageReader | None
    ) -> None:
        self.id = stream_id
        self.route = route
        self.request: Request | None = route.request
        self.state = _OPEN
        self.response = _NOTHING_SENT
        self.closed = False
        """Whether nothing more can be queued: the stream is closed, or the end of its response is queued."""
        self.headers_sent = False
        """Whether the initial metadata has been sent."""
        self.handled = route.method is None and route.fault is None
        """Whether the call has a handler: it calls no static method, and it can be served."""
        self.finished = not self.handled
        """Whether no handler is at work."""
        self.reader = reader
        """Splits DATA into messages; None: DATA is ignored."""
        self.message: bytes | None = None
        """The request of a call of a static method, once it is whole."""
        self.body_left = route.content_length
        """The octets of DATA that content-length announces and that have not arrived; `UNKNOWN_LENGTH` if the request
        has no content-length."""
        self.octets = 0
        """The octets of DATA received. ``message_octets``: the octets of the whole messages in that DATA, after
        decompression."""
        self.message_octets = 0
        self.partial = 0
        """Octets of an unfinished message that the reader holds."""
        self.unread = 0
        """The cost of whole messages that no handler has taken yet, by their inflated size."""
        self.owed = 0
        """The octets on the wire of whole messages that no handler has taken yet: `consume` turns them into credit."""
        self.credit = 0
        """Octets that were processed and not yet given back by WINDOW_UPDATE."""
        self._initial_window = receive_window
        self.receive_window = receive_window
        self.send_window = send_window
        self._queue: deque[Piece] = deque()
        self.unsent = 0
        """The octets that wait to be sent. ``own_unsent``: the part of them that exists only for this stream. A view of
        memory that the application holds in any case is not included."""
        self.own_unsent = 0
        self.weight = STREAM_WEIGHT + route.weight
        """The octets that the stream itself holds, including its request's fields. This is an estimate."""
        self.trailers = b""
        """The terminal header block that follows the unsent octets; empty: END_STREAM is set on the last DATA frame."""
        self.writable = True
        """Whether a handler may continue to send."""
        self.call: Any = None
        """An object of the server, which this package's sans-IO part does not use."""

    # -- state ----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Note that the handler's work has really ended."""
        self.finished = True

    def _enter(self, state: StreamState) -> None:
        assert state in self.state.following, f"stream {self.id}: {self.state} → {state}"
        self.state = state

    def _respond(self, state: ResponseState) -> None:
        assert state in self.response.following, f"stream {self.id}: {self.response} → {state}"
        self.response = state

    def request_ended(self) -> None:
        """END_STREAM was received."""
        self._enter(_HALF_CLOSED_REMOTE)

    def response_begun(self) -> None:
        """HEADERS without END_STREAM were queued."""
        assert self.response is _NOTHING_SENT
        self.response = _HEADERS_SENT
        self.headers_sent = True

    def response_complete(self, trailers: bytes) -> None:
        """The response is complete, and ``trailers`` wait behind the data that is queued."""
        self._respond(_END_QUEUED)
        self.closed = True
        self.trailers = trailers

    def response_ended(self) -> None:
        """END_STREAM was sent."""
        self._respond(_END_SENT if self.headers_sent else _TRAILERS_ONLY)
        self._enter(_CLOSED if self.state is _HALF_CLOSED_REMOTE else _HALF_CLOSED_LOCAL)
        self.closed = True

    def close(self) -> None:
        """RST_STREAM was sent or received, or the connection is gone. No effect on a closed stream."""
        self.state = _CLOSED
        self.closed = True

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, size: int, content: int, *, end_stream: bool) -> None:
        """A DATA frame of ``size`` octets has arrived; ``content`` of them are not padding.

        Raises:
            StreamFault: STREAM_CLOSED after END_STREAM, FLOW_CONTROL_ERROR beyond the stream's window, PROTOCOL_ERROR
                beyond the announced content-length.
        """
        if self.state is _HALF_CLOSED_REMOTE:
            raise StreamFault(ErrorCode.STREAM_CLOSED, "DATA after END_STREAM")
        self.receive_window -= size
        self.octets += size
        if self.receive_window < 0:
            raise StreamFault(ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the stream's window")
        if self.body_left != UNKNOWN_LENGTH:
            self.body_left -= content
            if self.body_left < 0:
                raise StreamFault(ErrorCode.PROTOCOL_ERROR, "more DATA than content-length says")
        if end_stream:
            self._enter(_HALF_CLOSED_REMOTE)

    def judge_anew(self, router: Router) -> None:
        """The server's authorizations have changed, and the call is not answered yet."""
        if self.response is _NOTHING_SENT:
            self.route = router.judge_anew(self.route)

    def body_read(self) -> None:
        """Note that no further message will arrive."""
        self.reader = None

    def hold_partial(self, octets: int) -> int:
        """The reader holds ``octets`` of an unfinished message. Returns the difference from the previous number."""
        change = octets - self.partial
        self.partial = octets
        return change

    def weigh(self, octets: int) -> int:
        """Count whole messages of ``octets`` (inflated). Returns the number of octets of all messages so far."""
        self.message_octets += octets
        return self.message_octets

    def hold_message(self, cost: int) -> None:
        """Note that a whole message waits for the handler."""
        self.unread += cost

    def keep_message(self, message: bytes) -> None:
        """Keep the request of a call of a static method."""
        assert self.message is None
        self.message = message

    def take_in(self, owed: int, free: int) -> None:
        """Account for a DATA frame: ``owed`` of its octets belong to messages that wait, and ``free`` octets need not
        be held."""
        self.owed += owed
        self.credit += free

    def consume(self, cost: int, octets: int) -> tuple[int, int]:
        """The handler took a message; ``cost``, and its ``octets`` on the wire, are upper limits.

        Returns:
            The message's actual cost, and the octets that may be given back.
        """
        cost, free = min(cost, self.unread), min(octets, self.owed)
        self.unread -= cost
        self.owed -= free
        self.credit += free
        return cost, free

    def discard_body(self) -> tuple[int, int, int]:
        """Discard all received octets. Returns the previous ``partial``, ``unread`` and ``owed``."""
        discarded = self.partial, self.unread, self.owed
        self.partial = self.unread = self.owed = 0
        return discarded

    def window_due(self) -> int:
        """Remove and return the increment that must be announced now, at least half a window; 0 if there is none."""
        increment = self.credit
        if increment * 2 < self._initial_window or self.state is not _OPEN or self.closed:
            return 0
        self.receive_window += increment
        self.credit = 0
        return increment

    # -- sending --------------------------------------------------------------------------------------------------

    def grow_send_window(self, increment: int) -> bool:
        """Apply WINDOW_UPDATE, or a change of the initial window (which may be negative: RFC 9113 section 6.9.2).

        Returns whether the window stays within 2^31 - 1; otherwise nothing is changed.
        """
        window = grown(self.send_window, increment)
        if window is None:
            return False
        self.send_window = window
        return True

    def queue(self, pieces: Iterable[Piece]) -> int:
        """Queue octets of data. Returns their number."""
        octets = 0
        for piece in pieces:
            if len(piece):
                self._queue.append(piece)
                octets += len(piece)
                self.own_unsent += _own(piece)
        self.unsent += octets
        return octets

    def note_queued(self, high_water: int) -> None:
        """A handler has queued a message: it has to wait if more than ``high_water`` octets are queued."""
        self.writable = self.unsent <= high_water

    def note_sent(self, low_water: int) -> bool:
        """Data was sent. Returns whether a handler that waited may now continue to send."""
        if self.writable or self.unsent > low_water:
            return False
        self.writable = True
        return True

    def drop_queue(self) -> int:
        """Drop the data that waits to be sent. Returns the number of its octets."""
        dropped, self.unsent = self.unsent, 0
        self.own_unsent = 0
        self._queue.clear()
        return dropped

    def next_frame(self, room: int) -> list[Piece]:
        """Take the content of a DATA frame of at most ``room`` octets from the queue; empty if nothing may be sent.

        Successive pieces share a frame if all of them fit into it, such as a message and its five-octet prefix."""
        queue = self._queue
        room = min(room, self.send_window)
        parts: list[Piece] = []
        size = 0
        while queue and size < room:
            part = queue[0]
            left = room - size
            if len(part) <= left:
                queue.popleft()
            else:  # a view is made only when a piece has to be divided
                view = memoryview(part)
                part, queue[0] = view[:left], view[left:]
            parts.append(part)
            size += len(part)
            self.own_unsent -= _own(part)
        self.send_window -= size
        self.unsent -= size
        return parts

    def whole_frames(self, octets: int, most: int) -> list[memoryview]:
        """Take the contents of at most ``most`` DATA frames of exactly ``octets`` octets from one large piece. The end
        of the piece is left for `next_frame`. The result is empty if a frame would hold octets of another piece."""
        queue = self._queue
        if not queue or len(queue[0]) <= octets:
            return []
        piece = memoryview(queue[0])
        most = min(most, self.send_window // octets, (len(piece) - 1) // octets)
        if most <= 0:
            return []
        taken = most * octets
        queue[0] = piece[taken:]
        self.own_unsent -= taken if _own(piece) else 0
        self.send_window -= taken
        self.unsent -= taken
        return [piece[begin : begin + octets] for begin in range(0, taken, octets)]

    # -- what must hold -------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert the invariants that hold between two calls of the connection's methods."""
        assert self.state is not StreamState.CLOSED
        assert self.state is not StreamState.HALF_CLOSED_LOCAL, "left at once"
        assert self.unsent == sum(map(len, self._queue))
        assert self.own_unsent == sum(map(_own, self._queue))
        assert self.unsent or self.response is not ResponseState.END_QUEUED, "nothing waits, so the end can be sent"
        assert self.closed == (self.response not in (ResponseState.NOTHING_SENT, ResponseState.HEADERS_SENT))
        assert self.headers_sent == (self.response not in (ResponseState.NOTHING_SENT, ResponseState.TRAILERS_ONLY))
        assert min(self.owed, self.credit, self.partial, self.unread, self.unsent) >= 0
        assert self.send_window <= LARGEST_WINDOW
        assert self.receive_window >= 0
        if not self.closed:
            assert self.receive_window + self.credit + self.owed == self._initial_window
            assert self.reader is None or self.partial == self.reader.buffered
        assert 0 <= self.own_unsent <= self.unsent
