"""Attacks by calls: names, bodies and watches that hold memory, compressed requests, and resets."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import Awaitable, Callable
from struct import pack

from tests.support import wire

from perf.attackers.job import HEALTH_CHECK, HEALTH_WATCH, Crew
from perf.attackers.peer import Peer

_BATCH = 50
_AT_ONCE_SECONDS = 1.0
"""The seconds within which a refusal must arrive. A slower refusal was not sent at HEADERS."""
_BODY_SECONDS = 12.0
"""The seconds within which a call without its body must end. The server's deadline for a body is 10 s; the slack of its
timer and a busy machine add to this time."""
_EXPIRED_SECONDS = 2.5
"""The seconds within which a call with a deadline of 1 s must end."""


def _streams(count: int, first: int = 1) -> range:
    return range(first, first + 2 * count, 2)


def _health_request(name: bytes) -> bytes:
    return wire.message(b"\x0a" + _varint(len(name)) + name)


def _varint(value: int) -> bytes:
    octets = []
    while value >= 128:
        octets.append(128 | value & 127)
        value >>= 7
    return bytes((*octets, value))


async def long_names(crew: Crew) -> None:
    """Watches with names of ``octets`` octets, all of which stay open."""
    message = _health_request(b"n" * crew.job.octets)
    block = crew.block(HEALTH_WATCH)

    async def act(number: int, peer: Peer) -> None:
        for stream in _streams(crew.job.streams):
            peer.open(stream, block)
            crew.done["sent"] += await peer.data(stream, message, end=True)
        crew.started()
        await asyncio.Event().wait()

    await _once_and_stay(crew, act)


async def ended_watches(crew: Crew) -> None:
    """Watches with names of ``octets`` octets, each reset once it has been answered or refused."""
    message = _health_request(b"n" * crew.job.octets)
    block = crew.block(HEALTH_WATCH)

    async def act(number: int, peer: Peer) -> None:
        crew.started()
        for stream in _streams(crew.job.streams):
            peer.open(stream, block)
            await peer.data(stream, message, end=True)
            while stream not in peer.ended and stream not in peer.messages:
                await peer.change()
            crew.done[peer.ended.get(stream, "watched")] += 1
            if stream not in peer.ended:
                peer.reset(stream)
            crew.done["ended"] += 1
            if stream % 128 == 127:
                await peer.writer.drain()

    await crew.each(act, again=False)
    await crew.finished()


async def watches(crew: Crew) -> None:
    """Watches of the server's state, all of which stay open."""
    message, block = _health_request(b""), crew.block(HEALTH_WATCH)
    ready = 0

    async def act(number: int, peer: Peer) -> None:
        nonlocal ready
        for stream in _streams(crew.job.streams):
            peer.ask(stream, block, message)
            if stream % (2 * _BATCH) == 1:
                await peer.writer.drain()
                await asyncio.sleep(0.02)  # one batch at a time
        while len(peer.messages) + len(peer.ended) < crew.job.streams:
            await peer.change()
        crew.done["watching"] += len(peer.messages)
        crew.done["refused"] += len(peer.ended)
        ready += 1
        if ready == crew.job.connections:
            crew.started()
        try:
            while len(peer.ended) < crew.job.streams:
                await peer.change()
        finally:
            crew.done["notified"] += sum(count > 1 for count in peer.messages.values())

    await crew.each(act, again=False)
    crew.started()


async def _bodies(crew: Crew, block: bytes, in_time: float) -> None:
    """Calls whose bodies never end; each counts as ended in time if the server ends it within ``in_time`` seconds."""
    body = b"\0" + pack(">I", 4_000_000) + b"b" * crew.job.octets
    loop = asyncio.get_running_loop()

    async def one(peer: Peer, stream: int) -> None:
        began = loop.time()
        crew.done["opened"] += 1

        async def judge() -> None:
            how = await peer.end_of(stream)
            crew.done[how] += 1
            crew.done["ended in time"] += loop.time() - began <= in_time

        peer.open(stream, block)
        judging = asyncio.create_task(judge())
        sent = await peer.data(stream, body)
        crew.done["whole bodies"] += sent
        await judging

    async def act(number: int, peer: Peer) -> None:
        await asyncio.sleep(0.1)  # until the server's SETTINGS are known, which limit the number of streams
        crew.started()
        async with asyncio.TaskGroup() as group:
            for stream in _streams(crew.job.streams):
                group.create_task(one(peer, stream))
        await asyncio.Event().wait()

    await _once_and_stay(crew, act)


