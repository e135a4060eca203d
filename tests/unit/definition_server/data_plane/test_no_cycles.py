"""Ended calls and connections leave no reference cycles: their memory is free at once, not at the next collection."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest
from tests.support.loop import eventually

from definition_server.data_plane.health import HEALTH_SERVICE, Health
from grpc_h2 import Server, encode_block, frames

CALLS = range(1, 41, 2)


def health_call(stream: int, method: bytes, key: bytes = b"") -> bytes:
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/grpc.health.v1.Health/" + method),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"x-avap-auth", key),
    )
    return frames.frame(frames.HEADERS, frames.END_HEADERS, stream, encode_block(fields)) + frames.frame(
        frames.DATA, frames.END_STREAM, stream, b"\0\0\0\0\3\x0a\1x"
    )


@pytest.fixture
def without_collections() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.parametrize("method", [b"Check", b"Watch", b"Missing"])
@pytest.mark.parametrize("ending", ["reset", "connection closed"])
async def test_ended_calls_and_connections_are_freed_without_a_collection(
    method: bytes, ending: str, without_collections: None
) -> None:
    server, health = Server(), Health()
    server.add_registered_method_handlers(HEALTH_SERVICE, health.handlers())
    await health.report(True)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        for _ in range(2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0))
            writer.write(b"".join(health_call(stream, method) for stream in CALLS))
            await reader.readexactly(100)
            if ending == "reset":
                cancel = (8).to_bytes(4, "big")
                writer.write(b"".join(frames.frame(frames.RST_STREAM, 0, stream, cancel) for stream in CALLS))
            else:
                writer.close()
            await eventually(lambda: server.open_calls == 0, "the handlers have ended")
            writer.close()
            await eventually(lambda: server.connections == 0, "the connection is gone")
        await asyncio.sleep(0)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        ours = {type(found).__qualname__ for found in gc.garbage if type(found).__module__.startswith("grpc_h2")}
        running = [found for found in gc.garbage if asyncio.iscoroutine(found) or isinstance(found, asyncio.Task)]
        assert not ours
        assert not running
    finally:
        await server.stop(0)
