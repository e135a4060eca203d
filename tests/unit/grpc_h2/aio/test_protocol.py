"""The asyncio protocol around a connection: its writes, its reads, its timers, and how it closes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import select
import socket
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc
import pytest
from tests.support.h2_wire import (
    ENHANCE_YOUR_CALM,
    HELLO,
    PREFACE,
    PROTOCOL_ERROR,
    SETTINGS_ACK,
    call,
    continuation,
    data,
    grpc_message,
    headers,
    ping,
    request_block,
    settings,
    split_frames,
    window_update,
)
from tests.support.loop import eventually
from tests.support.native_server import LOOPS, RawClient, ServerThread, handlers
from tests.support.polling import until

from grpc_h2.aio import lingering_close
from grpc_h2.aio import protocol as protocol_module
from grpc_h2.aio.admission import Refusal
from grpc_h2.aio.lingering_close import LINGER
from grpc_h2.aio.protocol import Http2Protocol
from grpc_h2.aio.server import Server
from grpc_h2.connection.limits import Limits
from grpc_h2.static.answers import StaticAnswer

SECONDS = 10.0


class FakeTransport(asyncio.Transport):
    """A transport that records every write. The test decides when its buffer is reported as full."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.paused = False
        self.ended = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def writelines(self, list_of_data: Iterable[Any]) -> None:
        self.writes.append(b"".join(list_of_data))

    def is_closing(self) -> bool:
        return False

    def is_reading(self) -> bool:
        return not self.paused

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def close(self) -> None:
        self.ended = True

    def abort(self) -> None:
        self.ended = True


async def echo(requests: Any, context: Any) -> Any:
    async for request in requests:
        yield request


async def large(request: bytes, context: Any) -> bytes:
    return b"x" * int(request)


async def slow(request: bytes, context: Any) -> bytes:
    await asyncio.sleep(SECONDS)
    return b""


def prepare(server: Server) -> None:
    methods: dict[str, Any] = {
        "echo": grpc.stream_stream_rpc_method_handler(echo),
        "large": grpc.unary_unary_rpc_method_handler(large),
        "slow": grpc.unary_unary_rpc_method_handler(slow),
    }
    server.add_generic_rpc_handlers((handlers(**methods),))
    server.add_static_unary("/t.S/Get", lambda request: StaticAnswer.unary(b"S" * 100, answer_id=7))
    server.add_static_unary("/t.S/No", lambda request: StaticAnswer.failure(5, "no"))


async def connected(**kwargs: Any) -> tuple[Server, Http2Protocol, FakeTransport]:
    server = Server(**kwargs)
    prepare(server)
    await server.start()
    transport = FakeTransport()
    protocol = Http2Protocol(server, asyncio.get_running_loop())
    protocol.connection_made(transport)
    protocol.data_received(HELLO + SETTINGS_ACK)
    return server, protocol, transport


async def loop_until(what: Callable[[], bool]) -> None:
    """Let the loop iterate until ``what`` is true."""
    for _ in range(10_000):
        if what():
            return
        await asyncio.sleep(0)
    raise AssertionError("not within 10,000 turns")


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> Any:
    return LOOPS[request.param]


@pytest.fixture
def running(loop: Any) -> Iterator[ServerThread]:
    with ServerThread(loop, prepare) as server:
        yield server


# --- writing ---------------------------------------------------------------------------------------------------------


async def test_a_batch_of_requests_is_answered_by_one_write() -> None:
    observed: list[list[int]] = []
    _, protocol, transport = await connected(observe=lambda answer_ids, seconds: observed.append(list(answer_ids)))
    transport.writes.clear()
    protocol.data_received(b"".join(call(stream) for stream in range(1, 65, 2)))
    assert len(transport.writes) == 1
    assert len(split_frames(transport.writes[0])[0]) == 3 * 32
    assert observed == [[7] * 32]
    protocol.connection_lost(None)


async def test_output_of_handlers_in_one_loop_iteration_is_one_write() -> None:
    server, protocol, transport = await connected()
    transport.writes.clear()
    for stream in range(1, 21, 2):
        protocol.data_received(
            headers(stream, request_block(b"/t.S/echo")) + data(stream, grpc_message(b"x"), end_stream=True)
        )
    await loop_until(lambda: not server.open_calls)
    await asyncio.sleep(0)
    assert len(transport.writes) <= 3, "ten handlers, ten messages, ten statuses"
    assert len(split_frames(b"".join(transport.writes))[0]) == 3 * 10
    protocol.connection_lost(None)


