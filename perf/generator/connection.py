"""A client connection that takes little CPU time: no object per frame, one write per batch of requests."""

from __future__ import annotations

import socket
import ssl
from collections import deque
from collections.abc import Sequence
from struct import Struct
from time import monotonic, time

from tests.support import wire

from perf.generator.answers import INCOMPLETE, STATUSES, Answer, Call, HeaderBlocks, Shape, WrongAnswer, shape_of

RECEIVE = 1 << 16
"""Octets of the receive buffer. They are below the size from which malloc maps memory anew each time (128 kB), because
each read takes 15 µs more with a larger buffer."""
_RECORD = 1 << 14
"""The largest size of a TLS record's content."""
_BIND_ADDRESS_NO_PORT = 24
"""ip(7), IP_BIND_ADDRESS_NO_PORT: the kernel chooses the port at connect, if it knows the free pairs of ports."""
_SO_TIMESTAMPNS = 35
"""socket(7): each read returns the instant at which the data arrived, a ``struct timespec`` of the realtime clock."""
_TIMESPEC = Struct("qq")
_CREDIT = 1 << 29
"""Octets of DATA after which the connection's window is replenished: half of its initial size."""
_TABLE_SIZE = (0x1).to_bytes(2, "big")
_MOST_STREAMS = (0x3).to_bytes(2, "big")
_LEAST_TABLE = 4096
"""The table size that `tests.support.wire.HeaderEncoder` uses."""

Due = tuple[Call, float]
"""A call, and the instant from which its latency counts."""


