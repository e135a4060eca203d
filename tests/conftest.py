"""The fixtures of all suites: a PostgreSQL server for each provider, and a database for each test. They leave nothing
behind."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from typing import Any
from zlib import crc32

import pytest
from tests.support.hypothesis_profiles import load_profile
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
from grpc_h2 import ENGINE

_numbers = itertools.count()

load_profile()  # set here, because settings of the tests are derived from it when their modules are imported

# The external server is used only if one is named.
_PARAMETERS = [name for name in PROVIDERS if name != "external" or os.environ.get("TEST_DATABASE_URL")]


@pytest.fixture(scope="session", params=_PARAMETERS)
def every_postgres(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server of each provider in turn."""
    server = provider_or_skip(request.param)
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[DatabaseServer]:
    """A server of the preferred provider. It is shared by the whole session, so no test may break it."""
    server = any_provider_or_skip()
    yield server
    server.close()


@pytest.fixture
def frail_postgres() -> Iterator[DatabaseServer]:
    """A server for one test, which may break it."""
    server = any_provider_or_skip(faults=True)
    yield server
    server.close()


@pytest.fixture
def database_url(postgres: DatabaseServer) -> Iterator[str]:
    """An empty database for the test."""
    name = f"test_{os.getpid()}_{next(_numbers)}"
    yield create_database(postgres.url, name)
    drop_database(postgres.url, name)


@pytest.fixture
def table(database_url: str) -> Table:
    """The table, without a row."""
    return Table(database_url)


TRANSPORTS = ("grpcio", "native")
WITH_WHOLE_SERVERS = ("integration", "chaos")
"""Suites: a test starts a server for each transport."""

MEASURED = ("COVERAGE_PROCESS_CONFIG", "COVERAGE_PROCESS_START")
"""Variables by which coverage starts in a child process."""

StartServer = Callable[..., ServerProcess]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--one-transport",
        choices=("alternate", "other"),
        help="run tests with whole servers, and those about the master (marker any_transport), on one transport, "
        "half of them on each, not on all: with `other` on the one that they do not run on with `alternate`",
    )
    parser.addoption(
        "--engine",
        choices=("pure", "compiled"),
        help="fail at once unless the engine has this form: `nox -s compiled` tests the other one",
    )
    parser.addoption(
        "--cpu-limit",
        type=float,
        metavar="SECONDS",
        help="fail a test that takes more CPU time, its child processes included: it is to be marked slow",
    )


def pytest_configure(config: pytest.Config) -> None:
    if (wanted := config.getoption("engine")) not in (None, ENGINE):
        raise pytest.UsageError(f"the engine is {ENGINE}, and is to be {wanted}")
    config.addinivalue_line("markers", "interpreted: replaces parts of the engine, which is possible in its pure form")
    config.addinivalue_line("markers", "slow: takes a second or more; `nox -s quick` leaves it out")
    config.addinivalue_line("markers", "quiet: needs the machine to itself; all others run side by side")
    config.addinivalue_line(
        "markers", "thorough: one more member of a family of which others are not marked; left to `nox -s coverage`"
    )
    config.addinivalue_line("markers", "any_transport: about the master; with --one-transport, on one of them")
    config.addinivalue_line("markers", "every_transport: on all transports, with --one-transport too")
    # In a clone that this user may not write to, pytest does not remember which tests failed, and Hypothesis keeps its
    # examples in memory.
    config.addinivalue_line("filterwarnings", "ignore:cache could not:pytest.PytestCacheWarning")
    config.addinivalue_line("filterwarnings", "ignore:The database setting is not configured")
    config.addinivalue_line("markers", "transports(*names): run on these alone; without names, on the default one")


