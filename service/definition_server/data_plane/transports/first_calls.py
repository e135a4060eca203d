"""The first calls to a native transport, which its own worker makes on the loopback before it is READY (see `warmup`).

They are written as octets to a TCP connection, so that gRPC's C-core need not be started in the worker. A host may have
no IPv4 loopback (IPv6 alone, an interface that is down, address families that are refused): a Unix connection then
takes its place.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress

from definition_server.api_keys import METADATA_KEY
from definition_server.data_plane.services import SERVICE
from definition_server.observability.logs import get_logger
from grpc_h2 import encode_block, frames

log = get_logger(__name__)

_FIRST_CALLS = (
    (f"/{SERVICE}/GetCommand", b"\x0a\x04warm", True),
    (f"/{SERVICE}/GetCommand", b"\x0a\x07missing", True),
    (f"/{SERVICE}/GetCommand", b"\x0a\x04warm", False),
    (f"/{SERVICE}/SyncCatalog", b"", True),
    ("/grpc.health.v1.Health/Check", b"", True),
)
"""The calls, each as path, request, and whether it has the right key. They are, in this order: found, missing, refused,
catalogue, health."""
_FIRST_CALLS_SECONDS = 10.0


def listener_and_client() -> tuple[socket.socket, socket.socket]:
    """A socket that listens on the loopback, and a connection to it, which waits to be accepted.

    Must be called before the worker is confined, because afterwards it cannot make a socket.

    Raises:
        OSError: if no descriptor is left.
    """
    try:
        listening = socket.create_server(("127.0.0.1", 0))
        return listening, _connected(listening)
    except OSError:
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listening.bind("")  # the kernel gives it an abstract name (unix(7), "Autobind feature")
        listening.listen(1)
        return listening, _connected(listening)


def _connected(listening: socket.socket) -> socket.socket:
    """A connection to ``listening``. If the connection fails, ``listening`` is closed."""
    client = socket.socket(listening.family, socket.SOCK_STREAM)
    try:
        client.connect(listening.getsockname())
    except OSError:
        client.close()
        listening.close()
        raise
    return client


async def make_first_calls(client: socket.socket, key: str) -> None:
    """Make one call of each kind, all in one write. Returns when every call has ended, or logs why a call has not
    ended.

    Args:
        client: Connected to the transport.
        key: A key that the transport accepts.
    """
    reader, writer = await asyncio.open_connection(sock=client)
    try:
        writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0) + _first_calls(key))
        async with asyncio.timeout(_FIRST_CALLS_SECONDS):
            await _read_ends(reader, len(_FIRST_CALLS))
    except (TimeoutError, EOFError, OSError) as error:
        log.error("Warm-up is incomplete; first calls may be slow", error=repr(error))
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


def _first_calls(key: str) -> bytes:
    """The octets of every call, as one write."""
    octets = []
    for number, (path, request, presented) in enumerate(_FIRST_CALLS):
        block = encode_block(
            (
                (b":method", b"POST"),
                (b":scheme", b"http"),
                (b":path", path.encode()),
                (b":authority", b"localhost"),
                (b"te", b"trailers"),
                (b"content-type", b"application/grpc"),
                (METADATA_KEY.encode(), key.encode() if presented else b"wrong"),
            )
        )
        message = b"\0" + len(request).to_bytes(4, "big") + request
        octets.append(frames.frame(frames.HEADERS, frames.END_HEADERS, 2 * number + 1, block))
        octets.append(frames.frame(frames.DATA, frames.END_STREAM, 2 * number + 1, message))
    return b"".join(octets)


async def _read_ends(reader: asyncio.StreamReader, streams: int) -> None:
    """Read frames until ``streams`` streams have ended."""
    while streams:
        header = await reader.readexactly(frames.HEADER_LENGTH)
        await reader.readexactly(int.from_bytes(header[:3], "big"))
        if header[3] in (frames.HEADERS, frames.DATA) and header[4] & frames.END_STREAM:
            streams -= 1
