"""``export``: a catalogue as SQL that restores the table, from a server, its history or a snapshot file."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import click

from definition_server.catalog import wire
from definition_server.catalog.restore_sql import RestoreError, TableRow, row_of, script
from definition_server.cli.channel import connection_options, server_of
from definition_server.cli.client_settings import ClientSettings, ControlSettings
from definition_server.cli.control_socket import Master, socket_path
from definition_server.cli.exits import CommandFailed, Exit, no_traceback
from definition_server.cli.reference import settings_epilog
from definition_server.cli.snapshot import open_verified
from definition_server.rpc import avap_control_pb2 as pb
from definition_server.rpc import avap_pb2

_TOTAL_COUNT, _VERSION_HASH = 2, 3


class _Catalogue:
    """The commands of a catalogue, with the version hash and the number of commands that it states."""

    def __init__(self, version_hash: str, count: int | None, commands: Iterator[memoryview]) -> None:
        self.version_hash = version_hash
        self._count = count
        self._commands = commands
        self.with_bytecode = 0
        """Number of commands so far that have bytecode."""

    def rows(self) -> Iterator[TableRow]:
        """The row of every ``CommandResponse``.

        Raises:
            CommandFailed: if the number of commands differs from the number that the catalogue states.
            RestoreError: if no row can hold a command.
            WireError: if a message is not a ``CommandResponse``.
        """
        found = 0
        for command in self._commands:
            found += 1
            row = row_of(command)
            self.with_bytecode += bool(row.bytecode)
            yield row
        if self._count is not None and found != self._count:
            raise CommandFailed(f"the catalogue has {found:,} commands and says {self._count:,}", Exit.FAILED)


@click.command(epilog=settings_epilog(ClientSettings, ControlSettings))
@click.option("--sql", is_flag=True, help="Write SQL that restores the table (the only form so far).")
@click.option("--snapshot", type=click.Path(path_type=Path), metavar="FILE", help="Read this snapshot file.")
@click.option("--history", metavar="VERSION", help="Ask this machine's server for that version of its history.")
@click.option("--socket", type=click.Path(path_type=Path), help="Its socket, in place of CONTROL_SOCKET.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Write to FILE in place of stdout.")
@connection_options(120)
@no_traceback()
def export(
    sql: bool,
    snapshot: Path | None,
    history: str | None,
    socket: Path | None,
    out: Path | None,
    **connection: Any,
) -> None:
    """Write SQL that makes the table serve a catalogue again: byte for byte, ids and bytecode included.

    The catalogue is the one that a server serves (called on its gRPC port, with the key), a version of the history of
    the server on this machine (--history), or the content of a snapshot file (--snapshot). No database is read or
    written: run the script with psql.

    Exit codes: 0 written, 1 damaged or not writable, 3 no such version, 4 key refused, 69 no answer, 78 no key.
    """
    if not sql:
        raise click.UsageError("Say which form: --sql.")
    if (snapshot is not None) + (history is not None) > 1:
        raise click.UsageError("--snapshot and --history exclude each other.")
    if snapshot is not None:
        opened = open_verified(snapshot)
        catalogue = _Catalogue(opened.version_hash, opened.count, opened.messages())
    elif history is not None:
        catalogue = _of_history(Master(socket_path(socket), connection["timeout"]), history)
    else:
        catalogue = _of_server(connection)
    pieces = script(catalogue.rows(), version_hash=catalogue.version_hash)
    try:
        if out is None:
            _write(pieces, sys.stdout.buffer)
        else:
            _replace(out, pieces)
    except (RestoreError, wire.WireError) as error:
        raise CommandFailed(f"the catalogue cannot be exported: {error}", Exit.FAILED) from None
    click.echo(_about_bytecode(catalogue.with_bytecode), err=True)


def _about_bytecode(commands: int) -> str:
    if not commands:
        return "no bytecode in this catalogue: the script leaves the table avap_bytecode as it is"
    return f"bytecode of {commands:,} commands: the script restores it in the table avap_bytecode"


def _of_server(connection: dict[str, Any]) -> _Catalogue:
    """The catalogue that a server serves, as one message whose commands are not parsed into objects."""
    body = memoryview(server_of(**connection).call_raw("SyncCatalog", avap_pb2.Empty()))
    version, count = "", None
    for number, value, content in wire.fields(body):
        if number == _VERSION_HASH:
            version = bytes(content).decode("ascii", "replace")
        elif number == _TOTAL_COUNT:
            count = value
    commands = (content for number, _, content in wire.fields(body) if number == wire.COMMANDS)
    return _Catalogue(version, count or 0, commands)


def _of_history(master: Master, version: str) -> _Catalogue:
    answers = master.stream("Export", pb.ExportRequest(version_hash=version.strip().lower()))
    first = next(answers, pb.ExportedRows())

    def commands() -> Iterator[memoryview]:
        for answer in chain((first,), answers):
            for command in answer.commands:
                yield memoryview(command)

    return _Catalogue(first.version_hash, first.total_count, commands())


def _write(pieces: Iterator[str], file: BinaryIO) -> None:
    for piece in pieces:
        file.write(piece.encode())
    file.flush()


def _replace(path: Path, pieces: Iterator[str]) -> None:
    """Write a file as a whole, or leave the existing one as it is. Only its owner can read it."""
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.writing")
    try:
        number = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(number, "wb") as file:
            _write(pieces, file)
            os.fsync(number)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
