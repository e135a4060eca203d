"""The call context of a handler: messages, statuses, deadlines and ends, on a connection in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from gzip import decompress
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.h2_peer import HANDLED, Peer
from tests.support.h2_wire import data, grpc_message, headers, request_block, rst_stream, window_update

from grpc_h2 import Limits, StatusCode
from grpc_h2.aio.call import EOF, AbortError, ServicerContext
from grpc_h2.rpc.faults import CallFault, UnreadableMessage

GZIP = 2


class Timer:
    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when, self.callback = when, callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """An event loop that takes its time from the clock of a peer."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.timers: list[Timer] = []

    def time(self) -> float:
        return self.peer.now

    def create_future(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        self.timers.append(Timer(when, callback))
        return self.timers[-1]


class Bench:
    """One call of a client; the test plays its handler."""

    def __init__(self, *, compression: int = 0, limits: Limits | None = None, **fields: bytes) -> None:
        self.peer = Peer(consumes=False, limits=limits).send(window_update(0, 2**24))
        self.peer.send(headers(1, request_block(HANDLED, **fields)))
        self.stream = self.peer.calls[1]
        self.loop = Loop(self.peer)
        self.wakes = 0
        self.known: dict[str, list[bytes]] = {}
        self.protocol = SimpleNamespace(
            connection=self.peer.connection,
            wake=self._wake,
            peer="ipv4:192.0.2.1:4711",
            auth_context=lambda: self.known,
        )
        self.context = ServicerContext(cast(Any, self.protocol), self.stream, cast(Any, self.loop), EOF, compression)

    def _wake(self) -> None:
        self.wakes += 1

    def send(self, *messages: bytes, end: bool = False) -> None:
        """Send messages as the client, and pass them to the context as the protocol does."""
        before = len(self.peer.received.get(1, []))
        self.peer.send(data(1, b"".join(map(grpc_message, messages)), end_stream=end))
        for message in self.peer.received.get(1, [])[before:]:
            self.context.message_received(message)
        if end:
            self.context.half_closed()

    def answered(self) -> Any:
        """The answer that the client has received so far."""
        self.peer.read()
        self.peer.connection.check_invariants()
        return self.peer.result(1)


@pytest.fixture
async def bench() -> Bench:
    return Bench()


# -- messages of the client --------------------------------------------------------------------------------------------


async def test_read_returns_messages_in_order_and_waits_for_the_next_one(bench: Bench) -> None:
    bench.context.deserializer = bytes.decode
    bench.send(b"one", b"two")
    assert [await bench.context.read() for _ in range(2)] == ["one", "two"]
    reading = asyncio.create_task(bench.context.read())
    await asyncio.sleep(0)
    assert not reading.done()
    bench.send(b"three")
    assert await reading == "three"
    reading = asyncio.create_task(bench.context.read())
    await asyncio.sleep(0)
    bench.send(end=True)
    assert await reading is EOF
    assert await bench.context.read() is EOF
    assert not EOF
    assert repr(EOF) == "<EOF>"


async def test_a_taken_message_enlarges_the_window_unless_the_request_has_ended(bench: Bench) -> None:
    bench.send(b"one")
    await bench.context.receive()
    assert bench.wakes == 1
    bench.send(b"two", end=True)
    await bench.context.receive()
    assert bench.wakes == 1
    assert bench.stream.unread == bench.stream.owed == 0


async def test_messages_that_arrive_after_the_end_of_the_handler_are_dropped(bench: Bench) -> None:
    bench.send(b"one")
    bench.context.finish()
    assert bench.stream.unread == 0
    other = Bench()
    other.context._finished = True
    other.send(b"one")
    assert other.stream.unread == 0
    with pytest.raises(asyncio.CancelledError):
        await other.context.receive()


async def test_an_unreadable_request_and_an_unwritable_response_raise_internal_with_different_texts(
    bench: Bench,
) -> None:
    assert bench.context.deserialize(b"as it is") == b"as it is"
    assert bench.context.serialize(b"as it is") == b"as it is"
    assert bench.context.serialize(memoryview(b"view")) == b"view"
    bench.context.deserializer = int
    bench.context.serializer = cast(Any, {b"known": b"octets", b"text": "text"}.__getitem__)
    with pytest.raises(UnreadableMessage, match="Exception deserializing request!") as unreadable:
        bench.context.deserialize(b"no number")
    assert unreadable.value.status == StatusCode.INTERNAL
    assert isinstance(unreadable.value.__cause__, ValueError)
    assert bench.context.serialize(b"known") == b"octets"
    for message in (b"unknown", b"text"):
        with pytest.raises(CallFault, match="Failed to serialize response!") as fault:
            bench.context.serialize(message)
        assert fault.value.status == StatusCode.INTERNAL


# -- answers -----------------------------------------------------------------------------------------------------------


async def test_an_answer_consists_of_headers_messages_and_a_status_with_metadata(bench: Bench) -> None:
    await bench.context.send_initial_metadata((("who", "me"),))
    assert bench.wakes == 1
    with pytest.raises(ValueError, match="initial metadata has been sent"):
        await bench.context.send_initial_metadata(())
    for message in (b"one", b"two"):
        await bench.context.write(message)
    bench.context.set_trailing_metadata((("left", "3"),))
    assert bench.context.trailing_metadata() == (("left", "3"),)
    bench.context.set_code(StatusCode.DATA_LOSS)
    bench.context.set_details("half of it")
    bench.context.end()
    result = bench.answered()
    assert (b"who", b"me") in result.headers
    assert (b"left", b"3") in result.trailers
    assert (result.messages, result.status, result.text) == ([b"one", b"two"], 15, b"half of it")
    assert bench.wakes == 4


async def test_writing_on_an_ended_call_raises_an_error(bench: Bench) -> None:
    bench.context.end()
    with pytest.raises(asyncio.InvalidStateError, match="already finished"):
        await bench.context.write(b"late")
    cancelled = Bench()
    cancelled.context.peer_cancelled()
    with pytest.raises(asyncio.InvalidStateError, match="already finished"):
        await cancelled.context.write(b"late")


@pytest.mark.parametrize("wrong", [(("Upper", "x"),), (("text", "ä"),)])
async def test_invalid_metadata_is_refused_when_the_handler_sets_it(bench: Bench, wrong: Any) -> None:
    for give in (bench.context.metadata_out, bench.context.set_trailing_metadata):
        with pytest.raises(ValueError, match="metadata"):
            give(wrong)
    with pytest.raises(ValueError, match="metadata"):
        bench.context.set_aborted(StatusCode.ABORTED, "", wrong)
    assert bench.context.trailing_metadata() == ()
    assert not bench.stream.headers_sent


async def test_a_write_waits_while_the_client_has_too_much_unread() -> None:
    bench = Bench(limits=Limits(high_water=1000, low_water=100))
    bench.peer.send(window_update(1, 2**20))
    writing = asyncio.create_task(bench.context.write(bytes(1000 - 5)))
    await asyncio.sleep(0)
    assert writing.done(), "as much as may wait"
    writing = asyncio.create_task(bench.context.write(b""))
    await asyncio.sleep(0)
    assert not writing.done()
    bench.context.writable()
    await asyncio.sleep(0)
    assert not writing.done(), "it still waits"
    bench.peer.read()
    bench.context.writable()
    await writing
    writing = asyncio.create_task(bench.context.write(bytes(2000)))
    await asyncio.sleep(0)
    bench.context.peer_cancelled()
    with pytest.raises(asyncio.CancelledError):
        await writing


@pytest.mark.parametrize(
    ("accepts", "compression", "compressed"),
    [(b"gzip", GZIP, True), (b"identity", GZIP, False), (None, GZIP, False), (b"gzip", 0, False), (b"gzip", 1, False)],
)
async def test_messages_are_compressed_if_the_handler_chooses_gzip_and_the_client_accepts_it(
    accepts: bytes | None, compression: int, compressed: bool
) -> None:
    bench = Bench(compression=compression, **({} if accepts is None else {"grpc_accept_encoding": accepts}))
    bench.context.disable_next_message_compression()
    for _ in range(2):
        await bench.context.write(b"x" * 100)
    bench.context.end()
    result = bench.answered()
    assert ((b"grpc-encoding", b"gzip") in result.headers) is compressed
    first, second = result.messages
    assert first == b"x" * 100, "this one was not to be compressed"
    assert (decompress(second) if compressed else second) == b"x" * 100


async def test_choosing_compression_after_the_headers_raises_an_error() -> None:
    bench = Bench(grpc_accept_encoding=b"gzip")
    bench.context.set_compression(SimpleNamespace(value=GZIP))
    bench.context.set_compression(GZIP)
    await bench.context.write(b"x" * 100)
    with pytest.raises(RuntimeError, match="before sending initial metadata"):
        bench.context.set_compression(0)
    assert (b"grpc-encoding", b"gzip") in bench.answered().headers


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"),
    [(StatusCode.NOT_FOUND, 5), (7, 7), (SimpleNamespace(value=(9, "failed")), 9), (StatusCode.OK, 2), (0, 2)],
    ids=["ours", "a number", "grpcio's", "OK", "zero"],
)
async def test_the_status_of_an_abort_is_a_failure_and_cannot_be_changed(bench: Bench, code: Any, status: int) -> None:
    with pytest.raises(AbortError):
        await bench.context.abort(code, "enough", (("who", "me"),))
    bench.context.set_code(StatusCode.OK)
    bench.context.set_details("nothing")
    assert bench.context.details() == "enough"
    bench.context.end(StatusCode.INTERNAL, "another")
    result = bench.answered()
    assert (result.status, result.text) == (status, b"enough")
    assert (b"who", b"me") in (result.trailers or result.headers)


