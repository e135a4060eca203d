"""The table ``obex_dapl_functions`` as a source. The one place that imports psycopg.

Everything happens in read-only transactions at REPEATABLE READ, so that the fingerprint and the rows are of one
moment: a writer in between changes the next cycle, not this one. No lock is taken but the ACCESS SHARE of a SELECT.

A dead database shows in three ways, and each has its limit. *Refused or failing*: an error, at once. *Packets go
nowhere*: ``connect_timeout``, then TCP keepalive and ``tcp_user_timeout`` (``tcp(7)``). *The host acknowledges but the
server does nothing* (half-open; no TCP timer sees it): every wait has a deadline of its own here, a little above the
server's ``statement_timeout``. After any error the connection is dropped and the next cycle makes a new one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncServerCursor, IsolationLevel, errors
from psycopg.types.string import ByteaBinaryLoader

from definition_server.catalog.definition import Row
from definition_server.control_plane.source import Reading, SourceError
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")
AnyCursor = TypeVar("AnyCursor", AsyncCursor[Any], AsyncServerCursor[Any])

TABLE = "obex_dapl_functions"

# One row comes back, whatever the size of the table, and no text column is read. Every INSERT and UPDATE writes a row
# version with a new (ctid, xmin); DELETE and TRUNCATE take versions away. The sum of 64-bit hashes does not depend on
# the order of the scan. The attributes are there because ALTER TABLE changes what a row says without touching the row
# (a column dropped, or added with a default). The file node changes with TRUNCATE and with a table dropped and made
# again; the start time tells servers apart (a standby that took over may have given the same transaction number to
# other work).
FINGERPRINT_SQL: LiteralString = f"""
SELECT concat_ws('/',
    count(*),
    coalesce(sum(hashtextextended(ctid::text || ':' || xmin::text, 0)), 0),
    (SELECT sum(hashtextextended(ctid::text || ':' || xmin::text, 0))
        FROM pg_attribute WHERE attrelid = '{TABLE}'::regclass),
    pg_relation_filenode('{TABLE}'::regclass),
    extract(epoch FROM pg_postmaster_start_time()),
    pg_is_in_recovery())
