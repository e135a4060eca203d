"""The native engine's `Server` on a loop in a separate thread, for clients that block: grpcio's, and raw sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

import grpc
import uvloop
from tests.support.certificates import Certificate
from tests.support.h2_peer import Replies
from tests.support.h2_wire import HELLO, SETTINGS_ACK

from grpc_h2 import Server, TlsCredentials

T = TypeVar("T")

LoopFactory = Callable[[], asyncio.AbstractEventLoop]
LOOPS: dict[str, LoopFactory] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

SERVICE = "t.S"
PATIENCE = 20.0


def handlers(**methods: grpc.RpcMethodHandler[Any, Any]) -> grpc.GenericRpcHandler:
    """Methods of ``t.S``."""
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class ServerThread:
    """A context in which a `Server` runs; ``prepare`` registers its methods, and may add listeners.

    When the context ends, no task, call or connection of the server may be left.
    """

    def __init__(
        self, loop: LoopFactory, prepare: Callable[[Server], Any], *, listen: bool = True, **kwargs: Any
    ) -> None:
        self._factory = loop
        self._prepare = prepare
        self._listen = listen
        self._kwargs = kwargs
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._main, name="server")
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        if self._failure is not None:
            raise self._failure
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run(self.server.stop(0))
        finally:
            self.loop.call_soon_threadsafe(self._over.set)
            self._thread.join(PATIENCE)
        if self._failure is not None:
            raise self._failure

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop. Returns its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(PATIENCE)

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function in the server's loop. Returns its result."""

        async def called() -> T:
            return function(*arguments)

        return self.run(called())

    def stop(self, grace: float | None) -> Any:
        """Begin to stop. Returns a future."""
        return asyncio.run_coroutine_threadsafe(self.server.stop(grace), self.loop)

    def _main(self) -> None:
        try:
            with asyncio.Runner(loop_factory=self._factory) as runner:
                runner.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the test's thread
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._over = asyncio.Event()
        unhandled: list[dict[str, Any]] = []
        self.loop.set_exception_handler(lambda _, context: unhandled.append(context))
        self.server = Server(**self._kwargs)
        self._prepare(self.server)
        if self._listen:
            self.port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        self._ready.set()
        await self._over.wait()
        assert self.server.connections == 0
        assert self.server.open_calls == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not unhandled, unhandled


class RawClient:
    """A blocking HTTP/2 client that sends octets; `Replies` checks the server's answers."""

    def __init__(self, port: int, hello: bytes = HELLO + SETTINGS_ACK, *, receive_buffer: int | None = None) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE)
        try:
            self.socket.connect(("127.0.0.1", port))
        except OSError:
            self.socket.close()
            raise
        self.replies = Replies()
        self.eof = False
        self.octets = 0
        self.send(hello)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, octets: bytes) -> None:
        self.replies.note_sent(octets)
        self.socket.sendall(octets)

    def read(self) -> None:
        """Read at least one octet, or the end."""
        got = self.socket.recv(65536)
        self.octets += len(got)
        self.eof = not got
        self.replies.feed(got)

    def until(self, what: Callable[[], T]) -> T:
        """Read until ``what`` is true. Fails if the connection ends first."""
        deadline = time.monotonic() + PATIENCE
        while not (answer := what()):
            assert not self.eof, "the connection ended before"
            assert time.monotonic() < deadline
            self.read()
        return answer

    def until_eof(self) -> None:
        while not self.eof:
            self.read()


def secure_server(loop: LoopFactory, certificate: Certificate) -> ServerThread:
    """A server without methods that listens over TLS alone."""

    def prepare(server: Server) -> None:
        thread.port = server.add_secure_port("127.0.0.1:0", TlsCredentials(certificate.cert, certificate.key))

    thread = ServerThread(loop, prepare, listen=False)
    return thread
