"""The server's side of one HTTP/2 connection that carries gRPC: no socket, no event loop; time is an argument.

**Theory of operation.** `Connection.receive_data` takes the octets that the socket gave and works through them frame by
frame. Replies that need no handler (acknowledgements, resets, static answers) are queued; all input that concerns a
handler becomes an event. `Connection.data_to_send` returns the octets to write. Neither raises on any input: a peer's
fault ends its stream (in `Closing.refuse` alone) or the connection (in `Closing.close` alone).

**Bounded work.** One call of `receive_data` does a bounded amount of work (`Limits.answers_per_turn` and its
neighbours). If input is left over, ``backlog`` is true, and the caller calls again after other connections.

**Composition.** A connection is made of parts. Each owns its numbers: other parts read them, but change them only
through its methods. A part knows the parts before it in this list, and returns outcomes to the parts after it::

    Lifecycle    the connection's state        InputBuffer  octets that are not processed
    Timers       instants                      Abuse        buckets, ping policy, budgets of work
    FlowControl  the connection's windows      Streams      streams by id, counts of handlers
    Outbound     frames out                    Headers      decoder, memo of blocks, block assembly
    Bodies       DATA to messages              FastPath     known calls, alone or in batches
    RequestDeadlines, AnswerDeadlines          deadlines of requests and of answers
    Closing      ends of streams, and its own  Calls        begin and answers of calls
    Inbound      frames in

**Memory.** A connection reports to the server's `Budget` the memory that it holds for its peer, after each action that
may change this amount. A call on the fast path holds no memory.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Final

from grpc_h2.connection.abuse import Abuse
from grpc_h2.connection.bodies import Bodies
from grpc_h2.connection.budget import Budget, Share
from grpc_h2.connection.calls import Calls
from grpc_h2.connection.closing import Closing
from grpc_h2.connection.deadlines import AnswerDeadlines, RequestDeadlines
from grpc_h2.connection.events import ConnectionClosing, Event, Writable
from grpc_h2.connection.fast_path import FastPath
from grpc_h2.connection.flow_control import FlowControl
from grpc_h2.connection.headers import Headers
from grpc_h2.connection.inbound import KEEPALIVE_PING, Inbound
from grpc_h2.connection.input_buffer import InputBuffer
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.outbound import Outbound
from grpc_h2.connection.state import INTRODUCED, ConnectionState, Lifecycle, StreamState
from grpc_h2.connection.stream import STREAM_WEIGHT, Piece, Stream
from grpc_h2.connection.streams import Streams
from grpc_h2.connection.timers import Due, Timers
from grpc_h2.rpc.requests import Metadata
from grpc_h2.rpc.responses import initial_block
from grpc_h2.static.routes import Router
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode

_WAITING_WEIGHT: Final = 512
"""The octets that are counted for each stream that waits for its DATA on the fast path."""
_SENT_ALL: Final = (StreamState.HALF_CLOSED_LOCAL, StreamState.CLOSED)


class Connection:
    """One client's connection. Call `receive_data`, `tick` and `connection_lost`; write the octets that `data_to_send`
    returns.

    All instants are in seconds of one monotonic clock, sizes in octets.
    """

    __slots__ = (
        "_abuse",
        "_answers",
        "_bodies",
        "_buffer",
        "_calls",
        "_closing",
        "_events",
        "_fast_path",
        "_flow",
        "_headers",
        "_inbound",
        "_lifecycle",
        "_on_eviction",
        "_outbound",
        "_requests",
        "_share",
        "_streams",
        "_timers",
        "_written",
        "answer_one",
        "answered",
        "limits",
        "reports",
    )

    def __init__(
        self,
        router: Router,
        limits: Limits,
        now: float,
        jitter: float = 0.0,
        *,
        budget: Budget | None = None,
        on_eviction: Callable[[], None] | None = None,
    ) -> None:
        """A client has connected at instant ``now``.

        Args:
            router: The server's static methods.
            limits: Limits for the client.
            now: The present instant.
            jitter: A random number from -1 to 1. The connection's age varies by this share of `Limits.age_jitter`.
            budget: The memory that all connections of the server may hold.
            on_eviction: Called when this connection was ended because it held most while the budget was exceeded.
                `data_to_send` and `take_events` then have results. The call may happen within a method of another
                connection, so the function must return at once, and call no method of a connection.

        The constructor makes each part from the parts that it uses, in the order of the module's docstring; it has no
        other logic.
        """
        self.limits = limits
        self.answered: list[int] = []
        """The ``answer_id`` of each static answer given; the reader clears the list."""
        self.reports: list[tuple[str, str]] = []
        """Reports about the peer for the operator: ("unauthorized", path) for a call that its static method has
        refused, ("refused", reason) for a stream that was reset. The reader clears the list."""
        self._events: list[Event] = []
        """Events for the caller, until it takes them."""
        self._lifecycle = lifecycle = Lifecycle()
        self._buffer = buffer = InputBuffer()
        self._timers = timers = Timers(limits, now, jitter)
        self._abuse = abuse = Abuse(limits, timers)
        self._flow = flow = FlowControl(limits.connection_window)
        self._streams = streams = Streams()
        self._outbound = outbound = Outbound(flow)
        self._headers = headers = Headers(router, limits, abuse, self.reports)
        self._bodies = bodies = Bodies(limits, abuse)
        self._fast_path = fast_path = FastPath(
            limits, router, lifecycle, buffer, timers, abuse, flow, streams, outbound, headers, self.answered
        )
        self._requests = requests = RequestDeadlines(limits, lifecycle, timers, streams, fast_path)
        self._answers = answers = AnswerDeadlines(limits, timers)
        self._closing = closing = Closing(
            lifecycle, buffer, timers, abuse, streams, outbound, bodies, fast_path, requests, answers, self._events,
            self.reports)  # fmt: skip
        self._calls = calls = Calls(
            limits, timers, abuse, flow, streams, outbound, bodies, fast_path, requests, answers, closing,
            self.answered, self._events)  # fmt: skip
        self._inbound = Inbound(
            limits, router, lifecycle, buffer, timers, abuse, flow, streams, outbound, headers, bodies, fast_path,
            closing, calls, self.answered)  # fmt: skip
        self.answer_one = fast_path.answer_one
        """See `FastPath.answer_one`. The method is bound here to save a function call for each single call."""
        self._written = 0
        """Octets that the transport has accepted and not sent, while it accepts no more."""
        self._on_eviction = on_eviction
        self._share: Share | None = None if budget is None else budget.join(self._evict)
        outbound.control(*_introduction(limits))

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def state(self) -> ConnectionState:
        """The state of the connection: see ``state.py``."""
        return self._lifecycle.state

    @property
    def terminated(self) -> bool:
        """Whether the last GOAWAY is queued and no stream is left."""
        return self._lifecycle.closed

    @property
    def backlog(self) -> bool:
        """Whether input is left over: call ``receive_data(b"", now)`` again soon, and read no more until then."""
        return self._buffer.backlog

    @property
    def authorized(self) -> bool:
        """Whether a static method has authorized a call of the peer."""
        return self._headers.authorized

    @property
    def open_calls(self) -> int:
        """The number of handlers at work, including handlers of cancelled calls."""
        return self._streams.open_calls

    @property
    def released(self) -> dict[int, Stream]:
        """Streams that were open when the connection ended, to be freed a few at a time."""
        return self._closing.released

    @property
    def unsent(self) -> int:
        """Octets of stream data that wait for the peer's windows or for the transport."""
        return self._outbound.unsent

    # -- input --------------------------------------------------------------------------------------------------------

    def hold(self, data: bytes, now: float) -> None:
        """Keep ``data``, octets that the peer has sent, for the next call of `receive_data`; until then ``backlog`` is
        true."""
        self._fast_path.settle()
        self._timers.read(now)
        self._buffer.add(data)
        self._report()

    def receive_data(self, data: bytes, now: float) -> list[Event]:
        """Process ``data``, octets that the peer has sent, at instant ``now``. Raises nothing."""
        if self._fast_path.alone:
            self._fast_path.settle()
        if data:
            self._timers.read(now)
        else:
            self._timers.advance(now)
        if self._lifecycle.closed:
            self._buffer.clear()  # after the last GOAWAY octets are read, but not processed (section 5.4.1)
        else:
            try:
                self._inbound.work(data)
            except ConnectionFault as fault:
                self._calls.close(fault.code, fault.reason)
        self._report()
        return self.take_events() if self._events else []

    @property
    def eventful(self) -> bool:
        """Whether `take_events` has any events to return."""
        return bool(self._events)

    def take_events(self) -> list[Event]:
        """Return the events that calls other than `receive_data` and `tick` have caused."""
        events = self._events.copy()
        self._events.clear()
        return events

    # -- output -------------------------------------------------------------------------------------------------------

    def data_to_send(self, budget: int | None = None) -> list[Piece]:
        """The octets to write now: all output that is not stream data, then about ``budget`` octets of stream data.

        Empty if nothing can be sent, because nothing is queued or the peer's windows are exhausted. The call may cause
        events (`take_events`).
        """
        outbound = self._outbound
        if outbound.paused:
            return []
        if not outbound.waiting:
            return outbound.take_out()
        pieces, sent, data_frames = outbound.take(self.limits.octets_per_turn if budget is None else budget)
        if sent:
            if self._fast_path.alone:
                self._fast_path.settle()
            self._timers.progressed()
            self._abuse.data_sent(data_frames)
            for stream in sent:
                self._calls.output_taken(stream)
                if stream.state in _SENT_ALL:
                    self._closing.response_ended(stream)
                elif stream.note_sent(self.limits.low_water):
                    self._events.append(Writable(stream))
            self._report()
            pieces += outbound.take_out()
        return pieces

    @property
    def wants_read(self) -> bool:
        """Whether to continue reading: False while the peer does not read our answers."""
        return not self._outbound.paused

    def pause_writing(self, now: float, written: int = 0) -> None:
        """The transport accepts no more output; ``written``: the octets that it has accepted and not sent."""
        self.advance(now)
        self._timers.progressed()
        self._timers.reading_paused()
        self._outbound.pause(True)
        self._written = written
        self._report()

    def resume_writing(self, now: float) -> None:
        """The transport accepts output again."""
        self.advance(now)
        self._timers.progressed()
        self._timers.reading_resumed()
        self._outbound.pause(False)
        self._written = 0
        self._report()

    # -- calls --------------------------------------------------------------------------------------------------------

    def advance(self, now: float) -> None:
        """Set the present instant to ``now``. To be called before a handler acts, which may be long after the last
        input. The time limits for a peer that reads nothing, and for a connection without calls, begin at the present
        instant."""
        self._fast_path.settle()
        self._timers.advance(now)

    def send_initial_metadata(self, stream: Stream, metadata: Metadata = (), encoding: str | None = None) -> None:
        """Queue the response headers. No effect on a closed stream, or if they have been sent.

        Raises:
            ValueError: for metadata that may not be sent; then nothing was sent.
        """
        if stream.closed or stream.headers_sent:
            return
        self._calls.send_headers(stream, initial_block(metadata, encoding))

    def send_message(self, stream: Stream, message: bytes | memoryview, *, compressed: bool = False) -> None:
        """Queue one message, without its prefix; ``compressed``: whether ``message`` is compressed. No effect on a
        closed stream."""
        if stream.closed:
            return
        if not stream.headers_sent:
            self._calls.send_headers(stream, initial_block((), None))
        self._calls.send_message(stream, message, compressed=compressed)
        self._report()

    def send_status(self, stream: Stream, status: int, message: str, metadata: Metadata = ()) -> None:
        """Queue the end of a call: trailers, or a Trailers-Only response if nothing was sent before. No effect on a
        closed stream.

        Raises:
            ValueError: for metadata that may not be sent; then nothing was sent.
        """
        if not stream.closed:
            self._calls.send_status(stream, status, message, metadata)
            self._report()

    def cancel(self, stream: Stream, code: int = ErrorCode.CANCEL) -> None:
        """Queue RST_STREAM. No effect on a stream that has ended."""
        self._closing.cancel(stream, code)
        self._report()

    def expect_one_message(self, stream: Stream) -> None:
        """The method of ``stream`` takes one message, so this message must arrive within `Limits.body_timeout`, and
        must be the only one. To be called when the call has begun; not needed for static methods."""
        self._calls.expect_one_message(stream)

    def cut_answers(self, before: float) -> None:
        """Give up answers that are complete and have waited to be read since the instant ``before``, or longer, so that
        their memory is released. This call causes events."""
        self._closing.cut_answers(before)
        self._report()

    def consumed(self, stream: Stream, octets: int) -> None:
        """A handler has taken a message of ``octets``: the windows grow again."""
        self._calls.consumed(stream, octets)
        self._report()

    def finished(self, stream: Stream) -> None:
        """The handler has returned; until then its stream counts as open."""
        self._streams.finish(stream)
        self._report()

    # -- life and death -----------------------------------------------------------------------------------------------

    def close(self, code: int, reason: str) -> None:
        """Queue GOAWAY with ``code`` and ``reason``, and end every stream."""
        self._calls.close(code, reason)
        self._report()

    def drain(self, now: float) -> None:
        """Drain the connection: calls that the client has begun, or begins before it knows of the drain, are served.

        Double GOAWAY (RFC 9113 section 6.8): the first announces the end; the second is sent when the client has
        answered the PING that followed the first.
        """
        self.advance(now)
        self._closing.drain()
        self._report()

    def connection_lost(self) -> list[Event]:
        """The transport has closed."""
        self._calls.abandon_all()
        if self._share is not None:
            self._share.leave()
            self._share = None
        self._on_eviction = None
        return [event for event in self.take_events() if not isinstance(event, ConnectionClosing)]

    def next_deadline(self) -> float | None:
        """The instant at which `tick` must be called; at that instant there may be no work."""
        if self._lifecycle.closed:
            return None
        self._fast_path.settle()
        deadline = self._timers.next_deadline(
            introduced=self._introduced, idle=self._calls.idle, unsent=self._unread_by_peer
        )
        deadline = min(deadline, self._requests.next_deadline(), self._answers.next_deadline())
        return None if deadline == inf else deadline

    def tick(self, now: float) -> list[Event]:
        """Act on all deadlines that have passed."""
        self.advance(now)
        for due in self._timers.due(introduced=self._introduced, idle=self._calls.idle, unsent=self._unread_by_peer):
            if self._lifecycle.closed:
                break
            self._do(due)
        if not self._lifecycle.closed:
            self._calls.end_overdue()
        self._report()
        return self.take_events()

    @property
    def _introduced(self) -> bool:
        # The peer's preface may be among octets that are not processed yet, and the peer is not to blame for this
        # delay.
        return self._lifecycle.state in INTRODUCED or self._buffer.backlog

    @property
    def _unread_by_peer(self) -> bool:
        return self._outbound.paused or self._outbound.unsent > 0

    def _do(self, due: Due) -> None:
        timers, calls, closing = self._timers, self._calls, self._closing
        if due is Due.PREFACE:
            calls.close(ErrorCode.SETTINGS_TIMEOUT, "no preface in time")
        elif due is Due.HEADER_BLOCK:
            calls.close(ErrorCode.ENHANCE_YOUR_CALM, "a header block not finished in time")
        elif due is Due.KEEPALIVE:
            self._outbound.control(frames.ping(KEEPALIVE_PING, ack=False))
            timers.keepalive_sent()
        elif due is Due.DEAD:
            calls.close(ErrorCode.NO_ERROR, "keepalive timeout")
        elif due is Due.AGE:
            timers.grace_begun()
            closing.drain()
        elif due is Due.IDLE:
            timers.idleness_noted()
            closing.drain()
        elif due is Due.FINAL_GOAWAY:
            closing.final_goaway()
        elif due is Due.GRACE:
            calls.close(ErrorCode.NO_ERROR, "max_age")
        else:
            calls.close(ErrorCode.ENHANCE_YOUR_CALM, "nothing was read for too long")

    # -- memory -------------------------------------------------------------------------------------------------------

    @property
    def held(self) -> int:
        """Octets that the connection holds for its peer, some of them estimated."""
        if self._lifecycle.closed:
            return self._written
        streams = self._streams
        return (
            len(self._buffer.held)
            + self._headers.held
            + self._bodies.partial
            + self._bodies.unread
            + self._outbound.held
            + self._written
            + streams.weight
            + STREAM_WEIGHT * streams.zombies
            + _WAITING_WEIGHT * len(self._fast_path.pending)
        )

    def _report(self) -> None:
        share = self._share
        if share is not None:
            held = self.held
            if held != share.octets:
                share.hold(held)

    def count_in(self, budget: Budget) -> None:
        """Count the memory of this connection in ``budget`` from now on, and in no other budget."""
        if self._share is not None:
            self._share.leave()
            self._share = budget.join(self._evict)
            self._report()

    def _evict(self) -> None:
        self._calls.close(ErrorCode.ENHANCE_YOUR_CALM, "the server is short of memory, and this connection holds most")
        self._report()
        if self._on_eviction is not None:
            self._on_eviction()

    # -- what must hold -----------------------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Assert all invariants that hold between two calls. This is for tests, because it walks over all streams."""
        streams = self._streams.open.values()
        assert self._share is None or self._share.octets == self.held, "not all that is held was reported"
        if self._lifecycle.closed:
            assert not streams
            assert not self._fast_path.pending
            assert not self._outbound.waiting
            assert self._outbound.unsent == 0
            return
        self._streams.check_invariants()
        self._flow.check_invariants(held=sum(stream.owed for stream in streams))
        self._outbound.check_invariants(streams)
        self._bodies.check_invariants(streams)
        self._headers.check_invariants()
        self._fast_path.check_invariants()
        self._buffer.check_invariants()
        self._requests.check_invariants(self._streams.open)
        self._answers.check_invariants(self._streams.open)


def _introduction(limits: Limits) -> list[bytes]:
    """The frames that the server sends first: its SETTINGS, and a WINDOW_UPDATE that enlarges the connection's
    window."""
    introduction = [
        frames.settings(
            (
                (frames.MAX_CONCURRENT_STREAMS, limits.max_concurrent_streams),
                (frames.INITIAL_WINDOW_SIZE, limits.initial_window),
                (frames.MAX_HEADER_LIST_SIZE, limits.max_header_list),
            )
        )
    ]
    if limits.connection_window > frames.DEFAULT_WINDOW:
        introduction.append(frames.window_update(0, limits.connection_window - frames.DEFAULT_WINDOW))
    return introduction
