"""The two kinds of load: a closed loop and an open loop. Both check every answer.

**Closed**: ``connections`` × ``streams`` calls are always in flight; latency counts from the instant of sending.
**Open**: Poisson arrivals on a schedule that is drawn beforehand and does not depend on the server; latency counts from
the scheduled instant, so the time that a call waits behind a slow call is included in full. Calls that are due before
the measurement begins are answered but not counted. Calls that are due during the measurement are counted, even if
their answers are late.
"""

from __future__ import annotations

import random
import select
from array import array
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic, process_time
from typing import Any, Protocol

from tests.support import wire

from definition_server.catalog.snapshot import Snapshot
from perf.generator.answers import WrongAnswer
from perf.generator.connection import Due, LoadConnection
from perf.generator.histogram import counted, encode
from perf.generator.job import Job
from perf.targets.processes import peak_resident, precise_cpu_seconds, resident, softirq_seconds, user_seconds

LATE_SECONDS = 0.001
"""A call that is sent more than so many seconds after its scheduled instant counts as late."""
_MB = 1e6
_FLUSH_SECONDS = 0.001
_SPIN_SECONDS = 1e-5
"""An iteration of the loop without work takes fewer seconds than this; during a longer iteration, another process had
the CPU."""


class Beside(Protocol):
    """Work in addition to the load, in the same loop."""

    def step(self) -> None:
        """Do a small piece of the work."""

    def close(self) -> dict[str, Any]:
        """End the work. Returns its figures."""


@dataclass
class Span:
    """A measured period: its answers, and the CPU time of client and server."""

    job: Job
    began: float = 0.0
    answered: float = 0
    before: dict[str, float] = field(default_factory=dict)
    client: float = 0.0

    def start(self, answered: float) -> None:
        """Begin the period."""
        self.answered = answered
        self.before = self._server()
        self.client, self.began = process_time(), monotonic()

    def result(self, answered: float, *, spinning: float = 0.0) -> dict[str, Any]:
        """End the period and return its figures. ``spinning``: seconds that the client only waited for the clock."""
        seconds = monotonic() - self.began
        client = max(0.0, process_time() - self.client - spinning)
        figures: dict[str, Any] = {
            "answered": answered - self.answered, "seconds": seconds, "client_cpu_seconds": client,
            "spinning_seconds": spinning,
        }  # fmt: skip
        if self.job.member == 0 and self.job.pids:
            after = self._server()
            figures |= {name: value - self.before[name] for name, value in after.items()}
            figures["resident_mb"] = sum(map(resident, self.job.pids)) / _MB
            figures["peak_resident_mb"] = sum(map(peak_resident, self.job.pids)) / _MB
        return figures

    def _server(self) -> dict[str, float]:
        """The server's CPU time so far; only process 0 reads it."""
        if self.job.member or not self.job.pids:
            return {}
        return {
            "server_cpu_seconds": precise_cpu_seconds(self.job.pids),
            "server_user_seconds": user_seconds(self.job.pids),
            "server_softirq_seconds": softirq_seconds(self.job.server_cpus),
        }


class Load:
    """The connections of one job and the latencies of their calls. The caller closes it."""

    def __init__(self, job: Job, snapshot: Snapshot) -> None:
        self.job = job
        self.calls = job.calls(snapshot)
        blocks = job.blocks()
        deadlines = wire.deadlines(job.deadlines, seed=1 + job.member) if job.deadlines else []
        blocks.check(deadlines[:64])
        self.connections: list[LoadConnection] = []
        self._by_descriptor: dict[int, LoadConnection] = {}
        self._poll = select.epoll()
        self.answered = 0
        self.measured_from = 0.0
        """Calls that are due before this instant are not in `latencies`."""
        self.latencies = array("d")
        try:
            for number in range(job.connections):
                self._connect(number, blocks, deadlines)
        except BaseException:
            self.close()
            raise

    def _connect(self, number: int, blocks: wire.BlockCycle, deadlines: Sequence[bytes]) -> None:
        start = len(deadlines) * number // self.job.connections
        job = self.job
        made = LoadConnection(
            job.port, blocks, deadlines, acknowledge=job.acknowledge, tls=job.tls, start=start, stamped=job.stamped
        )
        self.connections.append(made)
        made.prove(self.calls[number % len(self.calls)], self.job.patience)
        self._by_descriptor[made.fileno()] = made
        self._poll.register(made.fileno(), select.EPOLLIN)

    def turn(
        self,
        timeout: float,
        more: Callable[[LoadConnection, list[Due]], None] | None = None,
        between: Callable[[], None] | None = None,
    ) -> bool:
        """Read the octets that have arrived, note the latencies, and pass each connection's finished calls to ``more``.

        ``between`` is called between two connections, because calls may be due there. Returns whether any octets
        arrived.

        Raises:
            WrongAnswer: for an answer that is not the expected one.
        """
        events = self._poll.poll(timeout)
        for descriptor, _ in events:
            connection = self._by_descriptor[descriptor]
            done = connection.receive()
            if connection.unsent:
                connection.flush()
            if done:
                now, first = connection.arrived or monotonic(), self.measured_from
                self.answered += len(done)
                self.latencies.extend([now - due for _, due in done if due >= first])
                if more is not None:
                    more(connection, done)
            if between is not None:
                between()
        if not events:
            # Send octets that a socket did not accept at once. This is rarely checked, because answers also trigger
            # sending.
            for connection in self.connections:
                if connection.unsent:
                    connection.flush()
        return bool(events)

    @property
    def unanswered(self) -> int:
        """Calls in flight, and calls that the server's limits still hold back."""
        return sum(len(each.inflight) + len(each.waiting) for each in self.connections)

    def drain(self) -> None:
        """Wait for the answers of all calls in flight.

        As long as the server answers, this function waits, however many calls are unanswered. There may be more calls
        than the machine can handle because the generator was late; this is judged afterwards.

        Raises:
            WrongAnswer: if no answer arrives for the job's patience.
        """
        answered, silent_since = self.answered, monotonic()
        while missing := self.unanswered:
            self.turn(_FLUSH_SECONDS)
            if self.answered > answered:
                answered, silent_since = self.answered, monotonic()
            elif monotonic() - silent_since > self.job.patience:
                raise WrongAnswer(f"no answer for {self.job.patience:g} s, {missing} calls in flight")

    @property
    def seen(self) -> dict[str, Any]:
        """The histogram of latencies, and the number of answers that were judged frame by frame."""
        apart = sum(each.taken_apart for each in self.connections)
        return {"histogram": encode(counted(self.latencies)), "taken_apart": apart}

    def close(self) -> None:
        """Close every connection."""
        for connection in self.connections:
            connection.sock.close()
        self._poll.close()


