"""The table ``obex_dapl_functions`` as a source of definitions. Only this module imports psycopg.

All reads are in read-only transactions at REPEATABLE READ, so that the fingerprint and the rows are of the same moment:
a concurrent write affects the next cycle, not the present one. The only lock taken is the ACCESS SHARE of a SELECT, and
it is taken before the snapshot. The statements and the order of reading are in `table_reading`.

A database can be down in three ways, and each has a time limit. *It refuses or fails*: an error, at once. *Packets are
lost*: ``connect_timeout``, then TCP keepalive and ``tcp_user_timeout`` (``tcp(7)``). *The host acknowledges, but the
server does nothing* (half-open; no TCP timer detects this): every wait here has its own deadline, a little above the
server's ``statement_timeout``. After any error the connection is closed, and the next cycle opens a new one.

The time to connect is divided between hosts and addresses, names are resolved in threads of our own, and no text of
libpq leaves this module with a secret in it: see `database_address`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg import AsyncConnection, AsyncCursor, AsyncServerCursor, IsolationLevel, errors, pq
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.string import ByteaBinaryLoader
from psycopg.waiting import Ready, Wait

from definition_server.catalog.definition import Row
from definition_server.control_plane.database_address import (
    DatabaseAddress,
    Host,
    NameResolver,
    Redaction,
    address_of,
    hosts_of,
    misplaced_fault,
    parse_fault,
    shares,
)
from definition_server.control_plane.eager_reading import eager
from definition_server.control_plane.source import Ranges, Reading, ReadLimits, SourceError
from definition_server.control_plane.table_reading import (
    EXISTS_SQL,
    ROW_OVERHEAD,
    SETTINGS_SQL,
    SHAPE_SQL,
    TABLE,
    Plan,
    Relation,
    bytecode_fault,
    classes,
    lock_sql,
    rows_of_batch,
    runs,
    timeouts_sql,
    wait_sql,
)
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)

# psycopg logs the parameters and texts of every attempt, before we can mask the secrets in them.
logging.getLogger("psycopg").setLevel(logging.CRITICAL)

T = TypeVar("T")
AnyCursor = TypeVar("AnyCursor", AsyncCursor[Any], AsyncServerCursor[Any])

_CLIENT_MARGIN_SECONDS = 1.0
"""Seconds between the server's own timeout and ours, so that the server's clear error comes first."""

_TID_RANGE_SCANS = 140000
"""The first version of PostgreSQL that has TID range scans."""

_NEW_CONNECTIONS = 2
"""The most new connections in a cycle. A short idle_session_timeout may close even a new connection before its first
statement.
"""

_EVERYWHERE: list[list[tuple[int, int]]] = [[]]
"""Stands for all blocks: one statement without limits."""

_NO_DIRECTORY = "/nonexistent-definition-server"
"""A directory without a Unix socket, so that a connection fails at once."""

_HIDDEN = (
    "with it only a part of the table would be served: ALTER ROLE … BYPASSRLS for the server's role, or ALTER TABLE … "
    "DISABLE ROW LEVEL SECURITY"
)

_FAULTS: tuple[tuple[type[Exception], Reason, str | None], ...] = (
    (
        errors.UndefinedTable,
        Reason.TABLE_MISSING,
        f"create the table {TABLE}, or check the database's name and the search_path",
    ),
    (errors.UndefinedColumn, Reason.COLUMN_MISSING, f"{TABLE} lacks a column that definitions are read from"),
    (errors.InsufficientPrivilege, Reason.PERMISSION_DENIED, f"GRANT SELECT ON {TABLE} to the server's role"),
    (errors.QueryCanceled, Reason.STATEMENT_TIMEOUT, "was it slower than STATEMENT_TIMEOUT_SECONDS?"),
    (errors.LockNotAvailable, Reason.TABLE_LOCKED, f"another session holds a lock on {TABLE}"),
    (TimeoutError, Reason.DATABASE_TIMEOUT, None),
    (psycopg.InterfaceError, Reason.DATABASE_CONNECTION_LOST, None),
    (psycopg.OperationalError, Reason.DATABASE_CONNECTION_LOST, None),
)


def url_fault(url: str) -> str | None:
    """The reason why libpq would not connect to ``url``, without quoting it; None if only an attempt can show it.

    libpq itself checks the URL and its service file: we make it connect to a socket that does not exist. It checks all
    parameters before it sends the first octet.
    """
    try:
        parameters = conninfo_to_dict(url)
    except (psycopg.Error, UnicodeError) as error:
        return parse_fault(str(error))
    if fault := misplaced_fault(parameters):
        return fault
    try:
        hosts = hosts_of({**parameters, **_effective(url)})
    except ValueError as error:
        return str(error)
    nowhere = {"host": ",".join([_NO_DIRECTORY] * len(hosts)), "hostaddr": ""}
    connection = pq.PGconn.connect_start(make_conninfo("", **{**parameters, **nowhere}).encode())
    try:
        text = connection.error_message.decode(errors="replace")
    finally:
        connection.finish()
    return None if _NO_DIRECTORY in text else redaction(url).clean(text)


def redaction(url: str) -> Redaction:
    """A redaction that masks the secrets of ``url``, and those that libpq adds from ``PGPASSWORD`` and the service
    file."""
    try:
        return Redaction(url, (conninfo_to_dict(url), _effective(url)))
    except (psycopg.Error, UnicodeError):
        return Redaction(url, ())


def database_address(url: str) -> DatabaseAddress | None:
    """The host, port, name and role of ``url``, with libpq's additions; None if they cannot be distinguished from a
    secret."""
    try:
        parameters = conninfo_to_dict(url)
        return None if misplaced_fault(parameters) else address_of({**parameters, **_effective(url)})
    except (psycopg.Error, ValueError):
        return None


def _effective(url: str) -> dict[str, str]:
    """The parameters of a connection to ``url``, with those that libpq adds from its variables and its service file.

    Raises:
        psycopg.Error: if ``url`` cannot be parsed.
    """
    # libpq reports the parameters only for a connection. The connection made here is refused because of its sslmode,
    # before any name is resolved.
    text = make_conninfo("", **{**conninfo_to_dict(url), "sslmode": "unknown"})
    connection = pq.PGconn.connect_start(text.encode())
    try:
        found = {option.keyword.decode(): option.val.decode() for option in connection.info if option.val}
    finally:
        connection.finish()
    return {name: value for name, value in found.items() if name != "sslmode"}


class PostgresSource:
    """`DefinitionSource` on PostgreSQL. One connection, opened when needed and kept between cycles."""

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float,
        statement_timeout: float,
        limits: ReadLimits | None = None,
        resolver: NameResolver | None = None,
    ) -> None:
        """Timeouts are in seconds. No connection is opened yet."""
        self._url = url
        self._redaction = redaction(url)
        self.address = database_address(url)
        """The database that is read; None if the URL cannot be used."""
        self.connected_to: str | None = None
        """The host that last accepted our connection; None if no host has."""
        self._logged: tuple[str, ...] | None = None
        self._connect_timeout = connect_timeout
        self._statement_timeout = statement_timeout
        self._resolver = resolver or NameResolver()
        self._connection: AsyncConnection[Any] | None = None
        self._connections = 0
        self._locks = _Locks(self._limited, timeouts_sql(statement_timeout))
        self._limits = limits or ReadLimits()
        self._readings = 0
        self._mistrust: str | None = None
        self._bytecode_fault: str | None = None

    async def use_url(self, url: str) -> None:
        """Connect to ``url`` from the next reading on (rotated credentials)."""
        if url != self._url:
            self._url = url
            self._redaction = redaction(url)
            self.address = database_address(url)
            self.connected_to = None
            await self.close()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[Reading]:
        """See `DefinitionSource.read`."""
        try:
            reading = await self._begin()
            yield reading
            await self._limited(reading.end())
        except (psycopg.Error, OSError, TimeoutError, UnicodeError) as error:
            reason, advice = _judge(error)
            await self.close()
            raise SourceError(self._text(error, advice), reason) from None
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Close the connection, if any."""
        connection, self._connection = self._connection, None
        self._locks.forget()
        if connection is not None:
            await connection.close()

    async def _begin(self) -> _Reading:
        """A transaction on the kept connection, or on a new one.

        A connection that idled between two cycles may have been closed meanwhile: by ``idle_session_timeout``, a
        pooler, a failover. This is not a failure of the database, so the cycle continues with a new connection.
        """
        attempts = _NEW_CONNECTIONS + (self._connection is not None)
        while True:
            attempts -= 1
            connection, first = self._connection, self._connection is None
            if connection is None:
                connection = self._connection = await self._connect()
                self._connections += 1
            try:
                return await self._transaction(connection, first=first)
            except psycopg.Error:
                # `use_url` may have closed it, so that `self._connection` is None.
                if not connection.closed or not attempts:
                    raise
                await self.close()

    async def _transaction(self, connection: AsyncConnection[Any], *, first: bool) -> _Reading:
        # The connection's number is part of the fingerprint, so that the first cycle on a new connection always reads
        # the table: a server that crashed may have lost a commit (synchronous_commit=off) and reused its transaction
        # number.
        while True:
            self._readings += 1
            await self._locks.take(connection)
            reading = _Reading(connection, self._limited, self._limits, f"{self._connections}", self._readings)
            await reading.begin(first=first)
            if self._locks.suffice(reading.plan.tables):
                break
            await self._limited(reading.end())
        self._report(reading.plan.mistrust, reading.bytecode_fault)
        return reading

    def _report(self, mistrust: str | None, bytecode_fault: str | None) -> None:
        """Log how the tables are read, if that has changed."""
        if mistrust is not None and mistrust != self._mistrust:
            log.warning("The table is read whole in every cycle", reason=mistrust)
        if bytecode_fault is not None and bytecode_fault != self._bytecode_fault:
            log.warning("No bytecode is served", reason=bytecode_fault)
        self._mistrust, self._bytecode_fault = mistrust, bytecode_fault

    async def _connect(self) -> AsyncConnection[Any]:
        """Connect to the first host that accepts, within the connect timeout.

        Raises:
            SourceError: names the failure at each host.
        """
        fault = url_fault(self._url)
        if fault is not None:
            raise SourceError(f"DATABASE_URL cannot be used: {fault}", Reason.DATABASE_URL_UNUSABLE)
        parameters = _effective(self._url)
        passes = _passes(hosts_of(parameters), parameters.get("target_session_attrs"))
        clock = asyncio.get_running_loop().time
        faults: list[str] = []
        reasons: set[Reason] = set()
        for (host, session), seconds in shares(passes, clock() + self._connect_timeout, clock):
            end = clock() + seconds
            try:
                addresses = await self._addresses(host, seconds)
            except (OSError, TimeoutError) as error:
                faults.append(self._redaction.clean(str(error)))
                reasons.add(_reason_of_attempt(error))
                continue
            for address, share in shares(addresses, end, clock):
                try:
                    connection = await self._connect_to(host, address, session, share)
                except Exception as error:  # noqa: BLE001 - any error of libpq; its text may hold the password
                    where = f"{host} at {address}: " if len(passes) > 1 or len(addresses) > 1 else ""
                    faults.append(where + self._text(error, None))
                    reasons.add(_reason_of_attempt(error))
                else:
                    self._note_connected(str(host), connection)
                    return connection
        # libpq gives no SQLSTATE for a failed connection attempt, so there is one remedy for all reasons.
        advice = "check host, port, user, password and database in DATABASE_URL"
        # The reason is that of the failure for which the operator can do most.
        order = (Reason.DATABASE_REFUSED_LOGIN, Reason.DATABASE_UNREACHABLE, Reason.DATABASE_TIMEOUT)
        reason = next((each for each in order if each in reasons), Reason.DATABASE_UNREACHABLE)
        raise SourceError(f"{'; '.join(dict.fromkeys(faults))} ({advice})", reason)

    def _note_connected(self, host: str, connection: AsyncConnection[Any]) -> None:
        """Log the host of the connection, unless it is the one that was logged last."""
        self.connected_to = host
        info = connection.info
        now = (host, info.hostaddr, info.dbname, info.user)
        if now != self._logged:
            log.info("Connected to the database", host=host, address=now[1], database=now[2], role=now[3])
            self._logged = now

    async def _addresses(self, host: Host, seconds: float) -> list[str]:
        if not host.needs_name_service:
            return [host.address or (host.name if not host.name.startswith(("/", "@")) else "")]
        # Half of the share, so that a slow name service leaves time to connect.
        return await self._resolver.addresses(host.name, seconds / 2 if seconds else 0.0)

    async def _connect_to(self, host: Host, address: str, session: str | None, seconds: float) -> AsyncConnection[Any]:
        """One attempt, at one address."""
        connection = await self._limited(
            _Connection.connect(
                self._url,
                host=host.name,
                hostaddr=address,
                port=host.port,
                target_session_attrs=session,
                # libpq takes whole seconds, at least two; the deadline around it is exact.
                connect_timeout=max(2, round(seconds)),
                client_encoding="utf8",
                application_name="avap-definition-server",
                keepalives=1,
                keepalives_idle=10,
                keepalives_interval=5,
                keepalives_count=3,
                tcp_user_timeout=int(self._statement_timeout * 1000),
            ),
            seconds,
        )
        try:
            await self._prepare(connection)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _prepare(self, connection: AsyncConnection[Any]) -> None:
        if connection.info.parameter_status("server_encoding") == "SQL_ASCII":
            # A database without an encoding may hold any octets. If they were converted, one bad row would make the
            # whole reading fail.
            await connection.set_autocommit(True)
            await self._limited(connection.execute("SET client_encoding TO 'SQL_ASCII'"))
            await connection.set_autocommit(False)
        await connection.set_isolation_level(IsolationLevel.REPEATABLE_READ)
        await connection.set_read_only(True)

    def _text(self, error: BaseException, advice: str | None) -> str:
        """``error`` for the log, in one line and without secrets: the cause and, if known, the remedy."""
        text = self._redaction.clean(str(error)) or type(error).__name__
        return text if advice is None else f"{text} ({advice})"

    async def _limited(self, work: Awaitable[T], limit: float | None = None) -> T:
        """Wait for ``work`` until its time limit.

        When the wait ends early, by timeout or cancellation, the socket is closed first. Otherwise psycopg would send
        the server a cancel request and wait twice five seconds for a server that does nothing.

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
            raise TimeoutError(f"no answer from the database within {seconds:.3g} s")
        return task.result()


class _Connection(AsyncConnection[Any]):
    """A connection that reads a large answer from its socket in fewer iterations of the event loop."""

    async def wait(self, gen: Any, *args: Any, **options: Any) -> Any:
        """See `AsyncConnection.wait`: consume ``gen``, the steps of one operation."""
        steps: Any = eager(gen, self.pgconn.socket, to_read=Wait.R, readable=Ready.R)
        return await super().wait(steps, *args, **options)


class _Locks:
    """Locks the tables of a reading before the reading takes its snapshot: see `table_reading`."""

    def __init__(self, limited: Callable[[Awaitable[Any]], Coroutine[Any, Any, Any]], timeouts: LiteralString) -> None:
        """``timeouts``: the local settings of each transaction."""
        self._limited = limited
        self._timeouts = timeouts
        self._tables = [TABLE]
        self._waited_for: list[str] = []
        """Tables that this connection cannot lock: materialized views, foreign tables, views of which the role may read
        only some columns, and some views of tables that the view's owner may not read."""

    def forget(self) -> None:
        """The next connection may be to another server, or with other privileges."""
        self._tables, self._waited_for = [TABLE], []

    async def take(self, connection: AsyncConnection[Any]) -> None:
        """Begin a transaction, without a snapshot and with as many locks as possible."""
        while True:
            if self._waited_for:
                # At least wait, in a transaction that ends, for others that hold a lock.
                await self._run_with_most(connection, wait_sql, [*self._waited_for])
                await self._limited(connection.rollback())
            refused = await self._run_with_most(connection, lock_sql, self._tables)
            if not refused:
                return
            await self._limited(connection.rollback())
            self._waited_for += refused

    def suffice(self, tables: Collection[str]) -> bool:
        """Whether `take` has locked or waited for all ``tables``; if not, it does so next time."""
        before = {*self._tables, *self._waited_for}
        self._tables = [table for table in tables if table not in self._waited_for]
        self._waited_for = [table for table in tables if table in self._waited_for]
        return set(tables) <= before

    async def _run_with_most(
        self, connection: AsyncConnection[Any], statement: Callable[[list[str]], LiteralString], tables: list[str]
    ) -> list[str]:
        """Run ``statement`` with as many ``tables`` as possible. The others are removed from ``tables``.

        Returns:
            Those that exist, but for which it is refused.
        """
        refused = []
        while True:
            try:
                await self._run(connection, statement(tables))
            except (errors.UndefinedTable, errors.InsufficientPrivilege, errors.WrongObjectType) as error:
                await self._limited(connection.rollback())
                table = tables.pop()
                if not isinstance(error, errors.UndefinedTable):
                    refused.append(table)
            else:
                return refused

    async def _run(self, connection: AsyncConnection[Any], statement: LiteralString) -> None:
        # A message without parameters may have several statements, and an empty one.
        await self._limited(connection.execute(f"{self._timeouts}; {statement}", prepare=False))


