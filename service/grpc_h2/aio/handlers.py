"""Runs handlers, for the four kinds of calls. As in grpc.aio, a handler is a coroutine, an async generator, a coroutine
that uses the context's ``read`` and ``write``, or an ordinary function, which runs in a thread of the server's pool.

The text of a handler's exception is not sent to the client: the text is logged, and the status is UNKNOWN.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from grpc_h2.aio.call import AbortError, ServicerContext
from grpc_h2.rpc.faults import CallFault, UnreadableMessage
from grpc_h2.rpc.status import StatusCode

log = logging.getLogger("grpc_h2")

Resolve = Callable[[], Awaitable[Any]]
_END: Any = object()


class HandlerCallDetails(NamedTuple):
    """The key for the lookup of a handler. It has the attributes of ``grpc.HandlerCallDetails``."""

    method: str
    invocation_metadata: tuple[tuple[str, str | bytes], ...]


@dataclass(frozen=True, slots=True)
class MethodHandler:
    """How a method is served, for programs that do not import gRPC: it has the attributes of ``grpc.RpcMethodHandler``.

    Exactly one of the last four attributes is set: the one that the two flags select.
    """

    request_streaming: bool
    response_streaming: bool
    request_deserializer: Callable[[bytes], Any]
    response_serializer: Callable[[Any], bytes]
    unary_unary: Callable[..., Any] | None = None
    unary_stream: Callable[..., Any] | None = None
    stream_unary: Callable[..., Any] | None = None
    stream_stream: Callable[..., Any] | None = None

    @classmethod
    def unary(
        cls,
        function: Callable[..., Any],
        request_deserializer: Callable[[bytes], Any],
        response_serializer: Callable[[Any], bytes],
    ) -> MethodHandler:
        """One request, one response."""
        return cls(False, False, request_deserializer, response_serializer, unary_unary=function)

    @classmethod
    def streaming(
        cls,
        function: Callable[..., Any],
        request_deserializer: Callable[[bytes], Any],
        response_serializer: Callable[[Any], bytes],
    ) -> MethodHandler:
        """One request, a stream of responses."""
        return cls(False, True, request_deserializer, response_serializer, unary_stream=function)


class Requests:
    """The client's messages, for ``async for``."""

    __slots__ = ("_context",)

    def __init__(self, context: ServicerContext) -> None:
        self._context = context

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        message = await self._context.receive()
        if message is None:
            raise StopAsyncIteration
        return self._context.deserialize(message)


