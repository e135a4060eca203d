"""gRPC server reflection, versions v1 and v1alpha, with the behaviour of grpc-go.

grpcio's servicer offers only v1alpha, and does not find methods (``package.Service.Method``), which ghz requests. The
messages of both versions have the same fields, so the classes of v1alpha serve both. The descriptor of v1, which a
client may request too, is made from that of v1alpha.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_health.v1 import health_pb2  # noqa: F401 - its descriptors are in the pool from then on
from grpc_reflection.v1alpha import reflection_pb2

from definition_server.rpc import avap_pb2  # noqa: F401 - the same

V1ALPHA = "grpc.reflection.v1alpha.ServerReflection"
V1 = "grpc.reflection.v1.ServerReflection"
_V1_FILE = "grpc/reflection/v1/reflection.proto"
_NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]

_Request = reflection_pb2.ServerReflectionRequest
_Response = reflection_pb2.ServerReflectionResponse


def add_reflection(services: Iterable[str], server: Any) -> Reflection:
    """Offer reflection of ``services``, and of itself, on a ``grpc.aio.Server`` or `grpc_h2.Server`."""
    pool = descriptor_pool.Default()
    _describe_v1(pool)
    answers = Reflection((*services, V1, V1ALPHA), pool)
    for name in (V1, V1ALPHA):
        method = grpc.stream_stream_rpc_method_handler(answers.stream, _Request.FromString, _Response.SerializeToString)
        handlers = {"ServerReflectionInfo": method}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
    return answers


class Reflection:
    """Answers from one descriptor pool."""

    def __init__(self, services: Iterable[str], pool: Any) -> None:
        self._services = sorted(services)
        self._pool = pool
        self._idle: set[asyncio.Future[None]] = set()
        """A future for each stream that waits for its client's next request. Completing it ends the stream."""
        self._ending = False

    def end_streams(self) -> None:
        """From now on, end every stream with status OK once its requests are answered. Otherwise a client could keep a
        stream open for ever, and a drain would wait for this stream."""
        self._ending = True
        for waiting in list(self._idle):
            if not waiting.done():
                waiting.set_result(None)

    async def stream(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        """The method ``ServerReflectionInfo``. A file is sent once on a stream, as in grpc-go."""
        sent: set[str] = set()
        questions = aiter(requests)
        while (request := await self._next(questions)) is not None:
            kind = request.WhichOneof("message_request")
            if kind is None:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "invalid MessageRequest: it has no request")
            answer = _Response(valid_host=request.host, original_request=request)
            try:
                self._fill(answer, kind, request, sent)
            except KeyError:
                answer.error_response.error_code = _NOT_FOUND
                answer.error_response.error_message = "not found"
            yield answer

    async def _next(self, questions: AsyncIterator[Any]) -> Any:
        """The client's next request; None if there is none or the stream is to end."""
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._ending:
            waiting.set_result(None)
        asked = asyncio.ensure_future(_question(questions))
        self._idle.add(waiting)
        try:
            await asyncio.wait((asked, waiting), return_when=asyncio.FIRST_COMPLETED)
            return asked.result() if asked.done() else None
        finally:
            self._idle.discard(waiting)
            asked.cancel()

    def _fill(self, answer: Any, kind: str, request: Any, sent: set[str]) -> None:
        """Fill ``answer`` for ``request``. Raises KeyError if the pool does not define the requested name."""
        pool = self._pool
        if kind == "list_services":
            for name in self._services:
                answer.list_services_response.service.add(name=name)
        elif kind == "all_extension_numbers_of_type":
            message = pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
            numbers = sorted(extension.number for extension in pool.FindAllExtensions(message))
            answer.all_extension_numbers_response.base_type_name = message.full_name
            answer.all_extension_numbers_response.extension_number.extend(numbers)
        else:
            answer.file_descriptor_response.file_descriptor_proto.extend(_files(self._file(kind, request), sent))

    def _file(self, kind: str, request: Any) -> Any:
        pool = self._pool
        if kind == "file_by_filename":
            return pool.FindFileByName(request.file_by_filename)
        if kind == "file_containing_extension":
            wanted = request.file_containing_extension
            message = pool.FindMessageTypeByName(wanted.containing_type)
            return pool.FindExtensionByNumber(message, wanted.extension_number).file
        return self._file_of_symbol(request.file_containing_symbol)

    def _file_of_symbol(self, symbol: str) -> Any:
        """The file of a message, field, enum, enum value, extension, service or method with that full name."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:  # the pool does not find methods
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            return found.methods_by_name[method].containing_service.file


def _files(file: Any, sent: set[str]) -> list[bytes]:
    """``file`` and the files that it imports, serialized, without files that were ``sent`` before; ``file`` is always
    included, as the first.
    """
    found, waiting = [], [file]
    first = True
    while waiting:
        each = waiting.pop(0)
        if each.name in sent and not first:
            continue
        first = False
        sent.add(each.name)
        proto = descriptor_pb2.FileDescriptorProto()
        each.CopyToProto(proto)
        found.append(proto.SerializeToString())
        waiting += each.dependencies
    return found


def _describe_v1(pool: Any) -> None:
    """Add the file of v1 to ``pool``, unless ``pool`` has it."""
    try:
        pool.FindFileByName(_V1_FILE)
    except KeyError:
        proto = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(proto)
        octets = proto.SerializeToString()
        renamed = descriptor_pb2.FileDescriptorProto.FromString(octets)
        _rename(renamed)
        pool.AddSerializedFile(renamed.SerializeToString())


def _rename(proto: Any) -> None:
    old, new = f".{proto.package}.", ".grpc.reflection.v1."
    proto.name, proto.package = _V1_FILE, "grpc.reflection.v1"
    for message in proto.message_type:
        for field in message.field:
            if field.type_name.startswith(old):
                field.type_name = new + field.type_name[len(old) :]
    for service in proto.service:
        for method in service.method:
            method.input_type = new + method.input_type[len(old) :]
            method.output_type = new + method.output_type[len(old) :]


async def _question(questions: AsyncIterator[Any]) -> Any:
    """The next item; None at the end of the stream."""
    return await anext(questions, None)
