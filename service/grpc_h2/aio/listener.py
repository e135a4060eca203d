"""Accepting connections on a listening socket that may be shared with other processes.

This module watches the socket with ``add_reader`` and accepts itself, and does not use ``loop.create_server``, for two
reasons. First, the application can leave a connection to another process (`AcceptPolicy`). Second, the listener pauses
when file descriptors run out: otherwise the socket would stay readable, and the loop would use a whole core.

Accepting has a share of its own in every iteration of the loop (`ACCEPT_SLICE`). It does not wait for the deferred work
of other connections, because an attacker can cause any amount of such work. It takes no more than its share, so that
open connections do not wait for many new ones. accept(2) is cheap, and takes connections in the order in which the
kernel queued them; to set up a connection (transport and protocol, over TLS the handshake) costs ten times as much. So
an accepted connection is counted at once, but is set up in a time slice of the scheduler, unless it is the only new
connection. In the scheduler the networks of the peers take turns, so a new connection from one address does not wait
for the many connections of another. Over TLS, each step of the handshake waits for a time slice in the same way
(`arrival`).

Over TLS, the first octets of a connection are examined before the handshake: a health check that connects and leaves
causes no handshake and no log line, a peer that does not speak TLS gets an answer in its own protocol (`foreign`), and
a TLS client that does not offer h2 gets an alert.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import Any, Protocol

from grpc_h2.aio.admission import REASONS, Admission, Refusal, Trust
from grpc_h2.aio.arrival import Arrival, Handshake
from grpc_h2.aio.client_hello import offered_protocols
from grpc_h2.aio.foreign import NO_APPLICATION_PROTOCOL, SECURE, goaway, recognise
from grpc_h2.aio.handshakes import Handshakes
from grpc_h2.aio.lingering_close import LINGER
from grpc_h2.aio.listening_options import set_listening_options
from grpc_h2.aio.peer import peer_text
from grpc_h2.aio.protocol import Acceptor, Http2Protocol
from grpc_h2.aio.rate_limited_log import RateLimitedLog
from grpc_h2.aio.scheduler import FairScheduler, Share
from grpc_h2.aio.tls import TlsCredentials
from grpc_h2.aio.tls_transport import TlsTransport
from grpc_h2.connection.limits import BACKLOG
from grpc_h2.wire.errors import ErrorCode

log = logging.getLogger("grpc_h2")

_EXHAUSTED = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
_PAUSE = 0.1
"""Seconds without accepting after the kernel has reported that descriptors or memory are exhausted."""
ACCEPT_SLICE = 0.0001
"""Seconds of accepting in one iteration of the loop; the connection during which they end is the last one of the
iteration. They are enough for about four connections, whereas one connection is set up in an iteration. So the kernel's
queue, in which networks do not take turns, stays short."""
_PEEKED = 16 * 1024
"""Octets of a TLS connection that are examined before its handshake: a ClientHello has some hundreds to 2,000
octets."""


_TOO_MANY = "its handshake was not finished when there was no room for the next"

Objection = Callable[[socket.socket], str | None]
"""Returns the reason why an accepted connection is to be refused, or None. It is called before any octet is read from
the connection, and must not wait."""


class AcceptPolicy(Protocol):
    """Decides whether this process accepts the next connection, and counts the connections that this process holds."""

    @property
    def retry_seconds(self) -> float:
        """Seconds until `may_accept` is called again after a refusal."""

    def may_accept(self) -> bool:
        """Whether to accept the connection that waits."""

    def opened(self) -> None:
        """A connection was accepted."""

    def closed(self) -> None:
        """A connection that was accepted has ended."""

    def vouched(self) -> None:
        """A connection has become a client's."""

    def unvouched(self) -> None:
        """A client's connection has ended."""

    def refused(self, refusal: Refusal) -> None:
        """A connection was refused or closed although nothing that it sent is wrong."""


