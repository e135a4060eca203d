"""A TCP proxy in front of PostgreSQL that counts what passes and can cut, hold back or slow it down."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Self
from urllib.parse import urlsplit

_CHUNK = 65_536


class Proxy:
    """Forwards connections to the server of ``url``. A context: all its sockets and threads end with it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        user, _, _ = parts.netloc.rpartition("@")
        port = self._listener.getsockname()[1]
        self.url = parts._replace(netloc=f"{user}@127.0.0.1:{port}").geturl()
        self.bytes_from_database = 0
        self.cut_after: int | None = None
        """Cut the connection once so many bytes have come from the database in all."""
        self.garble = False
        """Hand on noise instead of what the database says."""
        self._flowing = threading.Event()
        self._flowing.set()
        self._closing = False
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self._run(self._accept)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._closing = True
        self._flowing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)

    def cut(self) -> None:
        """Close every open connection."""
        with self._lock:
            for open_socket in self._sockets:
                with contextlib.suppress(OSError):
                    open_socket.shutdown(socket.SHUT_RDWR)

    def hold(self) -> None:
        """Go deaf: everything stays open and acknowledged, nothing passes (the half-open case)."""
        self._flowing.clear()

    def resume(self) -> None:
        """What was held back passes, and all that follows."""
        self._flowing.set()

    def _run(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                database = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            database.settimeout(None)
            with self._lock:
                self._sockets |= {client, database}
            done = threading.Barrier(2)
            self._run(self._pump, client, database, False, done)
            self._run(self._pump, database, client, True, done)

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool, done: threading.Barrier) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_CHUNK):
                self._flowing.wait()
                if counted:
                    self.bytes_from_database += len(data)
                    if self.cut_after is not None and self.bytes_from_database > self.cut_after:
                        break
                    if self.garble:
                        data = bytes(octet ^ 0x5A for octet in data)
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        done.wait(30)
        with self._lock:
            self._sockets.discard(source)
        source.close()
