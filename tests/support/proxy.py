"""A TCP proxy in front of PostgreSQL that counts octets, and can cut, hold, slow down or lose connections."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Self
from urllib.parse import urlsplit

_CHUNK = 65_536
_PACE_SECONDS = 0.01


class Proxy:
    """Forwards connections to the server of ``url``. A context: its sockets and threads end with it."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self._listener = socket.create_server(("127.0.0.1", 0))
        user, _, _ = parts.netloc.rpartition("@")
        port = self._listener.getsockname()[1]
        self.url = parts._replace(netloc=f"{user}@127.0.0.1:{port}").geturl()
        self.bytes_from_database = 0
        self.cut_after: int | None = None
        """Cut the connection once this number of octets has arrived from the database in total."""
        self.garble = False
        """Forward noise instead of the database's octets."""
        self.bytes_per_second: float | None = None
        """Limit for each direction of each connection. None: no limit."""
        self._swallowing = False
        self._lost: set[socket.socket] = set()
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
        """Stop forwarding: connections stay open and octets are acknowledged, but none are forwarded (half-open)."""
        self._flowing.clear()

    def resume(self) -> None:
        """Forward the octets that were held back, and all later ones."""
        self._flowing.set()

    def swallow(self) -> None:
        """A black hole: all connections, even new ones, lose every octet and never close.

        A firewall that drops a connection has the same effect. The handshake of a new one still succeeds, because the
        kernel answers it before this process can refuse it.
        """
        with self._lock:
            self._swallowing = True
            self._lost |= self._sockets

    def spit_out(self) -> None:
        """Forward new connections again. Lost connections stay lost, because their peer does not know about them."""
        with self._lock:
            self._swallowing = False

    def lead_to(self, url: str) -> None:
        """Forward to another server from now on; open connections end."""
        parts = urlsplit(url)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 5432)
        self.cut()

    def _run(self, target: Callable[..., object], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._closing:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self._swallowing:
                with self._lock:
                    self._sockets.add(client)
                    self._lost.add(client)
                self._run(self._drain, client)
                continue
            try:
                database = socket.create_connection(self._target, timeout=5)
            except OSError:
                client.close()
                continue
            database.settimeout(None)
            with self._lock:
                self._sockets |= {client, database}
                if self._swallowing:  # the limit may have changed since the check above
                    self._lost |= {client, database}
            done = threading.Barrier(2)
            self._run(self._pump, client, database, False, done)
            self._run(self._pump, database, client, True, done)

    def _drain(self, lost: socket.socket) -> None:
        """Read and discard, until the peer closes."""
        with contextlib.suppress(OSError):
            while lost.recv(_CHUNK):
                pass
        self._forget(lost)

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool, done: threading.Barrier) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(self._chunk()):
                self._flowing.wait()
                if counted:
                    self.bytes_from_database += len(data)
                    if self.cut_after is not None and self.bytes_from_database > self.cut_after:
                        break
                    if self.garble:
                        data = bytes(octet ^ 0x5A for octet in data)
                self._pace(len(data))
                if source not in self._lost:
                    sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        done.wait(30)
        self._forget(source)

    def _chunk(self) -> int:
        """Maximum number of octets to forward at once: those of a tenth of a second."""
        rate = self.bytes_per_second
        return _CHUNK if rate is None else max(1, min(_CHUNK, int(rate / 10)))

    def _pace(self, octets: int) -> None:
        """Wait as long as a line with ``bytes_per_second`` would take for the octets, or until the limit is removed."""
        began = time.monotonic()
        while (rate := self.bytes_per_second) is not None and not self._closing:
            left = octets / rate - (time.monotonic() - began)
            if left <= 0:
                return
            time.sleep(min(left, _PACE_SECONDS))

    def _forget(self, ended: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(ended)
            self._lost.discard(ended)
        ended.close()
