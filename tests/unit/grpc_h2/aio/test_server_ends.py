"""Ends of calls on the native engine other than by their handler: deadlines, cancellation, lost connections, a stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from tests.support.h2_wire import (
    CANCEL,
    data,
    grpc_message,
    headers,
    request_block,
    rst_stream,
)
from tests.support.native_server import LOOPS, RawClient, ServerThread, handlers
from tests.support.polling import until

from grpc_h2 import Refusal, frames
from grpc_h2.aio import server as server_module
from grpc_h2.aio import stalled
from grpc_h2.aio.server import Server
from grpc_h2.connection.limits import Limits

SECONDS = 10.0


class Handlers:
    """Handlers that wait until the test releases them, and how they ended."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.cancelled = threading.Semaphore(0)
        self.finished = threading.Semaphore(0)
        self.release_thread = threading.Event()
        self.stubborn_seconds = 0.0
        self.seen_cancelled: list[bool] = []

    def register(self, server: Server) -> None:
        self.go = asyncio.Event()
        methods: dict[str, Any] = {
            "large": grpc.unary_unary_rpc_method_handler(self.large),
            "wait": grpc.unary_unary_rpc_method_handler(self.wait),
            "stream": grpc.unary_stream_rpc_method_handler(self.stream),
            "collect": grpc.stream_unary_rpc_method_handler(self.collect),
            "thread": grpc.unary_unary_rpc_method_handler(self.thread),
            "gives_up": grpc.unary_unary_rpc_method_handler(self.gives_up),
            "stubborn": grpc.unary_unary_rpc_method_handler(self.stubborn),
        }
        server.add_generic_rpc_handlers((handlers(**methods),))

    async def large(self, request: bytes, context: Any) -> bytes:
        self.started.release()
        return bytes(4_000_000)

    async def wait(self, request: bytes, context: Any) -> bytes:
        context.add_done_callback(lambda context: self.finished.release())
        self.started.release()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.seen_cancelled.append(context.cancelled())
            self.cancelled.release()
            raise
        return b"done"

    async def stream(self, request: bytes, context: Any) -> Any:
        yield b"first"
        yield await self.wait(request, context)

    async def collect(self, requests: Any, context: Any) -> bytes:
        self.started.release()
        try:
            return b"".join([request async for request in requests])
        except asyncio.CancelledError:
            self.cancelled.release()
            raise

    def thread(self, request: bytes, context: Any) -> bytes:
        self.started.release()
        self.release_thread.wait(SECONDS)
        return b"done"

    async def gives_up(self, request: bytes, context: Any) -> bytes:
        raise asyncio.CancelledError

    async def stubborn(self, request: bytes, context: Any) -> bytes:
        self.started.release()
        end = asyncio.get_running_loop().time() + self.stubborn_seconds
        while (left := end - asyncio.get_running_loop().time()) > 0:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(left)  # the handler's work
        return b"done"


@pytest.fixture
def work() -> Handlers:
    return Handlers()


@pytest.fixture(params=LOOPS)
def running(request: pytest.FixtureRequest, work: Handlers) -> Iterator[ServerThread]:
    with ServerThread(LOOPS[request.param], work.register, limits=Limits(drain_timeout=0.2)) as server:
        yield server
        work.release_thread.set()


@pytest.fixture
def channel(running: ServerThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.target) as channel:
        yield channel


def acquired(semaphore: threading.Semaphore) -> bool:
    return semaphore.acquire(timeout=SECONDS)


def go(running: ServerThread, work: Handlers) -> None:
    running.loop.call_soon_threadsafe(work.go.set)


def request(method: bytes, *extra: tuple[bytes, bytes], stream: int = 1) -> bytes:
    return headers(stream, request_block(b"/t.S/" + method, *extra)) + data(stream, grpc_message(b"x"), end_stream=True)


def windows(octets: int) -> bytes:
    """Frames by which the client allows ``octets`` more on the connection, and ``octets`` on each stream."""
    return frames.window_update(0, octets) + frames.settings(((frames.INITIAL_WINDOW_SIZE, octets),))


