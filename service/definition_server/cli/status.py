"""``definition-server status``: shows the catalogue that a running server serves, the time since which it is served,
and the held catalogue and commands."""

from __future__ import annotations

import time
from pathlib import Path

import click

from definition_server.cli.control_output import (
    age,
    brief,
    iso,
    json_value,
    print_table,
    print_versions,
    short,
    yes_or_no,
)
from definition_server.cli.control_socket import EPILOG, master_at, server_options
from definition_server.cli.exits import print_json, print_wrapped_facts, visible
from definition_server.cli.fleet import show_fleet
from definition_server.rpc import avap_control_pb2 as pb


@click.command(epilog=EPILOG)
@click.argument("hosts", nargs=-1, metavar="[HOST[:PORT]]...")
@server_options(10)
def status(hosts: tuple[str, ...], as_json: bool, socket: Path | None, timeout: float) -> None:
    """Show the served catalogue, since when it is served, and which catalogue and commands are held.

    With HOST: one line for each replica there, by its metrics port (9464), and which of them differ. A name may have
    several addresses, as that of a headless service has.

    Exit codes: 0 shown; with HOST: all are ready, fresh and serve one version; 1 with HOST: they do not; 4 not your
    server, 69 no server at the socket, or no replica answers.
    """
    if hosts:
        if socket is not None:
            raise click.UsageError("Give HOST or --socket.")
        show_fleet(hosts, timeout, as_json=as_json)
        return
    answer: pb.Status = master_at(socket, timeout).call("GetStatus", pb.GetStatusRequest())
    if as_json:
        print_json(json_value(answer))
        return
    print_wrapped_facts(_status_facts(answer))
    _print_status_tables(answer)


def _status_facts(answer: pb.Status) -> list[tuple[str, str]]:
    now = time.time()
    served = answer.served if answer.HasField("served") else None
    safe = answer.safe_to_restart
    state = "stopping" if answer.stopping else "ready" if answer.ready else "not ready"
    facts = [("server", f"{state}, version {answer.server_version}, pid {answer.pid}, since {iso(answer.started_at)}")]
    if answer.engine:  # an older server does not send this field
        facts.append(("engine", answer.engine))
    if served is None:
        facts.append(("serves", "nothing yet"))
    else:
        facts += [
            ("serves", f"{served.definitions:,} definitions, version {served.version_hash}"),
            ("since", _since(served, now)),
        ]
        if served.HasField("all_workers_at"):
            facts.append(("all workers", iso(served.all_workers_at)))
    if answer.freshness_reason or answer.fresh:
        pinned = answer.fresh and answer.HasField("pin") and not answer.pin.missing
        reason = "the table is read, but not served because of the pin" if pinned else answer.freshness_reason
        facts.append(("fresh", yes_or_no(answer.fresh, reason)))
    if answer.HasField("safe_to_restart"):
        facts.append(("safe to restart", yes_or_no(safe.safe, safe.reason)))
    if answer.HasField("database"):
        facts.append(("database", _database(answer.database)))
    facts += _sync_facts(answer.sync, now)
    if answer.HasField("pin"):
        end = f"until {iso(answer.pin.until)}" if answer.pin.HasField("until") else "until `unpin`"
        missing = ", but this server does not know that version" if answer.pin.missing else ""
        facts.append(("pinned", f"{answer.pin.version_hash}, {end}, by {answer.pin.source}{missing}"))
    if answer.HasField("held_catalogue"):
        held = answer.held_catalogue
        facts.append(
            ("held", f"version {held.version_hash} since {iso(held.since)}: {visible(held.reason)}. "
             + _what_to_do(served, held.version_hash))
        )  # fmt: skip
    facts += [("notice", visible(notice)) for notice in answer.notices]
    return facts


def _database(database: pb.Database) -> str:
    hosts = ", ".join(map(visible, database.hosts))
    connected = database.connected_to or "none of them yet"
    which = f" (connected to {visible(connected)})" if len(database.hosts) > 1 else ""
    return f"{visible(database.name)} at {hosts}{which} as {visible(database.role)}"


def _since(served: pb.Served, now: float) -> str:
    """The time when the catalogue was published. For a pinned catalogue, this may be long after it was built."""
    built = f"built {iso(served.created_at)} ({age(served.created_at, now)})"
    if served.HasField("published_at"):  # an older server does not send this field
        built = f"{iso(served.published_at)} ({age(served.published_at, now)}), {built}"
    return f"{built}, generation {served.generation}"


def _what_to_do(served: pb.Served | None, held: str) -> str:
    """For a held catalogue: the command that shows it, and the remedies for an accident and for an intended change."""
    see = "" if served is None else f"See it: definition-server diff {brief(served.version_hash)} {brief(held)}. "
    return f"{see}An accident: mend the table. Intended: definition-server accept {brief(held)}"


def _sync_facts(sync: pb.SyncState, now: float) -> list[tuple[str, str]]:
    facts = []
    if sync.last_outcome:
        error = f": {visible(sync.last_error)}" if sync.last_error else ""
        facts.append(("last sync", f"{sync.last_outcome}{error}, {iso(sync.last_attempt)}"))
    if sync.HasField("last_success"):
        facts.append(("last success", f"{iso(sync.last_success)} ({age(sync.last_success, now)})"))
    if sync.HasField("next_attempt"):
        facts.append(("next attempt", iso(sync.next_attempt)))
    for label, counts in (("not served", sync.unserved), ("suspect", sync.suspect)):
        if counts:
            facts.append((label, ", ".join(f"{count:,} {reason}" for reason, count in sorted(counts.items()))))
    return facts


def _print_status_tables(answer: pb.Status) -> None:
    print_table(
        "held commands",
        ("name", "reason", "since", "served", "refused"),
        [
            (each.name, each.reason, iso(each.since), brief(each.hash_served), brief(each.hash_refused))
            for each in answer.held_commands
        ],
    )
    print_table(
        "workers",
        ("worker", "pid", "state", "version", "connections", "restarts", "jail"),
        [
            (str(each.number), str(each.pid or "-"), each.state, short(each.version_hash), str(each.connections),
             str(each.restarts), each.jail)
            for each in answer.workers
        ],
    )  # fmt: skip
    print_versions("history", answer.history)
    print_table(
        "keys",
        ("id", "last used"),
        [(each.id, iso(each.last_used) if each.HasField("last_used") else "not yet") for each in answer.keys],
    )
    print_table("certificates", ("name", "expires"), [(each.name, iso(each.expires)) for each in answer.certificates])
    print_table("events", ("time", "kind", "text"), [(iso(each.time), each.kind, each.text) for each in answer.events])
