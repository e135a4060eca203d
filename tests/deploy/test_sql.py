"""The SQL of ``deploy/sql``, run with psql on a real PostgreSQL: the privileges of the role."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import errors
from tests.conftest import StartServer
from tests.deploy.manifests import Manifests
from tests.judges.tools import may_build
from tests.support.polling import until
from tests.support.table import Table

from definition_server.cli.embedded_postgres import first_binaries
from definition_server.control_plane.table_reading import Plan

SQL = Path(__file__).parents[2] / "deploy/sql"
ROLE = "definition_server"
PASSWORD = "a 'quoted' pass\\word"


def psql(url: str, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script as its first comment describes."""
    given = [f"-v{name}={value}" for name, value in variables.items()]
    command = [first_binaries().psql, "-X", "-q", url, *given, "-f", SQL / script]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def as_role(url: str, user: str = ROLE, password: str = PASSWORD) -> str:
    """``url`` for that role."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return parts._replace(netloc=f"{user}:{quote(password, safe='')}@{parts.hostname}{port}").geturl()


@pytest.fixture
def role(database: str) -> str:
    """A URL of the role, on a database with the table and another one."""
    Table(database).add_commands(3)
    Table(database).run("CREATE TABLE payroll (salary int)")
    done = psql(database, "role.sql", password=PASSWORD)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return as_role(database)


def test_the_role_reads_the_table(role: str) -> None:
    with psycopg.connect(role) as connection:
        assert connection.execute("SELECT count(*) FROM obex_dapl_functions").fetchone() == (3,)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM payroll",
        "INSERT INTO obex_dapl_functions (name) VALUES ('x')",
        "UPDATE obex_dapl_functions SET name = 'x'",
        "DELETE FROM obex_dapl_functions",
        "TRUNCATE obex_dapl_functions",
        "CREATE TABLE own (x int)",
        "CREATE SCHEMA own",
        "CREATE ROLE other",
        "COPY obex_dapl_functions TO PROGRAM 'cat'",
        "DROP TABLE obex_dapl_functions",
        "SELECT pg_terminate_backend(pg_backend_pid()), pg_read_file('/etc/passwd')",
    ],
)
def test_the_role_can_only_read_even_in_a_read_write_transaction(role: str, statement: Any) -> None:
    with psycopg.connect(role, autocommit=True) as connection:
        assert connection.execute("SHOW transaction_read_only").fetchone() == ("on",)
        connection.execute("SET default_transaction_read_only = off")
        with pytest.raises(errors.InsufficientPrivilege):
            connection.execute(statement)


def test_a_second_run_changes_password_and_limit(role: str, database: str) -> None:
    done = psql(database, "role.sql", password="another", connections="1")
    assert (done.returncode, done.stderr) == (0, "")
    changed = as_role(database, password="another")
    with psycopg.connect(changed), pytest.raises(psycopg.OperationalError, match="too many connections"):
        psycopg.connect(changed)


def test_without_a_password_nothing_is_created_and_the_error_shows_the_command(database: str) -> None:
    Table(database)
    done = psql(database, "role.sql")
    assert done.returncode == 3
    assert "no password given" in done.stderr
    assert "-v password=" in done.stderr
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (ROLE,)).fetchone() is None


def test_without_the_table_no_role_is_created(database: str) -> None:
    done = psql(database, "role.sql", password=PASSWORD)
    assert done.returncode == 3
    assert "obex_dapl_functions" in done.stderr
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (ROLE,)).fetchone() is None


def test_an_owner_who_is_not_a_superuser_can_run_it(database: str) -> None:
    table = Table(database)
    table.run("CREATE ROLE owner_of_the_table LOGIN CREATEROLE PASSWORD 'own'")
    table.run("ALTER TABLE obex_dapl_functions OWNER TO owner_of_the_table")
    done = psql(as_role(database, "owner_of_the_table", "own"), "role.sql", password=PASSWORD)
    assert (done.returncode, done.stderr) == (0, "")
    with psycopg.connect(as_role(database)) as connection:
        connection.execute("SELECT FROM obex_dapl_functions")


@may_build
def test_the_role_may_open_twice_the_connections_of_the_largest_fleet(role: str, guide: Manifests) -> None:
    with psycopg.connect(role) as connection:
        limit = connection.execute("SELECT rolconnlimit FROM pg_roles WHERE rolname = %s", (ROLE,)).fetchone()
    assert limit is not None
    assert limit[0] >= 2 * (guide.one("HorizontalPodAutoscaler")["spec"]["maxReplicas"] + 1)


@pytest.mark.transports
def test_a_server_works_with_the_role_before_during_and_after_the_index_is_built(
    role: str, database: str, start_server: StartServer
) -> None:
    server = start_server(role).wait_ready()
    before = server.statusz()["sync"]["cycles"]
    done = psql(database, "indexes.sql")
    assert (done.returncode, done.stderr) == (0, "")
    until(lambda: server.statusz()["sync"]["cycles"]["unchanged"] >= before["unchanged"] + 3, "three more cycles")
    cycles = server.statusz()["sync"]["cycles"]
    assert (cycles["failed"], cycles["published"]) == (0, before["published"])
    Table(database).add_commands(1, start=3)
    server.wait_count(4)


# -- indexes.sql -------------------------------------------------------------------------------------------------------


def test_with_the_index_a_second_row_of_a_name_is_refused_and_a_second_run_changes_nothing(database: str) -> None:
    table = Table(database)
    table.add_commands(3)
    for _ in range(2):
        done = psql(database, "indexes.sql")
        assert done.returncode == 0, done.stderr
    with pytest.raises(errors.UniqueViolation):
        table.add_commands(1)


def test_with_duplicates_the_index_is_not_built_and_the_error_names_one(database: str) -> None:
    table = Table(database)
    table.add_commands(3)
    table.add_commands(1)
    done = psql(database, "indexes.sql")
    assert done.returncode == 3
    assert "(name)=(command0)" in done.stderr
    with psycopg.connect(database) as connection:
        assert connection.execute("SELECT to_regclass('obex_dapl_functions_name')").fetchone() == (None,)


def test_the_servers_statements_use_no_index_as_the_file_says(database: str) -> None:
    Table(database).add_commands(5000)
    assert psql(database, "indexes.sql").returncode == 0
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute("ANALYZE obex_dapl_functions")
        plan_of_reading = Plan(None, None)
        for statement in (plan_of_reading.versions_sql(), plan_of_reading.rows_sql(0, 2**22)):
            plan = connection.execute(f"EXPLAIN {statement}").fetchall()
            scans = [line for (line,) in plan if "obex_dapl_functions" in line]
            assert len(scans) == 1
            assert "Seq Scan on obex_dapl_functions" in scans[0]
