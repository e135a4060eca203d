"""From header blocks and DATA to answers: the short way for ready answers, the long way for everything else.

**The short way.** Almost all traffic is a pair of frames, HEADERS and DATA with END_STREAM, for a static method.
`Exchanges._answer_batch` takes such pairs apart with one precompiled unpacking each, finds the route by the block's
octets and the answer by the message's octets, and builds no object. Whatever is not exactly that falls through to
the frame machine of ``inbound.py``. A pair may fall through at any point, because the short way changes nothing
before it is sure; only a block, once decoded, stays decoded: then the stream is opened, as the long way would have.

**The memo of blocks.** Decoding is a function of the block and the HPACK table. A remembered block neither changes the
table nor, since the memo is dropped at each change, was read in another state than the present one. The decoder counts
changes (``epoch``); `Exchanges._decode` is the only place that decodes, and compares.
"""

from __future__ import annotations

from math import inf

from grpc_h2.connection.core import (
    BLOCK_WORK,
    MESSAGE_OVERHEAD,
    OCTETS_OF_BLOCK_PER_WORK,
    OCTETS_OF_MESSAGE_PER_WORK,
    PREFIX,
    STREAM_WORK,
    Core,
)
from grpc_h2.connection.events import (
    CallStarted,
    HalfClosed,
    MessageReceived,
)
from grpc_h2.connection.stream import Stream
from grpc_h2.rpc.faults import CallFault
from grpc_h2.rpc.messages import MessageReader
from grpc_h2.rpc.requests import check_trailers, parse_timeout, split_timeout
from grpc_h2.static.routes import UNKNOWN_LENGTH, Route
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode, StreamFault
from grpc_h2.wire.frame_parsing import (
    LAST_DATA,
    LONGEST_SHORT_BLOCK,
    SHAPES,
)

_MEMO_ENTRIES = 64
FIELDS_AT_ONCE = 32
"""Of a block that is not short: some 20 µs."""
_TINY = 64
_TINY_GLITCH = 0.02
"""DATA frames of less than `_TINY` octets inside a message: fifty of them are one glitch."""
_OVERFLOW_GLITCH = 5.0
_BOMB_GLITCH = 10.0
"""What costs us milliseconds and the peer nothing: a hundred of them, and it is cut off."""
_SUSPICIOUS_RATIO = 100
_LAST_OF_THE_SHORT_WAY = frames.LARGEST_STREAM_ID - 2**16
"""The short way does not look at the reserved bit, so it leaves the last ids to the long way."""
_DEADLINE_EXCEEDED, _RESOURCE_EXHAUSTED, _UNIMPLEMENTED = 4, 8, 12