async def test_nothing_is_written_while_the_transport_is_full() -> None:
    _, protocol, transport = await connected()
    transport.writes.clear()
    protocol.pause_writing()
    protocol.data_received(call(1))
    assert transport.writes == []
    assert not transport.is_reading()
    protocol.resume_writing()
    assert len(transport.writes) == 1
    assert transport.is_reading()
    protocol.connection_lost(None)


async def test_nothing_is_read_while_the_transport_is_full() -> None:
    """Octets that need an answer of TLS itself would add to its buffer."""
    _, protocol, transport = await connected()
    protocol.pause_writing()
    assert not transport.is_reading()
    protocol.resume_writing()
    assert transport.is_reading()
    protocol.connection_lost(None)


async def test_the_limit_of_the_transport_s_buffer_is_0_only_until_a_peer_has_read_what_a_tick_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, protocol, transport = await connected()
    limits: list[tuple[int, ...]] = []
    monkeypatch.setattr(transport, "set_write_buffer_limits", lambda *given: limits.append(given))
    monkeypatch.setattr(transport, "get_write_buffer_size", lambda: 1)
    protocol._tick()
    assert limits == [(0,)]
    protocol.pause_writing()
    monkeypatch.setattr(transport, "get_write_buffer_size", lambda: 0)
    protocol.resume_writing()
    assert limits == [(0,), ()], "the default"
    protocol._tick()
    assert len(limits) == 2
    protocol.connection_lost(None)


@pytest.mark.parametrize("unread", [0, 1])
async def test_a_peer_is_said_to_read_nothing_only_if_output_waits_for_it(
    unread: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol_module, "LINGER", 0.0)
    _, protocol, transport = await connected()
    monkeypatch.setattr(transport, "get_write_buffer_size", lambda: unread)
    protocol.dismiss(Refusal.EVICTED)
    transport.ended = False
    await eventually(lambda: transport.ended, "it is aborted")
    assert ("reads nothing" in str([vars(record).get("error") for record in caplog.records])) is bool(unread)
    protocol.connection_lost(None)


async def test_the_calls_of_a_connection_that_gives_way_are_cancelled_before_its_transport_has_closed() -> None:
    server, protocol, transport = await connected()
    protocol.data_received(headers(1, request_block(b"/t.S/slow")) + data(1, grpc_message(b"x"), end_stream=True))
    await loop_until(lambda: server.open_calls == 1)
    protocol.dismiss(Refusal.EVICTED)
    assert transport.ended
    await loop_until(lambda: not server.open_calls)
    protocol.connection_lost(None)


async def test_octets_of_a_connection_that_closes_wait_for_a_time_slice_before_they_are_decrypted() -> None:
    _, protocol, transport = await connected()
    assert protocol.may_decrypt(), "one of the first reads"
    protocol.data_received(data(0, b"x"))
    assert protocol.closing
    transport.paused = False
    assert not protocol.may_decrypt()
    assert transport.paused
    await loop_until(transport.is_reading)
    protocol.connection_lost(None)


async def test_input_beyond_the_budget_of_an_iteration_is_deferred_and_then_answered() -> None:
    _, protocol, transport = await connected(limits=Limits(answers_per_turn=10))
    transport.writes.clear()
    protocol.data_received(b"".join(call(stream) for stream in range(1, 201, 2)))
    await loop_until(lambda: len(transport.writes) > 0)
    assert len(split_frames(transport.writes[0])[0]) == 3 * 10
    assert not transport.is_reading()
    await loop_until(transport.is_reading)
    assert len(split_frames(b"".join(transport.writes))[0]) == 3 * 100
    assert len(transport.writes) == 10
    protocol.connection_lost(None)


async def test_a_large_read_is_deferred_until_other_connections_were_read() -> None:
    _, protocol, transport = await connected(limits=Limits(answers_per_turn=1000))
    transport.writes.clear()
    octets = b"".join(call(stream) for stream in range(1, 601, 2))
    assert len(octets) > 16 * 1024
    protocol.data_received(octets)
    assert transport.writes == []
    assert not transport.is_reading()
    await loop_until(lambda: transport.writes != [])
    assert len(split_frames(b"".join(transport.writes))[0]) == 3 * 300
    assert transport.is_reading()
    protocol.connection_lost(None)


