"""The sockets of the admin port: accepts, reads one request, writes one answer, and closes. Runs in one thread.

Untrusted clients reach this port, and it shares a process with the master. So it uses one thread and a limited number
of connections, each for a limited time:

- At most `MOST_CONNECTIONS` connections are open, and fewer if the process may open only few files. A connection beyond
  that replaces another one: the oldest connection of the network that has the most connections. A probe needs its
  connection for milliseconds, so it is never the oldest, however many idle connections there are.
- A request must arrive within `REQUEST_SECONDS`, and the client must take its answer within `ANSWER_SECONDS`.
- A network has a share of the thread's CPU time (`admin_share`). When the network has used its share, its requests
  wait. Requests that have waited for `REQUEST_SECONDS` are answered with 429.
- If no descriptor is free, new connections wait in the kernel, and the open connections of this port are closed.
"""

from __future__ import annotations

import asyncio
import errno
import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from ipaddress import IPv6Address
from typing import Any

from definition_server.control_plane.admin_http import Answer, Exchange, Request, text_answer
from definition_server.control_plane.admin_share import CpuShares
from definition_server.observability.line_limit import LineLimit
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

MOST_CONNECTIONS = 64
"""Enough: three Prometheus servers, a kubelet and an operator with a browser hold less than twenty connections."""
DESCRIPTOR_SHARE = 8
"""Connections use at most an eighth of the files that the process may open. The database, workers and snapshots need
the others."""
REQUEST_SECONDS = 5.0
ANSWER_SECONDS = 10.0
"""Prometheus gives up after 10 s by default (scrape_timeout), a kubelet after 1 s."""
LINGER_SECONDS = 1.0
"""After the answer, we read for at most so long, until the client ends its side. A socket that is closed with unread
octets resets the connection, and the client may lose the answer (RFC 9112, 9.6).
"""
BACKLOG = 1024
_ACCEPTED_AT_ONCE = 16
_CHUNK = 16 * 1024
_PAUSE_SECONDS = 0.1
_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))

_FULL = Exchange().answer(
    text_answer(HTTPStatus.SERVICE_UNAVAILABLE, "Too many connections.\n", ("Retry-After", "1")), dated=False
)
_BUSY = Exchange().answer(
    text_answer(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests from this address.\n", ("Retry-After", "5")),
    dated=False,
)
_TOO_LATE = Exchange().answer(text_answer(HTTPStatus.REQUEST_TIMEOUT, "The request took too long.\n"), dated=False)

Respond = Callable[[Request], Answer]


class AdminPort:
    """The listening socket and its connections. Everything but `__init__` runs in one event loop."""

    def __init__(self, listening: socket.socket, respond: Respond) -> None:
        """``respond`` answers a request. It runs in the loop, and must not wait."""
        listening.setblocking(False)
        self._listening = listening
        self._respond = respond
        self._connections: dict[str, dict[_Connection, None]] = {}
        """Network → its connections, in the order of their arrival."""
        self._count = 0
        self._lines = LineLimit()
        self.shares = CpuShares()
        """The CPU time of this thread that each network has used."""
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        share = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else soft // DESCRIPTOR_SHARE
        self._limit = max(2, min(MOST_CONNECTIONS, share))

    def open(self) -> None:
        """Begin to accept connections."""
        self.loop = asyncio.get_running_loop()
        self.loop.add_reader(self._listening, self._accept)

    def close(self) -> None:
        """Close every connection and the port."""
        self.loop.remove_reader(self._listening)
        self._listening.close()
        for connection in self._all():
            connection.close()

    def _all(self) -> list[_Connection]:
        return [connection for connections in self._connections.values() for connection in connections]

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                client, address = self._listening.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in _EXHAUSTED:
                    self._pause(error)
                    return
                continue  # this connection failed before it was accepted (accept(2))
            if self._count >= self._limit:
                self._evict()
            connection = _Connection(self, client, address)
            self._connections.setdefault(connection.network, {})[connection] = None
            self._count += 1
            connection.begin()

    def _evict(self) -> None:
        """Close the oldest connection of the network that holds most."""
        heaviest = max(self._connections.values(), key=len)
        evicted = next(iter(heaviest))
        if (left_out := self._lines.admit(time.monotonic())) is not None:
            log.warning(
                "The admin port is full; its oldest connection was closed",
                peer=evicted.peer,
                connections=self._count,
                of_its_network=len(heaviest),
                **left_out,
            )
        evicted.evict()

    def _pause(self, error: OSError) -> None:
        """Accept no connection for a moment, and close the open connections."""
        if (left_out := self._lines.admit(time.monotonic())) is not None:
            log.error("The admin port cannot accept connections for now", error=error.strerror, **left_out)
        for connection in self._all():
            connection.evict()
        self.loop.remove_reader(self._listening)
        self.loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        if self._listening.fileno() >= 0:
            self.loop.add_reader(self._listening, self._accept)

    def ended(self, connection: _Connection) -> None:
        """Forget ``connection``, which is closed."""
        connections = self._connections[connection.network]
        del connections[connection]
        if not connections:
            del self._connections[connection.network]
        self._count -= 1

    def respond(self, request: Request) -> Answer:
        """The answer to ``request``; status 500 if a bug of ours prevents the answer."""
        try:
            return self._respond(request)
        except Exception as bug:
            log.exception("Unexpected failure in a page of the admin port", page=request.path, exc_info=bug)
            return text_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "A bug of this server; see its log.\n")

    def report(self, peer: str, fault: str) -> None:
        """Log a client's fault, unless many such lines were logged in the last seconds."""
        if (left_out := self._lines.admit(time.monotonic())) is not None:
            log.info("A client of the admin port broke its protocol", peer=peer, error=fault, **left_out)


class _Connection:
    """One client's connection: reads its request, writes the answer, lingers, closes."""

    def __init__(self, port: AdminPort, client: socket.socket, address: Any) -> None:
        client.setblocking(False)
        self._address, self.network = _address_and_network(address[0])
        self._number = address[1]
        self._port = port
        self._socket = client
        self._loop = port.loop
        self._exchange: Exchange | None = None
        """None until something was received, because most connections of a flood never send."""
        self._answered = False
        self._unsent = memoryview(b"")
        self._waiting: asyncio.TimerHandle | None = None
        """Set while the client's network has used more than its share. Nothing is read then."""
        self._timer = self._loop.call_later(REQUEST_SECONDS, self._too_late)

    @property
    def peer(self) -> str:
        """The client's address and port, for the log."""
        return f"[{self._address}]:{self._number}" if ":" in self._address else f"{self._address}:{self._number}"

    def begin(self) -> None:
        """Begin to read. The first attempt is made at once, because most requests have arrived when their connection is
        accepted.
        """
        if not self._waits():
            self._loop.add_reader(self._socket, self._read)
            self._read()

    def _waits(self) -> bool:
        """Whether the connection must wait because its network has used its share. If so, `begin` is called again
        later.
        """
        seconds = self._port.shares.wait(self.network, self._loop.time())
        self._waiting = self._loop.call_later(seconds, self.begin) if seconds else None
        return self._waiting is not None

    def close(self) -> None:
        """Close at once."""
        if self._socket.fileno() < 0:
            return
        self._timer.cancel()
        if self._waiting is not None:
            self._waiting.cancel()
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._port.ended(self)

    def evict(self) -> None:
        """Close, to make room for another connection. If the request is not answered yet, answer with 503 first."""
        if not self._unsent:
            self._send_once(_FULL)
        self.close()

    def _too_late(self) -> None:
        """Answer that the request did not arrive in time."""
        if self._waiting is not None:
            with suppress(OSError):  # otherwise unread octets would reset the connection
                self._socket.recv(_CHUNK)
            self._send_once(_BUSY)
            self._port.report(self.peer, "its address has used more than its share of CPU time")
        elif self._exchange is not None:
            self._send_once(_TOO_LATE)
            self._port.report(self.peer, f"its request was not complete within {REQUEST_SECONDS:g} s")
        self.close()

    def _send_once(self, octets: bytes) -> None:
        # Octets that cannot be sent at once are lost, because the connection is closed now.
        with suppress(OSError):
            self._socket.send(octets)

    def _read(self) -> None:
        began = time.thread_time()
        self._receive()
        self._port.shares.charge(self.network, time.thread_time() - began, self._loop.time())
        if not self._answered and self._socket.fileno() >= 0 and self._waits():
            self._loop.remove_reader(self._socket)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        if self._exchange is None:
            self._exchange = Exchange()
        outcome = self._exchange.receive(data)
        if outcome is None:
            return
        self._answered = True
        if isinstance(outcome, Request):
            outcome = self._exchange.answer(self._port.respond(outcome))
        if self._exchange.fault is not None:
            self._port.report(self.peer, self._exchange.fault)
        self._loop.remove_reader(self._socket)
        self._timer.cancel()
        self._timer = self._loop.call_later(ANSWER_SECONDS, self.close)
        self._unsent = memoryview(outcome)
        self._write()

    def _write(self) -> None:
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            self._loop.add_writer(self._socket, self._write)
        except OSError:
            self.close()
        else:
            self._linger()

    def _linger(self) -> None:
        """Called when everything is sent: end our side, and wait for a limited time until the client ends its side."""
        self._loop.remove_writer(self._socket)
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()
            return
        self._timer.cancel()
        self._timer = self._loop.call_later(LINGER_SECONDS, self.close)
        self._loop.add_reader(self._socket, self._discard)
        self._discard()

    def _discard(self) -> None:
        try:
            ended = not self._socket.recv(_CHUNK)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self.close()


def _address_and_network(host: str) -> tuple[str, str]:
    """A client's address, and its network. The network of an IPv4 address is the address itself; that of an IPv6
    address is its /64, because one host may use any address of a /64.

    A dual-stack socket shows IPv4 addresses mapped into IPv6 (RFC 4291, 2.5.5.2).
    """
    if ":" not in host:
        return host, host
    address = IPv6Address(host.partition("%")[0])
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped), str(address.ipv4_mapped)
    return host, str(IPv6Address(int(address) >> 64 << 64))