async def test_an_abort_keeps_trailing_metadata_unless_it_has_its_own(bench: Bench) -> None:
    bench.context.set_trailing_metadata((("kept", "1"),))
    status = SimpleNamespace(code=StatusCode.ABORTED, details="enough", trailing_metadata=None)
    with pytest.raises(AbortError):
        await bench.context.abort_with_status(status)
    assert bench.context.trailing_metadata() == (("kept", "1"),)


async def test_a_status_given_at_the_end_replaces_the_status_of_the_handler(bench: Bench) -> None:
    bench.context.set_code(StatusCode.NOT_FOUND)
    assert bench.context.status == 5
    assert bench.context.code() is StatusCode.NOT_FOUND
    bench.context.end(StatusCode.INTERNAL, "ours")
    assert (bench.answered().status, bench.answered().text) == (13, b"ours")


async def test_a_call_without_a_status_is_ok(bench: Bench) -> None:
    assert bench.context.status == 0
    assert bench.context.code() is None
    bench.context.end()
    assert bench.answered().status == 0


async def test_a_handler_that_ends_without_a_status_sends_cancelled_and_runs_its_callbacks_once(bench: Bench) -> None:
    called: list[Any] = []
    bench.context.add_done_callback(called.append)
    bench.context.add_done_callback(lambda context: called.append(context.done()))
    assert not bench.context.done()
    assert bench.context.is_active()
    bench.stream.call = bench.context
    bench.context.finish()
    assert (bench.answered().status, bench.answered().text) == (1, b"The handler was cancelled")
    assert called == [bench.context, True]
    bench.context.finish()
    assert len(called) == 2
    assert bench.stream.call is None
    assert bench.context.task is None
    assert bench.stream.finished
    assert bench.context.done()
    assert not bench.context.is_active()
    assert not bench.context.cancelled(), "it ended by itself"


