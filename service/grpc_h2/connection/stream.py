"""One stream that could not be answered on the spot: what has come in, what waits to go out."""

from __future__ import annotations

from collections import deque
from typing import Any

from grpc_h2.rpc.messages import MessageReader
from grpc_h2.rpc.requests import Request
from grpc_h2.static.routes import Route


class Stream:
    """State of one stream (RFC 9113 section 5.1).

    It exists from its HEADERS until both ends are through with it. ``half_closed`` is the client's END_STREAM,
    ``ended`` ours: the terminal HEADERS or DATA frame has been handed out.
    """

    __slots__ = (
        "below_high_water",
        "body_left",
        "call",
        "cancelled",
        "credit",
        "ended",
        "finished",
        "half_closed",
        "headers_sent",
        "id",
        "message",
        "message_octets",
        "octets",
        "owed",
        "partial",
        "queue",
        "queued",
        "reader",
        "receive_window",
        "request",
        "route",
        "send_window",
        "trailers",
        "unread",
        "unsent",
    )

    def __init__(self, stream_id: int, route: Route, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.route = route
        self.request: Request | None = route.request
        self.reader: MessageReader | None = None
        self.message: bytes | None = None
        """A static call's request, once it is whole."""
        self.body_left = route.content_length
        """Octets of DATA that content-length still announces; -1: it announced nothing."""
        self.owed = 0
        """Octets of whole messages that no handler has taken yet: their windows are given back by ``consumed``."""
        self.unread = 0
        """Octets of those messages, inflated."""
        self.partial = 0
        """Octets of an unfinished message that the reader holds."""
        self.octets = 0
        """Octets of DATA received, and ``message_octets`` of whole messages in them: more if they were compressed."""
        self.message_octets = 0
        self.half_closed = False
        self.headers_sent = False
        self.trailers: bytes | None = None
        """The terminal header block, waiting behind the queue; empty: END_STREAM goes on the last DATA frame."""
        self.ended = False
        self.cancelled = False
        self.finished = True
        """No handler is at work; `Connection` clears it when it starts a call."""
        self.queue: deque[bytes | memoryview] = deque()
        self.unsent = 0
        """Octets in ``queue``."""
        self.queued = False
        """Whether the stream waits in the sender's round."""
        self.below_high_water = True
        self.send_window = send_window
        self.receive_window = receive_window
        self.credit = 0
        """Octets taken in and not yet given back by WINDOW_UPDATE."""
        self.call: Any = None
        """For the server's own use."""

    @property
    def writable(self) -> bool:
        """Whether a handler may go on sending."""
        return self.below_high_water

    @property
    def closed(self) -> bool:
        """Whether nothing can be sent any more."""
        return self.cancelled or self.ended or self.trailers is not None
