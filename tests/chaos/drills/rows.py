"""A table in which every row contains its version, so that an answer shows its publication."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from urllib.parse import urlsplit

import psycopg

from definition_server.catalog.definition import DEFAULT_INTERFACE, DEFAULT_TYPE, content_fields, content_hash
from definition_server.catalog.restore_sql import CREATE_TABLE_SQL

_TAG = re.compile(rb"# (\w+) of version (\d+)\n")

# Python's `code` and PostgreSQL's must be the same text.
_CODE_SQL = "'# ' || name || ' of version ' || %(version)s::text || E'\\n' || repeat('x', %(size)s)"
TABLE = "obex_dapl_functions"


def names(rows: int) -> list[str]:
    """The commands of a table of ``count`` rows."""
    return [f"command{number:06d}" for number in range(rows)]


def code(name: str, version: int, size: int) -> bytes:
    """The code of ``name`` in that version, with ``size`` octets of filling."""
    return f"# {name} of version {version}\n".encode() + b"x" * size


def version_in(name: str, found: bytes) -> str | None:
    """The version in the code of ``name``; None if the code has no version, or has another name."""
    tag = _TAG.match(found)
    if tag is None or tag[1] != name.encode():
        return None
    return tag[2].decode()


def definition_hash(name: str, kind: str, interface: str, source: bytes) -> str:
    """The hash that the wire's contract gives a definition; ``source`` is unsigned."""
    return content_hash(content_fields(name.encode(), kind.encode(), interface.encode(), source)).decode()


def version_hash(pairs: list[tuple[str, str]]) -> str:
    """SHA-256 over (name, hash), in name order."""
    digest = hashlib.sha256()
    for name, value in sorted((name.encode(), value.encode()) for name, value in pairs):
        digest.update(b"%b\0%b" % (name, value))
    return digest.hexdigest()


@lru_cache(maxsize=64)
def expected_hash(version: int, rows: int, size: int) -> str:
    """The ``version_hash`` of a whole catalogue of that version."""
    kind, interface = DEFAULT_TYPE.decode(), DEFAULT_INTERFACE.decode()
    return version_hash(
        [(name, definition_hash(name, kind, interface, code(name, version, size))) for name in names(rows)]
    )


class VersionedTable:
    """``obex_dapl_functions`` with ``rows`` commands, all of one version. One transaction writes a new version to all
    rows."""

    def __init__(self, url: str, *, rows: int = 100, size: int = 200) -> None:
        """Create and fill the table in the database of ``url``; the role of the URL must have the privileges."""
        self.url = url
        self.rows = rows
        self.size = size
        self.version = 0
        self.written: list[str] = []
        self.create()

    @property
    def names(self) -> list[str]:
        """The commands."""
        return names(self.rows)

    @property
    def database(self) -> str:
        """The name of the table."""
        return urlsplit(self.url).path[1:]

    def run(self, statement: str, parameters: object = None) -> None:
        """One statement in a transaction of its own."""
        with psycopg.connect(self.url, autocommit=True, connect_timeout=5) as connection:
            connection.execute(statement, parameters)

    def value(self, query: str, parameters: object = None) -> object:
        """The first column of the first row of the result; None if there is no row."""
        with psycopg.connect(self.url, autocommit=True, connect_timeout=5) as connection:
            row = connection.execute(query, parameters).fetchone()
            return None if row is None else row[0]

    def create(self) -> None:
        """Make the table and fill it with the next version."""
        self.run(CREATE_TABLE_SQL)
        self.fill()

    def fill(self) -> str:
        """Replace all rows by those of the next version. Returns its tag."""
        version = self.version + 1
        with psycopg.connect(self.url, connect_timeout=5) as connection:
            connection.execute(f"DELETE FROM {TABLE}")
            connection.execute(
                f"INSERT INTO {TABLE} (name, code) SELECT name, {_CODE_SQL} FROM "
                "(SELECT 'command' || lpad(n::text, 6, '0') AS name FROM generate_series(0, %(rows)s - 1) n) numbered",
                {"version": version, "size": self.size, "rows": self.rows},
            )
            return self._committed(version)

    def advance(self) -> str:
        """Write the next version into all rows, in one transaction. Returns its tag."""
        version = self.version + 1
        with psycopg.connect(self.url, connect_timeout=5) as connection:
            connection.execute(f"UPDATE {TABLE} SET code = {_CODE_SQL}", {"version": version, "size": self.size})
            return self._committed(version)

    def _committed(self, version: int) -> str:
        """Record the version before the transaction of this block commits, because the version may be served a moment
        later."""
        self.version = version
        self.written.append(str(version))
        return str(version)