class _Reading:
    """`Reading` in an open transaction."""

    def __init__(
        self,
        connection: AsyncConnection[Any],
        limited: Callable[[Awaitable[Any]], Coroutine[Any, Any, Any]],
        limits: ReadLimits,
        prefix: str,
        number: int,
    ) -> None:
        """``number``: the unique number of this reading."""
        self._connection = connection
        self._limited = limited
        self._limits = limits
        self._number = number
        self.fingerprint = prefix
        self.plan = Plan(None, None)
        self.bytecode_fault: str | None = None
        self._state = self._basis = ""
        self._lacks_versions = False
        """Whether the sum over the row versions was left out at the beginning."""
        self._before: Ranges | None = None
        self._ranges: Ranges | None = None

    async def end(self) -> None:
        """End the transaction."""
        await self._connection.rollback()

    async def begin(self, *, first: bool = False) -> None:
        """Take the fingerprint, with the first statements that need a snapshot.

        Args:
            first: Whether this is the first reading of the connection, so that the fingerprint differs from every
                earlier one. If `ranges` gives the fingerprint too, the scan that gives only the fingerprint is saved.
        """
        await self._limited(self._connection.execute(SETTINGS_SQL, prepare=False))
        facts, state = await self._row(SHAPE_SQL)
        definitions, bytecode = Relation.parse(None if facts is None else facts.decode())
        if bytecode is not None:
            self.bytecode_fault = bytecode_fault(bytecode)
        tid_ranges = self._connection.info.server_version >= _TID_RANGE_SCANS
        self.plan = Plan(definitions, None if self.bytecode_fault else bytecode, tid_ranges=tid_ranges)
        this_reading_alone = f"{self.fingerprint}/reading {self._number}"
        if self.plan.mistrust is not None:
            await self._limited(self._connection.execute(EXISTS_SQL, prepare=False))
            self.fingerprint = this_reading_alone
            return
        self._state = f"{self.fingerprint}/{state.decode()}"
        self._lacks_versions = first and self.plan.versions_by_range
        if self._lacks_versions:
            self._basis, self.fingerprint = f"{self._state}/", this_reading_alone
            return
        (versions,) = await self._row(self.plan.versions_sql())
        _, _, bytecode_versions = versions.decode().partition("/")
        self._basis = f"{self._state}/{bytecode_versions}"
        self.fingerprint = f"{self._state}/{versions.decode()}"

    async def _row(self, statement: LiteralString) -> tuple[Any, ...]:
        """The first row of ``statement``."""
        cursor = _raw(self._connection.cursor(binary=True))
        await self._limited(cursor.execute(statement, prepare=False))
        return await cursor.fetchone() or ()

    async def ranges(self, before: Ranges | None) -> Ranges | None:
        """See `Reading.ranges`."""
        if self.plan.blocks is None:
            return None
        width = self.plan.width(None if before is None else before.width)
        self.plan.range_blocks = width
        if self._lacks_versions:
            self._ranges = await self._ranges_and_sizes(width)
            return self._ranges
        found = await self._all(self.plan.ranges_sql(width))
        versions = {number: f"{rows}:{hashes}" for number, rows, hashes in found}
        self._before, self._ranges = before, Ranges(f"{self._basis}/{width}", versions, width)
        return self._ranges

    async def _ranges_and_sizes(self, width: int) -> Ranges:
        """The ranges, with the sizes of all, and with them the fingerprint of the table."""
        sizes: dict[int, dict[int, tuple[int, int]]] = {}
        sums: dict[int, tuple[int, int]] = {}
        statement = self.plan.ranges_and_sizes_sql(self._limits.definition, width)
        for number, size, rows, octets, hashes in await self._all(statement):
            sizes.setdefault(number, {})[size] = rows, octets
            counted, summed = sums.get(number, (0, 0))
            sums[number] = counted + rows, summed + int(hashes)
        versions = {number: f"{rows}:{hashes}" for number, (rows, hashes) in sums.items()}
        rows, hashes = (sum(parts) for parts in zip(*sums.values(), strict=True)) if sums else (0, 0)
        # The same text as `versions_sql` gives for the same row versions.
        self.fingerprint = f"{self._state}/{rows}:{hashes}"
        return Ranges(f"{self._basis}/{width}", versions, width, dict(sizes))

    async def batches(self, ranges: Collection[int] | None = None) -> AsyncIterator[list[Row]]:
        """See `Reading.batches`."""
        width = self.plan.range_blocks
        parts = _EVERYWHERE if ranges is None or width is None else runs(ranges, width)
        for number in await self._classes(ranges, parts):
            too_large = number == len(classes(self._limits.definition))
            most = rows_of_batch(number, self._limits.definition)
            for blocks in parts:
                async with _raw(self._connection.cursor(name="definitions")) as cursor:
                    statement = self.plan.rows_sql(number, self._limits.definition, blocks)
                    await self._limited(cursor.execute(statement, binary=True))
                    async with aclosing(self._fetched(cursor, most)) as batches:
                        async for rows in batches:
                            yield self.plan.rows(rows, too_large=too_large)

    async def _fetched(self, cursor: AsyncServerCursor[Any], most: int) -> AsyncGenerator[list[tuple[Any, ...]], None]:
        """All rows of ``cursor``, up to ``most`` at a time. PostgreSQL prepares the next batch while one is used."""
        rows = await self._limited(cursor.fetchmany(most))
        while rows:
            following = asyncio.ensure_future(cursor.fetchmany(most))
            try:
                await asyncio.sleep(0)  # meanwhile the statement is sent
                yield rows
                del rows
                rows = await self._limited(following)
            finally:
                if not following.done():  # the caller stopped reading
                    self._connection.pgconn.finish()
                    following.cancel()
                await asyncio.gather(following, return_exceptions=True)

    async def _classes(self, ranges: Collection[int] | None, parts: list[list[tuple[int, int]]]) -> list[int]:
        """The classes of size that have rows: in ``ranges``, whose blocks are ``parts``, or in the whole table.

        Raises:
            SourceError: if all rows together are above the limit.
        """
        most = self._limits.definition
        if self._ranges is None:
            sizes = await self._all(self.plan.sizes_sql(most))
            self._check_size(sizes)
            return sorted(size[0] for size in sizes)
        if self._lacks_versions:  # `ranges` has counted them
            assert ranges is None, "nothing is known of this connection's rows"
            self._check_size([(size, *sums) for sizes in self._ranges.sizes.values() for size, sums in sizes.items()])
            return sorted({size for sizes in self._ranges.sizes.values() for size in sizes})
        found: dict[int, dict[int, tuple[int, int]]] = {}
        for blocks in parts:
            for number, size, rows, octets in await self._all(
                self.plan.sizes_of_ranges_sql(most, self._ranges.width, blocks)
            ):
                found.setdefault(number, {})[size] = rows, octets
        known = self._ranges.sizes
        if ranges is not None and self._before is not None:
            known |= {number: sizes for number, sizes in self._before.sizes.items() if number in self._ranges.versions}
        known |= found
        self._check_size([(size, *sums) for sizes in known.values() for size, sums in sizes.items()])
        return sorted({size for sizes in found.values() for size in sizes})

    async def _all(self, statement: LiteralString) -> list[tuple[Any, ...]]:
        """All rows of ``statement``."""
        cursor = self._connection.cursor(binary=True)
        await self._limited(cursor.execute(statement, prepare=False))
        return await cursor.fetchall()

    def _check_size(self, sizes: list[tuple[int, int, int]]) -> None:
        """Raise `SourceError` if all rows together exceed the limit. ``sizes``: (class, rows, octets)."""
        readable = len(classes(self._limits.definition))
        rows, octets = (sum(size[part] for size in sizes if size[0] < readable) for part in (1, 2))
        octets += rows * ROW_OVERHEAD
        if octets > self._limits.catalogue:
            raise SourceError(
                f"{TABLE}: the snapshot of its {rows:,} rows would have {octets:,} bytes, above MAX_CATALOG_BYTES "
                f"({self._limits.catalogue:,}); raise it, and the memory limit with it, or remove rows",
                Reason.CATALOGUE_TOO_LARGE,
            )


