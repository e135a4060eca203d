"""The table ``obex_dapl_functions`` in a test's own database."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from tests.support.providers import DatabaseServer, create_database, drop_database

from definition_server.catalog.restore_sql import CREATE_TABLE_SQL

COLUMNS = ("name", "type", "interface", "code")

RowValues = tuple[str | None, str | None, str | None, str | None]


class Table:
    """Changes rows directly in the table, as an operator may do."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.run(CREATE_TABLE_SQL)

    def run(self, statement: str, parameters: Any = None) -> None:
        """One statement in a transaction of its own."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(statement, parameters)

    def add(self, rows: Iterable[RowValues]) -> None:
        """Insert (name, type, interface, code)."""
        with (
            psycopg.connect(self.url) as connection,
            connection.cursor() as cursor,
            cursor.copy(f"COPY obex_dapl_functions({','.join(COLUMNS)}) FROM STDIN") as copy,
        ):
            for row in rows:
                copy.write_row(row)

    def add_commands(self, count: int, size: int = 200, start: int = 0) -> None:
        """``count`` plausible rows named ``command<number>`` with about ``size`` bytes of code each."""
        line = "value = args.get('target')\n"

        def code(number: int) -> str:
            head = f"# {number}\n"
            whole = head + line * ((size - len(head)) // len(line))
            return whole + "#" * (size - len(whole))  # as a comment, because half a line would not compile

        self.add(
            (f"command{n}", "function", '[{"item": "target", "type": "var"}]', code(n))
            for n in range(start, start + count)
        )


@contextmanager
def shared_table(server: DatabaseServer, name: str) -> Iterator[Table]:
    """A table in a database of that name, for more than one test. Test processes that run side by side do not share
    it."""
    name = f"shared_{name}_{os.getpid()}"
    yield Table(create_database(server.url, name))
    drop_database(server.url, name)
