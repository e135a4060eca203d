"""Rows that cannot be served or look wrong: all others are served, and rows left out are reported."""

from __future__ import annotations

import pytest
from tests.conftest import StartServer
from tests.support.client import Client, failure
from tests.support.families import sample
from tests.support.polling import until
from tests.support.table import Table

GOOD = ("good", "function", "[]", "pass")

pytestmark = pytest.mark.any_transport


@pytest.fixture(scope="module")
def usual_settings() -> dict[str, str]:
    """One worker: their number does not matter here."""
    return {"WORKERS": "1"}


def test_rows_that_cannot_be_served_are_counted_by_reason(table: Table, start_server: StartServer) -> None:
    table.add([GOOD, (None, "function", "[]", "x"), ("", "function", "[]", "x"), ("null code", "function", "[]", None)])
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert [command.name for command in client.sync().commands] == ["good"]
        assert failure(client.get, "null code") == ("NOT_FOUND", "Command 'null code' not found")
    for reason in ("null_name", "empty_name", "null_code"):
        assert server.metric("avap_rows_unserved", reason=reason) == 1
        line = server.wait_log("Rows not served", reason=reason)
        assert (line["level"], line["count"]) == ("WARN", 1)
        assert line["examples"][0].startswith("id=")
    assert server.metric("avap_source_rows") == 4
    assert server.metric("avap_cache_size") == 1


def test_of_rows_with_the_same_name_the_highest_id_is_served(table: Table, start_server: StartServer) -> None:
    table.add([("twin", "function", "[]", "old"), GOOD, ("twin", "function", "[]", "new")])
    # An update moves the lower id behind the higher one in the heap: order of storage must not decide.
    table.run("UPDATE obex_dapl_functions SET code = 'old, touched later' WHERE id = 1")
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert client.get("twin").code == b"new"
        assert client.sync().total_count == 2
    assert server.metric("avap_rows_unserved", reason="duplicate") == 1
    assert server.wait_log("Rows not served", reason="duplicate")["examples"] == ["id=1 name='twin'"]


def test_an_interface_that_is_not_json_is_served_unchanged_and_reported(
    table: Table, start_server: StartServer
) -> None:
    table.add([GOOD, ("odd", "function", "{not json", "pass"), ("object", "function", '{"a": 1}', "pass")])
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert client.get("odd").interface_json == "{not json"
        assert client.get("object").interface_json == '{"a": 1}'
    assert server.metric("avap_rows_suspect", reason="interface_not_json_array") == 2


def test_a_definition_of_10_mb_reaches_clients_that_raised_their_limit(table: Table, start_server: StartServer) -> None:
    code = "# " + "x" * 10_000_000
    table.add([GOOD, ("huge", "function", "[]", code)])
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert client.get("huge").code == code.encode()
        assert client.sync().total_count == 2
    with Client(server.port, options=()) as client:
        assert failure(client.get, "huge")[0] == "RESOURCE_EXHAUSTED"
        assert client.get("good").code == b"pass"
    assert server.metric("avap_rows_suspect", reason="larger_than_4_mib") == 1
    assert server.wait_log(
        "The catalogue passes 4 MiB; SyncCatalog reaches only clients that raise their receive limit"
    )


def test_an_empty_table_is_not_served_until_it_has_rows(table: Table, start_server: StartServer) -> None:
    server = start_server(table.url)
    line = server.wait_log("Catalogue held")
    assert line["level"] == "ERROR"
    assert "it is empty" in line["error"]
    assert "ALLOW_EMPTY_CATALOG" in line["remedy"]
    with Client(server.port) as client:
        until(lambda: client.health() == "NOT_SERVING", "the worker answers health checks")
        server.wait_log("Catalogue held", after=len(server.lines))
        assert client.health() == "NOT_SERVING"
        assert failure(client.get, "good") == ("UNAVAILABLE", "The catalogue is not loaded yet")
        assert server.http("/readyz")[0] == 503
        table.add([GOOD])
        server.wait_ready()
        assert client.health() == "SERVING"
        assert client.get("good").code == b"pass"


def test_an_empty_table_is_served_if_the_setting_allows_it(table: Table, start_server: StartServer) -> None:
    server = start_server(table.url, ALLOW_EMPTY_CATALOG="true").wait_ready()
    with Client(server.port) as client:
        catalogue = client.sync()
        assert (len(catalogue.commands), catalogue.total_count) == (0, 0)
        assert client.health() == "SERVING"


def test_a_row_that_is_not_utf8_is_left_out_and_no_other(postgres, start_server: StartServer) -> None:  # type: ignore[no-untyped-def]
    import psycopg
    from tests.support.providers import drop_database

    name = "test_sql_ascii"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' TEMPLATE template0 LOCALE 'C'")
    try:
        url = postgres.url.rpartition("/")[0] + f"/{name}"
        table = Table(url)
        table.add([GOOD])
        table.run(r"INSERT INTO obex_dapl_functions (name, code) VALUES (E'b\xe9d', 'pass'), ('ok', E'\xe9')")
        server = start_server(url).wait_ready()
        with Client(server.port) as client:
            assert [command.name for command in client.sync().commands] == ["good"]
        assert server.metric("avap_rows_unserved", reason="invalid_encoding") == 2
    finally:
        drop_database(postgres.url, name)


@pytest.mark.parametrize("column_type", ["json", "jsonb", "varchar(4000)"])
def test_another_type_of_column_is_read_as_text(table: Table, start_server: StartServer, column_type: str) -> None:
    table.run(f"ALTER TABLE obex_dapl_functions ALTER interface TYPE {column_type} USING interface::{column_type}")
    table.add([("good", "function", '[{"item": "a"}]', "pass")])
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert client.get("good").interface_json == '[{"item": "a"}]'


@pytest.mark.parametrize("count", sample([20_000, 200_000]))
def test_many_rows_are_served(table: Table, start_server: StartServer, count: int) -> None:
    table.add_commands(count, size=100)
    server = start_server(table.url, STATEMENT_TIMEOUT_SECONDS="30").wait_ready(60)
    with Client(server.port) as client:
        catalogue = client.sync()
        assert catalogue.total_count == len(catalogue.commands) == count
        for number in (0, count // 2, count - 1):
            assert client.get(f"command{number}").code.startswith(f"# {number}\n".encode())
