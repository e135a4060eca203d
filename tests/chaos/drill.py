"""Drills on a running server: ``python -m tests.chaos.drill --target HOST:PORT``. See docs/drills.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click
from tests.chaos.drills.catalogue import every_fault
from tests.chaos.drills.judge import verdict
from tests.chaos.drills.model import Fault, Outcome
from tests.chaos.drills.run import play
from tests.chaos.drills.stage import Stage
from tests.chaos.drills.table import text_table, to_json
from tests.chaos.faults_target import WITHOUT_DATABASE, TargetDatabase
from tests.chaos.target import Target, check_database, reach

from definition_server.cli.exits import CommandFailed, Exit, no_traceback

DEFAULT_SECONDS = 10.0
DEFAULT_RATE = 100.0
DEFAULT_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command."""

    seconds: float
    rate: float
    connections: int


def available(database: TargetDatabase | None) -> dict[str, Fault]:
    """The faults that are possible on a target, by id; with its database there are more."""
    known = TargetDatabase("", 0) if database is None else database
    return {fault.id: fault for fault in (*WITHOUT_DATABASE, *known.faults())}


def chosen(ids: Sequence[str], database: TargetDatabase | None) -> list[Fault]:
    """The faults of ``ids``; without ids, the harmless ones.

    Raises: click.UsageError: a fault does not exist, or it needs an option that was not given.
    """
    known = available(database)
    if not ids:
        return [fault for fault in known.values() if not fault.harms]
    found = []
    for each in ids:
        if each not in known:
            text = f"there is no fault {each}; --list names all faults."
            if each in every_fault():
                text = f"{each} needs a server that the drill has started; it is not possible on a target (--list)."
            raise click.UsageError(text)
        if known[each].kind == "database" and database is None:
            raise click.UsageError(f"{each} needs the target's database: give --database, or DATABASE_URL.")
        found.append(known[each])
    return found


def confirm(faults: Sequence[Fault], address: str, *, yes: bool) -> None:
    """Ask before harm is done.

    Raises: CommandFailed: the user did not confirm; nothing has been done.
    """
    harmful = [fault for fault in faults if fault.harms]
    if not harmful or yes:
        return
    click.echo(f"These may harm everybody who uses {address} or its database:", err=True)
    for fault in harmful:
        click.echo(f"  {fault.id}: {fault.title}", err=True)
    if not sys.stdin.isatty():
        text = "nothing was done: these faults need a confirmation. Run it at a terminal, or give --yes"
        raise CommandFailed(text, Exit.USAGE)
    if click.prompt(f"Type {address} to go on", default="", show_default=False, err=True).strip() != address:
        raise CommandFailed("nothing was done: that is not the target's name", Exit.USAGE)


def play_all(
    target: Target, faults: Sequence[Fault], database: TargetDatabase | None, options: Options, outcomes: list[Outcome]
) -> None:
    """Run one fault after the other. ``outcomes`` gets those that were finished, also after Ctrl-C."""
    for fault in faults:
        click.echo(f"{fault.id}: {fault.title} …", err=True)
        outcomes.append(_play(target, fault, database, options))


def _play(target: Target, fault: Fault, database: TargetDatabase | None, options: Options) -> Outcome:
    job = target.job(options.rate, options.connections)
    stage = Stage(target.address, "target", "target" if database else "-", target.key, job=job)
    outcome = play(fault, stage, options.seconds)
    if fault.kind == "database" and database is not None:
        outcome.fresh_seconds = database.looked_after
    return outcome


def list_faults() -> None:
    """Print the faults."""
    known = available(None)
    width = max(map(len, known))
    for fault in known.values():
        asks = "asks first" if fault.harms else "by default"
        needs = ", needs --database" if fault.kind == "database" else ""
        click.echo(f"{fault.id:{width}}  {asks}{needs}: {fault.title}")
    click.echo("\nRun by `nox -s chaos` on its own servers, never on a target:")
    for fault in every_fault().values():
        if fault.id not in known:
            click.echo(f"{fault.id:{width}}  {fault.kind}: {fault.title}")


