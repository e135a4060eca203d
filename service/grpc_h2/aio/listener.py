"""Accepting connections on a listening socket that may be shared with other processes.

The socket is watched with ``add_reader`` and accepted from here, rather than left to ``loop.create_server``: so the
application can leave a connection to another process (`Gate`), and running out of file descriptors is a pause, not a
loop that eats a core because the socket stays readable.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
from collections.abc import Callable
from typing import Any, Protocol

from grpc_h2.aio.protocol import LINGER, Http2Protocol
from grpc_h2.aio.scheduler import FairScheduler
from grpc_h2.aio.tls import TlsCredentials

log = logging.getLogger("grpc_h2")

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_PAUSE = 0.1
"""Seconds without accepting after the machine said that it has no more room."""
_RECEIVE_BUFFER = 128 * 1024
"""Octets of a connection that the kernel keeps for us (it doubles that for its own needs). By itself it would go up to
6 MB (``tcp_rmem``, tcp(7)): read in one go, or freed at the end, that is milliseconds in which nobody else is served.
A request takes hundreds of octets."""
_KEEPALIVE_SECONDS = 60
"""Between TCP keepalive probes: a peer that vanished is noticed by the kernel, without waking us."""


class Gate(Protocol):
    """Decides whether this process takes the next connection, and counts those it holds."""

    @property
    def retry_seconds(self) -> float:
        """When to ask again after a refusal."""

    def may_accept(self) -> bool:
        """Whether to accept the connection that waits."""

    def opened(self) -> None:
        """A connection was accepted."""

    def closed(self) -> None:
        """A connection that was accepted is gone."""


class Listener:
    """One listening socket."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        gate: Gate | None,
        tls: TlsCredentials | None,
        protocol: Callable[[], Http2Protocol],
        has_room: Callable[[], bool],
        handshake_timeout: float,
        turns: FairScheduler,
    ) -> None:
        """``protocol`` makes the protocol of a connection, ``has_room`` says whether one more may be held. A connection
        is accepted when it is its turn."""
        listening.setblocking(False)
        if listening.family in (socket.AF_INET, socket.AF_INET6):
            # Connections inherit what their listening socket has.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
        self.socket = listening
        self._turns = turns
        self._queued = False
        self._gate = gate
        self._tls = tls
        self._protocol = protocol
        self._has_room = has_room
        self._handshake_timeout = handshake_timeout
        self._gated: set[Http2Protocol] = set()
        self._pending: set[Http2Protocol] = set()
        self._pausing: asyncio.TimerHandle | None = None
        self._adopting: set[asyncio.Task[None]] = set()
        self._told_exhausted = False
        self._told_full = False

    @property
    def busy(self) -> bool:
        """Whether connections are still being set up."""
        return bool(self._adopting)

    @property
    def pending(self) -> int:
        """Connections accepted of which the server does not know yet: their TLS handshake is not done."""
        return len(self._pending)

    def start(self) -> None:
        """Accept from now on. To be called in the loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self._knocked)

    def stop(self) -> None:
        """Accept no more, and give up handshakes that are not done. Closes the socket (in this process)."""
        if self._pausing is not None:
            self._pausing.cancel()
            self._pausing = None
        if self.socket.fileno() >= 0:
            self._loop.remove_reader(self.socket.fileno())
            self.socket.close()
        if self._tls is not None:  # without a handshake, they are through in a turn of the loop
            for task in self._adopting:
                task.cancel()

    def established(self, shell: Http2Protocol) -> None:
        """``shell``'s connection has begun, whichever listener accepted it."""
        self._pending.discard(shell)

    def closed(self, shell: Http2Protocol) -> None:
        """``shell``'s connection is gone, whichever listener accepted it."""
        if shell in self._gated and self._gate is not None:
            self._gated.discard(shell)
            self._gate.closed()

    def _knocked(self) -> None:
        """A connection waits. The kernel says so again and again; those that are open do not wait for a crowd."""
        if not self._queued:
            self._queued = True
            self._turns.join(self._loop, self._accept)

    def _accept(self) -> bool:
        """Take one connection. It is set up in the loop's next turns, so this is the last turn of its slice."""
        self._queued = False
        if self._pausing is not None or self.socket.fileno() < 0:
            return False
        # One for each time the kernel says so: a gate is asked about a connection that really waits.
        if self._gate is not None and not self._gate.may_accept():
            self._pause(self._gate.retry_seconds)
            return False
        try:
            connection, _ = self.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # another process was faster, or the client has gone
        except OSError as error:
            self._cannot_accept(error)
            return False
        self._told_exhausted = False
        self._admit(connection)
        return True

    def _cannot_accept(self, error: OSError) -> None:
        """Whatever accept says (Linux hands on network errors of the connection, too), the socket stays readable."""
        if error.errno not in _EXHAUSTED:
            log.warning("Cannot accept a connection", extra={"error": str(error)})
        elif not self._told_exhausted:
            self._told_exhausted = True
            log.error("Cannot accept connections for now", extra={"error": str(error)})
        self._pause(_PAUSE)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self.socket.fileno())
        self._pausing = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._pausing = None
        self._loop.add_reader(self.socket.fileno(), self._knocked)

    def _admit(self, connection: socket.socket) -> None:
        if not self._has_room():
            connection.close()
            if not self._told_full:
                self._told_full = True
                log.warning("Connections are refused: the limit is reached")
            return
        self._told_full = False
        connection.setblocking(False)
        shell = self._protocol()
        self._pending.add(shell)
        if self._gate is not None:
            self._gated.add(shell)
            self._gate.opened()
        task = self._loop.create_task(self._adopt(shell, connection))
        self._adopting.add(task)
        task.add_done_callback(functools.partial(self._adopted, shell, connection))

    async def _adopt(self, shell: Http2Protocol, connection: socket.socket) -> None:
        context = None if self._tls is None else self._tls.context
        tls: dict[str, Any] = {}
        if context is not None:
            tls = {
                "ssl": context,
                "ssl_handshake_timeout": self._handshake_timeout,
                # How long the peer's close_notify is waited for; asyncio's 30 s would hold memory for a dead peer.
                "ssl_shutdown_timeout": LINGER,
            }
        try:
            await self._loop.connect_accepted_socket(lambda: shell, connection, **tls)
        except OSError as error:  # TimeoutError and ssl.SSLError are its children
            log.info("A connection was not established", extra={"error": str(error)})

    def _adopted(self, shell: Http2Protocol, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._adopting.discard(task)
        self._pending.discard(shell)
        if not shell.established:  # nobody else will report its end
            connection.close()
            self.closed(shell)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("A connection was not established", exc_info=error)


def listen(address: str, *, backlog: int = 4096) -> socket.socket:
    """A listening socket on ``host:port``, ``[host]:port`` where the host is IPv6; port 0 is any that is free.

    Raises:
        ValueError: where it is no such address.
        OSError: where the address cannot be had.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or (":" in host and not host.startswith("[")):
        raise ValueError(f"not an address: {address!r}; host:port, or [host]:port, is one")
    host = host.removeprefix("[").removesuffix("]")
    entries = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, bound = entries[0]
    return socket.create_server(
        bound[:2],
        family=family,
        backlog=backlog,
        dualstack_ipv6=family == socket.AF_INET6 and bound[0] == "::" and socket.has_dualstack_ipv6(),
    )
