"""The memory of a transport: no answer outlives its snapshot or its key, and no replaced snapshot stays in memory."""

from __future__ import annotations

import asyncio
import weakref
from array import array
from contextlib import suppress
from hashlib import sha256
from itertools import repeat

import grpc
import pytest
from tests.support.loop import eventually, promptly
from tests.support.snapshots import opened, row
from tests.unit.definition_server.data_plane.served_transport import (
    KEY,
    REFUSED,
    Serve,
    channel,
    failure,
    raw,
)

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import native
from grpc_h2 import PreparedAnswers, encode_block, frames

pytestmark = pytest.mark.usefixtures("nothing_is_left")


async def test_after_a_swap_the_next_call_of_an_open_connection_gets_the_new_answer(
    serve: Serve, engine: DefinitionEngine
) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        for number in range(5):
            snapshot = opened(row("if", f"# {number}"))
            transport.begin_swap(snapshot).commit()
            assert engine.snapshot is snapshot
            for _ in range(3):  # the same octets each time
                assert await raw(client, "GetCommand", b"\x0a\x02if") == snapshot.answer(b"if")
                assert await raw(client, "SyncCatalog", b"") == bytes(snapshot.body)
        transport.begin_swap(opened("else")).commit()
        assert (await failure(client, "GetCommand", b"\x0a\x02if"))[0] is grpc.StatusCode.NOT_FOUND
        transport.begin_swap(snapshot := opened("if")).commit()
        assert await raw(client, "GetCommand", b"\x0a\x02if") == snapshot.answer(b"if")


async def test_prepared_answers_are_used_only_for_the_snapshot_they_were_made_from(
    serve: Serve, engine: DefinitionEngine
) -> None:
    transport, port = await serve()
    served = engine.snapshot
    coming, another = opened(row("if", "# coming"), "new"), opened(row("if", "# another"))
    async with channel(port) as client:

        async def answers() -> list[bytes]:
            return [await raw(client, "GetCommand", b"\x0a\x02if"), await raw(client, "SyncCatalog", b"")]

        def expected(snapshot: Snapshot) -> list[bytes]:
            return [snapshot.answer(b"if") or b"", bytes(snapshot.body)]

        await answers()
        assert (await failure(client, "GetCommand", b"\x0a\x03new"))[0] is grpc.StatusCode.NOT_FOUND
        swap = transport.begin_swap(coming)
        await swap.prepare()
        assert served is not None
        assert await answers() == expected(served), "prepared is not served"
        assert swap.commit() is served
        await swap.release()
        assert await answers() == expected(coming)
        assert await raw(client, "GetCommand", b"\x0a\x03new") == coming.answer(b"new"), "it was remembered as missing"
        await transport.begin_swap(coming).prepare()
        transport.begin_swap(another).commit()
        assert await answers() == expected(another), "answers that were prepared for another snapshot are not used"


