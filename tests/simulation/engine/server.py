"""The server's side of a run: the protocol around each connection, its transport, and the handlers of calls."""

from __future__ import annotations

from collections import deque
from math import inf
from typing import TYPE_CHECKING

from tests.simulation.engine.client import ROUNDING
from tests.simulation.engine.plan import CallPlan, ClientPlan, sent
from tests.support.h2_peer import some_router

from grpc_h2 import (
    CallCancelled,
    CallStarted,
    Connection,
    ConnectionClosing,
    Event,
    HalfClosed,
    MessageReceived,
    Stream,
    Writable,
)

if TYPE_CHECKING:
    from tests.simulation.engine.world import World


SLACK = 70_000
"""Octets by which one write may exceed its budget: a frame of data, its neighbours, and control frames."""
LARGEST_SENT = 40_000
"""Octets of a message that a handler sends, at the most."""


class Handler:
    """Carries out the plan of a call, step by step, each after a random delay."""

    def __init__(self, protocol: SimulatedProtocol, stream: Stream, plan: CallPlan) -> None:
        self.protocol = protocol
        self.stream = stream
        self.plan = plan
        self.steps = deque(plan.handler)
        self.inbox: deque[bytes] = deque()
        self.received: list[bytes] = []
        self.answers = 0
        self.half_closed = False
        self.cancelled = False
        self.ended = False
        """Whether the handler has ended its call."""
        self.finished = False
        """Whether the handler's work is over."""
        self.waiting = False
        self.go_on()

    # -- events of the connection --------------------------------------------------------------------------------------

    def message_received(self, message: bytes) -> None:
        assert not self.half_closed, "a message after the half-close"
        assert not self.cancelled, "a message after the cancellation"
        assert not self.ended, "a message after the handler has ended its call"
        self.received.append(message)
        self.inbox.append(message)
        assert len(self.received) <= len(self.plan.messages), "more messages than were sent"
        assert message == self.plan.messages[len(self.received) - 1], "another message than was sent"
        self.wake()

    def client_half_closed(self) -> None:
        assert not self.half_closed, "a second half-close"
        assert not self.cancelled, "a half-close after the cancellation"
        assert len(self.received) == len(self.plan.messages), "a half-close before the last message"
        self.half_closed = True
        self.wake()

    def call_cancelled(self) -> None:
        assert not self.cancelled, "a second cancellation"
        assert not self.ended, "a cancellation of a call that its handler has ended"
        self.cancelled = True
        self._finish_later()

    def wake(self) -> None:
        if self.waiting:
            self.waiting = False
            self.go_on()

    # -- steps ---------------------------------------------------------------------------------------------------------

    def go_on(self, delay: float | None = None) -> None:
        world = self.protocol.world
        world.later(world.handler_delay() if delay is None else delay, self.step)

    def step(self) -> None:
        """The next step, unless it has to wait for an event."""
        if self.cancelled or self.ended or self.protocol.lost:
            return
        connection, stream = self.protocol.connection, self.stream
        connection.advance(self.protocol.world.now)
        name, amount = self.steps[0]
        if name == "hold":
            return
        if name in ("send", "echo") and not stream.writable:
            self.waiting = True
            return
        if name in ("read", "read to the end", "echo"):
            if not self.inbox and not self.half_closed:
                self.waiting = True
                return
            if self.inbox:
                message = self.inbox.popleft()
                connection.consumed(stream, len(message))
                if name == "echo":
                    self._send(message)
                if name != "read":
                    self.protocol.wake()
                    self.go_on()
                    return
        self.steps.popleft()
        match name:
            case "send":
                self._send(sent(self.plan.number, self.answers, amount))
            case "metadata":
                connection.send_initial_metadata(stream, (("m", "1"),))
            case "status":
                connection.send_status(stream, amount, f"status {amount}" if amount else "")
                self.ended = True
                self._finish_later()
            case "cancel":
                connection.cancel(stream)
                self.ended = True
                self._finish_later()
        self.protocol.wake()
        self.go_on(amount / 1e6 if name == "pause" else None)

    def _send(self, message: bytes) -> None:
        self.protocol.connection.send_message(self.stream, message)
        self.answers += 1
        most = self.protocol.world.plan.limits.high_water + LARGEST_SENT
        assert self.stream.unsent <= most, "queued beyond high water and one message"

    def _finish_later(self) -> None:
        self.protocol.world.later(self.plan.linger / 1e6, self._finish)

    def _finish(self) -> None:
        if self.finished:
            return
        connection = self.protocol.connection
        while self.inbox:
            connection.consumed(self.stream, len(self.inbox.popleft()))
        connection.finished(self.stream)
        self.finished = True
        self.protocol.running -= 1
        self.protocol.wake()


