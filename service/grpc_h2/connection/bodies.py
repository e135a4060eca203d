"""DATA to messages, and the account of what is held of them on a connection.

A message goes through three accounts. While it is unfinished its octets are *partial*. Once whole it is *unread* until
its handler takes it: then its inflated size counts (gzip reaches 1000 to 1, and a megabyte of window would become a
gigabyte), and its octets on the wire are *owed*: their window is given back when the message is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from grpc_h2.connection.abuse import OCTETS_OF_MESSAGE_PER_WORK, Abuse
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream
from grpc_h2.rpc.faults import CallFault
from grpc_h2.rpc.messages import PREFIX_SIZE, MessageReader
from grpc_h2.rpc.status import StatusCode
from grpc_h2.static.routes import Route

MESSAGE_OVERHEAD: Final = 128
"""Cost of a message beside its octets while it waits to be read: objects, mainly. Empty messages are not free."""
_TINY: Final = 64
_TINY_GLITCH: Final = 0.02
"""DATA frames of less than `_TINY` octets inside a message: fifty of them are one glitch."""
_BOMB_GLITCH: Final = 10.0
"""What costs us milliseconds and the peer nothing: a hundred of them, and it is disconnected."""
_SUSPICIOUS_RATIO: Final = 100


class Fed(NamedTuple):
    """The outcome of a DATA frame."""

    messages: list[bytes]
    """Messages for the stream's handler that are now whole."""
    free: int
    """Octets that need not be held: the connection's window is to be given back for them."""
    fault: CallFault | None = None
    """The call has failed by this frame, after ``messages``."""


class Bodies:
    """What a connection holds of messages."""

    __slots__ = ("_abuse", "_limits", "partial", "unread")

    def __init__(self, limits: Limits, abuse: Abuse) -> None:
        self._limits = limits
        self._abuse = abuse
        self.partial = 0
        """Octets of unfinished messages."""
        self.unread = 0
        """Cost of whole messages that nobody has taken yet."""

    def reader(self, route: Route) -> MessageReader | None:
        """What cuts the DATA of a new stream into messages; None where its DATA is of no interest."""
        if route.fault is not None:
            return None
        return MessageReader(
            self._limits.max_message,
            "identity" if route.request is None else route.request.encoding,
            None if route.method is None else self._limits.max_inflated_static,
        )

    def feed(self, stream: Stream, content: bytes, size: int) -> Fed:
        """``content`` of a DATA frame of ``size`` octets, padding included.

        Raises:
            ConnectionFault: where the peer does this too often.
        """
        reader = stream.reader
        if reader is None or stream.closed:
            stream.take_in(0, size)
            return Fed([], size)
        before = reader.buffered
        try:
            messages = reader.feed(content)
        except CallFault as fault:
            if fault.status == StatusCode.RESOURCE_EXHAUSTED:
                limits = self._limits
                most = limits.max_message if stream.route.method is None else limits.max_inflated_static
                self._abuse.spend(most // OCTETS_OF_MESSAGE_PER_WORK)
                self._abuse.glitch("messages beyond the limit", _BOMB_GLITCH)
            return Fed([], size, fault)
        held = reader.buffered
        if held > before and len(content) < _TINY:
            self._abuse.glitch("tiny DATA frames", _TINY_GLITCH)
        self.partial += stream.hold_partial(held)
        self._weigh(stream, messages)
        return self._deliver(stream, messages, size)

    def _weigh(self, stream: Stream, messages: list[bytes]) -> None:
        """Count what ``messages`` have cost, and whether they are what no honest client sends."""
        octets = sum(map(len, messages))
        self._abuse.spend(octets // OCTETS_OF_MESSAGE_PER_WORK)
        if stream.weigh(octets) > _SUSPICIOUS_RATIO * stream.octets and octets:
            self._abuse.glitch("messages that inflate beyond measure", _BOMB_GLITCH)

    def _deliver(self, stream: Stream, messages: list[bytes], size: int) -> Fed:
        handled = stream.handled
        for position, message in enumerate(messages):
            cost = len(message) + MESSAGE_OVERHEAD
            stream.hold_message(cost)
            self.unread += cost
            if self.unread > self._limits.max_unread:
                fault = CallFault(StatusCode.RESOURCE_EXHAUSTED, "Too many octets in unread messages")
                return Fed(messages[:position] if handled else [], size, fault)
            if not handled:
                if stream.message is not None:
                    fault = CallFault(StatusCode.UNIMPLEMENTED, "More than one message in a unary request")
                    return Fed([], size, fault)
                stream.keep_message(message)
        # What lies in a whole message is given back once it has been consumed; the rest at once, within bounds.
        delivered = sum(len(message) + PREFIX_SIZE for message in messages) if handled else 0
        free = max(0, size - delivered)
        if self.partial > self._limits.max_buffered and stream.partial:
            free = 0
        stream.take_in(size - free, free)
        return Fed(messages if handled else [], free)

    def consume(self, stream: Stream, octets: int) -> int:
        """A handler has taken a message of ``octets``. Returns how many octets need not be held any more."""
        cost, free = stream.consume(octets + MESSAGE_OVERHEAD, octets + PREFIX_SIZE)
        self.unread -= cost
        return free

    def discard(self, stream: Stream) -> int:
        """Nobody will take what ``stream`` holds. Returns how many octets need not be held any more."""
        partial, unread, owed = stream.discard_body()
        self.partial -= partial
        self.unread -= unread
        return owed

    def check_invariants(self, streams: Iterable[Stream]) -> None:
        """Assert the sums over the open ``streams``."""
        assert self.partial == sum(stream.partial for stream in streams)
        assert self.unread == sum(stream.unread for stream in streams)
