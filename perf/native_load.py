"""A load generator in one process: ``python -m perf.native_load``, its job a JSON object in the first line of standard
input, its result the last line of standard output.

It checks every answer, octet for octet, and reads the server's CPU time itself at the instants between which it
counts, so that a figure is about the same calls as its cost. Kinds of job (``kind``):

- ``closed``: ``connections`` × ``streams`` calls are always under way, for ``seconds`` after ``warmup`` seconds.
- ``open``: ``rate`` calls a second, Poisson arrivals on a schedule that does not care how the server is doing; latency
  counts from the scheduled instant. With ``attack`` an attacker works on the same server, from the same loop.
- ``sync``: whole catalogues, one after the other.
- ``idle``: opens ``connections``, says so, and holds them until its standard input closes.

Common: ``port``, ``pids`` (the server's), ``snapshot`` (an inherited descriptor of sealed memory that holds the
catalogue served), ``names`` (asked in turn), ``key``, ``answer`` (200, 404 or 401), ``deadlines`` (how many different
ones, 0: calls without).
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import sys
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import map_sealed
from perf import wire
from perf.answers import Call, Expected, Shapes, WrongAnswer
from perf.attacks import ATTACKS, Attackers
from perf.connection import Due, LoadConnection, connect
from perf.processes import cpu_seconds, peak_resident, resident

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p999": 0.999, "max": 1.0}
NOT_FOUND, UNAUTHENTICATED = 5, 16
_DRAIN_SECONDS = 10.0
_IDLE_PER_ADDRESS = 20_000
"""Connections from one source address; the kernel's range has 28,000 ports (ip_local_port_range)."""


@dataclass
class Job:
    """What to do. The module's docstring tells what the fields are."""

    kind: str
    port: int
    pids: list[int] = field(default_factory=list)
    snapshot: int = -1
    names: list[str] = field(default_factory=list)
    key: str = ""
    answer: int = 200
    deadlines: int = 0
    acknowledge: bool = False
    connections: int = 8
    streams: int = 32
    rate: float = 0.0
    seconds: float = 3.0
    warmup: float = 0.5
    attack: str = ""
    path: str = wire.GET_COMMAND.decode()

    def calls(self, snapshot: Snapshot | None) -> list[Call]:
        """The calls to make in turn."""
        return [Call(wire.command_request(name.encode()), self._expected(name, snapshot)) for name in self.names]

    def _expected(self, name: str, snapshot: Snapshot | None) -> Expected:
        if self.answer == 401:
            return Expected(UNAUTHENTICATED, b"Invalid Credentials")
        if self.answer == 404:
            return Expected(NOT_FOUND, f"Command '{name}' not found".encode())
        answer = snapshot.answer(name.encode()) if snapshot else None
        if answer is None:
            raise ValueError(f"{name} is not in the snapshot")
        return Expected(0, answer)

    def fields(self, path: bytes) -> list[wire.Field]:
        """The header fields of a call."""
        return wire.call_fields(b"127.0.0.1:%d" % self.port, path, self.key.encode(), fresh=self.deadlines > 0)


@dataclass
class Span:
    """What happened between two instants."""

    pids: Sequence[int]
    began: float = 0.0
    answered: int = 0
    server_cpu: float = 0.0
    client_cpu: float = 0.0

    def start(self, answered: int) -> None:
        """Begin to count."""
        self.began, self.answered = monotonic(), answered
        self.server_cpu, self.client_cpu = cpu_seconds(self.pids), cpu_seconds([os.getpid()])

    def result(self, answered: int) -> dict[str, float]:
        """End, and tell."""
        wall, count = monotonic() - self.began, answered - self.answered
        server = cpu_seconds(self.pids) - self.server_cpu
        client = cpu_seconds([os.getpid()]) - self.client_cpu
        return {
            "answered": count, "seconds": wall, "server_cpu_seconds": server, "client_cpu_seconds": client,
            "rate": count / wall, "per_server_cpu_second": count / server if server else 0.0,
            "client_us_per_call": client / count * 1e6 if count else 0.0,
        }  # fmt: skip