async def test_a_large_answer_is_written_in_several_iterations() -> None:
    _, protocol, transport = await connected()
    protocol.data_received(settings((4, 2**31 - 1)) + window_update(0, 2**30))
    transport.writes.clear()
    protocol.data_received(
        headers(1, request_block(b"/t.S/large")) + data(1, grpc_message(b"5000000"), end_stream=True)
    )
    await loop_until(lambda: sum(map(len, transport.writes)) > 5_000_000)
    assert max(map(len, transport.writes)) < 2 * Limits().octets_per_turn
    protocol.connection_lost(None)


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("B-reply-flood")
def test_a_client_that_never_reads_is_not_read(running: ServerThread) -> None:
    """Refusals use no window, so only TCP limits their number. Another connection is not affected."""
    with RawClient(running.port, receive_buffer=4096) as flood, RawClient(running.port) as victim:
        flood.socket.setblocking(False)
        block = request_block(b"/t.S/No")
        sent, stream, left = 0, 1, b""
        while select.select([], [flood.socket], [], 0.5)[1]:
            if not left:
                ids = range(stream, stream + 2000, 2)
                stream = ids.stop
                left = b"".join(headers(n, block) + data(n, grpc_message(b"x"), end_stream=True) for n in ids)
            taken = flood.socket.send(left)
            sent, left = sent + taken, left[taken:]
            assert sent < 64 * 1024 * 1024
        assert sent > 100_000
        victim.send(call(1))
        victim.until(lambda: victim.replies.stream(1).ended)


