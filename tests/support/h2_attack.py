"""An attacker of one `Connection`, and a victim on another. The attacker keeps nothing, so all memory growth belongs to
the engine."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Iterable

from tests.support.h2_peer import Peer, some_router
from tests.support.h2_wire import GOAWAY, HELLO, SETTINGS_ACK, call, split_frames

from grpc_h2 import CallCancelled, CallStarted, Connection, ConnectionClosing, Event, Limits, MessageReceived, Router


class Attacker:
    """An attacker that sends as fast as the connection reads. All octets arrive at the same instant, so no bucket
    leaks."""

    def __init__(
        self, router: Router | None = None, limits: Limits | None = None, *, slow_handlers: bool = False
    ) -> None:
        self.connection = Connection(router or some_router(), limits or Limits(), 0.0)
        self.slow_handlers = slow_handlers
        self.started = 0
        self.most_started_in_a_turn = 0
        self.most_running = 0
        self.received = 0
        self.octets_out = 0
        self.code: int | None = None
        self.reason = ""
        self.messages: list[bytes] = []
        self._tail = b""
        self.goaway = False
        self.flood([HELLO + SETTINGS_ACK])

    def flood(self, pieces: Iterable[bytes], *, read: bool = True, keep: bool = False) -> Attacker:
        """Send `pieces` until the connection ends; if `read` is false, until it defers work."""
        connection = self.connection
        for piece in pieces:
            if connection.terminated:
                break
            if not read and connection.backlog:
                break
            self._events(connection.receive_data(piece, 0.0), keep=keep)
            if read:
                self.drain()
            while connection.backlog and read:
                self._events(connection.receive_data(b"", 0.0), keep=keep)
                self.drain()
        connection.check_invariants()
        return self

    def drain(self) -> int:
        """Take all queued output. Returns the number of its octets."""
        taken = 0
        while pieces := self.connection.data_to_send():
            octets = b"".join(pieces)
            taken += len(octets)
            frames, self._tail = split_frames(self._tail + octets)
            self.goaway = self.goaway or any(got.kind == GOAWAY for got in frames)
        self.octets_out += taken
        return taken

    def _events(self, events: list[Event], *, keep: bool) -> None:
        started = 0
        for event in events:
            if isinstance(event, CallStarted):
                started += 1
            elif isinstance(event, CallCancelled):
                if not self.slow_handlers:
                    self.connection.finished(event.stream)
            elif isinstance(event, MessageReceived):
                self.received += 1
                if keep:
                    self.messages.append(event.message)
            elif isinstance(event, ConnectionClosing):
                self.code, self.reason = event.code, event.reason
        self.started += started
        self.most_started_in_a_turn = max(self.most_started_in_a_turn, started)
        self.most_running = max(self.most_running, self.connection.open_calls)


def peak_memory(action: Callable[[], object]) -> int:
    """The growth of Python's allocated memory, in octets, at the worst moment of `action`."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        kept = action()
        peak = tracemalloc.get_traced_memory()[1]
        del kept
        return peak - before
    finally:
        tracemalloc.stop()


def cpu(action: Callable[[], object]) -> float:
    """The CPU seconds that `action` takes."""
    begin = time.process_time()
    action()
    return time.process_time() - begin


def pieces_of(octets: bytes, size: int = 65536) -> list[bytes]:
    return [octets[at : at + size] for at in range(0, len(octets), size)]


class Beside:
    """A victim and an attacker with the same router. At the end, the victim's connection must answer as before."""

    def __init__(self, limits: Limits | None = None, *, slow_handlers: bool = False) -> None:
        self.router = some_router()
        self.victim = Peer(router=self.router)
        self.victim.send(call(1)).assert_answered(1)
        self.attacker = Attacker(self.router, limits, slow_handlers=slow_handlers)

    def __enter__(self) -> Attacker:
        return self.attacker

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            for stream in range(3, 41, 2):
                self.victim.send(call(stream)).assert_answered(stream)
            self.victim.assert_alive()
