"""A call or connection that has ended holds no memory: no timer and no task refers to it any more."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.support.h2_wire import data, grpc_message, headers, request_block, rst_stream
from tests.support.native_server import LOOPS, RawClient, ServerThread, handlers
from tests.support.polling import until

from grpc_h2.aio.call import ServicerContext
from grpc_h2.aio.protocol import Http2Protocol
from grpc_h2.connection.limits import Limits


async def echo(request: bytes, context: Any) -> bytes:
    return request


async def collect(requests: Any, context: Any) -> bytes:
    return b"".join([message async for message in requests])


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    methods = handlers(
        echo=grpc.unary_unary_rpc_method_handler(echo), collect=grpc.stream_unary_rpc_method_handler(collect)
    )
    limits = Limits(drain_timeout=0.05)  # so that a deadline is noticed at most 50 ms late
    with ServerThread(
        LOOPS[request.param], lambda server: server.add_generic_rpc_handlers([methods]), limits=limits
    ) as server:
        yield server


def alive(kind: type, before: set[int]) -> int:
    """The number of objects of type ``kind``, without those of earlier tests."""
    gc.collect()
    return sum(type(each) is kind and id(each) not in before for each in gc.get_objects())


@pytest.fixture(autouse=True)
def few_objects() -> Iterator[None]:
    """Excludes the objects that exist before the test from garbage collection, so that those of the test are found
    quickly."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def existing(kind: type) -> set[int]:
    gc.collect()
    return {id(each) for each in gc.get_objects() if type(each) is kind}


def request(method: bytes, stream: int, *, end_stream: bool) -> bytes:
    """A request with a deadline of an hour."""
    block = request_block(b"/t.S/" + method, (b"grpc-timeout", b"1H"))
    return headers(stream, block) + data(stream, grpc_message(b"x"), end_stream=end_stream)


@pytest.mark.parametrize("end", ["answered", "reset by the client", "cut off"])
def test_a_call_that_has_ended_before_its_deadline_is_released(running: ServerThread, end: str) -> None:
    before = existing(ServicerContext)
    with RawClient(running.port) as client:
        client.send(request(b"echo" if end == "answered" else b"collect", 1, end_stream=end == "answered"))
        if end == "answered":
            client.until(lambda: client.replies.stream(1).ended)
        else:
            until(lambda: running.server.open_calls == 1, "the call begins")
        if end == "reset by the client":
            client.send(rst_stream(1))
        if end != "cut off":
            until(lambda: alive(ServicerContext, before) == 0, "nothing refers to the call")
    until(lambda: alive(ServicerContext, before) == 0, "nothing refers to the call")


def test_a_connection_that_has_ended_is_released(running: ServerThread) -> None:
    before = existing(Http2Protocol)
    with RawClient(running.port) as client:
        client.send(request(b"echo", 1, end_stream=True))
        client.until(lambda: client.replies.stream(1).ended)
        assert alive(Http2Protocol, before) == 1
        began = running.call(running.loop.time)
        until(lambda: running.call(running.loop.time) > began + 0.2, "its next deadline is hours away")
    until(lambda: alive(Http2Protocol, before) == 0, "nothing refers to the connection")
