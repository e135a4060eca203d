"""Ends streams and the connection. Only this module closes a stream, and only this module sends RST_STREAM and GOAWAY.

This module processes the outcomes of the parts that it composes. ``inbound.py`` reads frames, and ``calls.py`` judges
requests. This module does not read a clock.
"""

from __future__ import annotations

from typing import Final

from grpc_h2.connection.abuse import Abuse
from grpc_h2.connection.bodies import Bodies
from grpc_h2.connection.deadlines import AnswerDeadlines, RequestDeadlines
from grpc_h2.connection.events import AnswerCutOff, CallCancelled, ConnectionClosing, Event
from grpc_h2.connection.fast_path import FastPath
from grpc_h2.connection.input_buffer import InputBuffer
from grpc_h2.connection.outbound import Outbound
from grpc_h2.connection.state import ConnectionState, Lifecycle, StreamState, StreamStatus
from grpc_h2.connection.stream import Stream
from grpc_h2.connection.streams import Streams
from grpc_h2.connection.timers import Timers
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ErrorCode, StreamFault

DRAIN_PING: Final = b"draining"
_HALF_CLOSED_LOCAL: Final = StreamState.HALF_CLOSED_LOCAL
_CLOSED: Final = StreamState.CLOSED
_LEAVING: Final = ConnectionState.LEAVING


class Closing:
    """The ends of one connection's streams, and of the connection itself."""

    __slots__ = (
        "_abuse",
        "_answers",
        "_bodies",
        "_buffer",
        "_events",
        "_fast_path",
        "_lifecycle",
        "_outbound",
        "_reports",
        "_requests",
        "_streams",
        "_timers",
        "released",
    )

    def __init__(
        self,
        lifecycle: Lifecycle,
        buffer: InputBuffer,
        timers: Timers,
        abuse: Abuse,
        streams: Streams,
        outbound: Outbound,
        bodies: Bodies,
        fast_path: FastPath,
        requests: RequestDeadlines,
        answers: AnswerDeadlines,
        events: list[Event],
        reports: list[tuple[str, str]],
    ) -> None:
        """``events``: the list to which events for handlers are appended. ``reports``: the list to which reports about
        the peer for the operator are appended."""
        self._lifecycle = lifecycle
        self._buffer = buffer
        self._timers = timers
        self._abuse = abuse
        self._streams = streams
        self._outbound = outbound
        self._bodies = bodies
        self._fast_path = fast_path
        self._requests = requests
        self._answers = answers
        self._events = events
        self._reports = reports
        self.released: dict[int, Stream] = {}
        """Streams that were open when the connection ended, to be freed a few at a time."""

    # -- streams --------------------------------------------------------------------------------------------------

    def response_ended(self, stream: Stream) -> None:
        """END_STREAM was sent. A client that still sends has a moment to finish, and is asked to stop afterwards: see
        `deadlines`."""
        if stream.state is _HALF_CLOSED_LOCAL:
            self._streams.note_reset(stream.id)
            self._ask_to_stop(self._requests.await_rest(stream.id))
        self._close(stream)

    def rest_received(self, stream_id: int, octets: int = 0, *, end_stream: bool) -> None:
        """A frame arrived on a stream that has ended on our side. It is thrown away."""
        if self._requests.rest_received(stream_id, octets, end_stream=end_stream):
            self._ask_to_stop(stream_id)

    def end_overdue_rests(self) -> None:
        """Stop waiting for a few of the requests whose rest has not arrived in time."""
        for stream_id in self._requests.overdue_rests():
            self._ask_to_stop(stream_id)

    def _ask_to_stop(self, stream_id: int | None) -> None:
        if stream_id is not None:
            self._outbound.control(frames.rst_stream(stream_id, ErrorCode.NO_ERROR))

    def refuse(self, stream_id: int, fault: StreamFault) -> None:
        """Send RST_STREAM, at most once for a stream. Causing one is cheap for the peer, but not for the server:
        CVE-2025-8671.

        Raises:
            ConnectionFault: if the peer has caused too many RST_STREAM frames.
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
        elif waited and self._lifecycle.state is _LEAVING:  # the last open stream may have ended now
            self._leave_if_done()

    def cancel(self, stream: Stream, code: int) -> None:
        """The handler resets ``stream``: send RST_STREAM. No effect if the stream or the connection has ended."""
        if stream.state is StreamState.CLOSED or self._lifecycle.closed:
            return
        self._reset(stream.id, code)
        self.abandon(stream, code, by_handler=True)

    def abandon(self, stream: Stream, code: int, *, by_handler: bool = False) -> None:
        """Nothing more can be sent on ``stream``. Its handler gets an event, unless the handler itself has ended the
        stream."""
        report = stream.handled and not stream.closed and not by_handler
        self.drop_output(stream)
        self._close(stream)
        if report:
            self._events.append(CallCancelled(stream, code))

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
                self._outbound.give_back(owed)
        self._timers.stream_ended()
        if self._lifecycle.state is _LEAVING:
            self._leave_if_done()

    def drop_output(self, stream: Stream) -> None:
        """Drop the data that ``stream`` has queued."""
        self._outbound.drop(stream)
        self._answers.settle(stream)

    def cut_answers(self, before: float) -> None:
        """Give up complete answers that have waited to be read since the instant ``before``, or longer."""
        for stream in self._answers.since(before):
            if stream.closed:
                self.cut_off(stream, "an answer from data that was replaced long ago")

    def cut_off(self, stream: Stream, reason: str) -> None:
        """Give up the answer of ``stream``, which waits to be read."""
        self._reset(stream.id, ErrorCode.ENHANCE_YOUR_CALM)
        self._events.append(AnswerCutOff(stream, reason))
        self.abandon(stream, ErrorCode.ENHANCE_YOUR_CALM)

    # -- the end of the connection --------------------------------------------------------------------------------

    def drain(self) -> None:
        """Begin to drain: see `Connection.drain`."""
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
        """Send the GOAWAY that names the last stream that is served. The client has acknowledged the drain, or the time
        for the acknowledgement is over."""
        self._lifecycle.enter(ConnectionState.LEAVING)
        self._timers.drain_announced()
        self._streams.name_last()
        self._outbound.control(frames.goaway(self._streams.last_for_goaway, ErrorCode.NO_ERROR))
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if not self._streams.open and not self._fast_path.pending:
            while (stream_id := self._requests.give_up_rest()) is not None:
                self._ask_to_stop(stream_id)
            self._lifecycle.enter(ConnectionState.CLOSED)
            self._events.append(ConnectionClosing(ErrorCode.NO_ERROR, "drained"))

    def close(self, code: int, reason: str) -> None:
        """Queue GOAWAY with ``code`` and ``reason``, and end every stream."""
        if self._lifecycle.closed:
            return
        self.abandon_all()
        self._outbound.control(frames.goaway(self._streams.last_for_goaway, code, reason.encode()))
        self._events.append(ConnectionClosing(code, reason))

    def abandon_all(self) -> None:
        """End every stream, because nothing more can be sent or is read.

        Only streams whose handler is at work are ended one by one. The other streams need no event, and closing 256
        streams takes half a millisecond.
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
        self._buffer.clear()