class Load:
    """The connections of one job and what they have seen."""

    def __init__(self, job: Job) -> None:
        self.job = job
        snapshot = Snapshot(map_sealed(job.snapshot)) if job.snapshot >= 0 else None
        self.calls = job.calls(snapshot)
        self.shapes = Shapes()
        self.shapes.expect(self.calls)
        blocks = wire.BlockCycle(job.fields(job.path.encode()))
        deadlines = wire.deadlines(job.deadlines) if job.deadlines else []
        blocks.check(deadlines[:64])
        self.poll = select.epoll()
        self.connections: dict[int, LoadConnection] = {}
        for number in range(job.connections):
            made = LoadConnection(job.port, blocks, deadlines, self.shapes, acknowledge=job.acknowledge)
            made.prove(self.calls[number % len(self.calls)])
            self.connections[made.fileno()] = made
            self.poll.register(made.fileno(), select.EPOLLIN)
        self.answered = 0
        self.latencies = array("d")

    def turn(self, timeout: float, more: Callable[[LoadConnection, list[Due]], None]) -> None:
        """Read what has come, note it, and give each connection's finished calls to ``more``."""
        for descriptor, _ in self.poll.poll(timeout):
            connection = self.connections[descriptor]
            done = connection.receive()
            if connection.unsent:
                connection.flush()
            if done:
                now = monotonic()
                self.answered += len(done)
                self.latencies.extend([now - due for _, due in done])
                more(connection, done)

    def drain(self) -> None:
        """Wait for what is still under way.

        Raises:
            WrongAnswer: where it does not come.
        """
        deadline = monotonic() + _DRAIN_SECONDS
        while any(c.inflight or c.waiting for c in self.connections.values()):
            self.turn(0.1, lambda connection, done: None)
            if monotonic() > deadline:
                missing = sum(len(c.inflight) + len(c.waiting) for c in self.connections.values())
                raise WrongAnswer(f"{missing} calls unanswered after {_DRAIN_SECONDS:g} s")

    def close(self) -> None:
        """Close every connection."""
        for connection in self.connections.values():
            connection.sock.close()
        self.poll.close()


def closed(job: Job) -> dict[str, Any]:
    """As many calls under way as there are streams, always."""
    load = Load(job)
    calls, count, at = load.calls, len(load.calls), 0

    def more(connection: LoadConnection, done: list[Due]) -> None:
        nonlocal at
        now = monotonic()
        if count == 1:
            connection.send([(calls[0], now)] * len(done))
        else:
            connection.send([(calls[(at + step) % count], now) for step in range(len(done))])
            at += len(done)

    for connection in load.connections.values():
        more(connection, [(calls[0], 0.0)] * job.streams)
    span = Span(job.pids)
    for seconds in (job.warmup, job.seconds):
        span.start(load.answered)
        del load.latencies[:]
        end = monotonic() + seconds
        while monotonic() < end:
            load.turn(0.1, more)
    result = span.result(load.answered)
    load.drain()
    load.close()
    return result | {"taken_apart": load.shapes.taken_apart, "latency_ms": percentiles(load.latencies)}


def open_loop(job: Job) -> dict[str, Any]:
    """Calls when they are due, whatever the server does meanwhile. The loop never sleeps: epoll counts in ms."""
    load = Load(job)
    chance = random.Random(7)
    connections = list(load.connections.values())
    calls = chance.choices(load.calls, k=min(65_536, max(1024, len(load.calls))))
    attackers = Attackers(ATTACKS[job.attack], job.port, job.key.encode()) if job.attack else None
    lags, span = array("d"), Span(job.pids)
    result: dict[str, Any] = {}
    sent = 0
    for seconds, measured in ((job.warmup, False), (job.seconds, True)):
        load.drain()
        del load.latencies[:], lags[:]
        # Drawn beforehand: what the generator does between two sends should be nothing but reading.
        dues, due = array("d"), 0.0
        while due < seconds:
            dues.append(due)
            due += chance.expovariate(job.rate)
        if measured:
            print("measuring", file=sys.stderr, flush=True)
        span.start(load.answered)
        start, number, total = span.began, 0, len(dues)
        while number < total:
            now = monotonic() - start
            while number < total and dues[number] <= now:
                connections[sent % len(connections)].send([(calls[sent % len(calls)], start + dues[number])])
                lags.append(now - dues[number])
                number += 1
                sent += 1
            load.turn(0, lambda connection, done: None)
            if attackers is not None:
                attackers.step()
        result = span.result(load.answered)
    load.drain()
    if attackers is not None:
        result["attack"] = attackers.close()
    load.close()
    return result | {
        "offered": len(lags) / job.seconds,
        "latency_ms": percentiles(load.latencies),
        "generator_lag_ms": percentiles(lags),
    }


