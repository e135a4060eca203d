"""A transport of each kind, and the catalogue that it serves."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from tests.support.leftovers import nothing_left
from tests.support.snapshots import opened, row
from tests.support.stats import Pages
from tests.unit.definition_server.data_plane.served_transport import (
    CLASSES,
    CONFIGURE,
    KEY,
    Serve,
)

from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import Transport, create_transport
from definition_server.ipc.tls_files import TlsFiles


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    with nothing_left(c_core=True):
        yield


@pytest.fixture
def page() -> Pages:
    return Pages(1)


@pytest.fixture
def engine() -> DefinitionEngine:
    engine = DefinitionEngine()
    engine.snapshot = opened(row("if", "x = 'ü'"), "else")
    return engine


@pytest.fixture
def keys() -> KeyRing:
    return KeyRing([sha256(KEY.encode()).hexdigest()])


@pytest.fixture
async def serve(transport: str, engine: DefinitionEngine, keys: KeyRing, page: Pages) -> AsyncIterator[Serve]:
    """Starts a transport of the parametrized kind with the given configuration; returns it and its port."""
    kind = transport
    started: list[Transport] = []

    async def serve(tls: TlsFiles | None = None, **changes: Any) -> tuple[Transport, int]:
        endpoint = Endpoint(engine, keys, page.slot(0))
        transport = create_transport(replace(CONFIGURE, transport=kind, **changes), endpoint)
        assert isinstance(transport, CLASSES[kind])
        port = await transport.start(tls)
        started.append(transport)
        return transport, port

    yield serve
    for transport in started:
        await transport.stop(0)