def connect(port: int, *, source: str = "", receive_buffer: int = 0, seconds: float = 5.0,
            tls: bool = False) -> socket.socket:  # fmt: skip
    """A blocking connection to the server on this machine; ``source``: an address of this machine, for use when the
    default address has too few ports.

    Raises:
        OSError: if no server listens, or TLS does not negotiate ``h2``.
    """
    sock = socket.socket()
    try:
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(seconds)
        if source:
            sock.setsockopt(socket.IPPROTO_IP, _BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        sock.connect(("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if not tls:
            return sock
        # The certificate is not verified: this measurement started the server, with a certificate made for it.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        context.set_alpn_protocols(["h2"])
        secured = context.wrap_socket(sock)
        if secured.selected_alpn_protocol() != "h2":
            secured.close()
            raise ssl.SSLError("the server does not agree on h2 (ALPN)")
        return secured
    except BaseException:
        sock.close()
        raise


class LoadConnection:
    """Sends calls, checks answers, and obeys the server's limits (windows, number of streams).

    Call `send` with any number of calls at any time, `receive` when the socket is readable, and `flush` from time to
    time while octets are `unsent`. With ``acknowledge`` it acts as grpc-go does after replies: it sends a WINDOW_UPDATE
    for the connection and, if no PING is unanswered, a PING. With ``stamped``, the latency of a call counts from the
    instant of its sending, not from the instant passed to `send`, to the instant at which the kernel received the
    answer (`arrived`), so that delays of this process are not included. ``stamped`` is not possible over TLS.
    """

    def __init__(self, port: int, blocks: wire.BlockCycle, deadlines: Sequence[bytes], *, acknowledge: bool = False,
                 tls: bool = False, start: int = 0, stamped: bool = False) -> None:  # fmt: skip
        """``start``: index of the first of ``deadlines`` to use, different for each connection."""
        self.sock = connect(port, tls=tls)
        self._stamped = stamped and not tls
        if self._stamped:
            self.sock.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)
        self.arrived = 0.0
        """When the octets of the last read arrived (monotonic clock); 0 if it is not known."""
        self._tls = tls
        self.sock.sendall(wire.opening())
        self.sock.setblocking(False)
        self.inflight: dict[bytes, Due] = {}
        self.waiting: deque[Due] = deque()
        self.unsent = b""
        self.taken_apart = 0
        """Answers that were judged frame by frame."""
        self._blocks = iter(blocks)
        self._block = b""
        self._first = len(blocks.first)
        self._deadlines = deadlines if blocks.fresh else ()
        self._deadline = start % len(deadlines) if blocks.fresh else 0
        self._next = 1
        self._window = wire.INITIAL_WINDOW
        self._most = 100  # until the server's SETTINGS arrive: the minimum that it should allow (RFC 9113 §6.5.2)
        self._rest = b""
        self._answers: dict[bytes, Answer] = {}
        self._headers = HeaderBlocks()
        self._shapes: list[Shape | None] = [None] * STATUSES
        self._shapes_version = 0
        self._acknowledge = acknowledge
        self._ping_underway = False
        self._uncredited = 0

    def fileno(self) -> int:
        """The descriptor for epoll."""
        return self.sock.fileno()

    # -- sending -----------------------------------------------------------------------------------------------------

    def send(self, calls: Sequence[Due]) -> None:
        """Send the calls that the server's limits allow now; the other calls wait for answers."""
        if self.waiting or len(self.inflight) + len(calls) > self._most:
            self.waiting.extend(calls)
            calls = self._allowed()
        out = []
        for number, due in enumerate(calls):
            call = due[0]
            if call.octets > self._window:
                self.waiting.extendleft(reversed(calls[number:]))
                break
            self._window -= call.octets
            identifier = self._next.to_bytes(4, "big")
            self._next += 2
            self.inflight[identifier] = (call, monotonic()) if self._stamped else due
            out.append(identifier.join(self._request(call)))
        if out:
            self._write(b"".join(out))

    def _allowed(self) -> list[Due]:
        calls: list[Due] = []
        while self.waiting and len(self.inflight) + len(calls) < self._most:
            calls.append(self.waiting.popleft())
        return calls

    def _request(self, call: Call) -> tuple[bytes, bytes, bytes]:
        """The pieces of HEADERS and DATA, to be joined by the stream's identifier."""
        block = call.block or self._usual_block()
        return (
            len(block).to_bytes(3, "big") + b"\x01\x04",
            block + call.octets.to_bytes(3, "big") + b"\x00\x01",
            call.request,
        )

    def _usual_block(self) -> bytes:
        if self._deadlines:
            before, after = next(self._blocks)
            self._deadline = (self._deadline + 1) % len(self._deadlines)
            return before + self._deadlines[self._deadline] + after
        if self._first:
            self._first -= 1
            return next(self._blocks)[0]
        if not self._block:
            self._block = next(self._blocks)[0]
        return self._block

    def _write(self, octets: bytes) -> None:
        if self.unsent:
            self.unsent += octets
            return
        try:
            sent = self.sock.send(octets)
        except (BlockingIOError, ssl.SSLWantWriteError):
            sent = 0
        except OSError as error:
            raise WrongAnswer(f"the connection was lost while sending: {error}") from error
        if sent < len(octets):
            self.unsent = octets[sent:]

    def flush(self) -> None:
        """Send the octets that the socket has not yet accepted."""
        if self.unsent:
            octets, self.unsent = self.unsent, b""
            self._write(octets)

    # -- receiving ---------------------------------------------------------------------------------------------------

    def receive(self) -> list[Due]:
        """Read all available octets. Returns the calls that were answered correctly.

        Raises:
            WrongAnswer: for an answer that is not correct, or a lost connection.
        """
        try:
            data = self._read_tls() if self._tls else self._read_stamped() if self._stamped else self.sock.recv(RECEIVE)
        except (BlockingIOError, ssl.SSLWantReadError):
            return []
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
            raise WrongAnswer(f"the connection was lost: {error}") from error
        if not data:
            raise WrongAnswer(f"the server closed the connection, {len(self.inflight)} calls unanswered")
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

    def _read_stamped(self) -> bytes:
        data, ancillary, _, _ = self.sock.recvmsg(RECEIVE, socket.CMSG_SPACE(_TIMESPEC.size))
        self.arrived = 0.0
        for level, kind, value in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, _SO_TIMESTAMPNS):
                seconds, nanoseconds = _TIMESPEC.unpack(value)
                self.arrived = seconds + nanoseconds / 1e9 - time() + monotonic()
        return data

    def _read_tls(self) -> bytes:
        """All octets that have arrived, including those in OpenSSL's buffer, which epoll does not report."""
        parts = [self.sock.recv(_RECORD)]
        try:
            while parts[-1] and self.sock.gettimeout() == 0:
                parts.append(self.sock.recv(_RECORD))
        except ssl.SSLWantReadError:
            pass
        return b"".join(parts)

    def _take(self, buffer: bytes, done: list[Due]) -> int:
        """Consume whole answers and frames. Returns the position of the first octet that is left."""
        at, end, inflight, shapes = 0, len(buffer), self.inflight, self._shapes
        while end - at >= wire.HEAD:
            identifier = buffer[at + 5 : at + 9]
            due = inflight.get(identifier)
            if due is not None and (shape := shapes[due[0].status]) is not None:
                after = shape.after(buffer, at, identifier, due[0])
                if after >= 0:
                    del inflight[identifier]
                    done.append(due)
                    at = after
                    continue
                if after == INCOMPLETE:
                    break
            after = at + wire.HEAD + int.from_bytes(buffer[at : at + 3], "big")
            if after > end:
                break
            kind, flags, payload = buffer[at + 3], buffer[at + 4], buffer[at + wire.HEAD : after]
            if due is not None and kind != wire.WINDOW_UPDATE:
                if self._answer(kind, flags, identifier, payload, due):
                    done.append(due)
            else:
                self._frame(kind, flags, identifier, payload)
            at = after
        return at

    def _answer(self, kind: int, flags: int, identifier: bytes, payload: bytes, due: Due) -> bool:
        """Handle a frame of an answer that is judged frame by frame. Returns whether it completed a right answer."""
        answer = self._answers.get(identifier)
        if answer is None:
            answer = self._answers[identifier] = Answer(self._headers.version)
        last = answer.add(kind, flags, payload, self._headers)
        if self._headers.version != self._shapes_version:
            # The list is changed in place, because `_take` holds it.
            self._shapes[:] = [None] * STATUSES
            self._shapes_version = self._headers.version
        if not last:
            return False
        call = due[0]
        answer.judge(call.expected)
        self.taken_apart += 1
        if self._shapes[call.status] is None and answer.version == self._headers.version:
            self._shapes[call.status] = shape_of(call.expected, answer.frames)
        del self.inflight[identifier], self._answers[identifier]
        return True

    def _frame(self, kind: int, flags: int, identifier: bytes, payload: bytes) -> None:
        """Handle a frame that belongs to no answer."""
        if kind == wire.SETTINGS:
            if not flags & wire.ACK:
                self._settings(payload)
        elif kind == wire.PING:
            if flags & wire.ACK:
                self._ping_underway = False
            else:
                self._write(wire.frame(wire.PING, wire.ACK, 0, payload))
        elif kind == wire.WINDOW_UPDATE:
            if identifier == bytes(4):
                self._window += int.from_bytes(payload, "big")
        elif kind in (wire.GOAWAY, wire.RST_STREAM, wire.HEADERS, wire.DATA, wire.PUSH_PROMISE, wire.CONTINUATION):
            if kind == wire.RST_STREAM and payload == bytes(4):
                return  # a reset after a whole answer is right
            where = int.from_bytes(identifier, "big")
            if kind == wire.GOAWAY:
                code, text = int.from_bytes(payload[4:8], "big"), payload[8:68]
                raise WrongAnswer(f"the server ends the connection (GOAWAY, HTTP/2 error {code}, {text!r})")
            raise WrongAnswer(f"an unexpected frame of type {kind} on stream {where}: {payload[:60]!r}")

    def _settings(self, payload: bytes) -> None:
        self._most = wire.WIDE_WINDOW
        for place in range(0, len(payload), 6):
            name, value = payload[place : place + 2], int.from_bytes(payload[place + 2 : place + 6], "big")
            if name == _MOST_STREAMS:
                self._most = value
            elif name == _TABLE_SIZE and value < _LEAST_TABLE:
                raise WrongAnswer(f"the server allows a header table of {value} octets; this generator uses 4096")
        self._write(wire.frame(wire.SETTINGS, wire.ACK, 0))

    def _follow_up(self) -> None:
        octets = wire.window_update(0, 5)
        if not self._ping_underway:
            self._ping_underway = True
            octets += wire.frame(wire.PING, 0, 0, b"\x02\x04\x10\x10\x09\x0e\x07\x07")
        self._write(octets)

    def prove(self, call: Call, seconds: float = 10.0) -> None:
        """Make one call. Afterwards the connection is established, and the server's limits are known.

        Raises:
            WrongAnswer: if the call is not answered in time.
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
