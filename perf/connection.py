"""One client connection that costs the client next to nothing: no object per frame, one write per batch of requests."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from time import monotonic

from hpack.hpack import Decoder

from perf import wire
from perf.answers import Answer, Call, Shapes, WrongAnswer

RECEIVE = 1 << 18
_CREDIT = 1 << 29
"""Octets of DATA after which the connection's window is opened again: half of what it was opened to."""

Due = tuple[Call, float]
"""A call, and the instant from which its latency counts."""


def connect(port: int, *, source: str = "127.0.0.1", receive_buffer: int = 0, seconds: float = 5.0) -> socket.socket:
    """A blocking TCP connection to the server on this machine; ``source`` where one address has too few ports.

    Raises:
        OSError: where there is nobody.
    """
    sock = socket.socket()
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(seconds)
        sock.bind((source, 0))
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


class LoadConnection:
    """Sends calls, checks answers, and keeps to the server's limits (its windows, its number of streams).

    `send` any number of calls at any time; `receive` when the socket is readable. With ``acknowledge`` it does what
    grpc-go does after replies: a connection WINDOW_UPDATE and, if none is on its way, a PING.
    """

    def __init__(self, port: int, blocks: wire.BlockCycle, deadlines: Sequence[bytes], shapes: Shapes,
                 *, acknowledge: bool = False) -> None:  # fmt: skip
        self.sock = connect(port)
        self.sock.sendall(wire.opening())
        self.sock.setblocking(False)
        self.inflight: dict[bytes, Due] = {}
        self.waiting: deque[Due] = deque()
        self.unsent = b""
        self._blocks = iter(blocks)
        self._block: tuple[bytes, bytes] | None = None
        self._first = len(blocks.first)
        self._deadlines = deadlines if blocks.fresh else ()
        self._deadline = id(self) % len(deadlines) if blocks.fresh else 0
        self._next = 1
        self._window = wire.INITIAL_WINDOW
        self._most = 100  # the least that a server should allow (RFC 9113 §6.5.2), until its SETTINGS are here
        self._rest = b""
        self._answers: dict[bytes, Answer] = {}
        self._decoder = Decoder()
        self._shapes = shapes
        self._acknowledge = acknowledge
        self._ping_underway = False
        self._uncredited = 0

    def fileno(self) -> int:
        """For epoll."""
        return self.sock.fileno()

    def send(self, calls: Sequence[Due]) -> None:
        """Send what the server's limits allow now; the rest waits for answers."""
        if self.waiting or len(self.inflight) + len(calls) > self._most:
            self.waiting.extend(calls)
            calls = self._allowed()
        out = []
        for due in calls:
            call = due[0]
            if call.octets > self._window:
                self.waiting.append(due)
                continue
            self._window -= call.octets
            identifier = self._next.to_bytes(4, "big")
            self._next += 2
            self.inflight[identifier] = due
            out.append(identifier.join(self._request(call)))
        if out:
            self._write(b"".join(out))

    def _allowed(self) -> list[Due]:
        calls: list[Due] = []
        while self.waiting and len(self.inflight) + len(calls) < self._most:
            calls.append(self.waiting.popleft())
        return calls

    def _request(self, call: Call) -> tuple[bytes, bytes, bytes]:
        """HEADERS and DATA, to be joined by the stream's identifier."""
        if self._deadlines:
            before, after = next(self._blocks)
            self._deadline = (self._deadline + 1) % len(self._deadlines)
            block = before + self._deadlines[self._deadline] + after
        elif self._first:
            self._first -= 1
            block = next(self._blocks)[0]
        else:
            block = (self._block or self._settled())[0]
        return (
            len(block).to_bytes(3, "big") + b"\x01\x04",
            block + call.octets.to_bytes(3, "big") + b"\x00\x01",
            call.request,
        )

    def _settled(self) -> tuple[bytes, bytes]:
        self._block = next(self._blocks)
        return self._block

    def _write(self, octets: bytes) -> None:
        if self.unsent:
            self.unsent += octets
            return
        try:
            sent = self.sock.send(octets)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise WrongAnswer(f"connection lost while sending: {error}") from error
        if sent < len(octets):
            self.unsent = octets[sent:]

    def flush(self) -> None:
        """Send what the socket did not take at once."""
        if self.unsent:
            octets, self.unsent = self.unsent, b""
            self._write(octets)

    def receive(self) -> list[Due]:
        """Read what there is. The calls that were answered, and answered right.

        Raises:
            WrongAnswer: for anything else.
        """
        try:
            data = self.sock.recv(RECEIVE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise WrongAnswer(f"connection lost: {error}") from error
        if not data:
            raise WrongAnswer(f"connection closed, {len(self.inflight)} calls unanswered")
        buffer = self._rest + data if self._rest else data
        done: list[Due] = []
        at = self._take(buffer, done)
        self._rest = buffer[at:]
        self._uncredited += len(data)
        if self._uncredited > _CREDIT:
            self._write(wire.window_update(0, self._uncredited))
            self._uncredited = 0
        if self._acknowledge and done:
            self._follow_up()
        if self.waiting:
            self.send(())
        return done

    def _take(self, buffer: bytes, done: list[Due]) -> int:
        """Consume whole answers and frames; the position of the first octet left over."""
        at, end, inflight = 0, len(buffer), self.inflight
        while end - at >= wire.HEAD:
            identifier = buffer[at + 5 : at + 9]
            due = inflight.get(identifier)
            if due is not None and due[0].pieces is not None:
                wanted = identifier.join(due[0].pieces)
                if buffer.startswith(wanted, at):
                    del inflight[identifier]
                    done.append(due)
                    at += len(wanted)
                    continue
                if end - at < len(wanted) and wanted.startswith(buffer[at:]):
                    break
            after = at + wire.HEAD + int.from_bytes(buffer[at : at + 3], "big")
            if after > end:
                break
            self._frame(buffer[at + 3], buffer[at + 4], identifier, buffer[at + wire.HEAD : after], done)
            at = after
        return at

    def _frame(self, kind: int, flags: int, identifier: bytes, payload: bytes, done: list[Due]) -> None:
        due = self.inflight.get(identifier)
        if due is not None and kind != wire.WINDOW_UPDATE:
            answer = self._answers.setdefault(identifier, Answer())
            if answer.add(kind, flags, payload, self._decoder):
                due[0].expected.judge(answer)
                self._shapes.judged(due[0].expected, answer)
                del self.inflight[identifier], self._answers[identifier]
                done.append(due)
        elif kind == wire.SETTINGS and not flags & wire.ACK:
            self._most = wire.WIDE_WINDOW
            for place in range(0, len(payload), 6):
                if payload[place : place + 2] == b"\x00\x03":
                    self._most = int.from_bytes(payload[place + 2 : place + 6], "big")
            self._write(wire.frame(wire.SETTINGS, wire.ACK, 0))
        elif kind == wire.PING:
            if flags & wire.ACK:
                self._ping_underway = False
            else:
                self._write(wire.frame(wire.PING, wire.ACK, 0, payload))
        elif kind == wire.WINDOW_UPDATE:
            if identifier == bytes(4):
                self._window += int.from_bytes(payload, "big")
        elif kind in (wire.GOAWAY, wire.RST_STREAM, wire.HEADERS, wire.DATA):
            if kind == wire.RST_STREAM and payload == bytes(4):
                return  # NO_ERROR after a whole answer
            raise WrongAnswer(f"frame of type {kind} on stream {int.from_bytes(identifier, 'big')}: {payload[:60]!r}")

    def _follow_up(self) -> None:
        octets = wire.window_update(0, 5)
        if not self._ping_underway:
            self._ping_underway = True
            octets += wire.frame(wire.PING, 0, 0, b"\x02\x04\x10\x10\x09\x0e\x07\x07")
        self._write(octets)

    def prove(self, call: Call, seconds: float = 10.0) -> None:
        """One call by itself, so that the connection stands and the shape of the answer is known.

        Raises:
            WrongAnswer: where it is not answered in time.
        """
        self.send([(call, 0.0)])
        deadline = monotonic() + seconds
        while self.inflight or self.waiting:
            self.sock.settimeout(max(0.001, deadline - monotonic()))
            try:
                self.receive()
            except TimeoutError as error:
                raise WrongAnswer(f"no answer within {seconds:g} s") from error
            finally:
                self.sock.setblocking(False)
            if monotonic() > deadline:
                raise WrongAnswer(f"no answer within {seconds:g} s")
