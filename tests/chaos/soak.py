"""A soak: steady load and one random fault after another: ``python -m tests.chaos.soak --minutes 30``.

It starts a PostgreSQL and a server. The seed alone determines the faults, their order and their length, so a failed
soak can be repeated. See docs/drills.md.
"""

from __future__ import annotations

import json
import secrets
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
from tests.chaos.drills.judge import doubts, judge, verdict
from tests.chaos.drills.load import DrillLoad, LoadFailed
from tests.chaos.drills.model import Allowance, Fault, Loss, Outcome, Usage
from tests.chaos.drills.run import FELT_SECONDS, MEMORY_SECONDS, PATIENCE, memory_back
from tests.chaos.drills.stage import Stage, open_stage
from tests.chaos.drills.table import to_json
from tests.chaos.drills.usage import usage
from tests.chaos.soak_plan import Step, eligible, plan, unavailable
from tests.conftest import TRANSPORTS
from tests.support import machine
from tests.support.polling import until
from tests.support.providers import EmbeddedServer, available_providers
from tests.support.results import keep as keep_record
from tests.support.server import KEY

from definition_server.cli.exits import CommandFailed, Exit, no_traceback
from definition_server.ipc.handover import HOLD_SECONDS
from definition_server.settings import DEFAULT_TRANSPORT

AIM = 0.99999
"""Required availability with the default retry. Without one, every killed worker costs the calls in flight on it."""
WARM_UP_VERSIONS = 5
SETTINGS = {"HEARTBEAT_TIMEOUT_SECONDS": "5"}
"""More than the time that a crowd of 10,000 blocks a worker on a busy machine, and less than a call's deadline, so that
a stopped worker costs no call of clients with a retry.
"""
_MIB = 1 << 20
_MOST_FAILURES = 1_000_000
"""How many failures are judged one by one: a stopped worker costs hundreds of calls without a retry."""
_MOST_RECORDED = 20


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the soak."""

    minutes: float
    seed: int
    transport: str = DEFAULT_TRANSPORT
    rate: float = 300.0
    faults: tuple[str, ...] = ()
    """Ids of the faults to choose from; empty: all eligible ones."""
    settings: dict[str, str] = field(default_factory=dict)
    """Settings of the server that differ from a drill's."""


@dataclass(slots=True)
class Played:
    """A step and its result."""

    at_seconds: float
    fault: str
    hold_seconds: float
    failed: int = 0
    """Calls that failed from the start of the step until fresh rows were seen."""
    fresh_seconds: float | None = None


@dataclass(slots=True)
class Soak:
    """The result of a soak. ``outcome`` is judged like a drill's."""

    options: Options
    outcome: Outcome
    played: list[Played] = field(default_factory=list)
    master: list[Usage] = field(default_factory=list)
    """Memory and the like before the first fault and at the end."""
    workers: list[Usage] = field(default_factory=list)
    logged: dict[str, int] = field(default_factory=dict)
    """Number of log lines above INFO, by message."""
    interrupted: bool = False

    @property
    def availability(self) -> dict[str, float]:
        """Answered calls divided by offered calls: with the default retry, without one, and of all calls."""
        load = self.outcome.load
        return {
            "retrying": _share(load.retrying.offered, load.retrying.lost),
            "plain": _share(load.plain.offered, load.plain.lost),
            "all": _share(load.offered, load.lost),
        }

    def to_json(self) -> dict[str, Any]:
        """The result for a record, without the versions that were seen and most of the failures, which are judged
        already.
        """
        told = to_json(self.outcome)
        told["load"].pop("versions")
        for calls in (told["load"]["plain"], told["load"]["retrying"]):
            del calls["failures"][_MOST_RECORDED:]
        told.pop("written")
        return {
            "soak": asdict(self.options), "availability": self.availability, "aim": AIM,
            "played": [asdict(each) for each in self.played],
            "master": [asdict(each) for each in self.master], "workers": [asdict(each) for each in self.workers],
            "logged": self.logged, "outcome": told,
        }  # fmt: skip


def _share(offered: int, lost: int) -> float:
    return (offered - lost) / offered if offered else 0.0


def soak(options: Options, tell: Callable[[str], object]) -> Soak:
    """Run the soak. ``tell`` gets a line for each fault.

    An error in a fault itself ends the soak and is the outcome's ``trouble``. Ctrl-C ends it too.
    """
    faults = eligible(options.transport)
    chosen = options.faults or tuple(faults)
    allowed = Allowance(plain=Loss.IN_FLIGHT, memory=options.transport != "grpcio")
    outcome = Outcome("soak", f"soak, seed {options.seed}", "process", options.transport, "embedded", allowed)
    found = Soak(options, outcome)
    database = EmbeddedServer()
    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            open_stage(
                database, Path(directory), transport=options.transport, reader=True,
                **SETTINGS | _files(Path(directory)) | options.settings,
            ) as stage,
        ):  # fmt: skip
            stage.wounds, stage.broken = outcome.wounds, outcome.broken
            _under_load(found, stage, [faults[each] for each in chosen], tell)
            outcome.written = [] if stage.table is None else list(stage.table.written)
            found.logged = _logged(stage)
            outcome.broken += _unexpected(stage)
    finally:
        database.close()
    return found


