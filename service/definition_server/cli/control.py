"""The operator's commands: they ask one running server over its Unix socket, and need neither its database nor a key.

``status``, ``history``, ``diff``, ``accept``, ``pin``, ``unpin``, ``sync`` and ``roll``. Each makes one call, and
prints a table or text at a terminal, plain lines into a pipe, or with ``--json`` the answer as JSON.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import click
import grpc
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from definition_server.cli.exits import (
    CommandFailed,
    Exit,
    no_traceback,
    on_terminal,
    print_json,
    print_wrapped_facts,
    settings_or_exit,
    visible,
)
from definition_server.cli.reference import settings_epilog
from definition_server.rpc import avap_control_pb2 as pb
from definition_server.rpc import avap_control_pb2_grpc as pb_grpc
from definition_server.settings import ControlSettings

Answer = TypeVar("Answer", bound=Message)
Command = TypeVar("Command", bound=Callable[..., None])

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.default_authority", "localhost"),
)
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_SHOWN_HASH = 16
"""Digits in tables; every command takes as few as 8."""
_LONGEST_PIN_SECONDS = 366 * 86_400
_BRIEF_HASH = 8
"""Digits where the line is narrow: the least that a command takes."""
_WHOLE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]+Z|[0-9a-f]{8,16}")
"""A cell that no terminal may break."""
_MOST_NAMES = 20


class Master:
    """The server behind a socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self._timeout = timeout

    def call(self, method: str, request: Message, timeout: float | None = None) -> Any:
        """The answer of one method.

        Raises:
            CommandFailed: where there is none.
        """
        with self._stub() as stub:
            return getattr(stub, method)(request, timeout=timeout or self._timeout)

    def stream(self, method: str, request: Message) -> Iterator[Any]:
        """The answers of one method, as they come.

        Raises:
            CommandFailed: where it fails.
        """
        with self._stub() as stub:
            yield from getattr(stub, method)(request, timeout=max(self._timeout, 3600.0))

    @contextmanager
    def _stub(self) -> Iterator[Any]:
        self._check_socket()
        try:
            with grpc.insecure_channel(f"unix:{self.path}", options=_CHANNEL_OPTIONS) as channel:
                yield pb_grpc.ControlStub(channel)  # type: ignore[no-untyped-call]  # generated code
        except grpc.RpcError as error:
            raise self._failure(cast("grpc.Call", error)) from None

    def _check_socket(self) -> None:
        """Refuse what is no socket, or not this account's: its answers would be somebody else's."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise self._no_server("there is no such file") from None
        except OSError as error:
            raise self._no_server(error.strerror or str(error)) from None
        if not stat.S_ISSOCK(status.st_mode):
            raise CommandFailed(f"{self.path} is not a socket. Set CONTROL_SOCKET, or give --socket", Exit.USAGE)
        if os.geteuid() not in (0, status.st_uid):
            raise CommandFailed(
                f"the server at {self.path} runs as uid {status.st_uid}, and this command as uid {os.geteuid()}. "
                "Run it as the server's account",
                Exit.UNAUTHENTICATED,
            )

    def _no_server(self, reason: str) -> CommandFailed:
        return CommandFailed(
            f"no server answers at {self.path}: {reason}. Start it, or name the socket that its log line "
            '"Control socket open" shows: with --socket, or with the server\'s CONTROL_SOCKET or SNAPSHOT_DIR',
            Exit.UNAVAILABLE,
        )

    def _failure(self, call: grpc.Call) -> CommandFailed:
        cause = visible(call.details() or "no reason given")
        match call.code():
            case grpc.StatusCode.NOT_FOUND:
                return CommandFailed(cause, Exit.NOT_FOUND)
            case grpc.StatusCode.FAILED_PRECONDITION | grpc.StatusCode.INTERNAL | grpc.StatusCode.UNKNOWN:
                return CommandFailed(cause, Exit.FAILED)
            case grpc.StatusCode.INVALID_ARGUMENT:
                return CommandFailed(cause, Exit.USAGE)
            case grpc.StatusCode.UNIMPLEMENTED:
                return CommandFailed(
                    f"the server at {self.path} does not know this command: it is older than this program",
                    Exit.FAILED,
                )
            case grpc.StatusCode.PERMISSION_DENIED:
                return CommandFailed(f"the server at {self.path} refuses: {cause}", Exit.UNAUTHENTICATED)
            case grpc.StatusCode.UNAVAILABLE if "may not control" in cause:
                return CommandFailed(f"the server at {self.path} refuses: {cause}", Exit.UNAUTHENTICATED)
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return CommandFailed(
                    f"no answer at {self.path} within the time of --timeout. The command may still take effect: see "
                    "`definition-server status`",
                    Exit.UNAVAILABLE,
                )
            case _:
                return self._no_server(cause.rstrip("."))


def control_options(timeout: float) -> Callable[[Command], Command]:
    """``--json``, ``--socket`` and ``--timeout``; the command gets ``master`` in place of the last two."""

    def add(command: Command) -> Command:
        def run(*, socket: Path | None, timeout: float, **others: Any) -> None:
            with no_traceback():
                command(master=Master(socket_path(socket), timeout), **others)

        run.__doc__, run.__name__ = command.__doc__, command.__name__
        run.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        for option in (
            click.option("--json", "as_json", is_flag=True, help="Print JSON."),
            click.option("--socket", type=click.Path(path_type=Path), help="Socket, in place of CONTROL_SOCKET."),
            click.option(
                "--timeout",
                type=click.FloatRange(min=0, min_open=True, max=86_400),
                metavar="SECONDS",
                default=timeout,
                show_default=True,
                help="Longest wait for the answer.",
            ),
        ):
            run = option(run)
        return cast("Command", run)

    return add


def socket_path(given: Path | None) -> Path:
    """The socket to call: ``given``, or that of the environment.

    Raises:
        CommandFailed: where neither names one.
    """
    path = given or settings_or_exit(ControlSettings).control_path()
    if path is None:
        raise CommandFailed(
            "which server? Set SNAPSHOT_DIR or CONTROL_SOCKET as the server has it, or give --socket", Exit.CONFIG
        )
    return path


_EPILOG = settings_epilog(ControlSettings)


# -- status ----------------------------------------------------------------------------------------------------------


@click.command(epilog=_EPILOG)
@control_options(10)
def status(master: Master, as_json: bool) -> None:
    """Show what the server serves, since when, and what it holds back.

    Exit codes: 0 shown, 4 not your server, 69 no server at the socket.
    """
    answer: pb.Status = master.call("GetStatus", pb.GetStatusRequest())
    if as_json:
        print_json(_value(answer))
        return
    print_wrapped_facts(_status_facts(answer))
    _print_status_tables(answer)


def _status_facts(answer: pb.Status) -> list[tuple[str, str]]:
    now = time.time()
    served = answer.served if answer.HasField("served") else None
    safe = answer.safe_to_restart
    state = "stopping" if answer.stopping else "ready" if answer.ready else "not ready"
    facts = [("server", f"{state}, version {answer.server_version}, pid {answer.pid}, since {_iso(answer.started_at)}")]
    if served is None:
        facts.append(("serves", "nothing yet"))
    else:
        facts += [
            ("serves", f"{served.definitions:,} definitions, version {served.version_hash}"),
            ("since", _since(served, now)),
        ]
        if served.HasField("all_workers_at"):
            facts.append(("all workers", _iso(served.all_workers_at)))
    if answer.freshness_reason or answer.fresh:
        pinned = answer.fresh and answer.HasField("pin") and not answer.pin.missing
        reason = "the table is read, and the pin keeps it from being served" if pinned else answer.freshness_reason
        facts.append(("fresh", _yes(answer.fresh, reason)))
    if answer.HasField("safe_to_restart"):
        facts.append(("safe to restart", _yes(safe.safe, safe.reason)))
    facts += _sync_facts(answer.sync, now)
    if answer.HasField("pin"):
        end = f"until {_iso(answer.pin.until)}" if answer.pin.HasField("until") else "until `unpin`"
        missing = ", but this server does not know that version" if answer.pin.missing else ""
        facts.append(("pinned", f"{answer.pin.version_hash}, {end}, by {answer.pin.source}{missing}"))
    if answer.HasField("held_catalogue"):
        held = answer.held_catalogue
        facts.append(
            ("held", f"version {held.version_hash} since {_iso(held.since)}: {visible(held.reason)}. "
             + _what_to_do(served, held.version_hash))
        )  # fmt: skip
    facts += [("notice", visible(notice)) for notice in answer.notices]
    return facts


def _since(served: pb.Served, now: float) -> str:
    """When it was published, which for a pinned catalogue is long after it was built."""
    built = f"built {_iso(served.created_at)} ({_age(served.created_at, now)})"
    if served.HasField("published_at"):  # an older server does not say it
        built = f"{_iso(served.published_at)} ({_age(served.published_at, now)}), {built}"
    return f"{built}, generation {served.generation}"


def _what_to_do(served: pb.Served | None, held: str) -> str:
    """For a held catalogue: how to see it, and what to do with an accident and with an intended change."""
    see = "" if served is None else f"See it: definition-server diff {_brief(served.version_hash)} {_brief(held)}. "
    return f"{see}An accident: mend the table. Intended: definition-server accept {_brief(held)}"


def _sync_facts(sync: pb.SyncState, now: float) -> list[tuple[str, str]]:
    facts = []
    if sync.last_outcome:
        error = f": {visible(sync.last_error)}" if sync.last_error else ""
        facts.append(("last sync", f"{sync.last_outcome}{error}, {_iso(sync.last_attempt)}"))
    if sync.HasField("last_success"):
        facts.append(("last success", f"{_iso(sync.last_success)} ({_age(sync.last_success, now)})"))
    if sync.HasField("next_attempt"):
        facts.append(("next attempt", _iso(sync.next_attempt)))
    for label, counts in (("not served", sync.unserved), ("suspect", sync.suspect)):
        if counts:
            facts.append((label, ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))))
    return facts


def _print_status_tables(answer: pb.Status) -> None:
    _print_table(
        "held commands",
        ("name", "reason", "since", "served", "refused"),
        [
            (each.name, each.reason, _iso(each.since), _brief(each.hash_served), _brief(each.hash_refused))
            for each in answer.held_commands
        ],
    )
    _print_table(
        "workers",
        ("worker", "pid", "state", "version", "connections", "restarts", "jail"),
        [
            (str(each.number), str(each.pid or "-"), each.state, _short(each.version_hash), str(each.connections),
             str(each.restarts), each.jail)
            for each in answer.workers
        ],
    )  # fmt: skip
    _print_history("history", answer.history)
    _print_table(
        "keys",
        ("id", "last used"),
        [(each.id, _iso(each.last_used) if each.HasField("last_used") else "not yet") for each in answer.keys],
    )
    _print_table("certificates", ("name", "expires"), [(each.name, _iso(each.expires)) for each in answer.certificates])
    _print_table(
        "events", ("time", "kind", "text"), [(_iso(each.time), each.kind, each.text) for each in answer.events]
    )


# -- history and diff ------------------------------------------------------------------------------------------------


@click.command(epilog=_EPILOG)
@control_options(10)
def history(master: Master, as_json: bool) -> None:
    """List the catalogues that were published last, and which of them is served.

    Exit codes: 0 shown, 4 not your server, 69 no server at the socket.
    """
    answer: pb.History = master.call("ListHistory", pb.ListHistoryRequest())
    if as_json:
        print_json(_value(answer))
    elif not answer.versions:
        click.echo("The history is empty: nothing was published, or SNAPSHOT_DIR is not set.")
    else:
        _print_history(None, answer.versions)


def _print_history(title: str | None, versions: Any) -> None:
    hash_of = _short if on_terminal() else str
    rows: list[tuple[str, ...]] = [
        (
            "*" if each.served else "",
            hash_of(each.version_hash),
            _iso(each.published_at),
            f"{each.definitions:,}",
            _changes(each),
        )
        for each in versions
    ]
    _print_table(title, ("", "version", "published", "definitions", "changes"), rows)


def _changes(version: pb.Version) -> str:
    if not version.HasField("changes"):
        return ""
    return f"+{version.changes.added:,} -{version.changes.removed:,} ~{version.changes.changed:,}"


@click.command(epilog=_EPILOG)
@click.argument("old")
@click.argument("new")
@control_options(60)
def diff(master: Master, as_json: bool, old: str, new: str) -> None:
    """List the commands by which the versions OLD and NEW differ.

    Versions are hashes that `history` lists, or the first 8 digits or more.

    Exit codes: 0 shown, 3 no such version, 4 not your server, 69 no server at the socket.
    """
    answer: pb.Difference = master.call("Diff", pb.DiffRequest(old=_hash(old), new=_hash(new)))
    if as_json:
        print_json(_value(answer))
        return
    for sign, names in (("+", answer.added), ("-", answer.removed), ("~", answer.changed)):
        for name in names:
            click.echo(f"{sign} {visible(name)}")
    counts = f"{len(answer.added):,} added, {len(answer.removed):,} removed, {len(answer.changed):,} changed"
    click.echo(f"{counts}", err=True)


# -- what changes something ------------------------------------------------------------------------------------------


@click.command(epilog=_EPILOG)
@click.argument("version")
@control_options(60)
def accept(master: Master, as_json: bool, version: str) -> None:
    """Publish the held catalogue VERSION, which the log and `status` name.

    Exit codes: 0 every worker serves it, 1 not done, 3 no such version is held, 4 not your server, 69 no server at the
    socket.
    """
    _print_served(master.call("Accept", pb.AcceptRequest(version_hash=_hash(version))), as_json=as_json)


@click.command(epilog=_EPILOG)
@click.argument("version")
@click.option("--for", "duration", metavar="TIME", help="How long, for example 30m, 2h or 7d.")
@click.option("--until", metavar="TIME", help="Until when: ISO 8601, for example 2026-12-01T08:00Z.")
@control_options(60)
def pin(master: Master, as_json: bool, version: str, duration: str | None, until: str | None) -> None:
    """Serve VERSION of the history, whatever the table says, until the time is over or `unpin`.

    A pin survives restarts. Give --for or --until: nobody remembers a pin without an end.

    Exit codes: 0 every worker serves it, 1 not done, 3 no such version, 4 not your server, 69 no server at the socket.
    """
    request = pb.PinRequest(version_hash=_hash(version))
    request.until.FromDatetime(_end_of(duration, until))
    _print_served(master.call("Pin", request), as_json=as_json)


@click.command(epilog=_EPILOG)
@control_options(60)
def unpin(master: Master, as_json: bool) -> None:
    """Take the pin away, and serve the newest good catalogue of the table.

    Exit codes: 0 every worker serves it, 1 not done, 4 not your server, 69 no server at the socket.
    """
    _print_served(master.call("Unpin", pb.UnpinRequest()), as_json=as_json)


@click.command(epilog=_EPILOG)
@control_options(120)
def sync(master: Master, as_json: bool) -> None:
    """Make the server read its whole table now, whether it sees a change or not.

    `fetch` downloads a catalogue; it was called `sync` once, and `sync --out` and `sync --host` still are `fetch`.

    Exit codes: 0 published or unchanged, 1 held or failed, 4 not your server, 69 no server at the socket.
    """
    with _spinner("the server reads its table"):
        answer: pb.SyncResult = master.call("Sync", pb.SyncRequest())
    if as_json:
        print_json(_value(answer))
    else:
        facts = [("outcome", f"{answer.outcome} ({answer.seconds:.3f} s)")]
        if answer.error:
            facts.append(("reason", visible(answer.error)))
        print_wrapped_facts([*facts, *_served_facts(answer.served if answer.HasField("served") else None)])
    if answer.outcome not in ("published", "unchanged"):
        raise click.exceptions.Exit(Exit.FAILED)


@click.command(epilog=_EPILOG)
@control_options(600)
def roll(master: Master, as_json: bool) -> None:
    """Replace the workers one by one; each serves before its predecessor leaves.

    The roll goes on if this command is ended.

    Exit codes: 0 all were replaced, 1 one could not be replaced and the roll has stopped, 4 not your server, 69 no
    server at the socket.
    """
    started = time.monotonic()
    replaced = workers = 0
    with _progress() as progress:
        task = progress.add_task("rolling the workers", total=None)
        for message in master.stream("Roll", pb.RollRequest()):
            replaced, workers = message.replaced, message.workers
            progress.update(task, completed=replaced, total=workers)
    seconds = round(time.monotonic() - started, 3)
    if as_json:
        print_json({"replaced": replaced, "workers": workers, "seconds": seconds})
    else:
        click.echo(f"{replaced} of {workers} workers replaced in {seconds:.1f} s")


def _print_served(served: pb.Served, *, as_json: bool) -> None:
    if as_json:
        print_json(_value(served))
    else:
        print_wrapped_facts(_served_facts(served))
    if not served.HasField("all_workers_at"):
        raise CommandFailed(
            "not every worker has it yet: see `definition-server status`, and the log for their reasons", Exit.FAILED
        )


def _served_facts(served: pb.Served | None) -> list[tuple[str, str]]:
    if served is None:
        return [("serves", "nothing yet")]
    facts = [("serves", f"{served.definitions:,} definitions, version {served.version_hash}")]
    if served.HasField("all_workers_at"):
        took = f" ({served.seconds:.3f} s after the request)" if served.seconds else ""
        facts.append(("all workers", f"{_iso(served.all_workers_at)}{took}"))
    if served.note:
        facts.append(("but", visible(served.note)))
    elif served.unchanged:
        facts.append(("note", "it was served already"))
    return facts


# -- values ----------------------------------------------------------------------------------------------------------


def _hash(text: str) -> str:
    found = text.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", found):
        raise click.UsageError(f"{visible(text)!r} is no version: give at least 8 hex digits of its hash.")
    return found


def _end_of(duration: str | None, until: str | None) -> datetime:
    """When a pin ends.

    Raises:
        click.UsageError: where neither or both are given, or one is not understood.
    """
    if (duration is None) == (until is None):
        raise click.UsageError("Give --for (for example 2h) or --until.")
    now = datetime.now(UTC)
    if duration is not None:
        parts = re.findall(r"([0-9]+)([smhdw])", duration.strip().lower())
        if not parts or "".join(f"{number}{unit}" for number, unit in parts) != duration.strip().lower():
            raise click.UsageError(f"--for {visible(duration)}: give numbers with s, m, h, d or w, for example 1h30m.")
        seconds = sum(int(number[:12]) * _UNITS[unit] for number, unit in parts)
        if not 0 < seconds <= _LONGEST_PIN_SECONDS:
            raise click.UsageError(f"--for {visible(duration)}: give a time above 0 and of at most a year.")
        return now + timedelta(seconds=seconds)
    assert until is not None
    try:
        end = datetime.fromisoformat(until.strip())
    except ValueError:
        raise click.UsageError(
            f"--until {visible(until)}: give a time in ISO 8601, for example 2026-12-01T08:00Z."
        ) from None
    if end.tzinfo is None:
        raise click.UsageError(f"--until {visible(until)}: add its time zone, for example Z.")
    if not 0 < (end - now).total_seconds() <= _LONGEST_PIN_SECONDS:
        raise click.UsageError(f"--until {visible(until)}: it must be in the future, within a year.")
    return end.astimezone(UTC)


def _value(message: Message) -> dict[str, Any]:
    """For JSON. Times are ISO 8601, 64-bit numbers are numbers."""
    return cast("dict[str, Any]", _numbers(message))


def _numbers(message: Message) -> Any:
    value = MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
    return _with_numbers(value, message.DESCRIPTOR)


def _with_numbers(value: dict[str, Any], descriptor: Any) -> dict[str, Any]:
    """MessageToDict writes 64-bit numbers as text, for JavaScript; ours are counts."""
    for name, field in descriptor.fields_by_name.items():
        if name not in value:
            continue
        entry = value[name]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value[name] = {key: int(number) for key, number in entry.items()}
        elif field.message_type is not None and not isinstance(entry, str):
            children = entry if isinstance(entry, list) else [entry]
            for child in children:
                _with_numbers(child, field.message_type)
        elif field.cpp_type == field.CPPTYPE_INT64:
            value[name] = int(entry)
    return value


def _iso(stamp: Timestamp) -> str:
    if not stamp.seconds:
        return "-"
    return stamp.ToDatetime(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _age(stamp: Timestamp, now: float) -> str:
    seconds = max(0.0, now - stamp.ToNanoseconds() / 1e9)
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def _short(version_hash: str) -> str:
    return version_hash[:_SHOWN_HASH]


def _brief(version_hash: str) -> str:
    return version_hash[:_BRIEF_HASH]


def _yes(yes: bool, reason: str) -> str:
    word = "yes" if yes else "no"
    return f"{word}: {visible(reason)}" if reason else word


# -- output ----------------------------------------------------------------------------------------------------------


def _print_table(title: str | None, columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table at a terminal, lines with tabs in a pipe; nothing where there are no rows."""
    if not rows:
        return
    cells = [[visible(cell) for cell in row] for row in rows]
    if not on_terminal():
        if title is not None:
            click.echo(f"\n{title}:")
        for row in cells:
            click.echo("\t".join(row))
        return
    table = Table(box=None, title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        # The first columns are names, which may be long: they fold, and no time and no hash does.
        whole = any(_WHOLE.fullmatch(row[number]) for row in cells)
        table.add_column(column, no_wrap=whole, overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    console = Console()
    if title is not None:
        console.print()
    console.print(table)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield
