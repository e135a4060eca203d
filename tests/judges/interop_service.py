"""``grpc.testing.TestService``, which gRPC's interoperability clients call, as a ``grpc.aio`` servicer.

It has handlers in both styles of ``grpc.aio``: generators, and coroutines that call ``write``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any

import grpc
from tests.judges.messages import SERVICE, message_class

ECHO_INITIAL = "x-grpc-test-echo-initial"
ECHO_TRAILING = "x-grpc-test-echo-trailing-bin"
_CODES = {code.value[0]: code for code in grpc.StatusCode}

Context = Any


async def empty_call(request: Any, context: Context) -> Any:
    """An empty answer to an empty request."""
    await _echo_metadata(context)
    return message_class("Empty")()


async def unary_call(request: Any, context: Context) -> Any:
    """A payload of the requested size, or the requested status."""
    await _abort_if_asked(request, context)
    if request.HasField("response_compressed"):
        context.set_compression(_compression(request.response_compressed.value))
    await _echo_metadata(context)
    return message_class("SimpleResponse")(payload=_payload(request.response_size))


async def streaming_output_call(request: Any, context: Context) -> AsyncIterator[Any]:
    """A payload for each requested size."""
    await _abort_if_asked(request, context)
    if any(wanted.compressed.value for wanted in request.response_parameters):
        context.set_compression(grpc.Compression.Gzip)
    await _echo_metadata(context)
    for wanted in request.response_parameters:
        if wanted.HasField("compressed") and not wanted.compressed.value:
            context.disable_next_message_compression()
        yield await _answer(wanted)


async def streaming_input_call(requests: AsyncIterable[Any], context: Context) -> Any:
    """The number of octets of all requests."""
    await _echo_metadata(context)
    total = 0
    async for request in requests:
        total += len(request.payload.body)
    return message_class("StreamingInputCallResponse")(aggregated_payload_size=total)


async def full_duplex_call(requests: AsyncIterable[Any], context: Context) -> None:
    """Answer each request as it demands, as soon as it arrives."""
    await _echo_metadata(context)
    async for request in requests:
        await _abort_if_asked(request, context)
        for wanted in request.response_parameters:
            await context.write(await _answer(wanted))


async def half_duplex_call(requests: AsyncIterable[Any], context: Context) -> AsyncIterator[Any]:
    """Answer each request as it demands, once all have arrived."""
    await _echo_metadata(context)
    asked = [wanted async for request in requests for wanted in request.response_parameters]
    for wanted in asked:
        yield await _answer(wanted)


def interop_handler() -> grpc.GenericRpcHandler:
    """The handlers that a server registers to serve the whole service."""

    def coded(make: Any, behavior: Any, request: str, response: str) -> Any:
        return make(behavior, message_class(request).FromString, message_class(response).SerializeToString)

    streaming = ("StreamingOutputCallRequest", "StreamingOutputCallResponse")
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "EmptyCall": coded(grpc.unary_unary_rpc_method_handler, empty_call, "Empty", "Empty"),
            "UnaryCall": coded(grpc.unary_unary_rpc_method_handler, unary_call, "SimpleRequest", "SimpleResponse"),
            "StreamingOutputCall": coded(grpc.unary_stream_rpc_method_handler, streaming_output_call, *streaming),
            "StreamingInputCall": coded(
                grpc.stream_unary_rpc_method_handler,
                streaming_input_call,
                "StreamingInputCallRequest",
                "StreamingInputCallResponse",
            ),
            "FullDuplexCall": coded(grpc.stream_stream_rpc_method_handler, full_duplex_call, *streaming),
            "HalfDuplexCall": coded(grpc.stream_stream_rpc_method_handler, half_duplex_call, *streaming),
        },
    )


def _payload(size: int) -> Any:
    return message_class("Payload")(body=bytes(size))


def _compression(wanted: bool) -> grpc.Compression:
    return grpc.Compression.Gzip if wanted else grpc.Compression.NoCompression


async def _answer(wanted: Any) -> Any:
    if wanted.interval_us:
        await asyncio.sleep(wanted.interval_us / 1e6)
    return message_class("StreamingOutputCallResponse")(payload=_payload(wanted.size))


async def _abort_if_asked(request: Any, context: Context) -> None:
    if request.response_status.code:
        await context.abort(_CODES[request.response_status.code], request.response_status.message)


async def _echo_metadata(context: Context) -> None:
    metadata = [(name, value) for name, value in context.invocation_metadata() or ()]
    trailing = tuple((name, value) for name, value in metadata if name == ECHO_TRAILING)
    if trailing:
        context.set_trailing_metadata(trailing)
    initial = tuple((name, value) for name, value in metadata if name == ECHO_INITIAL)
    if initial:
        await context.send_initial_metadata(initial)