def pytest_make_parametrize_id(val: object) -> str | None:
    """Short, printable ids for octets and text."""
    return parameter_id(val)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that starts a server runs on every transport, unless it concerns one transport or only the master."""
    which = config.getoption("one_transport")

    def wanted(item: pytest.Item) -> bool:
        if which == "other" and alike_in_both(item):
            return False
        transport = getattr(item, "callspec", None) and item.callspec.params.get("transport")
        if transport is None:
            return True
        if mark := item.get_closest_marker("transports"):
            return transport in (mark.args or (DEFAULT_TRANSPORT,))
        if which and on_one_transport(item):
            # Only the name of the test decides, so that `alternate` and `other` together run it on both transports with
            # any selection.
            number = crc32(item.nodeid.partition("[")[0].encode()) + (which == "other")
            return transport == TRANSPORTS[number % len(TRANSPORTS)]
        return True

    if odd := [item.nodeid for item in items if not is_portable_id(item.nodeid)]:
        raise pytest.UsageError(f"test ids must be printable ASCII; rename these, or give them an id: {odd!a}")
    if ENGINE == "compiled":
        for item in items:
            if item.get_closest_marker("interpreted"):
                item.add_marker(pytest.mark.skip(reason="parts of a compiled engine cannot be replaced"))
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Start the servers of a thorough test without coverage, because coverage adds half to their CPU time."""
    hidden = set(os.environ).intersection(MEASURED) if item.get_closest_marker("thorough") else set()
    kept = {name: os.environ.pop(name) for name in hidden}
    try:
        return (yield)
    finally:
        os.environ.update(kept)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, None, None]:
    """Hold a test to ``--cpu-limit``."""
    limit: float | None = item.config.getoption("cpu_limit")
    before = sum(os.times()[:4])
    yield
    if limit is not None and (spent := sum(os.times()[:4]) - before) > limit:
        pytest.fail(
            f"{spent:.1f} s of CPU time where {limit:g} are allowed: mark it slow, or make it fast", pytrace=False
        )


def on_one_transport(item: pytest.Item) -> bool:
    """Whether the test runs on only one transport with ``--one-transport``: a test of the master, or one with a whole
    server."""
    closest = closest_of(item, "any_transport", "every_transport")
    return closest == "any_transport" or (closest is None and has_whole_server(item))


def alike_in_both(item: pytest.Item) -> bool:
    """Whether `alternate` and `other` would run the test in the same way: a test with a whole server, on all transports
    or on named ones. Such a test runs in the session with `alternate`, unless it is thorough.
    """
    named = item.get_closest_marker("transports") is not None
    on_all = closest_of(item, "any_transport", "every_transport") == "every_transport"
    return has_whole_server(item) and (named or on_all) and item.get_closest_marker("thorough") is None


def has_whole_server(item: pytest.Item) -> bool:
    return any(part in WITH_WHOLE_SERVERS for part in item.path.parts)


def closest_of(item: pytest.Item, *names: str) -> str | None:
    """Which of the markers the test has; a marker of the test takes precedence over one of its module."""
    return next((mark.name for mark in item.iter_markers() if mark.name in names), None)


def is_portable_id(node_id: str) -> bool:
    """Whether every runner, terminal and report format can carry the id of a test."""
    return node_id.isascii() and node_id.isprintable()


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Generator[None, dict[str, Any] | None, dict[str, Any] | None]:
    """Make a report's texts encodable: xdist sends them as UTF-8, and aborts the run on a captured lone surrogate."""
    return _encodable((yield))


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _encodable(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_encodable(each) for each in value)
    return value


@pytest.fixture(scope="session", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport in turn."""
    return str(request.param)


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """Settings of the servers of a module's tests; for the module to override."""
    return {}


@pytest.fixture
def start_server(transport: str, usual_settings: dict[str, str]) -> Iterator[StartServer]:
    """``start_server(database_url, VARIABLE=value, …)``; every server ends with the test."""
    with ExitStack() as stack:

        def start(database_url: str, **settings: str) -> ServerProcess:
            chosen = {"TRANSPORT": transport} | usual_settings | settings
            return stack.enter_context(ServerProcess(database_url, **chosen))

        yield start