class Listener:
    """One listening socket."""

    def __init__(
        self,
        listening: socket.socket,
        *,
        policy: AcceptPolicy | None,
        tls: TlsCredentials | None,
        objection: Objection | None,
        protocol: Callable[[Acceptor, Any], Http2Protocol],
        admission: Admission,
        scheduler: FairScheduler,
        handshake_timeout: float,
        client_log: RateLimitedLog,
    ) -> None:
        """
        Args:
            listening: The socket. `stop` closes it.
            policy: Decides whether to accept each connection; None: all are accepted.
            tls: The certificate; None: cleartext.
            objection: Returns why a connection is refused; None: no connection is refused.
            protocol: Makes the protocol for an accepted connection; its argument is the address of the peer.
            admission: Decides whether one more connection may be held.
            scheduler: Gives accepted connections their time slices.
            handshake_timeout: Seconds for the TLS handshake.
            client_log: For log lines about clients.
        """
        listening.setblocking(False)
        with suppress(PermissionError):  # the process that made the socket has set them, if this one is confined
            set_listening_options(listening)
        self.socket = listening
        self._policy = policy
        self._tls = tls
        self._objection = objection
        self._protocol = protocol
        self._admission = admission
        self._scheduler = scheduler
        self._client_log = client_log
        self._handshake_timeout = handshake_timeout
        self._counted: dict[Http2Protocol, bool] = {}
        """Connections that were reported to ``policy`` → whether they were also reported as connections of clients."""
        self._pause_timer: asyncio.TimerHandle | None = None
        self._setups: dict[Http2Protocol, asyncio.Task[None]] = {}
        self._waiting: set[Http2Protocol] = set()
        """Connections that wait for a time slice, or for their peer."""
        self._silent: set[Http2Protocol] = set()
        """Connections that have not sent the beginning of a handshake yet."""
        self._handshakes = {share: Handshakes() for share in (Share.ARRIVALS, Share.RETURNING)}
        """The handshakes by share, counted separately, so that a handshake from the address of a client never makes
        room for a stranger's handshake."""
        self._exhausted_logged = False

    @property
    def busy(self) -> bool:
        """Whether connections are still being set up."""
        return bool(self._setups)

    def start(self) -> None:
        """Start to accept. To be called in the loop that serves."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self._readable)

    def stop(self) -> None:
        """Stop accepting, drop connections whose handshake has not begun, and close the socket (in this process)."""
        if self._pause_timer is not None:
            self._pause_timer.cancel()
            self._pause_timer = None
        if self.socket.fileno() >= 0:
            self._loop.remove_reader(self.socket.fileno())
            self.socket.close()
        for protocol in self._silent:
            self._setups[protocol].cancel()

    async def finish(self, seconds: float) -> None:
        """Finish setting up the connections that were accepted before `stop`, and drop connections that are not ready
        in time."""
        if self._setups and seconds > 0:
            await asyncio.wait(list(self._setups.values()), timeout=seconds)
        for protocol, task in self._setups.items():
            if protocol in self._waiting:
                task.cancel()
        if self._setups:  # the other connections do not wait for their peers
            await asyncio.wait(list(self._setups.values()), timeout=LINGER)

    def vouched(self, protocol: Http2Protocol) -> None:
        """See `Acceptor.vouched`."""
        self._admission.vouched(protocol)
        if protocol.trust is Trust.CLIENT and self._counted.get(protocol) is False and self._policy is not None:
            self._counted[protocol] = True
            self._policy.vouched()

    def abandon(self, protocol: Http2Protocol) -> None:
        """See `Acceptor.abandon`."""
        task = self._setups.get(protocol)
        if task is not None:
            task.cancel()

    def dismissed(self, protocol: Http2Protocol, refusal: Refusal) -> None:
        """See `Acceptor.dismissed`."""
        if refusal is Refusal.NO_CALL:
            self._log(logging.INFO, "A connection was closed", protocol.peer, error=REASONS[refusal])
        else:
            self._log(logging.WARNING, "A connection was closed", protocol.peer, error=REASONS[refusal])
        if self._policy is not None:
            self._policy.refused(refusal)

    def closed(self, protocol: Http2Protocol) -> None:
        """See `Acceptor.closed`."""
        self._admission.gone(protocol)
        client = self._counted.pop(protocol, None)
        if client is not None and self._policy is not None:
            self._policy.closed()
            if client:
                self._policy.unvouched()

    def _log(self, level: int, message: str, peer: str, **fields: Any) -> None:
        self._client_log.log(self._loop.time(), level, message, lambda: peer, **fields)

    def _readable(self) -> None:
        """Accept waiting connections. The kernel reports them in each iteration of the loop."""
        end = perf_counter() + ACCEPT_SLICE
        while self._accept() and perf_counter() < end:
            pass

    def _accept(self) -> bool:
        """Accept one connection. Returns whether another may wait."""
        if self._pause_timer is not None or self.socket.fileno() < 0:
            return False
        # Accept one connection for each report of the kernel, so that the policy is asked only about a connection that
        # really waits.
        if self._policy is not None and not self._policy.may_accept():
            self._pause(self._policy.retry_seconds)
            return False
        try:
            connection, address = self.socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return False  # another process was faster, or the client has gone
        except OSError as error:
            self._cannot_accept(error)
            return False
        self._exhausted_logged = False
        self._admit(connection, address)
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

    def _admit(self, connection: socket.socket, address: Any) -> None:
        connection.setblocking(False)
        if self._objection is not None and (reason := self._objection(connection)) is not None:
            self._log(logging.WARNING, "A connection was refused", peer_text(address), error=reason)
            _answer_and_close(
                connection, b"" if self._tls is not None else goaway(ErrorCode.INADEQUATE_SECURITY, reason)
            )
            return
        protocol = self._protocol(self, address)
        host = address[0] if isinstance(address, tuple) and address else ""
        refusal = self._admission.admit(protocol, host, self._loop)
        if refusal is not None:
            self._refuse(connection, address, refusal)
            return
        if self._policy is not None:
            self._counted[protocol] = False
            self._policy.opened()
        self._waiting.add(protocol)
        task = self._setups[protocol] = self._loop.create_task(self._connect(protocol, connection, address))
        task.add_done_callback(functools.partial(self._set_up, protocol, connection))

    def _refuse(self, connection: socket.socket, address: Any, refusal: Refusal) -> None:
        reason = REASONS[refusal]
        self._log(logging.WARNING, "A connection was refused", peer_text(address), error=reason)
        _answer_and_close(connection, b"" if self._tls is not None else goaway(ErrorCode.ENHANCE_YOUR_CALM, reason))
        if self._policy is not None:
            self._policy.refused(refusal)

    async def _connect(self, protocol: Http2Protocol, connection: socket.socket, address: Any) -> None:
        made: Callable[[], asyncio.Protocol] = lambda: protocol  # noqa: E731
        arrival = Arrival(
            connection,
            self._loop,
            self._scheduler,
            protocol.arrival,
            protocol.network,
            seconds=self._handshake_timeout,
        )
        try:
            if self._tls is None:
                await arrival.time_slice()
            else:
                secured = await self._secure(protocol, arrival, connection, address)
                if secured is None:
                    return
                made = functools.partial(TlsTransport, self._loop, protocol, secured)
            self._waiting.discard(protocol)
            await self._loop.connect_accepted_socket(made, connection)
        except OSError as error:  # TimeoutError and ssl.SSLError are subclasses
            self._log(logging.INFO, "A connection was not established", peer_text(address), error=_text(error))

    async def _secure(
        self, protocol: Http2Protocol, arrival: Arrival, connection: socket.socket, address: Any
    ) -> Handshake | None:
        """Do the handshake. Returns None if the peer's first octets cannot lead to h2: the peer has its answer then,
        and the connection is closed.

        Raises:
            TimeoutError: if the peer takes too long.
            OSError: if the handshake fails, or the connection breaks.
        """
        assert self._tls is not None
        octets = arrival.peek(_PEEKED)
        if octets is None:
            self._silent.add(protocol)
            try:
                await arrival.octets(functools.partial(self._silent.discard, protocol))
            finally:
                self._silent.discard(protocol)
            octets = arrival.peek(_PEEKED)
        else:
            await arrival.time_slice()
        if not octets or not self._speaks_tls(octets, connection, address):
            return None
        handshakes = self._handshakes[protocol.arrival]
        handshakes.begin(protocol, protocol.network, functools.partial(self._give_way, protocol))
        try:
            return await arrival.shake_hands(self._tls.context)
        finally:
            handshakes.end(protocol, protocol.network)

    def _give_way(self, protocol: Http2Protocol) -> None:
        self._log(logging.INFO, "A connection was not established", protocol.peer, error=_TOO_MANY)
        self.abandon(protocol)

    def _speaks_tls(self, octets: bytes, connection: socket.socket, address: Any) -> bool:
        """Whether the first octets begin a handshake that can lead to h2; otherwise the peer gets an answer, and the
        connection is closed."""
        foreign = recognise(octets, speaks=SECURE, whole=True)
        if foreign is not None:
            self._log(logging.INFO, "A client does not speak TLS", peer_text(address), received=foreign.name)
            _answer_and_close(connection, foreign.answer)
            return False
        protocols = offered_protocols(octets)
        if protocols is not None and b"h2" not in protocols:
            self._log(logging.INFO, "A client did not negotiate h2", peer_text(address))
            _answer_and_close(connection, NO_APPLICATION_PROTOCOL)
            return False
        return True

    def _set_up(self, protocol: Http2Protocol, connection: socket.socket, task: asyncio.Task[None]) -> None:
        self._setups.pop(protocol, None)
        self._waiting.discard(protocol)
        if not protocol.established:  # `connection_lost` will not be called
            connection.close()
            self.closed(protocol)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("A connection was not established", exc_info=error)


def _answer_and_close(connection: socket.socket, answer: bytes) -> None:
    """Send a few octets and close. The octets that the peer has sent are read first, because the kernel would send RST
    for unread ones, and RST may overtake the answer."""
    with suppress(OSError):
        if answer:
            connection.send(answer)
            connection.shutdown(socket.SHUT_WR)
        connection.recv(_PEEKED)
    connection.close()


def _text(error: OSError) -> str:
    """The error's text. The exception of a timeout has no text, so this function supplies one."""
    return str(error) or ("timed out" if isinstance(error, TimeoutError) else type(error).__name__)


def listen(address: str, *, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket on ``host:port``, or ``[host]:port`` if the host is IPv6. Port 0 is any free port.

    Raises:
        ValueError: if ``address`` has another form.
        OSError: if the address cannot be bound.
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
