"""Health and reflection by every transport."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.unit.definition_server.data_plane.served_transport import (
    GRACE,
    Serve,
    channel,
)

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_health_needs_no_key_and_is_not_serving_until_set(serve: Serve) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        stub: Any = health_pb2_grpc.HealthStub(client)
        states = []
        for serving in (None, True, False):
            if serving is not None:
                await transport.set_serving(serving)
            for service in ("", "avap.DefinitionEngine"):
                answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
                states.append(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    assert states == ["NOT_SERVING"] * 2 + ["SERVING"] * 2 + ["NOT_SERVING"] * 2


async def test_health_reports_whether_the_served_catalogue_is_up_to_date(serve: Serve) -> None:
    transport, port = await serve()
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    async with channel(port) as client:
        stub: Any = health_pb2_grpc.HealthStub(client)
        request = health_pb2.HealthCheckRequest(service="avap.freshness")
        watch = stub.Watch(request, timeout=30)
        assert (await watch.read()).status == not_serving
        await transport.set_serving(True)
        for fresh in (True, False, True):
            await transport.set_fresh(fresh)
            expected = serving if fresh else not_serving
            assert (await watch.read()).status == expected
            assert (await stub.Check(request, timeout=10)).status == expected
            listed = (await stub.List(health_pb2.HealthListRequest(), timeout=10)).statuses
            assert listed["avap.freshness"].status == expected
            # Readiness does not depend on freshness.
            assert listed[""].status == listed["avap.DefinitionEngine"].status == serving
        assert set(listed) == {"", "avap.DefinitionEngine", "avap.freshness", "liveness"}


async def services(client: grpc.aio.Channel) -> set[str]:
    """The services that reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(client)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    return {service.name for service in (await call.read()).list_services_response.service}


async def test_reflection_is_off_unless_configured(serve: Serve) -> None:
    _, port = await serve()
    async with channel(port) as client:
        # All in one batch, because a write after the refusal would fail in the client, which would then report that
        # failure instead.
        call: Any = client.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection_lists_every_service_if_configured(serve: Serve) -> None:
    _, port = await serve(reflection=True)
    async with channel(port) as client:
        assert await services(client) == {
            "avap.DefinitionEngine",
            "grpc.health.v1.Health",
            "grpc.reflection.v1.ServerReflection",
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def reflected(client: grpc.aio.Channel, version: str, **wanted: Any) -> Any:
    """The answer to one request of reflection."""
    stream: Any = client.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    request = reflection_pb2.ServerReflectionRequest(host="h", **wanted)
    call = stream(iter([request]), timeout=10)
    answer = await call.read()
    assert (answer.valid_host, answer.original_request) == ("h", request)
    return answer


async def test_an_idle_stream_of_reflection_does_not_hold_a_stop(serve: Serve) -> None:
    transport, port = await serve(reflection=True)
    async with channel(port) as client:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(client)
        idle = stub.ServerReflectionInfo(timeout=GRACE)
        await idle.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await idle.read()
        await asyncio.wait_for(transport.stop(GRACE), 10)
        assert await idle.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_finds_services_methods_messages_and_enums(serve: Serve, version: str) -> None:
    _, port = await serve(reflection=True)
    async with channel(port) as client:
        for symbol, package in (
            ("avap.DefinitionEngine", "avap"),
            ("avap.DefinitionEngine.GetCommand", "avap"),
            ("avap.CommandRequest", "avap"),
            ("avap.CommandRequest.name", "avap"),
            ("grpc.health.v1.Health.Watch", "grpc.health.v1"),
            ("grpc.health.v1.HealthCheckResponse.ServingStatus", "grpc.health.v1"),
            ("grpc.health.v1.HealthCheckResponse.SERVING", "grpc.health.v1"),
            ("grpc.reflection.v1.ServerReflection.ServerReflectionInfo", "grpc.reflection.v1"),
            ("grpc.reflection.v1alpha.ServerReflection", "grpc.reflection.v1alpha"),
        ):
            answer = await reflected(client, version, file_containing_symbol=symbol)
            files = answer.file_descriptor_response.file_descriptor_proto
            assert descriptor_pb2.FileDescriptorProto.FromString(files[0]).package == package, symbol
            name = descriptor_pb2.FileDescriptorProto.FromString(files[0]).name
            assert (await reflected(client, version, file_by_filename=name)).file_descriptor_response == (
                answer.file_descriptor_response
            )
        numbers = await reflected(client, version, all_extension_numbers_of_type="avap.CommandRequest")
        assert numbers.all_extension_numbers_response.base_type_name == "avap.CommandRequest"


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection_answers_unknown_names_with_not_found(serve: Serve, version: str) -> None:
    _, port = await serve(reflection=True)
    extension = reflection_pb2.ExtensionRequest(containing_type="avap.CommandRequest", extension_number=7)
    async with channel(port) as client:
        wanted: dict[str, Any]
        for wanted in (
            {"file_containing_symbol": "avap.Nothing"},
            {"file_containing_symbol": "avap.DefinitionEngine.Nothing"},
            {"file_containing_symbol": ""},
            {"file_by_filename": "nothing.proto"},
            {"file_containing_extension": extension},
            {"all_extension_numbers_of_type": "avap.Nothing"},
        ):
            answer = await reflected(client, version, **wanted)
            assert answer.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0], wanted
            assert answer.error_response.error_message == "not found", wanted


async def test_a_reflection_request_without_a_query_is_an_invalid_argument(serve: Serve) -> None:
    _, port = await serve(reflection=True)
    async with channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(client, "v1")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
