"""Constants and calls of the tests that serve by a transport; its fixtures are in `conftest`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
import pytest

from definition_server.data_plane.transports.grpcio import GrpcioTransport
from definition_server.data_plane.transports.native import NativeTransport
from definition_server.ipc.messages import Configure

KEY = "the key"
AUTHENTIC = (("x-avap-auth", KEY),)
MIB = 1024 * 1024
GRACE = 60.0
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials")

CONFIGURE = Configure(
    host="127.0.0.1",
    port=0,
    transport="",
    reflection=False,
    max_connection_age_seconds=0.0,
    threadpool_size=2,
    app_env="production",
    log_level="INFO",
    drain_timeout_seconds=5.0,
)

Serve = Callable[..., Any]

CLASSES = {"grpcio": GrpcioTransport, "native": NativeTransport}


def channel(port: int, options: Sequence[tuple[str, Any]] = ()) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(f"127.0.0.1:{port}", [*options, ("grpc.use_local_subchannel_pool", 1)])


async def raw(client: grpc.aio.Channel, method: str, request: bytes, metadata: Any = AUTHENTIC) -> bytes:
    """A unary call on bytes."""
    call: Any = client.unary_unary(f"/avap.DefinitionEngine/{method}")
    answer: bytes = await call(request, metadata=metadata, timeout=30)
    return answer


async def failure(*arguments: Any) -> tuple[grpc.StatusCode, str | None]:
    """Status and message of a call, made with bytes, that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await raw(*arguments)
    return caught.value.code(), caught.value.details()
