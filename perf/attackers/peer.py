"""A connection of an attacker: it can send any frame, and respects the server's windows if the attack needs this."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Self

from hpack.exceptions import HPACKError
from hpack.hpack import Decoder
from tests.support import wire

CLOSE_SECONDS = 0.1
CONNECT_SECONDS = 10.0
FRAME = 16_384
_SETTINGS_WINDOW = (0x4).to_bytes(2, "big")
_READ = 1 << 16


class Peer:
    """One connection. A task reads and interprets all octets that the server sends."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.goaway: int | None = None
        """The error code of the first GOAWAY."""
        self.ended: dict[int, str] = {}
        """Stream → how the server ended it: ``grpc-status N`` or ``reset N``."""
        self.messages: dict[int, int] = {}
        """Stream → number of DATA frames."""
        self.closed = False
        self._reader = reader
        self._decoder = Decoder()
        self._window, self._initial = wire.INITIAL_WINDOW, wire.INITIAL_WINDOW
        self._windows: dict[int, int] = {}
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def connect(cls, port: int, source: str, tls: ssl.SSLContext | None, *, opening: bool = True) -> Self:
        """Connect from the address ``source`` and, with ``opening``, send preface and SETTINGS.

        Raises:
            OSError: if it cannot connect; TimeoutError: if connecting takes too long.
        """
        sock = socket.socket()
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.bind((source, 0))
            async with asyncio.timeout(CONNECT_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
                name = "127.0.0.1" if tls else None
                reader, writer = await asyncio.open_connection(sock=sock, ssl=tls, server_hostname=name, limit=_READ)
        except BaseException:
            # A transport that fails in its handshake still uses the descriptor for a moment.
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, sock.close)
            raise
        if opening:
            writer.write(wire.opening())
        return cls(reader, writer)

    def close(self) -> None:
        """Abort the connection."""
        self._reading.cancel()
        self.writer.transport.abort()

    # -- sending -----------------------------------------------------------------------------------------------------

    def open(self, stream: int, block: bytes, *, end: bool = False) -> None:
        """Send HEADERS, and CONTINUATION if the block is longer than a frame."""
        self._windows[stream] = self._initial
        self.writer.write(headers(stream, block, end=end))

    def ask(self, stream: int, block: bytes, message: bytes) -> None:
        """Send a whole call whose message fits into one frame and into the windows."""
        self.open(stream, block)
        self.writer.write(wire.frame(wire.DATA, wire.END_STREAM, stream, message))
        self._window -= len(message)

    def reset(self, stream: int, code: int = 8) -> None:
        """Send RST_STREAM, with CANCEL by default."""
        self.writer.write(wire.frame(wire.RST_STREAM, 0, stream, code.to_bytes(4, "big")))

    async def data(self, stream: int, octets: bytes, *, end: bool = False) -> bool:
        """Send DATA within the windows. Returns False if the server ends the stream first.

        Raises:
            EOFError: if the server ends the connection.
        """
        at = 0
        while at < len(octets):
            size = min(FRAME, len(octets) - at, self._window, self._windows[stream])
            if stream in self.ended:
                return False
            if size <= 0:
                await self.change()
                continue
            last = end and at + size == len(octets)
            self.writer.write(wire.frame(wire.DATA, wire.END_STREAM * last, stream, octets[at : at + size]))
            self._window -= size
            self._windows[stream] -= size
            at += size
            await self.writer.drain()
        return True

    # -- receiving ---------------------------------------------------------------------------------------------------

    async def change(self) -> None:
        """Wait until the server has sent a frame.

        Raises:
            EOFError: if the server has ended the connection.
        """
        if self.closed:
            raise EOFError
        self._changed.clear()
        await self._changed.wait()
        if self.closed:
            raise EOFError

    async def end_of(self, stream: int) -> str:
        """Wait until the server ends the stream, and return how it did so.

        Raises:
            EOFError: if the server ends the connection first.
        """
        while stream not in self.ended:
            await self.change()
        return self.ended[stream]

    async def _read(self) -> None:
        with contextlib.suppress(OSError, EOFError, HPACKError):
            while True:
                head = await self._reader.readexactly(wire.HEAD)
                payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
                self._frame(head[3], head[4], int.from_bytes(head[5:], "big"), payload)
                self._changed.set()
        self.closed = True
        self._changed.set()

    def _frame(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == wire.SETTINGS and not flags & wire.ACK:
            self._settings(payload)
            self.writer.write(wire.frame(wire.SETTINGS, wire.ACK, 0))
        elif kind == wire.PING and not flags & wire.ACK:
            self.writer.write(wire.frame(wire.PING, wire.ACK, 0, payload))
        elif kind == wire.WINDOW_UPDATE:
            increment = int.from_bytes(payload, "big")
            if stream:
                self._windows[stream] = self._windows.get(stream, self._initial) + increment
            else:
                self._window += increment
        elif kind == wire.GOAWAY and self.goaway is None:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind == wire.RST_STREAM:
            self.ended.setdefault(stream, f"reset {int.from_bytes(payload, 'big')}")
        elif kind == wire.DATA:
            self.messages[stream] = self.messages.get(stream, 0) + 1
        elif kind == wire.HEADERS:
            fields = dict(self._decoder.decode(payload, raw=True))
            if flags & wire.END_STREAM:
                self.ended.setdefault(stream, f"grpc-status {fields.get(b'grpc-status', b'missing').decode()}")

    def _settings(self, payload: bytes) -> None:
        for place in range(0, len(payload), 6):
            if payload[place : place + 2] == _SETTINGS_WINDOW:
                value = int.from_bytes(payload[place + 2 : place + 6], "big")
                for stream in self._windows:
                    self._windows[stream] += value - self._initial
                self._initial = value


def headers(stream: int, block: bytes, *, end: bool = False) -> bytes:
    """The frames of a header block of any size."""
    pieces = [block[at : at + FRAME] for at in range(0, len(block), FRAME)] or [b""]
    frames = []
    for number, piece in enumerate(pieces):
        flags = wire.END_HEADERS * (number == len(pieces) - 1)
        kind = wire.CONTINUATION if number else wire.HEADERS
        frames.append(wire.frame(kind, flags | (wire.END_STREAM * (end and not number)), stream, piece))
    return b"".join(frames)
