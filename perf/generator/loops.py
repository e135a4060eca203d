"""The two ways of asking: a closed loop and a schedule. Both check every answer.

**Closed**: ``connections`` × ``streams`` calls are always under way; latency counts from the instant of sending.
**Open**: Poisson arrivals on a schedule, drawn beforehand, that does not care how the server is doing; latency counts
from the scheduled instant, so whoever has to wait behind a slow call counts in full. Calls that were due before the
measurement began are answered and not counted; those due in it count however late their answers are.
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
"""A call that is sent later than that after its instant was sent late."""
_MB = 1e6
_FLUSH_SECONDS = 0.001
_SPIN_SECONDS = 1e-5
"""A turn of the loop with nothing to do takes less; in one that takes longer, another process had the CPU."""


class Beside(Protocol):
    """What goes on beside the load, in the same loop."""

    def step(self) -> None:
        """A little of it."""

    def close(self) -> dict[str, Any]:
        """End it; returns the figures."""


@dataclass
class Span:
    """What happened between two instants: answers, and the CPU time that they took on both sides."""

    job: Job
    began: float = 0.0
    answered: float = 0
    before: dict[str, float] = field(default_factory=dict)
    client: float = 0.0

    def start(self, answered: float) -> None:
        """Begin to count."""
        self.answered = answered
        self.before = self._server()
        self.client, self.began = process_time(), monotonic()

    def result(self, answered: float, *, spinning: float = 0.0) -> dict[str, Any]:
        """End, and return the figures. ``spinning``: seconds that the client only waited for the clock."""
        seconds = monotonic() - self.began
        client = max(0.0, process_time() - self.client - spinning)
        told: dict[str, Any] = {
            "answered": answered - self.answered, "seconds": seconds, "client_cpu_seconds": client,
            "spinning_seconds": spinning,
        }  # fmt: skip
        if self.job.member == 0 and self.job.pids:
            after = self._server()
            told |= {name: value - self.before[name] for name, value in after.items()}
            told["resident_mb"] = sum(map(resident, self.job.pids)) / _MB
            told["peak_resident_mb"] = sum(map(peak_resident, self.job.pids)) / _MB
        return told

    def _server(self) -> dict[str, float]:
        """The server's CPU time so far; only the process that leads looks."""
        if self.job.member or not self.job.pids:
            return {}
        return {
            "server_cpu_seconds": precise_cpu_seconds(self.job.pids),
            "server_user_seconds": user_seconds(self.job.pids),
            "server_softirq_seconds": softirq_seconds(self.job.server_cpus),
        }


class Load:
    """The connections of one job and what they have seen. Close it."""

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
        """Calls that are due earlier are not in `latencies`."""
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
        """Read what has come, note it, and give each connection's finished calls to ``more``; ``between`` two
        connections something else may be due. Whether anything had come.

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
            # What a socket did not take at once; rarely looked at, because answers make room as well.
            for connection in self.connections:
                if connection.unsent:
                    connection.flush()
        return bool(events)

    @property
    def unanswered(self) -> int:
        """Calls under way, and calls that the server's limits have not let out yet."""
        return sum(len(each.inflight) + len(each.waiting) for each in self.connections)

    def drain(self) -> None:
        """Wait for what is still under way.

        Raises:
            WrongAnswer: where it does not come.
        """
        deadline = monotonic() + self.job.patience
        while missing := self.unanswered:
            self.turn(_FLUSH_SECONDS)
            if monotonic() > deadline:
                raise WrongAnswer(f"{missing} calls were not answered within {self.job.patience:g} s")

    @property
    def seen(self) -> dict[str, Any]:
        """Latencies, and how many answers were judged frame by frame."""
        apart = sum(each.taken_apart for each in self.connections)
        return {"histogram": encode(counted(self.latencies)), "taken_apart": apart}

    def close(self) -> None:
        """Close every connection."""
        for connection in self.connections:
            connection.sock.close()
        self._poll.close()


def closed(load: Load, beside: Sequence[Beside], start: float, say: Callable[[], None]) -> dict[str, Any]:
    """As many calls under way as there are streams, always; the measurement is a part of it.

    Raises:
        WrongAnswer: for an answer that is wrong or does not come.
    """
    calls, count = load.calls, len(load.calls)
    # Processes and connections each begin elsewhere: they would ask for the same names at the same time.
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
                raise WrongAnswer(f"no answer for {load.job.patience:g} s, {load.unanswered} calls under way")
            for each in beside:
                each.step()
        if end == load.measured_from:
            span.start(load.answered)
            say()
    result = span.result(load.answered)
    load.drain()
    return result | load.seen


def open_loop(load: Load, beside: Sequence[Beside], start: float, say: Callable[[], None]) -> dict[str, Any]:
    """Calls when they are due. The loop never sleeps: epoll counts in ms.

    Raises:
        WrongAnswer: for an answer that is wrong or does not come.
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
            say()
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
    """Hands out what is due, to all connections in turn: what is due at the same time goes out in one write each."""

    def __init__(self, load: Load, dues: array[float], start: float) -> None:
        self._connections, self._calls = load.connections, load.calls
        self._dues, self._start = dues, start
        self._turn = 0
        self.sent = self.late = 0

    def send(self, now: float) -> int:
        """Send what is due at ``now``, in seconds after the start; how many calls that were."""
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
