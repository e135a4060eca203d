"""The role of a drill's server: it has a password, and only the privilege SELECT on the table."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

import psycopg
from psycopg import sql


@dataclass
class Reader:
    """A role and its password; ``admin_url`` is the URL of a superuser."""

    admin_url: str
    name: str
    password: str = ""

    def url(self, base: str) -> str:
        """``base`` for this role."""
        parts = urlsplit(base)
        place = parts.netloc.rpartition("@")[2]
        return parts._replace(netloc=f"{self.name}:{self.password}@{place}").geturl()

    def rotate(self) -> None:
        """Change the password; open sessions stay."""
        self.password = secrets.token_hex(8)
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            connection.execute("SET password_encryption TO 'scram-sha-256'")
            connection.execute(
                sql.SQL("ALTER ROLE {} PASSWORD {}").format(sql.Identifier(self.name), sql.Literal(self.password))
            )

    def end_sessions(self) -> None:
        """Terminate the server's sessions, so that it must reconnect."""
        with psycopg.connect(self.admin_url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE usename = %s AND application_name = 'avap-definition-server'",
                (self.name,),
            )


@contextmanager
def new_reader(admin_url: str, name: str) -> Iterator[Reader]:
    """A role that may read every table of this database, present and to come; dropped at the end.

    PostgreSQL requires its password, even if ``pg_hba.conf`` requires none of other roles.
    """
    reader = Reader(admin_url, name)
    role = sql.Identifier(name)
    with psycopg.connect(admin_url, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE ROLE {} LOGIN").format(role))
        connection.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {}").format(role))
        connection.execute(sql.SQL("ALTER DEFAULT PRIVILEGES GRANT SELECT ON TABLES TO {}").format(role))
    try:
        demand_password(admin_url, name)
        reader.rotate()
        yield reader
    finally:
        with suppress(psycopg.OperationalError), psycopg.connect(admin_url, autocommit=True) as connection:
            reader.end_sessions()
            connection.execute(sql.SQL("DROP OWNED BY {}").format(role))
            connection.execute(sql.SQL("DROP ROLE {}").format(role))


def demand_password(admin_url: str, role: str) -> None:
    """Put a line for ``role`` at the top of ``pg_hba.conf``, by SQL alone, so that it works in a container as well."""
    with psycopg.connect(admin_url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT current_setting('hba_file'), pg_read_file(current_setting('hba_file'))"
        ).fetchone()
        assert row is not None
        path, text = row
        # Without tabs, which COPY would write as an escape.
        lines = [f"host all {role} all scram-sha-256", *text.expandtabs().splitlines()]
        connection.execute(
            sql.SQL("COPY (SELECT unnest({}::text[])) TO {}").format(sql.Literal(lines), sql.Literal(path))
        )
        connection.execute("SELECT pg_reload_conf()")
