"""Virtual time, the network, and the invariants that are checked after each event."""

from __future__ import annotations

import heapq
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.simulation.engine.client import REFUSED_STREAM, Call, Client
from tests.simulation.engine.plan import TOO_LATE, ClientPlan, Plan, draw_plan
from tests.simulation.engine.server import SimulatedProtocol

from grpc_h2 import Budget
from grpc_h2.aio import scheduler as scheduler_module
from grpc_h2.aio.scheduler import FairScheduler

LONGEST = 30.0
"""Virtual seconds after which a run that has not ended has stalled."""
HURRY = 2.0
"""Virtual seconds after which clients, handlers and network have no more delays, so that the run comes to its end."""
MOST_EVENTS = 200_000
CHECK_EVERY = 16
"""Events between two checks of a connection's own invariants, which walk all its streams."""
IDLE_STEP = 0.004
"""Virtual seconds until a client that could do nothing tries again."""

NETWORKS = ("random", "whole", "octets")


class Failure(AssertionError):
    """A run in which something was wrong."""

    def __init__(self, seed: int, network: str, what: str) -> None:
        replay = f"python -m tests.simulation.engine --start {seed} --seeds 1 --network {network} --trace"
        super().__init__(f"seed {seed}: {what}\nreplay: {replay}")
        self.seed = seed


class Loop:
    """The part of an event loop that the scheduler and the protocols use, on virtual time."""

    def __init__(self, world: World) -> None:
        self._world = world

    def call_soon(self, callback: Callable[..., object], *arguments: object) -> None:
        """Call in the next iteration: at the same instant, after callbacks that are already due."""
        self._world.later(0.0, lambda: callback(*arguments))

    def time(self) -> float:
        """The virtual instant."""
        return self._world.now


class Link:
    """A client, its connection, and the network between them."""

    def __init__(self, world: World, plan: ClientPlan) -> None:
        self.world = world
        self.protocol = SimulatedProtocol(world, plan)
        self.client = Client(plan, world.plan.limits, world.dice, lambda: world.now, self._at_work)
        self.quiet: tuple[int, float] | None = None
        """The number of calls that the client has begun, and the instant since which no call is open or in transit."""
        self.steps = 0
        self.uplink_busy = False
        self.downlink_busy = False

    @property
    def done(self) -> bool:
        """Whether no octets are in transit in either direction and every handler has finished."""
        return (
            self.client.done
            and (self.protocol.lost or not self.protocol.buffer)
            and all(handler.finished for handler in self.protocol.handlers.values())
        )

    def step(self) -> None:
        """An action of the client, and sometimes a fault."""
        client, protocol, world = self.client, self.protocol, self.world
        if self.done:
            return
        if client.broken:
            world.later(0.001, self.step)
            return
        self.steps += 1
        busy = True
        if self.steps == client.plan.lost_after:
            client.broken = True
            protocol.lose()
        elif self.steps == client.plan.drained_after and client.introduced:
            protocol.drain()
        else:
            busy = client.step(hurry=world.hurry)
        if world.keys_change():
            protocol.router.forget_authorizations()
        if world.plan.timed or not self.steps % 8:
            protocol.tick()
        self._note_quiet()
        self.send()
        self._hang_up()
        world.later(world.client_delay() if busy else IDLE_STEP, self.step)

    def send(self) -> None:
        """Octets for the server are in the outbox: deliver a piece of them later."""
        if self.client.outbox and not self.uplink_busy and self.protocol.reading and not self.client.broken:
            self.uplink_busy = True
            self.world.later(self.world.network_delay(), self._deliver_up)

    def _deliver_up(self) -> None:
        self.uplink_busy = False
        if self.client.broken or not self.protocol.reading:
            return
        size = self.world.chunk(len(self.client.outbox), whole=0.8 if self.client.plan.steady else 0.3)
        piece = bytes(self.client.outbox[:size])
        del self.client.outbox[:size]
        self.protocol.data_received(piece)
        self.send()

    def receive(self) -> None:
        """Octets for the client are in the transport's buffer: deliver a piece of them later."""
        if self.protocol.buffer and not self.downlink_busy:
            self.downlink_busy = True
            self.world.later(self.world.network_delay(), self._deliver_down)

    def _deliver_down(self) -> None:
        self.downlink_busy = False
        if self.client.broken or self.protocol.lost:
            return
        piece = self.protocol.take(self.world.chunk(len(self.protocol.buffer)))
        self.client.data_received(piece)
        self.receive()
        self.send()
        self._hang_up()

    def _hang_up(self) -> None:
        """Once the connection has ended and all its output has arrived, end the client's side of the transport."""
        client, protocol = self.client, self.protocol
        client.drained_at, client.cut = protocol.drained_at, protocol.cut
        if protocol.connection.terminated and not protocol.buffer and not protocol.writing_paused and not protocol.lost:
            client.closed = True

    def _note_quiet(self) -> None:
        """Check how long no call has been open or in transit, and whether the connection has noticed that."""
        client, protocol = self.client, self.protocol
        busy = client.open_calls or client.outbox or protocol.buffer or protocol.running or protocol.connection.backlog
        if busy or protocol.lost:
            self.quiet = None
        elif self.quiet is None or self.quiet[0] != len(client.calls):
            self.quiet = len(client.calls), self.world.now
        else:
            protocol.judge_idleness(self.quiet[1])

    def _at_work(self, call: Call) -> bool:
        """Whether the handler of a call is at work, or may still begin."""
        if not call.plan.handled or self.client.result(call).reset == REFUSED_STREAM:
            return False
        handler = self.protocol.handlers.get(call.stream)
        return handler is None or not handler.finished


