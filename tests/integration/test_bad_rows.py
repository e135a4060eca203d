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
    """One worker: the number of workers does not matter here."""
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


def test_the_highest_id_of_rows_with_the_same_name_is_served(table: Table, start_server: StartServer) -> None:
    table.add([("twin", "function", "[]", "old"), GOOD, ("twin", "function", "[]", "new")])
    # An update moves the row with the lower id to a later place in the heap: the order of storage must not decide.
    table.run("UPDATE obex_dapl_functions SET code = 'old, touched later' WHERE id = 1")
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert client.get("twin").code == b"new"
        assert client.sync().total_count == 2
    assert server.metric("avap_rows_unserved", reason="duplicate") == 1
    assert server.wait_log("Rows not served", reason="duplicate")["examples"] == ["id=1 name='twin'"]


def test_rows_that_clients_refuse_are_left_out_if_no_good_version_is_known(
    table: Table, start_server: StartServer
) -> None:
    table.add(
        [
            GOOD,
            ("odd", "function", "{not json", "pass"),
            ("object", "function", '{"a": 1}', "pass"),
            ("code", "function", "[]", "if"),
            ("NaN", "function", "[NaN]", "pass"),
        ]
    )
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert [command.name for command in client.sync().commands] == ["NaN", "good"]
    assert server.metric("avap_rows_unserved", reason="interface_invalid") == 2
    assert server.metric("avap_rows_unserved", reason="code_invalid") == 1
    assert server.metric("avap_rows_suspect", reason="interface_not_json_array") == 1
    line = server.wait_log("Commands are left out: no good version is known")
    assert (line["level"], line["count"]) == ("WARN", 3)


@pytest.mark.thorough  # starts a server
def test_checks_that_are_off_let_every_row_pass(table: Table, start_server: StartServer) -> None:
    table.add([GOOD, ("odd", "function", "{not json", "if")])
    server = start_server(table.url, GATE_CODE="off", GATE_INTERFACE="off").wait_ready()
    with Client(server.port) as client:
        assert client.get("odd").interface_json == "{not json"
    assert server.checker_pids() == []


def test_one_bad_row_among_189_holds_only_its_command(table: Table, start_server: StartServer) -> None:
    table.add_commands(189)
    server = start_server(table.url).wait_ready()
    name = "command7"
    with Client(server.port) as client:
        before = {command.name: command for command in client.sync().commands}
        generation = server.metric("avap_snapshot_generation")
        changed = [f"command{n}" for n in range(20, 30)]
        table.run(
            "UPDATE obex_dapl_functions SET code = CASE WHEN name = %s THEN 'if' ELSE 'changed = 1' END "
            "WHERE name = ANY(%s)",
            (name, [name, *changed]),
        )
        line = server.wait_log("Commands are held at their last good version")
        until(lambda: client.get(changed[0]).code == b"changed = 1", "the changes are served")
        after = {command.name: command for command in client.sync().commands}
        assert {each for each in after if after[each] != before[each]} == set(changed)
        assert server.metric("avap_snapshot_generation") == generation + 1
        ((command),) = line["commands"]
        assert (command["name"], command["reason"]) == (name, "code_invalid")
        assert command["served"] == before[name].hash
        assert server.metric("avap_rows_held", reason="code_invalid") == 1
        assert server.statusz()["sync"]["rows_held"]["code_invalid"] == 1
        (held,) = server.statusz()["held_commands"]
        assert (held["name"], held["reason"]) == (name, "code_invalid")
        assert name in server.http("/")[1]
        until(lambda: server.statusz()["publications"][0]["changed"] is not None, "the publication was compared")
        publication = server.statusz()["publications"][0]
        assert (publication["added"], publication["removed"], publication["changed"]) == (0, 0, len(changed))
        assert sorted(publication["examples"]) == sorted(f"~ {each}" for each in changed)
        table.run("UPDATE obex_dapl_functions SET code = 'mended = 1' WHERE name = %s", (name,))
        until(lambda: client.get(name).code == b"mended = 1", "the mended row is served")
    assert server.wait_log("Commands are no longer held")["names"] == [name]
    assert server.metric("avap_rows_held", reason="code_invalid") == 0
    assert len(server.logged("Commands are held at their last good version")) == 1
    assert server.statusz()["held_commands"] == []
    assert name not in server.http("/metrics")[1] + server.http("/readyz")[1]


