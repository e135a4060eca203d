"""The port of every transport, the ages of its connections, and an orderly end."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.h2_wire import HELLO, PING, SETTINGS_ACK
from tests.support.loop import eventually, promptly
from tests.support.stats import Pages
from tests.unit.definition_server.data_plane.served_transport import (
    AUTHENTIC,
    GRACE,
    Serve,
    channel,
    raw,
)

from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import CannotListen

pytestmark = pytest.mark.usefixtures("nothing_is_left")


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


async def test_a_transport_listens_on_ipv6(serve: Serve) -> None:
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
    # A later call on the same connection is answered after the server has seen the headers before it.
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