def _host_and_port(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536 or (":" in host and not host.startswith("[")):
        raise click.BadParameter(f"{value!r} is not HOST:PORT (for IPv6: [ADDRESS]:PORT)")
    return value


def _key(key: str | None, key_file: Path | None) -> str:
    if key is None and key_file is None:
        raise click.UsageError("the target's key is required: set API_KEY or API_KEY_FILE, or give --key-file.")
    if key is not None and key_file is not None:
        raise click.UsageError("give the key once: --key (API_KEY) or --key-file (API_KEY_FILE).")
    return key if key_file is None else key_file.read_text(encoding="utf-8").strip()


_FILE = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)


@click.command()
@click.option("--target", callback=_host_and_port, metavar="HOST:PORT", help="gRPC address of a running server.")
@click.option("--key", envvar="API_KEY", help="Its key; other users of this machine can see it: API_KEY_FILE is safer.")
@click.option("--key-file", envvar="API_KEY_FILE", type=_FILE, help="File that holds its key.")
@click.option("--ca-file", type=_FILE, help="Call over TLS; PEM file of the authorities to trust.")
@click.option("--database", envvar="DATABASE_URL", metavar="URL", help="The database that the target reads.")
@click.option(
    "--interval",
    default=60.0,
    show_default=True,
    type=click.FloatRange(min=0.05),
    help="The target's SYNC_INTERVAL_SECONDS.",
)
@click.option(
    "--fault", "ids", multiple=True, metavar="ID", help="Play this fault; may be repeated. Default: the harmless ones."
)
@click.option(
    "--seconds",
    default=DEFAULT_SECONDS,
    show_default=True,
    type=click.FloatRange(1, 86_400),
    help="How long each fault lasts after its first effect.",
)
@click.option(
    "--rate", default=DEFAULT_RATE, show_default=True, type=click.FloatRange(10, 5000), help="Calls a second."
)
@click.option(
    "--connections",
    default=DEFAULT_CONNECTIONS,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Connections without a retry, and as many with it.",
)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation of harmful faults.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Also write the outcomes to this file.",
)
@click.option("--list", "list_only", is_flag=True, help="List the faults, and do nothing.")
@no_traceback()
def main(
    target: str | None,
    key: str | None,
    key_file: Path | None,
    ca_file: Path | None,
    database: str | None,
    interval: float,
    ids: tuple[str, ...],
    seconds: float,
    rate: float,
    connections: int,
    yes: bool,
    json_file: Path | None,
    list_only: bool,
) -> None:
    """Offer steady load to a running server, make faults, and check that no call fails.

    Without --fault only harmless faults are made. Harmful faults ask for confirmation.

    Exit codes: 0 every promise held, 1 a promise was broken or a drill is invalid, 2 wrong usage or no confirmation, 4
    the key was refused, 69 the target or the database cannot be reached, 130 Ctrl-C.
    """
    if list_only:
        list_faults()
        return
    if target is None:
        raise click.UsageError("--target HOST:PORT is required (or --list).")
    behind = None if database is None else TargetDatabase(database, interval)
    faults = chosen(ids, behind)
    found = reach(target, _key(key, key_file), "" if ca_file is None else str(ca_file))
    if database is not None:
        check_database(found, database)
    confirm(faults, target, yes=yes)
    outcomes: list[Outcome] = []
    try:
        play_all(found, faults, behind, Options(seconds, rate, connections), outcomes)
    except KeyboardInterrupt:
        click.echo("interrupted; the fault under way is over", err=True)
        raise
    finally:
        if outcomes:
            click.echo(text_table(outcomes))
        if json_file is not None:
            json_file.write_text(json.dumps([to_json(each) for each in outcomes], indent=1) + "\n", encoding="utf-8")
    if any(verdict(each) != "held" for each in outcomes):
        raise click.exceptions.Exit(Exit.FAILED)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        main(prog_name="drill")