class SimulatedProtocol:
    """The part of an event loop's protocol for a connection: reads, writes, time slices, pauses."""

    def __init__(self, world: World, plan: ClientPlan) -> None:
        self.world = world
        self.calls = {call.number: call for call in plan.calls}
        self.router = some_router()
        limits = world.plan.limits
        self.connection = Connection(self.router, limits, world.now, plan.jitter, budget=world.budget)
        self.age_at = world.now + limits.max_connection_age * (1 + limits.age_jitter * plan.jitter)
        """The instant at which the connection is too old."""
        self.busy_at = world.now
        """The last instant at which a call was certainly open."""
        self.drain_asked = False
        self.drained_at: float | None = None
        """The instant at which the connection began to drain."""
        self.cut = False
        """Whether the connection was ended while calls were open, because its time was over."""
        self.reasons: set[str] = set()
        """Why the connection has ended or drained."""
        self.handlers: dict[int, Handler] = {}
        self.buffer = bytearray()
        """Octets that the transport has not yet sent."""
        self.writing_paused = False
        self.reading = True
        self.queued = False
        self.waking = False
        self.closing: ConnectionClosing | None = None
        self.lost = False
        self.answered = 0
        self.running = 0
        """Handlers that have not finished."""

    # -- the transport ------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Octets from the network."""
        world = self.world
        if self.lost or self.connection.terminated:
            return
        if world.plan.fast_path:
            answer = self.connection.answer_one(data, world.now)
            if answer is not None:
                self._write(answer)
                self._count_answers()
                return
        self._receive(data)

    def take(self, most: int) -> bytes:
        """The network takes octets out of the transport's buffer."""
        taken = bytes(self.buffer[:most])
        del self.buffer[:most]
        if self.writing_paused and len(self.buffer) <= self.world.plan.low_water and not self.lost:
            self.writing_paused = False
            self.connection.resume_writing(self.world.now)
            self.settle()
            if self.connection.backlog:
                self._go_on_later()
        return taken

    def lose(self) -> None:
        """The transport breaks."""
        if self.lost:
            return
        self.lost = True
        self.buffer.clear()
        for event in self.connection.connection_lost():
            assert isinstance(event, CallCancelled), "an event other than a cancellation of a lost connection"
            self.handlers[event.stream.id].call_cancelled()

    def drain(self) -> None:
        """The server asks the client to leave."""
        if not self.lost and not self.connection.terminated:
            self.drain_asked = True
            self.connection.drain(self.world.now)
            self.settle()

    def tick(self) -> None:
        """A timer."""
        if self.lost or self.connection.terminated:
            return
        due, now = self.connection.next_deadline(), self.world.now
        if due is not None and due <= now:
            self._dispatch(self.connection.tick(now))
            self.settle()
        assert now < self.age_at or self.drained_at is not None, "older than its age, and not drained"
        if self.drained_at is not None and self.reasons == {"age"} and not self.connection.terminated:
            assert now < self.drained_at + self.world.plan.limits.age_grace, "the time for calls is over"

    def judge_idleness(self, since: float) -> None:
        """The connection has had no call since the instant ``since``."""
        waited = self.world.now - since
        if self.connection.state.name == "OPEN":
            assert waited < self.world.plan.limits.max_connection_idle, "idle for too long, and not drained"

    def _judge_state(self) -> None:
        """Assert that a connection that has begun to drain or has ended had a reason."""
        now, limits = self.world.now, self.world.plan.limits
        if any(not (handler.ended or handler.cancelled) for handler in self.handlers.values() if not handler.finished):
            self.busy_at = now
        if self.drained_at is None and self.connection.state.name in ("DRAINING", "LEAVING", "CLOSED"):
            self.drained_at = now
            self.reasons |= {
                reason
                for reason, holds in (
                    ("asked", self.drain_asked),
                    ("age", now >= self.age_at),
                    ("idle", now - self.busy_at >= limits.max_connection_idle - ROUNDING),
                )
                if holds
            }
            assert self.reasons, "drained without a reason"
        if self.closing is not None and self.closing.reason == "max_age":
            self.cut = True
            self.reasons.add("grace")
            assert self.age_at < inf
            assert now >= self.age_at + limits.age_grace - ROUNDING, "ended before calls had their time"

    def check_invariants(self) -> None:
        """Let the connection check its invariants, if it has a method for that."""
        check = getattr(self.connection, "check_invariants", None)
        if check is not None:
            check()
        self.world.budget.check_invariants()

    def _write(self, octets: bytes) -> None:
        assert not self.writing_paused, "written to a transport that accepts no more"
        assert len(octets) <= self.world.plan.limits.octets_per_turn + SLACK, "written beyond the budget"
        self.buffer += octets
        if not self.writing_paused and len(self.buffer) > self.world.plan.high_water:
            self.writing_paused = True
            self.connection.pause_writing(self.world.now, len(self.buffer))
        self.world.output_waits(self)

    # -- time slices --------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """A handler has done something: settle in the next loop iteration, once."""
        if not self.waking and not self.lost:
            self.waking = True
            self.world.loop.call_soon(self._woken)

    def _woken(self) -> None:
        self.waking = False
        if not self.lost:
            self.settle()

    def _go_on_later(self) -> None:
        if not self.queued:
            self.queued = True
            self.world.scheduler.defer(self.world.loop, self._go_on)

    def _go_on(self) -> None:
        self.queued = False
        if self.lost:
            return
        if self.connection.backlog and self.connection.wants_read:
            self._receive(b"")
        else:
            self.settle()

    def _receive(self, data: bytes) -> None:
        self._dispatch(self.connection.receive_data(data, self.world.now))
        self.settle()
        self._count_answers()
        if self.connection.backlog and not self.connection.terminated:
            self._go_on_later()

    def settle(self) -> None:
        """Write the allowed output, dispatch events, and decide whether to continue reading."""
        connection = self.connection
        pieces = connection.data_to_send()
        if pieces:
            octets = b"".join(pieces)
            assert octets, "if there is nothing to send, the list is empty"
            self._write(octets)
            if len(octets) >= connection.limits.octets_per_turn:
                self._go_on_later()
        self._dispatch(connection.take_events())
        self._judge_state()
        reading = not connection.backlog and connection.wants_read
        if reading and not self.reading:
            self.world.input_wanted(self)
        self.reading = reading or connection.terminated

    def _count_answers(self) -> None:
        if self.connection.answered:
            self.busy_at = self.world.now
        self.answered += len(self.connection.answered)
        self.connection.answered.clear()

    # -- events -------------------------------------------------------------------------------------------------------

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, ConnectionClosing):
                assert self.closing is None, "a connection closes once"
                assert event.reason in ("drained", "draining", "max_age"), f"the connection ended: {event}"
                self.closing = event
                continue
            stream = event.stream
            if isinstance(event, CallStarted):
                assert stream.id not in self.handlers, "a call starts once"
                self.running += 1
                most = self.world.plan.limits.max_concurrent_streams
                assert self.running <= most, "more calls at once than the connection may have"
                self.handlers[stream.id] = Handler(self, stream, self._plan_of(stream))
                continue
            handler = self.handlers[stream.id]
            match event:
                case MessageReceived(_, message):
                    handler.message_received(message)
                case HalfClosed():
                    handler.client_half_closed()
                case CallCancelled():
                    handler.call_cancelled()
                case Writable():
                    assert stream.writable, "Writable for a stream that is not writable"
                    handler.wake()

    def _plan_of(self, stream: Stream) -> CallPlan:
        assert stream.request is not None
        (number,) = (value for name, value in stream.request.metadata if name == "n")
        return self.calls[int(number)]
