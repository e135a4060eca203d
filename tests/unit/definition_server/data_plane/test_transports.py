"""Every transport with a stock grpcio client: the contract's octets, statuses and messages, and an orderly end."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
import weakref
from array import array
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import repeat
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.support.certificates import Authority
from tests.support.h2_wire import HELLO, PING, SETTINGS_ACK
from tests.support.leftovers import nothing_left
from tests.support.logs import captured_logs, logged
from tests.support.loop import eventually, promptly
from tests.support.snapshots import opened, row
from tests.support.stats import Pages

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import CannotListen, Transport, create_transport, native
from definition_server.data_plane.transports.grpcio import GrpcioTransport
from definition_server.data_plane.transports.native import NativeTransport
from definition_server.ipc.messages import Configure
from definition_server.ipc.tls_files import TlsFiles
from definition_server.rpc import avap_pb2, avap_pb2_grpc
from grpc_h2 import PreparedAnswers, encode_block, frames

KEY = "the key"
AUTHENTIC = (("x-avap-auth", KEY),)
MIB = 1024 * 1024
GRACE = 60.0

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


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    with nothing_left(c_core=True):
        yield


@pytest.fixture
def page() -> Pages:
    return Pages(1)


@pytest.fixture
def engine() -> DefinitionEngine:
    engine = DefinitionEngine()
    engine.snapshot = opened(row("if", "x = 'ü'"), "else")
    return engine


Serve = Callable[..., Any]


CLASSES = {"grpcio": GrpcioTransport, "native": NativeTransport}


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing([sha256(KEY.encode()).hexdigest()])


@pytest.fixture
async def serve(transport: str, engine: DefinitionEngine, keys: KeyRing, page: Pages) -> AsyncIterator[Serve]:
    """Starts a transport of the parametrized kind with the given configuration; returns it and its port."""
    kind = transport
    started: list[Transport] = []

    async def serve(tls: TlsFiles | None = None, **changes: Any) -> tuple[Transport, int]:
        endpoint = Endpoint(engine, keys, page.slot(0))
        transport = create_transport(replace(CONFIGURE, transport=kind, **changes), endpoint)
        assert isinstance(transport, CLASSES[kind])
        port = await transport.start(tls)
        started.append(transport)
        return transport, port

    yield serve
    for transport in started:
        await transport.stop(0)


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


# -- the contract ----------------------------------------------------------------------------------------------------


async def test_a_command_is_answered_with_the_snapshots_bytes(serve: Serve, engine: DefinitionEngine) -> None:
    _, port = await serve()
    assert engine.snapshot is not None
    async with channel(port) as client:
        assert await raw(client, "GetCommand", b"\x0a\x02if") == engine.snapshot.answer(b"if")
        assert await raw(client, "SyncCatalog", b"") == bytes(engine.snapshot.body)


async def test_a_generated_stub_reads_every_field(serve: Serve, engine: DefinitionEngine) -> None:
    _, port = await serve()
    assert engine.snapshot is not None
    async with channel(port) as client:
        stub: Any = avap_pb2_grpc.DefinitionEngineStub(client)
        command = await stub.GetCommand(avap_pb2.CommandRequest(name="if"), metadata=AUTHENTIC, timeout=10)
        catalog = await stub.SyncCatalog(avap_pb2.Empty(), metadata=AUTHENTIC, timeout=10)
    assert (command.name, command.type, command.interface_json) == ("if", "function", "[]")
    assert command.code == "x = 'ü'".encode()
    assert [(c.name, len(c.hash)) for c in catalog.commands] == [("else", 64), ("if", 64)]
    assert catalog.commands[1] == command
    assert (catalog.total_count, catalog.version_hash) == (2, engine.snapshot.version_hash)


async def test_every_answer_names_the_catalogue_it_comes_from(serve: Serve, engine: DefinitionEngine) -> None:
    transport, port = await serve()
    requests = {"GetCommand": b"\x0a\x02if", "SyncCatalog": b""}
    async with channel(port) as client:
        for snapshot in (engine.snapshot, opened(row("if", "x = 3"), "else"), opened(row("if", "y" * 70_000))):
            assert snapshot is not None
            if snapshot is not engine.snapshot:
                transport.begin_swap(snapshot).commit()
            for method, request in requests.items():
                for _ in range(2):  # the second answer is a remembered one
                    call: Any = client.unary_unary(f"/avap.DefinitionEngine/{method}")(request, metadata=AUTHENTIC)
                    assert list(await call.initial_metadata()) == [("avap-version", snapshot.version_hash[:16])]
                    await call


async def test_a_refusal_names_the_catalogue_only_where_the_key_is_right(
    serve: Serve, engine: DefinitionEngine
) -> None:
    _, port = await serve()
    assert engine.snapshot is not None
    version = ("avap-version", engine.snapshot.version_hash[:16])
    async with channel(port) as client:
        for metadata, told in ((AUTHENTIC, True), ((), False)):
            call: Any = client.unary_unary("/avap.DefinitionEngine/GetCommand")(b"\x0a\x04none", metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            found = [*(caught.value.initial_metadata() or ()), *(caught.value.trailing_metadata() or ())]
            assert (version in found) is told
            assert told or "avap-version" not in dict(found)


async def test_answers_that_are_not_to_name_the_catalogue_have_no_metadata(
    serve: Serve, engine: DefinitionEngine
) -> None:
    engine.names_version = False
    transport, port = await serve()
    async with channel(port) as client:
        for snapshot in (engine.snapshot, opened(row("if", "x = 3"))):
            assert snapshot is not None
            swap = transport.begin_swap(snapshot)
            await swap.prepare()
            swap.commit()
            call: Any = client.unary_unary("/avap.DefinitionEngine/GetCommand")(b"\x0a\x02if", metadata=AUTHENTIC)
            assert list(await call.initial_metadata()) == []
            await call


REFUSED = (grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials")


@pytest.mark.parametrize("method", ["GetCommand", "SyncCatalog"])
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("x-avap-auth", ""),),
        (("x-avap-auth", "wrong"),),
        (("x-avap-auth", KEY), ("x-avap-auth", KEY)),
        (("x-avap-auth-bin", KEY.encode()),),
    ],
    ids=["none", "empty", "wrong", "twice", "binary"],
)
async def test_a_call_without_the_key_is_refused(serve: Serve, method: str, metadata: Any) -> None:
    _, port = await serve()
    async with channel(port) as client:
        assert await failure(client, method, b"", metadata) == REFUSED


@pytest.mark.parametrize("name", ["missing", "", "fehlt ü 🎈", "a\nb", "100%", "x" * 100])
async def test_the_error_for_an_unknown_name_repeats_the_name(serve: Serve, name: str) -> None:
    _, port = await serve()
    request = avap_pb2.CommandRequest(name=name).SerializeToString()
    async with channel(port) as client:
        told = (grpc.StatusCode.NOT_FOUND, f"Command '{name}' not found")
        assert await failure(client, "GetCommand", request) == told


async def test_the_error_for_a_name_of_any_length_reaches_the_client(serve: Serve) -> None:
    _, port = await serve()
    request = avap_pb2.CommandRequest(name="🎈" * 1000).SerializeToString()
    async with channel(port) as client:
        told = (grpc.StatusCode.NOT_FOUND, f"Command '{'🎈' * 200}…' not found")
        assert await failure(client, "GetCommand", request) == told


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize(
    "method",
    [
        "/avap.DefinitionEngine/GetCommand",
        "/avap.DefinitionEngine/SyncCatalog",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
    ],
)
async def test_a_request_above_four_kib_is_refused_by_every_method(
    serve: Serve, method: str, compression: grpc.Compression | None
) -> None:
    _, port = await serve()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as client:
        for length, refused in ((4093, False), (4094, True), (200_000, True)):  # and three octets of tag and length
            request = avap_pb2.CommandRequest(name="n" * length).SerializeToString()
            call: Any = client.unary_stream(method)(
                request, metadata=(("x-avap-auth", KEY),), timeout=10, compression=compression
            )
            with suppress(grpc.aio.AioRpcError):
                await call.read()
            if refused:
                assert await call.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            else:
                assert not call.done() or await call.code() != grpc.StatusCode.RESOURCE_EXHAUSTED
            call.cancel()


async def test_a_client_that_pings_without_calls_in_the_allowed_interval_stays_connected(serve: Serve) -> None:
    _, port = await serve(keepalive_min_time_seconds=0.5)
    options = [
        ("grpc.keepalive_time_ms", 500),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as client:
        await client.channel_ready()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.wait_for_state_change(grpc.ChannelConnectivity.READY), 3.5)


async def test_an_undecodable_request_is_an_invalid_argument(serve: Serve) -> None:
    _, port = await serve()
    async with channel(port) as client:
        told = (grpc.StatusCode.INVALID_ARGUMENT, "The request is not a valid avap.CommandRequest")
        assert await failure(client, "GetCommand", b"\xff\xff") == told
        told = (grpc.StatusCode.INVALID_ARGUMENT, "The request is not a valid avap.Empty")
        assert await failure(client, "SyncCatalog", b"\xff\xff") == told


async def test_without_a_catalogue_calls_are_unavailable(serve: Serve, engine: DefinitionEngine) -> None:
    engine.snapshot = None
    _, port = await serve()
    async with channel(port) as client:
        assert (await failure(client, "GetCommand", b"\x0a\x02if"))[0] is grpc.StatusCode.UNAVAILABLE


async def test_a_bug_is_logged_and_its_text_is_not_sent(
    serve: Serve, engine: DefinitionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, port = await serve()
    monkeypatch.setattr(engine, "_current", lambda: 1 / 0)
    with captured_logs() as logs:
        async with channel(port) as client:
            assert await failure(client, "GetCommand", b"") == (grpc.StatusCode.INTERNAL, "Internal error")
    (line,) = logged(logs, "Unexpected failure in a call", log_level="error", method="GetCommand")
    assert line["exc_info"]


class ExecuteBatchError(Exception):
    """C-core's, by name: grpcio does not export it."""