def percentiles(seconds: array[float]) -> dict[str, float]:
    """Percentiles in ms."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    last = len(ordered) - 1
    return {name: round(ordered[min(last, int(share * len(ordered)))] * 1000, 4) for name, share in PERCENTILES.items()}


def sync(job: Job) -> dict[str, Any]:
    """Whole catalogues over one connection, every octet compared, for ``seconds``."""
    expected = Snapshot(map_sealed(job.snapshot)).body
    sock = connect(job.port, seconds=30)
    sock.sendall(wire.opening())
    block = wire.literal_block(job.fields(wire.SYNC_CATALOG))
    span = Span(job.pids)
    span.start(0)
    octets, identifier = 0, 1
    end = monotonic() + job.seconds
    while monotonic() < end:
        request = wire.frame(wire.HEADERS, wire.END_HEADERS, identifier, block)
        sock.sendall(request + wire.frame(wire.DATA, wire.END_STREAM, identifier, wire.message(b"")))
        _read_catalogue(sock, expected)
        octets += len(expected)
        identifier += 2
    result = span.result((identifier - 1) // 2)
    sock.close()
    return result | {"octets": octets, "octets_per_server_cpu_second": octets / (result["server_cpu_seconds"] or 1e9)}


def _read_catalogue(sock: Any, expected: memoryview) -> None:
    """Read frames until a stream has ended; its DATA must be ``expected`` as one message."""
    prefix = wire.message(b"")[:1] + len(expected).to_bytes(4, "big")
    buffer = memoryview(bytearray(1 << 20))
    held, at, uncredited = 0, -len(prefix), 0
    while True:
        received = sock.recv_into(buffer[held:])
        if not received:
            raise WrongAnswer("connection closed within a catalogue")
        end, place = held + received, 0
        while end - place >= wire.HEAD:
            after = place + wire.HEAD + int.from_bytes(buffer[place : place + 3], "big")
            if after > end:
                break
            kind, flags, payload = buffer[place + 3], buffer[place + 4], buffer[place + wire.HEAD : after]
            place = after
            if kind == wire.DATA:
                uncredited += len(payload)
                if at < 0:
                    skipped = min(-at, len(payload))
                    if payload[:skipped] != prefix[at : len(prefix) + at + skipped]:
                        raise WrongAnswer(f"a message prefix {bytes(payload[:5]).hex()}")
                    at, payload = at + skipped, payload[skipped:]
                if bytes(payload) != bytes(expected[max(at, 0) : max(at, 0) + len(payload)]):  # memcmp, not a loop
                    raise WrongAnswer(f"the catalogue differs near octet {at}")
                at += len(payload)
            elif kind in (wire.RST_STREAM, wire.GOAWAY):
                raise WrongAnswer(f"frame of type {kind}: {bytes(payload[:60])!r}")
            elif kind == wire.PING and not flags & wire.ACK:
                sock.sendall(wire.frame(wire.PING, wire.ACK, 0, bytes(payload)))
            elif kind == wire.SETTINGS and not flags & wire.ACK:
                sock.sendall(wire.frame(wire.SETTINGS, wire.ACK, 0))
            if kind in (wire.DATA, wire.HEADERS) and flags & wire.END_STREAM:
                if at != len(expected):
                    raise WrongAnswer(f"the stream ended after {at} of {len(expected)} octets")
                sock.sendall(wire.window_update(0, uncredited))
                return
        held = end - place
        buffer[:held] = bytes(buffer[place:end])


def idle(job: Job) -> dict[str, Any]:
    """Open connections as a client does that then has nothing to say; hold them until standard input closes."""
    before = resident(job.pids[0])
    held = []
    for number in range(job.connections):
        sock = connect(job.port, source=f"127.0.0.{1 + number // _IDLE_PER_ADDRESS}", seconds=30)
        sock.sendall(wire.opening())
        held.append(sock)
    for sock in held:
        octets = b""
        while len(octets) < wire.HEAD or len(octets) < wire.HEAD + int.from_bytes(octets[:3], "big"):
            if not (data := sock.recv(4096)):
                raise WrongAnswer("an idle connection was closed")
            octets += data
        sock.sendall(wire.frame(wire.SETTINGS, wire.ACK, 0))
    print(json.dumps({"held": len(held), "resident_before": before}), flush=True)
    sys.stdin.read()
    alive = 0
    for sock in held:
        sock.setblocking(False)
        try:
            alive += sock.recv(4096) != b""
        except BlockingIOError:
            alive += 1
        sock.close()
    return {"held": len(held), "alive": alive}


KINDS = {"closed": closed, "open": open_loop, "sync": sync, "idle": idle}


def main() -> int:
    """Do the job. 1 where an answer was wrong or missing: then there is no figure, but an ``error``."""
    job = Job(**json.loads(sys.stdin.readline()))
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    gc.disable()  # the generator's own pauses are not the server's
    try:
        result = KINDS[job.kind](job)
    except (WrongAnswer, OSError) as error:
        result = {"error": f"{type(error).__name__}: {error}"}
    if job.pids and "error" not in result:
        result["peak_resident"] = peak_resident(job.pids[0])
    print(json.dumps(result))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