@pytest.mark.parametrize("end", [ServicerContext.cancel, ServicerContext.peer_cancelled], ids=["server", "client"])
async def test_a_call_ended_by_server_or_client_cancels_its_handler(bench: Bench, end: Any) -> None:
    async def handle() -> None:
        await bench.context.receive()

    bench.context.task = task = asyncio.create_task(handle())
    await asyncio.sleep(0)
    end(bench.context)
    assert bench.context.cancelled()
    assert bench.context.done()
    await asyncio.wait((task,))
    assert task.cancelled()
    if end is ServicerContext.cancel:
        assert (bench.answered().status, bench.answered().text) == (1, b"Cancelled by the server")


async def test_a_call_is_done_once_its_status_is_sent_even_if_its_handler_still_runs(bench: Bench) -> None:
    bench.context.end()
    assert bench.context.done()
    assert not bench.context.cancelled()


# -- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers_sent", [False, True])
async def test_an_expired_deadline_sends_a_status_or_after_the_headers_a_reset(headers_sent: bool) -> None:
    bench = Bench(grpc_timeout=b"2S")
    (timer,) = bench.loop.timers
    assert timer.when == bench.peer.now + 2.0
    assert bench.context.time_remaining() == 2.0
    if headers_sent:
        bench.context.metadata_out(())
    bench.peer.now += 2.0
    wakes = bench.wakes
    timer.callback()
    assert bench.wakes == wakes + 1
    result = bench.answered()
    assert (result.status, result.reset) == ((None, 8) if headers_sent else (4, 0)) or result.status == 4
    assert (result.reset == 8) is headers_sent
    assert bench.context.cancelled()
    bench.peer.now += 5.0
    assert bench.context.time_remaining() == 0.0


