"""Fixtures that all suites share: a PostgreSQL server per provider, a database per test, and no leftovers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from tests.support.parameter_ids import parameter_id
from tests.support.providers import (
    PROVIDERS,
    DatabaseServer,
    any_provider_or_skip,
    create_database,
    drop_database,
    provider_or_skip,
)
from tests.support.server import ServerProcess
from tests.support.table import Table

from definition_server.settings import DEFAULT_TRANSPORT

_numbers = itertools.count()

# The external server takes part only where someone names one.
_PARAMETERS = [name for name in PROVIDERS if name != "external" or os.environ.get("TEST_DATABASE_URL")]


@pytest.fixture(scope="session", params=_PARAMETERS)
def every_postgres(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server of each provider in turn."""
    server = provider_or_skip(request.param)
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[DatabaseServer]:
    """A server of the preferred provider; one for the session, so no test may break it."""
    server = any_provider_or_skip()
    yield server
    server.close()


@pytest.fixture
def frail_postgres() -> Iterator[DatabaseServer]:
    """A server of a test's own, to be broken."""
    server = any_provider_or_skip(faults=True)
    yield server
    server.close()


@pytest.fixture
def database_url(postgres: DatabaseServer) -> Iterator[str]:
    """A database of the test's own, empty."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield create_database(postgres.url, name)
    drop_database(postgres.url, name)


@pytest.fixture
def table(database_url: str) -> Table:
    """The table, without a row."""
    return Table(database_url)


TRANSPORTS = ("grpcio", "native")

StartServer = Callable[..., ServerProcess]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "transports(*names): run on these alone; without names, on the default one")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Short, printable ids for octets and text."""
    return parameter_id(val)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whatever starts a server runs on every transport, unless it is about one of them or about the master alone."""

    def wanted(item: pytest.Item) -> bool:
        mark = item.get_closest_marker("transports")
        transport = getattr(item, "callspec", None) and item.callspec.params.get("transport")  # type: ignore[attr-defined]
        return mark is None or transport is None or transport in (mark.args or (DEFAULT_TRANSPORT,))

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="session", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@pytest.fixture
def start_server(transport: str) -> Iterator[StartServer]:
    """``start_server(database_url, VARIABLE=value, …)``; every server ends with the test."""
    with ExitStack() as stack:

        def start(database_url: str, **settings: str) -> ServerProcess:
            return stack.enter_context(ServerProcess(database_url, **{"TRANSPORT": transport} | settings))

        yield start
