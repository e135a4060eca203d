"""A server of the judges' services: ``python -m tests.judges.serve --transport native|grpcio --port 0``.

Prints the port as its first line and serves on 127.0.0.1 until SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
from typing import Any

import grpc
from tests.judges.interop_service import interop_handler
from tests.judges.row_service import SERVICE as ROWS
from tests.judges.row_service import row_handler

from grpc_h2 import Limits, Server, StaticAnswer, TlsCredentials

GRACE_SECONDS = 1.0
TRANSPORTS = ("native", "grpcio")


def create_server(transport: str, max_header_list: int | None = None) -> Any:
    """A server on that transport with all services, not started. ``max_header_list``: in octets, only for the native
    transport."""
    server: Any
    if transport == "native":
        server = Server(limits=Limits() if max_header_list is None else Limits(max_header_list=max_header_list))
        server.add_static_unary(f"/{ROWS}/Ready", StaticAnswer.unary)
    else:
        server = grpc.aio.server()
    server.add_generic_rpc_handlers((interop_handler(), row_handler(static=transport != "native")))
    return server


async def serve(server: Any, port: int, tls: TlsCredentials | None) -> None:
    """Serve until SIGTERM or SIGINT arrives."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    address = f"127.0.0.1:{port}"
    bound = server.add_secure_port(address, tls) if tls else server.add_insecure_port(address)
    await server.start()
    print(bound, flush=True)  # noqa: T201 - `judged_server` reads it
    await stopping.wait()
    await server.stop(GRACE_SECONDS)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.judges.serve")
    parser.add_argument("--transport", choices=TRANSPORTS, default="native")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--max-header-list", type=int, metavar="OCTETS")
    parser.add_argument("--tls", nargs=2, metavar=("CERTIFICATE", "KEY"), help="PEM files; native only")
    arguments = parser.parse_args()
    tls = TlsCredentials(*arguments.tls) if arguments.tls else None

    async def run() -> None:
        await serve(create_server(arguments.transport, arguments.max_header_list), arguments.port, tls)

    asyncio.run(run())


if __name__ == "__main__":
    main()
