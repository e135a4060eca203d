"""Servers for the judges, as child processes that end with the tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.integration.test_serving import ROWS
from tests.judges.serve import TRANSPORTS
from tests.judges.tools import command
from tests.support.certificates import Authority
from tests.support.providers import DatabaseServer, create_database, drop_database
from tests.support.server import ServerProcess
from tests.support.table import Table

STOP_SECONDS = 20


@contextmanager
def judged_server(transport: str, *options: str) -> Iterator[int]:
    """The port of a server with the judges' services. The server must end in an orderly way."""
    arguments = [sys.executable, "-m", "tests.judges.serve", "--transport", transport, *options]
    with subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert line, f"the {transport} server did not start"
            yield int(line)
            assert process.poll() is None, f"the server died with {process.returncode}"
        finally:
            process.terminate()
            try:
                code = process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        assert code == 0


@contextmanager
def definition_server(postgres: DatabaseServer, name: str, **settings: str) -> Iterator[ServerProcess]:
    """A definition server that is ready, with `ROWS` in a database of that name."""
    url = create_database(postgres.url, name)
    Table(url).add(ROWS)
    with ServerProcess(url, **settings) as process:
        yield process.wait_ready()
    drop_database(postgres.url, name)


@pytest.fixture(scope="session")
def native() -> Iterator[int]:
    """Port of a server on our engine."""
    with judged_server("native") as port:
        yield port


@pytest.fixture(scope="session")
def secure(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Port of a server on our engine that speaks TLS."""
    command("openssl", "Debian openssl")
    made = Authority(tmp_path_factory.mktemp("authority")).sign("localhost")
    with judged_server("native", "--tls", str(made.cert), str(made.key)) as port:
        yield port


@pytest.fixture(scope="session")
def roomy() -> Iterator[int]:
    """Port of a server on our engine that accepts 64 KiB of header fields: nghttp's ``--continuation`` sends 24."""
    with judged_server("native", "--max-header-list", "65536") as port:
        yield port


@pytest.fixture(scope="session")
def grpcio() -> Iterator[int]:
    """Port of a server on grpcio. A check that fails on both servers is a fault of the judge."""
    with judged_server("grpcio") as port:
        yield port


@pytest.fixture(scope="session", params=TRANSPORTS)
def every_transport(request: pytest.FixtureRequest) -> int:
    """Port of a server on each transport in turn."""
    port: int = request.getfixturevalue(request.param)
    return port
