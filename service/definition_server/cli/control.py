"""The operator's commands: they ask one running server over its Unix socket, and need neither its database nor a key.

``history``, ``diff``, ``accept``, ``pin``, ``unpin``, ``sync`` and ``roll``. Each makes one call, and
prints a table or text at a terminal, plain lines into a pipe, or with ``--json`` the answer as JSON.
"""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta

import click

from definition_server.cli.control_output import iso, json_value, print_versions
from definition_server.cli.control_socket import EPILOG, Master, control_options
from definition_server.cli.exits import CommandFailed, Exit, print_json, print_wrapped_facts, visible
from definition_server.cli.progress import progress_bar, spinner
from definition_server.rpc import avap_control_pb2 as pb

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_LONGEST_PIN_SECONDS = 366 * 86_400


# -- history and diff ------------------------------------------------------------------------------------------------


@click.command(epilog=EPILOG)
@control_options(10)
def history(master: Master, as_json: bool) -> None:
    """List the catalogues that were published last, and which of them is served.

    Exit codes: 0 shown, 4 not your server, 69 no server at the socket.
    """
    answer: pb.History = master.call("ListHistory", pb.ListHistoryRequest())
    if as_json:
        print_json(json_value(answer))
    elif not answer.versions:
        click.echo(
            "The history is empty: nothing was published, SNAPSHOT_DIR is not set, or its disk cannot be written "
            "(`definition-server status` tells)."
        )
    else:
        print_versions(None, answer.versions)


@click.command(epilog=EPILOG)
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
        print_json(json_value(answer))
        return
    for sign, names in (("+", answer.added), ("-", answer.removed), ("~", answer.changed)):
        for name in names:
            click.echo(f"{sign} {visible(name)}")
    counts = f"{len(answer.added):,} added, {len(answer.removed):,} removed, {len(answer.changed):,} changed"
    click.echo(f"{counts}", err=True)


# -- commands that change something ----------------------------------------------------------------------------------


@click.command(epilog=EPILOG)
@click.argument("version")
@control_options(60)
def accept(master: Master, as_json: bool, version: str) -> None:
    """Publish the held catalogue VERSION, which the log and `status` name.

    Exit codes: 0 every worker serves it, 1 not done, 3 no such version is held, 4 not your server, 69 no server at the
    socket.
    """
    _print_served(master.call("Accept", pb.AcceptRequest(version_hash=_hash(version))), as_json=as_json)


@click.command(epilog=EPILOG)
@click.argument("version")
@click.option("--for", "duration", metavar="TIME", help="How long, for example 30m, 2h or 7d.")
@click.option("--until", metavar="TIME", help="Until when: ISO 8601, for example 2026-12-01T08:00Z.")
@control_options(60)
def pin(master: Master, as_json: bool, version: str, duration: str | None, until: str | None) -> None:
    """Serve VERSION of the history, whatever the table says, until the time is over or `unpin`.

    A pin survives restarts. Give --for or --until, because a pin without an end is easily forgotten.

    Exit codes: 0 every worker serves it, 1 not done, 3 no such version, 4 not your server, 69 no server at the socket.
    """
    request = pb.PinRequest(version_hash=_hash(version))
    request.until.FromDatetime(_end_of(duration, until))
    _print_served(master.call("Pin", request), as_json=as_json)


@click.command(epilog=EPILOG)
@control_options(60)
def unpin(master: Master, as_json: bool) -> None:
    """Take the pin away, and serve the newest good catalogue of the table.

    Exit codes: 0 every worker serves it, 1 not done, 4 not your server, 69 no server at the socket.
    """
    _print_served(master.call("Unpin", pb.UnpinRequest()), as_json=as_json)


@click.command(epilog=EPILOG)
@control_options(120)
def sync(master: Master, as_json: bool) -> None:
    """Make the server read its whole table now, even if it sees no change.

    `fetch` downloads a catalogue; it was called `sync` once, and `sync --out` and `sync --host` still are `fetch`.

    Exit codes: 0 published or unchanged, 1 held or failed, 4 not your server, 69 no server at the socket.
    """
    with spinner("the server reads its table"):
        answer: pb.SyncResult = master.call("Sync", pb.SyncRequest())
    if as_json:
        print_json(json_value(answer))
    else:
        facts = [("outcome", f"{answer.outcome} ({answer.seconds:.3f} s)")]
        if answer.error:
            facts.append(("reason", visible(answer.error)))
        print_wrapped_facts([*facts, *_served_facts(answer.served if answer.HasField("served") else None)])
    if answer.outcome not in ("published", "unchanged"):
        raise click.exceptions.Exit(Exit.FAILED)


@click.command(epilog=EPILOG)
@control_options(600)
def roll(master: Master, as_json: bool) -> None:
    """Replace the workers one by one; each serves before its predecessor leaves.

    The roll continues if this command is ended.

    Exit codes: 0 all were replaced, 1 one could not be replaced and the roll has stopped, 4 not your server, 69 no
    server at the socket.
    """
    started = time.monotonic()
    replaced = workers = 0
    with progress_bar() as progress:
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
        print_json(json_value(served))
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
        facts.append(("all workers", f"{iso(served.all_workers_at)}{took}"))
    if served.note:
        facts.append(("but", visible(served.note)))
    elif served.unchanged:
        facts.append(("note", "it was served already"))
    return facts


# -- arguments ------------------------------------------------------------------------------------------------------


def _hash(text: str) -> str:
    found = text.strip().lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", found):
        raise click.UsageError(f"{visible(text)!r} is not a version: give at least 8 hex digits of its hash.")
    return found


def _end_of(duration: str | None, until: str | None) -> datetime:
    """When a pin ends.

    Raises:
        click.UsageError: if neither or both options are given, or the given one is invalid.
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
