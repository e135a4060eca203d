"""Every provider of a database gives an equivalent server, which works and survives the faults that a test makes."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator

import psycopg
import pytest
from tests.support import providers
from tests.support.families import sample
from tests.support.polling import until
from tests.support.providers import DatabaseServer, create_database, drop_database

from definition_server.catalog.restore_sql import CREATE_TABLE_SQL


@pytest.fixture(scope="module", params=providers.PROVIDERS)
def server(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    server = providers.provider_or_skip(request.param)
    yield server
    server.close()


@pytest.fixture
def breakable(server: DatabaseServer) -> DatabaseServer:
    if not server.can_fault:
        pytest.skip(f"the {server.name} server is not ours to break")
    return server


@pytest.fixture
def database(server: DatabaseServer) -> Iterator[str]:
    name = f"test {uuid.uuid4().hex}"  # a name that needs quoting, in SQL and in the URL
    url = create_database(server.url, name)
    with psycopg.connect(url) as connection:
        connection.execute(CREATE_TABLE_SQL)
        connection.execute("INSERT INTO obex_dapl_functions (name, code) VALUES ('addVar', 'pass')")
    yield url
    drop_database(server.url, name)


def names(url: str) -> list[str]:
    with psycopg.connect(url, connect_timeout=2) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM obex_dapl_functions")]


def can_connect(url: str) -> bool:
    try:
        psycopg.connect(url, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def test_each_database_holds_its_own_table(server: DatabaseServer, database: str) -> None:
    other = f"test_{uuid.uuid4().hex}"
    try:
        with psycopg.connect(create_database(server.url, other)) as connection:
            connection.execute(CREATE_TABLE_SQL)
            assert connection.execute("SELECT count(*) FROM obex_dapl_functions").fetchone() == (0,)
        assert names(database) == ["addVar"]
    finally:
        drop_database(server.url, other)
    assert not can_connect(database.replace(database.rpartition("/")[2], other))


def test_a_database_is_dropped_under_an_open_connection(server: DatabaseServer) -> None:
    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(create_database(server.url, name), autocommit=True) as connection:
        drop_database(server.url, name)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_committed_rows_survive_a_hard_stop(breakable: DatabaseServer, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        breakable.stop_hard()
        assert not can_connect(database)
        breakable.start_again()
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert names(database) == ["addVar"]


def test_an_open_connection_works_after_a_pause(breakable: DatabaseServer, database: str) -> None:
    with psycopg.connect(database, autocommit=True) as connection:
        breakable.pause()
        try:
            assert not can_connect(database)
        finally:
            breakable.resume()
        assert connection.execute("SELECT name FROM obex_dapl_functions").fetchone() == ("addVar",)
    until(lambda: can_connect(database), "the database can be reached")


@pytest.mark.parametrize("state", sample(["running", "paused", "stopped"]))
@pytest.mark.parametrize("name", [name for name in providers.PROVIDERS if name != "external"])
def test_close_ends_the_server_in_any_state(name: str, state: str) -> None:
    server = providers.provider_or_skip(name)
    if state == "stopped":
        server.stop_hard()
    elif state == "paused":
        server.pause()
    server.close()
    assert not can_connect(server.url)


def test_a_test_fails_if_a_required_provider_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_availability", lambda: {"container": "no engine"})
    monkeypatch.setenv("REQUIRE_PROVIDERS", "embedded, container")
    with pytest.raises(pytest.fail.Exception, match=r"required.*no engine"):
        providers.provider_or_skip("container")


def test_a_test_is_skipped_if_a_provider_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_availability", lambda: {"container": "no engine"})
    monkeypatch.delenv("REQUIRE_PROVIDERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no engine"):
        providers.provider_or_skip("container")


def test_an_unknown_required_provider_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUIRE_PROVIDERS", "embeded")
    with pytest.raises(ValueError, match="embeded"):
        providers.required_providers()


def test_a_missing_docker_engine_is_detected_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/docker.sock")
    started = time.monotonic()
    reason = providers._why_no_container()
    assert reason is not None
    assert "no Docker engine answers" in reason
    assert time.monotonic() - started < 10


def test_an_image_that_cannot_be_pulled_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := providers.available_providers()["container"]) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("POSTGRES_IMAGE", "localhost:1/no-such-image:0")
    reason = providers._why_no_container()
    assert reason is not None
    assert "localhost:1/no-such-image:0" in reason


def test_tests_never_break_the_external_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "_availability", lambda: {"external": None, "container": "", "embedded": ""})
    monkeypatch.delenv("REQUIRE_PROVIDERS", raising=False)
    with pytest.raises(pytest.skip.Exception):
        providers.any_provider_or_skip(faults=True)
