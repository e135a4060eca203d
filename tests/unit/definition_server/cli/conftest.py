"""A server for the commands of clients, and ports without a server."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from tests.unit.definition_server.cli.command_server import SERVING, Server


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    running.start()
    running.health.set("", SERVING)
    yield running
    running.stop()


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port that refuses connections: it is bound, but nothing listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]
