"""A client of one connection: it obeys the rules of RFC 9113, and knows the right answer to each call."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import hpack
from tests.simulation.engine.plan import PREFIX, TOO_LATE, CallPlan, ClientPlan
from tests.support import h2_wire as wire
from tests.support.h2_replies import Replies, Result

from grpc_h2 import Limits

REFUSED_STREAM = 7
ROUNDING = 1e-9
"""Seconds by which sums of instants may differ."""
GENEROUS = 10**6


@dataclass
class Call:
    """A call that the client has begun."""

    plan: CallPlan
    stream: int
    window: int
    """Octets of DATA that the server still allows on the stream."""
    sent: int = 0
    half_closed: bool = False
    cancelled: bool = False
    """Whether the client has reset the call."""
    granted: int = 0
    """Octets of the answer that WINDOW_UPDATE frames have allowed."""
    begun_at: float = 0.0
    """The instant at which the client has sent HEADERS."""
    over_at: float | None = None
    """The instant at which the end of the call has arrived."""
    refusable: bool = False
    """Whether the server may refuse the call, because too many calls were open when it began."""


class Client:
    """Sends the frames of its plan, in a random order."""

    def __init__(
        self,
        plan: ClientPlan,
        limits: Limits,
        draw: random.Random,
        clock: Callable[[], float],
        at_work: Callable[[Call], bool],
    ) -> None:
        """``at_work``: whether the handler of a call is still at work, or may still begin, after the call has ended for
        the client."""
        self.plan = plan
        self.limits = limits
        self.draw = draw
        self.clock = clock
        self.at_work = at_work
        self.replies = Replies()
        self.encoder = hpack.Encoder() if plan.indexing else None
        self.outbox = bytearray()
        self.to_come = list(plan.calls)
        self.calls: dict[int, Call] = {}
        self._live: list[Call] = []
        self.next_stream = draw.choice((1, 3))
        self.introduced = False
        self.server_window = 65_535
        """The server's SETTINGS_INITIAL_WINDOW_SIZE."""
        self.window = 65_535
        """Octets of DATA that the server still allows on the connection."""
        self.granted = 0
        """Octets of answers that WINDOW_UPDATE frames of the connection have allowed."""
        self.initial_window = 65_535
        self.changes = list(plan.changes)
        self.settings_sent = 0
        self.pings: list[bytes] = []
        self.last_id = wire.LARGEST_WINDOW
        """The largest stream id that the server serves, according to its GOAWAY."""
        self.broken = False
        """Whether the client's transport is broken."""
        self.closed = False
        """Whether the server has closed the connection, and everything that it sent has arrived."""
        self.drained_at: float | None = None
        """The instant at which the server has begun to drain the connection."""
        self.cut = False
        """Whether the server may have ended the connection while calls were open, because its time was over."""
        self.rests = list(plan.rests)
        self.resting_until = 0.0

    # -- the state of a call ------------------------------------------------------------------------------------------

    def result(self, call: Call) -> Result:
        return self.replies.stream(call.stream)

    def over(self, call: Call) -> bool:
        """Whether the call has ended."""
        result = self.result(call)
        return (
            self.broken
            or self.closed
            or result.ended
            or result.reset is not None
            or call.cancelled
            or call.stream > self.last_id
        )

    @property
    def open_calls(self) -> list[Call]:
        self._live = [call for call in self._live if not self.over(call)]
        return self._live

    @property
    def done(self) -> bool:
        """Whether every call has ended and no octets are in flight."""
        return self.broken or self.closed or self._done

    @property
    def _done(self) -> bool:
        return (
            not self.outbox
            and (not self.to_come or self.last_id < wire.LARGEST_WINDOW)
            and not self.open_calls
            and (self.last_id < wire.LARGEST_WINDOW or len(self.replies.pongs) == len(self.pings))
            and (self.last_id < wire.LARGEST_WINDOW or self.replies.settings_acks == self.settings_sent)
        )

    # -- sending ------------------------------------------------------------------------------------------------------

    def _send(self, octets: bytes) -> None:
        self.replies.note_sent(octets)
        self.outbox += octets

    def step(self, *, hurry: bool) -> bool:
        """Do one of the actions that are possible now; with ``hurry``, it may also be an action that ends the run.

        Returns whether there was an action.
        """
        if not self.introduced:
            self._introduce()
            return True
        if not self.plan.impatient and not self.replies.frames:
            return False
        actions = []
        open_calls = self.open_calls
        if self._may_open(open_calls):
            actions += [self._open] * 3
            if self.rests and not open_calls and not hurry:
                actions.append(self._rest)
        sending = [call for call in open_calls if self._can_send(call)]
        if sending:
            actions += [lambda: self._send_some(self.draw.choice(sending), hurry=hurry)] * 4
        if open_calls:
            actions += [lambda: self._grant(self.draw.choice(open_calls), hurry=hurry)] * 2
            actions += [lambda: self._grant_connection(hurry=hurry)] * 2
        if self.changes:
            actions.append(self._change)
        if len(self.pings) < self.plan.pings:
            actions.append(self._ping)
        if actions:
            self.draw.choice(actions)()
        if hurry:
            self._grant_connection(hurry=True)
            for call in open_calls:
                self._grant(call, hurry=True)
        return bool(actions)

    def _may_open(self, open_calls: list[Call]) -> bool:
        if not self.to_come or self.last_id < wire.LARGEST_WINDOW or len(open_calls) >= self.plan.together:
            return False
        if self.clock() < self.resting_until:
            return False
        return not open_calls or not (self.to_come[0].alone or any(call.plan.alone for call in open_calls))

    def _introduce(self) -> None:
        self.introduced = True
        self._note_settings(self.plan.settings)
        self._send(wire.PREFACE + wire.settings(*self.plan.settings))

    def _rest(self) -> None:
        self.resting_until = self.clock() + self.rests.pop()

    def _change(self) -> None:
        pairs = self.changes.pop(0)
        self._note_settings(pairs)
        self._send(wire.settings(*pairs))

    def _note_settings(self, pairs: tuple[tuple[int, int], ...]) -> None:
        self.settings_sent += 1
        self.initial_window = dict(pairs).get(4, self.initial_window)

    def _ping(self) -> None:
        payload = self.draw.randbytes(8)
        self.pings.append(payload)
        self._send(wire.ping(payload))

    def _open(self) -> None:
        plan = self.to_come.pop(0)
        steady = self.plan.steady
        stream, self.next_stream = self.next_stream, self.next_stream + 2 * (steady or self.draw.choice((1, 1, 1, 3)))
        others = sum(not self.over(call) or self.at_work(call) for call in self.calls.values())
        call = self.calls[stream] = Call(plan, stream, self.server_window, begun_at=self.clock())
        call.refusable = others >= self.limits.max_concurrent_streams
        self._live.append(call)
        fields = wire.request_fields(plan.path, *plan.fields, **dict(plan.replaced))
        if self.encoder is None or plan.reset is not None:
            block = wire.block(fields)
        else:
            block = self.encoder.encode(fields, huffman=self.draw.random() < 0.5)
        if steady and self._fits(call) and plan.cancel_after is None and not plan.trailers:
            call.sent, call.half_closed = len(plan.body), True
            call.window -= call.sent
            self.window -= call.sent
            self._send(wire.headers(stream, block) + wire.data(stream, plan.body, end_stream=True))
            return
        if not plan.body and not plan.trailers and self.draw.random() < 0.5:
            call.half_closed = True
        pad, depends = self.draw.choice((None, None, 0, 9)), self.draw.choice((None, None, 0))
        if self.draw.random() < 0.2:
            cut = self.draw.randrange(len(block) + 1)
            self._send(
                wire.headers(
                    stream, block[:cut], end_stream=call.half_closed, end_headers=False, pad=pad, depends=depends
                )
                + wire.continuation(stream, block[cut:], end_headers=True)
            )
        else:
            self._send(wire.headers(stream, block, end_stream=call.half_closed, pad=pad, depends=depends))
        if plan.withheld_after is not None and self.draw.random() < 0.5:  # as C-core does
            self._grant(call, hurry=False)
        self._cancel_when_due(call)
        if not self.over(call) and self._fits(call) and self.draw.random() < 0.4:
            self._send_some(call, hurry=True)

    def _fits(self, call: Call) -> bool:
        if call.half_closed or call.plan.withheld_after is not None:
            return False
        return len(call.plan.body) <= min(call.window, self.window, 16_384)

    def _can_send(self, call: Call) -> bool:
        if call.half_closed:
            return False
        if call.sent == call.plan.withheld_after:
            return False
        if call.sent == len(call.plan.body):
            return True
        if call.plan.ping_pong and not self._answered(call):
            return False
        return min(call.window, self.window) > 0

    def _answered(self, call: Call) -> bool:
        """Whether every message that has been sent has been answered."""
        return len(self.result(call).body) >= call.sent

    def _send_some(self, call: Call, *, hurry: bool) -> None:
        """The next DATA frame of a call."""
        body, draw = call.plan.body, self.draw
        room = min(len(body) - call.sent, call.window, self.window, 16_384)
        for most in (call.plan.cancel_after, call.plan.withheld_after):
            if most is not None:
                room = min(room, most - call.sent)
        size = room
        if call.plan.ping_pong:
            size = min(room, PREFIX + int.from_bytes(body[call.sent + 1 : call.sent + PREFIX], "big"))
        elif not hurry and room > 0 and draw.random() < 0.5:
            size = draw.randrange(room + 1)
        pad = draw.choice((None, None, None, 0, 7))
        if pad is not None and size + pad + 1 > min(call.window, self.window, 16_384):
            pad = None
        payload = body[call.sent : call.sent + size]
        call.sent += size
        last = call.sent == len(body) and call.plan.cancel_after is None
        end = last and not call.plan.trailers and draw.random() < 0.7
        spent = size + (0 if pad is None else pad + 1)
        self.window -= spent
        call.window -= spent
        if payload or end or draw.random() < 0.1:
            self._send(wire.data(call.stream, payload, end_stream=end, pad=pad))
        else:
            self.window += spent
            call.window += spent
            end = last and not call.plan.trailers
            if end:
                self._send(wire.data(call.stream, end_stream=True))
        if last and call.plan.trailers:
            self._send(wire.headers(call.stream, wire.block([(b"t", b"1")]), end_stream=True))
            end = True
        call.half_closed = end
        self._cancel_when_due(call)

    def _cancel_when_due(self, call: Call) -> None:
        if call.plan.cancel_after == call.sent and not call.cancelled:
            call.cancelled = True
            self._send(wire.rst_stream(call.stream))

    def _grant(self, call: Call, *, hurry: bool) -> None:
        """WINDOW_UPDATE of a stream."""
        increment = GENEROUS if hurry else self.draw.choice((1, 7, 100, 3000, 100_000))
        if call.granted + increment < 2**30 and not (hurry and call.granted >= GENEROUS):
            call.granted += increment
            self._send(wire.window_update(call.stream, increment))

    def _grant_connection(self, *, hurry: bool) -> None:
        increment = 10 * GENEROUS if hurry else self.draw.choice((1, 100, 3000, 100_000))
        if self.granted + increment < 2**30 and not (hurry and self.granted >= 10 * GENEROUS):
            self.granted += increment
            self._send(wire.window_update(0, increment))

    # -- receiving ----------------------------------------------------------------------------------------------------

    def data_received(self, octets: bytes) -> None:
        """Process octets of the server. Fails on everything that the server may not send."""
        if not self.introduced:
            self._introduce()
        for got in self.replies.feed(octets):
            match got.kind:
                case wire.SETTINGS if not got.flags & wire.ACK:
                    wanted = self.replies.settings.get(wire.INITIAL_WINDOW_SIZE, 65_535)
                    for call in self.calls.values():
                        call.window += wanted - self.server_window
                    self.server_window = wanted
                    self._send(wire.SETTINGS_ACK)
                case wire.WINDOW_UPDATE:
                    if not got.stream:
                        self.window += got.words[0]
                        assert self.window <= self.limits.connection_window, "more window than the connection's limit"
                    elif got.stream in self.calls:
                        call = self.calls[got.stream]
                        call.window += got.words[0]
                        assert call.window <= self.limits.initial_window, "more window than a stream's limit"
                case wire.PING if not got.flags & wire.ACK:
                    self._send(wire.ping(got.payload, ack=True))
                case wire.GOAWAY:
                    last, code = got.words[:2]
                    assert code == 0, f"GOAWAY with code {code}: {got.payload[8:]!r}"
                    self.last_id = min(self.last_id, last)
                case _:
                    assert not got.stream or got.stream in self.calls, "a frame of a stream that was never opened"
        for call in self.calls.values():
            result = self.result(call)
            if call.over_at is None and (result.ended or result.reset is not None):
                call.over_at = self.clock()
        assert self.replies.pongs == self.pings[: len(self.replies.pongs)], "an answer to another PING"

    # -- judgement ----------------------------------------------------------------------------------------------------

    def judge(self) -> None:
        """Assert that every call has the outcome of its plan."""
        for call in self.calls.values():
            self._judge_call(call)

    def _judge_call(self, call: Call) -> None:
        plan, result = call.plan, self.result(call)
        if call.stream > self.last_id:
            assert result.headers is None, f"call {plan.number}: an answer above the last id of GOAWAY"
            return
        wanted = b"".join(map(wire.grpc_message, plan.answers))
        if plan.http is None:
            assert wanted.startswith(bytes(result.body)), f"call {plan.number}: other octets than its handler sent"
        if call.cancelled or self.broken or (self.cut and call.over_at is None):
            return
        if result.reset == REFUSED_STREAM:
            assert call.refusable, f"call {plan.number}: refused, although few calls were open"
            assert result.headers is None, f"call {plan.number}: refused behind its answer"
            return
        if result.status == TOO_LATE and (plan.withheld_after is None or plan.status == TOO_LATE):
            self._judge_timeout(call)
            return
        seen = (result.http_status, result.status, result.reset, result.ended)
        if plan.http is not None:
            assert seen[:2] == (plan.http, None), f"call {plan.number}: {seen}"
        elif plan.reset is not None:
            assert result.reset == plan.reset, f"call {plan.number}: {seen}"
            assert not result.ended, f"call {plan.number}: {seen}"
        else:
            assert seen[:2] == (200, plan.status), f"call {plan.number}: {seen}"
            assert result.ended, f"call {plan.number}: {seen}"
            assert bytes(result.body) == wanted, f"call {plan.number}: {len(result.body)} of {len(wanted)} octets"
            assert result.reset in ((None,) if call.half_closed and plan.handled and plan.reads_all else (None, 0)), (
                f"call {plan.number}: reset with {result.reset} behind its status"
            )

    def _judge_timeout(self, call: Call) -> None:
        """Judge a call that ended because its request was incomplete after its time: the time must be over, and the
        method must be unary."""
        plan, limits = call.plan, self.limits
        assert not plan.handled, f"call {plan.number}: its handler has no time limit"
        assert call.over_at is not None
        allowed = call.begun_at + limits.body_timeout
        if self.drained_at is not None:
            allowed = min(allowed, max(call.begun_at, self.drained_at) + limits.drain_body_timeout)
        assert call.over_at >= allowed - ROUNDING, f"call {plan.number}: ended {allowed - call.over_at:.4f} s too early"