@pytest.mark.transports("native")
async def test_after_a_prepared_swap_no_call_looks_up_an_answer(
    serve: Serve, engine: DefinitionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, port = await serve()
    looked_up: list[bytes] = []
    answer = Snapshot.answer

    def counted(snapshot: Snapshot, name: bytes) -> bytes | None:
        looked_up.append(name)
        return answer(snapshot, name)

    monkeypatch.setattr(Snapshot, "answer", counted)
    async with channel(port) as client:
        for name in ("if", "no"):
            await answered(client, name)
        coming = opened(row("if", "# coming"))
        swap = transport.begin_swap(coming)
        await swap.prepare()
        swap.commit()
        looked_up.clear()
        for name in ("if", "no"):
            await answered(client, name)
    assert looked_up == []


async def answered(client: grpc.aio.Channel, name: str) -> None:
    with suppress(grpc.aio.AioRpcError):
        await raw(client, "GetCommand", b"\x0a" + bytes([len(name)]) + name.encode())


@pytest.mark.transports("native")
async def test_a_preparation_that_takes_too_long_is_ended(
    serve: Serve, engine: DefinitionEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, port = await serve()
    monkeypatch.setattr(native, "PREPARATION_SECONDS", 0.05)
    monkeypatch.setattr(PreparedAnswers, "steps", lambda prepared: repeat(None))
    async with channel(port) as client:
        await answered(client, "if")
        swap = transport.begin_swap(coming := opened(row("if", "# coming")))
        await promptly(swap.prepare())
        swap.commit()
        assert await raw(client, "GetCommand", b"\x0a\x02if") == coming.answer(b"if")


async def test_replaced_keys_apply_to_the_next_call_of_an_open_connection(serve: Serve, keys: KeyRing) -> None:
    _, port = await serve()
    async with channel(port) as client:
        for _ in range(3):
            for _ in range(5):
                await raw(client, "GetCommand", b"\x0a\x02if")
            keys.replace([sha256(b"another").hexdigest()])
            for method in ("GetCommand", "SyncCatalog"):
                assert await failure(client, method, b"\x0a\x02if" if method == "GetCommand" else b"") == REFUSED
            keys.replace([sha256(b"another").hexdigest(), sha256(KEY.encode()).hexdigest()])


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("size", [100, 100_000])
async def test_a_replaced_snapshot_is_released_from_memory(
    serve: Serve, engine: DefinitionEngine, prepared: bool, size: int
) -> None:
    transport, port = await serve()
    async with channel(port) as client:
        memory = array("B", opened(row("if", "x" * size)).buffer)
        transport.begin_swap(Snapshot(memoryview(memory))).commit()
        replaced = weakref.ref(memory)
        del memory
        await raw(client, "SyncCatalog", b"")
        await raw(client, "GetCommand", b"\x0a\x02if")
        swap = transport.begin_swap(opened("if"))
        if prepared:
            await swap.prepare()
        swap.commit()
        await swap.release()
        await eventually(lambda: replaced() is None, "the old snapshot was released")


async def test_a_slow_reader_keeps_no_more_than_four_replaced_snapshots_in_memory(serve: Serve, transport: str) -> None:
    if transport != "native":
        pytest.skip("grpcio copies the answer, so that it holds no snapshot")
    made, port = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    shut = frames.SETTING.pack(frames.INITIAL_WINDOW_SIZE, 1)
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/avap.DefinitionEngine/SyncCatalog"),
        (b"content-type", b"application/grpc"),
        (b"x-avap-auth", KEY.encode()),
    )
    writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0, shut))
    writer.write(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, encode_block(fields)))
    writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1, bytes(5)))
    received = b""
    while frames.frame(frames.DATA, 0, 1, b"\0") not in received:
        received += await asyncio.wait_for(reader.read(4096), 5)
    given_up = frames.rst_stream(1, 11)
    for number in range(5):
        assert given_up not in received
        swap = made.begin_swap(opened(row(f"n{number}")))
        await swap.prepare()
        swap.commit()
        await swap.release()
        with suppress(TimeoutError):
            received += await asyncio.wait_for(reader.read(4096), 0.05)
    while given_up not in received:
        received += await asyncio.wait_for(reader.read(4096), 5)
    writer.close()


async def test_a_call_whose_body_comes_after_a_key_rotation_is_judged_by_the_new_keys(
    serve: Serve, keys: KeyRing
) -> None:
    _, port = await serve()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    fields = (
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/avap.DefinitionEngine/SyncCatalog"),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"x-avap-auth", KEY.encode()),
    )
    writer.write(frames.PREFACE + frames.frame(frames.SETTINGS, 0, 0))
    writer.write(frames.frame(frames.HEADERS, frames.END_HEADERS, 1, encode_block(fields)))
    writer.write(frames.frame(frames.PING, 0, 0, b"received"))
    received = b""
    while frames.frame(frames.PING, 1, 0, b"received") not in received:
        received += await asyncio.wait_for(reader.read(4096), 5)
    keys.replace([sha256(b"another").hexdigest()])
    writer.write(frames.frame(frames.DATA, frames.END_STREAM, 1, bytes(5)))
    kind = flags = None
    while kind != frames.HEADERS or not flags & frames.END_STREAM:
        head = await asyncio.wait_for(reader.readexactly(frames.HEADER_LENGTH), 5)
        await reader.readexactly(int.from_bytes(head[:3], "big"))
        kind, flags = head[3], head[4]
        assert kind != frames.DATA, "the catalogue was sent"
    writer.close()
