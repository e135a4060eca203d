"""Ways to carry the RPCs. Each is a module with a class that satisfies `Transport`; ``TRANSPORT`` chooses."""

from __future__ import annotations

from typing import Protocol

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

    async def set_serving(self, serving: bool) -> None:
        """What health checks answer from now on."""

    async def stop(self, grace_seconds: float) -> None:
        """Accept no more, finish calls in flight, cut what is left after ``grace_seconds``."""


def create_transport(config: Configure, endpoint: Endpoint) -> Transport:
    """The transport that ``config.transport`` names. Only that one is imported."""
    from definition_server.data_plane.transports.grpcio import GrpcioTransport

    return GrpcioTransport(config, endpoint)