def _files(directory: Path) -> dict[str, str]:
    """Settings with a directory for snapshots, and with a file of keys, which the drill of key rotation writes."""
    snapshots, keys = directory / "snapshots", directory / "keys"
    snapshots.mkdir()
    keys.write_text(f"load:{KEY}\n", encoding="ascii")
    return {"SNAPSHOT_DIR": str(snapshots), "API_KEY": "", "API_KEYS_FILE": str(keys)}


def _under_load(found: Soak, stage: Stage, faults: list[Fault], tell: Callable[[str], object]) -> None:
    job = stage.default_job()
    job.rate, job.most_failures = found.options.rate, _MOST_FAILURES
    load = DrillLoad(job)
    try:
        with load:
            stage.load = load
            try:
                _from_fault_to_fault(found, stage, load, faults, tell)
            except KeyboardInterrupt:
                found.interrupted = True
            except LoadFailed:
                raise
            except Exception as error:  # noqa: BLE001 - it belongs into the outcome, and the load must be stopped
                frame = traceback.extract_tb(error.__traceback__)[-1]
                found.outcome.trouble = f"{type(error).__name__} at {frame.filename}:{frame.lineno}: {error}"
    except LoadFailed as error:
        found.outcome.trouble = str(error)
    finally:
        stage.load = None
    found.outcome.load = load.report


def _from_fault_to_fault(
    found: Soak, stage: Stage, load: DrillLoad, faults: list[Fault], tell: Callable[[str], object]
) -> None:
    _warm_up(stage, load, faults)
    found.outcome.before = _look(found, stage)
    by_id = {fault.id: fault for fault in faults}
    began = time.monotonic()
    for step in plan(found.options.seed, list(by_id)):
        if time.monotonic() - began > found.options.minutes * 60:
            break
        load.keep(step.pause_seconds)
        played = Played(round(time.monotonic() - began, 1), step.fault, step.hold_seconds)
        found.played.append(played)
        failed = load.failed
        _play(found.outcome, stage, load, by_id[step.fault], step)
        played.fresh_seconds = _see_fresh(found.outcome, stage, load, by_id[step.fault])
        played.failed = load.failed - failed
        tell(line(played))
    with suppress(AssertionError):
        until(lambda: _is_back(found.outcome, stage), "memory back", seconds=MEMORY_SECONDS)
    found.outcome.after = _look(found, stage)


def _warm_up(stage: Stage, load: DrillLoad, faults: list[Fault]) -> None:
    """Memory that a server allocates once and keeps belongs to the baseline: the memory of a publication, and that of
    each fault that allocates only the first time.
    """
    assert stage.table is not None
    for fault in faults:
        if fault.first_time_mib is not None:
            with fault.inject(stage):
                load.keep(0.5)
    for _ in range(WARM_UP_VERSIONS):
        load.wait_everywhere(stage.table.advance(), 30 + 2 * stage.cycle_seconds)
    load.keep(HOLD_SECONDS + 1)


def _look(found: Soak, stage: Stage) -> Usage | None:
    assert stage.server is not None
    found.master.append(usage([stage.server.pid]))
    found.workers.append(usage(stage.server.worker_pids()))
    return stage.usage()


def _logged(stage: Stage) -> dict[str, int]:
    assert stage.server is not None
    lines = stage.server.lines
    return dict(Counter(each["msg"] for each in lines if each["level"] not in ("DEBUG", "INFO")).most_common())


def _unexpected(stage: Stage) -> list[str]:
    """The failures for which the server had no name: each fault of its surroundings must have one."""
    assert stage.server is not None
    lines = [each for each in stage.server.lines if each["msg"].startswith("Unexpected")]
    return list(dict.fromkeys(f"logged: {each['msg']}: {each.get('error')} at {each.get('at')}" for each in lines))


def _is_back(outcome: Outcome, stage: Stage) -> bool:
    now = stage.usage()
    return outcome.before is None or now is None or memory_back(outcome.before, now)


def _play(outcome: Outcome, stage: Stage, load: DrillLoad, fault: Fault, step: Step) -> None:
    assert stage.server is not None
    stage.first_line = len(stage.server.lines)
    with fault.inject(stage):
        if fault.felt is not None:
            feel = fault.felt
            try:
                until(lambda: feel(stage), fault.id, seconds=FELT_SECONDS)
            except AssertionError:
                outcome.felt = False
        load.keep(step.hold_seconds)


