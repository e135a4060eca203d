"""``judges.Rows``: a few methods on octets, for cases that are written frame by frame.

``Unary`` and ``Ready`` return their request; the second is a static method if the transport has static methods.
``Stream`` returns a request twice, ``Collect`` joins its requests, ``Hang`` never answers, ``Fail`` raises, and
``Meta`` returns the metadata of the call.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc

SERVICE = "judges.Rows"


async def unary(request: bytes, context: Any) -> bytes:
    """Answers with the request."""
    return request


async def stream(request: bytes, context: Any) -> AsyncIterator[bytes]:
    """Answers with the request, twice."""
    yield request
    yield request


async def collect(requests: AsyncIterable[bytes], context: Any) -> bytes:
    """Answers with all requests joined in one message."""
    return b"".join([request async for request in requests])


async def hang(request: bytes, context: Any) -> bytes:
    """Never."""
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


async def fail(request: bytes, context: Any) -> bytes:
    """A bug."""
    raise ValueError("a bug in a handler")


async def meta(request: bytes, context: Any) -> bytes:
    """The metadata under ``x-``, as JSON; octets as lists of numbers."""
    metadata = context.invocation_metadata() or ()
    return json.dumps(
        [[name, value if isinstance(value, str) else list(value)] for name, value in metadata if name.startswith("x-")]
    ).encode()


def row_handler(*, static: bool) -> grpc.GenericRpcHandler:
    """The handlers that a server registers. Without static methods, ``Ready`` is an ordinary method."""
    methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Unary": grpc.unary_unary_rpc_method_handler(unary),
        "Stream": grpc.unary_stream_rpc_method_handler(stream),
        "Collect": grpc.stream_unary_rpc_method_handler(collect),
        "Hang": grpc.unary_unary_rpc_method_handler(hang),
        "Fail": grpc.unary_unary_rpc_method_handler(fail),
        "Meta": grpc.unary_unary_rpc_method_handler(meta),
    }
    if static:
        methods["Ready"] = grpc.unary_unary_rpc_method_handler(unary)
    return grpc.method_handlers_generic_handler(SERVICE, methods)
