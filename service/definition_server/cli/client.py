"""``get``, ``fetch`` and ``health``: the client commands, which call a server on its gRPC port.

Each command makes one call on a connection of its own, without retries and without waiting for the server to start:
it reports the present state. Only ``health --watch`` continues: see `_watch`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from definition_server.catalog.definition import Definition
from definition_server.cli.channel import Server, connection_options, server_of
from definition_server.cli.client_settings import ClientSettings
from definition_server.cli.exits import (
    CommandFailed,
    Exit,
    no_traceback,
    print_code,
    print_facts,
    print_json,
    visible,
)
from definition_server.cli.progress import progress_bar
from definition_server.cli.reference import settings_epilog
from definition_server.cli.snapshot import definition_value, interface_value, print_definition
from definition_server.cli.tls import advice
from definition_server.control_plane.schedule import Backoff
from definition_server.rpc import avap_pb2

UNREACHABLE = "UNREACHABLE"
"""The state of a server that does not answer; ``grpc.health.v1`` has no name for it."""

_FIRST_DELAY_SECONDS, _MOST_DELAY_SECONDS = 0.2, 5.0
_LONGEST_FILE_NAME = 255
"""The most octets of a file's name on ext4, XFS, Btrfs and tmpfs."""


@click.command(epilog=settings_epilog(ClientSettings))
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--code-only", is_flag=True, help="Write only the code to stdout, as it is served.")
@connection_options(10)
@no_traceback()
def get(name: str, as_json: bool, code_only: bool, **connection: Any) -> None:
    """Ask the server for the definition called NAME.

    Exit codes: 0 found, 3 not found, 4 key refused, 69 no answer, 78 no key.
    """
    if as_json and code_only:
        raise click.UsageError("--json and --code-only exclude each other.")
    try:
        request = avap_pb2.CommandRequest(name=name)
    except UnicodeEncodeError:
        raise click.UsageError("NAME is not UTF-8 text.") from None
    answer = server_of(**connection).call("GetCommand", request, avap_pb2.CommandResponse)
    definition = Definition(
        answer.name,
        answer.type,
        answer.interface_json,
        answer.code,
        answer.hash,
        answer.internal_id,
        answer.avbc_code,
        answer.avbc_version,
    )
    if code_only:
        print_code(definition.code)
    elif as_json:
        print_json(definition_value(definition))
    else:
        print_definition(definition)


@click.command(epilog=settings_epilog(ClientSettings))
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write each definition's code to a file of its own in DIR, with catalog.json and version.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@connection_options(120)
@no_traceback()
def fetch(out: Path | None, as_json: bool, **connection: Any) -> None:
    """Ask the server for the whole catalogue.

    Files of removed definitions stay in DIR; catalog.json lists the current ones. The file version is removed first and
    written last: where it exists, the other files are complete.

    Exit codes: 0 done, 1 DIR cannot be written, 4 key refused, 69 no answer, 78 no key.
    """
    server = server_of(**connection)
    with progress_bar() as progress:
        receiving = progress.add_task(f"receiving from {server.address}", total=None)
        started = time.monotonic()
        catalogue = server.call("SyncCatalog", avap_pb2.Empty(), avap_pb2.CatalogResponse)
        duration = time.monotonic() - started
        progress.remove_task(receiving)
        if out is not None:
            writing = progress.add_task(f"writing {out}", total=len(catalogue.commands))
            write_catalogue(out, catalogue, lambda: progress.advance(writing))
    summary = {
        "server": server.address,
        "count": len(catalogue.commands),
        "version_hash": catalogue.version_hash,
        "bytes": catalogue.ByteSize(),
        "duration_seconds": round(duration, 3),
        "out": None if out is None else str(out),
    }
    if as_json:
        print_json(summary)
        return
    facts = [
        ("definitions", f"{summary['count']:,}"),
        ("version hash", visible(catalogue.version_hash)),
        ("bytes", f"{summary['bytes']:,}"),
        ("duration", f"{duration:.3f} s"),
    ]
    print_facts(facts if out is None else [*facts, ("written to", click.format_filename(out))])


def file_name(name: str) -> str:
    """The file to which ``fetch --out`` writes the definition called ``name``.

    The file's name is one path component, never hidden, and different for different names. All octets but ``A-Z a-z 0-9
    _ . -``, and a leading dot, are percent-encoded. A result that is too long for a file name is shortened and ends
    with ``%sha256-`` and the SHA-256 of the name; percent-encoding never yields ``%s``.
    """
    octets = name.encode()
    safe = re.sub(rb"^\.|[^A-Za-z0-9_.-]", lambda found: b"%%%02X" % ord(found[0]), octets).decode()
    if not safe:
        return "%empty.py"
    if len(safe) + len(".py") > _LONGEST_FILE_NAME:
        safe = f"{safe[:150]}%sha256-{hashlib.sha256(octets).hexdigest()}"
    return f"{safe}.py"


