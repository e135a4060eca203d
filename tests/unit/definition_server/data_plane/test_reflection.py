"""Reflection: what a stream answers to each kind of question, and the description of version 1."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.loop import eventually

from definition_server.data_plane import reflection
from definition_server.data_plane.reflection import Reflection

Request = reflection_pb2.ServerReflectionRequest


def described(name: str, *imports: str, extends: str = "", extensions: tuple[int, ...] = ()) -> Any:
    """A file ``name.proto`` of package ``name``: message ``M``, service ``S`` with method ``Do``."""
    file = descriptor_pb2.FileDescriptorProto(
        name=f"{name}.proto", package=name, dependency=[f"{each}.proto" for each in imports], syntax="proto2"
    )
    message = file.message_type.add(name="M")
    message.extension_range.add(start=100, end=200)
    service = file.service.add(name="S")
    service.method.add(name="Do", input_type=f".{name}.M", output_type=f".{name}.M")
    kind = descriptor_pb2.FieldDescriptorProto
    for number in extensions:
        file.extension.add(
            name=f"e{number}", number=number, extendee=extends, type=kind.TYPE_INT32, label=kind.LABEL_OPTIONAL
        )
    return file


@pytest.fixture
def pool() -> Any:
    """``top`` imports ``left`` and ``right``, and both import ``base``, whose message ``left`` extends."""
    pool = descriptor_pool.DescriptorPool()
    for file in (
        described("base"),
        described("left", "base", extends=".base.M", extensions=(150, 120)),
        described("right", "base"),
        described("top", "left", "right"),
    ):
        pool.AddSerializedFile(file.SerializeToString())
    return pool


class Aborted(Exception):
    pass


async def abort(code: grpc.StatusCode, details: str) -> None:
    raise Aborted(code, details)


async def answers(served: Reflection, *requests: Any) -> list[Any]:
    """What one stream answers to ``requests``."""

    async def asked() -> AsyncIterator[Any]:
        for request in requests:
            yield request

    return [answer async for answer in served.stream(asked(), SimpleNamespace(abort=abort))]


def files(answer: Any) -> list[str]:
    """The packages of the files in ``answer``, in order."""
    octets = answer.file_descriptor_response.file_descriptor_proto
    return [descriptor_pb2.FileDescriptorProto.FromString(each).package for each in octets]


async def test_services_are_listed_by_name_in_order(pool: Any) -> None:
    request = Request(host="here", list_services="*")
    (answer,) = await answers(Reflection(["b.S", "c.S", "a.S"], pool), request)
    assert [each.name for each in answer.list_services_response.service] == ["a.S", "b.S", "c.S"]
    assert (answer.valid_host, answer.original_request) == ("here", request)


def extension(containing_type: str, number: int) -> Any:
    return Request(
        file_containing_extension=reflection_pb2.ExtensionRequest(
            containing_type=containing_type, extension_number=number
        )
    )


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        pytest.param(Request(file_by_filename="base.proto"), ["base"], id="a file"),
        pytest.param(Request(file_containing_symbol="base.M"), ["base"], id="a message"),
        pytest.param(Request(file_containing_symbol="base.S"), ["base"], id="a service"),
        pytest.param(Request(file_containing_symbol="base.S.Do"), ["base"], id="a method"),
        pytest.param(Request(file_containing_symbol="left.e120"), ["left", "base"], id="the name of an extension"),
        pytest.param(extension("base.M", 150), ["left", "base"], id="the number of an extension"),
        pytest.param(
            Request(file_by_filename="top.proto"), ["top", "left", "right", "base"], id="each imported file once"
        ),
    ],
)
async def test_a_file_is_sent_before_the_files_that_it_imports(pool: Any, request_: Any, found: list[str]) -> None:
    (answer,) = await answers(Reflection([], pool), request_)
    assert files(answer) == found


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(Request(file_by_filename="none.proto"), id="a file"),
        pytest.param(Request(file_containing_symbol="base.N"), id="a symbol"),
        pytest.param(Request(file_containing_symbol="base.S.Undo"), id="a method"),
        pytest.param(Request(file_containing_symbol="base"), id="a package"),
        pytest.param(Request(file_containing_symbol=""), id="no name"),
        pytest.param(extension("base.M", 151), id="the number of an extension"),
        pytest.param(extension("base.N", 150), id="an extended message"),
        pytest.param(Request(all_extension_numbers_of_type="base.N"), id="the extensions of a message"),
    ],
)
async def test_an_unknown_name_is_not_found_and_the_stream_continues(pool: Any, request_: Any) -> None:
    missing, after = await answers(Reflection([], pool), request_, Request(file_by_filename="base.proto"))
    assert (missing.error_response.error_code, missing.error_response.error_message) == (5, "not found")
    assert missing.original_request == request_
    assert missing.WhichOneof("message_response") == "error_response"
    assert files(after) == ["base"]


async def test_the_extensions_of_a_message_are_numbers_in_order(pool: Any) -> None:
    wanted = [Request(all_extension_numbers_of_type=name) for name in ("base.M", "left.M")]
    some, none = (each.all_extension_numbers_response for each in await answers(Reflection([], pool), *wanted))
    assert (some.base_type_name, list(some.extension_number)) == ("base.M", [120, 150])
    assert (none.base_type_name, list(none.extension_number)) == ("left.M", [])


async def test_a_stream_is_not_sent_an_import_twice_and_the_next_stream_is_sent_all_again(pool: Any) -> None:
    served = Reflection([], pool)
    wanted = [Request(file_by_filename=f"{name}.proto") for name in ("left", "right", "left", "base", "top")]
    assert [files(each) for each in await answers(served, *wanted)] == [
        ["left", "base"],
        ["right"],
        ["left"],
        ["base"],
        ["top"],
    ], "what is asked for by name is sent always"
    assert [files(each) for each in await answers(served, wanted[1])] == [["right", "base"]]


async def test_a_request_without_a_query_ends_the_stream_as_invalid(pool: Any) -> None:
    with pytest.raises(Aborted) as caught:
        await answers(Reflection([], pool), Request(host="here"))
    code, details = caught.value.args
    assert (code, details) == (grpc.StatusCode.INVALID_ARGUMENT, "invalid MessageRequest: it has no request")


async def test_at_the_end_waiting_streams_end_at_once_and_later_streams_after_their_first_answer(pool: Any) -> None:
    served = Reflection(["a.S"], pool)
    waits, ended = 0, 0

    async def asked() -> AsyncIterator[Any]:
        nonlocal waits, ended
        yield Request(list_services="")
        waits += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended += 1

    async def run() -> int:
        return len([answer async for answer in served.stream(asked(), SimpleNamespace(abort=abort))])

    running = [asyncio.create_task(run()) for _ in range(3)]
    await eventually(lambda: waits == 3, "three streams wait")
    running[0].cancel()
    await asyncio.wait(running[:1])
    served.end_streams()
    served.end_streams()
    assert await asyncio.gather(*running[1:]) == [1, 1], "each was answered once"
    await eventually(lambda: ended == 3, "their clients are not asked any more")
    assert await run() == 1, "what is asked is answered, and no more is waited for"


def test_fields_and_methods_of_the_v1_service_have_types_of_its_own_package() -> None:
    proto = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(proto)
    reflection._rename(proto)
    types = [field.type_name for message in proto.message_type for field in message.field if field.type_name]
    types += [
        name for each in proto.service for method in each.method for name in (method.input_type, method.output_type)
    ]
    assert len(types) >= 5
    assert {name.rpartition(".")[0] for name in types} == {".grpc.reflection.v1"}


def test_version_1_is_added_to_a_pool_once_with_the_same_messages() -> None:
    pool = descriptor_pool.DescriptorPool()
    reflection._describe_v1(pool)
    reflection._describe_v1(pool)
    service = pool.FindServiceByName(reflection.V1)
    assert service.file.name == "grpc/reflection/v1/reflection.proto"
    method = service.methods_by_name["ServerReflectionInfo"]
    for ours, theirs in (
        (method.input_type, reflection_pb2.ServerReflectionRequest.DESCRIPTOR),
        (method.output_type, reflection_pb2.ServerReflectionResponse.DESCRIPTOR),
    ):
        assert ours.full_name == theirs.full_name.replace("v1alpha", "v1")
        assert [(each.name, each.number) for each in ours.fields] == [
            (each.name, each.number) for each in theirs.fields
        ]


class Server:
    """Keeps what is offered on it."""

    def __init__(self) -> None:
        self.handlers: list[Any] = []

    def add_generic_rpc_handlers(self, handlers: tuple[Any, ...]) -> None:
        self.handlers += handlers


async def test_both_versions_are_offered_and_listed_with_the_services() -> None:
    server = Server()
    served = reflection.add_reflection(["z.S", "a.S"], server)
    assert [each.service_name() for each in server.handlers] == [reflection.V1, reflection.V1ALPHA]
    (answer,) = await answers(served, Request(list_services=""))
    listed = [each.name for each in answer.list_services_response.service]
    assert listed == ["a.S", reflection.V1, reflection.V1ALPHA, "z.S"]
    for each in server.handlers:
        method = f"/{each.service_name()}/ServerReflectionInfo"
        handler = each.service(SimpleNamespace(method=method, invocation_metadata=()))
        assert handler.request_streaming
        assert handler.response_streaming
        request = Request(file_by_filename="a")
        assert handler.request_deserializer(request.SerializeToString()) == request
        assert handler.response_serializer(answer) == answer.SerializeToString()