FROM {TABLE}
"""

# Casts: the columns' types may differ from what we were told (json, varchar); the wire wants text.
ROWS_SQL: LiteralString = f"SELECT id::bigint, name::text, type::text, interface::text, code::text FROM {TABLE}"

_BATCH_ROWS = 1000
_CLIENT_MARGIN_SECONDS = 1.0
"""How much later than the server's own timeout a wait is given up here, so that the server's clear error wins."""

_LOCK_SHARE = 0.8

_REMEDIES: tuple[tuple[type[psycopg.Error], str], ...] = (
    (errors.UndefinedTable, f"create the table {TABLE}, or check the database's name and the search_path"),
    (errors.UndefinedColumn, f"{TABLE} lacks a column that definitions are read from"),
    (errors.InsufficientPrivilege, f"GRANT SELECT ON {TABLE} to the server's role"),
    (errors.QueryCanceled, "was it slower than STATEMENT_TIMEOUT_SECONDS?"),
    (errors.LockNotAvailable, f"another session holds a lock on {TABLE}"),
)


class PostgresSource:
    """`DefinitionSource` on PostgreSQL. One connection, made when needed and kept between cycles."""

    def __init__(self, url: str, *, connect_timeout: float, statement_timeout: float) -> None:
        """Timeouts in seconds. Nothing is connected yet."""
        self._url = url
        self._connect_timeout = connect_timeout
        self._statement_timeout = statement_timeout
        self._connection: AsyncConnection[Any] | None = None
        self._connections = 0

    async def use_url(self, url: str) -> None:
        """Connect to ``url`` from the next reading on (rotated credentials)."""
        if url != self._url:
            self._url = url
            await self.close()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Reading]:
        """See `DefinitionSource.read`."""
        try:
            if self._connection is None:
                self._connection = await self._connect()
                self._connections += 1
            # Part of the fingerprint, so that the first look over a new connection always reads: a server that
            # crashed may have lost a commit (synchronous_commit=off) and given its transaction number to another.
            reading = _Reading(self._connection, self._limited, str(self._connections))
            await reading.begin(self._statement_timeout)
            yield reading
            await self._limited(self._connection.rollback())
        except (psycopg.Error, OSError, TimeoutError, UnicodeError) as error:
            # libpq tells no SQLSTATE of a connection that failed, so there is one remedy for all of its reasons.
            advice = (
                _remedy(error) if self._connection else "check host, port, user, password and database in DATABASE_URL"
            )
            await self.close()
            raise SourceError(_told(error, advice)) from error
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Drop the connection, if any."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _connect(self) -> AsyncConnection[Any]:
        limit = self._connect_timeout
        connection = await self._limited(
            AsyncConnection.connect(
                self._url,
                # libpq counts whole seconds and allows no fewer than two; the deadline around it is exact.
                connect_timeout=max(2, round(limit)),
                client_encoding="utf8",
                application_name="avap-definition-server",
                keepalives=1,
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=int(self._statement_timeout * 1000),
            ),
            limit,
        )
        if connection.info.parameter_status("server_encoding") == "SQL_ASCII":
            # Such a database holds any bytes; converting them would fail the whole reading for one bad row.
            await connection.set_autocommit(True)
            await self._limited(connection.execute("SET client_encoding TO 'SQL_ASCII'"))
            await connection.set_autocommit(False)
        await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        await connection.set_read_only(True)
        return connection

    async def _limited(self, work: Coroutine[Any, Any, T], limit: float | None = None) -> T:
        """Wait for ``work``, but not forever.

        Where it is given up, by time or by cancellation, the socket is closed first: psycopg would otherwise ask the
        server to cancel and wait for it twice five seconds, which a server that does nothing does not deserve.

        Raises:
            TimeoutError: after ``limit`` seconds (default: the statement timeout and a margin).
        """
        seconds = self._statement_timeout + _CLIENT_MARGIN_SECONDS if limit is None else limit
        task = asyncio.ensure_future(work)
        try:
            done, _ = await asyncio.wait((task,), timeout=seconds)
        finally:
            if not task.done():
                if self._connection is not None:
                    self._connection.pgconn.finish()
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if not done:
            raise TimeoutError(f"no answer from the database within {seconds:g} s")
        return task.result()


class _Reading:
    """`Reading` in an open transaction."""

    def __init__(
        self,
        connection: AsyncConnection[Any],
        limited: Callable[[Coroutine[Any, Any, Any]], Coroutine[Any, Any, Any]],
        prefix: str,
    ) -> None:
        self._connection = connection
        self._limited = limited
        self.fingerprint = prefix

    async def begin(self, statement_timeout: float) -> None:
        """Start the transaction and take the fingerprint."""
        limits = {
            "statement": str(int(statement_timeout * 1000)),
            # Shorter, so that a lock is told as what it is.
            "lock": str(int(statement_timeout * 1000 * _LOCK_SHARE)),
        }
        # set_config with is_local: a pooler between us and the server then hands nothing on to the next client.
        await self._limited(
            self._connection.execute(
                "SELECT set_config('statement_timeout', %(statement)s, true), "
                "set_config('lock_timeout', %(lock)s, true)",
                limits,
                prepare=False,
            )
        )
        cursor = _raw(self._connection.cursor(binary=True))
        await self._limited(cursor.execute(FINGERPRINT_SQL, prepare=False))
        row = await cursor.fetchone()
        self.fingerprint += "" if row is None else f"/{row[0].decode()}"

    async def batches(self) -> AsyncIterator[list[Row]]:
        """See `Reading.batches`."""
        async with _raw(self._connection.cursor(name="definitions")) as cursor:
            await self._limited(cursor.execute(ROWS_SQL, binary=True))
            while rows := await self._limited(cursor.fetchmany(_BATCH_ROWS)):
                yield [Row._make(row) for row in rows]


def _raw(cursor: AnyCursor) -> AnyCursor:
    """``cursor``, giving text as bytes.

    Not decoded, because the builder wants UTF-8 bytes, and because a SQL_ASCII database may hold what is none: that is
    to cost the one row, not the cycle.
    """
    cursor.adapters.register_loader("text", ByteaBinaryLoader)
    return cursor


def _remedy(error: BaseException) -> str | None:
    return next((remedy for cls, remedy in _REMEDIES if isinstance(error, cls)), None)


def _told(error: BaseException, advice: str | None) -> str:
    """``error`` for the log: one line, the cause and, where there is one, what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if advice is None else f"{text} ({advice})"