def _see_fresh(outcome: Outcome, stage: Stage, load: DrillLoad, fault: Fault) -> float | None:
    """Seconds until every connection saw a new version; None if it took much too long."""
    assert stage.table is not None
    limit = stage.cycle_seconds + fault.allows.grace_seconds
    version = stage.table.advance()
    written = time.monotonic()
    try:
        took = load.wait_everywhere(version, PATIENCE * limit) - written
    except AssertionError:
        outcome.broken.append(f"{fault.id}: fresh rows were not served {PATIENCE * limit:.0f} s after its end")
        return None
    if took > limit:
        outcome.broken.append(f"{fault.id}: fresh rows took {took:.1f} s, one cycle is {limit:.1f} s at the most")
    return round(took, 2)


# -- output -----------------------------------------------------------------------------------------------------------


def line(played: Played) -> str:
    """One step as a line for a terminal."""
    fresh = "never" if played.fresh_seconds is None else f"{played.fresh_seconds:.1f} s"
    return f"{played.at_seconds:7.1f} s  {played.fault:26}  failed {played.failed:4}  fresh after {fresh}"


def summary(found: Soak) -> str:
    """The result as lines of text."""
    load, outcome, shares = found.outcome.load, found.outcome, found.availability
    lines = [
        f"{len(found.played)} faults of {len({each.fault for each in found.played})} kinds in {load.seconds:.0f} s",
        f"offered {load.offered}, answered {load.offered - load.lost}, failed without a retry {load.plain.lost}, "
        f"with the default retry {load.retrying.lost}; worst {load.worst_ms:.0f} ms",
        f"availability with the default retry {shares['retrying']:.5%} (target {AIM:.3%}), without a retry "
        f"{shares['plain']:.5%}, of all calls {shares['all']:.5%}",
        *(_told_usage(*each) for each in (("master", found.master), ("workers", found.workers)) if len(each[1]) == 2),
        *(f"logged {count} times: {message}" for message, count in found.logged.items()),
        *judge(outcome), *doubts(outcome),
        f"verdict: {verdict(outcome)}; repeat with --seed {found.options.seed}",
    ]  # fmt: skip
    return "\n".join(lines)


def _told_usage(who: str, looks: list[Usage]) -> str:
    before, after = looks
    return (
        f"{who}: memory {before.memory_bytes / _MIB:.1f} → {after.memory_bytes / _MIB:.1f} MiB, RSS "
        f"{before.rss_bytes / _MIB:.1f} → {after.rss_bytes / _MIB:.1f} MiB, descriptors {before.descriptors} → "
        f"{after.descriptors}, threads {before.threads} → {after.threads}, memfds {before.memfds} → {after.memfds}"
    )


def keep(found: Soak) -> Path:
    """Write ``perf/results/<date>-soak-<transport>.json``."""
    record = {"measured": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine.facts()} | found.to_json()
    return keep_record(record, f"soak-{found.options.transport}")


@click.command()
@click.option("--minutes", default=30.0, show_default=True, type=click.FloatRange(0.05, 10_000), help="How long.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the soak to repeat. Default: a new one, printed.")
@click.option("--transport", default=DEFAULT_TRANSPORT, show_default=True, type=click.Choice(TRANSPORTS))
@click.option("--rate", default=300.0, show_default=True, type=click.FloatRange(20, 5000), help="Calls a second.")
@click.option("--fault", "faults", multiple=True, metavar="ID", help="Only this fault; may be repeated.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, writable=True, path_type=Path), help="Write it.")
@click.option("--keep", "kept", is_flag=True, help="Write the record to perf/results.")
@click.option("--list", "list_only", is_flag=True, help="List the faults to choose from, and do nothing.")
@no_traceback()
def main(
    minutes: float, seed: int | None, transport: str, rate: float, faults: tuple[str, ...], json_file: Path | None,
    kept: bool, list_only: bool,
) -> None:  # fmt: skip
    """Offer steady load to a server during one random fault after another; then check for leaks.

    Exit codes: 0 every promise held and nothing leaks, 1 otherwise, 2 wrong usage, 69 no PostgreSQL, 130 Ctrl-C.
    """
    known = eligible(transport)
    if list_only:
        click.echo("\n".join(f"{fault.id:26}  {fault.kind}: {fault.title}" for fault in known.values()))
        click.echo("\n".join(f"{each:26}  left out: {why}" for each, why in unavailable(transport).items()))
        return
    if unknown := set(faults) - set(known):
        raise click.UsageError(f"no such fault in a soak: {', '.join(sorted(unknown))} (--list).")
    if why := available_providers()["embedded"]:
        raise CommandFailed(f"a soak needs its own PostgreSQL: {why}", Exit.UNAVAILABLE)
    options = Options(minutes, secrets.randbelow(1_000_000) if seed is None else seed, transport, rate, faults)
    click.echo(f"soak: {minutes:g} minutes on {transport}, seed {options.seed}")
    found = soak(options, click.echo)
    click.echo(summary(found))
    if json_file is not None:
        json_file.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    if kept:
        click.echo(f"kept as {keep(found)}")
    if found.interrupted:
        raise click.exceptions.Exit(Exit.INTERRUPTED)
    if verdict(found.outcome) != "held":
        raise click.exceptions.Exit(Exit.FAILED)


if __name__ == "__main__":
    main(prog_name="soak")
