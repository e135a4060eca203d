"""Health checks: both service names have the same state, watches get every change, and none delays a stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import count
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.loop import eventually, promptly

from definition_server.data_plane.health import FRESHNESS, HEALTH_SERVICE, LIVENESS, Health, Refusals

pytestmark = pytest.mark.usefixtures("nothing_is_left")

State = health_pb2.HealthCheckResponse
SERVICES = ["", "avap.DefinitionEngine"]
each_service = pytest.mark.parametrize("service", SERVICES)

GRACE = 60.0
GRPCIO = Refusals(grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT)


def register(health: Health, server: grpc.aio.Server) -> None:
    server.add_registered_method_handlers(HEALTH_SERVICE, dict(health.handlers()))


@pytest.fixture
def health() -> Health:
    return Health(GRPCIO)


@pytest.fixture
async def server(health: Health) -> AsyncIterator[tuple[grpc.aio.Server, int]]:
    server = grpc.aio.server()
    register(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield server, port
    await server.stop(None)


@pytest.fixture
async def stub(server: tuple[grpc.aio.Server, int]) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
        yield health_pb2_grpc.HealthStub(channel)


async def check(stub: Any, service: str) -> int:
    answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
    return int(answer.status)


def watch(stub: Any, service: str) -> Any:
    return stub.Watch(health_pb2.HealthCheckRequest(service=service), timeout=60)


async def next_state(call: Any) -> int:
    return int((await promptly(call.read())).status)


# -- Check -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A51")
@each_service
async def test_a_check_answers_the_last_reported_state(health: Health, stub: Any, service: str) -> None:
    for serving, state in ((False, State.NOT_SERVING), (True, State.SERVING), (False, State.NOT_SERVING)):
        await health.report(serving)
        assert await check(stub, service) == state


async def test_liveness_is_serving_with_and_without_a_catalogue(health: Health, stub: Any) -> None:
    for serving in (False, True, False):
        await health.report(serving)
        assert await check(stub, LIVENESS) == State.SERVING


@pytest.mark.requirement("A51")
async def test_a_check_of_another_service_is_not_found(health: Health, stub: Any) -> None:
    await health.report(True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(stub, "avap.Other")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


# -- Watch -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A51")
@each_service
async def test_a_watch_sends_the_state_at_once_and_then_every_change(health: Health, stub: Any, service: str) -> None:
    await health.report(False)
    call = watch(stub, service)
    assert await next_state(call) == State.NOT_SERVING
    await health.report(True)
    assert await next_state(call) == State.SERVING
    await health.report(False)
    assert await next_state(call) == State.NOT_SERVING
    call.cancel()


@pytest.mark.requirement("A51")
async def test_a_watch_of_another_service_sends_service_unknown(health: Health, stub: Any) -> None:
    await health.report(True)
    call = watch(stub, "avap.Other")
    assert await next_state(call) == State.SERVICE_UNKNOWN
    call.cancel()


async def test_a_change_reaches_many_watches_a_few_in_each_iteration_of_the_loop() -> None:
    health, sent = Health(), [0]

    class Context:
        async def write(self, message: Any) -> None:
            sent[0] += 1

    await health.report(False)
    watches = [asyncio.create_task(health.watch(b"", Context())) for _ in range(1000)]
    while sent[0] < 1000:  # noqa: ASYNC110 - iterations are counted
        await asyncio.sleep(0)
    for _ in range(3):
        await asyncio.sleep(0)
    await health.report(True)
    most, before = 0, sent[0]
    while sent[0] < 2000:
        await asyncio.sleep(0)
        most, before = max(most, sent[0] - before), sent[0]
    assert most == 2, "the writes of one iteration"
    health.end_watches()
    await promptly(asyncio.gather(*watches))
    assert sent[0] == 2000, "the end of a watch is not a change of state"


async def test_a_watch_that_waits_while_its_state_changes_twice_gets_the_last_state(health: Health, stub: Any) -> None:
    await health.report(True)
    call = watch(stub, "")
    assert await next_state(call) == State.SERVING
    await health.report(False)
    await health.report(True)
    await health.report(False)
    while await next_state(call) != State.NOT_SERVING:
        pass
    call.cancel()


# -- List and odd requests --------------------------------------------------------------------------------------------


async def test_the_list_has_the_state_of_every_service(health: Health, stub: Any) -> None:
    await health.report(True)
    answer = await stub.List(health_pb2.HealthListRequest(), timeout=10)
    states = {name: each.status for name, each in answer.statuses.items()}
    assert states == {
        "": State.SERVING,
        "avap.DefinitionEngine": State.SERVING,
        LIVENESS: State.SERVING,
        FRESHNESS: State.NOT_SERVING,
    }


@pytest.mark.parametrize("method", ["Check", "List", "Watch"])
async def test_a_request_that_is_not_a_message_is_refused_by_each_method(
    server: tuple[grpc.aio.Server, int], method: str
) -> None:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server[1]}") as channel:
        call: Any = channel.unary_stream(f"/{HEALTH_SERVICE}/{method}")(b"\x0a\x05cut", timeout=10)
        assert await end_of(call) is grpc.StatusCode.INVALID_ARGUMENT


# -- ending watches --------------------------------------------------------------------------------------------------


async def test_ended_watches_get_ok_and_do_not_delay_a_stop(
    health: Health, server: tuple[grpc.aio.Server, int], stub: Any
) -> None:
    await health.report(True)
    calls = [watch(stub, service) for service in (*SERVICES, "avap.Other")]
    for call in calls:
        await next_state(call)
    before = time.monotonic()
    health.end_watches()
    await server[0].stop(GRACE)
    assert time.monotonic() - before < GRACE / 4
    for call in calls:
        assert await promptly(call.read()) is grpc.aio.EOF
        assert await promptly(call.code()) is grpc.StatusCode.OK


async def test_a_watch_that_begins_after_the_end_is_ended_too(health: Health, stub: Any) -> None:
    await health.report(True)
    health.end_watches()
    call = watch(stub, "")
    while await promptly(call.read(), seconds=3) is not grpc.aio.EOF:
        pass
    assert await promptly(call.code()) is grpc.StatusCode.OK


async def end_of(call: Any) -> grpc.StatusCode:
    """Read ``call`` to its end, and return its status."""
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    code: grpc.StatusCode = await call.code()
    return code


async def test_watches_that_begin_while_a_stop_begins_end_with_it() -> None:
    """The test checks the status of the watches, and not the duration of the stop: rarely, C-core accepts a call for
    which grpcio starts no handler, and the stop then waits for its whole grace period."""
    begun = 0

    class Counted(Health):
        async def watch(self, request: bytes, context: Any) -> None:
            nonlocal begun
            begun += 1
            await super().watch(request, context)

    ended = 0
    for turns in count():  # iterations of the loop between the two
        if turns >= 60 and begun > 60:
            break
        health, server = Counted(GRPCIO), grpc.aio.server()
        register(health, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        await health.report(True)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            await promptly(channel.channel_ready())
            before = begun
            calls = [watch(health_pb2_grpc.HealthStub(channel), "") for _ in range(5)]
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns >= 60:  # a slow machine has not begun enough watches yet
                await eventually(lambda before=before: begun > before, "a watch has begun")
            health.end_watches()
            await server.stop(0.5)
            codes = [await promptly(end_of(call)) for call in calls]
        ended += codes.count(grpc.StatusCode.OK)
        # A watch that had to wait until the grace was over would get another status.
        assert ended == begun


async def test_a_client_that_has_left_its_watch_does_not_delay_a_stop(
    health: Health, server: tuple[grpc.aio.Server, int], stub: Any
) -> None:
    await health.report(True)
    call = watch(stub, "")
    await next_state(call)
    call.cancel()
    health.end_watches()
    await promptly(server[0].stop(GRACE), seconds=GRACE / 4)


async def test_ending_watches_does_not_end_checks(health: Health, stub: Any) -> None:
    await health.report(False)
    health.end_watches()
    assert await check(stub, "") == State.NOT_SERVING
