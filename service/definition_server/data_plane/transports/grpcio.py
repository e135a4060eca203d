"""The reference transport: ``grpc.aio.server`` on gRPC's C-core.

C-core cannot use an inherited listening socket, so every worker binds the port itself with ``SO_REUSEPORT``, and the
kernel distributes connections by hash; the master has reserved the port beforehand (`control_plane/listener.py`).
Messages pass as octets: there is no serializer, so no message object is built for a request.

C-core manages its connections itself. So this transport lacks the measures of the native transport against untrusted
clients: the limit for each address, eviction and the reserve for probes, the time limit until the first authorized
call, the share of accepting in each iteration of the loop, and log lines about TLS handshakes and other protocols.
Connections above ``MAX_CONNECTIONS`` are closed. Wrong keys are the only client errors that are logged.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import grpc

from definition_server.api_keys import METADATA_KEY
from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.endpoint import Endpoint, Handler
from definition_server.data_plane.failure import CallFailed, Status
from definition_server.data_plane.health import HEALTH_SERVICE, Health, Refusals
from definition_server.data_plane.services import MAX_REQUEST, SERVICE
from definition_server.data_plane.swap import Swap
from definition_server.data_plane.transports import CannotListen
from definition_server.ipc.messages import Configure
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import get_logger
from grpc_h2 import RateLimitedLog

if TYPE_CHECKING:
    from definition_server.data_plane.reflection import Reflection

log = get_logger(__name__)

_CODES = {code.value[0]: code for code in grpc.StatusCode}
_ABORT_CODES = {status: _CODES[status.value] for status in Status}

_PING_TOLERANCE = 0.8
"""Share of `Configure.keepalive_min_time_seconds` that C-core enforces: it counts a PING that arrives slightly early as
a strike.
"""

ABSTRACT = "unix-abstract:"
"""The prefix of a host that names a Unix socket without a file, for the warm-up: a confined worker makes no TCP
connection."""

Method = Callable[[bytes, Any], Awaitable[bytes]]


class GrpcioTransport:
    """`Transport` on ``grpc.aio``."""

    def __init__(self, config: Configure, endpoint: Endpoint) -> None:
        self._engine = endpoint.engine
        self._address = _address(config.host, config.port)
        self._certificate: grpc.ServerCertificateConfiguration | None = None
        self._health = Health(Refusals(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT))
        self._client_log = RateLimitedLog(logging.getLogger(__name__))
        logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_departure)
        self._pool = ThreadPoolExecutor(config.threadpool_size, "handler")
        self._server = grpc.aio.server(self._pool, options=_options(config))
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            name: grpc.unary_unary_rpc_method_handler(self._method(name, handler))
            for name, handler in endpoint.handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        health: Any = self._health.handlers()  # these classes have the same attributes as gRPC's own
        self._server.add_registered_method_handlers(HEALTH_SERVICE, health)
        self._reflection: Reflection | None = None
        if config.reflection:
            from definition_server.data_plane.reflection import add_reflection  # needs the protobuf library

            self._reflection = add_reflection((SERVICE, HEALTH_SERVICE), self._server)

    async def start(self, tls: TlsFiles | None = None) -> int:
        """See `Transport.start`."""
        await self._health.report(False)
        try:
            if tls is not None:
                port = self._server.add_secure_port(self._address, self._credentials(tls))
            else:
                port = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise CannotListen(f"cannot listen on {self._address}: {error}") from error
        await self._server.start()
        self._client_log.report_later(asyncio.get_running_loop())
        return int(port)

    def begin_swap(self, snapshot: Snapshot) -> Swap:
        """See `Transport.begin_swap`. This transport remembers no answers: every answer is a slice of the snapshot."""
        return Swap(self._engine, snapshot)

    async def set_serving(self, serving: bool) -> None:
        """See `Transport.set_serving`."""
        await self._health.report(serving)

    async def set_fresh(self, fresh: bool) -> None:
        """See `Transport.set_fresh`."""
        await self._health.report_freshness(fresh)

    async def stop(self, grace_seconds: float) -> None:
        """See `Transport.stop`."""
        self._health.end_watches()
        if self._reflection is not None:
            self._reflection.end_streams()
        await self._server.stop(grace_seconds)
        self._client_log.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def replace_certificate(self, tls: TlsFiles) -> None:
        """See `Transport.replace_certificate`."""
        if self._certificate is not None:
            self._certificate = _certificate(tls)
            log.info("Certificate loaded")

    async def call_all_paths(self, client: socket.socket | None, key: str) -> None:
        """See `Transport.call_all_paths`. ``client`` is None here: C-core connects by itself."""
        found, missing = b"\x0a\x04warm", b"\x0a\x07missing"
        async with grpc.aio.insecure_channel(self._address) as channel:
            get: Any = channel.unary_unary(f"/{SERVICE}/GetCommand")
            sync: Any = channel.unary_unary(f"/{SERVICE}/SyncCatalog")
            check: Any = channel.unary_unary(f"/{HEALTH_SERVICE}/Check")
            for call, request, presented in (
                (get, found, key),
                (get, missing, key),
                (get, found, "wrong"),
                (sync, b"", key),
                (check, b"", key),
            ):
                with suppress(grpc.aio.AioRpcError):
                    await call(request, metadata=((METADATA_KEY, presented),), timeout=5)

    def _method(self, name: str, handler: Handler) -> Method:
        async def call(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            try:
                answer = handler(request, context.invocation_metadata() or ())
            except CallFailed as failure:
                authorized = failure.status is not Status.UNAUTHENTICATED
                version = self._engine.version if authorized else ()
                if not authorized:
                    now = asyncio.get_running_loop().time()
                    path = f"/{SERVICE}/{name}"
                    self._client_log.log(now, logging.INFO, "A call was not authorized", context.peer, error=path)
                await context.abort(_ABORT_CODES[failure.status], failure.message, version)
            # The answer was made in the same iteration of the event loop, so answer and metadata are of one snapshot.
            version = self._engine.version
            if version:  # C-core sends metadata as a separate batch, which costs an eighth more CPU time per call
                await context.send_initial_metadata(version)
            return answer

        return call

    def _credentials(self, tls: TlsFiles) -> grpc.ServerCredentials:
        certificate = self._certificate = _certificate(tls)
        # C-core requests the certificate at every handshake.
        return grpc.dynamic_ssl_server_credentials(
            certificate,
            lambda: self._certificate or certificate,
            require_client_authentication=tls.client_authorities is not None,
        )


def _is_no_departure(record: logging.LogRecord) -> bool:
    """False if ``record`` is grpcio's traceback for a client that disconnected before its answer, otherwise True."""
    kind = record.exc_info[0] if record.exc_info else None
    return kind is None or kind.__name__ != "ExecuteBatchError"


