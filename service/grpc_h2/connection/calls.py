"""How calls begin, are answered and end, and how the connection ends with them.

The only place where a stream is opened or closed, and where GOAWAY and RST_STREAM are sent. It acts on the outcomes of
the other parts, which it composes; it reads no frames (``inbound.py`` does) and knows no time of its own.
"""

from __future__ import annotations

from typing import Final

from grpc_h2.connection.abuse import Abuse
from grpc_h2.connection.bodies import Bodies, Fed
from grpc_h2.connection.deadlines import AnswerDeadlines, RequestDeadlines
from grpc_h2.connection.events import (
    AnswerCutOff,
    CallCancelled,
    CallStarted,
    ConnectionClosing,
    Event,
    HalfClosed,
    MessageReceived,
)
from grpc_h2.connection.fast_path import FastPath, Opened
from grpc_h2.connection.flow_control import FlowControl
from grpc_h2.connection.input_buffer import InputBuffer
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.outbound import Outbound
from grpc_h2.connection.state import ConnectionState, Lifecycle, StreamState, StreamStatus
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

DRAIN_PING: Final = b"draining"
_REFUSED_AT_ONCE: Final = 8
"""Calls that are refused in one go before their bodies have come: some 80 µs."""
_TOO_LATE: Final = CallFault(StatusCode.DEADLINE_EXCEEDED, "The request was not complete in time")
_HALF_CLOSED_LOCAL: Final = StreamState.HALF_CLOSED_LOCAL
_CLOSED: Final = StreamState.CLOSED
_OPEN: Final = StreamState.OPEN
_LEAVING: Final = ConnectionState.LEAVING


