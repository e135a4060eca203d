"""Messages through the native engine: compression, limits, and back-pressure on both sides."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.support.h2_wire import (
    PREFACE,
    SETTINGS_ACK,
    data,
    grpc_message,
    headers,
    request_block,
    settings,
    window_update,
)
from tests.support.native_server import LOOPS, RawClient, ServerThread, handlers
from tests.support.polling import until

from grpc_h2.aio.server import Server
from grpc_h2.connection.limits import Limits
from grpc_h2.rpc.messages import decompress
from grpc_h2.static.answers import StaticAnswer

SECONDS = 20.0
COMPRESSIBLE = b"definition " * 1000


class Handlers:
    def __init__(self) -> None:
        self.sent = 0
        self.taken = 0

    def register(self, server: Server) -> None:
        self.go = asyncio.Event()
        methods: dict[str, Any] = {
            "echo": grpc.unary_unary_rpc_method_handler(self.echo),
            "gzip": grpc.unary_unary_rpc_method_handler(self.gzip),
            "gzip_stream": grpc.unary_stream_rpc_method_handler(self.gzip_stream),
            "gzip_late": grpc.unary_stream_rpc_method_handler(self.gzip_late),
            "size": grpc.unary_unary_rpc_method_handler(self.size),
            "many": grpc.unary_stream_rpc_method_handler(self.many),
            "slow": grpc.stream_unary_rpc_method_handler(self.slow),
        }
        server.add_generic_rpc_handlers((handlers(**methods),))
        server.add_static_unary("/t.S/static", lambda request: StaticAnswer.unary(b"S" * 1500))

    async def echo(self, request: bytes, context: Any) -> bytes:
        return request

    async def gzip(self, request: bytes, context: Any) -> bytes:
        context.set_compression(grpc.Compression.Gzip)
        return request

    async def gzip_stream(self, request: bytes, context: Any) -> Any:
        context.set_compression(grpc.Compression.Gzip)
        yield request
        context.disable_next_message_compression()
        yield request
        yield request

    async def gzip_late(self, request: bytes, context: Any) -> Any:
        yield request
        with pytest.raises(RuntimeError):
            context.set_compression(grpc.Compression.Gzip)

    async def size(self, request: bytes, context: Any) -> bytes:
        return b"x" * int(request)

    async def many(self, request: bytes, context: Any) -> Any:
        count, size = map(int, request.split())
        for number in range(count):
            yield b"%08d" % number + b"x" * (size - 8)
            self.sent += 1

    async def slow(self, requests: Any, context: Any) -> bytes:
        await self.go.wait()
        total = 0
        async for request in requests:
            total += len(request)
            self.taken += 1
        return str(total).encode()


@pytest.fixture
def work() -> Handlers:
    return Handlers()


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest, work: Handlers) -> Iterator[ServerThread]:
    with ServerThread(LOOPS[request.param], work.register) as server:
        yield server


@pytest.fixture
def channel(running: ServerThread) -> Iterator[grpc.Channel]:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(running.target, options=unlimited) as channel:
        yield channel


def ask(channel: grpc.Channel, method: str, request: bytes, **more: Any) -> bytes:
    call: Any = channel.unary_unary(f"/t.S/{method}")
    answer: bytes = call(request, timeout=SECONDS, **more)
    return answer


# --- compression -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("method", ["echo", "gzip"])
def test_compressed_requests_and_answers_work_with_grpcio(
    channel: grpc.Channel, method: str, compression: grpc.Compression
) -> None:
    assert ask(channel, method, COMPRESSIBLE, compression=compression) == COMPRESSIBLE


def test_an_answer_is_compressed_as_the_handler_chose(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        block = request_block(b"/t.S/gzip_stream", (b"grpc-accept-encoding", b"identity, gzip"))
        client.send(headers(1, block) + data(1, grpc_message(COMPRESSIBLE), end_stream=True))
        result = client.replies.stream(1)
        client.until(lambda: result.ended)
    assert result.headers is not None
    assert (b"grpc-encoding", b"gzip") in result.headers
    first, second, third = result.messages
    assert second == COMPRESSIBLE
    assert len(first) < len(COMPRESSIBLE) / 10
    assert decompress(first, "gzip", 10**6) == decompress(third, "gzip", 10**6) == COMPRESSIBLE


@pytest.mark.requirement("A38")
def test_answers_to_a_client_without_gzip_are_not_compressed(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(headers(1, request_block(b"/t.S/gzip")) + data(1, grpc_message(COMPRESSIBLE), end_stream=True))
        result = client.replies.stream(1)
        client.until(lambda: result.ended)
    assert result.messages == [COMPRESSIBLE]
    assert result.headers is not None
    assert b"grpc-encoding" not in dict(result.headers)


def test_compression_cannot_be_chosen_after_the_headers_were_sent(channel: grpc.Channel) -> None:
    method: Any = channel.unary_stream("/t.S/gzip_late")
    assert list(method(b"x", timeout=SECONDS)) == [b"x"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_server_may_compress_all_answers(loop: str, work: Handlers) -> None:
    with (
        ServerThread(LOOPS[loop], work.register, compression=grpc.Compression.Gzip) as server,
        RawClient(server.port) as client,
    ):
        block = request_block(b"/t.S/echo", (b"grpc-accept-encoding", b"gzip"))
        client.send(headers(1, block) + data(1, grpc_message(COMPRESSIBLE), end_stream=True))
        client.until(lambda: client.replies.stream(1).ended)
        assert decompress(client.replies.stream(1).messages[0], "gzip", 10**6) == COMPRESSIBLE


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A39")
def test_a_request_above_four_mebibytes_is_refused(channel: grpc.Channel) -> None:
    most = 4 * 1024 * 1024
    assert len(ask(channel, "echo", b"x" * most)) == most
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, "echo", b"x" * (most + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.requirement("A39", "B-inflate-bomb")
def test_a_compressed_message_is_limited_by_its_inflated_size(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, "echo", bytes(5 * 1024 * 1024), compression=grpc.Compression.Gzip)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("size", [0, 1, 16379, 16380, 65535, 65536, 1_000_000, 20_000_000])
def test_an_answer_of_any_size_arrives(channel: grpc.Channel, size: int) -> None:
    assert ask(channel, "size", str(size).encode()) == b"x" * size


# --- back-pressure ---------------------------------------------------------------------------------------------------


def test_two_thousand_messages_stream_in_order(channel: grpc.Channel, work: Handlers) -> None:
    method: Any = channel.unary_stream("/t.S/many")
    numbers = [int(answer[:8]) for answer in method(b"2000 2000", timeout=SECONDS)]
    assert numbers == list(range(2000))


@pytest.mark.requirement("B-slow-read")
def test_a_handler_waits_for_a_client_that_does_not_read(running: ServerThread, work: Handlers) -> None:
    with RawClient(running.port) as client:
        block = request_block(b"/t.S/many")
        client.send(headers(1, block) + data(1, grpc_message(b"500 10000"), end_stream=True))
        result = client.replies.stream(1)
        client.until(lambda: len(result.body) >= 65535)
        # The window is 65,535 octets, and 64 KiB may be queued: 131 kB and a message.
        until(lambda: work.sent >= 12, "the handler fills the queue")
        running.call(lambda: None)
        assert 12 <= work.sent <= 14
        client.send(window_update(0, 2**30) + window_update(1, 2**30))
        client.until(lambda: result.ended)
    assert work.sent == 500
    assert [int(message[:8]) for message in result.messages] == list(range(500))


@pytest.mark.requirement("A22", "B-unread-messages")
def test_a_client_waits_for_a_handler_that_does_not_read(
    running: ServerThread, channel: grpc.Channel, work: Handlers
) -> None:
    method: Any = channel.stream_unary("/t.S/slow")
    written = 0

    def requests() -> Iterator[bytes]:
        nonlocal written
        for _ in range(2000):
            yield b"x" * 10_000
            written += 1

    future = method.future(requests(), timeout=SECONDS)
    steady, seen = 0, -1
    while steady < 10:  # until no more is sent for a while
        steady, seen = (steady + 1, seen) if seen == written > 0 else (0, written)
        threading.Event().wait(0.02)
    assert written < 200, "2 MB is far above the window of 256 KiB"
    assert work.taken == 0
    running.loop.call_soon_threadsafe(work.go.set)
    assert future.result() == b"20000000"
    assert work.taken == 2000


def test_a_huge_answer_does_not_delay_other_connections(running: ServerThread) -> None:
    """One connection reads 20 MB as fast as it can, while another requests ready answers one by one."""
    hello = PREFACE + settings((4, 2**31 - 1)) + window_update(0, 2**30) + SETTINGS_ACK
    ended = threading.Event()

    def devour() -> None:
        with RawClient(running.port, hello) as client:
            client.send(headers(1, request_block(b"/t.S/size")) + data(1, grpc_message(b"20000000"), end_stream=True))
            client.until(lambda: client.replies.stream(1).ended)
            ended.set()

    thread = threading.Thread(target=devour)
    slowest, asked, since = 0.0, 0, time.perf_counter()
    with RawClient(running.port) as client:
        thread.start()
        while not ended.is_set() and asked < 5000:
            stream = 2 * asked + 1
            began = time.perf_counter()
            client.send(
                headers(stream, request_block(b"/t.S/static"))
                + data(stream, grpc_message(b"x"), end_stream=True)
                + window_update(0, 1505)
            )
            result = client.replies.stream(stream)
            while not result.ended:
                client.read()
            slowest = max(slowest, time.perf_counter() - began)
            asked += 1
        lasted = time.perf_counter() - since
        thread.join(SECONDS)
    assert ended.is_set()
    assert asked > 10
    assert slowest < lasted / 2


@pytest.mark.parametrize("loop", LOOPS)
def test_ready_answers_are_observed_in_batches(loop: str, work: Handlers) -> None:
    batches: list[tuple[list[int], float]] = []

    def prepare(server: Server) -> None:
        server.add_static_unary("/t.S/static", lambda request: StaticAnswer.unary(request, answer_id=len(request)))

    def observe(answer_ids: list[int], seconds: float) -> None:
        batches.append((list(answer_ids), seconds))

    with ServerThread(LOOPS[loop], prepare, observe=observe) as server, RawClient(server.port) as client:
        client.until(lambda: client.replies.settings_acks)
        block = request_block(b"/t.S/static")
        client.send(
            b"".join(headers(n, block) + data(n, grpc_message(b"x" * n), end_stream=True) for n in range(1, 601, 2))
        )
        client.send(window_update(0, 2**20))
        client.until(lambda: client.replies.stream(599).ended)
        assert client.replies.stream(599).messages == [b"x" * 599]
    assert sorted(answer_id for answer_ids, _ in batches for answer_id in answer_ids) == list(range(1, 601, 2))
    assert all(0 <= seconds < 1 for _, seconds in batches)
    assert max(len(answer_ids) for answer_ids, _ in batches) <= Limits().answers_per_turn
