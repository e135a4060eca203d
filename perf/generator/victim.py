"""The process of a victim: ``python -m perf.generator.victim`` with a `VictimJob` in the first line of its input.

It makes honest calls while others attack the server: steady calls on an open connection, and calls on new connections,
each of which counts from the beginning of ``connect(2)`` to the last octet of the answer. Both are made on a schedule.
Without TLS an answer ends when the kernel has received it, so that delays of this process do not count.

Each line ``measure NAME`` begins a phase; the end of the input ends the last phase. It prints ``{"ready": true}`` once
it is connected, and at the end ``{"result": {NAME: {"steady": …, "connect": …}}}``.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from select import select
from struct import Struct
from time import monotonic, sleep, time
from typing import Any

from tests.support import wire

from perf.generator.answers import Answer, Call, Expected, HeaderBlocks, WrongAnswer
from perf.generator.connection import LoadConnection, connect
from perf.generator.histogram import counted, encode, latency

HEALTH_CHECK = b"/grpc.health.v1.Health/Check"
_SERVING, _NOT_SERVING = b"\x08\x01", b"\x08\x02"
_AT_ONCE = 192
"""New connections that may wait at the same time."""
_SO_TIMESTAMPNS = 35
_TIMESPEC = Struct("qq")
_RECEIVE = 1 << 16
_MOST_REASONS = 5


@dataclass(frozen=True, slots=True)
class VictimJob:
    """The job of the victim. Times in seconds, rates per second."""

    port: int
    key: str
    name: str
    """A definition that is served."""
    content: str
    """Its serialized ``CommandResponse``, in hexadecimal digits."""
    tls: bool = False
    source: str = "127.0.0.2"
    """The victim's address, which differs from those of the attackers."""
    steady: float = 200.0
    """Rate of the calls on the open connection."""
    connects: float = 40.0
    """Rate of new connections. Every second one is a probe: health/Check without a key."""
    patience: float = 5.0
    """The time after which a call has failed. Its latency counts as this time."""

    def to_json(self) -> str:
        """The job as one line."""
        return json.dumps(asdict(self))

    def call(self) -> Call:
        """GetCommand, and the expected answer."""
        return Call(wire.command_request(self.name.encode()), Expected(0, bytes.fromhex(self.content)))

    def fields(self, path: bytes) -> list[wire.Field]:
        """The header fields of a call."""
        scheme = b"https" if self.tls else b"http"
        return wire.call_fields(b"127.0.0.1:%d" % self.port, path, self.key.encode(), scheme=scheme)


@dataclass
class Phase:
    """The latencies, in seconds, and the failures of one phase."""

    steady: list[float] = field(default_factory=list)
    connect: list[float] = field(default_factory=list)
    failed: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)

    def fail(self, kind: str, error: Exception) -> None:
        """Count a failed call."""
        self.failed[kind] += 1
        if len(self.reasons) < _MOST_REASONS:
            self.reasons.append(f"{kind}: {type(error).__name__}: {error}"[:200])

    def result(self) -> dict[str, Any]:
        """Percentiles in milliseconds, histograms, numbers of calls and failures, the first reasons of failures."""
        found: dict[str, Any] = {"reasons": self.reasons}
        for kind, seconds in (("steady", self.steady), ("connect", self.connect)):
            histogram = counted(seconds)
            found[kind] = latency(histogram) | {
                "calls": len(seconds), "failed": self.failed[kind], "histogram": encode(histogram),
            }  # fmt: skip
        return found


