"""The catalogue on grpcio, with threads or (``--aio``) on asyncio. ``perf/peers/__init__.py`` describes what a peer
receives and answers."""

from __future__ import annotations

import asyncio
import hmac
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc

from definition_server.catalog import wire
from definition_server.rpc import avap_pb2

THREADS = 10
"""The number of threads, as in gRPC's own examples."""


class Catalogue:
    """A serialized ``CatalogResponse`` and the position of each command in it."""

    def __init__(self, key: bytes, everything: bytes) -> None:
        self.key = key
        self.everything = everything
        self.commands: dict[str, bytes] = {}
        for number, _, content in wire.fields(memoryview(everything)):
            if number == wire.COMMANDS:
                answer = bytes(content)
                self.commands[avap_pb2.CommandResponse.FromString(answer).name] = answer

    def refusal(self, metadata: Any) -> tuple[grpc.StatusCode, str] | None:
        """The status with which a call is refused; None if it is authenticated."""
        presented = dict(metadata).get("x-avap-auth", "")
        if hmac.compare_digest(presented.encode(), self.key):
            return None
        return grpc.StatusCode.UNAUTHENTICATED, "Invalid Credentials"

    def not_found(self, name: str) -> tuple[grpc.StatusCode, str]:
        """The status of an unknown name."""
        return grpc.StatusCode.NOT_FOUND, f"Command '{name}' not found"


def handlers(get: Any, sync: Any) -> grpc.GenericRpcHandler:
    """The service. Requests are decoded; answers are encoded before the measurement."""
    return grpc.method_handlers_generic_handler(
        "avap.DefinitionEngine",
        {
            "GetCommand": grpc.unary_unary_rpc_method_handler(get, avap_pb2.CommandRequest.FromString),
            "SyncCatalog": grpc.unary_unary_rpc_method_handler(sync, avap_pb2.Empty.FromString),
        },
    )


def with_threads(catalogue: Catalogue) -> grpc.GenericRpcHandler:
    """Handlers for `grpc.server`."""

    def get(request: avap_pb2.CommandRequest, context: grpc.ServicerContext) -> bytes:
        refused = catalogue.refusal(context.invocation_metadata())
        if refused:
            context.abort(*refused)
        answer = catalogue.commands.get(request.name)
        if answer is None:
            context.abort(*catalogue.not_found(request.name))
        return answer

    def sync(_: avap_pb2.Empty, context: grpc.ServicerContext) -> bytes:
        refused = catalogue.refusal(context.invocation_metadata())
        if refused:
            context.abort(*refused)
        return catalogue.everything

    return handlers(get, sync)


def with_asyncio(catalogue: Catalogue) -> grpc.GenericRpcHandler:
    """Handlers for `grpc.aio.server`."""

    async def get(request: avap_pb2.CommandRequest, context: Any) -> bytes:
        refused = catalogue.refusal(context.invocation_metadata())
        if refused:
            await context.abort(*refused)
        answer: bytes | None = catalogue.commands.get(request.name)
        if answer is None:
            await context.abort(*catalogue.not_found(request.name))  # `abort` raises
            raise AssertionError
        return answer

    async def sync(_: avap_pb2.Empty, context: Any) -> bytes:
        refused = catalogue.refusal(context.invocation_metadata())
        if refused:
            await context.abort(*refused)
        return catalogue.everything

    return handlers(get, sync)


def bind(server: Any) -> None:
    """Open the port of this server, which its other workers share.

    Raises:
        RuntimeError: if the port cannot be opened.
    """
    address = f"127.0.0.1:{os.environ['PEER_PORT']}"
    certificate, key = os.environ.get("PEER_TLS_CERT"), os.environ.get("PEER_TLS_KEY")
    if certificate and key:
        pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
        bound = server.add_secure_port(address, grpc.ssl_server_credentials([pair]))
    else:
        bound = server.add_insecure_port(address)
    if not bound:
        raise RuntimeError(f"{address} cannot be opened")


async def serve_asyncio(catalogue: Catalogue) -> None:
    """Serve until the process ends; print the port as soon as calls are accepted."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((with_asyncio(catalogue),))
    bind(server)
    await server.start()
    print(os.environ["PEER_PORT"], flush=True)
    await server.wait_for_termination()


def serve_threads(catalogue: Catalogue) -> None:
    """Serve until the process ends; print the port as soon as calls are accepted."""
    server = grpc.server(ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers((with_threads(catalogue),))
    bind(server)
    server.start()
    print(os.environ["PEER_PORT"], flush=True)
    server.wait_for_termination()


def lead(workers: int) -> None:
    """Start several processes of this program, which share the port by SO_REUSEPORT, as in gRPC's own example."""
    command, environment = [sys.executable, *sys.argv], os.environ | {"PEER_WORKERS": "1"}
    with ExitStack() as stack:
        started = [
            stack.enter_context(
                subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            )
            for _ in range(workers)
        ]
        if all(process.stdout and process.stdout.readline() for process in started):
            print(os.environ["PEER_PORT"], flush=True)
            sys.stdin.buffer.read()


def end_with_standard_input() -> None:
    """End this process when its standard input ends: the process that started it has ended."""
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    """Serve until standard input ends."""
    workers = int(os.environ["PEER_WORKERS"])
    if workers > 1:
        lead(workers)
        return
    threading.Thread(target=end_with_standard_input, daemon=True).start()
    catalogue = Catalogue(os.environ["PEER_KEY"].encode(), Path(os.environ["PEER_CATALOGUE"]).read_bytes())
    if "--aio" in sys.argv[1:]:
        asyncio.run(serve_asyncio(catalogue))
    else:
        serve_threads(catalogue)


if __name__ == "__main__":
    main()