class Exchanges(Core):
    """From header blocks and DATA to answers, and to events where a handler is needed."""

    __slots__ = ()

    # -- the short way ------------------------------------------------------------------------------------------------

    def _may_answer(self) -> bool:
        return (
            self._lifetime.introduced
            and self._assembly is None
            and self._refused_above is None
            and not self._sender.size_update_due
            and self._streams.last_id < _LAST_OF_THE_SHORT_WAY
        )

    def answer_one(self, data: bytes, now: float) -> bytes | None:
        """The answer to ``data`` where that is one call of a static method and there is nothing else to do; else None.

        A client that waits for each answer sends exactly that, and each call pays alone for what `receive_data` does
        once for a batch. None leaves everything as it was: `receive_data` is then to be asked with the same octets.
        """
        shape = SHAPES.get(data[:5])
        if shape is None or self._held or self._paused or self.terminated:
            return None
        sender, streams, body = self._sender, self._streams, shape[1]
        if (
            len(data) < body
            or sender.out
            or sender.unsent
            or sender.size_update_due
            or streams.pending
            or len(streams.open) + self._zombies >= self.limits.max_concurrent_streams
            or self._assembly is not None
            or self._refused_above is not None
            or self._epoch != self._doors.epoch
        ):
            return None
        stream_id, block, data_head, data_stream = shape[0](data, 0)
        length = LAST_DATA.get(data_head)
        if length is None or body + length != len(data):
            return None
        if not stream_id == data_stream == streams.last_id + 2 <= _LAST_OF_THE_SHORT_WAY:
            return None
        route = self._memo.get(block)
        if route is None or route.answer_payload is None or route.content_length not in (length, UNKNOWN_LENGTH):
            return None
        answer = route.answer_payload(data[body:])
        if answer is None or answer.pieces is None:
            return None
        if answer.size > sender.window or answer.size > sender.initial_window or not self._window.pass_by(length):
            return None
        streams.last_id = stream_id
        sender.window -= answer.size
        self._window_updates += 22
        self._pings.reset()
        lifetime = self._lifetime
        self._now = lifetime.read_at = lifetime.idle_at = now
        lifetime.asked_at = inf
        self.answered.append(answer.answer_id)
        return data[body - 4 : body].join(answer.pieces)

    def _answer_batch(self, data: bytes, position: int, end: int) -> int:
        """Answer requests of static methods that lie whole in ``data``. Returns the position of what is left.

        A HEADERS frame whose DATA is not right behind it waits in ``Streams.pending``: clients with many streams send
        all their HEADERS first. Longer than a function should be, and flat: each line is paid for by every request.
        """
        limits, sender, streams, memo, answered = self.limits, self._sender, self._streams, self._memo, self.answered
        pending = streams.pending
        room = limits.max_concurrent_streams - len(streams.open) - self._zombies
        push = sender.out.append
        window = sender.window
        floor = window - limits.octets_per_turn
        largest = sender.initial_window
        first = expected = streams.last_id + 2
        already = len(answered)
        most = self._answers_most
        received = 0
        try:
            while len(answered) < most and window >= floor:
                head = data[position : position + 5]
                shape = SHAPES.get(head)
                if shape is not None:
                    body = position + shape[1]
                    if body > end or len(pending) >= room:
                        return position
                    stream_id, block, data_head, data_stream = shape[0](data, position)
                    if stream_id != expected:
                        return position
                    route = memo.get(block)
                    if route is None:
                        if self._work_left <= 0:
                            break
                        streams.last_id = stream_id
                        try:
                            route = self._learn(block)
                        except StreamFault as fault:
                            self._refuse(stream_id, fault)
                            return body - frames.HEADER_LENGTH
                        if route.answer_payload is None:
                            self._open(stream_id, route, end_stream=False)
                            return body - frames.HEADER_LENGTH
                    expected += 2
                    length = LAST_DATA.get(data_head)
                    if length is None or data_stream != stream_id or body + length > end:
                        pending[stream_id] = route
                        position = body - frames.HEADER_LENGTH
                        continue
                else:
                    length = LAST_DATA.get(head)
                    body = position + frames.HEADER_LENGTH
                    if length is None or body + length > end:
                        return position
                    stream_id = int.from_bytes(data[position + 5 : body], "big")
                    pended = pending.pop(stream_id, None)
                    if pended is None:
                        return position
                    route = pended
                answer = None
                if route.answer_payload is not None and route.content_length in (length, UNKNOWN_LENGTH):
                    answer = route.answer_payload(data[body : body + length])
                if answer is None or answer.pieces is None or answer.size > window or answer.size > largest:
                    self._open(stream_id, route, end_stream=False)
                    return body - frames.HEADER_LENGTH
                if streams.pending_windows:
                    streams.pending_windows.pop(stream_id, None)
                push(data[body - 4 : body].join(answer.pieces))
                answered.append(answer.answer_id)
                window -= answer.size
                received += length
                position = body + length
            self.backlog = position < end
            return position
        finally:
            streams.last_id = max(streams.last_id, expected - 2)
            self._window_updates += streams.last_id + 2 - first  # two for each stream
            count = len(answered) - already
            if count:
                sender.window = window
                self._window_updates += 20 * count
                self._pings.reset()
                self._lifetime.idle_at = self._now
                self._take_in(received, received)

    def _find(self, stream_id: int) -> Stream | None:
        """The open stream of that id. One that waits for its DATA becomes an object now."""
        route = self._streams.pending.pop(stream_id, None)
        if route is not None:
            self._open(stream_id, route, end_stream=False)
        return self._streams.open.get(stream_id)

    # -- header blocks ------------------------------------------------------------------------------------------------

    def _learn(self, block: bytes) -> Route:
        """Decode a request's header block and find its route; remember the block where that is sound.

        Raises:
            ConnectionFault: where the table cannot be kept in step, or the list is far beyond every limit.
            StreamFault: where the fields are no well-formed request.
        """
        fields = self._decode(block)
        decoder = self._decoder
        if decoder.overflow:
            self._glitch("header lists beyond the limit", _OVERFLOW_GLITCH)
            return Route(None, fault=CallFault(_RESOURCE_EXHAUSTED, "The request's header list is too large"))
        rest, timeout = split_timeout(fields)
        route = self._doors.route(rest, decoder.list_size)
        if timeout is not None and route.request is not None:
            try:
                seconds = parse_timeout(timeout)
                if seconds <= 0:
                    raise CallFault(_DEADLINE_EXCEEDED, "Deadline Exceeded")
            except CallFault as fault:
                fault.content_length = route.request.content_length
                return Route(None, fault=fault)
            if route.method is None:
                return Route(route.request.with_timeout(seconds))
        sound = not decoder.changed and len(block) <= LONGEST_SHORT_BLOCK
        if sound and route.lasting and route.answer_payload is not None:
            if len(self._memo) >= _MEMO_ENTRIES:
                self._memo.clear()
            self._memo[block] = route
        return route

    def _decode(self, block: bytes) -> tuple[tuple[bytes, bytes], ...]:
        """Every block goes through here: the table changes nowhere else, and then the memo goes."""
        decoder = self._decoder
        fields, self._ahead = self._ahead, None
        if fields is None:
            fields = decoder.decode(block)
        self._work_left -= BLOCK_WORK + len(block) // OCTETS_OF_BLOCK_PER_WORK
        if decoder.epoch != self._memo_epoch:
            self._memo.clear()
            self._memo_epoch = decoder.epoch
        if decoder.beyond_hard_limit:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "a header list far beyond the limit")
        return fields

    def _decode_ahead(self, block: bytes) -> bool:
        """Decode some more of ``block``. Whether it is through: then `_decode` has its fields."""
        self._ahead = self._decoder.decode_some(block, FIELDS_AT_ONCE)
        self._work_left -= FIELDS_AT_ONCE
        return self._ahead is not None

    def _open(self, stream_id: int, route: Route, *, end_stream: bool) -> None:
        """A stream begins that is not answered on the spot."""
        self._work_left -= STREAM_WORK
        stream = Stream(stream_id, route, self._sender.initial_window, self.limits.initial_window)
        self._streams.open[stream_id] = stream
        stream.send_window += self._streams.pending_windows.pop(stream_id, 0)
        if route.fault is None:
            request = route.request
            stream.reader = MessageReader(
                self.limits.max_message,
                "identity" if request is None else request.encoding,
                None if route.method is None else self.limits.max_inflated_static,
            )
            if route.method is None:
                stream.finished = False
                self.open_calls += 1
                self._calls_left -= 1
                self._events.append(CallStarted(stream))
        if end_stream:
            self._end_of_request(stream)

    def _trailers(self, stream: Stream, fields: tuple[tuple[bytes, bytes], ...], *, end_stream: bool) -> None:
        if stream.half_closed:
            raise StreamFault(ErrorCode.STREAM_CLOSED, "HEADERS after END_STREAM")
        if not end_stream:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "a second HEADERS without END_STREAM")
        check_trailers(fields)
        self._end_of_request(stream)

    # -- bodies -------------------------------------------------------------------------------------------------------

    def _feed(self, stream: Stream, content: bytes, size: int) -> None:
        """Hand DATA to the stream's reader, and give back the windows what nobody will hold."""
        reader = stream.reader
        if reader is None or stream.closed:
            self._take_in(size, size)
            stream.credit += size
            self._credit_stream(stream)
            return
        before = reader.buffered
        try:
            messages = reader.feed(content)
        except CallFault as fault:
            self._take_in(size, size)
            if fault.status == _RESOURCE_EXHAUSTED:
                most = self.limits.max_message if stream.route.method is None else self.limits.max_inflated_static
                self._work_left -= most // OCTETS_OF_MESSAGE_PER_WORK
                self._glitch("messages beyond the limit", _BOMB_GLITCH)
            self._fail_call(stream, fault)
            return
        held = reader.buffered
        if held > before and len(content) < _TINY:
            self._glitch("tiny DATA frames", _TINY_GLITCH)
        self._partial += held - before
        stream.partial = held
        stream.octets += size
        self._weigh(stream, messages)
        if not all(self._message(stream, message) for message in messages):
            self._take_in(size, size)
            return
        # What lies in a whole message is given back once it has been consumed; the rest at once, within bounds.
        delivered = sum(len(message) + PREFIX for message in messages) if stream.route.method is None else 0
        free = max(0, size - delivered)
        if self._partial > self.limits.max_buffered and stream.partial:
            free = 0
        stream.owed += size - free
        self._take_in(size, free)
        stream.credit += free
        self._credit_stream(stream)

    def _weigh(self, stream: Stream, messages: list[bytes]) -> None:
        """Count what ``messages`` have cost, and whether they are what no honest client sends."""
        octets = sum(map(len, messages))
        self._work_left -= octets // OCTETS_OF_MESSAGE_PER_WORK
        stream.message_octets += octets
        if octets and stream.message_octets > _SUSPICIOUS_RATIO * stream.octets:
            self._glitch("messages that inflate beyond measure", _BOMB_GLITCH)

    def _message(self, stream: Stream, message: bytes) -> bool:
        """One whole message. Returns False where the call has failed by it."""
        stream.unread += len(message) + MESSAGE_OVERHEAD
        self._unread += len(message) + MESSAGE_OVERHEAD
        if self._unread > self.limits.max_unread:
            self._fail_call(stream, CallFault(_RESOURCE_EXHAUSTED, "Too many octets in unread messages"))
            return False
        if stream.route.method is None:
            self._events.append(MessageReceived(stream, message))
        elif stream.message is None:
            stream.message = message
        else:
            self._fail_call(stream, CallFault(_UNIMPLEMENTED, "More than one message in a unary request"))
            return False
        return True

    def _end_of_request(self, stream: Stream) -> None:
        """END_STREAM from the client."""
        stream.half_closed = True
        if stream.body_left > 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "less DATA than content-length says")
        route = stream.route
        if stream.closed:
            if stream.ended:
                self._close_stream(stream)
            return
        if route.fault is not None:
            self._answer_fault(stream, route.fault)
            return
        if stream.reader is not None:
            try:
                stream.reader.finish()
            except CallFault as fault:
                self._fail_call(stream, fault)
                return
            stream.reader = None
        if route.method is None:
            self._events.append(HalfClosed(stream))
        elif stream.message is None:
            self._fail_call(stream, CallFault(_UNIMPLEMENTED, "No message in a unary request"))
        else:
            payload = b"\0" + len(stream.message).to_bytes(4, "big") + stream.message
            answer = None if route.answer_payload is None else route.answer_payload(payload)
            if answer is not None:
                self._answer(stream, answer)
