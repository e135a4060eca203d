"""Every transport with a stock grpcio client: the contract's octets, statuses and messages."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.certificates import Authority
from tests.support.logs import captured_logs, logged
from tests.support.snapshots import opened, row
from tests.support.stats import Pages
from tests.unit.definition_server.data_plane.served_transport import (
    AUTHENTIC,
    KEY,
    MIB,
    REFUSED,
    Serve,
    channel,
    failure,
    raw,
)

from definition_server.data_plane.services import DefinitionEngine
from definition_server.ipc.tls_files import TlsFiles
from definition_server.rpc import avap_pb2, avap_pb2_grpc

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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


async def test_every_answer_names_its_catalogue(serve: Serve, engine: DefinitionEngine) -> None:
    transport, port = await serve()
    requests = {"GetCommand": b"\x0a\x02if", "SyncCatalog": b""}
    async with channel(port) as client:
        for snapshot in (engine.snapshot, opened(row("if", "x = 3"), "else"), opened(row("if", "y" * 70_000))):
            assert snapshot is not None
            if snapshot is not engine.snapshot:
                transport.begin_swap(snapshot).commit()
            for method, request in requests.items():
                for _ in range(2):  # the second answer comes from the memory
                    call: Any = client.unary_unary(f"/avap.DefinitionEngine/{method}")(request, metadata=AUTHENTIC)
                    assert list(await call.initial_metadata()) == [("avap-version", snapshot.version_hash[:16])]
                    await call


async def test_a_refusal_names_the_catalogue_only_if_the_key_is_right(serve: Serve, engine: DefinitionEngine) -> None:
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
    """An exception of C-core, found by name, because grpcio does not export it."""


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


# -- trust in clients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", ["root", "intermediate", "leaf", "other"])
async def test_a_clients_certificate_is_accepted_by_each_certificate_of_the_trust_file_on_its_chain(
    serve: Serve, trusted: str, tmp_path: Path
) -> None:
    """Both transports give the same answer, also if the file holds only an intermediate authority."""
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
