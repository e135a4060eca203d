"""The events of one run, drawn from a seed before anything runs: limits, clients, calls, handlers."""

from __future__ import annotations

import gzip
import random
from dataclasses import dataclass, field, replace
from math import inf

from tests.support.h2_peer import ANSWER, GUARDED, HANDLED, REFUSING, STATIC
from tests.support.h2_wire import grpc_message

from grpc_h2 import Limits

PREFIX = 5
UNREAD_OVERHEAD = 512
"""The most octets of accounting for each unread message: twice the number that the engine adds."""
MAX_MESSAGE = 20_000
FRAME = 16_384

OK, CANCELLED, TOO_LATE, NOT_FOUND, EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAUTHENTICATED = 0, 1, 4, 5, 8, 12, 13, 16

Step = tuple[str, int]
"""An action of a handler: ``read`` a message, ``read to the end``, ``send`` so many octets, ``echo`` each message,
``metadata``, ``pause`` so many microseconds, ``status`` n, ``cancel``, ``hold`` until the call is cancelled."""


@dataclass(frozen=True, slots=True)
class CallPlan:
    """One call and its outcome. ``status`` is None if there is no gRPC status; then ``http`` or ``reset`` is set."""

    number: int
    path: bytes
    messages: tuple[bytes, ...] = ()
    """The client's messages; ``body`` is their form on the wire."""
    body: bytes = b""
    fields: tuple[tuple[bytes, bytes], ...] = ()
    replaced: tuple[tuple[str, bytes], ...] = ()
    answers: tuple[bytes, ...] = ()
    status: int | None = OK
    http: int | None = None
    reset: int | None = None
    handler: tuple[Step, ...] = ()
    linger: int = 0
    """Microseconds that the handler continues to work after its call has ended."""
    cancel_after: int | None = None
    """The client resets the call after so many octets of the body; a call that ends before is not reset."""
    withheld_after: int | None = None
    """The client sends only so many octets of the body, and must be answered without the rest."""
    trailers: bool = False
    """The request ends with trailers instead of END_STREAM on DATA."""
    ping_pong: bool = False
    """The client sends a message only after the previous one has been answered."""
    alone: bool = False
    """The client has no other call open meanwhile."""

    @property
    def handled(self) -> bool:
        return self.path == HANDLED

    @property
    def reads_all(self) -> bool:
        """Whether the handler takes every message and the half-close."""
        return any(name in ("read to the end", "echo") for name, _ in self.handler)


@dataclass(frozen=True, slots=True)
class ClientPlan:
    """One client, one connection."""

    calls: tuple[CallPlan, ...]
    steady: bool
    """Plain calls of static methods, each in one piece, with repeated header blocks: those that use the fast path."""
    together: int
    """Calls that the client has open at once, at the most."""
    settings: tuple[tuple[int, int], ...]
    changes: tuple[tuple[tuple[int, int], ...], ...]
    """SETTINGS frames that the client sends later."""
    impatient: bool
    """Whether the client sends before the server's SETTINGS have arrived."""
    pings: int
    indexing: bool
    """Whether its header blocks use the dynamic table."""
    lost_after: int | None
    """Its transport breaks after so many of its steps."""
    drained_after: int | None
    """The server drains the connection after so many of the client's steps."""
    jitter: float = 0.0
    """The jitter of the connection's age: see `Connection`."""
    rests: tuple[float, ...] = ()
    """Seconds for which the client sometimes has no call open."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A run."""

    seed: int
    limits: Limits
    clients: tuple[ClientPlan, ...]
    high_water: int
    """Octets in a transport's buffer above which it pauses its connection."""
    low_water: int
    fast_path: bool
    timed: bool = False
    """Whether the connection's age, its idleness and the time for a request's body are limited. If they are, the
    outcome of a call depends on when its octets arrive."""
    crowded: bool = False
    """Whether clients exceed the number of streams, so that some are refused."""


def draw_plan(seed: int) -> Plan:
    """The plan of a seed, which is always the same."""
    return _Drawing(seed).plan()


