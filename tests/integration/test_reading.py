"""`PostgresSource` on a real PostgreSQL: only a bad row itself is left out, and no table takes more memory than there
is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest
from tests.conftest import StartServer
from tests.integration.reader import Reader, empty
from tests.support.logs import captured_logs
from tests.support.table import Table

from definition_server.catalog.definition import Row, Unserved
from definition_server.control_plane.source import ReadLimits, SourceError
from definition_server.control_plane.table_reading import whole_number
from definition_server.observability.reasons import Reason

# -- rows that are hidden ----------------------------------------------------------------------------------------------


@contextmanager
def reader_role(table: Table) -> Iterator[str]:
    """A URL for a role that may read the table and owns nothing."""
    parts = urlsplit(table.url)
    name = f"reader_{parts.path[1:]}"
    table.run(f"CREATE ROLE {name} LOGIN PASSWORD 'reader'; GRANT SELECT ON obex_dapl_functions TO {name}")
    port = f":{parts.port}" if parts.port else ""
    try:
        yield parts._replace(netloc=f"{name}:reader@{parts.hostname or ''}{port}").geturl()
    finally:
        table.run(f"DROP OWNED BY {name}; DROP ROLE {name}")


async def test_rows_that_a_policy_hides_fail_the_reading_with_a_remedy(table: Table) -> None:
    table.add_commands(4)
    with reader_role(table) as url:
        async with Reader(url) as reader:
            assert len(await reader.codes()) == 4
            table.run("CREATE POLICY half ON obex_dapl_functions USING (id % 2 = 0)")
            table.run("ALTER TABLE obex_dapl_functions ENABLE ROW LEVEL SECURITY")
            with pytest.raises(SourceError, match="BYPASSRLS") as raised:
                await reader.codes()
            assert raised.value.reason is Reason.ROWS_HIDDEN
            table.run("ALTER TABLE obex_dapl_functions DISABLE ROW LEVEL SECURITY")
            assert len(await reader.codes()) == 4


async def test_rows_that_a_policy_below_a_view_hides_also_fail_the_reading(table: Table) -> None:
    table.add_commands(4)
    table.run("ALTER TABLE obex_dapl_functions RENAME TO below")
    with psycopg.connect(table.url, autocommit=True) as connection:
        if connection.info.server_version < 150000:
            pytest.skip("views with security_invoker came with PostgreSQL 15")
        connection.execute("CREATE VIEW obex_dapl_functions WITH (security_invoker) AS SELECT * FROM below")
    with reader_role(table) as url:
        table.run(f"GRANT SELECT ON below TO {urlsplit(url).username}")
        table.run("CREATE POLICY half ON below USING (id % 2 = 0); ALTER TABLE below ENABLE ROW LEVEL SECURITY")
        async with Reader(url) as reader:
            with pytest.raises(SourceError) as raised:
                await reader.codes()
        assert raised.value.reason is Reason.ROWS_HIDDEN


async def test_a_missing_privilege_is_another_reason_than_hidden_rows(table: Table) -> None:
    with reader_role(table) as url:
        table.run(f"REVOKE SELECT ON obex_dapl_functions FROM {urlsplit(url).username}")
        async with Reader(url) as reader:
            with pytest.raises(SourceError, match="GRANT SELECT") as raised:
                await reader.codes()
        assert raised.value.reason is Reason.PERMISSION_DENIED


# -- ids and types -----------------------------------------------------------------------------------------------------

IDS: dict[str, tuple[list[str], list[int | None]]] = {
    "text": (["'7'", "NULL", "'seven'", "''", "'1e30'", "' 8 '", "repeat('9', 10000)"],
             [7, None, None, None, None, 8, None]),
    "varchar(9)": (["'7'", "'x'"], [7, None]),
    "numeric": (["7", "NULL", "'NaN'", "1e30", "-9223372036854775808", "1.5", "7.00"],
                [7, None, None, None, -(2**63), None, 7]),
    "double precision": (["7", "NULL", "'NaN'", "1e30", "'Infinity'", "'-Infinity'", "2.5"],
                         [7, None, None, None, None, None, None]),
    "real": (["7", "'NaN'", "1e30"], [7, None, None]),
    "uuid": (["gen_random_uuid()", "NULL"], [None, None]),
    "bigint": (["9223372036854775807", "NULL", "2147483648"], [2**63 - 1, None, 2**31]),
    "smallint": (["1", "NULL"], [1, None]),
    "jsonb": (["'7'", "'[7]'", "NULL"], [7, None, None]),
    "boolean": (["true"], [None]),
}  # fmt: skip


@pytest.mark.parametrize("kind", IDS)
async def test_only_the_row_with_a_bad_id_is_left_out(table: Table, kind: str) -> None:
    values, expected = IDS[kind]
    empty(table, f"id {kind}, name text, type text, interface text, code text")
    for number, value in enumerate(values):
        table.run(f"INSERT INTO obex_dapl_functions VALUES ({value}, 'n{number}', 'function', '[]', 'pass')")
    async with Reader(table.url) as reader:
        rows = {row.name: row for row in await reader.rows()}
    assert [rows[b"n%d" % number].id for number in range(len(values))] == expected
    for row in rows.values():
        assert row.fault == (Unserved.INVALID_ID if row.id is None else None)


@pytest.mark.parametrize(
    ("text", "number"),
    [(b"0", 0), (b"+1", 1), (b"-1", -1), (b"1e3", 1000), (b"9" * 40, None), (b"1_000", None), (b"0x10", None),
     (b"\xd9\xa1", None), (b"nan", None), (b"-inf", None), (b"1e999999999", None), (None, None)],
)  # fmt: skip
def test_a_whole_number_of_64_bits_is_an_id(text: bytes | None, number: int | None) -> None:
    assert whole_number(text) == number


@pytest.mark.parametrize("kind", ["text", "varchar", "bytea", "json", "jsonb", "char(40)", "xml"])
async def test_code_and_interface_of_any_type_are_served_as_their_text(table: Table, kind: str) -> None:
    try:
        empty(table, f"id int, name text, type text, interface {kind}, code {kind}")
        table.run("INSERT INTO obex_dapl_functions VALUES (1, 'if', NULL, '[1]', '[\"\u00f1\", 2]')")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this PostgreSQL was built without XML")
    async with Reader(table.url) as reader:
        (row,) = await reader.rows()
    assert (row.interface, row.code) == (b"[1]", '["\u00f1", 2]'.encode())


async def test_utf_8_in_a_bytea_is_served_as_text_and_other_octets_are_left_out(table: Table) -> None:
    empty(table, "id int, name bytea, type bytea, interface bytea, code bytea")
    table.run(
        r"INSERT INTO obex_dapl_functions VALUES (1, 'if', 'function', '[]', '\x636f6465'), (2, 'a\000b', '', '', '')"
    )
    table.run(
        r"CREATE TABLE avap_bytecode (command_name text UNIQUE, source_hash text, avbc_bytecode bytea, "
        "avbc_version int)"
    )
    table.run("INSERT INTO avap_bytecode VALUES ('if', encode(sha256('code'), 'hex'), 'bytecode', 3)")
    async with Reader(table.url) as reader:
        first, second = await reader.rows()
    assert first == Row(1, b"if", b"function", b"[]", b"code", b"bytecode", 3)
    assert (second.name, second.fault) == (b"a\0b", Unserved.INVALID_ENCODING)


# -- sizes -------------------------------------------------------------------------------------------------------------


async def test_rows_of_every_size_are_read_in_batches_of_few_octets(table: Table) -> None:
    sizes = [1, 8_000, 9_000, 80_000, 90_000, 800_000, 900_000, 4_000_000]
    table.run(
        "INSERT INTO obex_dapl_functions (name, code) SELECT 'c' || size || '-' || n, repeat('x', size) "
        "FROM unnest(%s::int[]) size, generate_series(1, 3) n",
        (sizes,),
    )
    table.run("INSERT INTO obex_dapl_functions (name, code) SELECT 'n' || n, 'pass' FROM generate_series(1, 2500) n")
    async with Reader(table.url) as reader, reader.source.read() as reading:
        batches = [batch async for batch in reading.batches()]
    lengths = [len(row.code or b"") for batch in batches for row in batch]
    assert sorted(lengths) == sorted([size for size in sizes for _ in range(3)] + [4] * 2500)
    assert max(sum(len(row.code or b"") for row in batch) for batch in batches) <= 8 * 1024 * 1024
    assert max(map(len, batches)) <= 1000


@pytest.mark.parametrize("column", ["name", "type", "interface", "code"])
async def test_a_row_above_the_limit_is_left_out_and_not_fetched(table: Table, column: str) -> None:
    empty(table)
    table.run("INSERT INTO obex_dapl_functions SELECT n, 'large', '', '', '' FROM generate_series(1, 3) n")
    for octets, fault in ((1000, None), (1001, Unserved.TOO_LARGE), (100_000, Unserved.TOO_LARGE)):
        table.run(
            "UPDATE obex_dapl_functions SET name = 'large', type = '', interface = '', code = '' WHERE id = 3; "
            f"UPDATE obex_dapl_functions SET {column} = "
            f"repeat('x', {octets} - {0 if column == 'name' else 5}) WHERE id = 3"
        )
        async with Reader(table.url, ReadLimits(definition=1000)) as reader:
            rows = await reader.rows()
        assert [row.fault for row in rows] == [None, None, fault]
        if fault is not None:
            assert rows[2].code is None
            assert len(rows[2].name or b"") <= 4096
            if column != "name":
                assert rows[2].name == b"large"


async def test_a_catalogue_above_the_limit_fails_the_reading_before_a_row_is_fetched(table: Table) -> None:
    table.add_commands(100, size=1000)
    async with Reader(table.url, ReadLimits(catalogue=1000)) as reader:
        with pytest.raises(SourceError, match=r"100 rows .* MAX_CATALOG_BYTES \(1,000\)") as raised:
            await reader.codes()
    assert raised.value.reason is Reason.CATALOGUE_TOO_LARGE
    async with Reader(table.url, ReadLimits(catalogue=200_000)) as reader:
        assert len(await reader.codes()) == 100


# -- bytecode ----------------------------------------------------------------------------------------------------------

BYTECODE = (
    "CREATE TABLE avap_bytecode (id serial, command_name varchar(255) UNIQUE, bytecode bytea, "
    "source_hash varchar(64), avbc_bytecode bytea, avbc_version int)"
)
ADD = "INSERT INTO avap_bytecode (command_name, source_hash, avbc_bytecode, avbc_version) VALUES (%s, %s, %s, %s)"


def digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


async def bytecode(reader: Reader) -> dict[bytes | None, tuple[bytes | None, int | None]]:
    return {row.name: (row.avbc_code, row.avbc_version) for row in await reader.rows() if row.avbc_code is not None}


async def test_bytecode_is_served_only_if_it_belongs_to_the_present_code(table: Table) -> None:
    table.run(BYTECODE)
    codes = {"right": "pass", "upper": "pass # \u00f1", "stale": "new", "none": "pass", "null": "pass", "odd": "pass"}
    table.add((name, "function", "[]", code) for name, code in codes.items())
    for name, source, octets, version in (
        ("right", digest(b"pass"), b"\0bytecode", 3), ("upper", digest("pass # \u00f1".encode()).upper(), b"B", None),
        ("stale", digest(b"old"), b"bytecode of old code", 3), ("null", digest(b"pass"), None, 3),
        ("odd", None, b"B", 3), ("unknown", digest(b"pass"), b"B", 3),
    ):  # fmt: skip
        table.run(ADD, (name, source, octets, version))
    async with Reader(table.url) as reader:
        assert len(await reader.rows()) == len(codes)
        assert await bytecode(reader) == {b"right": (b"\0bytecode", 3), b"upper": (b"B", None)}
        for statement in (
            "UPDATE avap_bytecode SET avbc_version = 4 WHERE command_name = 'right'",
            "UPDATE obex_dapl_functions SET code = 'return' WHERE name = 'right'",
            "DELETE FROM avap_bytecode WHERE command_name = 'upper'",
            "DROP TABLE avap_bytecode",
        ):
            fingerprint = await reader.fingerprint()
            table.run(statement)
            assert await reader.fingerprint() != fingerprint, statement
        assert await bytecode(reader) == {}
        fingerprint = await reader.fingerprint()
        table.run(BYTECODE)
        assert await reader.fingerprint() != fingerprint


UNREADABLE = {
    "no privilege": ("SELECT 1", "no SELECT"),
    "no column": (
        "GRANT SELECT ON avap_bytecode TO {role}; ALTER TABLE avap_bytecode DROP avbc_version", "avbc_version",
    ),
    "policies": (
        "GRANT SELECT ON avap_bytecode TO {role}; ALTER TABLE avap_bytecode ENABLE ROW LEVEL SECURITY", "row-level",
    ),
    "other types": (
        "GRANT SELECT ON avap_bytecode TO {role}; ALTER TABLE avap_bytecode ALTER avbc_bytecode TYPE text",
        "not of type bytea",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", UNREADABLE)
async def test_bytecode_that_cannot_be_read_is_left_out_and_logged_once(table: Table, why: str) -> None:
    statement, reason = UNREADABLE[why]
    table.run(BYTECODE)
    table.add([("if", "function", "[]", "pass")])
    table.run(ADD, ("if", digest(b"pass"), b"B", 1))
    with reader_role(table) as url, captured_logs() as lines:
        table.run(statement.format(role=urlsplit(url).username))
        async with Reader(url) as reader:
            assert await bytecode(reader) == await bytecode(reader) == {}
            assert await reader.fingerprint() == await reader.fingerprint()
    said = [line["reason"] for line in lines if line["event"] == "No bytecode is served"]
    assert len(said) == 1
    assert reason in said[0]


async def test_without_a_table_of_bytecode_nothing_is_logged(table: Table) -> None:
    table.add_commands(1)
    with captured_logs() as lines:
        async with Reader(table.url) as reader:
            assert len(await reader.rows()) == 1
    assert {line["event"] for line in lines} == {"Connected to the database"}


async def test_several_rows_of_bytecode_for_a_command_do_not_double_it(table: Table) -> None:
    table.run(BYTECODE.replace(" UNIQUE", ""))
    table.add([("if", "function", "[]", "pass")])
    for octets in (b"A", b"B"):
        table.run(ADD, ("if", digest(b"pass"), octets, 1))
    async with Reader(table.url) as reader:
        assert len(await reader.rows()) == 1


async def test_only_the_bytecode_is_left_out_if_it_does_not_fit_together_with_its_definition(table: Table) -> None:
    table.run(BYTECODE)
    table.add([("if", "function", "[]", "pass")])
    table.run(ADD, ("if", digest(b"pass"), b"x" * 2000, 1))
    async with Reader(table.url, ReadLimits(definition=1000)) as reader:
        assert [(row.code, row.avbc_code, row.fault) for row in await reader.rows()] == [(b"pass", None, None)]


# -- connections that ended --------------------------------------------------------------------------------------------

END = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'avap-definition-server'"


async def test_a_connection_that_ended_between_two_readings_is_replaced(table: Table) -> None:
    table.add_commands(3)
    async with Reader(table.url) as reader:
        for _ in range(2):
            assert len(await reader.rows()) == 3
            table.run(f"{END} AND datname = current_database()")


async def test_no_reading_fails_because_of_idle_session_timeout(table: Table) -> None:
    table.add_commands(3)
    name = urlsplit(table.url).path[1:]
    with psycopg.connect(table.url) as connection:
        if connection.info.server_version < 140000:
            pytest.skip("idle_session_timeout came with PostgreSQL 14")
    table.run(f'ALTER DATABASE "{name}" SET idle_session_timeout = 50')
    async with Reader(table.url) as reader:
        assert len(await reader.rows()) == 3
        with psycopg.connect(table.url, autocommit=True) as connection:
            connection.execute("SET idle_session_timeout = 0")
            while connection.execute(END.replace("pg_terminate_backend(pid)", "pid")).fetchall():
                pass
        assert len(await reader.rows()) == 3


# -- memory ------------------------------------------------------------------------------------------------------------


def peak_memory(pid: int) -> int:
    """The peak memory of the process, in octets."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    (peak,) = (int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    return peak


@pytest.mark.thorough  # takes seconds
@pytest.mark.any_transport
def test_twelve_rows_of_64_mib_use_no_memory_of_the_master_and_other_rows_are_served(
    table: Table, start_server: StartServer
) -> None:
    table.add_commands(10)
    server = start_server(table.url, WORKERS="1").wait_ready()
    before = peak_memory(server.pid)
    table.run(
        "INSERT INTO obex_dapl_functions (name, code) SELECT 'large' || n, "
        "repeat('x', 64 * 1024 * 1024) FROM generate_series(1, 12) n"
    )
    table.add_commands(1, start=10)
    server.wait_count(11)
    assert server.metric("avap_rows_unserved", reason="too_large") == 12
    assert peak_memory(server.pid) - before < 200 * 1024 * 1024
