"""Converts DATA to messages, and accounts for the octets of messages that a connection holds.

A message is counted in three numbers. While the message is unfinished, its octets are *partial*. Once it is whole, it
is *unread* until its handler takes it. The number *unread* counts the inflated size (gzip reaches 1000 to 1, so a
megabyte of window may become a gigabyte). The message's octets on the wire are *owed*: the window grows by them when
the message is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, TypeAlias

from grpc_h2.connection.abuse import OCTETS_OF_MESSAGE_PER_WORK, Abuse
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream
from grpc_h2.rpc.faults import CallFault
from grpc_h2.rpc.messages import PREFIX_SIZE, MessageReader
from grpc_h2.rpc.status import StatusCode
from grpc_h2.static.routes import Route

MESSAGE_OVERHEAD: Final = 128
"""The cost of a message that waits to be read, in addition to its octets: mainly objects, which empty messages need
too."""
_TINY: Final = 64
_TINY_GLITCH: Final = 0.02
"""Glitches counted for a DATA frame of less than `_TINY` octets inside a message: fifty such frames are one glitch."""
_BOMB_GLITCH: Final = 10.0
"""Glitches counted for a message that takes the server milliseconds and the peer little time: after a hundred such
messages, the peer is disconnected."""
_SUSPICIOUS_RATIO: Final = 100


Fed: TypeAlias = tuple[list[bytes], int, CallFault | None]
"""The outcome of a DATA frame: messages for the stream's handler that are now whole; octets that need not be held, for
which the connection's window is to be given back; the fault by which the call has failed, after those messages."""


class Bodies:
    """The octets of messages that a connection holds."""

    __slots__ = ("_abuse", "_limits", "partial", "unread")

    def __init__(self, limits: Limits, abuse: Abuse) -> None:
        self._limits = limits
        self._abuse = abuse
        self.partial = 0
        """Octets of unfinished messages."""
        self.unread = 0
        """Cost of whole messages that no handler has taken yet."""

    def reader(self, route: Route) -> MessageReader | None:
        """A reader that splits the DATA of a new stream into messages; None if the DATA of that stream is ignored."""
        if route.refused or route.request is None:
            return None
        return MessageReader(self._limit(route), route.request.encoding, unary=route.method is not None)

    def _limit(self, route: Route) -> int:
        return self._limits.max_message if route.max_request is None else route.max_request

    def feed(self, stream: Stream, content: bytes, size: int) -> Fed:
        """Take in ``content`` of a DATA frame of ``size`` octets, padding included; both are empty while
        `MessageReader.more` is true.

        Raises:
            ConnectionFault: if the peer sends too many tiny frames, or messages that are too large or inflate too
                much.
        """
        reader = stream.reader
        if reader is None or stream.closed:
            stream.take_in(0, size)
            return [], size, None
        before = reader.buffered
        try:
            messages = reader.feed(content)
        except CallFault as fault:
            if fault.status == StatusCode.RESOURCE_EXHAUSTED:
                self._abuse.spend(self._limit(stream.route) // OCTETS_OF_MESSAGE_PER_WORK)
                self._abuse.glitch("messages beyond the limit", _BOMB_GLITCH)
            return [], size, fault
        held = reader.buffered
        if held > before and len(content) < _TINY:
            self._abuse.glitch("tiny DATA frames", _TINY_GLITCH)
        if held != before:
            self.partial += stream.hold_partial(held)
        octets = sum(map(len, messages))
        if len(messages) > 1 or octets >= OCTETS_OF_MESSAGE_PER_WORK:
            self._abuse.spend(len(messages) + octets // OCTETS_OF_MESSAGE_PER_WORK)
        if octets and stream.weigh(octets) > _SUSPICIOUS_RATIO * stream.octets:  # no honest client sends this
            self._abuse.glitch("messages that inflate beyond measure", _BOMB_GLITCH)
        return self._deliver(stream, messages, octets, size)

    def _deliver(self, stream: Stream, messages: list[bytes], octets: int, size: int) -> Fed:
        """A DATA frame of ``size`` octets has completed ``messages``, of ``octets`` in all."""
        handled = stream.handled
        for position, message in enumerate(messages):
            cost = len(message) + MESSAGE_OVERHEAD
            stream.hold_message(cost)
            self.unread += cost
            if self.unread > self._limits.max_unread:
                fault = CallFault(StatusCode.RESOURCE_EXHAUSTED, "Too many octets in unread messages")
                return messages[:position] if handled else [], size, fault
            if not handled:
                stream.keep_message(message)
        # The octets of a whole message are given back once the message has been consumed. All other octets are given
        # back at once, within bounds.
        delivered = octets + PREFIX_SIZE * len(messages) if handled else 0
        free = size - delivered if size > delivered else 0
        if self.partial > self._limits.max_buffered and stream.partial:
            free = 0
        stream.take_in(size - free, free)
        return messages if handled else [], free, None

    def consume(self, stream: Stream, octets: int) -> int:
        """A handler has taken a message of ``octets``. Returns how many octets may be given back to the window."""
        cost, free = stream.consume(octets + MESSAGE_OVERHEAD, octets + PREFIX_SIZE)
        self.unread -= cost
        return free

    def discard(self, stream: Stream) -> int:
        """Drop the messages that ``stream`` holds. Returns how many octets may be given back to the window."""
        partial, unread, owed = stream.discard_body()
        self.partial -= partial
        self.unread -= unread
        return owed

    def check_invariants(self, streams: Iterable[Stream]) -> None:
        """Assert the sums over the open ``streams``."""
        assert self.partial == sum(stream.partial for stream in streams)
        assert self.unread == sum(stream.unread for stream in streams)
