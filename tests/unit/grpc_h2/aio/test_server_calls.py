"""Calls of the four kinds on the native engine, with handlers in every style of grpc.aio, from grpcio's client."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from operator import methodcaller
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc
from tests.support.native_server import LOOPS, ServerThread, handlers
from tests.support.polling import until

from grpc_h2.aio.server import Server

SECONDS = 10.0


# --- the same four methods, written in every style -------------------------------------------------------------------


async def unary(request: bytes, context: Any) -> bytes:
    return b"<" + request + b">"


def unary_in_thread(request: bytes, context: Any) -> bytes:
    assert threading.current_thread().name.startswith("handler")
    return b"<" + request + b">"


class Called:
    async def __call__(self, request: bytes, context: Any) -> bytes:
        return b"<" + request + b">"


async def count_generated(request: bytes, context: Any) -> Any:
    for number in range(int(request)):
        yield str(number).encode()


async def count_written(request: bytes, context: Any) -> None:
    for number in range(int(request)):
        await context.write(str(number).encode())


async def count_returned(request: bytes, context: Any) -> Any:
    return count_generated(request, context)


def count_in_thread(request: bytes, context: Any) -> Iterator[bytes]:
    for number in range(int(request)):
        yield str(number).encode()


async def join_iterated(requests: Any, context: Any) -> bytes:
    return b",".join([request async for request in requests])


async def join_read(requests: Any, context: Any) -> bytes:
    parts = []
    while (request := await context.read()) is not grpc.aio.EOF:
        parts.append(request)
    assert await context.read() is grpc.aio.EOF
    return b",".join(parts)


def join_in_thread(requests: Iterator[bytes], context: Any) -> bytes:
    return b",".join(requests)


async def echo_generated(requests: Any, context: Any) -> Any:
    async for request in requests:
        yield request


async def echo_written(requests: Any, context: Any) -> None:
    while (request := await context.read()) is not grpc.aio.EOF:
        await context.write(request)


def echo_in_thread(requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
    yield from requests


STYLES: dict[str, list[Any]] = {
    "unary_unary": [unary, unary_in_thread, Called()],
    "unary_stream": [count_generated, count_written, count_returned, count_in_thread],
    "stream_unary": [join_iterated, join_read, join_in_thread],
    "stream_stream": [echo_generated, echo_written, echo_in_thread],
}
MAKERS = {kind: getattr(grpc, f"{kind}_rpc_method_handler") for kind in STYLES}


def name_of(kind: str, style: int) -> str:
    return f"{kind}_{style}"


# --- other handlers --------------------------------------------------------------------------------------------------


async def raises(request: bytes, context: Any) -> bytes:
    raise KeyError("the secret")


async def sets_code_and_raises(request: bytes, context: Any) -> bytes:
    context.set_code(grpc.StatusCode.DATA_LOSS)
    context.set_details("half of it")
    raise KeyError("the secret")


async def sets_code(request: bytes, context: Any) -> bytes:
    context.set_code(grpc.StatusCode.NOT_FOUND)
    context.set_details("näher nichts %")
    assert context.code() is grpc.StatusCode.NOT_FOUND
    assert context.details() == "näher nichts %"
    return b"never seen"


async def aborts(request: bytes, context: Any) -> bytes:
    try:
        await context.abort(grpc.StatusCode.ABORTED, "enough", (("why-bin", b"\0\xff"), ("who", "me")))
    except Exception:  # noqa: BLE001 - a handler that catches its own abort
        context.set_code(grpc.StatusCode.OK)
    return b"never seen"


async def aborts_with_status(request: bytes, context: Any) -> bytes:
    status = SimpleNamespace(
        code=grpc.StatusCode.ABORTED, details="enough", trailing_metadata=(("why-bin", b"\0\xff"), ("who", "me"))
    )
    await context.abort_with_status(status)
    return b"never seen"


def aborts_in_thread(request: bytes, context: Any) -> bytes:
    context.abort(grpc.StatusCode.ABORTED, "enough", (("why-bin", b"\0\xff"), ("who", "me")))
    return b"never seen"


async def aborts_ok(request: bytes, context: Any) -> bytes:
    await context.abort(grpc.StatusCode.OK, "fine")
    return b"never seen"


async def metadata(request: bytes, context: Any) -> bytes:
    received = [(entry.key, entry.value) for entry in context.invocation_metadata() if entry.key.startswith("x-")]
    await context.send_initial_metadata((("first", "1"), ("first-bin", b"\x01")))
    with pytest.raises(ValueError, match="has been sent"):
        await context.send_initial_metadata((("again", "1"),))
    context.set_trailing_metadata((("last", "2"), ("last-bin", b"\x02")))
    assert context.trailing_metadata() == (("last", "2"), ("last-bin", b"\x02"))
    return repr(received).encode()


def metadata_in_thread(request: bytes, context: Any) -> bytes:
    received = [(key, value) for key, value in context.invocation_metadata() if key.startswith("x-")]
    context.send_initial_metadata((("first", "1"), ("first-bin", b"\x01")))
    context.set_trailing_metadata((("last", "2"), ("last-bin", b"\x02")))
    return repr(received).encode()


async def bad_initial_metadata(request: bytes, context: Any) -> bytes:
    await context.send_initial_metadata((("Upper", "x"),))
    return b"never seen"


async def bad_trailing_metadata(request: bytes, context: Any) -> bytes:
    context.set_trailing_metadata((("split", "a\r\nb"),))
    return b"never seen"


async def facts(request: bytes, context: Any) -> bytes:
    assert context.is_active()
    assert not context.done()
    assert not context.cancelled()
    assert dict(context.auth_context()) == {}
    assert context.peer_identity_key() is None
    assert context.peer_identities() is None
    remaining = context.time_remaining()
    return f"{context.peer()} {remaining}".encode()


async def returns_nonsense(request: bytes, context: Any) -> Any:
    return 42


def prepare(server: Server) -> None:
    methods: dict[str, Any] = {
        name_of(kind, style): MAKERS[kind](function)
        for kind, functions in STYLES.items()
        for style, function in enumerate(functions)
    }
    others: list[Any] = [
        raises,
        sets_code_and_raises,
        sets_code,
        aborts,
        aborts_with_status,
        aborts_in_thread,
        aborts_ok,
        metadata,
        metadata_in_thread,
        bad_initial_metadata,
        bad_trailing_metadata,
        facts,
        returns_nonsense,
    ]
    for function in others:
        methods[function.__name__] = grpc.unary_unary_rpc_method_handler(function)
    methods["numbers"] = grpc.unary_unary_rpc_method_handler(
        unary, request_deserializer=int, response_serializer=str.encode
    )
    server.add_generic_rpc_handlers((handlers(**methods),))
    server.add_registered_method_handlers("other.S", {"M": grpc.unary_unary_rpc_method_handler(unary)})
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)


@pytest.fixture(scope="module", params=LOOPS)
def running(request: pytest.FixtureRequest) -> Iterator[ServerThread]:
    with ServerThread(LOOPS[request.param], prepare, eof=grpc.aio.EOF) as server:
        yield server


@pytest.fixture(scope="module")
def channel(running: ServerThread) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.target) as channel:
        yield channel


def ask(channel: grpc.Channel, method: str, request: bytes = b"x", **more: Any) -> Any:
    call: Any = channel.unary_unary(f"/t.S/{method}")
    return call.with_call(request, timeout=SECONDS, **more)


def refusal(channel: grpc.Channel, method: str, request: bytes = b"x") -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        ask(channel, method, request)
    return caught.value


# --- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", range(len(STYLES["unary_unary"])))
def test_a_unary_call_is_answered(channel: grpc.Channel, style: int) -> None:
    assert ask(channel, name_of("unary_unary", style))[0] == b"<x>"


@pytest.mark.parametrize("style", range(len(STYLES["unary_stream"])))
def test_a_stream_of_answers_arrives_in_order(channel: grpc.Channel, style: int) -> None:
    method: Any = channel.unary_stream(f"/t.S/{name_of('unary_stream', style)}")
    assert [int(answer) for answer in method(b"30", timeout=SECONDS)] == list(range(30))
    assert list(method(b"0", timeout=SECONDS)) == []


@pytest.mark.parametrize("style", range(len(STYLES["stream_unary"])))
def test_a_stream_of_requests_arrives_in_order(channel: grpc.Channel, style: int) -> None:
    method: Any = channel.stream_unary(f"/t.S/{name_of('stream_unary', style)}")
    parts = [str(number).encode() for number in range(30)]
    assert method(iter(parts), timeout=SECONDS) == b",".join(parts)
    assert method(iter([]), timeout=SECONDS) == b""


@pytest.mark.parametrize("style", range(len(STYLES["stream_stream"])))
def test_both_sides_may_stream(channel: grpc.Channel, style: int) -> None:
    method: Any = channel.stream_stream(f"/t.S/{name_of('stream_stream', style)}")
    requests = (str(number).encode() for number in range(10))
    assert [int(answer) for answer in method(requests, timeout=SECONDS)] == list(range(10))


def test_a_bidirectional_answer_comes_before_the_next_request(channel: grpc.Channel) -> None:
    method: Any = channel.stream_stream("/t.S/stream_stream_0")
    answered = threading.Semaphore(1)

    def requests() -> Iterator[bytes]:
        for _ in range(20):
            assert answered.acquire(timeout=SECONDS)
            yield b"ping"

    count = 0
    for _ in method(requests(), timeout=SECONDS):
        count += 1
        answered.release()
    assert count == 20


def test_a_registered_method_handler_is_called(channel: grpc.Channel) -> None:
    call: Any = channel.unary_unary("/other.S/M")
    assert call(b"x", timeout=SECONDS) == b"<x>"


@pytest.mark.requirement("A35")
@pytest.mark.parametrize("path", ["/t.S/nothing", "/nothing.S/unary", "/t.S/", "/"])
def test_an_unknown_method_is_unimplemented(channel: grpc.Channel, path: str) -> None:
    call: Any = channel.unary_unary(path)
    with pytest.raises(grpc.RpcError) as caught:
        call(b"x", timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.requirement("A41")
@pytest.mark.parametrize("count", [0, 2, 5])
def test_a_unary_request_is_exactly_one_message(channel: grpc.Channel, count: int) -> None:
    call: Any = channel.stream_unary("/t.S/unary_unary_0")
    with pytest.raises(grpc.RpcError) as caught:
        call(iter([b"x"] * count), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.requirement("A46")
@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("x-key", "secret ", "a field value with NUL, CR, LF or space at an end: x-key"),
        ("x-key", " secret", "a field value with NUL, CR, LF or space at an end: x-key"),
        ("x-" + "n" * 100, "secret ", "a field value with NUL, CR, LF or space at an end"),
        ("connection", "secret", "a connection-specific field: connection"),
    ],
)
def test_malformed_metadata_reset_the_call_and_the_log_names_the_field_and_the_peer(
    channel: grpc.Channel, caplog: pytest.LogCaptureFixture, key: str, value: str, reason: str
) -> None:
    """The client gets INTERNAL, because the server sends only RST_STREAM, which has no room for a reason."""
    caplog.set_level(logging.INFO, "grpc_h2")
    with pytest.raises(grpc.RpcError, match="RST_STREAM"):
        ask(channel, "unary", metadata=((key, value),))

    def lines() -> list[logging.LogRecord]:
        return [each for each in caplog.records if each.getMessage() == "A request was refused"]

    until(lambda: bool(lines()), "a line")
    (record,) = lines()
    assert record.__dict__["error"] == reason
    assert record.__dict__["peer"].startswith("ipv4:127.0.0.1:")
    assert "secret" not in caplog.text


def test_unreadable_messages_are_logged_at_the_same_limited_rate_as_other_faults_of_clients(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A client needs no key to send such messages. The test has its own server, because the limit of log lines applies
    to a whole server."""
    caplog.set_level(logging.INFO, "grpc_h2")
    with (
        ServerThread(next(iter(LOOPS.values())), prepare, eof=grpc.aio.EOF) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        for _ in range(100):
            assert refusal(channel, "numbers", b"no number").code() is grpc.StatusCode.INTERNAL
    assert 1 <= len(caplog.records) < 50
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    record = next(each for each in caplog.records if each.getMessage() == "A request was refused")
    assert record.__dict__["error"] == "its message cannot be parsed: ValueError"
    assert record.__dict__["peer"].startswith("ipv4:127.0.0.1:")
    assert "no number" not in caplog.text


def test_a_handlers_exception_is_logged_and_not_sent(channel: grpc.Channel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "grpc_h2"):
        error = refusal(channel, "raises")
    assert error.code() is grpc.StatusCode.UNKNOWN
    assert error.details() == "Exception calling application"
    assert "the secret" in caplog.text


@pytest.mark.requirement("A43")
@pytest.mark.parametrize(
    ("method", "code", "details"),
    [
        ("sets_code_and_raises", grpc.StatusCode.DATA_LOSS, "half of it"),
        ("sets_code", grpc.StatusCode.NOT_FOUND, "näher nichts %"),
        ("aborts_ok", grpc.StatusCode.UNKNOWN, "fine"),
        ("bad_initial_metadata", grpc.StatusCode.UNKNOWN, "Exception calling application"),
        ("bad_trailing_metadata", grpc.StatusCode.UNKNOWN, "Exception calling application"),
        ("numbers", grpc.StatusCode.INTERNAL, "Exception deserializing request!"),
        ("returns_nonsense", grpc.StatusCode.INTERNAL, "Failed to serialize response!"),
    ],
)
def test_a_status_other_than_ok_arrives(
    channel: grpc.Channel, method: str, code: grpc.StatusCode, details: str
) -> None:
    error = refusal(channel, method)
    assert error.code() is code
    assert error.details() == details


@pytest.mark.parametrize("method", ["aborts", "aborts_with_status", "aborts_in_thread"])
def test_an_abort_decides_the_status_even_if_the_handler_sets_another(channel: grpc.Channel, method: str) -> None:
    error: Any = refusal(channel, method)
    assert error.code() is grpc.StatusCode.ABORTED
    assert error.details() == "enough"
    assert list(error.trailing_metadata()) == [("why-bin", b"\0\xff"), ("who", "me")]


@pytest.mark.requirement("A42")
@pytest.mark.parametrize("method", ["metadata", "metadata_in_thread"])
def test_metadata_passes_both_ways(channel: grpc.Channel, method: str) -> None:
    sent = [("x-text", "a b"), ("x-octets-bin", bytes(range(256))), ("x-text", "second")]
    answer, call = ask(channel, method, metadata=sent)
    assert eval(answer) == sent
    assert list(call.initial_metadata())[-2:] == [("first", "1"), ("first-bin", b"\x01")]
    assert list(call.trailing_metadata()) == [("last", "2"), ("last-bin", b"\x02")]


def test_the_context_has_the_peer_and_the_deadline(channel: grpc.Channel) -> None:
    peer, remaining = ask(channel, "facts")[0].split()
    assert peer.startswith(b"ipv4:127.0.0.1:")
    assert SECONDS / 2 < float(remaining) <= SECONDS * 1.05  # the client rounds the timeout up
    call: Any = channel.unary_unary("/t.S/facts")
    assert call(b"x").endswith(b" None")


@pytest.mark.requirement("A51")
def test_the_health_servicer_of_grpcio_works_unchanged(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    serving = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)
    assert stub.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS) == serving
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="unknown"), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    watch = stub.Watch(health_pb2.HealthCheckRequest(service="unknown"), timeout=SECONDS)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("servicer", [reflection.ReflectionServicer, reflection.aio.ReflectionServicer])
@pytest.mark.parametrize("loop", LOOPS)
def test_the_reflection_servicer_of_grpcio_works_unchanged(loop: str, servicer: Any) -> None:
    def reflecting(server: Server) -> None:
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer(("grpc.health.v1.Health",)), server)

    with ServerThread(LOOPS[loop], reflecting) as server, grpc.insecure_channel(server.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest
        asked = [request(list_services=""), request(file_containing_symbol="grpc.health.v1.Health")]
        listed, found = list(stub.ServerReflectionInfo(iter(asked), timeout=SECONDS))
        assert [service.name for service in listed.list_services_response.service] == ["grpc.health.v1.Health"]
        assert found.file_descriptor_response.file_descriptor_proto


class Interceptor(grpc.aio.ServerInterceptor):
    """An interceptor that records its calls, refuses methods named ``secret`` and redirects ``renamed``."""

    def __init__(self, name: str, seen: list[str]) -> None:
        self._name = name
        self._seen = seen

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        self._seen.append(f"{self._name} {details.method} {dict(details.invocation_metadata).get('x-k')}")
        if details.method.endswith("secret"):
            return grpc.unary_unary_rpc_method_handler(aborts)
        return await continuation(details)


@pytest.mark.parametrize("loop", LOOPS)
def test_interceptors_of_grpc_aio_run_before_the_handler_in_order(loop: str) -> None:
    seen: list[str] = []
    interceptors = (Interceptor("outer", seen), Interceptor("inner", seen))
    with (
        ServerThread(LOOPS[loop], prepare, interceptors=interceptors) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        assert ask(channel, "unary_unary_0", metadata=(("x-k", "v"),))[0] == b"<x>"
        assert seen == ["outer /t.S/unary_unary_0 v", "inner /t.S/unary_unary_0 v"]
        assert refusal(channel, "secret").code() is grpc.StatusCode.ABORTED
        assert refusal(channel, "nothing").code() is grpc.StatusCode.UNIMPLEMENTED


class Broken(grpc.GenericRpcHandler):
    def service(self, handler_call_details: Any) -> Any:
        raise KeyError("the secret")


@pytest.mark.parametrize("loop", LOOPS)
def test_a_handler_lookup_that_raises_fails_only_its_call(loop: str) -> None:
    def register(server: Server) -> None:
        server.add_registered_method_handlers("t.S", {"good": grpc.unary_unary_rpc_method_handler(unary)})
        server.add_generic_rpc_handlers((Broken(),))

    with ServerThread(LOOPS[loop], register) as server, grpc.insecure_channel(server.target) as channel:
        error = refusal(channel, "bad")
        assert error.code() is grpc.StatusCode.UNKNOWN
        assert error.details() == "Error in service handler!"
        assert ask(channel, "good")[0] == b"<x>"


@pytest.mark.requirement("A14")
@pytest.mark.parametrize("loop", LOOPS)
def test_calls_above_the_limit_are_refused(loop: str) -> None:
    def register(server: Server) -> None:
        server.add_generic_rpc_handlers((handlers(echo=grpc.stream_stream_rpc_method_handler(echo_generated)),))

    with (
        ServerThread(LOOPS[loop], register, max_concurrent_calls=1) as server,
        grpc.insecure_channel(server.target) as channel,
    ):
        method: Any = channel.stream_stream("/t.S/echo")
        done = threading.Event()

        def requests() -> Iterator[bytes]:
            yield b"x"
            done.wait(SECONDS)

        first = method(requests(), timeout=SECONDS)
        assert next(first) == b"x"
        with pytest.raises(grpc.RpcError) as caught:
            next(method(iter([b"x"]), timeout=SECONDS))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        done.set()
        assert list(first) == []


def test_handlers_that_are_functions_run_in_the_given_executor_which_is_not_shut_down() -> None:
    ran_in: list[str] = []

    def method(request: bytes, context: Any) -> bytes:
        ran_in.append(threading.current_thread().name)
        return request

    with ThreadPoolExecutor(1, "given") as executor:
        handler = handlers(get=grpc.unary_unary_rpc_method_handler(method))
        prepare = methodcaller("add_generic_rpc_handlers", (handler,))
        with (
            ServerThread(LOOPS["uvloop"], prepare, executor=executor) as server,
            grpc.insecure_channel(server.target) as channel,
        ):
            assert channel.unary_unary("/t.S/get")(b"x", timeout=SECONDS) == b"x"
        assert ran_in == ["given_0"]
        assert executor.submit(lambda: "open").result(SECONDS) == "open"
