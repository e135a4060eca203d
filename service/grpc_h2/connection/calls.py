"""How calls begin, and how they are answered.

This module opens streams, judges requests once they are whole, and queues responses. ``inbound.py`` reads frames, and
``closing.py`` closes streams.
"""

from __future__ import annotations

from typing import Final

from grpc_h2.connection.abuse import Abuse
from grpc_h2.connection.bodies import Bodies, Fed
from grpc_h2.connection.closing import Closing
from grpc_h2.connection.deadlines import AnswerDeadlines, RequestDeadlines
from grpc_h2.connection.events import CallCancelled, CallStarted, Event, HalfClosed, MessageReceived
from grpc_h2.connection.fast_path import FastPath, Opened
from grpc_h2.connection.flow_control import FlowControl
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.outbound import Outbound
from grpc_h2.connection.state import StreamState
from grpc_h2.connection.stream import Piece, Stream
from grpc_h2.connection.streams import Streams
from grpc_h2.connection.timers import Timers
from grpc_h2.rpc.faults import CallFault, HttpFault
from grpc_h2.rpc.messages import frame_message, message_prefix
from grpc_h2.rpc.responses import Entries, http_block, trailers_block, trailers_only_block
from grpc_h2.rpc.status import StatusCode
from grpc_h2.static.answers import StaticAnswer
from grpc_h2.static.routes import Router
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ErrorCode, StreamFault

_REFUSED_AT_ONCE: Final = 8
"""The most calls that are refused at a time before their bodies have arrived, in some 80 µs."""
_TOO_LATE: Final = CallFault(StatusCode.DEADLINE_EXCEEDED, "The request was not complete in time")
_OPEN: Final = StreamState.OPEN


