"""Clients that misbehave, in a separate process: ``python -m tests.chaos.attackers`` with a `Job` in the first line of
input.

It prints ``{"started": …}`` once the fault has begun, continues until stdin ends, and finally prints a report. All
octets are prepared beforehand: an attack must cost this process less CPU than the server, and no gRPC library would
send most of these octets.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass

from hpack.hpack import Decoder
from tests.support import wire
from tests.support.attacks import ATTACKS, HONEST, PIECE, Attack, Blocks

from grpc_h2 import Limits

CONNECT_SECONDS = 60.0
"""Time for opening one connection: when thousands are opened at once, the kernel sends some SYNs three or four
times.
"""

FLIGHT = 100
"""Calls that a client sends at once: the maximum of concurrent calls on one connection."""

_RECEIVE_BUFFER = 4096
_READ_OCTETS = 65_536
_SLOW_CALLS = 32
_SLOW_OCTETS = 256
_SLOW_SECONDS = 0.1
_RETRY_SECONDS = 0.1
_PREFACE_SECONDS = Limits().preface_timeout
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_FINISHED = b"finished"
_NICENESS = 5


@dataclass(frozen=True, slots=True)
class Job:
    """The work of the process, and the server that it attacks."""

    kind: str
    """One of `KINDS`."""
    host: str
    port: int
    key: str
    """The right key. Attackers with wrong keys do not use it."""
    name: str
    """A definition that is served."""
    size: int = 1
    """Number of connections at any time."""
    rate: float = 0.0
    """Maximum of resets, calls with a wrong key, or calls of a crowd per second, over all connections. 0 if there is no
    limit.
    """
    seconds: float = 1.0
    """Time for each attack of ``tests/support/attacks.py``."""
    ca_file: str | None = None
    """Call over TLS and trust these authorities."""

    def to_json(self) -> str:
        """Print ``message`` as one line of JSON."""
        return json.dumps(asdict(self))


class Replies:
    """The frames that the server sends on one connection; SETTINGS are acknowledged.

    Reading raises ``EOFError`` if the server ends the connection or announces its end with GOAWAY.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._decoder = Decoder()

    async def frames(self) -> AsyncIterator[tuple[int, int, int, bytes]]:
        """Kind, flags, stream and payload of every frame."""
        while True:
            head = await self._reader.readexactly(wire.HEAD)
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            if kind == wire.SETTINGS and not flags & wire.ACK:
                self._writer.write(wire.frame(wire.SETTINGS, wire.ACK, 0))
            if kind == wire.GOAWAY:
                raise EOFError
            yield kind, flags, stream, payload

    async def statuses(self, streams: range) -> Counter[str]:
        """The ``grpc-status`` of the calls on these streams, after all have ended. A call without a status is counted
        as ``reset``.
        """
        found: dict[int, str] = {}
        async for kind, flags, stream, payload in self.frames():
            if kind == wire.HEADERS:
                fields = dict(self._decoder.decode(payload, raw=True))
                if flags & wire.END_STREAM:
                    found[stream] = f"grpc-status {fields.get(b'grpc-status', b'missing').decode()}"
            elif kind == wire.RST_STREAM and stream in streams:
                found.setdefault(stream, "reset")
            if len(found) == len(streams):
                break
        return Counter(found.values())

    async def finished(self) -> None:
        """Wait until the server has answered the PING at the end of a script."""
        async for kind, flags, _, payload in self.frames():
            if kind == wire.PING and flags & wire.ACK and payload == _FINISHED:
                return


