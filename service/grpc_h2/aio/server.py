"""The server: it registers methods, accepts connections, and gives calls their handlers.

`Server` has the interface of ``grpc.aio.Server``: generated ``add_…Servicer_to_server`` functions, the health and
reflection servicers of grpcio and interceptors work with it unchanged. gRPC itself is not imported; its objects are
recognized by their attributes. Two methods are additions to that interface: `Server.add_static_unary`, and
`Server.add_listener` for existing listening sockets.

A stop has three stages. First, no new connection is accepted, and connections drain. When the grace period is over,
calls are ended with UNAVAILABLE. Then the remaining connections are closed.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from math import inf
from typing import Any

from grpc_h2.aio.admission import Admission, Trust, network_of
from grpc_h2.aio.call import EOF, ServicerContext
from grpc_h2.aio.handlers import HandlerCallDetails, Run
from grpc_h2.aio.lingering_close import LINGER
from grpc_h2.aio.listener import AcceptPolicy, Listener, Objection, listen
from grpc_h2.aio.protocol import Acceptor, Http2Protocol
from grpc_h2.aio.rate_limited_log import RateLimitedLog
from grpc_h2.aio.scheduler import FairScheduler
from grpc_h2.aio.stalled import StalledPeers
from grpc_h2.aio.tls import TlsCredentials
from grpc_h2.connection.budget import Budget
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.stream import Stream
from grpc_h2.rpc.status import StatusCode
from grpc_h2.static.answer_cache import Lookup
from grpc_h2.static.routes import Authorize, Router, StaticUnary

log = logging.getLogger("grpc_h2")

_UNWINDING = 1.0
"""The seconds that cancelled handlers have for their clean-up."""

_STALL_CHECK_SECONDS = 1.0

_FIRST_CALL = 0.1
"""Seconds from the stop after which a connection drains that was accepted but not set up at the stop. So a call that
its client has sent meanwhile is served."""

Observe = Callable[[list[int], float], None]


def _unobserved(answer_ids: list[int], seconds: float) -> None:
    """Ignore a batch of ready answers."""


class Server:
    """Serves RPCs. Its methods are to be called in the loop's thread; RPC methods are registered before `start`."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        interceptors: Sequence[Any] = (),
        max_concurrent_calls: int | None = None,
        max_connections: int | None = None,
        max_connections_per_peer: int | None = None,
        first_call_timeout: float = inf,
        trust: Callable[[str], Trust] | None = None,
        executor: Executor | None = None,
        compression: Any = None,
        observe: Observe | None = None,
        eof: Any = EOF,
    ) -> None:
        """
        Args:
            limits: Limits of each connection.
            interceptors: As in grpc.aio, objects with ``async intercept_service(continuation, handler_call_details)``.
            max_concurrent_calls: Further calls fail with RESOURCE_EXHAUSTED.
            max_connections: A further connection takes the place of an idle connection whose peer has proved nothing,
                or one of a few reserved places: see `Admission`.
            max_connections_per_peer: Further connections from one address are closed.
            first_call_timeout: Seconds until the first call that the server admits; a connection without such a call
                is drained then.
            trust: Path of a handler's call → the trust that such a call proves. Without this argument, every call
                that has a handler proves that the peer is a client. An authorized call of a static method proves the
                same.
            executor: Runs handlers that are ordinary functions; without one, a pool is made when it is needed.
            compression: A ``grpc.Compression`` for all calls.
            observe: Called with each batch of ready answers: their answer ids, and the seconds from reading to writing.
            eof: The result of ``context.read()`` after the last message (``grpc.aio.EOF`` for servicers that compare).
        """
        self.limits = limits = Limits() if limits is None else limits
        self.router = Router()
        self.timer_slack = _timer_slack(limits)
        self.budget = Budget(limits.max_held)
        self.strangers = Budget(min(limits.max_held, limits.max_held_by_strangers))
        self._interceptors = tuple(interceptors)
        self._max_calls = max_concurrent_calls
        self.admission = Admission(
            max_connections=max_connections,
            max_per_peer=max_connections_per_peer,
            first_call_timeout=first_call_timeout,
        )
        self._trust = trust
        self._executor = executor
        self._own_executor: ThreadPoolExecutor | None = None
        self._compression = 0 if compression is None else int(getattr(compression, "value", compression))
        self.client_log = RateLimitedLog(log)
        self.scheduler = FairScheduler()
        self.observe = observe or _unobserved
        """See `Host.observe`. This is an attribute and not a method, because it is called with every batch."""
        self._eof = eof
        self._generic: list[Any] = []
        self._methods: dict[str, Any] = {}
        self._listeners: list[Listener] = []
        self._protocols: set[Http2Protocol] = set()
        self._calls: set[ServicerContext] = set()
        self._started = False
        self._stopping = False
        self._grace_over = False
        self._changed = asyncio.Event()
        self._ended = asyncio.Event()

    # -- what is served -------------------------------------------------------------------------------------------

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[Any]) -> None:
        """Register objects whose ``service(handler_call_details)`` returns a method handler or None."""
        self._generic += generic_rpc_handlers

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Register the methods of a service by name; they have precedence over generic handlers."""
        for method, handler in method_handlers.items():
            self._methods[f"/{service_name}/{method}"] = handler

    def add_static_unary(self, path: str, lookup: Lookup, authorize: Authorize | None = None) -> StaticUnary:
        """Serve ``path`` with ready answers: see `Router.add_static_unary`."""
        return self.router.add_static_unary(path, lookup, authorize)

    def limit_requests(self, path: str, octets: int) -> None:
        """Limit the messages of requests of ``path``: see `Router.limit_requests`."""
        self.router.limit_requests(path, octets)

    async def cut_answers(self, before: float) -> None:
        """Give up answers that are complete and have waited to be read since the instant ``before`` of the loop's
        clock, or longer, so that their memory is released. The work is spread over time."""

        def steps() -> Iterator[None]:
            for protocol in list(self._protocols):
                protocol.cut_answers(before)
                yield

        await self.scheduler.spread(steps())

    def forget_authorizations(self) -> None:
        """Make static methods authorize calls anew, also on open connections."""
        self.router.forget_authorizations()

    # -- listening ------------------------------------------------------------------------------------------------

    def add_insecure_port(self, address: str) -> int:
        """Listen on ``host:port`` (``[host]:port`` for IPv6; port 0: any). Returns the port.

        Raises:
            ValueError: if ``address`` has another form.
            OSError: if the address cannot be bound.
        """
        return self._add_port(address, None)

    def add_secure_port(self, address: str, server_credentials: TlsCredentials) -> int:
        """`add_insecure_port`, with TLS."""
        return self._add_port(address, server_credentials)

    def _add_port(self, address: str, tls: TlsCredentials | None) -> int:
        listening = listen(address)
        self.add_listener(listening, tls=tls)
        return int(listening.getsockname()[1])

    def add_listener(
        self,
        listening: socket.socket,
        *,
        policy: AcceptPolicy | None = None,
        tls: TlsCredentials | None = None,
        objection: Objection | None = None,
    ) -> None:
        """Accept from a listening socket, which may be shared with other processes; ``policy`` decides about each
        connection. `stop` closes the socket in this process.

        The socket may be a Unix socket. ``objection`` is called with each accepted connection. If it returns a text,
        the connection is refused, and the peer gets the text in a GOAWAY.
        """
        listener = Listener(
            listening,
            policy=policy,
            tls=tls,
            objection=objection,
            protocol=self._make_protocol,
            admission=self.admission,
            scheduler=self.scheduler,
            handshake_timeout=self.limits.preface_timeout,
            client_log=self.client_log,
        )
        self._listeners.append(listener)
        if self._started and not self._stopping:
            listener.start()

    def _make_protocol(self, acceptor: Acceptor, address: Any) -> Http2Protocol:
        network = network_of(address[0]) if isinstance(address, tuple) and address else ""
        returning = self.admission.knows(network)
        return Http2Protocol(self, self._loop, acceptor, address, network=network, returning=returning)

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._protocols)

    @property
    def open_calls(self) -> int:
        """Calls whose handler runs."""
        return len(self._calls)

    # -- start and stop -------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to accept connections. Raises RuntimeError if called twice."""
        if self._started:
            raise RuntimeError("the server has been started before")
        self._started = True
        self._loop = asyncio.get_running_loop()
        self.client_log.report_later(self._loop)
        for listener in self._listeners:
            listener.start()

    async def stop(self, grace: float | None) -> None:
        """Accept no more connections; let calls finish for up to ``grace`` seconds (None: 0), then end them.

        May be called again, also while an earlier call waits: the shortest grace applies. Returns when every connection
        is closed and all handlers have ended, or have had a second to end after they were cancelled.
        """
        if not self._started:
            for listener in self._listeners:
                listener.socket.close()
            self._ended.set()
            return
        if not self._stopping:
            self._stopping = True
            self.admission.stop()
            for listener in self._listeners:
                listener.stop()
            for protocol in list(self._protocols):
                protocol.drain()
            # Connections that are already accepted are still served: each drains once it is set up.
            settling = min(grace or 0.0, LINGER)
            await asyncio.gather(*(listener.finish(settling) for listener in self._listeners))
        if grace:
            dropping = asyncio.create_task(self._drop_stalled())
            try:
                await self._until(lambda: not self._protocols and not self._calls, grace)
            finally:
                dropping.cancel()
        self._grace_over = True
        for call in list(self._calls):
            call.terminate(StatusCode.UNAVAILABLE, "The server is stopping")
        if not await self._until(lambda: not self._calls, _UNWINDING):
            log.warning("Handlers do not end although cancelled", extra={"count": len(self._calls)})
        for protocol in list(self._protocols):
            protocol.close(reason="the server has stopped")
        await self._until(lambda: not self._protocols, LINGER)
        for protocol in list(self._protocols):
            protocol.abort()
        await self._until(
            lambda: not self._protocols and not any(listener.busy for listener in self._listeners), LINGER
        )
        if self._own_executor is not None:
            self._own_executor.shutdown(wait=False, cancel_futures=True)
        self.client_log.close()
        self._ended.set()

    async def _drop_stalled(self) -> None:
        """Drop connections whose peers read nothing, until this coroutine is cancelled."""
        stalled = StalledPeers()

        def steps() -> Iterator[None]:
            for protocol in stalled.check(list(self._protocols), self._loop.time()):
                if protocol is not None:
                    protocol.drop_stalled()
                yield

        while True:
            await self.scheduler.spread(steps())
            await asyncio.sleep(_STALL_CHECK_SECONDS)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """Wait until the server has stopped. Returns True if ``timeout`` seconds passed before the server stopped."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            return True
        return False

    async def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait for ``condition``, which is checked when a call or a connection ends. Returns whether it became true."""
        deadline = self._loop.time() + seconds
        while not condition():
            self._changed.clear()
            left = deadline - self._loop.time()
            if left <= 0:
                return False
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)
        return True

    # -- called by protocols --------------------------------------------------------------------------------------

    def connected(self, protocol: Http2Protocol) -> None:
        """See `Host.connected`."""
        self._protocols.add(protocol)
        if self._stopping:
            self._loop.call_later(_FIRST_CALL, protocol.drain)

    def disconnected(self, protocol: Http2Protocol) -> None:
        """See `Host.disconnected`."""
        self._protocols.discard(protocol)
        self._note_change()

    def call_started(self, protocol: Http2Protocol, stream: Stream) -> None:
        """See `Host.call_started`."""
        request = stream.request
        if request is None:
            return
        if self._grace_over:
            self._refuse(protocol, stream, StatusCode.UNAVAILABLE, "The server is stopping")
            return
        if self._max_calls is not None and len(self._calls) >= self._max_calls:
            self._refuse(protocol, stream, StatusCode.RESOURCE_EXHAUSTED, "Concurrent RPC limit exceeded!")
            return
        details = HandlerCallDetails(request.path, request.metadata)
        handler: Any = None
        resolve = None
        if self._interceptors:
            resolve = functools.partial(self._intercept, 0, details)
        else:
            try:
                handler = self._find(details)
            except Exception as error:
                log.error("Exception looking for a handler", exc_info=error)
                self._refuse(protocol, stream, StatusCode.UNKNOWN, "Error in service handler!")
                return
            if handler is None:
                self._refuse(protocol, stream, StatusCode.UNIMPLEMENTED, "Method not found!")
                return
        protocol.vouch(Trust.CLIENT if self._trust is None else self._trust(request.path))
        context = ServicerContext(protocol, stream, self._loop, self._eof, self._compression)
        stream.call = context
        self._calls.add(context)
        run = Run(context, self._loop, self._threads)
        context.task = self._loop.create_task(run(handler, resolve))
        context.task.add_done_callback(functools.partial(self._task_done, context, run))

    def _refuse(self, protocol: Http2Protocol, stream: Stream, code: int, details: str) -> None:
        protocol.connection.send_status(stream, code, details)
        protocol.connection.finished(stream)
        protocol.wake()

    def _task_done(self, context: ServicerContext, run: Run, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("A call could not be ended", exc_info=task.exception())
        thread = run.threads.running
        if thread is None or thread.done() or thread.cancel():
            self._call_done(context)
        else:
            thread.add_done_callback(functools.partial(self._thread_done, context))

    def _thread_done(self, context: ServicerContext, _: Future[Any]) -> None:
        with suppress(RuntimeError):  # the loop is closed, which has ended the call
            self._loop.call_soon_threadsafe(self._call_done, context)

    def _call_done(self, context: ServicerContext) -> None:
        self._calls.discard(context)
        context.finish()
        self._note_change()

    def _note_change(self) -> None:
        self._changed.set()

    # -- handlers -------------------------------------------------------------------------------------------------

    def _find(self, details: Any) -> Any:
        handler = self._methods.get(details.method)
        if handler is not None:
            return handler
        for generic in self._generic:
            handler = generic.service(details)
            if handler is not None:
                return handler
        return None

    async def _intercept(self, index: int, details: Any) -> Any:
        """The handler that the interceptors from ``index`` on, and then the registered handlers, return for
        ``details``."""
        if index == len(self._interceptors):
            return self._find(details)
        return await self._interceptors[index].intercept_service(functools.partial(self._intercept, index + 1), details)

    def _threads(self) -> Executor:
        if self._executor is not None:
            return self._executor
        if self._own_executor is None:
            self._own_executor = ThreadPoolExecutor(thread_name_prefix="handler")
        return self._own_executor


def _timer_slack(limits: Limits) -> float:
    """See `Host.timer_slack`: no deadline may be noticed later than its own length, nor later than a second."""
    return min(
        1.0,
        limits.header_timeout,
        limits.keepalive_timeout,
        limits.max_connection_idle,
        limits.stall_timeout,
        limits.drain_timeout,
        limits.drain_body_timeout,
        limits.rest_timeout,
        limits.read_grace,
    )
