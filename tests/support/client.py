"""A stock grpcio client of the server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.server import KEY

from definition_server.rpc import avap_pb2, avap_pb2_grpc

UNLIMITED = (("grpc.max_receive_message_length", -1),)

RETRYING = (
    (
        "grpc.service_config",
        '{"methodConfig":[{"name":[{}],"waitForReady":true,"retryPolicy":{"maxAttempts":5,"initialBackoff":"0.05s",'
        '"maxBackoff":"1s","backoffMultiplier":2,"retryableStatusCodes":["UNAVAILABLE","CANCELLED"]}}]}',
    ),
)
"""The retry policy that the README asks clients to set."""


@dataclass(frozen=True)
class Tls:
    """The certificates that a client trusts, and its own, if it has one."""

    authority: Path
    cert: Path | None = None
    key: Path | None = None

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        """The gRPC credentials for a channel."""
        return grpc.ssl_channel_credentials(
            self.authority.read_bytes(),
            None if self.key is None else self.key.read_bytes(),
            None if self.cert is None else self.cert.read_bytes(),
        )


Metadata = Sequence[tuple[str, str | bytes]]


class Client:
    """One channel and the stubs on it. A context."""

    def __init__(
        self,
        port: int,
        key: str | None = KEY,
        options: Sequence[tuple[str, object]] = UNLIMITED,
        *,
        tls: Tls | None = None,
    ) -> None:
        # The channel has its own pool; otherwise all channels of a process share a connection.
        options = [*options, ("grpc.use_local_subchannel_pool", 1)]
        if tls is None:
            self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)
        else:
            self.channel = grpc.secure_channel(f"localhost:{port}", tls.credentials, options=options)
        self.metadata: Metadata = () if key is None else (("x-avap-auth", key),)
        self.stub: Any = avap_pb2_grpc.DefinitionEngineStub(self.channel)  # type: ignore[no-untyped-call]  # generated
        self.health_stub = health_pb2_grpc.HealthStub(self.channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.channel.close()

    def get(self, name: str, timeout: float = 10) -> avap_pb2.CommandResponse:
        """``GetCommand``."""
        request = avap_pb2.CommandRequest(name=name)
        answer: avap_pb2.CommandResponse = self.stub.GetCommand(request, metadata=self.metadata, timeout=timeout)
        return answer

    def sync(self, timeout: float = 60) -> avap_pb2.CatalogResponse:
        """``SyncCatalog``."""
        answer: avap_pb2.CatalogResponse
        answer = self.stub.SyncCatalog(avap_pb2.Empty(), metadata=self.metadata, timeout=timeout)
        return answer

    def raw(self, method: str, request: bytes, metadata: Metadata | None = None) -> bytes:
        """A stub of any unary method of the service, on bytes."""
        call: Any = self.channel.unary_unary(f"/avap.DefinitionEngine/{method}")
        answer: bytes = call(request, metadata=self.metadata if metadata is None else metadata, timeout=10)
        return answer

    def health(self, service: str = "") -> str:
        """Name of the health status, or of the gRPC status if the check fails."""
        try:
            answer = self.health_stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        except grpc.RpcError as error:
            return str(error.code().name)
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))


def failure(call: Callable[..., object], *arguments: object, **keywords: object) -> tuple[str, str]:
    """Status name and message of a call that must fail."""
    try:
        call(*arguments, **keywords)
    except grpc.RpcError as error:
        return error.code().name, error.details() or ""
    raise AssertionError("the call succeeded")