async def test_a_deadline_after_the_status_changes_nothing() -> None:
    bench = Bench(grpc_timeout=b"2S")
    bench.context.end()
    bench.loop.timers[0].callback()
    assert bench.answered().status == 0
    assert not bench.context.cancelled()


@pytest.mark.parametrize("end", [ServicerContext.finish, ServicerContext.peer_cancelled])
async def test_a_call_that_has_ended_has_no_timer(end: Any) -> None:
    bench = Bench(grpc_timeout=b"2S")
    end(bench.context)
    assert bench.loop.timers[0].cancelled


@pytest.mark.parametrize(
    ("timeout", "seconds", "timers"), [(b"99999999H", 99_999_999 * 3600.0, 0), (b"9999999S", 9_999_999.0, 1),
                                       (b"10000000S", 10_000_000.0, 0)],
)  # fmt: skip
async def test_a_deadline_of_months_sets_no_timer(timeout: bytes, seconds: float, timers: int) -> None:
    bench = Bench(grpc_timeout=timeout)
    assert len(bench.loop.timers) == timers
    assert bench.context.time_remaining() == pytest.approx(seconds)


async def test_a_call_without_a_deadline_has_no_remaining_time_and_no_timer(bench: Bench) -> None:
    assert bench.context.time_remaining() is None
    assert bench.loop.timers == []


@pytest.mark.parametrize("ended", [False, True])
async def test_a_unary_request_must_arrive_within_ten_seconds_while_its_call_runs(bench: Bench, ended: bool) -> None:
    if ended:
        bench.context.peer_cancelled()
    bench.context.expect_one_message()
    bench.peer.advance(10.1)
    assert bench.peer.result(1).status == (None if ended else 4)


# -- the client --------------------------------------------------------------------------------------------------------


async def test_the_context_returns_the_peer_and_the_metadata() -> None:
    bench = Bench(x_trace=b"7")
    assert bench.context.peer() == "ipv4:192.0.2.1:4711"
    entries = {entry.key: entry.value for entry in bench.context.invocation_metadata()}
    assert entries["x-trace"] == "7"


@pytest.mark.parametrize(
    ("known", "key", "names"),
    [
        ({}, None, None),
        ({"x509_common_name": [b"client"]}, "x509_common_name", [b"client"]),
        ({"x509_common_name": [b"client"], "x509_subject_alternative_name": [b"a", b"b"]},
         "x509_subject_alternative_name", [b"a", b"b"]),
    ],
)  # fmt: skip
async def test_the_identity_of_a_client_is_taken_from_its_certificate(
    bench: Bench, known: Any, key: str | None, names: Any
) -> None:
    bench.known = known
    assert bench.context.auth_context() == known
    assert bench.context.peer_identity_key() == key
    assert bench.context.peer_identities() == names


async def test_a_reset_by_the_client_leaves_nothing_unread(bench: Bench) -> None:
    bench.send(b"one")
    bench.peer.send(rst_stream(1, 8))
    bench.context.peer_cancelled()
    bench.context.finish()
    assert bench.stream.unread == 0
    bench.peer.connection.check_invariants()
