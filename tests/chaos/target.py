"""A running server that the drill did not start, and its database. Both are checked before a drill."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import LiteralString, cast

import grpc
import psycopg
from tests.chaos.drills.load import Job

from definition_server.catalog.builder import CatalogTooLarge, SnapshotBuilder
from definition_server.cli.channel import Server
from definition_server.cli.exits import CommandFailed, Exit, visible
from definition_server.cli.tls import Tls, advice
from definition_server.control_plane.postgres import PostgresSource
from definition_server.control_plane.source import SourceError
from definition_server.rpc import avap_pb2

REACH_SECONDS = 30.0
CONNECT_SECONDS = 5
STATEMENT_SECONDS = 60.0
APPLICATION = "avap-definition-server"
"""``application_name`` of the server's sessions."""

_MOST_NAMES = 2000
_OCTETS_PER_SECOND = 4_000_000
"""Octets per second that all ``SyncCatalog`` calls of the load may transfer."""
_RAREST_SYNC_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Target:
    """The catalogue that the target serves."""

    address: str
    key: str
    ca_file: str
    names: list[str]
    version_hash: str
    octets: int
    """Size of the whole catalogue."""

    def job(self, rate: float, connections: int) -> Job:
        """The load to offer: ``rate`` calls a second over twice ``connections``.

        A large catalogue is requested rarely or never: the drill's load must not be a fault itself.
        """
        wanted = rate / 20
        affordable = _OCTETS_PER_SECOND / max(1, self.octets)
        every = round(rate / min(wanted, affordable)) if affordable * _RAREST_SYNC_SECONDS > 2 * connections else 0
        step = max(1, len(self.names) // _MOST_NAMES)
        return Job(
            self.address, self.key, names=self.names[::step], rate=rate, connections=connections, sync_every=every,
            ca_file=self.ca_file,
        )  # fmt: skip


def reach(address: str, key: str, ca_file: str) -> Target:
    """Request the catalogue once.

    Raises: CommandFailed: no answer (69), the key is refused (4), the catalogue is empty (69).
    """
    tls = Tls(Path(ca_file).read_bytes(), None, None) if ca_file else None
    try:
        with Server(address, key, REACH_SECONDS, tls).open_channel() as channel:
            call = channel.unary_unary(
                "/avap.DefinitionEngine/SyncCatalog",
                request_serializer=avap_pb2.Empty.SerializeToString,
                response_deserializer=avap_pb2.CatalogResponse.FromString,
            )
            answer = call(avap_pb2.Empty(), metadata=(("x-avap-auth", key),), timeout=REACH_SECONDS)
    except grpc.RpcError as error:
        raise _unreached(address, cast("grpc.Call", error), tls) from None
    names = [command.name for command in answer.commands]
    if not names:
        text = f"the catalogue at {address} is empty: there is no definition to ask for"
        raise CommandFailed(text, Exit.UNAVAILABLE)
    return Target(address, key, ca_file, names, answer.version_hash, answer.ByteSize())


def _unreached(address: str, error: grpc.Call, tls: Tls | None) -> CommandFailed:
    cause = visible(error.details() or "no reason given").rstrip(".")
    match error.code():
        case grpc.StatusCode.UNAUTHENTICATED:
            text = f"the key was refused by {address} ({cause}); give the target's API_KEY"
            return CommandFailed(text, Exit.UNAUTHENTICATED)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            remedy = advice(cause, tls) or "Check that it runs and is ready, and that --target names its gRPC port"
            return CommandFailed(f"no answer from {address}: {cause}. {remedy}", Exit.UNAVAILABLE)
        case code:
            text = f"{address} answered {code.name}: {cause}. Is it a definition server?"
            return CommandFailed(text, Exit.UNAVAILABLE)


def check_database(target: Target, url: str) -> None:
    """Check that ``target`` serves what a server would build from the database of ``url``.

    Raises: CommandFailed: the database cannot be read (69), or the target serves something else (1): it may be another
    database, whose users must not be harmed.
    """
    try:
        version = asyncio.run(_version_of(url))
    except (SourceError, CatalogTooLarge) as error:
        raise CommandFailed(f"the database of --database cannot be read: {error}", Exit.UNAVAILABLE) from None
    if version != target.version_hash:
        text = (
            f"{target.address} serves version {target.version_hash[:12]}…, the table of --database makes "
            f"{version[:12]}…. Is it the database that the target reads? If rows were written a moment ago, "
            "wait for one sync interval and try again"
        )
        raise CommandFailed(text, Exit.FAILED)


async def _version_of(url: str) -> str:
    builder = SnapshotBuilder(None)
    source = PostgresSource(url, connect_timeout=CONNECT_SECONDS, statement_timeout=STATEMENT_SECONDS)
    try:
        async with source.read() as reading:
            async for batch in reading.batches():
                builder.add(batch)
    finally:
        await source.close()
    return builder.build(generation=1, created_at_ns=time.time_ns()).footer.version_hash.hex()


@contextmanager
def session(url: str) -> Iterator[psycopg.Connection]:
    """A session of the drill. Its locks are released when the session ends for any reason."""
    with psycopg.connect(
        url, autocommit=True, connect_timeout=CONNECT_SECONDS, application_name="definition-server-drill"
    ) as connection:
        yield connection


_SESSIONS: LiteralString = """
SELECT {what} FROM pg_stat_activity
WHERE application_name = %s AND datname = current_database() AND pid <> pg_backend_pid()
"""


class Sessions:
    """The sessions of definition servers in a database, from its statistics."""

    def __init__(self, connection: psycopg.Connection) -> None:
        """Read the statistics through ``connection``, which must be in no transaction."""
        self._connection = connection

    def _ask(self, what: LiteralString, condition: LiteralString = "", *more: object) -> object:
        query = _SESSIONS.replace("{what}", what) + condition
        row = self._connection.execute(query, (APPLICATION, *more)).fetchone()
        return None if row is None else row[0]

    def number(self) -> int:
        """Number of the sessions."""
        return int(str(self._ask("count(*)")))

    def wait_for_lock(self) -> bool:
        """Whether a session waits for a lock."""
        return bool(self._ask("count(*)", "AND wait_event_type = 'Lock'"))

    def end(self) -> int:
        """End all sessions. Returns their number. Raises `psycopg.errors.InsufficientPrivilege`."""
        return int(str(self._ask("count(pg_terminate_backend(pid))")))

    def now(self) -> object:
        """The database's clock."""
        return self._connection.execute("SELECT clock_timestamp()").fetchone()[0]

    def has_looked_since(self, instant: object) -> bool:
        """Whether a session has begun a statement since ``instant`` and finished its transaction."""
        return bool(self._ask("count(*)", "AND query_start > %s AND state = 'idle'", instant))
