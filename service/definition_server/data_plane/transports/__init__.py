"""Ways to carry the RPCs. Each is a module with a class that satisfies `Transport`; ``TRANSPORT`` chooses."""

from __future__ import annotations

import socket
from typing import Protocol

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.balance import Gate
from definition_server.data_plane.endpoint import Endpoint
from definition_server.ipc.messages import Configure


class CannotListen(Exception):
    """The port cannot be opened; the message says which and why."""


class Transport(Protocol):
    """A gRPC server around an `Endpoint`."""

    async def start(self) -> int:
        """Open the port and serve.

        Returns:
            The port that is served.

        Raises:
            CannotListen: where it cannot be opened.
        """

    async def prepare(self, snapshot: Snapshot) -> None:
        """Make ready what can be made ready for ``snapshot`` before it is served; calls are answered meanwhile."""

    async def tidy(self) -> None:
        """Free what only the replaced snapshot needed; calls are answered meanwhile."""

    async def set_serving(self, serving: bool) -> None:
        """What health checks answer from now on."""

    async def reload_certificate(self) -> None:
        """Read the TLS files again, for connections to come. Where they are not usable, the old ones stay."""

    async def call_all_paths(self, port: int, key: str) -> None:
        """Make one call of each kind to this transport on the loopback, for `warmup`; the answers do not matter."""

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more, finish calls in flight, cut what is left after ``grace_seconds``."""


def create_transport(
    config: Configure, endpoint: Endpoint, listener: socket.socket | None = None, gate: Gate | None = None
) -> Transport:
    """The transport that ``config.transport`` names. Only that one is imported.

    ``listener`` and ``gate`` are for one that can adopt a listening socket: the native one.
    """
    if config.transport == "native":
        from definition_server.data_plane.transports.native import NativeTransport

        return NativeTransport(config, endpoint, listener, gate)
    from definition_server.data_plane.transports.grpcio import GrpcioTransport

    return GrpcioTransport(config, endpoint)