# --- deadlines -------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("A37")
def test_a_deadline_that_passes_cancels_the_handler_and_answers_deadline_exceeded(
    running: ServerThread, work: Handlers
) -> None:
    with RawClient(running.port) as client:
        client.send(request(b"wait", (b"grpc-timeout", b"50m")))
        result = client.replies.stream(1)
        client.until(lambda: result.ended)
        assert result.status == 4
        assert result.trailers is None, "a status is the whole answer while no headers are out"
        assert acquired(work.cancelled)
        assert acquired(work.finished)
    assert work.seen_cancelled == [True]


@pytest.mark.requirement("A37")
def test_a_deadline_that_passes_after_the_headers_resets_the_stream(running: ServerThread, work: Handlers) -> None:
    with RawClient(running.port) as client:
        client.send(request(b"stream", (b"grpc-timeout", b"100m")))
        result = client.replies.stream(1)
        client.until(lambda: result.reset is not None)
        assert result.reset == CANCEL
        assert result.messages == [b"first"]
        assert acquired(work.cancelled)


@pytest.mark.requirement("A36", "A37")
def test_an_expired_deadline_on_arrival_starts_no_handler(running: ServerThread, work: Handlers) -> None:
    with RawClient(running.port) as client:
        client.send(request(b"wait", (b"grpc-timeout", b"0n")))
        client.until(lambda: client.replies.stream(1).ended)
        assert client.replies.stream(1).status == 4
    assert not work.started.acquire(blocking=False)


@pytest.mark.requirement("A36")
def test_a_deadline_of_thousands_of_years_is_kept(running: ServerThread, work: Handlers) -> None:
    with RawClient(running.port) as client:
        client.send(request(b"wait", (b"grpc-timeout", b"99999999H")))
        assert acquired(work.started)
        go(running, work)
        client.until(lambda: client.replies.stream(1).ended)
        assert client.replies.stream(1).status == 0


@pytest.mark.requirement("A37", "C-grpcio-cancel")
def test_the_deadline_of_grpcio_is_kept_on_both_sides(channel: grpc.Channel, work: Handlers) -> None:
    call: Any = channel.unary_unary("/t.S/wait")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"x", timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert acquired(work.cancelled)


# --- cancellation and loss -------------------------------------------------------------------------------------------


@pytest.mark.requirement("A46")
@pytest.mark.parametrize("method", ["wait", "stream"])
def test_a_client_that_cancels_cancels_the_handler(
    running: ServerThread, channel: grpc.Channel, work: Handlers, method: str
) -> None:
    call: Any = channel.unary_stream(f"/t.S/{method}")
    answers = call(b"x", timeout=SECONDS)
    assert acquired(work.started)
    answers.cancel()
    assert acquired(work.cancelled)
    assert acquired(work.finished)
    until(lambda: running.server.open_calls == 0, "the call is no longer counted")
    assert work.seen_cancelled == [True]


@pytest.mark.requirement("A46")
def test_a_reset_of_a_half_sent_request_cancels_its_handler(running: ServerThread, work: Handlers) -> None:
    with RawClient(running.port) as client:
        client.send(headers(1, request_block(b"/t.S/collect")) + data(1, grpc_message(b"x")))
        assert acquired(work.started)
        client.send(rst_stream(1))
        assert acquired(work.cancelled)
        client.send(request(b"gives_up", stream=3))
        client.until(lambda: client.replies.stream(3).ended)
        assert client.replies.stream(3).status == 1


@pytest.mark.requirement("A46")
@pytest.mark.parametrize("method", [b"wait", b"stream", b"collect"])
def test_a_connection_that_breaks_cancels_its_handlers(running: ServerThread, work: Handlers, method: bytes) -> None:
    with RawClient(running.port) as client:
        client.send(
            headers(1, request_block(b"/t.S/" + method)) + data(1, grpc_message(b"x"), end_stream=method != b"collect")
        )
        assert acquired(work.started)
        # With SO_LINGER of zero the kernel sends RST, so the connection and all octets in flight are lost at once.
        client.socket.setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")
    assert acquired(work.cancelled)
    until(lambda: running.server.connections == 0, "the connection is gone")


