"""Accepting connections on a listening socket that may be shared with other processes.

The socket is watched with ``add_reader`` and accepted from here, rather than left to ``loop.create_server``, for two
reasons: the application can leave a connection to another process (`AcceptPolicy`), and running out of file descriptors
pauses the listener, where otherwise the socket would stay readable and the loop would use a whole core.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
from collections.abc import Callable
from typing import Any, Protocol

from grpc_h2.aio.lingering_close import LINGER
from grpc_h2.aio.protocol import Acceptor, Http2Protocol
from grpc_h2.aio.scheduler import FairScheduler
from grpc_h2.aio.tls import TlsCredentials
from grpc_h2.connection.limits import BACKLOG

log = logging.getLogger("grpc_h2")

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_PAUSE = 0.1
"""Seconds without accepting after the kernel has reported that descriptors or memory are exhausted."""
_RECEIVE_BUFFER = 128 * 1024
"""Octets of a connection that the kernel buffers for us (it doubles that for its own needs). Its default goes up to 6
MB (``tcp_rmem``, tcp(7)); to read those in one go, or to free them at the end, takes milliseconds in which no other
connection is served. A request takes hundreds of octets."""
_KEEPALIVE_SECONDS = 60
"""Between TCP keepalive probes: the kernel notices a peer that vanished, without waking us."""


class AcceptPolicy(Protocol):
    """Decides whether this process accepts the next connection, and counts those that it holds."""

    @property
    def retry_seconds(self) -> float:
        """Seconds until `may_accept` is called again after a refusal."""

    def may_accept(self) -> bool:
        """Whether to accept the connection that waits."""

    def opened(self) -> None:
        """A connection was accepted."""

    def closed(self) -> None:
        """A connection that was accepted has ended."""


class Listener:
    """One listening socket."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        policy: AcceptPolicy | None,
        tls: TlsCredentials | None,
        protocol: Callable[[Acceptor], Http2Protocol],
        has_room: Callable[[], bool],
        handshake_timeout: float,
        scheduler: FairScheduler,
    ) -> None:
        """
        Args:
            listening: The socket. `stop` closes it.
            policy: Decides about each connection; None: all are accepted.
            tls: The certificate; None: cleartext.
            protocol: Makes the protocol of a connection that this listener accepts.
            has_room: Whether one more connection may be held.
            handshake_timeout: Seconds for the TLS handshake.
            scheduler: Accepting is deferred to it, like the rest of a connection's work.
        """
        listening.setblocking(False)
        if listening.family in (socket.AF_INET, socket.AF_INET6):
            # Accepted connections inherit these options.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_SECONDS)
        self.socket = listening
        self._scheduler = scheduler
        self._deferred = False
        self._policy = policy
        self._tls = tls
        self._protocol = protocol
        self._has_room = has_room
        self._handshake_timeout = handshake_timeout
        self._counted: set[Http2Protocol] = set()
        """Connections that ``policy`` was informed of."""
        self._pending: set[Http2Protocol] = set()
        self._pause_timer: asyncio.TimerHandle | None = None
        self._setups: set[asyncio.Task[None]] = set()
        self._exhausted_logged = False
        self._full_logged = False

    @property
    def busy(self) -> bool:
        """Whether connections are still being set up."""
        return bool(self._setups)

    @property
    def pending(self) -> int:
        """Accepted connections that the server does not count yet: their TLS handshake is not done."""
        return len(self._pending)

    def start(self) -> None:
        """Accept from now on. To be called in the loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self._readable)

    def stop(self) -> None:
        """Stop accepting, cancel unfinished handshakes, and close the socket (in this process)."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        if self.socket.fileno() >= 0:
            self._loop.remove_reader(self.socket.fileno())
            self.socket.close()
        if self._tls is not None:  # without a handshake they end in the next loop iteration
            for task in self._setups:
                task.cancel()

    def established(self, protocol: Http2Protocol) -> None:
        """See `Acceptor.established`."""
        self._pending.discard(protocol)

    def closed(self, protocol: Http2Protocol) -> None:
        """See `Acceptor.closed`."""
        if protocol in self._counted and self._policy is not None:
            self._counted.discard(protocol)
            self._policy.closed()

    def _readable(self) -> None:
        """A connection waits; the kernel reports that in each iteration of the loop. Accepting is deferred, so that
        open connections do not wait for a crowd of new ones."""
        if not self._deferred:
            self._deferred = True
            self._scheduler.defer(self._loop, self._accept)

    def _accept(self) -> bool:
        """Accept one connection. True: its setup continues in the next loop iterations, so the time slice ends."""
        self._deferred = False
        if self._pause_timer is not None or self.socket.fileno() < 0:
            return False
        # One for each report of the kernel: the policy is asked about a connection that really waits.
        if self._policy is not None and not self._policy.may_accept():
            self._pause(self._policy.retry_seconds)
            return False
        try:
            connection, _ = self.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # another process was faster, or the client has gone
        except OSError as error:
            self._cannot_accept(error)
            return False
        self._exhausted_logged = False
        self._admit(connection)
        return True

    def _cannot_accept(self, error: OSError) -> None:
        """Log and pause, because the socket stays readable after any error of accept(2), even a network error of the
        connection."""
        if error.errno not in _EXHAUSTED:
            log.warning("Cannot accept a connection", extra={"error": str(error)})
        elif not self._exhausted_logged:
            self._exhausted_logged = True
            log.error("Cannot accept connections for now", extra={"error": str(error)})
        self._pause(_PAUSE)

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self.socket.fileno())
        self._pause_timer = self._loop.call_later(seconds, self._resume)

    def _resume(self) -> None:
        self._pause_timer = None
        self._loop.add_reader(self.socket.fileno(), self._readable)

    def _admit(self, connection: socket.socket) -> None:
        if not self._has_room():
            connection.close()
            if not self._full_logged:
                self._full_logged = True
                log.warning("Connections are refused: the limit is reached")
            return
        self._full_logged = False
        connection.setblocking(False)
        protocol = self._protocol(self)
        self._pending.add(protocol)
        if self._policy is not None:
            self._counted.add(protocol)
            self._policy.opened()
        task = self._loop.create_task(self._connect(protocol, connection))
        self._setups.add(task)
        task.add_done_callback(functools.partial(self._set_up, protocol, connection))

    async def _connect(self, protocol: Http2Protocol, connection: socket.socket) -> None:
        context = None if self._tls is None else self._tls.context
        tls: dict[str, Any] = {}
        if context is not None:
            tls = {
                "ssl": context,
                "ssl_handshake_timeout": self._handshake_timeout,
                # The wait for the peer's close_notify; asyncio's 30 s would hold memory for a dead peer.
                "ssl_shutdown_timeout": LINGER,
            }
        try:
            await self._loop.connect_accepted_socket(lambda: protocol, connection, **tls)
        except OSError as error:  # TimeoutError and ssl.SSLError are subclasses
            log.info("A connection was not established", extra={"error": str(error)})

    def _set_up(self, protocol: Http2Protocol, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._setups.discard(task)
        self._pending.discard(protocol)
        if not protocol.established:  # `connection_lost` will not be called
            connection.close()
            self.closed(protocol)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("A connection was not established", exc_info=error)


def listen(address: str, *, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket on ``host:port``, or ``[host]:port`` where the host is IPv6. Port 0 is any free port.

    Raises:
        ValueError: where ``address`` has another form.
        OSError: where the address cannot be bound.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or (":" in host and not host.startswith("[")):
        raise ValueError(f"not an address: {address!r}; give host:port, or [host]:port for IPv6")
    host = host.removeprefix("[").removesuffix("]")
    entries = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, bound = entries[0]
    return socket.create_server(
        bound[:2],
        family=family,
        backlog=backlog,
        dualstack_ipv6=family == socket.AF_INET6 and bound[0] == "::" and socket.has_dualstack_ipv6(),
    )