@dataclass
class _Drawing:
    seed: int
    draw: random.Random = field(init=False)
    more: random.Random = field(init=False)
    """A second random generator for later additions to the plan, so that the rest of a seed's plan does not change."""
    number: int = 0

    def __post_init__(self) -> None:
        self.draw = random.Random(f"plan {self.seed}")
        self.more = random.Random(f"times {self.seed}")

    def plan(self) -> Plan:
        draw = self.draw
        clients = tuple(self._client() for _ in range(draw.choice((1, 1, 2, 3))))
        limits = self._limits(clients)
        if draw.random() < 0.3:
            first = clients[0]
            clients = (replace(first, calls=(*first.calls, self._flood(limits))), *clients[1:])
        high = draw.choice((0, 200, 4096, 65536))
        low = min(high, draw.choice((0, 100, 4096)))
        plan = Plan(self.seed, limits, clients, high, low, draw.random() < 0.7)
        if self.more.random() < 0.4:
            plan = self._timed(plan)
        if self.more.random() < 0.25:
            plan = self._crowded(plan)
        return plan

    def _crowded(self, plan: Plan) -> Plan:
        """The plan with few streams, and with handlers that continue to work after their calls have ended."""
        more = self.more
        clients = tuple(
            replace(
                client,
                calls=tuple(
                    replace(call, linger=more.choice((0, 20_000, 50_000))) if call.handled else call
                    for call in client.calls
                ),
            )
            for client in plan.clients
        )
        limits = replace(plan.limits, max_concurrent_streams=more.choice((1, 2, 4)))
        return replace(plan, limits=limits, clients=clients, crowded=True)

    def _timed(self, plan: Plan) -> Plan:
        """The plan with time limits, calls whose bodies never arrive, and clients that pause."""
        more = self.more
        body_timeout = more.choice((0.06, 0.3))
        limits = replace(
            plan.limits,
            body_timeout=body_timeout,
            drain_body_timeout=more.choice((body_timeout, 0.03)),
            max_connection_age=more.choice((inf, 0.03, 0.4)),
            age_grace=more.choice((inf, 0.03)),
            max_connection_idle=more.choice((inf, 0.02, 0.15)),
        )
        clients = tuple(
            replace(
                client,
                calls=tuple(map(self._stalled, client.calls)),
                jitter=more.uniform(-1, 1),
                rests=tuple(more.choice((0.05, 0.3)) for _ in range(more.choice((0, 1, 3)))),
            )
            for client in plan.clients
        )
        return replace(plan, limits=limits, clients=clients, timed=True)

    def _stalled(self, call: CallPlan) -> CallPlan:
        """Replace some calls of static methods by the same calls of a client that never sends the whole body."""
        more = self.more
        if call.path != STATIC or call.status not in (OK, INTERNAL) or call.cancel_after is not None:
            return call
        if more.random() < 0.6:
            return call
        return replace(
            call,
            answers=(),
            status=TOO_LATE,
            withheld_after=more.choice((0, more.randrange(len(call.body)))),
            trailers=False,
        )

    def _limits(self, clients: tuple[ClientPlan, ...]) -> Limits:
        draw = self.draw
        # Honest clients stay below these limits; a leak of a few hundred octets for each message does not.
        unread = max(
            sum(len(message) + UNREAD_OVERHEAD for call in client.calls if not call.alone for message in call.messages)
            for client in clients
        )
        return Limits(
            max_concurrent_streams=draw.choice((100, 256)),
            initial_window=(window := draw.choice((65_535, 65_535, 100_000))),
            connection_window=max(window, draw.choice((66_000, 66_000, 200_000))),
            max_buffered=2 * MAX_MESSAGE,
            max_unread=max(unread, MAX_MESSAGE + UNREAD_OVERHEAD),
            max_message=MAX_MESSAGE,
            glitches=10**9,
            free_window_updates=10**9,
            calls_per_turn=draw.choice((1, 3, 32)),
            answers_per_turn=draw.choice((1, 3, 64)),
            work_per_turn=draw.choice((1, 10, 60)),
            octets_per_turn=draw.choice((1000, 20_000, 262_144)),
            high_water=(high := draw.choice((1, 1000, 65_536))),
            low_water=min(high, draw.choice((0, 500))),
            keepalive_time=draw.choice((7200.0, 7200.0, 0.02)),
            min_ping_interval=0.0,
        )

    def _client(self) -> ClientPlan:
        draw = self.draw
        steady = draw.random() < 0.2
        calls = [self._call(steady=steady) for _ in range(draw.choice((10, 30) if steady else (1, 2, 4, 8, 12)))]
        if draw.random() < 0.3:
            calls.append(self._probe())
        window = draw.choice((0, 1, 20, 1000, 65_535, 65_535, 2**20))
        changes = tuple(self._settings(draw.choice((0, 7, 65_535, 2**20))) for _ in range(draw.choice((0, 0, 1, 3))))
        return ClientPlan(
            calls=tuple(calls),
            steady=steady,
            together=draw.choice((1, 2, 5, 100)),
            settings=self._settings(window),
            changes=changes,
            impatient=draw.random() < 0.5,
            pings=draw.choice((0, 0, 1, 5)),
            indexing=draw.random() < 0.5,
            lost_after=draw.randrange(60) if draw.random() < 0.08 else None,
            drained_after=draw.randrange(60) if draw.random() < 0.12 else None,
        )

    def _settings(self, window: int) -> tuple[tuple[int, int], ...]:
        draw = self.draw
        return tuple(
            pair
            for pair in (
                (4, window),
                (1, draw.choice((0, 100, 4096, 65_536))),
                (5, draw.choice((FRAME, 20_000))),
                (0x99, 1),
            )
            if draw.random() < 0.6
        )

    def _message(self) -> bytes:
        draw = self.draw
        size = draw.choice((0, 1, 5, 30, 30, 300, 3000, 12_000))
        return draw.randbytes(min(size, 64)) * (size // 64) + draw.randbytes(size % 64)

    def _call(self, *, steady: bool = False) -> CallPlan:
        self.number += 1
        if steady and self.draw.random() < 0.9:
            kind = self.draw.choice(("echo", "echo", "ready", "guarded", "missing", "stranger"))
            plan = self._static(kind)
            return self._withheld(plan) if kind in _REFUSED_BY_HEADERS else plan
        kind = self.draw.choice((*("handled",) * 6, *("echo",) * 3, "ready", "ready", *_STATIC))
        plan = self._handled() if kind == "handled" else self._static(kind)
        if self.draw.random() < 0.1:  # a block that is decoded in steps
            many = tuple((b"k%d" % number, b"v" * 12) for number in range(self.draw.choice((20, 60))))
            plan = replace(plan, fields=(*plan.fields, *many))
        if self.draw.random() < 0.15:
            return replace(plan, cancel_after=self.draw.randrange(len(plan.body) + 1))
        return self._withheld(plan) if kind in _REFUSED_BY_HEADERS else plan

    def _withheld(self, plan: CallPlan) -> CallPlan:
        """Replace some calls that the headers alone decide by the same calls of a client that waits for the answer
        before it sends."""
        return replace(plan, withheld_after=0) if self.more.random() < 0.5 else plan

    def _static(self, kind: str) -> CallPlan:
        draw, number, message = self.draw, self.number, self._message()
        body, key = grpc_message(message), (("authorization", b"Bearer wrong"),)
        match kind:
            case "echo":
                return CallPlan(number, STATIC, (message,), body, answers=(message,), trailers=draw.random() < 0.2)
            case "ready":
                return CallPlan(number, STATIC, (b"world",), grpc_message(b"world"), answers=(ANSWER,))
            case "missing":
                return CallPlan(number, REFUSING, (message,), body, status=NOT_FOUND)
            case "guarded":
                return CallPlan(number, GUARDED, (message,), body, answers=(ANSWER,))
            case "stranger":
                return CallPlan(number, GUARDED, (message,), body, replaced=key, status=UNAUTHENTICATED)
            case "no message":
                return CallPlan(number, STATIC, status=UNIMPLEMENTED)
            case "two messages":
                return CallPlan(number, STATIC, (message,) * 2, body * 2, status=UNIMPLEMENTED)
            case "cut":
                return CallPlan(number, STATIC, body=body[: draw.randrange(1, len(body))], status=INTERNAL)
            case "too large":
                return CallPlan(number, STATIC, body=grpc_message(bytes(MAX_MESSAGE + 1)), status=EXHAUSTED)
            case "zipped":
                zipped = grpc_message(gzip.compress(message, mtime=0), 1)
                encoding = ((b"grpc-encoding", b"gzip"),)
                return CallPlan(number, STATIC, (message,), zipped, fields=encoding, answers=(message,))
            case "malformed":
                return CallPlan(number, STATIC, body=body, fields=((b"Upper", b"x"),), status=None, reset=1)
            case _:
                return CallPlan(number, STATIC, body=body, replaced=(("method", b"GET"),), status=None, http=405)

    def _handled(self) -> CallPlan:
        draw = self.draw
        messages = tuple(self._message() for _ in range(draw.choice((0, 1, 1, 2, 5))))
        if draw.random() < 0.05:  # larger than a stream's window
            messages = (bytes(MAX_MESSAGE),) * 6
        zipped = draw.random() < 0.2
        steps: list[Step] = []
        answers: list[bytes] = []
        if draw.random() < 0.2:
            steps.append(("echo", 0))
            answers += messages
        for _ in range(draw.choice((0, 1, 2, 4))):
            step = draw.choice(("read", "send", "send", "pause", "metadata", "read to the end"))
            amount = draw.choice((0, 1, 40, 2000, 30_000)) if step == "send" else draw.choice((10, 1000, 20_000))
            steps.append((step, amount))
            if step == "send":
                answers.append(sent(self.number, len(answers), amount))
        status: int | None = draw.choice((OK, OK, OK, 7, INTERNAL))
        end = draw.choice(("read to the end", "read to the end", "early"))
        if end == "read to the end":
            steps.append(("read to the end", 0))
        reset = None
        if draw.random() < 0.05:
            status, reset = None, 8
            steps.append(("cancel", 0))
        else:
            steps.append(("status", status or 0))
        body = b"".join(
            grpc_message(gzip.compress(message, mtime=0), 1) if zipped and number % 2 else grpc_message(message)
            for number, message in enumerate(messages)
        )
        return CallPlan(
            self.number,
            HANDLED,
            messages,
            body,
            fields=((b"n", b"%d" % self.number), *(((b"grpc-encoding", b"gzip"),) if zipped else ())),
            answers=tuple(answers),
            status=status,
            reset=reset,
            handler=tuple(steps),
            linger=draw.choice((0, 0, 0, 5000)),
            trailers=draw.random() < 0.2,
        )

    def _probe(self) -> CallPlan:
        """Many messages, one at a time, which reveal a small leak for each message."""
        self.number += 1
        messages = tuple(b"%d" % number for number in range(self.draw.choice((20, 60))))
        return CallPlan(
            self.number,
            HANDLED,
            messages,
            b"".join(map(grpc_message, messages)),
            fields=((b"n", b"%d" % self.number),),
            answers=messages,
            handler=(("echo", 0), ("status", OK)),
            ping_pong=True,
            alone=True,
        )

    def _flood(self, limits: Limits) -> CallPlan:
        """More messages that no handler takes than the connection may hold."""
        self.number += 1
        message = bytes(15_000)
        messages = (message,) * (limits.max_unread // len(message) + 2)
        return CallPlan(
            self.number,
            HANDLED,
            messages,
            grpc_message(gzip.compress(message, mtime=0), 1) * len(messages),
            fields=((b"n", b"%d" % self.number), (b"grpc-encoding", b"gzip")),
            status=EXHAUSTED,
            handler=(("hold", 0),),
            alone=True,
        )


_STATIC = (
    "missing", "guarded", "stranger", "no message", "two messages", "cut", "too large", "zipped", "malformed",
    "not gRPC",
)  # fmt: skip


_REFUSED_BY_HEADERS = ("stranger", "not gRPC")
"""Calls that are answered as soon as their headers have arrived."""


def sent(number: int, index: int, size: int) -> bytes:
    """The message that the handler of a call sends as its ``index``-th."""
    mark = b"%d.%d " % (number, index)
    return (mark * (size // len(mark) + 1))[:size]