def closed(load: Load, beside: Sequence[Beside], start: float, measuring: Callable[[], None]) -> dict[str, Any]:
    """Keep one call in flight on every stream; the measurement covers a part of that time.

    Raises:
        WrongAnswer: for an answer that is wrong or does not arrive.
    """
    calls, count = load.calls, len(load.calls)
    # Each process and connection begins at a different call; otherwise all would request the same names at the same
    # time.
    at = count * load.job.member // 7

    def more(connection: LoadConnection, done: list[Due]) -> None:
        nonlocal at
        now = monotonic()
        if count == 1:
            connection.send([(calls[0], now)] * len(done))
        else:
            connection.send([(calls[(at + step) % count], now) for step in range(len(done))])
            at += len(done)

    _wait_until(start)
    for connection in load.connections:
        more(connection, [(calls[0], 0.0)] * load.job.streams)
    span = Span(load.job)
    load.measured_from = start + load.job.warmup
    for end in (load.measured_from, load.measured_from + load.job.seconds):
        silent_since = monotonic()
        while (now := monotonic()) < end:
            if load.turn(0.05, more):
                silent_since = now
            elif now - silent_since > load.job.patience:
                raise WrongAnswer(f"no answer for {load.job.patience:g} s, {load.unanswered} calls in flight")
            for each in beside:
                each.step()
        if end == load.measured_from:
            span.start(load.answered)
            measuring()
    result = span.result(load.answered)
    load.drain()
    return result | load.seen


def open_loop(load: Load, beside: Sequence[Beside], start: float, measuring: Callable[[], None]) -> dict[str, Any]:
    """Make calls when they are due. The loop never sleeps, because the timeouts of epoll are whole milliseconds.

    Raises:
        WrongAnswer: for an answer that is wrong or does not arrive.
    """
    job = load.job
    dues = _schedule(job)
    schedule = _Schedule(load, dues, start)
    span = Span(job)
    spinning, last, behind = 0.0, start, 0
    load.measured_from = start + job.warmup

    def between() -> None:
        schedule.send(monotonic() - start)

    _wait_until(start)
    for end in (job.warmup, job.warmup + job.seconds):
        while (now := monotonic() - start) < end:
            sent = schedule.send(now)
            read = load.turn(0, between=between)
            for each in beside:
                each.step()
            if not sent and not read:
                spinning += min(_SPIN_SECONDS, monotonic() - start - now)
        if end == job.warmup:
            span.start(load.answered)
            first, schedule.late, spinning, last = bisect_right(dues, now), 0, 0.0, now
            behind = load.unanswered + first - schedule.sent
            measuring()
    result = span.result(load.answered, spinning=spinning)
    due = bisect_right(dues, job.warmup + job.seconds) - first
    unsent = first + due - schedule.sent
    behind = load.unanswered + unsent - behind
    load.drain()
    return result | load.seen | {
        "due": due, "late": schedule.late + max(0, unsent), "grown": behind,
        "offered_rate": due / (job.warmup + job.seconds - last),
    }  # fmt: skip


def _schedule(job: Job) -> array[float]:
    """The instants of all calls, in seconds after the start."""
    chance = random.Random(7 + job.member)
    dues, due, until = array("d"), 0.0, job.warmup + job.seconds
    while (due := due + chance.expovariate(job.rate)) < until:
        dues.append(due)
    return dues


class _Schedule:
    """Distributes the due calls over all connections in turn. Calls of one connection that are due at the same time are
    sent in one write."""

    def __init__(self, load: Load, dues: array[float], start: float) -> None:
        self._connections, self._calls = load.connections, load.calls
        self._dues, self._start = dues, start
        self._turn = 0
        self.sent = self.late = 0

    def send(self, now: float) -> int:
        """Send the calls that are due at ``now``, in seconds after the start. Returns their number."""
        dues, first, start = self._dues, self.sent, self._start
        if first == len(dues) or dues[first] > now:
            return 0
        last = bisect_right(dues, now, first)
        count, calls, connections = last - first, self._calls, self._connections
        among = min(count, len(connections))
        for number in range(among):
            connection = connections[(self._turn + number) % len(connections)]
            connection.send(
                [(calls[place % len(calls)], start + dues[place]) for place in range(first + number, last, among)]
            )
        self._turn += among
        self.sent = last
        self.late += bisect_right(dues, now - LATE_SECONDS, first, last) - first
        return count


def _wait_until(instant: float) -> None:
    while monotonic() < instant:
        pass


LOOPS = {"closed": closed, "open": open_loop}