class Victim:
    """Two schedules, each in a thread. Calls that begin at the present time belong to `phase`."""

    def __init__(self, job: VictimJob) -> None:
        self.job = job
        self.phase = Phase()
        self._call = job.call()
        self._blocks = wire.BlockCycle(job.fields(wire.GET_COMMAND))
        self._opened = self._open()
        message = wire.message(b"")
        get = wire.literal_block(job.fields(wire.GET_COMMAND))
        probe = wire.literal_block([each for each in job.fields(HEALTH_CHECK) if each[0] != b"x-avap-auth"])
        self._newcomers = (
            (_whole_call(get, self._call.request), self._call.expected),
            (_whole_call(probe, message), Expected(0, _SERVING)),
        )
        self._ended = threading.Event()
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._threads = [threading.Thread(target=work) for work in (self._steady, self._connects)]

    def start(self) -> None:
        """Begin both schedules."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End both schedules, and wait for the answers that are due."""
        self._ended.set()
        for thread in self._threads:
            thread.join()
        self._pool.shutdown()
        self._opened.sock.close()

    def _open(self) -> LoadConnection:
        made = LoadConnection(self.job.port, self._blocks, (), tls=self.job.tls, stamped=True)
        try:
            made.prove(self._call, self.job.patience)
        except BaseException:
            made.sock.close()
            raise
        return made

    def _steady(self) -> None:
        due = monotonic()
        while not self._ended.is_set():
            due = _wait(due, 1 / self.job.steady)
            phase, began = self.phase, monotonic()
            try:
                ended = self._one_call()
                phase.steady.append(ended - began)
            except (WrongAnswer, OSError) as error:
                phase.fail("steady", error)
                phase.steady.append(max(monotonic() - began, self.job.patience))
                self._open_again()

    def _one_call(self) -> float:
        connection = self._opened
        connection.send([(self._call, 0.0)])
        deadline = monotonic() + self.job.patience
        while True:
            for _, began in connection.receive():
                now = connection.arrived or monotonic()
                return max(now, began)
            connection.flush()
            if monotonic() > deadline:
                raise WrongAnswer("no answer in time")
            # Over TLS, a read leaves no octets in OpenSSL's buffer.
            select((connection,), (connection,) if connection.unsent else (), (), self.job.patience)

    def _open_again(self) -> None:
        self._opened.sock.close()
        while not self._ended.is_set():
            try:
                self._opened = self._open()
                return
            except (WrongAnswer, OSError):
                sleep(0.05)  # until the next attempt

    def _connects(self) -> None:
        due, number = monotonic(), 0
        while not self._ended.is_set():
            due = _wait(due, 1 / self.job.connects)
            self._pool.submit(self._connect_and_call, self.phase, *self._newcomers[number % 2])
            number += 1

    def _connect_and_call(self, phase: Phase, octets: bytes, expected: Expected) -> None:
        began = monotonic()
        try:
            ended = self._newcomer(octets, expected)
        except (WrongAnswer, OSError) as error:
            phase.fail("connect", error)
            ended = max(monotonic(), began + self.job.patience)
        phase.connect.append(ended - began)

    def _newcomer(self, octets: bytes, expected: Expected) -> float:
        """Connect and make one call. Returns the instant at which the answer was complete."""
        job, answer, blocks = self.job, Answer(0), HeaderBlocks()
        with connect(job.port, source=job.source, seconds=job.patience, tls=job.tls) as sock:
            if not job.tls:
                sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
            sock.sendall(octets)
            buffer = b""
            while True:
                data, arrived = _receive(sock, job.tls)
                if not data:
                    raise WrongAnswer("the server closed a new connection")
                buffer += data
                while len(buffer) >= wire.HEAD:
                    after = wire.HEAD + int.from_bytes(buffer[:3], "big")
                    if len(buffer) < after:
                        break
                    kind, flags, stream = buffer[3], buffer[4], int.from_bytes(buffer[5:9], "big")
                    if kind == wire.GOAWAY:
                        raise WrongAnswer(f"GOAWAY: {buffer[wire.HEAD : after][:80]!r}")
                    of_the_call = stream == 1 and kind != wire.WINDOW_UPDATE
                    if of_the_call and answer.add(kind, flags, buffer[wire.HEAD : after], blocks):
                        _judge(answer, expected)
                        return arrived
                    buffer = buffer[after:]


def _judge(answer: Answer, expected: Expected) -> None:
    """Judge an answer on a new connection. For a probe, NOT_SERVING is also a right answer: the server drains."""
    try:
        answer.judge(expected)
    except WrongAnswer:
        if expected.content != _SERVING:
            raise
        answer.judge(Expected(0, _NOT_SERVING))


def _whole_call(block: bytes, message: bytes) -> bytes:
    """The first octets of a client that makes one call."""
    asked = wire.frame(wire.HEADERS, wire.END_HEADERS, 1, block)
    return wire.opening() + asked + wire.frame(wire.DATA, wire.END_STREAM, 1, message)


def _receive(sock: socket.socket, tls: bool) -> tuple[bytes, float]:
    """The octets that have arrived, and the instant at which they arrived."""
    if tls:
        return sock.recv(_RECEIVE), monotonic()
    data, ancillary, _, _ = sock.recvmsg(_RECEIVE, socket.CMSG_SPACE(_TIMESPEC.size))
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
            seconds, nanoseconds = _TIMESPEC.unpack(value)
            return data, seconds + nanoseconds / 1e9 - time() + monotonic()
    return data, monotonic()


def _wait(due: float, interval: float) -> float:
    """Wait until ``due``. Returns the next scheduled instant; instants that have passed already are skipped."""
    now = monotonic()
    if due > now:
        sleep(due - now)
    return max(due, now - interval) + interval


def main() -> int:
    """Do the job. Returns 1 if the server does not answer at the beginning."""
    job = VictimJob(**json.loads(sys.stdin.readline()))
    try:
        victim = Victim(job)
    except (WrongAnswer, OSError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return 1
    phases: dict[str, Phase] = {}
    victim.start()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        phases[line.split()[1]] = victim.phase = Phase()
        print(json.dumps({"measuring": line.split()[1]}), flush=True)
    victim.stop()
    print(json.dumps({"result": {name: phase.result() for name, phase in phases.items()}}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