async def test_grpcios_traceback_for_a_client_that_left_is_not_logged_and_others_are(
    serve: Serve, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    if transport != "grpcio":
        pytest.skip("native does not use grpcio's server")
    await serve()
    of_grpcio = logging.getLogger("grpc._cython.cygrpc")
    for error in (ExecuteBatchError("Failed"), ValueError("a bug")):
        try:
            raise error
        except (ExecuteBatchError, ValueError):
            of_grpcio.exception("Unexpected [%s] raised by servicer method", type(error).__name__)
    assert [record.getMessage() for record in caplog.records] == ["Unexpected [ValueError] raised by servicer method"]


async def test_another_method_is_unimplemented(serve: Serve) -> None:
    _, port = await serve()
    async with channel(port) as client:
        assert (await failure(client, "DropTable", b""))[0] is grpc.StatusCode.UNIMPLEMENTED


async def test_calls_are_counted_by_status(serve: Serve, page: Pages) -> None:
    _, port = await serve()
    async with channel(port) as client:
        await raw(client, "GetCommand", b"\x0a\x02if")
        await failure(client, "GetCommand", b"")
        await failure(client, "SyncCatalog", b"", ())
    assert page.slot(0).read().requests == {"200": 1, "400": 0, "401": 1, "404": 1, "500": 0, "503": 0}


async def test_a_batch_of_calls_is_counted_call_by_call(serve: Serve, page: Pages) -> None:
    _, port = await serve()
    async with channel(port) as client:
        await asyncio.gather(*(raw(client, "GetCommand", b"\x0a\x02if") for _ in range(50)))
        await asyncio.gather(*(failure(client, "GetCommand", b"") for _ in range(30)))
        await asyncio.gather(*(raw(client, "SyncCatalog", b"") for _ in range(20)))
    reading = page.slot(0).read()
    assert reading.requests == {"200": 70, "400": 0, "401": 0, "404": 30, "500": 0, "503": 0}
    assert {method: sum(counts) for method, counts in reading.latency.items()} == {"GetCommand": 80, "SyncCatalog": 20}
    assert all(0 < seconds < 60 for seconds in reading.latency_sum_seconds.values())


# -- what may be remembered --------------------------------------------------------------------------------------------


async def test_after_a_swap_the_next_call_of_an_open_connection_gets_the_new_answer(
    serve: Serve, engine: DefinitionEngine
) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        for number in range(5):
            snapshot = opened(row("if", f"# {number}"))
            transport.begin_swap(snapshot).commit()
            assert engine.snapshot is snapshot
            for _ in range(3):  # the same octets each time
                assert await raw(client, "GetCommand", b"\x0a\x02if") == snapshot.answer(b"if")
                assert await raw(client, "SyncCatalog", b"") == bytes(snapshot.body)
        transport.begin_swap(opened("else")).commit()
        assert (await failure(client, "GetCommand", b"\x0a\x02if"))[0] is grpc.StatusCode.NOT_FOUND
        transport.begin_swap(snapshot := opened("if")).commit()
        assert await raw(client, "GetCommand", b"\x0a\x02if") == snapshot.answer(b"if")


async def test_prepared_answers_are_used_only_for_the_snapshot_they_were_made_from(
    serve: Serve, engine: DefinitionEngine
) -> None:
    transport, port = await serve()
    served = engine.snapshot
    coming, another = opened(row("if", "# coming"), "new"), opened(row("if", "# another"))
    async with channel(port) as client:

        async def answers() -> list[bytes]:
            return [await raw(client, "GetCommand", b"\x0a\x02if"), await raw(client, "SyncCatalog", b"")]

        def expected(snapshot: Snapshot) -> list[bytes]:
            return [snapshot.answer(b"if") or b"", bytes(snapshot.body)]

        await answers()
        assert (await failure(client, "GetCommand", b"\x0a\x03new"))[0] is grpc.StatusCode.NOT_FOUND
        swap = transport.begin_swap(coming)
        await swap.prepare()
        assert served is not None
        assert await answers() == expected(served), "prepared is not served"
        assert swap.commit() is served
        await swap.release()
        assert await answers() == expected(coming)
        assert await raw(client, "GetCommand", b"\x0a\x03new") == coming.answer(b"new"), "it was remembered as missing"
        await transport.begin_swap(coming).prepare()
        transport.begin_swap(another).commit()
        assert await answers() == expected(another), "what was prepared for another snapshot is not used"


@pytest.mark.transports("native")
async def test_after_a_prepared_swap_no_call_looks_an_answer_up(
    serve: Serve, engine: DefinitionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, port = await serve()
    looked_up: list[bytes] = []
    answer = Snapshot.answer

    def counted(snapshot: Snapshot, name: bytes) -> bytes | None:
        looked_up.append(name)
        return answer(snapshot, name)

    monkeypatch.setattr(Snapshot, "answer", counted)
    async with channel(port) as client:
        for name in ("if", "no"):
            await answered(client, name)
        coming = opened(row("if", "# coming"))
        swap = transport.begin_swap(coming)
        await swap.prepare()
        swap.commit()
        looked_up.clear()
        for name in ("if", "no"):
            await answered(client, name)
    assert looked_up == []


async def answered(client: grpc.aio.Channel, name: str) -> None:
    with suppress(grpc.aio.AioRpcError):
        await raw(client, "GetCommand", b"\x0a" + bytes([len(name)]) + name.encode())


@pytest.mark.transports("native")
async def test_a_preparation_that_takes_too_long_is_ended(
    serve: Serve, engine: DefinitionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, port = await serve()
    monkeypatch.setattr(native, "PREPARATION_SECONDS", 0.05)
    monkeypatch.setattr(PreparedAnswers, "steps", lambda prepared: repeat(None))
    async with channel(port) as client:
        await answered(client, "if")
        swap = transport.begin_swap(coming := opened(row("if", "# coming")))
        await promptly(swap.prepare())
        swap.commit()
        assert await raw(client, "GetCommand", b"\x0a\x02if") == coming.answer(b"if")


async def test_replaced_keys_apply_to_the_next_call_of_an_open_connection(serve: Serve, keys: KeyRing) -> None:
    _, port = await serve()
    async with channel(port) as client:
        for _ in range(3):
            for _ in range(5):
                await raw(client, "GetCommand", b"\x0a\x02if")
            keys.replace([sha256(b"another").hexdigest()])
            for method in ("GetCommand", "SyncCatalog"):
                assert await failure(client, method, b"\x0a\x02if" if method == "GetCommand" else b"") == REFUSED
            keys.replace([sha256(b"another").hexdigest(), sha256(KEY.encode()).hexdigest()])


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("size", [100, 100_000])
async def test_nothing_keeps_a_replaced_snapshot_in_memory(
    serve: Serve, engine: DefinitionEngine, prepared: bool, size: int
) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        memory = array("B", opened(row("if", "x" * size)).buffer)
        transport.begin_swap(Snapshot(memoryview(memory))).commit()
        replaced = weakref.ref(memory)
        del memory
        await raw(client, "SyncCatalog", b"")
        await raw(client, "GetCommand", b"\x0a\x02if")
        swap = transport.begin_swap(opened("if"))
        if prepared:
            await swap.prepare()
        swap.commit()
        await swap.release()
        await eventually(lambda: replaced() is None, "the old snapshot was released")


# -- sizes -----------------------------------------------------------------------------------------------------------


async def test_a_request_above_4_mib_is_refused_before_it_is_read(serve: Serve, page: Pages) -> None:
    _, port = await serve()
    async with channel(port) as client:
        status, message = await failure(client, "GetCommand", bytes(4 * MIB + 1))
        assert status is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert str(4 * MIB + 1) in str(message)
        assert await raw(client, "GetCommand", b"\x0a\x02if"), "the connection lives on"
    assert sum(page.slot(0).read().requests.values()) == 1


async def test_an_answer_above_4_mib_reaches_a_client_that_raised_its_limit(
    serve: Serve, engine: DefinitionEngine
) -> None:
    engine.snapshot = opened(row("large", "x" * (10 * MIB)))
    _, port = await serve()
    async with channel(port) as client:
        assert (await failure(client, "SyncCatalog", b""))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
    async with channel(port, [("grpc.max_receive_message_length", -1)]) as client:
        assert await raw(client, "SyncCatalog", b"") == bytes(engine.snapshot.body)


# -- health and reflection -------------------------------------------------------------------------------------------


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


async def test_health_says_whether_what_is_served_is_up_to_date(serve: Serve) -> None:
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
            assert listed[""].status == listed["avap.DefinitionEngine"].status == serving  # never red for that
        assert set(listed) == {"", "avap.DefinitionEngine", "avap.freshness", "liveness"}


async def services(client: grpc.aio.Channel) -> set[str]:
    """The services that reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(client)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    return {service.name for service in (await call.read()).list_services_response.service}


async def test_reflection_is_off_unless_configured(serve: Serve) -> None:
    _, port = await serve()
    async with channel(port) as client:
        # One batch: a write after the refusal would fail in the client, which would then report that instead.
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
async def test_reflection_answers_what_it_does_not_know_with_not_found(serve: Serve, version: str) -> None:
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


async def test_reflection_that_asks_for_nothing_is_an_invalid_argument(serve: Serve) -> None:
    _, port = await serve(reflection=True)
    async with channel(port) as client:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await reflected(client, "v1")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


# -- trust in clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", ["root", "intermediate", "leaf", "other"])
async def test_a_clients_certificate_is_accepted_by_each_certificate_of_the_trust_file_on_its_chain(
    serve: Serve, trusted: str, tmp_path: Path
) -> None:
    """Both transports give the same answer, also where the file holds an intermediate authority alone."""
    root = Authority(tmp_path, "root")
    intermediate = root.intermediate("intermediate")
    server, client = root.sign("server"), intermediate.sign("client")
    trust = {
        "root": root.cert, "intermediate": intermediate.cert, "leaf": client.cert,
        "other": Authority(tmp_path, "other").cert,
    }[trusted]  # fmt: skip
    with TlsFiles.seal(*(path.read_bytes() for path in (server.cert, server.key, trust))) as tls:
        _, port = await serve(tls)
    chain = client.cert.read_bytes() + intermediate.cert.read_bytes()
    credentials = grpc.ssl_channel_credentials(root.cert.read_bytes(), client.key.read_bytes(), chain)
    async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as secure:
        stub: Any = health_pb2_grpc.HealthStub(secure)
        call = stub.Check(health_pb2.HealthCheckRequest(), timeout=10)
        if trusted == "other":
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        else:
            assert (await call).status == health_pb2.HealthCheckResponse.NOT_SERVING


# -- what is logged about clients ------------------------------------------------------------------------------------


async def test_a_wrong_key_is_logged_with_the_peer_at_a_limited_rate(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    transport, port = await serve()
    with caplog.at_level(logging.INFO):
        async with channel(port) as client:
            for number in range(60):
                with pytest.raises(grpc.aio.AioRpcError):
                    await raw(client, "GetCommand", b"\x0a\x01a", (("x-avap-auth", f"wrong{number}"),))
        await transport.stop(0)
    lines = [record for record in caplog.records if record.getMessage() == "A call was not authorized"]
    left_out = sum(record.__dict__.get("left_out", 0) for record in caplog.records)
    assert len(lines) < 60
    assert len(lines) + left_out == 60
    assert all(line.__dict__["peer"].startswith("ipv4:127.0.0.1:") for line in lines)
    assert {line.__dict__["error"] for line in lines} == {"/avap.DefinitionEngine/GetCommand"}
    assert "wrong" not in caplog.text


# -- the port --------------------------------------------------------------------------------------------------------


async def test_an_address_of_another_machine_cannot_be_listened_on(serve: Serve) -> None:
    with pytest.raises(CannotListen, match=r"cannot listen on 192\.0\.2\.1:50051"):
        await serve(host="192.0.2.1", port=50051)


async def test_a_port_of_another_server_cannot_be_listened_on(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(CannotListen, match=f"cannot listen on 127.0.0.1:{port}"):
            await serve(port=port)


@pytest.mark.transports("grpcio")
async def test_several_workers_share_a_port(serve: Serve) -> None:
    _, port = await serve()
    assert (await serve(port=port))[1] == port


async def test_it_listens_on_ipv6(serve: Serve) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 here")
    _, port = await serve(host="::1")
    async with grpc.aio.insecure_channel(f"[::1]:{port}") as client:
        assert await raw(client, "GetCommand", b"\x0a\x02if")


async def test_a_connection_of_maximum_age_reconnects_and_no_call_fails(serve: Serve) -> None:
    _, port = await serve(max_connection_age_seconds=0.2)
    async with channel(port) as client:
        left = 0
        before = client.get_state(try_to_connect=True)
        deadline = time.monotonic() + 30
        while left < 2:
            assert time.monotonic() < deadline, "no connection was asked to reconnect"
            await raw(client, "GetCommand", b"\x0a\x02if")
            await asyncio.sleep(0)
            state = client.get_state()
            left += before is grpc.ChannelConnectivity.READY is not state
            before = state


async def test_a_connection_without_calls_is_closed_after_the_idle_time(serve: Serve) -> None:
    _, port = await serve(max_connection_idle_seconds=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HELLO + SETTINGS_ACK)
    await promptly(reader.read())
    writer.close()
    await writer.wait_closed()


async def test_a_call_that_outlives_the_maximum_age_and_its_grace_is_ended(serve: Serve, page: Pages) -> None:
    _, port = await serve(max_connection_age_seconds=0.5, drain_timeout_seconds=0.5)
    async with channel(port) as client:
        call = await open_call(client, page)
        assert await promptly(call.code()) is grpc.StatusCode.UNAVAILABLE


@pytest.mark.transports("native")
async def test_a_silent_peer_is_sent_a_ping_and_disconnected(serve: Serve) -> None:
    """(C-core sends pings on connections with calls only.)"""
    _, port = await serve(keepalive_time_seconds=0.2, keepalive_timeout_seconds=0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(HELLO + SETTINGS_ACK)
    octets = await promptly(reader.read())
    assert bytes((0, 0, 8, PING, 0, 0, 0, 0, 0)) in octets
    writer.close()
    await writer.wait_closed()


# -- stopping --------------------------------------------------------------------------------------------------------


async def open_call(client: grpc.aio.Channel, page: Pages) -> Any:
    """A call whose request has not been sent yet, on an established connection."""
    await raw(client, "GetCommand", b"\x0a\x02if")
    call: Any = client.stream_unary("/avap.DefinitionEngine/GetCommand")
    opened = call(metadata=AUTHENTIC, timeout=60)
    await opened.wait_for_connection()
    # What follows on the same connection is answered after the server has seen the headers before it.
    await raw(client, "GetCommand", b"\x0a\x02if")
    return opened


async def test_a_stop_waits_for_a_call_in_flight(serve: Serve, engine: DefinitionEngine, page: Pages) -> None:
    transport, port = await serve()
    assert engine.snapshot is not None
    async with channel(port) as client:
        call = await open_call(client, page)
        stopping = asyncio.create_task(transport.stop(GRACE))
        await eventually(lambda: not listens(port), "the port closed")
        assert not stopping.done()
        await call.write(b"\x0a\x02if")
        await call.done_writing()
        assert await promptly(call) == engine.snapshot.answer(b"if")
        await promptly(stopping, seconds=GRACE / 4)


async def test_a_stop_ends_calls_that_are_left_after_its_grace(serve: Serve, page: Pages) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        call = await open_call(client, page)
        await promptly(transport.stop(0.1))
        assert await promptly(call.code()) is not grpc.StatusCode.OK


async def test_a_health_watch_does_not_delay_a_stop(serve: Serve) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        stub: Any = health_pb2_grpc.HealthStub(client)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=60)
        await promptly(watch.read())
        await promptly(transport.stop(GRACE), seconds=GRACE / 4)
        assert await promptly(watch.read()) is grpc.aio.EOF


def listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
    except OSError:
        return False
    return True


async def test_a_slow_reader_keeps_no_more_than_four_replaced_snapshots_in_memory(serve: Serve, transport: str) -> None:
    if transport != "native":
        pytest.skip("grpcio copies the answer, so that it holds no snapshot")
    made, port = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    shut = frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 1)
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/avap.DefinitionEngine/SyncCatalog"),
        (b"content-type", b"application/grpc"),
        (b"x-avap-auth", KEY.encode()),
    )
    writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, shut))
    writer.write(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, encode_block(fields)))
    writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1, bytes(5)))
    received = b""
    while frames.frame(frames.DATA, 0, 1, b"\0") not in received:
        received += await asyncio.wait_for(reader.read(4096), 5)
    given_up = frames.rst_stream(1, 11)
    for number in range(5):
        assert given_up not in received
        swap = made.begin_swap(opened(row(f"n{number}")))
        await swap.prepare()
        swap.commit()
        await swap.release()
        with suppress(TimeoutError):
            received += await asyncio.wait_for(reader.read(4096), 0.05)
    while given_up not in received:
        received += await asyncio.wait_for(reader.read(4096), 5)
    writer.close()


async def test_a_call_whose_body_comes_after_a_key_rotation_is_judged_by_the_new_keys(
    serve: Serve, keys: KeyRing
) -> None:
    _, port = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/avap.DefinitionEngine/SyncCatalog"),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"x-avap-auth", KEY.encode()),
    )
    writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0))
    writer.write(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, encode_block(fields)))
    writer.write(frames.frame(frames.PING, 0, 0, b"received"))
    received = b""
    while frames.frame(frames.PING, 1, 0, b"received") not in received:
        received += await asyncio.wait_for(reader.read(4096), 5)
    keys.replace([sha256(b"another").hexdigest()])
    writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1, bytes(5)))
    kind = flags = None
    while kind != frames.HEADERS or not flags & frames.END_STREAM:
        head = await asyncio.wait_for(reader.readexactly(frames.HEADER_LENGTH), 5)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, flags = head[3], head[4]
        assert kind != frames.DATA, "the catalogue was sent"
    writer.close()