async def endless_bodies_wrong_key(crew: Crew) -> None:
    """GetCommand with a wrong key; the refusal must not wait for the body."""
    await _bodies(crew, crew.block(wire.GET_COMMAND, b"wrong"), _AT_ONCE_SECONDS)


async def endless_bodies(crew: Crew) -> None:
    """GetCommand with the right key; the body must arrive within the server's deadline of 10 seconds."""
    await _bodies(crew, crew.block(wire.GET_COMMAND, crew.job.key.encode()), _BODY_SECONDS)


async def expired_bodies(crew: Crew) -> None:
    """GetCommand with the right key and a deadline of one second, after which the call must end."""
    block = crew.block(wire.GET_COMMAND, crew.job.key.encode(), (b"grpc-timeout", b"1S"))
    await _bodies(crew, block, _EXPIRED_SECONDS)


async def open_streams(crew: Crew) -> None:
    """Calls without an end (bodies that never end, and watches), from peers without the key and with it."""
    blocks = [crew.block(wire.GET_COMMAND, key) for key in (b"wrong", crew.job.key.encode())]
    watch = crew.block(HEALTH_WATCH)

    async def act(number: int, peer: Peer) -> None:
        for stream in _streams(crew.job.streams):
            if stream % 3:
                peer.open(stream, blocks[stream % 3 - 1])
            else:
                peer.ask(stream, watch, _health_request(b""))
            crew.done["opened"] += 1
        await peer.writer.drain()
        crew.started()
        await asyncio.Event().wait()

    await _once_and_stay(crew, act)


async def gzip_bombs(crew: Crew) -> None:
    """health/Check with a compressed name that inflates to ``octets`` octets, one call after another."""
    bomb = gzip.compress(_health_request(b"n" * crew.job.octets)[5:], 1)
    block = crew.block(HEALTH_CHECK, b"", (b"grpc-encoding", b"gzip"))
    message = b"\x01" + pack(">I", len(bomb)) + bomb

    async def act(number: int, peer: Peer) -> None:
        stream = 1
        while True:
            peer.open(stream, block)
            await peer.data(stream, message, end=True)
            crew.done[await peer.end_of(stream)] += 1
            crew.started()
            del peer.ended[stream]
            stream += 2

    await crew.each(act)


async def wrong_keys(crew: Crew) -> None:
    """Groups of calls, each with a different wrong key."""
    request = crew.request()

    async def act(number: int, peer: Peer) -> None:
        first = 1
        while True:
            streams = _streams(crew.job.streams, first)
            for stream in streams:
                peer.ask(stream, crew.block(wire.GET_COMMAND, b"guess-%d-%d" % (number, stream)), request)
            await peer.writer.drain()
            for stream in streams:
                crew.done[await peer.end_of(stream)] += 1
                del peer.ended[stream]
            crew.started()
            first = streams.stop

    await crew.each(act)


async def late_resets(crew: Crew) -> None:
    """An honest client: it resets each stream after the whole answer has arrived, as old grpc-js does."""
    block, request = crew.block(wire.GET_COMMAND, crew.job.key.encode()), crew.request()

    async def act(number: int, peer: Peer) -> None:
        crew.started()
        for first in range(1, 2 * crew.job.streams, 2 * _BATCH):
            batch = _streams(_BATCH, first)
            for stream in batch:
                peer.ask(stream, block, request)
            for stream in batch:
                crew.done["answered"] += await peer.end_of(stream) == "grpc-status 0"
            for stream in batch:
                peer.reset(stream)

    await crew.each(act, again=False)
    await crew.finished()


async def rapid_resets(crew: Crew) -> None:
    """Calls that are reset before they are whole (CVE-2023-44487): a whole call would be answered at once."""
    block = crew.block(wire.GET_COMMAND, crew.job.key.encode())

    async def act(number: int, peer: Peer) -> None:
        for stream in _streams(crew.job.streams):
            if peer.closed or peer.writer.is_closing():
                raise EOFError
            peer.open(stream, block)
            peer.reset(stream)
            crew.done["reset"] += 1
            if stream % (2 * _BATCH) == 1:
                await peer.writer.drain()
                await asyncio.sleep(0)
        crew.started()
        while True:
            await peer.change()

    await crew.each(act, again=False)
    await crew.finished()


async def _once_and_stay(crew: Crew, act: Callable[[int, Peer], Awaitable[None]]) -> None:
    """Run ``act``, which does not end by itself, once on every connection. If the server has ended a connection,
    wait."""
    await crew.each(act, again=False)
    crew.started()
    await asyncio.Event().wait()
