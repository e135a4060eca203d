"""The native transport: our own engine (`grpc_h2`), which does not encode answers while a request waits.

The two methods of `DefinitionEngine` are *static methods*: the engine remembers, for the octets of a request, the
frames of its answer. This module adds three things. First, a `Swap` replaces the remembered answers when another
snapshot is served; the new answers are made beforehand, so that no call waits for them. Second, when the keys change,
the engine authorizes every open connection anew. Third, answers are counted: each has an *answer id* for its method and
status; the engine returns the ids of a whole batch, and they are added to the stats page at once.

Connections are accepted from the listening socket that the master bound and all workers share; `balance` decides which
worker accepts one. Health and reflection are the same as in the grpcio transport, and are registered as on a
``grpc.aio.Server``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.balance import Balancer
from definition_server.data_plane.endpoint import STATUS_INDEX, CallCounter, Endpoint, Method
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.health import HEALTH_SERVICE, Health
from definition_server.data_plane.services import MAX_REQUEST, SERVICE, DefinitionEngine, Version
from definition_server.data_plane.swap import Swap, SwapTimes
from definition_server.data_plane.transports import CannotListen
from definition_server.data_plane.transports.first_calls import make_first_calls
from definition_server.ipc.handover import PREPARATION_SECONDS
from definition_server.ipc.messages import Configure
from definition_server.ipc.stats import STATUSES
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import get_logger
from grpc_h2 import (
    BACKLOG,
    CertificateFault,
    Limits,
    PreparedAnswers,
    Server,
    StaticAnswer,
    StaticUnary,
    TlsCredentials,
    Trust,
)

if TYPE_CHECKING:
    from definition_server.data_plane.reflection import Reflection
    from grpc_h2 import Authorize, Lookup, Metadata

log = get_logger(__name__)

_MOST_UNFINISHED = 512 * 1024
"""The most octets of unfinished requests of one connection: a quarter of the octets that its 256 streams could hold."""
_MOST_UNREAD = 1024 * 1024
"""The most octets of complete requests of one connection that no handler has taken yet: enough for one request on each
of its 256 streams.
"""
_FIRST_CALL_SECONDS = 30.0
"""Seconds after which a connection is drained on which no authorized call and no health check has begun. An honest
client that connects in advance (as Envoy, HAProxy and nginx may, and every ``wait_for_ready``) connects again for its
next call. nginx allows a client 60 s until its first request, HAProxy and Envoy 10 s and more."""
_HEALTH_PREFIX = f"/{HEALTH_SERVICE}/"

_StaticMethods = Sequence[tuple[Method, StaticUnary]]


class NativeTransport:
    """`Transport` on `grpc_h2`.

    ``listener`` is the socket that the master listens on, and ``balancer`` decides about its connections; without
    them the transport opens a port of its own and accepts every connection (as the warm-up does).
    """

    def __init__(
        self,
        config: Configure,
        endpoint: Endpoint,
        listener: socket.socket | None = None,
        balancer: Balancer | None = None,
    ) -> None:
        self._config = config
        self._listener = listener
        self._balancer = balancer
        self._tls: TlsCredentials | None = None
        self._health = Health()
        self._server = Server(
            limits=_limits(config),
            max_connections=config.max_connections or None,
            max_connections_per_peer=config.max_connections_per_peer or None,
            first_call_timeout=_FIRST_CALL_SECONDS,
            trust=_trust,
            observe=_observer(endpoint.slot),
        )
        self._engine = endpoint.engine
        self._swap_times = SwapTimes()
        self._methods = [
            (
                method,
                self._server.add_static_unary(method.path, _lookup(method, self._engine), _authorize(method)),
            )
            for method in endpoint.methods
        ]
        endpoint.keys.on_change(self._server.forget_authorizations)
        self._server.add_registered_method_handlers(HEALTH_SERVICE, self._health.handlers())
        self._reflection: Reflection | None = None
        if config.reflection:
            from definition_server.data_plane.reflection import add_reflection  # needs gRPC's and protobuf's libraries

            self._reflection = add_reflection((SERVICE, HEALTH_SERVICE), self._server)

    async def start(self, tls: TlsFiles | None = None) -> int:
        """See `Transport.start`."""
        await self._health.report(False)
        self._tls = None if tls is None else _credentials(tls)
        listener = self._listener or _listen(self._config.host, self._config.port)
        self._server.add_listener(listener, policy=self._balancer, tls=self._tls)
        await self._server.start()
        if self._balancer is not None:
            self._balancer.start()
        return int(listener.getsockname()[1])

    def begin_swap(self, snapshot: Snapshot) -> Swap:
        """See `Transport.begin_swap`."""
        return NativeSwap(self._engine, snapshot, self._server, self._methods, self._swap_times)

    async def set_serving(self, serving: bool) -> None:
        """See `Transport.set_serving`."""
        await self._health.report(serving)

    async def set_fresh(self, fresh: bool) -> None:
        """See `Transport.set_fresh`."""
        await self._health.report_freshness(fresh)

    async def stop(self, grace_seconds: float) -> None:
        """See `Transport.stop`."""
        if self._balancer is not None:
            self._balancer.stop()
        self._health.end_watches()
        if self._reflection is not None:
            self._reflection.end_streams()
        await self._server.stop(grace_seconds)

    async def replace_certificate(self, tls: TlsFiles) -> None:
        """See `Transport.replace_certificate`."""
        if self._tls is not None:
            try:
                self._tls.replace(tls.certificate, tls.key, tls.client_authorities)
            except CertificateFault as fault:
                log.error("The certificate was not replaced", error=str(fault))
            else:
                log.info("Certificate loaded")

    async def call_all_paths(self, client: socket.socket | None, key: str) -> None:
        """See `Transport.call_all_paths`."""
        if client is not None:
            await make_first_calls(client, key)


class NativeSwap(Swap):
    """A swap that prepares new answers to the remembered requests, and frees the replaced answers afterwards."""

    def __init__(
        self,
        engine: DefinitionEngine,
        snapshot: Snapshot,
        server: Server,
        methods: _StaticMethods,
        times: SwapTimes,
    ) -> None:
        super().__init__(engine, snapshot)
        self._server = server
        self._times = times
        self._scheduler = server.scheduler
        self._methods = methods
        self._prepared: list[PreparedAnswers] = []

    async def prepare(self) -> None:
        """See `Swap.prepare`. This ends after `PREPARATION_SECONDS`; missing answers are made on request."""
        await super().prepare()
        coming = DefinitionEngine(names_version=self._engine.names_version)
        coming.snapshot = self.snapshot
        self._prepared = [static.prepare(_lookup(method, coming)) for method, static in self._methods]
        with suppress(TimeoutError):
            async with asyncio.timeout(PREPARATION_SECONDS):
                for prepared in self._prepared:
                    await self._scheduler.spread(prepared.steps())

    def commit(self) -> Snapshot | None:
        """See `Swap.commit`."""
        replaced = super().commit()
        if replaced is not None:
            self._times.note()
        for prepared in self._prepared:
            prepared.install()
        if not self._prepared:
            for _, static in self._methods:
                static.forget()
        return replaced

    async def release(self) -> None:
        """See `Swap.release`."""
        await super().release()
        for _, static in self._methods:
            await self._scheduler.spread(static.release())
        before = self._times.oldest_allowed
        if before is not None:
            await self._server.cut_answers(before)


def _trust(path: str) -> Trust:
    """The trust that a handler's call proves: a health check proves a probe; reflection needs no key, so it proves
    nothing."""
    return Trust.PROBE if path.startswith(_HEALTH_PREFIX) else Trust.STRANGER


def _lookup(method: Method, engine: DefinitionEngine) -> Lookup:
    """Message → ready answer, from the snapshot that ``engine`` serves."""
    answer, found = method.answer, _answer_id(method, Status.OK)

    def lookup(request: bytes) -> StaticAnswer:
        try:
            return StaticAnswer.unary(answer(engine, request), found, engine.version)
        except CallFailed as failure:
            return _refusal(method, failure, engine.version)

    return lookup


def _authorize(method: Method) -> Authorize:
    """Metadata → the refusal that is the answer, or None for a call that is admitted."""

    def authorize(metadata: Metadata) -> StaticAnswer | None:
        try:
            method.authenticate(metadata)
        except CallFailed as failure:
            return _refusal(method, failure)
        return None

    return authorize


def _refusal(method: Method, failure: CallFailed, version: Version = ()) -> StaticAnswer:
    # INTERNAL means a bug in this server, which may not occur at the next call, so the answer is not remembered.
    lasting = failure.status is not Status.INTERNAL
    answer_id = _answer_id(method, failure.status)
    return StaticAnswer.failure(failure.status, failure.message, answer_id, version, lasting=lasting)


def _answer_id(method: Method, status: Status) -> int:
    """One number for a method and a status; `_observer` separates the two again."""
    return method.index * len(STATUSES) + STATUS_INDEX[status]


def _observer(slot: CallCounter) -> Callable[[list[int], float], None]:
    """Returns the function that adds a batch to the counters. Each call counts with the time of its batch, because the
    calls of a batch were read and answered together.
    """
    kinds = len(STATUSES)

    def observe(answer_ids: list[int], seconds: float) -> None:
        elapsed = int(seconds * 1e9)
        if len(answer_ids) == 1:  # a single call, for example of a script that waits for each answer
            (answer_id,) = answer_ids
            slot.count_many(answer_id // kinds, answer_id % kinds, 1, elapsed)
            return
        for answer_id in set(answer_ids):
            slot.count_many(answer_id // kinds, answer_id % kinds, answer_ids.count(answer_id), elapsed)

    return observe


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket of this process alone.

    Raises:
        CannotListen: if the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise CannotListen(f"cannot listen on {shown}: {error.strerror}") from error


def _credentials(tls: TlsFiles) -> TlsCredentials:
    """The certificate to serve TLS with.

    Raises:
        CannotListen: if the certificate is not usable.
    """
    try:
        return TlsCredentials(tls.certificate, tls.key, tls.client_authorities)
    except CertificateFault as fault:
        raise CannotListen(f"cannot serve TLS: {fault}") from fault


def _limits(config: Configure) -> Limits:
    return Limits(
        keepalive_time=config.keepalive_time_seconds,
        keepalive_timeout=config.keepalive_timeout_seconds,
        min_ping_interval=config.keepalive_min_time_seconds,
        max_message=MAX_REQUEST,
        max_buffered=_MOST_UNFINISHED,
        max_unread=_MOST_UNREAD,
        max_connection_age=config.max_connection_age_seconds or inf,
        age_grace=config.drain_timeout_seconds if config.max_connection_age_seconds else inf,
        max_connection_idle=config.max_connection_idle_seconds or inf,
    )