@pytest.mark.parametrize(
    ("code", "reason"),
    [("NULL", "null_code"), ("'x ='", "code_invalid"), ("repeat('-', 100000) || '1'", "code_invalid")],
    ids=["no code", "half a statement", "source that exhausts the compiler"],
)
def test_a_command_whose_row_becomes_bad_keeps_its_served_version(
    table: Table, start_server: StartServer, code: str, reason: str
) -> None:
    table.add([GOOD, ("other", "function", "[]", "pass")])
    server = start_server(table.url).wait_ready()
    table.run(f"UPDATE obex_dapl_functions SET code = CASE WHEN name = 'good' THEN {code} ELSE 'other = 1' END")
    server.wait_log("Commands are held at their last good version")
    with Client(server.port) as client:
        until(lambda: client.get("other").code == b"other = 1", "the other row is served")
        assert client.get("good").code == b"pass"
    assert server.metric("avap_rows_held", reason=reason) == 1


@pytest.mark.thorough  # starts servers
def test_a_definition_of_10_mb_reaches_clients_that_raised_their_limit(table: Table, start_server: StartServer) -> None:
    code = "# " + "x" * 10_000_000
    table.add([GOOD, ("huge", "function", "[]", code)])
    server = start_server(table.url, MAX_DEFINITION_BYTES="16000000").wait_ready()
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


def test_only_rows_with_a_bad_id_or_above_the_limit_are_left_out_and_counted(
    table: Table, start_server: StartServer
) -> None:
    table.run("ALTER TABLE obex_dapl_functions DROP CONSTRAINT obex_dapl_functions_pkey, ALTER id DROP NOT NULL")
    table.add([GOOD, ("null", "function", "[]", "pass"), ("large", "function", "[]", "#" * 5_000_000)])
    table.run("UPDATE obex_dapl_functions SET id = NULL WHERE name = 'null'")
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert [(command.name, command.internal_id) for command in client.sync().commands] == [("good", 1)]
    for reason, example in (("invalid_id", "id=None name='null'"), ("too_large", "id=3 name='large'")):
        assert server.metric("avap_rows_unserved", reason=reason) == 1
        assert server.wait_log("Rows not served", reason=reason)["examples"] == [example]


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


@pytest.mark.thorough  # starts servers
def test_an_empty_table_is_served_if_the_setting_allows_it(table: Table, start_server: StartServer) -> None:
    server = start_server(table.url, ALLOW_EMPTY_CATALOG="true").wait_ready()
    with Client(server.port) as client:
        catalogue = client.sync()
        assert (len(catalogue.commands), catalogue.total_count) == (0, 0)
        assert client.health() == "SERVING"


def test_only_a_row_that_is_not_utf8_is_left_out(postgres, start_server: StartServer) -> None:
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


@pytest.mark.parametrize("column_type", sample(["jsonb", "json", "varchar(4000)"]))
def test_another_type_of_column_is_read_as_text(table: Table, start_server: StartServer, column_type: str) -> None:
    table.run(f"ALTER TABLE obex_dapl_functions ALTER interface TYPE {column_type} USING interface::{column_type}")
    table.add([("good", "function", '[{"item": "a"}]', "pass")])
    server = start_server(table.url).wait_ready()
    with Client(server.port) as client:
        assert client.get("good").interface_json == '[{"item": "a"}]'


@pytest.mark.thorough  # 20,000 rows
@pytest.mark.parametrize("count", sample([20_000, 200_000]))
def test_many_rows_are_served(table: Table, start_server: StartServer, count: int) -> None:
    table.add_commands(count, size=100)
    server = start_server(table.url, STATEMENT_TIMEOUT_SECONDS="30").wait_ready(60)
    with Client(server.port) as client:
        catalogue = client.sync()
        assert catalogue.total_count == len(catalogue.commands) == count
        for number in (0, count // 2, count - 1):
            assert client.get(f"command{number}").code.startswith(f"# {number}\n".encode())
