"""The setting up of an accepted connection: its waits, and over TLS its handshake.

**Theory of operation.** Each step of setting a connection up (to make its transport, to answer a ClientHello, to end
the handshake) is a large piece of work, and an attacker can have the steps of hundreds of connections come due at the
same moment. So every step waits for a time slice of the scheduler, where the networks of the peers alternate. What
arrives meanwhile stays in the kernel: the event loop reports it once, which takes some microseconds, and does not look
at the connection again until its time slice has come.

The handshake is done on the socket, before there is a transport: one that fails, or is never finished, has cost none.
The time of the peer is limited; the time for which the connection waits for its time slices does not count.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import Final

from grpc_h2.aio.piecewise_tls import PiecewiseTls, ServerContext
from grpc_h2.aio.scheduler import FairScheduler, Share

_READ: Final = 4096
"""Octets that a step of a handshake reads at most. The client's part of one has some hundreds to 2,000, and more only
with its certificates."""


class Arrival:
    """A connection that is being set up."""

    def __init__(
        self,
        connection: socket.socket,
        loop: asyncio.AbstractEventLoop,
        scheduler: FairScheduler,
        share: Share,
        network: str,
        *,
        seconds: float,
    ) -> None:
        """``seconds``: the time that its peer has, in all waits for it together."""
        self._connection = connection
        self._loop = loop
        self._scheduler = scheduler
        self._share = share
        self._network = network
        self._seconds = seconds

    async def time_slice(self) -> None:
        """Wait for a time slice, which ends with it: what follows is a large piece of work."""
        granted = self._loop.create_future()
        self._scheduler.grant(self._loop, granted, self._share, self._network)
        await granted

    async def octets(self, noticed: Callable[[], None] | None = None) -> None:
        """Wait until octets of the peer are there, or its end, and then for a time slice. ``noticed`` is called in
        between.

        Raises:
            TimeoutError: where the peer's time is over.
        """
        loop, descriptor = self._loop, self._connection.fileno()
        granted = loop.create_future()
        began = loop.time()

        def arrived() -> None:
            loop.remove_reader(descriptor)
            timer.cancel()
            self._seconds -= loop.time() - began
            if noticed is not None:
                noticed()
            if not granted.done():
                self._scheduler.grant(loop, granted, self._share, self._network)

        def late() -> None:
            if not granted.done():
                granted.set_exception(TimeoutError())

        timer = loop.call_later(max(0.0, self._seconds), late)
        loop.add_reader(descriptor, arrived)
        try:
            await granted
        finally:
            timer.cancel()
            loop.remove_reader(descriptor)

    def peek(self, most: int) -> bytes | None:
        """The octets that wait, up to ``most``, and empty at the end of the connection; None where nothing waits.

        Raises:
            OSError: where the connection is broken.
        """
        try:
            return self._connection.recv(most, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return None

    async def shake_hands(self, context: ServerContext) -> Handshake:
        """Do a handshake of TLS, whose first step has its time slice and its octets. Returns it once it is done.

        Raises:
            TimeoutError: where the peer's time is over.
            OSError: where it fails (`ssl.SSLError`), or the connection breaks. The peer has its alert.
        """
        handshake = Handshake(context)
        while not await self._step(handshake):
            await self.octets()
        return handshake

    async def _step(self, handshake: Handshake) -> bool:
        """One step. Returns whether the handshake is done."""
        try:
            octets = self._connection.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return False
        if not octets:
            raise ConnectionResetError("the peer ended the connection during the handshake")
        try:
            return handshake.proceed(octets)
        finally:
            if answer := handshake.outgoing.read():
                sent = self._connection.send(answer)
                if sent < len(answer):
                    await self._loop.sock_sendall(self._connection, answer[sent:])


class Handshake:
    """A server's side of a handshake, in memory."""

    __slots__ = ("incoming", "outgoing", "tls")

    def __init__(self, context: ServerContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: PiecewiseTls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def proceed(self, octets: bytes) -> bool:
        """``octets`` have arrived. Returns whether the handshake is done; what came behind it waits in ``incoming``.

        Raises:
            ssl.SSLError: where it fails.
        """
        self.incoming.write(octets)
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True