@pytest.mark.requirement("A46")
def test_a_handler_that_cancels_itself_ends_its_call_as_cancelled(channel: grpc.Channel) -> None:
    call: Any = channel.unary_unary("/t.S/gives_up")
    with pytest.raises(grpc.RpcError) as caught:
        call(b"x", timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.CANCELLED


@pytest.mark.requirement("A14", "B-rapid-reset")
def test_a_handlers_thread_is_counted_as_a_call_until_it_ends(
    running: ServerThread, channel: grpc.Channel, work: Handlers
) -> None:
    call: Any = channel.unary_unary("/t.S/thread")
    future = call.future(b"x", timeout=SECONDS)
    assert acquired(work.started)
    future.cancel()
    with RawClient(running.port) as other:  # after two turns of the loop the reset has been processed
        other.send(request(b"gives_up"))
        other.until(lambda: other.replies.stream(1).ended)
    assert running.server.open_calls == 1
    work.release_thread.set()
    until(lambda: running.server.open_calls == 0, "the thread has ended")


# --- stop ------------------------------------------------------------------------------------------------------------


def test_a_stop_waits_for_the_calls_that_run(running: ServerThread, channel: grpc.Channel, work: Handlers) -> None:
    call: Any = channel.unary_unary("/t.S/wait")
    future = call.future(b"x", timeout=SECONDS)
    assert acquired(work.started)
    stopped = running.stop(SECONDS)
    running.call(lambda: None)  # the stop has begun
    with pytest.raises(OSError, match="refused"):
        RawClient(running.port)
    assert not stopped.done()
    go(running, work)
    assert future.result() == b"done"
    stopped.result(SECONDS)
    assert running.run(running.server.wait_for_termination(SECONDS)) is False


@pytest.mark.parametrize("opened", [0, 3_000_000], ids=["window shut", "window open"])
def test_a_client_that_reads_nothing_does_not_hold_a_stop(
    running: ServerThread,
    work: Handlers,
    opened: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(stalled, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(server_module, "_STALL_CHECK_SECONDS", 0.1)
    with RawClient(running.port, receive_buffer=4096) as client:
        if opened:
            client.send(windows(opened))
        client.send(request(b"large"))
        assert acquired(work.started)
        with caplog.at_level(logging.WARNING, "grpc_h2"):
            running.stop(60).result(SECONDS)
    assert "A client was cut off" in caplog.text


def test_a_client_that_reads_slowly_is_served_while_the_server_stops(
    running: ServerThread, work: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stalled, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(server_module, "_STALL_CHECK_SECONDS", 0.1)
    with RawClient(running.port, receive_buffer=4096) as client:
        client.send(windows(5_000_000))
        client.send(request(b"large"))
        assert acquired(work.started)
        stopped = running.stop(60)
        client.until(lambda: client.replies.stream(1).ended)
        client.until_eof()
        client.socket.close()
        stopped.result(SECONDS)


def test_a_stop_without_grace_ends_calls_as_unavailable(
    running: ServerThread, channel: grpc.Channel, work: Handlers
) -> None:
    call: Any = channel.unary_unary("/t.S/wait")
    future = call.future(b"x", timeout=SECONDS)
    assert acquired(work.started)
    running.stop(None).result(SECONDS)
    assert future.code() is grpc.StatusCode.UNAVAILABLE
    assert acquired(work.cancelled)


@pytest.mark.requirement("A47")
def test_calls_are_ended_when_grace_is_over(running: ServerThread, channel: grpc.Channel, work: Handlers) -> None:
    call: Any = channel.unary_stream("/t.S/stream")
    answers = call(b"x", timeout=SECONDS)
    assert next(answers) == b"first"
    running.stop(0.1).result(SECONDS)
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_shortest_grace_is_used(running: ServerThread, channel: grpc.Channel, work: Handlers) -> None:
    call: Any = channel.unary_unary("/t.S/wait")
    future = call.future(b"x", timeout=SECONDS)
    assert acquired(work.started)
    first = running.stop(1000)
    running.stop(0.05).result(SECONDS)
    first.result(SECONDS)
    assert future.code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.requirement("A47")
def test_calls_that_cross_with_the_goaway_of_a_drain_are_served(running: ServerThread, work: Handlers) -> None:
    with RawClient(running.port) as client:
        client.send(request(b"wait"))
        assert acquired(work.started)
        stopped = running.stop(SECONDS)
        client.until(lambda: client.replies.goaways)
        assert client.replies.goaways[0][0] == 2**31 - 1
        client.send(request(b"wait", stream=3))
        assert acquired(work.started)
        go(running, work)
        client.until(lambda: client.replies.stream(1).ended and client.replies.stream(3).ended)
        assert client.replies.stream(3).status == 0
        client.until(lambda: len(client.replies.goaways) == 2)  # because the PING was never answered
        assert client.replies.goaways[1][0] == 3
        client.until_eof()
        client.socket.close()
        stopped.result(SECONDS)


def test_an_idle_server_stops_at_once(running: ServerThread) -> None:
    running.stop(1000).result(SECONDS)
    running.stop(None).result(SECONDS)


def test_a_handler_that_ignores_its_cancellation_is_logged_and_not_waited_for(
    running: ServerThread, channel: grpc.Channel, work: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    work.stubborn_seconds = 1.2
    call: Any = channel.unary_unary("/t.S/stubborn")
    future = call.future(b"x", timeout=SECONDS)
    assert acquired(work.started)
    with caplog.at_level(logging.WARNING, "grpc_h2"):
        running.stop(None).result(SECONDS)
    assert "do not end although cancelled" in caplog.text
    assert future.code() is grpc.StatusCode.UNAVAILABLE
    until(lambda: running.server.open_calls == 0, "the handler ends later by itself")


def test_waiting_for_termination_may_time_out(running: ServerThread) -> None:
    assert running.run(running.server.wait_for_termination(0.01)) is True


def test_a_second_start_of_a_server_raises(running: ServerThread) -> None:
    with pytest.raises(RuntimeError, match="before"):
        running.run(running.server.start())


def test_a_call_that_begins_when_grace_is_over_is_refused(running: ServerThread, work: Handlers) -> None:
    work.stubborn_seconds = 0.5
    with RawClient(running.port) as client:
        client.send(request(b"stubborn"))
        assert acquired(work.started)
        stopped = running.stop(None)
        client.until(lambda: client.replies.stream(1).ended)
        client.send(request(b"wait", stream=3))
        client.until(lambda: client.replies.stream(3).ended)
        assert client.replies.stream(3).status == 14
        client.until_eof()
        client.socket.close()
        stopped.result(SECONDS)


# --- peers that read nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("how", ["half-closes", "is evicted"])
def test_a_peer_that_reads_nothing_is_aborted_when_its_connection_closes(
    loop: str, how: str, work: Handlers, caplog: pytest.LogCaptureFixture
) -> None:
    """Written octets wait in the transport, which has no time limit itself."""
    with (
        caplog.at_level(logging.WARNING, "grpc_h2"),
        ServerThread(LOOPS[loop], work.register, limits=Limits(stall_timeout=0.2)) as running,
        RawClient(running.port, receive_buffer=4096) as client,
    ):
        client.send(request(b"large"))
        assert acquired(work.started)
        (protocol,) = running.server._protocols
        transport = protocol._transport
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        client.send(frames.settings(((frames.INITIAL_WINDOW_SIZE, 5_000_000),)))

        def waits() -> bool:
            # The test reads little by little, because a transport with a full buffer would not notice that the peer has
            # closed.
            running.call(lambda: None)  # the loop has read the last octets before it runs the next call
            if running.call(transport.get_write_buffer_size) > 0:
                return True
            client.send(frames.window_update(0, 20_000))
            return False

        until(waits, "octets that the kernel does not accept")
        if how == "half-closes":
            client.socket.shutdown(socket.SHUT_WR)
        else:
            running.call(protocol.dismiss, Refusal.EVICTED)
        until(lambda: running.server.connections == 0, "the connection is gone", seconds=5)
    assert "its connection is to close" in caplog.records[-1].error
