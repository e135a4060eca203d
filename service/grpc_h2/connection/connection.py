"""The server's side of one HTTP/2 connection that carries gRPC: no socket, no event loop; time is an argument.

**Theory of operation.** `Connection.receive_data` takes whatever the socket gave and works through it frame by frame.
What has to be said at once (acknowledgements, resets, ready answers) goes to the sender's list; what concerns a handler
becomes an event. `Connection.data_to_send` hands out what may be written. Neither raises on any input: a peer's fault
ends its stream (`Core._refuse`) or the connection (`Core.close`), each in one place.

**Bounded work.** One call of `receive_data` does a bounded amount of work (`Limits.answers_per_turn` and its
neighbours). Where input is left over, ``backlog`` says so, and the caller comes back after other connections.

**Who holds what.** Ids: `Streams`. Windows and queues outwards: `Sender`; inwards: `ReceiveWindow` and the
streams' own. Instants: `Lifetime`. Misdeeds: one `LeakyBucket`, `PingPolicy`, and a balance of WINDOW_UPDATEs. Ready
answers: `Router`.
"""

from __future__ import annotations

from math import inf

from grpc_h2.connection.core import MESSAGE_OVERHEAD, PREFIX
from grpc_h2.connection.events import (
    ConnectionClosing,
    Event,
    Writable,
)
from grpc_h2.connection.inbound import DRAIN_PING, KEEPALIVE_PING, Inbound
from grpc_h2.connection.outbound import Piece
from grpc_h2.connection.stream import Stream
from grpc_h2.connection.timers import Due
from grpc_h2.rpc.requests import Metadata
from grpc_h2.rpc.responses import initial_block, trailers_block, trailers_only_block
from grpc_h2.wire import frames
from grpc_h2.wire.errors import ErrorCode