class Threads:
    """Runs the ordinary functions of one call in threads."""

    __slots__ = ("_executor", "running")

    def __init__(self, executor: Callable[[], Executor]) -> None:
        self._executor = executor
        self.running: Future[Any] | None = None
        """The function that was started last. The cancellation of a call does not end it: a thread cannot be ended."""

    async def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of ``function``, run in a thread."""
        self.running = self._executor().submit(function, *arguments)
        return await asyncio.wrap_future(self.running)


class SyncServicerContext:
    """`ServicerContext` for a thread. As in ``grpc.ServicerContext``, no method is awaited."""

    def __init__(self, context: ServicerContext, loop: asyncio.AbstractEventLoop) -> None:
        self._context = context
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)  # methods that neither wait nor send may be called from any thread

    def abort(self, code: Any, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """End the call with a status. Always raises `AbortError`."""
        self._context.set_aborted(code, details, trailing_metadata)
        raise AbortError("Locally aborted.")

    def abort_with_status(self, status: Any) -> NoReturn:
        """`abort` with the ``code``, ``details`` and ``trailing_metadata`` of one object."""
        self.abort(status.code, status.details, status.trailing_metadata or ())

    def send_initial_metadata(self, initial_metadata: Any) -> None:
        """Send the response headers; returns when they are queued. Raises ValueError as `ServicerContext` does."""
        asyncio.run_coroutine_threadsafe(self._context.send_initial_metadata(initial_metadata), self._loop).result()

    def cancel(self) -> None:
        """End the call as cancelled."""
        self._loop.call_soon_threadsafe(self._context.cancel)

    def add_callback(self, callback: Callable[[], Any]) -> bool:
        """Call ``callback()`` when the call has ended. Returns False if the call has ended already."""
        if self._context.done():
            return False
        self._loop.call_soon_threadsafe(self._context.add_done_callback, lambda _: callback())
        return True


class Run:
    """One run of a handler."""

    __slots__ = ("_context", "_loop", "threads")

    def __init__(
        self, context: ServicerContext, loop: asyncio.AbstractEventLoop, executor: Callable[[], Executor]
    ) -> None:
        self._context = context
        self._loop = loop
        self.threads = Threads(executor)

    async def __call__(self, handler: Any, resolve: Resolve | None) -> None:
        """Run ``handler``, or the handler that ``resolve`` returns, and send the status. Raises only CancelledError."""
        context = self._context
        try:
            if resolve is not None:
                handler = await resolve()
            if handler is None:
                raise CallFault(StatusCode.UNIMPLEMENTED, "Method not found!")
            if not handler.request_streaming:
                context.expect_one_message()
            context.deserializer = handler.request_deserializer
            context.serializer = handler.response_serializer
            await self._serve(handler)
            context.end()
        except AbortError:
            context.end()
        except UnreadableMessage as fault:  # a client may send any number of such messages
            context.note_refused(f"its message cannot be parsed: {type(fault.__cause__).__name__}")
            context.end(fault.status, fault.message)
        except CallFault as fault:
            if fault.__cause__ is not None:
                log.error("A message could not be written", exc_info=fault.__cause__, extra={"details": fault.message})
            context.end(fault.status, fault.message)
        except Exception as error:
            if not context.done():  # an exception that the client's leaving has caused is not logged
                log.error("Exception calling application", exc_info=error)
            # A handler may set a status and then raise: the status is kept.
            context.end(context.status or StatusCode.UNKNOWN, context.details() or "Exception calling application")

    async def _serve(self, handler: Any) -> None:
        context = self._context
        streaming = (
            "stream" if handler.request_streaming else "unary",
            "stream" if handler.response_streaming else "unary",
        )
        function = getattr(handler, "_".join(streaming))
        asynchronous = _is_async(function)
        argument: Any
        if not handler.request_streaming:
            argument = await self._only_request()
        elif asynchronous:
            argument = Requests(context)
        else:
            argument = self._sync_requests()
        if asynchronous:
            result = function(argument, context)
            if hasattr(result, "__aiter__"):
                await self._send_each(result)
                return
            result = await result
            if handler.response_streaming and hasattr(result, "__aiter__"):
                await self._send_each(result)
                return
        else:
            sync_context = SyncServicerContext(context, self._loop)
            result = await self.threads.run(function, argument, sync_context)
            if handler.response_streaming:
                await self._send_each(self._in_threads(iter(result)))
                return
        # As in grpc.aio, the message is discarded if the status is a failure. The messages of a stream were written
        # before.
        if not handler.response_streaming and context.status == StatusCode.OK and not context.done():
            context.put(context.serialize(result))

    async def _only_request(self) -> Any:
        # statuscodes.md: cardinality violations are UNIMPLEMENTED.
        message = await self._context.receive()
        if message is None:
            raise CallFault(StatusCode.UNIMPLEMENTED, "No message in a unary request")
        if await self._context.receive() is not None:
            raise CallFault(StatusCode.UNIMPLEMENTED, "More than one message in a unary request")
        return self._context.deserialize(message)

    async def _send_each(self, messages: Any) -> None:
        if not hasattr(messages, "aclose"):
            async for message in messages:
                await self._context.write(message)
            return
        async with aclosing(messages):
            async for message in messages:
                await self._context.write(message)

    async def _in_threads(self, messages: Iterator[Any]) -> AsyncIterator[Any]:
        while (message := await self.threads.run(next, messages, _END)) is not _END:
            yield message

    def _sync_requests(self) -> Iterator[Any]:
        """The client's messages, to be iterated in a thread."""
        while True:
            message = asyncio.run_coroutine_threadsafe(self._context.receive(), self._loop).result()
            if message is None:
                return
            yield self._context.deserialize(message)


def _is_async(function: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    call = getattr(type(function), "__call__", None)  # noqa: B004 - an object whose __call__ is async
    return any(
        inspect.iscoroutinefunction(candidate) or inspect.isasyncgenfunction(candidate)
        for candidate in (function, call)
    )
