"""The native transport: our own engine (`grpc_h2`), which encodes nothing while a request waits.

The two methods of `DefinitionEngine` are *static doors*: the engine remembers, for the octets of a request, the frames
of its answer. What this module adds is when that memory must be replaced (another snapshot: the answers to what is
remembered are made before it is served, so that no call waits for them) or dropped (other keys), and how what was
answered is counted: every answer carries a number that stands for its method and status, the engine hands back the
numbers of a whole batch, and they are added to the stats page at once.

Connections come from the listening socket that the master bound and all workers share; `balance` says whose they are.
Health and reflection are the servicers of grpcio, registered as on a ``grpc.aio.Server``.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING

from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.authentication import METADATA_KEY, KeyRing
from definition_server.data_plane.balance import Gate
from definition_server.data_plane.endpoint import STATUS_INDEX, Endpoint
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.health import Health
from definition_server.data_plane.services import SERVICE, DefinitionEngine
from definition_server.data_plane.transports import CannotListen
from definition_server.ipc.messages import Configure
from definition_server.ipc.stats import METHODS, STATUSES, Slot
from definition_server.observability.logs import get_logger
from grpc_h2 import (
    CertificateFault,
    Limits,
    PreparedAnswers,
    Server,
    StaticAnswer,
    TlsCredentials,
    encode_block,
    frames,
)

if TYPE_CHECKING:
    from grpc_h2 import Lookup, Metadata

log = get_logger(__name__)

_BACKLOG = 4096
_FIRST_CALLS = (
    (f"/{SERVICE}/GetCommand", b"\x0a\x04warm", True),
    (f"/{SERVICE}/GetCommand", b"\x0a\x07missing", True),
    (f"/{SERVICE}/GetCommand", b"\x0a\x04warm", False),
    (f"/{SERVICE}/SyncCatalog", b"", True),
    ("/grpc.health.v1.Health/Check", b"", True),
)
"""Path, request, whether with the right key: found, missing, refused, catalogue, health."""
_FIRST_CALLS_SECONDS = 10.0
_PREPARATION_SECONDS = 1.0
"""A worker that is busy all the time gets little of it done, and must not serve old rows for long because of that."""


class NativeTransport:
    """`Transport` on ``http2.server``.

    ``listener`` is the socket that the master listens on and ``gate`` what decides about its connections; without
    them the transport opens a port of its own and takes whatever comes (the warm-up does).
    """

    def __init__(
        self, config: Configure, endpoint: Endpoint, listener: socket.socket | None = None, gate: Gate | None = None
    ) -> None:
        self._config = config
        self._listener = listener
        self._gate = gate
        self._tls: TlsCredentials | None = None
        self._health = Health()
        self._server = Server(limits=_limits(config), observe=_observer(endpoint.slot))
        self._engine = endpoint.engine
        self._methods = (
            _Method("GetCommand", DefinitionEngine.get_command, endpoint.keys),
            _Method("SyncCatalog", DefinitionEngine.catalog, endpoint.keys),
        )
        self._doors = [
            self._server.add_static_unary(method.path, method.lookup(self._engine), method.authorize)
            for method in self._methods
        ]
        self._preparations: list[PreparedAnswers] = []
        self._prepared: Snapshot | None = None
        """What the doors are prepared for, as far as they are."""
        self._engine.on_swap(self._swapped)
        endpoint.keys.on_change(self._server.forget_authorizations)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (SERVICE, "grpc.health.v1.Health", reflection.SERVICE_NAME)
            servicer = reflection.aio.ReflectionServicer(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, self._server)

    async def start(self) -> int:
        """See `Transport.start`."""
        await self._health.report(False)
        self._tls = _credentials(self._config)
        listener = self._listener or _listen(self._config.host, self._config.port)
        self._server.add_listener(listener, gate=self._gate, tls=self._tls)
        await self._server.start()
        if self._gate is not None:
            self._gate.start()
        return int(listener.getsockname()[1])

    async def prepare(self, snapshot: Snapshot) -> None:
        """See `Transport.prepare`."""
        coming = DefinitionEngine()
        coming.snapshot = self._prepared = snapshot
        with suppress(TimeoutError):
            async with asyncio.timeout(_PREPARATION_SECONDS):
                self._preparations = [
                    door.prepare(method.lookup(coming)) for door, method in zip(self._doors, self._methods, strict=True)
                ]
                for preparation in self._preparations:
                    await self._server.turns.spread(preparation.steps())

    def _swapped(self) -> None:
        """Another snapshot is served."""
        prepared = self._prepared is not None and self._prepared is self._engine.snapshot
        self._prepared = None
        preparations, self._preparations = self._preparations, []
        if prepared:
            for preparation in preparations:
                preparation.install()
        else:
            for door in self._doors:
                door.forget()

    async def tidy(self) -> None:
        """See `Transport.tidy`."""
        for door in self._doors:
            await self._server.turns.spread(door.release())

    async def set_serving(self, serving: bool) -> None:
        """See `Transport.set_serving`."""
        await self._health.report(serving)

    async def stop(self, grace_seconds: float) -> None:
        """See `Transport.stop`."""
        if self._gate is not None:
            self._gate.stop()
        self._health.end_watches()
        await self._server.stop(grace_seconds)

    async def reload_certificate(self) -> None:
        """See `Transport.reload_certificate`."""
        if self._tls is not None:
            with suppress(CertificateFault):  # the engine has logged it
                self._tls.reload()

    async def call_all_paths(self, port: int, key: str) -> None:
        """See `Transport.call_all_paths`. In octets, so that gRPC's C-core need not be started for it."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
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