def test_octets_after_goaway_are_read_only_up_to_a_limit(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(data(0, b"x"))
        sent, octets = 0, bytes(100_000)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 100_000_000:
                client.socket.sendall(octets)
                sent += len(octets)
        assert sent < 50_000_000


@pytest.mark.requirement("B-slow-read")
def test_a_client_that_does_not_read_its_answers_is_disconnected(loop: Any) -> None:
    with (
        ServerThread(loop, prepare, limits=Limits(stall_timeout=0.2)) as server,
        RawClient(server.port, PREFACE + settings((4, 2**31 - 1)) + window_update(0, 2**30)) as client,
    ):
        request = data(1, grpc_message(b"50000000"), end_stream=True)
        client.send(headers(1, request_block(b"/t.S/large")) + request)
        until(lambda: server.server.connections == 1, "the client is connected")
        until(lambda: server.server.connections == 0, "the client is disconnected")


def test_a_client_that_shuts_its_side_has_its_calls_cancelled(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(headers(1, request_block(b"/t.S/slow")) + data(1, grpc_message(b"x"), end_stream=True))
        until(lambda: running.server.open_calls == 1, "the call runs")
        client.socket.shutdown(socket.SHUT_WR)
        client.until_eof()
        until(lambda: running.server.open_calls == 0, "its handler was cancelled")


# --- leaving ---------------------------------------------------------------------------------------------------------


def test_the_kernels_receive_buffer_is_a_few_hundred_kilobytes(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(call(1))
        client.until(lambda: client.replies.stream(1).ended)
        (protocol,) = running.server._protocols
        inside = protocol._transport.get_extra_info("socket")
        assert 128 * 1024 <= inside.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) <= 512 * 1024


@pytest.mark.requirement("A50")
def test_goaway_arrives_even_if_the_client_continues_to_send(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(data(0, b"x"))
        for _ in range(100):
            client.send(call(1))
        client.until_eof()
        assert [goaway[1] for goaway in client.replies.goaways] == [PROTOCOL_ERROR]
        for _ in range(10):  # the server has only half-closed, so it reads these octets, and its kernel sends no RST
            client.send(call(1))


def test_a_flooding_client_gets_goaway_and_is_disconnected_before_the_flood_is_read(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(ping(b"12345678") * 40_000)
        with contextlib.suppress(ConnectionError):  # a slow machine may reset the connection after GOAWAY
            client.until_eof()
        assert [goaway[1] for goaway in client.replies.goaways] == [ENHANCE_YOUR_CALM]
        until(lambda: running.server.connections == 0, "the connection has ended", seconds=LINGER / 2)


@pytest.mark.requirement("A50")
def test_a_client_that_stops_flooding_after_goaway_is_read_until_the_linger_ends(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(ping(b"12345678") * 10)
        client.until_eof()
        assert [goaway[1] for goaway in client.replies.goaways] == [ENHANCE_YOUR_CALM]
        (protocol,) = running.server._protocols
        for _ in range(10):
            client.send(ping(b"12345678"))
        until(
            lambda: protocol._lingering_close.octets >= 10 * len(ping(b"12345678")),
            "the PINGs are read, and not answered by RST",
        )
        assert running.server.connections == 1


@pytest.mark.requirement("A50")
def test_a_client_that_does_not_close_is_closed_a_second_later(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.send(data(0, b"x"))
        client.until_eof()
        until(lambda: running.server.connections == 0, "the connection is closed", seconds=LINGER + SECONDS)


async def test_input_after_goaway_is_read_in_pieces_with_pauses() -> None:
    server = Server()
    await server.start()
    protocol, transport = Http2Protocol(server, asyncio.get_running_loop()), FakeTransport()
    protocol.connection_made(transport)
    protocol.data_received(b"no preface, but an end of the connection")
    assert protocol.closing
    protocol.data_received(bytes(250_000))
    assert transport.paused
    await eventually(lambda: not transport.paused, "the protocol continues to read")
    protocol.connection_lost(None)


async def test_a_peer_that_has_ended_before_the_half_close_is_aborted() -> None:
    class Gone(FakeTransport):
        aborted = False

        def write_eof(self) -> None:
            raise OSError(107, "Transport endpoint is not connected")

        def abort(self) -> None:
            self.aborted = True

    server = Server()
    await server.start()
    protocol, transport = Http2Protocol(server, asyncio.get_running_loop()), Gone()
    protocol.connection_made(transport)
    protocol.close()
    assert transport.aborted
    protocol.connection_lost(None)


@pytest.mark.requirement("A47")
def test_a_drain_ends_an_idle_connection(running: ServerThread) -> None:
    with RawClient(running.port) as client:
        client.until(lambda: client.replies.settings_acks)
        stopped = running.stop(SECONDS)
        client.until(lambda: client.replies.goaways)
        client.send(ping(b"draining", ack=True))
        client.until_eof()
        client.socket.close()
        stopped.result(SECONDS)
        assert [goaway[1] for goaway in client.replies.goaways] == [0, 0]


@pytest.mark.requirement("A1")
def test_a_probe_that_connects_and_leaves_is_not_logged(
    running: ServerThread, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "grpc_h2"):
        socket.create_connection(("127.0.0.1", running.port)).close()
        with RawClient(running.port) as client:
            client.send(call(1))
            client.until(lambda: client.replies.stream(1).ended)
        until(lambda: running.server.connections == 0, "both connections have ended")
    assert caplog.text == ""


@pytest.mark.requirement("B-bucket")
def test_an_attack_logs_one_line(running: ServerThread, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "grpc_h2"), RawClient(running.port) as client:
        client.send(ping() * 10)
        client.until_eof()
        assert client.replies.goaways[0][1:] == (ENHANCE_YOUR_CALM, b"too_many_pings")
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage() == "A client was cut off"
    assert caplog.records[0].__dict__["error"] == "too_many_pings"


# --- time ------------------------------------------------------------------------------------------------------------


def limited(loop: Any, **limits: Any) -> ServerThread:
    return ServerThread(loop, prepare, limits=Limits(**limits))


@pytest.mark.requirement("B-slow-client")
def test_a_connection_without_a_preface_is_closed_after_the_timeout(loop: Any) -> None:
    with limited(loop, preface_timeout=0.1) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.settimeout(SECONDS)
        while client.recv(1000):
            pass


@pytest.mark.requirement("B-slow-client")
def test_an_unfinished_header_block_ends_the_connection_despite_other_traffic(loop: Any) -> None:
    with limited(loop, header_timeout=0.2) as server, RawClient(server.port) as client:
        client.send(call(1))
        client.until(lambda: client.replies.stream(1).ended)
        client.send(call(3) + headers(5, request_block(), end_headers=False))
        client.until_eof()
        assert client.replies.goaways[0][1] == ENHANCE_YOUR_CALM


def test_a_client_that_is_silent_after_enhance_your_calm_is_half_closed(
    loop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lingering_close, "LINGER", 60.0)
    with limited(loop, header_timeout=0.1) as server, RawClient(server.port) as client:
        client.send(headers(1, request_block(), end_headers=False))
        client.until_eof()
        assert client.replies.goaways[0][1] == ENHANCE_YOUR_CALM


@pytest.mark.requirement("A48")
def test_a_peer_that_does_not_answer_the_keepalive_ping_is_disconnected(loop: Any) -> None:
    with limited(loop, keepalive_time=0.1, keepalive_timeout=0.1) as server, RawClient(server.port) as client:
        client.send(call(1))
        client.until_eof()
        assert any(frame.kind == 6 and not frame.flags for frame in client.replies.frames)


@pytest.mark.requirement("A48")
@pytest.mark.parametrize("limits", [{"max_connection_idle": 0.1}, {"max_connection_age": 0.1}])
def test_an_old_or_idle_connection_is_drained(loop: Any, limits: dict[str, float]) -> None:
    with limited(loop, drain_timeout=0.1, **limits) as server, RawClient(server.port) as client:
        client.send(call(1))
        client.until_eof()
        assert client.replies.stream(1).ended
        assert [goaway[1] for goaway in client.replies.goaways] == [0, 0]


async def test_traffic_sets_at_most_one_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    _, protocol, _ = await connected()
    armed: list[float] = []
    running = asyncio.get_running_loop()
    real = running.call_at

    def call_at(when: float, *args: Any, **kwargs: Any) -> Any:
        armed.append(when)
        return real(when, *args, **kwargs)

    monkeypatch.setattr(running, "call_at", call_at)
    for stream in range(1, 2001, 2):
        protocol.data_received(call(stream))
    assert len(armed) <= 1
    protocol.connection_lost(None)


@pytest.mark.requirement("B-slow-client")
async def test_an_idle_connection_takes_less_than_10_kb() -> None:
    """Measures the protocol and the connection after the handshake, without the memory of the transport and the
    kernel."""
    server = Server()
    prepare(server)
    await server.start()
    protocols: list[Http2Protocol] = []
    (await connected())[1].connection_lost(None)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(200):
            protocol = Http2Protocol(server, asyncio.get_running_loop())
            transport = FakeTransport()
            protocol.connection_made(transport)
            protocol.data_received(HELLO + SETTINGS_ACK)
            transport.writes.clear()
            protocols.append(protocol)
        each = (tracemalloc.get_traced_memory()[0] - before) / len(protocols)
    finally:
        tracemalloc.stop()
    for protocol in protocols:
        protocol.connection_lost(None)
    assert each < 10_000


@pytest.mark.requirement("B-slow-read")
async def test_a_handler_that_answers_after_a_long_silence_gives_its_client_the_whole_stall_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, protocol, transport = await connected(limits=Limits(header_timeout=0.01))
    go = asyncio.Event()

    async def late(request: bytes, context: Any) -> bytes:
        await go.wait()
        return b"x" * 100_000

    server.add_generic_rpc_handlers((handlers(late=grpc.unary_unary_rpc_method_handler(late)),))
    request = data(1, grpc_message(b""), end_stream=True)
    protocol.data_received(headers(1, request_block(b"/t.S/late")) + request)
    await eventually(lambda: not protocol._tick_is_soon, "the tick after the request")
    running = asyncio.get_running_loop()
    real = running.time
    monkeypatch.setattr(running, "time", lambda: real() + 10 * Limits().stall_timeout)
    transport.writes.clear()
    go.set()
    await eventually(lambda: transport.writes and not protocol._tick_is_soon, "the tick after the answer")
    assert sum(map(len, transport.writes)) > 60_000, "as much as the window allows"
    assert not protocol.connection.terminated
    protocol.connection_lost(None)


@pytest.mark.requirement("B-held-octets")
async def test_strangers_above_the_budget_of_memory_are_disconnected_and_clients_are_not() -> None:
    limits = Limits(max_held_by_strangers=400 * 1024)
    server, client, _ = await connected(limits=limits)
    client.data_received(call(1))
    client.data_received(headers(3, request_block(b"/t.S/echo")) + data(3, grpc_message(bytes(200_000))[:16_000]))
    for _ in range(8):
        client.data_received(data(3, bytes(16_000)))
    await loop_until(lambda: server.budget.held > 100_000)
    block = request_block(b"/t.S/Get", (b"x-long", b"a" * 46_000))
    begun = headers(1, block[:16_000], end_headers=False)
    more = [continuation(1, block[at : at + 10_000]) for at in range(16_000, 46_000, 10_000)]
    strangers = []
    for _ in range(4):
        protocol, transport = Http2Protocol(server, asyncio.get_running_loop()), FakeTransport()
        protocol.connection_made(transport)
        protocol.data_received(HELLO + SETTINGS_ACK + begun + b"".join(more))
        strangers.append(protocol)
        await loop_until(lambda protocol=protocol: not protocol.connection.backlog)  # type: ignore[misc]
        assert server.strangers.held <= 400 * 1024
    assert 0 < sum(protocol.connection.terminated for protocol in strangers) < 4
    assert not client.connection.terminated
    for protocol in (client, *strangers):
        protocol.connection_lost(None)
    assert (server.budget.held, server.strangers.held) == (0, 0)
    await server.stop(None)