class Connection(Inbound):
    """One client's connection. Call `receive_data`, `tick` and `connection_lost`; write what `data_to_send` gives."""

    __slots__ = ()

    # -- output -------------------------------------------------------------------------------------------------------

    def data_to_send(self, budget: int | None = None) -> list[Piece]:
        """What may be written now: all that is not stream data, then about ``budget`` octets of stream data.

        Empty where nothing can go: nothing is queued, or the peer's windows are shut. May leave events (`take_events`).
        """
        if self._paused:
            return []
        if not self._sender.streaming:
            return self._sender.take_out()
        pieces, sent = self._sender.take(self.limits.octets_per_turn if budget is None else budget)
        if sent:
            self._lifetime.progress_at = self._now
            self._pings.reset()
            self._window_updates += 20 * self._sender.data_frames
            self._sender.data_frames = 0
            for stream in dict.fromkeys(sent):  # one that had several quanta is looked at once
                if stream.ended:
                    self._both_ended(stream)
                elif not stream.below_high_water and stream.unsent <= self.limits.low_water:
                    stream.below_high_water = True
                    self._events.append(Writable(stream))
            if self._sender.out:
                pieces.append(b"".join(self._sender.out))
                self._sender.out.clear()
        return pieces

    @property
    def wants_read(self) -> bool:
        """Whether to read on: not while the peer leaves our answers unread."""
        return not self._paused

    def pause_writing(self, now: float) -> None:
        """The transport takes no more."""
        self._paused = True
        self._lifetime.progress_at = now

    def resume_writing(self, now: float) -> None:
        """The transport takes more again."""
        self._now = now
        self._paused = False
        self._lifetime.progress_at = now

    # -- what a server does with its calls ----------------------------------------------------------------------------

    def send_initial_metadata(self, stream: Stream, metadata: Metadata = (), encoding: str | None = None) -> None:
        """Response headers. No effect on a closed stream, or when they have been sent."""
        if stream.closed or stream.headers_sent:
            return
        block = initial_block(metadata, encoding)  # may raise: then nothing was sent
        stream.headers_sent = True
        self._sender.headers(stream, block, end_stream=False)
        self._pings.reset()

    def send_message(self, stream: Stream, message: bytes | memoryview, *, compressed: bool = False) -> None:
        """One message, as it goes on the wire; ``compressed`` tells that it is. No effect on a closed stream."""
        if stream.closed:
            return
        self.send_initial_metadata(stream)
        self._queue(stream, bytes((compressed,)) + len(message).to_bytes(4, "big"), message)
        stream.below_high_water = stream.unsent <= self.limits.high_water

    def send_status(self, stream: Stream, status: int, message: str, metadata: Metadata = ()) -> None:
        """The end of a call: trailers, or trailers alone where nothing was sent. No effect on a closed stream."""
        if stream.closed:
            return
        block = trailers_block if stream.headers_sent else trailers_only_block
        self._end_with(stream, block(status, message, metadata))

    def cancel(self, stream: Stream, code: int = ErrorCode.CANCEL) -> None:
        """RST_STREAM. No effect on a stream that has ended."""
        if stream.ended or stream.cancelled:
            return
        stream.trailers = b""  # closed by its own handler: that needs no telling
        self._sender.out.append(frames.rst_stream(stream.id, code))
        self._streams.note_reset(stream.id)
        self._abandon(stream, code)

    def consumed(self, stream: Stream, octets: int) -> None:
        """A handler has taken a message of ``octets``: the windows grow again."""
        taken = min(octets + MESSAGE_OVERHEAD, stream.unread)
        stream.unread -= taken
        self._unread -= taken
        free = min(octets + PREFIX, stream.owed)
        stream.owed -= free
        self._take_in(0, free)
        stream.credit += free
        self._credit_stream(stream)

    def finished(self, stream: Stream) -> None:
        """The handler's work has really ended; until then it counts as a stream."""
        if stream.finished:
            return
        stream.finished = True
        self.open_calls -= 1
        if stream.id not in self._streams.open:
            self._zombies -= 1

    # -- life and death -----------------------------------------------------------------------------------------------

    def drain(self, now: float) -> None:
        """Leave in order: calls that the client has begun, or begins before it hears of it, are served.

        Double GOAWAY (RFC 9113 section 6.8): the first announces, the second comes when the client has answered the
        PING behind the first.
        """
        self._now = now
        if self.terminated or self._refused_above is not None or self._lifetime.draining_at != inf:
            return
        if not self._lifetime.introduced:
            self.close(ErrorCode.NO_ERROR, "draining")
            return
        self._lifetime.age_at = inf
        self._lifetime.draining_at = now
        self._sender.out += (
            frames.goaway(frames.LARGEST_STREAM_ID, ErrorCode.NO_ERROR, b"draining"),
            frames.ping(DRAIN_PING, ack=False),
        )

    def connection_lost(self) -> list[Event]:
        """The transport is gone."""
        self._abandon_all()
        return [event for event in self.take_events() if not isinstance(event, ConnectionClosing)]

    def next_deadline(self) -> float | None:
        """When `tick` is due; it may turn out later that nothing is."""
        if self.terminated:
            return None
        deadline = self._lifetime.next_deadline(idle=self._idle, unsent=self._unsent)
        return None if deadline == inf else deadline

    def tick(self, now: float) -> list[Event]:
        """Do what has become due."""
        self._now = now
        for due in self._lifetime.due(now, idle=self._idle, unsent=self._unsent):
            if self.terminated:
                break
            self._do(due, now)
        return self.take_events()

    def _do(self, due: Due, now: float) -> None:
        if due is Due.PREFACE:
            self.close(ErrorCode.SETTINGS_TIMEOUT, "no preface in time")
        elif due is Due.HEADER_BLOCK:
            self.close(ErrorCode.ENHANCE_YOUR_CALM, "a header block not finished in time")
        elif due is Due.KEEPALIVE:
            self._sender.out.append(frames.ping(KEEPALIVE_PING, ack=False))
            self._lifetime.asked_at = now
        elif due is Due.DEAD:
            self.close(ErrorCode.NO_ERROR, "keepalive timeout")
        elif due is Due.AGE:
            self._lifetime.grace_at = now + self.limits.age_grace
            self.drain(now)
        elif due is Due.IDLE:
            self._lifetime.idle_at = inf
            self.drain(now)
        elif due is Due.FINAL_GOAWAY:
            self._final_goaway()
        elif due is Due.GRACE:
            self.close(ErrorCode.NO_ERROR, "max_age")
        else:
            self.close(ErrorCode.ENHANCE_YOUR_CALM, "nothing was read for too long")
