"""The transports that carry the RPCs, one module each; the setting ``TRANSPORT`` selects one."""

from __future__ import annotations

import socket
from typing import Protocol

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.balance import Balancer
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.swap import Swap
from definition_server.ipc.messages import Configure
from definition_server.ipc.tls_files import TlsFiles


class CannotListen(Exception):
    """The port cannot be opened. The message names the port and the reason."""


class Transport(Protocol):
    """A gRPC server around an `Endpoint`."""

    async def start(self, tls: TlsFiles | None = None) -> int:
        """Open the port and serve; over TLS if ``tls`` is given, which the caller closes afterwards.

        Returns:
            The port that is served.

        Raises:
            CannotListen: if the port cannot be opened.
        """

    def begin_swap(self, snapshot: Snapshot) -> Swap:
        """Begin a `Swap`, whose three steps replace the served snapshot by ``snapshot``. One swap at a time."""

    async def set_serving(self, serving: bool) -> None:
        """Set the state that health checks report from now on."""

    async def set_fresh(self, fresh: bool) -> None:
        """Set the state of freshness that health checks report from now on."""

    async def replace_certificate(self, tls: TlsFiles) -> None:
        """Use ``tls``, which the caller closes afterwards, for new connections.

        If ``tls`` is not usable, this is logged, and the old certificate remains in use.
        """

    async def call_all_paths(self, client: socket.socket | None, key: str) -> None:
        """Make one call of each kind to this transport, for `warmup`; the answers do not matter.

        ``client`` is a connection to it, for a transport that was given its listening socket.
        """

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more connections, finish calls in flight, and end the calls that remain after ``grace_seconds``."""


def create_transport(
    config: Configure, endpoint: Endpoint, listener: socket.socket | None = None, balancer: Balancer | None = None
) -> Transport:
    """The transport that ``config.transport`` names. No other transport is imported.

    ``listener`` and ``balancer`` are for the native transport, which can use an inherited listening socket.
    """
    if config.transport == "native":
        from definition_server.data_plane.transports.native import NativeTransport

        return NativeTransport(config, endpoint, listener, balancer)
    from definition_server.data_plane.transports.grpcio import GrpcioTransport

    return GrpcioTransport(config, endpoint)
