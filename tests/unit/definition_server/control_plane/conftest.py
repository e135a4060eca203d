"""A synchronizer with the operator's commands, with and without a directory."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support.fakes import FakeSource
from tests.support.leftovers import nothing_left
from tests.support.logs import LogLines, captured_logs
from tests.unit.definition_server.control_plane.publication_server import (
    ALL,
    Server,
)


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    with nothing_left():
        yield


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    server = Server(tmp_path, FakeSource(*ALL))
    yield server
    server.disk.works.set()
    await server.written()
    server.close()


@pytest.fixture
async def diskless() -> AsyncIterator[Server]:
    server = Server(None, FakeSource(*ALL))
    yield server
    server.close()


@pytest.fixture
def logs() -> Iterator[LogLines]:
    with captured_logs() as lines:
        yield lines