class World:
    """One run."""

    def __init__(self, plan: Plan, network: str = "random", trace: Callable[[str], object] | None = None) -> None:
        self.plan = plan
        self.network = network
        self.trace = trace
        self.now = 1000.0
        self.budget = Budget(2**30)
        """A budget that is larger than all connections of a run may hold."""
        self.events = 0
        self.dice = self._draw = random.Random(f"network {network} {plan.seed}")
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._order = 0
        self.loop: Any = Loop(self)
        self.scheduler = FairScheduler()
        self.links = []
        self._links: dict[SimulatedProtocol, Link] = {}
        for client_plan in plan.clients:
            link = Link(self, client_plan)
            self.links.append(link)
            self._links[link.protocol] = link

    # -- time and dice ------------------------------------------------------------------------------------------------

    def later(self, delay: float, action: Callable[[], object]) -> None:
        """Call ``action`` after ``delay`` virtual seconds."""
        self._order += 1
        heapq.heappush(self._queue, (self.now + delay, self._order, action))

    @property
    def hurry(self) -> bool:
        """Whether the run must come to its end now."""
        return self.now - 1000.0 > HURRY

    def clock(self) -> float:
        """The clock that the scheduler reads. Time slices end at random."""
        self._spent = getattr(self, "_spent", 0.0) + self._draw.choice((0.0, 1e-6, 5e-5))
        return self.now + self._spent

    def keys_change(self) -> bool:
        """Whether the server reads its keys again. They are the same, so no answer changes."""
        return self._draw.random() < 0.02

    def client_delay(self) -> float:
        """Seconds between two actions of a client."""
        return self._draw.choice((0.0, 0.0, 0.0001, 0.001, 0.01))

    def handler_delay(self) -> float:
        """Seconds between two steps of a handler."""
        return 0.0 if self.hurry else self._draw.choice((0.0, 0.0, 0.0005, 0.02))

    def network_delay(self) -> float:
        """Seconds that a piece is in transit."""
        return 0.0 if self.hurry else self._draw.choice((0.0, 0.0001, 0.003))

    def chunk(self, waiting: int, *, whole: float = 0.3) -> int:
        """How many of the waiting octets arrive together; ``whole`` is the probability that all of them do."""
        if self.network == "whole" or self.hurry:
            return waiting
        if self.network == "octets":
            return 1
        draw = self._draw
        if draw.random() < whole:
            return waiting
        return min(waiting, draw.choice((1, 5, 9, 10, 17, 64, 300, 1400, 16_393)))

    # -- called by protocols
    # ---------------------------------------------------------------------------------------------

    def output_waits(self, protocol: SimulatedProtocol) -> None:
        """The protocol's buffer holds octets."""
        self._links[protocol].receive()

    def input_wanted(self, protocol: SimulatedProtocol) -> None:
        """The protocol has resumed reading."""
        self.later(0.0, self._links[protocol].send)

    # -- the run ------------------------------------------------------------------------------------------------------

    def run(self) -> World:
        """Run to the end. Raises `Failure`."""
        real = getattr(scheduler_module, "perf_counter", None)
        if real is not None:
            scheduler_module.perf_counter = self.clock
        try:
            self._run()
        except Failure:
            raise
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno} {where.line})"
            raise Failure(self.plan.seed, self.network, what) from error
        finally:
            if real is not None:
                scheduler_module.perf_counter = real
        return self

    def _run(self) -> None:
        for link in self.links:
            link.protocol.settle()
            self.later(self.client_delay(), link.step)
        while self._queue:
            self.now, _, action = heapq.heappop(self._queue)
            self.events += 1
            action()
            if self.trace is not None:
                self.trace(f"{self.now - 1000:9.6f} {getattr(action, '__qualname__', action)} {self._state()}")
            self._check()
            if self.now - 1000.0 > LONGEST or self.events > MOST_EVENTS:
                raise AssertionError(f"stalled: {self._unfinished()}")
        self._judge()
        for link in self.links:
            link.protocol.lose()
        assert self.budget.held == 0, "an ended connection holds something"
        assert not self.budget.evictions

    def _check(self) -> None:
        """Check the invariants after an event."""
        for link in self.links:
            protocol = link.protocol
            assert protocol.connection.open_calls == protocol.running, "a handler is not counted, or counted twice"
            if not self.events % CHECK_EVERY:
                protocol.check_invariants()
            if protocol.connection.terminated:
                assert protocol.lost or protocol.reasons, f"the connection ended: {protocol.closing}"

    def _judge(self) -> None:
        """Check the final state."""
        for link in self.links:
            assert link.done, f"the run is over, but not everything is done: {self._unfinished()}"
            link.client.judge()
            protocol = link.protocol
            protocol.check_invariants()
            assert protocol.connection.open_calls == 0
            for handler in protocol.handlers.values():
                plan = handler.plan
                ended = protocol.lost or protocol.cut
                assert handler.stream.unsent == 0 or ended, f"call {plan.number}: octets are left in its queue"
                if handler.ended and not handler.cancelled and plan.reads_all and plan.status is not None:
                    assert handler.half_closed
            if protocol.lost or link.client.last_id < 2**31 - 1:
                continue
            # All received octets have been given back, except a remainder that is too small for a WINDOW_UPDATE.
            assert 2 * link.client.window >= self.plan.limits.connection_window, (
                f"{self.plan.limits.connection_window - link.client.window} octets of the window were not given back"
            )

    def _state(self) -> str:
        return "; ".join(
            f"out {len(link.client.outbox)} back {len(link.protocol.buffer)} open {link.protocol.connection.open_calls}"
            for link in self.links
        )

    def _unfinished(self) -> str:
        lines = []
        for number, link in enumerate(self.links):
            if link.done:
                continue
            calls = [(call.plan.number, call.sent, len(call.plan.body), call.window) for call in link.client.open_calls]
            handlers = [h.plan.number for h in link.protocol.handlers.values() if not h.finished]
            lines.append(
                f"client {number}: calls (number, sent, octets, window) {calls}, {len(link.client.to_come)} to come, "
                f"window {link.client.window}, handlers {handlers}, outbox {len(link.client.outbox)}, "
                f"buffer {len(link.protocol.buffer)}, reading {link.protocol.reading}"
            )
        return "; ".join(lines)

    def outcomes(self) -> dict[int, object]:
        """Number of a call → its answer, for calls with one right outcome: neither cancelled nor lost."""
        found: dict[int, object] = {}
        if self.plan.timed or self.plan.crowded:
            return found
        for link in self.links:
            if link.client.plan.lost_after is not None or link.client.plan.drained_after is not None:
                continue
            for call in link.client.calls.values():
                result = link.client.result(call)
                if call.plan.cancel_after is None and call.plan.reset is None:
                    found[call.plan.number] = (result.http_status, result.status, bytes(result.body), result.text)
        return found

    def happenings(self) -> set[str]:
        """The events that depend on times and limits."""
        found: set[str] = set()
        for link in self.links:
            found |= link.protocol.reasons
            for call in link.client.calls.values():
                result = link.client.result(call)
                if result.reset == REFUSED_STREAM:
                    found.add("refused")
                elif result.status == TOO_LATE:
                    found.add("too late")
                elif call.plan.withheld_after == 0 and result.ended:
                    found.add("answered by headers")
        return found


def run_seed(seed: int, network: str = "random", trace: Callable[[str], object] | None = None) -> World:
    """Run one seed. Raises `Failure` with the command that replays it."""
    return World(draw_plan(seed), network, trace).run()