Act = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Attackers:
    """The clients of one job."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.done: Counter[str] = Counter()
        """Numbers of events so far, by kind."""
        self.asked_to_end = asyncio.Event()
        self._begun = False
        self._next_turn = 0.0
        self._tls = None if job.ca_file is None else _trusting(job.ca_file)
        authority = b"%s:%d" % (job.host.encode(), job.port)
        request = wire.command_request(job.name.encode())

        def call(path: bytes, key: bytes, content: bytes) -> Callable[[int], bytes]:
            block = wire.literal_block(wire.call_fields(authority, path, key))
            return lambda stream: _ask(stream, block, content)

        self.get = call(wire.GET_COMMAND, job.key.encode(), request)
        self.sync = call(wire.SYNC_CATALOG, job.key.encode(), b"")
        # Each call has another key, like those of an attacker who guesses keys, so remembered refusals do not help.
        self.get_with_wrong_key = lambda stream: call(wire.GET_COMMAND, b"guess-%d" % stream, request)(stream)

    def started(self) -> None:
        """Report once that the fault has begun."""
        if not self._begun:
            self._begun = True
            _say(started=self.done)

    async def one(self, act: Act, *, receive_buffer: int = 0) -> None:
        """Open a connection and run ``act`` on it. An error that ends the connection is counted and ends this call.

        A client is ``late`` if this process, on a busy machine, has left its connection without a preface for longer
        than the server waits.
        """
        begun = time.monotonic()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                reader, writer = await self._connect(receive_buffer)
        except (OSError, TimeoutError):
            self.done["not connected"] += 1
            await asyncio.sleep(_RETRY_SECONDS)
            return
        self.done["connected"] += 1
        late = time.monotonic() - begun >= _PREFACE_SECONDS
        try:
            await act(reader, writer)
        except (OSError, EOFError):
            self.done["late" if late else "thrown out"] += 1
        finally:
            writer.transport.abort()

    async def _connect(self, receive_buffer: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        loop = asyncio.get_running_loop()
        family, kind, _, _, address = (
            await loop.getaddrinfo(self.job.host, self.job.port, type=socket.SOCK_STREAM)
        )[0]  # fmt: skip
        sock = socket.socket(family, kind)
        try:
            sock.setblocking(False)
            if receive_buffer:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            await loop.sock_connect(sock, address)
            return await asyncio.open_connection(
                sock=sock, ssl=self._tls, server_hostname=self.job.host if self._tls else None,
                limit=receive_buffer or _READ_OCTETS,
            )  # fmt: skip
        except BaseException:
            sock.close()
            raise

    async def many(self, act: Act, *, receive_buffer: int = 0, connections: int | None = None) -> None:
        """Run ``act`` on a number of connections at a time (default: the job's), and replace each that ends;
        endless.
        """

        async def again_and_again() -> None:
            while True:
                await self.one(act, receive_buffer=receive_buffer)

        async with asyncio.TaskGroup() as group:
            for _ in range(connections or self.job.size):
                group.create_task(again_and_again())

    async def turn(self, calls: int = 1) -> None:
        """Wait until ``calls`` more calls are allowed at the job's rate. Calls that were missed are not made later."""
        if self.job.rate:
            now = asyncio.get_running_loop().time()
            mine = max(now, self._next_turn)
            self._next_turn = mine + calls / self.job.rate
            await asyncio.sleep(mine - now)

    # -- kinds -------------------------------------------------------------------------------------------------

    async def crowd(self) -> None:
        """Open all connections at once, make a call on each (at the job's rate), and keep them open."""

        async def one_of_them(settled: asyncio.Event) -> None:
            async def stay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                writer.write(wire.opening())
                await self.turn()
                writer.write(self.get(1))
                self.done += await Replies(reader, writer).statuses(range(1, 3, 2))
                settled.set()
                await asyncio.Event().wait()

            await self.one(stay)
            settled.set()  # even if the call has failed

        members = [asyncio.Event() for _ in range(self.job.size)]
        async with asyncio.TaskGroup() as group:
            for member in members:
                group.create_task(one_of_them(member))
            for member in members:
                await member.wait()
            self.started()

    async def slow_readers(self) -> None:
        """Request the catalogue many times and hardly read the answers."""

        async def read_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(wire.opening() + b"".join(map(self.sync, range(1, 2 * _SLOW_CALLS, 2))))
            while octets := await reader.read(_SLOW_OCTETS):
                self.done["octets read"] += len(octets)
                self.started()
                await asyncio.sleep(_SLOW_SECONDS)

        await self.many(read_slowly, receive_buffer=_RECEIVE_BUFFER)

    async def resets(self) -> None:
        """Make calls and reset their connection (RST) before an answer can be read, again and again."""

        async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.turn()
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.write(wire.opening() + b"".join(map(self.get, range(1, 2 * FLIGHT, 2))))
            await writer.drain()
            self.done["reset"] += 1
            self.started()

        await self.many(reset)

    async def wrong_keys(self) -> None:
        """Make calls with a wrong key, a batch at a time on each connection."""

        async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            replies, stream = Replies(reader, writer), 1
            writer.write(wire.opening())
            while True:
                await self.turn(FLIGHT)
                streams = range(stream, stream + 2 * FLIGHT, 2)
                writer.write(b"".join(map(self.get_with_wrong_key, streams)))
                self.done += await replies.statuses(streams)
                self.started()
                stream = streams.stop

        await self.many(flood)

    async def attacks(self) -> None:
        """Run every attack of ``tests/support/attacks.py`` in turn until asked to end, each at least once."""
        self.started()
        while True:
            for name, attack in ATTACKS.items():
                if name != HONEST:
                    await self._attack(name, attack)
            if self.asked_to_end.is_set():
                return

    async def _attack(self, name: str, attack: Attack) -> None:
        """One attack for the job's seconds."""
        blocks = Blocks(self.job.port, self.job.key.encode())
        first, then = attack.first(blocks), attack.then(blocks)

        async def send(writer: asyncio.StreamWriter) -> None:
            await _send_pieces(writer, first + then)
            while attack.again:
                await _send_pieces(writer, then)
            if attack.stays:
                await asyncio.Event().wait()
            await _send_pieces(writer, wire.frame(wire.PING, 0, 0, _FINISHED))

        async def act(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.done[name] += 1
            if not attack.reads:
                await send(writer)
            sending = asyncio.create_task(send(writer))
            try:
                await Replies(reader, writer).finished()  # not reading the answers would be another attack
            finally:
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.job.seconds):
                await self.many(act, receive_buffer=attack.receive_buffer, connections=attack.connections)


KINDS: dict[str, Callable[[Attackers], Awaitable[None]]] = {
    "crowd": Attackers.crowd,
    "slow readers": Attackers.slow_readers,
    "resets": Attackers.resets,
    "wrong keys": Attackers.wrong_keys,
    "attacks": Attackers.attacks,
}


def _say(**what: Counter[str]) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def _ask(stream: int, block: bytes, content: bytes) -> bytes:
    asked = wire.frame(wire.HEADERS, wire.END_HEADERS, stream, block)
    return asked + wire.frame(wire.DATA, wire.END_STREAM, stream, wire.message(content))


async def _send_pieces(writer: asyncio.StreamWriter, octets: bytes) -> None:
    for at in range(0, len(octets), PIECE):
        writer.write(octets[at : at + PIECE])
        await writer.drain()


def _trusting(ca_file: str) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file)
    context.set_alpn_protocols(["h2"])
    return context


async def run(job: Job) -> Counter[str]:
    """Misbehave until stdin ends. Returns the report."""
    attackers = Attackers(job)
    work = asyncio.ensure_future(KINDS[job.kind](attackers))
    told_to_end = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await asyncio.wait((work, told_to_end), return_when=asyncio.FIRST_COMPLETED)
    attackers.asked_to_end.set()
    if job.kind != "attacks":
        work.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await work
    return attackers.done


def main() -> None:
    """Do the job of the first line of stdin."""
    os.nice(_NICENESS)  # with few CPUs the attacker must not delay the victim's measurement
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    job = Job(**json.loads(sys.stdin.readline()))
    _say(done=asyncio.run(run(job)))


if __name__ == "__main__":
    main()
