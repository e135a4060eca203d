"""Attacks by TLS itself: KeyUpdates, records of one octet, and sessions that are resumed again and again."""

from __future__ import annotations

import asyncio
import itertools
import socket
import ssl
from collections.abc import Callable
from typing import Any, TypeVar

from tests.support import wire
from tests.support.key_updates import send_key_updates

from perf.attackers.job import Crew, unverified
from perf.attackers.peer import CONNECT_SECONDS, Peer, headers

T = TypeVar("T")
_PAUSE_SECONDS = 0.05


async def key_updates(crew: Crew) -> None:
    """Clients with the right key that send ``streams`` KeyUpdates at a time, each of which asks for one in return."""
    block, request = crew.block(wire.GET_COMMAND, crew.job.key.encode()), crew.request()

    async def act(number: int, peer: Peer) -> None:
        tls = peer.writer.get_extra_info("ssl_object")
        for stream in itertools.count(1, 2):
            peer.ask(stream, block, request)  # this write also sends the KeyUpdates that wait
            crew.done["answered"] += await peer.end_of(stream) == "grpc-status 0"
            del peer.ended[stream]
            send_key_updates(tls, crew.job.streams)
            crew.done["key updates"] += crew.job.streams
            crew.started()

    await crew.each(act)


async def small_records(crew: Crew) -> None:
    """Calls with wrong keys, ``streams`` at a time. Each octet of a call is a record of its own."""
    request = crew.request()

    async def act(number: int, peer: Peer) -> None:
        tls = peer.writer.get_extra_info("ssl_object")
        for first in itertools.count(1, 2 * crew.job.streams):
            streams = range(first, first + 2 * crew.job.streams, 2)
            flight = b"".join(
                headers(stream, crew.block(wire.GET_COMMAND, b"guess-%d-%d" % (number, stream)))
                + wire.frame(wire.DATA, wire.END_STREAM, stream, request)
                for stream in streams
            )
            for place in range(len(flight) - 1):
                tls.write(flight[place : place + 1])
            peer.writer.write(flight[-1:])  # this write also sends the waiting records
            await peer.writer.drain()
            crew.done["records"] += len(flight)
            crew.started()
            for stream in streams:
                crew.done[await peer.end_of(stream)] += 1
                del peer.ended[stream]

    await crew.each(act)


async def resumptions(crew: Crew) -> None:
    """Clients that connect, get a session, and connect again with it: every second one by a ticket of TLS 1.3, the
    others by TLS 1.2 without tickets, whose sessions the server would have to remember."""

    async def one(number: int) -> None:
        context = unverified()
        if number % 2:
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.options |= ssl.OP_NO_TICKET
        session: Any = None
        while True:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    session = await _visit(crew, number, context, session)
            except (OSError, EOFError, TimeoutError):
                crew.done["not connected"] += 1
                session = None
                await asyncio.sleep(_PAUSE_SECONDS)

    async with asyncio.TaskGroup() as group:
        for number in range(crew.job.connections):
            group.create_task(one(number))


async def _visit(crew: Crew, number: int, context: ssl.SSLContext, session: Any) -> Any:
    """Connect, with ``session`` if there is one, and wait for the server's first frame. Returns the session for the
    next connection.

    Raises:
        OSError: if the connection fails; EOFError: if the server ends it.
    """
    loop = asyncio.get_running_loop()
    arrived, made = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(arrived, made, session=session)
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.bind((crew.address(number), 0))
        await loop.sock_connect(sock, ("127.0.0.1", crew.job.port))

        async def until(work: Callable[[], T]) -> T:
            while True:
                try:
                    return work()
                except ssl.SSLWantReadError:
                    await loop.sock_sendall(sock, made.read())
                    if not (octets := await loop.sock_recv(sock, 1 << 16)):
                        raise EOFError from None
                    arrived.write(octets)

        await until(tls.do_handshake)
        tls.write(wire.opening())
        await loop.sock_sendall(sock, made.read())
        await until(lambda: tls.read(1000))
        crew.done["connected"] += 1
        crew.done["resumed"] += bool(tls.session_reused)
        crew.started()
        return tls.session