class _Method:
    """A method behind a static door, with what `Endpoint` does for others: authenticate, answer, hide a bug."""

    def __init__(
        self, name: str, answer: Callable[[DefinitionEngine, bytes], bytes | memoryview], keys: KeyRing
    ) -> None:
        self.path = f"/{SERVICE}/{name}"
        self._name = name
        self._answer = answer
        self._keys = keys

    def lookup(self, engine: DefinitionEngine) -> Lookup:
        """Message → answer, from what ``engine`` serves."""
        answer, found = self._answer, self._answer_id(Status.OK)

        def lookup(request: bytes) -> StaticAnswer:
            try:
                return StaticAnswer.unary(answer(engine, request), found)
            except Exception as error:  # noqa: BLE001 - a bug of ours costs one call; it is logged
                return self._failure(error)

        return lookup

    def authorize(self, metadata: Metadata) -> StaticAnswer | None:
        """See `Authorize`."""
        try:
            self._keys.authenticate(metadata)
        except Exception as error:  # noqa: BLE001
            return self._failure(error)
        return None

    def _failure(self, error: Exception) -> StaticAnswer:
        if isinstance(error, CallFailed):
            return StaticAnswer.failure(error.status, error.message, self._answer_id(error.status))
        log.error("Unexpected failure in a call", method=self._name, exc_info=error)
        return StaticAnswer.failure(Status.INTERNAL, "Internal error", self._answer_id(Status.INTERNAL), lasting=False)

    def _answer_id(self, status: Status) -> int:
        return METHODS.index(self._name) * len(STATUSES) + STATUS_INDEX[status]


def _observer(slot: Slot) -> Callable[[list[int], float], None]:
    """Adds a batch to the counters. Every call of it took as long as the batch: read together, answered together."""
    kinds = len(STATUSES)

    def observe(answered: list[int], seconds: float) -> None:
        elapsed = int(seconds * 1e9)
        if len(answered) == 1:  # one call at a time: what a script that waits for each answer does
            slot.count_many(answered[0] // kinds, answered[0] % kinds, 1, elapsed)
            return
        for answer_id in set(answered):
            slot.count_many(answer_id // kinds, answer_id % kinds, answered.count(answer_id), elapsed)

    return observe


def _first_calls(key: str) -> bytes:
    """Every call in one flight, as a client's first write might be."""
    flight = []
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
        flight.append(frames.frame(frames.HEADERS, frames.END_HEADERS, 2 * number + 1, block))
        flight.append(frames.frame(frames.DATA, frames.END_STREAM, 2 * number + 1, message))
    return b"".join(flight)


async def _read_ends(reader: asyncio.StreamReader, streams: int) -> None:
    """Read frames until so many streams have ended."""
    while streams:
        header = await reader.readexactly(frames.HEADER_LENGTH)
        await reader.readexactly(int.from_bytes(header[:3], "big"))
        if header[3] in (frames.HEADERS, frames.DATA) and header[4] & frames.END_STREAM:
            streams -= 1


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket of this process alone.

    Raises:
        CannotListen: where there is none to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise CannotListen(f"cannot listen on {shown}: {error.strerror}") from error


def _credentials(config: Configure) -> TlsCredentials | None:
    """The certificate to show, if any.

    Raises:
        CannotListen: where it is not usable.
    """
    if not config.tls_cert_file:
        return None
    try:
        return TlsCredentials(config.tls_cert_file, config.tls_key_file, config.tls_client_ca_file or None)
    except CertificateFault as fault:
        raise CannotListen(f"cannot serve TLS: {fault}") from fault


def _limits(config: Configure) -> Limits:
    return Limits(
        keepalive_time=config.keepalive_time_seconds,
        keepalive_timeout=config.keepalive_timeout_seconds,
        max_connection_age=config.max_connection_age_seconds or inf,
        age_grace=config.drain_timeout_seconds if config.max_connection_age_seconds else inf,
        max_connection_idle=config.max_connection_idle_seconds or inf,
    )
