"""A TCP relay that joins successive writes of a client into one write.

A server may answer before a request has ended (RFC 9113 section 8.1), and our server does so if the headers alone
decide the answer. h2spec first writes a request, and then the fault that is to be judged. Without the relay it would
depend on the machine whether the server reads both together, or has refused the request before the fault arrives.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

SILENCE_SECONDS = 0.03
"""Seconds. A client that has not written for this time waits for the server."""

_MOST_CONNECTIONS = 32
_CHUNK = 1 << 20


@contextmanager
def relay(target: int) -> Iterator[int]:
    """The port of a relay to port ``target`` of this machine. The relay ends with the context."""
    opened: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2 * _MOST_CONNECTIONS) as threads:

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    opened.append(client)
                    server = socket.create_connection(("127.0.0.1", target))
                    opened.append(server)
                    threads.submit(_together, client, server)
                    threads.submit(_at_once, server, client)

        threads.submit(accept)
        try:
            yield listener.getsockname()[1]
        finally:
            _shut(listener)
            for end in opened:
                _shut(end)
    for end in opened:
        end.close()


def _together(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while held := source.recv(_CHUNK):
            while select.select([source], [], [], SILENCE_SECONDS)[0] and (more := source.recv(_CHUNK)):
                held += more
            sink.sendall(held)
    _shut(sink)


def _at_once(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while octets := source.recv(_CHUNK):
            sink.sendall(octets)
    _shut(sink)


def _shut(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
