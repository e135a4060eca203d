"""Sets up an accepted connection: its waits, and its TLS handshake if the port uses TLS.

**Theory of operation.** Each step of setting up a connection (to make its transport, to answer a ClientHello, to end
the handshake) is a large piece of work, and an attacker can make such a step due on hundreds of connections at the same
moment. So every step waits for a time slice of the scheduler, where the networks of the peers alternate. Octets that
arrive meanwhile stay in the kernel: the event loop reports them once, which takes some microseconds, and does not look
at the connection again until its time slice begins.

The handshake is done on the socket, before there is a transport: a handshake that fails, or is never finished, causes
no transport. The time limit applies to the peer's time only, not to the time for which the connection waits for its
time slices.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from grpc_h2.aio.piecewise_tls import PiecewiseTls, ServerContext
from grpc_h2.aio.scheduler import FairScheduler, Share

_READ: Final = 4096
"""The most octets that a step of a handshake reads. A client sends some hundreds to 2,000 octets in a handshake, and
more only if it sends certificates."""


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
        """``seconds``: the time limit for the sum of all waits for the peer."""
        self._connection = connection
        self._loop = loop
        self._scheduler = scheduler
        self._share = share
        self._network = network
        self._seconds = seconds

    async def time_slice(self) -> None:
        """Wait for a time slice. The work that follows is large, so the time slice ends with it."""
        granted = self._loop.create_future()
        self._scheduler.grant(self._loop, granted, self._share, self._network)
        await granted

    async def octets(self, noticed: Callable[[], None] | None = None) -> None:
        """Wait until the peer has sent octets or closed its side, and then for a time slice. ``noticed`` is called in
        between.

        Raises:
            TimeoutError: if the peer's time is over.
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
        """The octets that wait, at most ``most``; empty at the end of the connection; None if nothing waits.

        Raises:
            OSError: if the connection is broken.
        """
        try:
            return self._connection.recv(most, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return None

    async def shake_hands(self, context: ServerContext) -> Handshake:
        """Do a TLS handshake, whose first step has its time slice and its octets already. Returns the handshake once it
        is done.

        Raises:
            TimeoutError: if the peer's time is over.
            OSError: if the handshake fails (`ssl.SSLError`; the alert has been sent if the peer reads), or the
                connection breaks.
        """
        handshake = Handshake(context)
        while not await self._step(handshake):
            await self.octets()
        return handshake

    async def _step(self, handshake: Handshake) -> bool:
        """Do one step of the handshake. Returns whether it is done."""
        try:
            octets = self._connection.recv(_READ)
        except (BlockingIOError, InterruptedError):
            return False
        if not octets:
            raise ConnectionResetError("the peer ended the connection during the handshake")
        try:
            done = handshake.proceed(octets)
        except ssl.SSLError:
            with suppress(OSError):  # the alert is best effort
                self._connection.send(handshake.outgoing.read())
            raise
        if answer := handshake.outgoing.read():
            await self._send(answer)
        return done

    async def _send(self, answer: bytes) -> None:
        began = self._loop.time()
        async with asyncio.timeout(max(0.0, self._seconds)):
            await self._loop.sock_sendall(self._connection, answer)
        self._seconds -= self._loop.time() - began


class Handshake:
    """The server's side of a TLS handshake, in memory."""

    __slots__ = ("incoming", "outgoing", "tls")

    def __init__(self, context: ServerContext) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls: PiecewiseTls = context.wrap_bio(self.incoming, self.outgoing, server_side=True)

    def proceed(self, octets: bytes) -> bool:
        """``octets`` have arrived. Returns whether the handshake is done; octets after its end wait in ``incoming``.

        Raises:
            ssl.SSLError: if the handshake fails.
        """
        self.incoming.write(octets)
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True
