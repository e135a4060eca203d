"""How the engine runs a handler: its arguments, the use of its result or exception, and the log lines."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.unit.grpc_h2.aio.test_call import Bench

from grpc_h2 import MethodHandler, StatusCode
from grpc_h2.aio.call import AbortError
from grpc_h2.aio.handlers import Run, SyncServicerContext
from grpc_h2.rpc.faults import CallFault


class Served(Bench):
    """A call with a handler of the test."""

    def __init__(self, **fields: bytes) -> None:
        super().__init__(**fields)
        self.refused: list[str] = []
        self.protocol.note_refused = self.refused.append
        self.executor = ThreadPoolExecutor(1)
        self.run = Run(self.context, asyncio.get_running_loop(), lambda: self.executor)

    async def serve(self, function: Any, kind: str = "unary_unary", *, resolve: Any = None, read: Any = bytes) -> Any:
        """Run a handler to its end. Returns the answer that the client received."""
        handler = None
        if function is not None:
            streams = [part == "stream" for part in kind.split("_")]
            handler = MethodHandler(*streams, read, bytes, **{kind: function})
        await asyncio.wait_for(self.run(handler, resolve), 30)
        return self.answered()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    made = Served()
    yield made
    made.executor.shutdown()


async def upper(request: bytes, context: Any) -> bytes:
    return request.upper()


def upper_in_thread(request: bytes, context: Any) -> bytes:
    return request.upper()


async def letters(request: bytes, context: Any) -> AsyncIterator[bytes]:
    for octet in request:
        yield bytes((octet,))


def letters_in_thread(request: bytes, context: Any) -> Iterator[bytes]:
    return (bytes((octet,)) for octet in request)


async def letters_returned(request: bytes, context: Any) -> Any:
    return letters(request, context)


class Iterated:
    """An async iterator that cannot be closed."""

    def __init__(self, request: bytes) -> None:
        self.left = list(request)

    def __aiter__(self) -> Iterated:
        return self

    async def __anext__(self) -> bytes:
        if not self.left:
            raise StopAsyncIteration
        return bytes((self.left.pop(0),))


async def letters_iterated(request: bytes, context: Any) -> Any:
    return Iterated(request)


async def letters_written(request: bytes, context: Any) -> bytes:
    for octet in request:
        await context.write(bytes((octet,)))
    return b"not sent: its messages were written"


async def joined(requests: Any, context: Any) -> bytes:
    return b"-".join([request async for request in requests])


def joined_in_thread(requests: Any, context: Any) -> bytes:
    return b"-".join(requests)


async def echoed(requests: Any, context: Any) -> AsyncIterator[bytes]:
    async for request in requests:
        yield request


class Echo:
    async def __call__(self, request: bytes, context: Any) -> bytes:
        return request.upper()


@pytest.mark.parametrize(
    ("kind", "function", "sent", "answered"),
    [
        ("unary_unary", upper, [b"abc"], [b"ABC"]),
        ("unary_unary", upper_in_thread, [b"abc"], [b"ABC"]),
        ("unary_unary", Echo(), [b"abc"], [b"ABC"]),
        ("unary_unary", functools.partial(functools.partial(upper)), [b"abc"], [b"ABC"]),
        ("unary_unary", functools.partial(upper_in_thread), [b"abc"], [b"ABC"]),
        ("unary_stream", letters, [b"abc"], [b"a", b"b", b"c"]),
        ("unary_stream", letters_in_thread, [b"abc"], [b"a", b"b", b"c"]),
        ("unary_stream", letters_returned, [b"abc"], [b"a", b"b", b"c"]),
        ("unary_stream", letters_iterated, [b"abc"], [b"a", b"b", b"c"]),
        ("unary_stream", letters_written, [b"abc"], [b"a", b"b", b"c"]),
        ("stream_unary", joined, [b"a", b"b"], [b"a-b"]),
        ("stream_unary", joined_in_thread, [b"a", b"b"], [b"a-b"]),
        ("stream_unary", joined, [], [b""]),
        ("stream_stream", echoed, [b"a", b"b"], [b"a", b"b"]),
    ],
)
async def test_handlers_of_every_style_receive_the_request_and_send_their_messages(
    served: Served, kind: str, function: Any, sent: list[bytes], answered: list[bytes]
) -> None:
    served.send(*sent, end=True)
    result = await served.serve(function, kind)
    assert (result.messages, result.status) == (answered, 0)


@pytest.mark.parametrize("kind", ["unary_unary", "unary_stream", "stream_unary"])
async def test_only_a_unary_request_has_a_time_limit_to_arrive(served: Served, kind: str) -> None:
    async def wait(*_: object) -> bytes:
        await asyncio.Event().wait()
        return b""

    running = asyncio.create_task(served.serve(wait, kind))
    for _ in range(3):
        await asyncio.sleep(0)
    served.peer.advance(10.1)
    running.cancel()
    await asyncio.wait((running,))
    assert served.peer.result(1).status == (None if kind.startswith("stream") else 4)


@pytest.mark.parametrize(
    ("sent", "text"),
    [([], b"No message in a unary request"), ([b"a", b"b"], b"More than one message in a unary request")],
    ids=["none", "two"],
)
async def test_a_unary_request_without_or_with_two_messages_is_unimplemented(
    served: Served, sent: list[bytes], text: bytes
) -> None:
    served.send(*sent, end=True)
    result = await served.serve(upper)
    assert (result.status, result.text) == (12, text)


@pytest.mark.parametrize("resolved", [True, False])
async def test_a_call_whose_handler_is_not_found_is_unimplemented(served: Served, resolved: bool) -> None:
    async def resolve() -> Any:
        return MethodHandler.unary(upper, bytes, bytes) if resolved else None

    served.send(b"abc", end=True)
    result = await served.serve(None, resolve=resolve)
    if resolved:
        assert (result.messages, result.status) == ([b"ABC"], 0)
    else:
        assert (result.status, result.text) == (12, b"Method not found!")


async def test_a_handlers_exception_is_logged_and_its_text_is_not_sent(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        raise KeyError("the secret")

    served.send(b"abc", end=True)
    result = await served.serve(fail)
    assert (result.status, result.text) == (2, b"Exception calling application")
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "Exception calling application")
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], KeyError)


async def test_a_status_set_before_an_exception_is_sent(served: Served) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        context.set_code(StatusCode.DATA_LOSS)
        context.set_details("half of it")
        raise KeyError("the secret")

    served.send(b"abc", end=True)
    result = await served.serve(fail)
    assert (result.status, result.text) == (15, b"half of it")


async def test_an_exception_after_the_client_has_cancelled_is_not_logged(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: bytes, context: Any) -> bytes:
        context.peer_cancelled()
        raise KeyError("it is gone")

    served.send(b"abc", end=True)
    await served.serve(fail)
    assert caplog.records == []


@pytest.mark.parametrize("code", [StatusCode.OK, StatusCode.NOT_FOUND])
async def test_a_returned_message_is_not_sent_if_the_status_is_a_failure(served: Served, code: StatusCode) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        context.set_code(code)
        return b"answer"

    served.send(b"abc", end=True)
    result = await served.serve(answer)
    assert (result.messages, result.status) == ([b"answer"] if code is StatusCode.OK else [], int(code))


async def test_an_answer_of_a_call_that_has_ended_is_not_sent(served: Served) -> None:
    async def answer(request: bytes, context: Any) -> bytes:
        context.peer_cancelled()
        return b"late"

    served.send(b"abc", end=True)
    assert (await served.serve(answer)).messages == []


async def test_an_abort_sends_its_status_and_is_not_logged(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    async def abort(request: bytes, context: Any) -> bytes:
        await context.abort(StatusCode.ABORTED, "enough")
        return b""

    served.send(b"abc", end=True)
    result = await served.serve(abort)
    assert (result.status, result.text) == (10, b"enough")
    assert caplog.records == []


async def test_an_abort_in_a_thread_sends_its_status_and_metadata(served: Served) -> None:
    def abort(request: bytes, context: Any) -> bytes:
        details = SimpleNamespace(code=StatusCode.ABORTED, details="enough", trailing_metadata=(("who", "me"),))
        context.abort_with_status(details)
        return b""

    served.send(b"abc", end=True)
    result = await served.serve(abort)
    assert (result.status, result.text) == (10, b"enough")
    assert (b"who", b"me") in (result.trailers or result.headers)


async def test_an_unreadable_message_is_noted_as_a_fault_of_the_client(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.send(b"abc", end=True)
    result = await served.serve(upper, read=int)
    assert (result.status, result.text) == (13, b"Exception deserializing request!")
    assert served.refused == ["its message cannot be parsed: ValueError"]
    assert caplog.records == []


async def test_an_unwritable_message_is_logged_and_a_fault_of_the_client_is_not(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(request: bytes, context: Any) -> Any:
        return "no octets"

    served.send(b"abc", end=True)
    result = await served.serve(answer)
    assert (result.status, result.text) == (13, b"Failed to serialize response!")
    (record,) = caplog.records
    assert (record.levelno, record.message) == (logging.ERROR, "A message could not be written")
    assert cast(Any, record).details == "Failed to serialize response!"
    other = Served()

    async def refuse(request: bytes, context: Any) -> Any:
        raise CallFault(StatusCode.OUT_OF_RANGE, "not so far")

    other.send(b"abc", end=True)
    assert (await other.serve(refuse)).status == 11
    assert len(caplog.records) == 1


async def test_the_generator_of_a_cancelled_stream_is_closed(served: Served) -> None:
    closed: list[bool] = []

    async def endless(request: bytes, context: Any) -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"x"
                context.peer_cancelled()
        finally:
            closed.append(True)

    served.send(b"abc", end=True)
    await served.serve(endless, "unary_stream")
    assert closed == [True]


# -- in a thread -------------------------------------------------------------------------------------------------------


async def test_a_function_in_a_thread_uses_the_context_without_await(served: Served) -> None:
    called: list[str] = []

    def answer(request: bytes, context: Any) -> bytes:
        context.send_initial_metadata((("who", "me"),))
        assert context.peer() == "ipv4:192.0.2.1:4711"
        assert context.add_callback(lambda: called.append("ended"))
        return request

    served.send(b"abc", end=True)
    result = await served.serve(answer)
    assert (b"who", b"me") in result.headers
    served.context.finish()
    assert called == ["ended"]


async def test_a_callback_for_a_call_that_has_ended_is_refused(served: Served) -> None:
    context = SyncServicerContext(served.context, asyncio.get_running_loop())
    served.context.peer_cancelled()
    assert context.add_callback(pytest.fail) is False


async def test_a_call_may_be_cancelled_from_a_thread(served: Served) -> None:
    context = SyncServicerContext(served.context, asyncio.get_running_loop())
    await asyncio.to_thread(context.cancel)
    await asyncio.sleep(0)
    assert served.context.cancelled()
    assert (served.answered().status, served.answered().text) == (1, b"Cancelled by the server")
    with pytest.raises(AbortError):
        context.abort(StatusCode.ABORTED)


def test_a_method_handler_shows_which_sides_stream() -> None:
    unary, streaming = MethodHandler.unary(upper, int, str), MethodHandler.streaming(letters, int, str)
    assert (unary.request_streaming, unary.response_streaming, unary.unary_unary) == (False, False, upper)
    assert (streaming.request_streaming, streaming.response_streaming, streaming.unary_stream) == (False, True, letters)
    for made, own in ((unary, "unary_unary"), (streaming, "unary_stream")):
        assert (made.request_deserializer, made.response_serializer) == (int, str)
        others = {"unary_unary", "unary_stream", "stream_unary", "stream_stream"} - {own}
        assert [getattr(made, name) for name in others] == [None] * 3
