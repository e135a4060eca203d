"""One Docker engine, one image, one PostgreSQL in a container; a hardened server for each test."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from tests.containers.engine import (
    ADMIN,
    BUILD_SECONDS,
    COMMANDS,
    GRPC,
    HARDENED,
    Running,
    Secrets,
    base_image,
    build,
    build_image,
    engine_or_skip,
    need_image,
    user_network,
)
from tests.support.polling import until
from tests.support.providers import create_database, drop_database
from tests.support.table import Table

from definition_server.cli.embedded_postgres import free_port

if TYPE_CHECKING:
    import docker

POSTGRES = os.environ.get("POSTGRES_IMAGE") or "postgres:16-alpine"
_FIGURES = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The figures that the tests have measured."""
    for line in config.stash.get(_FIGURES, []):
        terminalreporter.write_line(f"figure: {line}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The first test that needs the image waits for its build, which compiles the engine."""
    for item in items:
        if "image" in getattr(item, "fixturenames", ()):
            limit = item.get_closest_marker("timeout")
            seconds = limit.args[0] if limit else float(item.config.getini("timeout"))
            item.add_marker(pytest.mark.timeout(seconds + BUILD_SECONDS), append=False)


@pytest.fixture
def figure(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """``figure("…")`` prints a line at the end of the run."""
    return pytestconfig.stash.setdefault(_FIGURES, []).append


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """A client of the Docker engine."""
    client = engine_or_skip()
    yield client
    client.close()


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient) -> str:
    """Id of the image, built once from this working tree."""
    need_image(engine, base_image(), "BASE_IMAGE")
    need_image(engine, build_image(), "BUILD_IMAGE")
    return build(engine)[0]


@pytest.fixture(scope="session")
def network(engine: docker.DockerClient) -> Iterator[str]:
    """The network of all containers."""
    with user_network(engine) as name:
        yield name


@pytest.fixture(scope="session")
def database(engine: docker.DockerClient, network: str) -> Iterator[str]:
    """URL, as seen from here, of a PostgreSQL that containers reach as ``database``."""
    need_image(engine, POSTGRES, "POSTGRES_IMAGE")
    password, port = secrets.token_hex(8), free_port()
    with Running(
        engine, POSTGRES, environment={"POSTGRES_PASSWORD": password}, ports={"5432/tcp": ("127.0.0.1", port)},
        network=network,
        networking_config={network: engine.api.create_endpoint_config(aliases=["database"])},
    ) as postgres:  # fmt: skip
        url = f"postgresql://postgres:{password}@127.0.0.1:{port}/postgres"

        def answers() -> bool:
            try:
                psycopg.connect(url, connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        until(answers, postgres.output)
        yield url


@pytest.fixture
def table(database: str) -> Iterator[Table]:
    """A table for the test, with some commands."""
    name = f"test_{secrets.token_hex(4)}"
    table = Table(create_database(database, name))
    table.add_commands(COMMANDS)
    yield table
    drop_database(database, name)


@pytest.fixture
def mounted(tmp_path_factory: pytest.TempPathFactory, table: Table) -> Secrets:
    """The secrets of a server that reads the table."""
    inside = psycopg.conninfo.conninfo_to_dict(table.url)
    url = f"postgresql://{inside['user']}:{inside['password']}@database:5432/{inside['dbname']}"
    return Secrets(_reachable(tmp_path_factory.mktemp("secrets")), url)


def _reachable(directory: Path) -> Path:
    """Let any account of a container reach this directory, although the directories of pytest above it have mode
    0700."""
    for parent in directory.parents:
        if not parent.name.startswith("pytest-"):
            break
        parent.chmod(0o711)
    return directory


StartContainer = Callable[..., Running]


@pytest.fixture
def start(engine: docker.DockerClient, image: str, network: str, mounted: Secrets) -> Iterator[StartContainer]:
    """``start(VARIABLE=value, …, command=(…), options={…})`` starts a hardened server, which ends with the test."""
    with ExitStack() as stack:

        def run(*command: str, options: dict[str, Any] | None = None, **settings: str) -> Running:
            given = HARDENED | mounted.options | {"network": network} | (options or {})
            given["environment"] = {"WORKERS": "2", "DRAIN_WAIT_SECONDS": "0"} | given["environment"] | settings
            given.setdefault("ports", {f"{port}/tcp": ("127.0.0.1",) for port in (GRPC, ADMIN)})
            return stack.enter_context(Running(engine, image, command, **given))

        yield run
