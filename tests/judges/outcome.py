"""Sends octets on a new connection, and sums up the server's answer in one line, the outcome.

``T:n``     the call ended with grpc-status n (an HTTP status other than 200: ``H:n``)
``S:CODE``  its stream was reset; ``T:n+S:CODE``: after the status
``C:CODE``  GOAWAY and the end of the connection; ``closed``: the end without GOAWAY
``open`` none of these within `PATIENCE` although the connection lives

A connection that lives must also serve an ordinary call afterwards, which shows that both HPACK tables are equal; if it
does not, the line says so.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import hpack
from tests.support import h2_wire as wire

PATIENCE = 1.0
"""Seconds of silence that count as no answer."""
DEADLINE = 10.0
"""Seconds within which everything else must have happened."""

PROBE = b"/judges.Rows/Unary"
PROBE_STREAM = 90_001

_CODES = {
    0: "NO_ERROR", 1: "PROTOCOL_ERROR", 2: "INTERNAL_ERROR", 3: "FLOW_CONTROL_ERROR", 5: "STREAM_CLOSED",
    6: "FRAME_SIZE_ERROR", 7: "REFUSED_STREAM", 8: "CANCEL", 9: "COMPRESSION_ERROR", 11: "ENHANCE_YOUR_CALM",
}  # fmt: skip


@dataclass
class _Exchange:
    """The answer on one stream."""

    fields: dict[bytes, bytes] = field(default_factory=dict)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None

    def told(self, *, body: bool) -> str:
        if not self.ended:
            return "open" if self.reset is None else f"S:{_CODES.get(self.reset, self.reset)}"
        status = self.fields.get(b":status", b"").decode()
        line = f"T:{self.fields.get(b'grpc-status', b'none').decode()}" if status == "200" else f"H:{status}"
        if self.reset is not None:
            line += f"+S:{_CODES.get(self.reset, self.reset)}"
        return f"{line} {self.body[5:].decode()}".rstrip() if body else line


class _Peer:
    """A client that acknowledges what must be acknowledged, and otherwise only reads."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE)
        self._rest = b""
        self._block = b""
        self._decoder = hpack.Decoder()
        self.exchanges: dict[int, _Exchange] = {}
        self.goaway: int | None = None
        self.gone = False
        self.echoed: set[bytes] = set()

    def over(self) -> bool:
        """Whether the server has ended the connection, or sent GOAWAY."""
        return self.gone or self.goaway is not None

    def close(self) -> None:
        self._socket.close()

    def send(self, octets: bytes) -> None:
        # If the server has closed already, its last octets still have to be read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._socket.sendall(octets)

    def exchange(self, stream: int) -> _Exchange:
        return self.exchanges.setdefault(stream, _Exchange())

    def finished(self, streams: tuple[int, ...]) -> bool:
        return all(self.exchange(s).ended or self.exchange(s).reset is not None for s in streams)

    def read(self, deadline: float) -> bool:
        """Read once. Returns whether anything arrived before the deadline."""
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            return False
        self._socket.settimeout(remaining)
        try:
            octets = self._socket.recv(65536)
        except TimeoutError:
            return False
        except ConnectionResetError:
            octets = b""
        self.gone = not octets
        frames, self._rest = wire.split_frames(self._rest + octets)
        for frame in frames:
            self._take(frame)
        return True

    def _take(self, frame: wire.Frame) -> None:
        if frame.kind == wire.SETTINGS and not frame.flags & wire.ACK:
            self.send(wire.SETTINGS_ACK)
        elif frame.kind == wire.PING and not frame.flags & wire.ACK:
            self.send(wire.ping(frame.payload, ack=True))
        elif frame.kind == wire.PING:
            self.echoed.add(frame.payload)
        elif frame.kind == wire.GOAWAY:
            self.goaway = frame.words[1]
        elif frame.kind == wire.RST_STREAM:
            self.exchange(frame.stream).reset = frame.words[0]
        elif frame.kind in (wire.HEADERS, wire.CONTINUATION):
            self._block += frame.payload
            if frame.flags & wire.END_HEADERS:
                fields = self._decoder.decode(self._block, raw=True)
                self.exchange(frame.stream).fields.update((bytes(name), bytes(value)) for name, value in fields)
                self._block = b""
        elif frame.kind == wire.DATA:
            self.exchange(frame.stream).body += frame.payload
        if frame.kind in (wire.HEADERS, wire.DATA) and frame.flags & wire.END_STREAM:
            self.exchange(frame.stream).ended = True


def outcome(
    port: int,
    octets: bytes,
    *,
    streams: tuple[int, ...] = (1,),
    hello: bytes = wire.HELLO,
    body: bool = False,
    silence: bool = False,
) -> str:
    """Send ``hello`` and ``octets``. Returns the line for ``streams`` (joined with commas) or for the connection.

    ``body``: add the body of the answer. ``silence``: no answer is expected, so waiting for `PATIENCE` is enough.
    """
    peer = _Peer(port)
    try:
        peer.send(hello + octets)
        _listen(peer, lambda: peer.finished(streams), PATIENCE if silence else DEADLINE)
        if not peer.over():
            # A frame that follows the end of a stream arrives before the answer to a later PING.
            peer.send(wire.ping(b"judgment"))
            _listen(peer, lambda: b"judgment" in peer.echoed, DEADLINE)
        if peer.over():
            return _end(peer)
        line = ", ".join(peer.exchange(stream).told(body=body) for stream in streams)
        peer.send(wire.call(PROBE_STREAM, PROBE) + wire.window_update(PROBE_STREAM, 99))
        _listen(peer, lambda: peer.finished((PROBE_STREAM,)), DEADLINE)
        probe = peer.exchange(PROBE_STREAM).told(body=False)
        if peer.over():
            probe = _end(peer)
        return line if probe == "T:0" else f"{line}; then {probe}"
    finally:
        peer.close()


def exchange(port: int, octets: bytes) -> tuple[dict[bytes, bytes], bytes]:
    """Fields and body of the answer on stream 1 to ``octets``."""
    peer = _Peer(port)
    try:
        peer.send(wire.HELLO + octets)
        _listen(peer, lambda: peer.finished((1,)), DEADLINE)
        answer = peer.exchange(1)
        return answer.fields, answer.body
    finally:
        peer.close()


def _listen(peer: _Peer, enough: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not peer.over() and not enough():
        if not peer.read(deadline):
            return


def _end(peer: _Peer) -> str:
    deadline = time.monotonic() + DEADLINE
    while not peer.gone and peer.read(deadline):
        pass
    if peer.goaway is None:
        return "closed"
    return f"C:{_CODES.get(peer.goaway, peer.goaway)}" + ("" if peer.gone else " but not closed")