def _raw(cursor: AnyCursor) -> AnyCursor:
    """``cursor``, changed to return text as octets.

    Text is not decoded, because the builder needs UTF-8 octets. A SQL_ASCII database may also hold octets that are not
    UTF-8; only their row must then fail, not the whole cycle.
    """
    cursor.adapters.register_loader("text", ByteaBinaryLoader)
    return cursor


def _judge(error: BaseException) -> tuple[Reason, str | None]:
    """The reason why a reading failed, and the remedy, if there is one."""
    if isinstance(error, errors.InsufficientPrivilege) and error.diag.source_function == "check_enable_rls":
        return Reason.ROWS_HIDDEN, _HIDDEN
    found = ((reason, remedy) for cls, reason, remedy in _FAULTS if isinstance(error, cls))
    return next(found, (Reason.DATABASE_ERROR, None))


def _reason_of_attempt(error: BaseException) -> Reason:
    """The reason why an attempt to connect failed. libpq gives no SQLSTATE; a server's refusal contains FATAL."""
    if isinstance(error, TimeoutError):
        return Reason.DATABASE_TIMEOUT
    return Reason.DATABASE_REFUSED_LOGIN if "FATAL:" in str(error) else Reason.DATABASE_UNREACHABLE


def _passes(hosts: list[Host], session: str | None) -> list[tuple[Host, str | None]]:
    """The attempts to make: each host with the kind of session that it must offer.

    For ``prefer-standby``, libpq tries all hosts twice: first for a standby, then for any server. Each attempt here has
    only one host, so we repeat the list ourselves.
    """
    sessions = ("standby", "any") if session == "prefer-standby" else (session,)
    return [(host, asked) for asked in sessions for host in hosts]
