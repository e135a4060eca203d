"""Attacks by connections: header blocks that are expensive to decode, idle connections, octets that are not HTTP/2."""

from __future__ import annotations

import asyncio
import os
import socket

from hpack.huffman import HuffmanEncoder
from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from tests.support import wire

from perf.attackers.job import Crew
from perf.attackers.peer import Peer, headers

_GARBAGE = 300
_BLOCKS_A_SECOND = 50


def huffman_block(crew: Crew, octets: int) -> bytes:
    """The block of a call with an additional field, whose value is a Huffman string of ``octets`` encoded octets."""
    coded = HuffmanEncoder(REQUEST_CODES, REQUEST_CODES_LENGTH).encode(b"a" * (octets * 8 // 5))
    field = b"\0" + wire.string(b"x-long") + wire.integer(len(coded), 7, 0x80) + coded
    return crew.block(wire.GET_COMMAND, b"wrong") + field


async def huffman_blocks(crew: Crew) -> None:
    """Blocks of ``octets``, as fast as the server accepts them; a client that is disconnected connects again."""
    block = huffman_block(crew, crew.job.octets)

    async def act(number: int, peer: Peer) -> None:
        stream = 1
        while True:
            peer.open(stream, block, end=True)
            await peer.writer.drain()
            crew.done["blocks"] += 1
            crew.started()
            crew.done[await peer.end_of(stream)] += 1
            stream += 2

    await crew.each(act)


async def paced_huffman_blocks(crew: Crew) -> None:
    """Like `huffman_blocks`, but with `_BLOCKS_A_SECOND` blocks a second on each connection."""
    block = huffman_block(crew, crew.job.octets)

    async def act(number: int, peer: Peer) -> None:
        stream = 1
        while not peer.closed:
            peer.writer.write(headers(stream, block, end=True))
            await peer.writer.drain()
            crew.done["blocks"] += 1
            crew.started()
            await asyncio.sleep(1 / _BLOCKS_A_SECOND)
            stream += 2

    await crew.each(act)


async def connecting(crew: Crew) -> None:
    """Clients that connect, send a group of calls with wrong keys and one expensive block, and connect again."""
    block, request = huffman_block(crew, crew.job.octets), crew.request()
    flight = b"".join(
        headers(stream, crew.block(wire.GET_COMMAND, b"guess-%d" % stream))
        + wire.frame(wire.DATA, wire.END_STREAM, stream, request)
        for stream in range(1, 2 * crew.job.streams, 2)
    ) + headers(2 * crew.job.streams + 1, block, end=True)

    async def act(number: int, peer: Peer) -> None:
        peer.writer.write(flight)
        await peer.writer.drain()
        crew.started()
        await peer.end_of(2 * crew.job.streams - 1)

    await crew.each(act)


async def idle(crew: Crew) -> None:
    """Idle connections, every second one without its preface. A connection that is closed is opened again."""

    async def one(number: int) -> None:
        loop = asyncio.get_running_loop()
        while True:
            with socket.socket() as sock:
                try:
                    await _connect(crew, sock, number)
                    if number % 2 and not crew.job.tls:
                        await loop.sock_sendall(sock, wire.opening())
                    if crew.done["connected"] >= crew.job.connections:
                        crew.started()
                    while await loop.sock_recv(sock, 4096):
                        pass
                    crew.done["disconnected"] += 1
                except OSError:
                    crew.done["not connected"] += 1
            await asyncio.sleep(0.2)  # so an attacker makes five attempts a second at most

    async with asyncio.TaskGroup() as group:
        for number in range(crew.job.connections):
            group.create_task(one(number))
            if number % 20 == 19:
                await asyncio.sleep(0.005)  # twenty at a time


async def garbage(crew: Crew) -> None:
    """Connections that send octets at random and end."""
    octets = b"\x05" + os.urandom(_GARBAGE)
    await _connect_and_send(crew, octets, endless=True)


async def health_checks(crew: Crew) -> None:
    """``streams`` connections, in ``connections`` rows, that are opened and closed without an octet."""
    await _connect_and_send(crew, b"", endless=False)
    await crew.finished()


async def _connect(crew: Crew, sock: socket.socket, number: int) -> None:
    """Connect from the address of the attacker ``number``, and count the connection."""
    sock.setblocking(False)
    sock.bind((crew.address(number), 0))
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", crew.job.port))
    crew.done["connected"] += 1


async def _connect_and_send(crew: Crew, octets: bytes, *, endless: bool) -> None:
    loop = asyncio.get_running_loop()

    async def one(number: int) -> None:
        left = crew.job.streams
        while endless or left:
            left -= 1
            with socket.socket() as sock:
                try:
                    await _connect(crew, sock, number)
                    if octets:
                        await loop.sock_sendall(sock, octets)
                        async with asyncio.timeout(1.0):
                            await loop.sock_recv(sock, 4096)
                    crew.started()
                except (OSError, TimeoutError):
                    crew.done["not connected"] += 1
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(crew.job.connections):
            group.create_task(one(number))
