"""The attackers' connection: it divides header blocks into frames, respects windows, and notes answers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from perf.attackers.peer import FRAME, Peer, headers
from tests.support import wire

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def frames(octets: bytes) -> list[tuple[int, int, int, int]]:
    """Kind, flags, stream and length."""
    found = []
    while octets:
        size = int.from_bytes(octets[:3], "big")
        found.append((octets[3], octets[4], int.from_bytes(octets[5:9], "big"), size))
        octets = octets[9 + size :]
    return found


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (10, [(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, 10)]),
        (FRAME + 1, [(wire.HEADERS, wire.END_STREAM, 1, FRAME), (wire.CONTINUATION, wire.END_HEADERS, 1, 1)]),
    ],
    ids=["one frame", "two frames"],
)
def test_a_header_block_is_divided_into_frames(size: int, wanted: list[tuple[int, int, int, int]]) -> None:
    assert frames(headers(1, bytes(size), end=True)) == wanted


async def with_server(serve: Serve, act: Callable[[Peer], Awaitable[None]]) -> None:
    async def serve_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            await serve(reader, writer)
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        served.set()

    served = asyncio.Event()
    server = await asyncio.start_server(serve_and_close, "127.0.0.1", 0)
    async with server:
        peer = await Peer.connect(server.sockets[0].getsockname()[1], "127.0.0.1", None)
        try:
            await act(peer)
        finally:
            peer.close()
            with contextlib.suppress(OSError):
                await peer.writer.wait_closed()
            await served.wait()


def test_data_stops_at_the_window_until_the_server_opens_it() -> None:
    received = bytearray()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(wire.settings((4, 10)))
        first = len(wire.opening()) + len(wire.frame(wire.SETTINGS, wire.ACK))
        await reader.readexactly(first)
        received.extend(await reader.readexactly(9 + 1 + 9 + 10))
        writer.write(wire.window_update(1, 5))
        received.extend(await reader.readexactly(9 + 5))
        writer.write(wire.frame(wire.RST_STREAM, 0, 1, bytes((0, 0, 0, 7))))
        await reader.read()

    async def act(peer: Peer) -> None:
        await peer.change()
        peer.open(1, b"\x82")
        assert not await peer.data(1, bytes(40))
        assert await peer.end_of(1) == "reset 7"

    asyncio.run(with_server(serve, act))
    assert [length for kind, _, _, length in frames(bytes(received)) if kind == wire.DATA] == [10, 5]


def test_goaway_statuses_and_the_end_of_the_connection_are_noted() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        block = wire.literal_block([(b":status", b"200"), (b"grpc-status", b"16")])
        writer.write(wire.frame(wire.HEADERS, wire.END_HEADERS | wire.END_STREAM, 1, block))
        writer.write(wire.frame(wire.GOAWAY, 0, 0, bytes((0, 0, 0, 1, 0, 0, 0, 11))))

    async def act(peer: Peer) -> None:
        assert await peer.end_of(1) == "grpc-status 16"
        with pytest.raises(EOFError):
            await peer.end_of(3)
        assert peer.goaway == 11

    asyncio.run(with_server(serve, act))