class Calls:
    """The calls of one connection, and its end."""

    __slots__ = (
        "_abuse",
        "_answered",
        "_answers",
        "_bodies",
        "_buffer",
        "_fast_path",
        "_flow",
        "_lifecycle",
        "_limits",
        "_outbound",
        "_refusable",
        "_reports",
        "_requests",
        "_streams",
        "_timers",
        "events",
        "released",
    )

    def __init__(
        self,
        limits: Limits,
        lifecycle: Lifecycle,
        buffer: InputBuffer,
        timers: Timers,
        abuse: Abuse,
        flow: FlowControl,
        streams: Streams,
        outbound: Outbound,
        bodies: Bodies,
        fast_path: FastPath,
        requests: RequestDeadlines,
        answers: AnswerDeadlines,
        answered: list[int],
        reports: list[tuple[str, str]],
    ) -> None:
        """``answered``: the list to which the ids of static answers are appended. ``reports``: the same for what the
        operator should know about the peer."""
        self._reports = reports
        self._limits = limits
        self._lifecycle = lifecycle
        self._buffer = buffer
        self._timers = timers
        self._abuse = abuse
        self._flow = flow
        self._streams = streams
        self._outbound = outbound
        self._bodies = bodies
        self._fast_path = fast_path
        self._requests = requests
        self._answers = answers
        self._answered = answered
        self._refusable: list[Stream] = []
        """Streams whose headers alone decide the answer, and whose bodies have not come."""
        self.events: list[Event] = []
        self.released: dict[int, Stream] = {}
        """Streams that were open when the connection ended, to be freed a few at a time."""

    # -- events ---------------------------------------------------------------------------------------------------

    def take_events(self) -> list[Event]:
        """Events that have come about since the last call."""
        events, self.events = self.events, []
        return events

    def note(self, event: Event) -> None:
        """Add an event that another part has caused."""
        self.events.append(event)

    # -- begin ----------------------------------------------------------------------------------------------------

    @property
    def open_streams(self) -> int:
        """Streams that are open, those that wait for their DATA on the fast path among them."""
        return len(self._streams.open) + len(self._fast_path.pending)

    @property
    def idle(self) -> bool:
        """Whether no stream is open and no handler is at work."""
        return not self.open_streams and not self._streams.zombies

    def find(self, stream_id: int) -> Stream | None:
        """The open stream of that id. One that waits for its DATA becomes an object now."""
        if stream_id in self._fast_path.pending:
            self.open(self._fast_path.release(stream_id))
        return self._streams.open.get(stream_id)

    def open(self, opened: Opened, *, end_stream: bool = False) -> None:
        """Begin a stream that is not answered at once; ``end_stream``: its HEADERS end it.

        Raises:
            StreamFault: with ``end_stream``, as `end_of_request`.
        """
        stream_id, route, added, until = opened
        window = self._flow.initial_send_window + added
        assert window <= frames.LARGEST_WINDOW, "judged when WINDOW_UPDATE came"
        stream = Stream(stream_id, route, window, self._limits.initial_window, self._bodies.reader(route))
        self._streams.add(stream)
        self._abuse.stream_begun(handled=stream.handled)
        if stream.handled:
            self.events.append(CallStarted(stream))
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
        """The server's authorizations have changed, for calls whose bodies have not come, too."""
        for stream in self._streams.open.values():
            if stream.route.method is not None:
                stream.judge_anew(router)
                if stream.route.refused:
                    self._refusable.append(stream)

    def refusing(self, refuses: bool) -> bool:
        """Whether `answer_refused` may have something to do; ``refuses``: streams that wait may be refused."""
        return bool(self._refusable) or (refuses and bool(self._fast_path.pending))

    def answer_refused(self) -> bool:
        """Answer calls whose headers alone decide the answer, without waiting for their bodies. Returns whether more of
        them are left for the next turn."""
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
            StreamFault: PROTOCOL_ERROR where content-length has announced more.
        """
        stream.request_ended()
        self.judge_request(stream)

    def judge_request(self, stream: Stream) -> None:
        """The request is whole: answer it, or pass it on to its handler.

        Raises:
            StreamFault: as `end_of_request`.
        """
        self._requests.settle(stream)
        if stream.body_left > 0:
            raise StreamFault(ErrorCode.PROTOCOL_ERROR, "less DATA than content-length says")
        if stream.closed:  # the response has its end, which waits behind data
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
            self.events.append(HalfClosed(stream))
        elif stream.message is None:
            self.fail(stream, CallFault(StatusCode.UNIMPLEMENTED, "No message in a unary request"))
        elif route.answer_payload is not None:
            answer = route.answer_payload(frame_message(stream.message))
            if answer is not None:
                self._answer(stream, answer)

    # -- bodies ---------------------------------------------------------------------------------------------------

    def act_on(self, stream: Stream, fed: Fed) -> None:
        """Act on the outcome of a DATA frame."""
        messages, free, fault = fed
        for message in messages:
            self.events.append(MessageReceived(stream, message))
        if free:
            self.give_back(free)
        if fault is not None:
            self.fail(stream, fault)
        elif free:
            self._credit(stream)

    def consumed(self, stream: Stream, octets: int) -> None:
        """A handler has taken a message of ``octets``: the windows grow again."""
        free = self._bodies.consume(stream, octets)
        if free:
            self.give_back(free)
            if stream.credit * 2 >= self._limits.initial_window:
                self._credit(stream)

    def give_back(self, octets: int) -> None:
        """``octets`` of DATA may be given back to the window."""
        increment = self._flow.give_back(octets)
        if increment:
            self._outbound.control(frames.window_update(0, increment))

    def _credit(self, stream: Stream) -> None:
        increment = stream.window_due()
        if increment:
            self._outbound.control(frames.window_update(stream.id, increment))

    # -- responses ------------------------------------------------------------------------------------------------

    def send_headers(self, stream: Stream, block: bytes) -> None:
        """Initial metadata."""
        self._outbound.headers(stream, block, end_stream=False)
        self._abuse.headers_sent()

    def send_message(self, stream: Stream, message: bytes | memoryview, *, compressed: bool) -> None:
        """A message, as it goes on the wire, without its prefix."""
        self._queue(stream, message_prefix(len(message), compressed), message)
        stream.note_queued(self._limits.high_water)

    def send_status(self, stream: Stream, status: int, message: str, metadata: Entries) -> None:
        """The end of a call: trailers, or trailers alone where nothing was sent."""
        block = trailers_block if stream.headers_sent else trailers_only_block
        self._end_with(stream, block(status, message, metadata))

    def _answer(self, stream: Stream, answer: StaticAnswer) -> None:
        """A static answer under flow control."""
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
        """The client's messages make no call: answer with a status, and take the call from its handler."""
        taken = stream.handled and not stream.closed
        self._drop_output(stream)
        self.send_status(stream, fault.status, fault.message, ())
        if taken:
            self.events.append(CallCancelled(stream, ErrorCode.CANCEL))

    def _queue(self, stream: Stream, *pieces: Piece) -> None:
        if not self._outbound.unsent:
            self._timers.progressed()  # the clock of a stall starts with the first octet queued
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
        self.response_ended(stream)

    def output_taken(self, stream: Stream) -> None:
        """Some of what waited on ``stream`` was sent."""
        if not stream.unsent:
            self._answers.settle(stream)

    def _drop_output(self, stream: Stream) -> None:
        self._outbound.drop(stream)
        self._answers.settle(stream)

    def response_ended(self, stream: Stream) -> None:
        """END_STREAM was sent. A client that still sends has a moment to end, and is then asked to stop: see
        `deadlines`."""
        if stream.state is _HALF_CLOSED_LOCAL:
            self._streams.note_reset(stream.id)
            self._ask_to_stop(self._requests.await_rest(stream.id))
        self._close(stream)

    def rest_received(self, stream_id: int, octets: int = 0, *, end_stream: bool) -> None:
        """A frame came on a stream that had ended for us. It is thrown away."""
        if self._requests.rest_received(stream_id, octets, end_stream=end_stream):
            self._ask_to_stop(stream_id)

    def _ask_to_stop(self, stream_id: int | None) -> None:
        if stream_id is not None:
            self._outbound.control(frames.rst_stream(stream_id, ErrorCode.NO_ERROR))

    # -- ends of streams ------------------------------------------------------------------------------------------

    def refuse(self, stream_id: int, fault: StreamFault) -> None:
        """RST_STREAM, once a stream. What provokes it is cheap for the peer and not for us: CVE-2025-8671.

        Raises:
            ConnectionFault: where it is one too many.
        """
        self._abuse.glitch("frames that break a stream's rules")
        self._reports.append(("refused", fault.reason))
        waited = stream_id in self._fast_path.pending
        if waited:
            self._fast_path.release(stream_id)
        stream = self._streams.open.get(stream_id)
        if stream is None and self._streams.status(stream_id) is StreamStatus.RESET:
            return
        if stream_id <= self._streams.last_id:
            self._reset(stream_id, fault.code)
        else:
            self._outbound.control(frames.rst_stream(stream_id, fault.code))
        if stream is not None:
            self.abandon(stream, fault.code)
        elif waited and self._lifecycle.state is _LEAVING:  # it may have been the last stream
            self._leave_if_done()

    def cancel(self, stream: Stream, code: int) -> None:
        """The handler resets ``stream``: send RST_STREAM. No effect where the stream or the connection has ended."""
        if stream.state is StreamState.CLOSED or self._lifecycle.closed:
            return
        self._reset(stream.id, code)
        self.abandon(stream, code, by_handler=True)

    def abandon(self, stream: Stream, code: int, *, by_handler: bool = False) -> None:
        """Nothing more can be sent on ``stream``. Its handler gets an event, unless the handler has ended it."""
        report = stream.handled and not stream.closed and not by_handler
        self._drop_output(stream)
        self._close(stream)
        if report:
            self.events.append(CallCancelled(stream, code))

    def _reset(self, stream_id: int, code: int) -> None:
        self._outbound.control(frames.rst_stream(stream_id, code))
        self._streams.note_reset(stream_id)

    def _close(self, stream: Stream) -> None:
        if stream.state is not _CLOSED:
            stream.close()
        if not self._streams.remove(stream):
            return
        self._requests.settle(stream)
        if stream.partial or stream.unread or stream.owed:
            owed = self._bodies.discard(stream)
            if owed:  # messages that no handler will take any more
                self.give_back(owed)
        self._timers.stream_ended()
        if self._lifecycle.state is _LEAVING:
            self._leave_if_done()

    def end_overdue(self) -> None:
        """End calls whose requests were not whole, or whose answers were not read, in time: a few at once."""
        for late in self._requests.overdue():
            stream = self.find(late) if isinstance(late, int) else late
            if stream is not None:
                self._requests.settle(stream)
                if not stream.closed:
                    self.fail(stream, _TOO_LATE)
        for stream_id in self._requests.overdue_rests():
            self._ask_to_stop(stream_id)
        for stream in self._answers.overdue():
            self._cut_off(stream, "an answer not read in time")

    def cut_answers(self, before: float) -> None:
        """Give up complete answers that have waited to be read since ``before``, or longer."""
        for stream in self._answers.since(before):
            if stream.closed:
                self._cut_off(stream, "an answer from data that was replaced long ago")

    def _cut_off(self, stream: Stream, reason: str) -> None:
        self._reset(stream.id, ErrorCode.ENHANCE_YOUR_CALM)
        self.events.append(AnswerCutOff(stream, reason))
        self.abandon(stream, ErrorCode.ENHANCE_YOUR_CALM)

    # -- the end of the connection --------------------------------------------------------------------------------

    def drain(self) -> None:
        """Leave in order: see `Connection.drain`."""
        if self._lifecycle.state is ConnectionState.OPEN:
            self._lifecycle.enter(ConnectionState.DRAINING)
            self._timers.drain_begun()
            self._requests.hasten()
            self._outbound.control(
                frames.goaway(frames.LARGEST_STREAM_ID, ErrorCode.NO_ERROR, b"draining"),
                frames.ping(DRAIN_PING, ack=False),
            )
        elif self._lifecycle.state in (ConnectionState.AWAITS_PREFACE, ConnectionState.AWAITS_SETTINGS):
            self.close(ErrorCode.NO_ERROR, "draining")

    def final_goaway(self) -> None:
        """The client knows of the drain, or has had its time: name the last stream that is served."""
        self._lifecycle.enter(ConnectionState.LEAVING)
        self._timers.drain_announced()
        self._streams.name_last()
        self._outbound.control(frames.goaway(self._streams.last_for_goaway, ErrorCode.NO_ERROR))
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if not self.open_streams:
            while (stream_id := self._requests.give_up_rest()) is not None:
                self._ask_to_stop(stream_id)
            self._lifecycle.enter(ConnectionState.CLOSED)
            self.events.append(ConnectionClosing(ErrorCode.NO_ERROR, "drained"))

    def close(self, code: int, reason: str) -> None:
        """GOAWAY with ``code`` and ``reason``, and the end of every stream."""
        if self._lifecycle.closed:
            return
        self.abandon_all()
        self._outbound.control(frames.goaway(self._streams.last_for_goaway, code, reason.encode()))
        self.events.append(ConnectionClosing(code, reason))

    def abandon_all(self) -> None:
        """End every stream: nothing more can be sent or is read.

        Only streams whose handler is at work are ended one by one: the others need no event, and to close 256 of them
        takes half a millisecond.
        """
        if not self._lifecycle.closed:
            self._lifecycle.enter(ConnectionState.CLOSED)
        for stream in [each for each in self._streams.open.values() if not each.finished]:
            self.abandon(stream, ErrorCode.CANCEL)
        self.released = self._streams.release() or self.released
        self._fast_path.drop_all()
        self._outbound.drop_all()
        self._requests.drop_all()
        self._answers.drop_all()
        self._refusable.clear()
        self._buffer.clear()