def _address(host: str, port: int) -> str:
    if host.startswith(ABSTRACT):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _certificate(tls: TlsFiles) -> grpc.ServerCertificateConfiguration:
    chain, key, authority = tls.octets()
    return grpc.ssl_server_certificate_configuration([(key, chain)], authority)


def _ping_interval(config: Configure) -> int:
    """The shortest interval between two PINGs of a client, in milliseconds."""
    return int(config.keepalive_min_time_seconds * _PING_TOLERANCE * 1000)


def _options(config: Configure) -> list[tuple[str, int]]:
    options = [
        ("grpc.so_reuseport", 1),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", MAX_REQUEST),
        ("grpc.keepalive_time_ms", int(config.keepalive_time_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_seconds * 1000)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", _ping_interval(config)),
        ("grpc.http2.min_ping_interval_without_data_ms", _ping_interval(config)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]
    if config.max_connections:
        options.append(("grpc.max_allowed_incoming_connections", config.max_connections))
    if config.max_connection_idle_seconds:
        options.append(("grpc.max_connection_idle_ms", int(config.max_connection_idle_seconds * 1000)))
    if config.max_connection_age_seconds:
        options += [
            ("grpc.max_connection_age_ms", int(config.max_connection_age_seconds * 1000)),
            ("grpc.max_connection_age_grace_ms", int(config.drain_timeout_seconds * 1000)),
        ]
    return options
