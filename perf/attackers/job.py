"""The job of a process of attackers, and the state that all its clients share."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass

from tests.support import wire

from perf.attackers.peer import Peer

HEALTH_CHECK, HEALTH_WATCH = b"/grpc.health.v1.Health/Check", b"/grpc.health.v1.Health/Watch"
_PAUSE_SECONDS = 0.05
"""The pause before a client that could not connect, or was disconnected, connects again."""


@dataclass(frozen=True, slots=True)
class Job:
    """The work of the process, and the server that it attacks. The attackers connect from 127.8.0.1, or from several
    addresses that begin with it."""

    kind: str
    """One of `perf.attackers.process.KINDS`."""
    port: int
    key: str
    """The right key, for attackers that have one."""
    name: str
    """A definition that is served."""
    tls: bool = False
    connections: int = 1
    streams: int = 1
    """Streams on each connection."""
    octets: int = 0
    """Size of a name, a body or a block, if the kind has one."""
    addresses: int = 1
    """Addresses from which the attackers connect."""

    def to_json(self) -> str:
        """The job as one line."""
        return json.dumps(asdict(self))


class Crew:
    """The clients of one job: their connections, their requests, and the number of events."""

    def __init__(self, job: Job, say: Callable[[str], None]) -> None:
        self.job = job
        self.done: Counter[str] = Counter()
        """Numbers of events so far, by kind."""
        self._say = say
        self._begun = False
        self._authority = b"127.0.0.1:%d" % job.port
        self._tls = unverified() if job.tls else None

    def started(self) -> None:
        """Report once that the attack is in force."""
        if not self._begun:
            self._begun = True
            self._say("started")

    async def finished(self) -> None:
        """Report that all work is done, and stay connected."""
        self.started()
        self._say("finished")
        await asyncio.Event().wait()

    def address(self, number: int) -> str:
        """The source address of connection ``number``."""
        return f"127.8.{number % self.job.addresses // 200}.{1 + number % self.job.addresses % 200}"

    def block(self, path: bytes, key: bytes = b"", *more: wire.Field) -> bytes:
        """The header block of a call: literals only."""
        scheme = b"https" if self.job.tls else b"http"
        fields = wire.call_fields(self._authority, path, key, scheme=scheme)
        return wire.literal_block([*(field for field in fields if key or field[0] != b"x-avap-auth"), *more])

    def request(self) -> bytes:
        """The request for the definition, as a message."""
        return wire.message(wire.command_request(self.job.name.encode()))

    async def with_peer(self, number: int, act: Callable[[Peer], Awaitable[None]]) -> None:
        """Connect, run ``act`` and close. Refusals and disconnections are counted, not raised."""
        try:
            peer = await Peer.connect(self.job.port, self.address(number), self._tls)
        except (OSError, TimeoutError):
            self.done["not connected"] += 1
            await asyncio.sleep(_PAUSE_SECONDS)
            return
        self.done["connected"] += 1
        try:
            await act(peer)
        except (OSError, EOFError):
            self.done["disconnected"] += 1
        finally:
            if peer.goaway is not None:
                self.done["goaway"] += 1
            peer.close()

    async def each(self, act: Callable[[int, Peer], Awaitable[None]], *, again: bool = True) -> None:
        """Run ``act`` on all connections. With ``again``, replace each connection that has ended, and never return."""

        async def one(number: int) -> None:
            while True:
                await self.with_peer(number, lambda peer: act(number, peer))
                if not again:
                    return
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as group:
            for number in range(self.job.connections):
                group.create_task(one(number))


def unverified() -> ssl.SSLContext:
    """The TLS context of a client. It does not verify the certificate, because the measurement itself has made it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context