class Calls:
    """The calls of one connection."""

    __slots__ = (
        "_abuse",
        "_answered",
        "_answers",
        "_bodies",
        "_closing",
        "_events",
        "_fast_path",
        "_flow",
        "_limits",
        "_outbound",
        "_refusable",
        "_requests",
        "_streams",
        "_timers",
    )

    def __init__(
        self,
        limits: Limits,
        timers: Timers,
        abuse: Abuse,
        flow: FlowControl,
        streams: Streams,
        outbound: Outbound,
        bodies: Bodies,
        fast_path: FastPath,
        requests: RequestDeadlines,
        answers: AnswerDeadlines,
        closing: Closing,
        answered: list[int],
        events: list[Event],
    ) -> None:
        """``answered``: the list to which the ids of static answers are appended. ``events``: the list to which events
        are appended."""
        self._limits = limits
        self._timers = timers
        self._abuse = abuse
        self._flow = flow
        self._streams = streams
        self._outbound = outbound
        self._bodies = bodies
        self._fast_path = fast_path
        self._requests = requests
        self._answers = answers
        self._closing = closing
        self._answered = answered
        self._events = events
        self._refusable: list[Stream] = []
        """Streams whose headers alone decide the answer, and whose bodies have not arrived."""

    # -- begin ----------------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        """The number of open streams, including streams that wait for their DATA on the fast path."""
        return len(self._streams.open) + len(self._fast_path.pending)

    @property
    def idle(self) -> bool:
        """Whether no stream is open and no handler is at work."""
        return not self.open_streams and not self._streams.zombies

    def find(self, stream_id: int) -> Stream | None:
        """The open stream with the id ``stream_id``. A stream that waits for its DATA on the fast path becomes an
        object now."""
        if stream_id in self._fast_path.pending:
            self.open(self._fast_path.release(stream_id))
        return self._streams.open.get(stream_id)

    def open(self, opened: Opened, *, end_stream: bool = False) -> None:
        """Begin a stream that is not answered at once; ``end_stream``: whether its HEADERS frame ends the request.

        Raises:
            StreamFault: with ``end_stream``, as `end_of_request`.
        """
        stream_id, route, added, until = opened
        window = self._flow.initial_send_window + added
        assert window <= frames.LARGEST_WINDOW, "checked when the WINDOW_UPDATE arrived"
        stream = Stream(stream_id, route, window, self._limits.initial_window, self._bodies.reader(route))
        self._streams.add(stream)
        self._abuse.stream_begun(handled=stream.handled)
        if stream.handled:
            self._events.append(CallStarted(stream))
        if end_stream:
            self.end_of_request(stream)
        elif route.refused:
            self._refusable.append(stream)
        elif route.method is not None:
            self._requests.expect(stream, until)

    def expect_one_message(self, stream: Stream) -> None:
        """The method of ``stream`` takes one message. No effect once the request is whole."""
        if stream.reader is not None and not stream.closed and stream.state is _OPEN:
            stream.reader.expect_one()
            self._requests.expect(stream)

    def judge_anew(self, router: Router) -> None:
        """The server's authorizations have changed. The change applies also to calls whose bodies have not arrived."""
        for stream in self._streams.open.values():
            if stream.route.method is not None:
                stream.judge_anew(router)
                if stream.route.refused:
                    self._refusable.append(stream)

    def refusing(self, refuses: bool) -> bool:
        """Whether `answer_refused` may have work; ``refuses``: whether streams that wait may have to be refused."""
        return bool(self._refusable) or (refuses and bool(self._fast_path.pending))

    def answer_refused(self) -> bool:
        """Answer calls whose headers alone decide the answer, without waiting for their bodies. Returns whether more
        such calls are left for the next turn."""
        streams, waiting = self._streams.open, self._fast_path.refused()
        for stream_id in waiting[:_REFUSED_AT_ONCE]:
            self.find(stream_id)
        refusable, self._refusable = self._refusable, []
        for number, stream in enumerate(refusable):
            if number == _REFUSED_AT_ONCE:
                self._refusable = refusable[number:]
                break
            if streams.get(stream.id) is stream and not stream.closed:
                self._refuse(stream)
        return bool(self._refusable) or len(waiting) > _REFUSED_AT_ONCE

    def _refuse(self, stream: Stream) -> None:
        self._requests.settle(stream)
        if stream.route.fault is not None:
            self._answer_fault(stream, stream.route.fault)
        elif stream.route.refusal is not None:
            self._answer(stream, stream.route.refusal)

    def end_of_request(self, stream: Stream) -> None:
        """END_STREAM was received.

        Raises:
            StreamFault: PROTOCOL_ERROR if content-length has announced more.
        """
        stream.request_ended()
        self.judge_request(stream)

    def judge_request(self, stream: Stream) -> None:
        """The request is whole: answer it, or pass it on to its handler.

        Raises:
            StreamFault: for the same reasons as `end_of_request`.
        """
        self._requests.settle(stream)
        if stream.body_left > 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "less DATA than content-length says")
        if stream.closed:  # the end of the response is queued, behind data
            return
        route = stream.route
        if route.refused:
            self._refuse(stream)
            return
        if stream.reader is not None:
            try:
                stream.reader.finish()
            except CallFault as fault:
                self.fail(stream, fault)
                return
            stream.body_read()
        if stream.handled:
            self._events.append(HalfClosed(stream))
        elif stream.message is None:
            self.fail(stream, CallFault(StatusCode.UNIMPLEMENTED, "No message in a unary request"))
        elif route.answer_payload is not None:
            answer = route.answer_payload(frame_message(stream.message))
            if answer is not None:
                self._answer(stream, answer)

    # -- bodies ---------------------------------------------------------------------------------------------------

    def act_on(self, stream: Stream, fed: Fed) -> None:
        """Process the outcome of a DATA frame."""
        messages, free, fault = fed
        for message in messages:
            self._events.append(MessageReceived(stream, message))
        if free:
            self._outbound.give_back(free)
        if fault is not None:
            self.fail(stream, fault)
        elif free:
            self._outbound.credit(stream)

    def consumed(self, stream: Stream, octets: int) -> None:
        """A handler has taken a message of ``octets``: the windows grow again."""
        free = self._bodies.consume(stream, octets)
        if free:
            self._outbound.give_back(free)
            if stream.credit * 2 >= self._limits.initial_window:
                self._outbound.credit(stream)

    # -- responses ------------------------------------------------------------------------------------------------

    def send_headers(self, stream: Stream, block: bytes) -> None:
        """Queue the initial metadata."""
        self._outbound.headers(stream, block, end_stream=False)
        self._abuse.headers_sent()

    def send_message(self, stream: Stream, message: bytes | memoryview, *, compressed: bool) -> None:
        """Queue a message in its form on the wire, without its prefix."""
        self._queue(stream, message_prefix(len(message), compressed), message)
        stream.note_queued(self._limits.high_water)

    def send_status(self, stream: Stream, status: int, message: str, metadata: Entries) -> None:
        """Queue the end of a call: trailers, or a Trailers-Only response if nothing was sent before."""
        block = trailers_block if stream.headers_sent else trailers_only_block
        self._end_with(stream, block(status, message, metadata))

    def _answer(self, stream: Stream, answer: StaticAnswer) -> None:
        """Queue a static answer, which flow control applies to."""
        self._answered.append(answer.answer_id)
        if answer.message is not None:
            self._outbound.headers(stream, answer.headers, end_stream=False)
            self._queue(stream, message_prefix(len(answer.message)), answer.message)
        self._end_with(stream, answer.block)

    def _answer_fault(self, stream: Stream, fault: CallFault | HttpFault) -> None:
        if isinstance(fault, CallFault):
            self._end_with(stream, trailers_only_block(fault.status, fault.message, ()))
            return
        text = fault.text.encode()
        self._outbound.headers(stream, http_block(fault.status, len(text)), end_stream=False)
        self._queue(stream, text)
        self._end_with(stream, b"")

    def fail(self, stream: Stream, fault: CallFault) -> None:
        """The client's messages do not form a valid call: answer with a status, and end the call for its handler."""
        taken = stream.handled and not stream.closed
        self._closing.drop_output(stream)
        self.send_status(stream, fault.status, fault.message, ())
        if taken:
            self._events.append(CallCancelled(stream, ErrorCode.CANCEL))

    def _queue(self, stream: Stream, *pieces: Piece) -> None:
        if not self._outbound.unsent:
            self._timers.progressed()  # a stall is measured from the moment when the first octet is queued
        before = stream.unsent
        self._outbound.data(stream, *pieces)
        self._answers.queued(stream, stream.unsent - before)

    def _end_with(self, stream: Stream, block: bytes) -> None:
        """Queue the terminal header block (empty: END_STREAM on the last DATA frame) behind the stream's data."""
        self._abuse.headers_sent()
        if stream.unsent:
            stream.response_complete(block)
            self._answers.completed(stream)
            return
        self._outbound.headers(stream, block, end_stream=True)
        self._closing.response_ended(stream)

    def output_taken(self, stream: Stream) -> None:
        """Some of the data that waited on ``stream`` was sent."""
        if not stream.unsent:
            self._answers.settle(stream)

    # -- ends ----------------------------------------------------------------------------------------------------

    def end_overdue(self) -> None:
        """End a few of the calls whose requests were not whole, or whose answers were not read, in time."""
        for late in self._requests.overdue():
            stream = self.find(late) if isinstance(late, int) else late
            if stream is not None:
                self._requests.settle(stream)
                if not stream.closed:
                    self.fail(stream, _TOO_LATE)
        self._closing.end_overdue_rests()
        for stream in self._answers.overdue():
            self._closing.cut_off(stream, "an answer not read in time")

    def close(self, code: int, reason: str) -> None:
        """Queue GOAWAY with ``code`` and ``reason``, and end every stream."""
        self._closing.close(code, reason)
        self._refusable.clear()

    def abandon_all(self) -> None:
        """The transport has closed: end every stream."""
        self._closing.abandon_all()
        self._refusable.clear()