def write_catalogue(directory: Path, catalogue: avap_pb2.CatalogResponse, wrote_one: Callable[[], None]) -> None:
    """Write ``catalogue`` to ``directory``, which is created if needed; ``wrote_one`` is called after each definition.

    Raises:
        CommandFailed: if a file cannot be written, or two definitions have the same name.
    """
    names = {command.name for command in catalogue.commands}
    if len(names) != len(catalogue.commands):
        raise CommandFailed("the server's answer holds two definitions of the same name", Exit.FAILED)
    entries = []
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "version").unlink(missing_ok=True)
        for command in catalogue.commands:
            file = file_name(command.name)
            _replace(directory / file, command.code)
            interface = interface_value(command.interface_json)
            entry = {"name": command.name, "type": command.type, "interface": interface, "hash": command.hash}
            entries.append(entry | {"file": file})
            wrote_one()
        _replace(directory / "catalog.json", (json.dumps(entries, indent=1) + "\n").encode())
        _replace(directory / "version", f"{catalogue.version_hash}\n".encode())
    except OSError as error:
        raise CommandFailed(f"cannot write {error.filename}: {error.strerror}", Exit.FAILED) from None


def _replace(path: Path, content: bytes) -> None:
    """Replace ``path`` by a new file. A link is replaced, never followed."""
    temporary = path.with_name(f".writing-{os.getpid()}")  # no definition's file starts with a dot
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("xb") as file:
            file.write(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@click.command(epilog=settings_epilog(ClientSettings))
@click.option("--watch", is_flag=True, help="Print every change with its time, until Ctrl-C.")
@click.option("--service", default="", metavar="NAME", help="Service to ask about. Default: the server as a whole.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; with --watch, one object per line.")
@connection_options(10)
@no_traceback()
def health(watch: bool, service: str, as_json: bool, **connection: Any) -> None:
    """Ask the server for its health (grpc.health.v1). Needs no key.

    Exit codes: 0 SERVING (with --watch: Ctrl-C), 69 anything else.
    """
    server = server_of(**connection)
    try:
        request = health_pb2.HealthCheckRequest(service=service)
    except UnicodeEncodeError:
        raise click.UsageError("--service is not UTF-8 text.") from None
    if watch:
        with suppress(KeyboardInterrupt), _exit_on_ctrl_c():
            _watch(server, request, _StateLine(service, as_json=as_json))
        return
    status, failure = _check(server, request)
    if as_json:
        print_json({"server": server.address, "service": service, "status": status})
    elif failure is None:
        click.echo(status)
    if failure is not None:
        raise failure
    if status != "SERVING":
        raise click.exceptions.Exit(Exit.UNAVAILABLE)


def _check(server: Server, request: Any) -> tuple[str, CommandFailed | None]:
    """The state of the requested service, and the reason if it is `UNREACHABLE`."""
    try:
        with server.open_channel() as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=server.timeout)
    except grpc.RpcError as error:
        if cast("grpc.Call", error).code() is grpc.StatusCode.NOT_FOUND:
            return "SERVICE_UNKNOWN", None  # the name that Watch uses for an unknown service
        return UNREACHABLE, CommandFailed(server.failure(error).message, Exit.UNAVAILABLE)
    return _status_name(answer), None


def _status_name(answer: Any) -> str:
    """The name of the status in a ``HealthCheckResponse``; ``STATUS_<n>`` if this version does not know the status."""
    try:
        return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
    except ValueError:
        return f"STATUS_{answer.status}"


class _StateLine:
    """Prints a state if it differs from the previous one."""

    def __init__(self, service: str, *, as_json: bool) -> None:
        self._service = service
        self._as_json = as_json
        self._state: str | None = None

    def show(self, state: str, cause: str | None = None) -> None:
        """Print that the service is in ``state`` now, unless this was printed last."""
        if state == self._state:
            return
        self._state = state
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        if self._as_json:
            entry = {"ts": now, "service": self._service, "status": state}
            click.echo(json.dumps(entry if cause is None else entry | {"cause": cause}))
        else:
            click.echo(f"{now} {state}" if cause is None else f"{now} {state}  {cause}")


@contextmanager
def _exit_on_ctrl_c() -> Iterator[None]:
    """Ctrl-C ends the process without an exception, because an exception that is raised while gRPC holds a lock could
    block the exit for ever.

    No output is lost, because every printed line is flushed.
    """
    before = signal.signal(signal.SIGINT, lambda number, frame: os._exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _watch(server: Server, request: Any, line: _StateLine) -> None:
    """Show every state of the service on ``line``, for ever.

    Raises:
        CommandFailed: if the server has no health service.
    """
    backoff = Backoff(_FIRST_DELAY_SECONDS, _MOST_DELAY_SECONDS)
    while True:
        try:
            with server.open_channel() as channel:
                _follow(channel, server, request, line, backoff)
        except grpc.RpcError as error:
            call = cast("grpc.Call", error)
            if call.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise CommandFailed(server.failure(error).message, Exit.UNAVAILABLE) from None
            cause = visible(call.details() or call.code().name)
            remedy = advice(cause, server.tls)
            line.show(UNREACHABLE, cause if remedy is None else f"{cause.rstrip('.')}. {remedy}")
        time.sleep(backoff.next())


def _follow(
    channel: grpc.Channel,
    server: Server,
    request: Any,
    line: _StateLine,
    backoff: Backoff,
) -> None:
    """Watch on ``channel`` until the server ends the stream or it breaks.

    A host that vanished sends nothing, and a healthy one sends nothing until its state changes. So the stream is opened
    anew every ``server.timeout`` seconds, and a server that does not send the first state at once is unreachable.

    Raises:
        grpc.RpcError: if a stream sent no state at all.
    """
    while True:
        received = False
        try:
            for answer in health_pb2_grpc.HealthStub(channel).Watch(request, timeout=server.timeout):
                received = True
                backoff.reset()
                line.show(_status_name(answer))
        except grpc.RpcError as error:
            if not received:
                raise
            if cast("grpc.Call", error).code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                return
        else:
            return
