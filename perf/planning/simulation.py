"""Simulates a fleet of replicas: how stale they become after a change, and the load on their database.

    python -m perf simulate                            prints the tables of docs/capacity.md
    python -m perf simulate --docs docs/capacity.md    rewrites them in that page
    python -m perf simulate --docs … --check           fails if they are stale

**Model.** Every replica makes a change check every ``interval`` seconds, counted from its own start. A check that
begins after the commit of a change is followed by a reading of all rows; then the replica builds and publishes, and
from that instant its answers are new. The database is a processor-sharing queue: the checks and readings in progress
divide its cores evenly, none gets more than one core, and the readings also divide its network. So the readings after
one change slow each other down, and the more replicas there are, the more.

The costs of a check, a reading and a publication are measured (``database_cost.py``) and read from that record; the
other values of a `Fleet` are assumed and named in the tables. One seed decides all random values, so the tables are
reproducible.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perf.benches.database_cost import Cost, costs
from perf.report.block import replaced

SEED = 20_261_125
CHANGES = 20
"""Number of commits, each simulated alone and at a random moment; their replicas are counted together."""
STATEMENTS_PER_CHECK = 4
"""BEGIN, SELECT set_config, SELECT of the fingerprint, ROLLBACK."""
STATEMENTS_PER_READING = 2
"""DECLARE CURSOR and CLOSE. A reading also has one FETCH for each `BATCH_ROWS` rows or part of them, and a last FETCH
that returns no row."""
BATCH_ROWS = 1000
TOGETHER_SECONDS = 1.0
"""Replicas in step make their checks within this time."""
BUILD_SPREAD = 0.25
"""Standard deviation of the logarithm of a publication's duration: nodes differ, and other loads disturb them."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """Replicas and their database. Times are in seconds."""

    replicas: int
    interval: float
    cost: Cost
    together: bool = False
    """Whether all replicas make their checks at once; otherwise they are spread evenly. After a common start they would
    stay in step, if the server did not delay its second check by a random time."""
    cores: int = 4
    network: float = 1.25e9
    """Octets per second that the database can send: 10 Gbit/s."""

    def __post_init__(self) -> None:
        if self.replicas < 1 or self.cores < 1 or not (self.interval > 0 and self.network > 0):
            raise ValueError("a fleet needs at least one replica and core, and an interval and a network above 0")


@dataclass(frozen=True, slots=True)
class Rest:
    """The load of a fleet on its database while the table does not change, in each second on average."""

    checks: float
    statements: float
    cores: float
    octets: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one change, or of several."""

    staleness: tuple[float, ...]
    """Seconds from the commit until the answers were new, for every replica and change. Ascending."""
    readings: tuple[float, ...]
    """Duration of each reading of all rows in seconds. Ascending."""
    at_once: int
    """The largest number of simultaneous readings."""
    fan_out: float
    """Seconds from the first replica with new answers to the last; the maximum of all changes."""

    def percentile(self, share: float) -> float:
        """The staleness that ``share`` of the replicas do not exceed."""
        return at(self.staleness, share)


def at(ordered: Sequence[float], share: float) -> float:
    """The smallest value that ``share`` of ``ordered`` do not exceed (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def rest(fleet: Fleet) -> Rest:
    """The load of ``fleet`` on its database while the table does not change."""
    checks = fleet.replicas / fleet.interval
    return Rest(
        checks, checks * STATEMENTS_PER_CHECK, checks * fleet.cost.look_cpu_seconds, checks * fleet.cost.look_octets
    )


class Sharing:
    """The database: jobs that divide its cores and its network evenly.

    Checks and readings are two classes. All jobs of a class have the same speed, so a job is done when the *service* of
    its class, the sum of speed × time, has grown by the amount that the job needs. Two heaps suffice, and no job is
    updated between its start and its end.
    """

    LOOK, READING = 0, 1

    def __init__(self, cores: int, network: float, stream: float) -> None:
        """``stream``: octets per second of a single reading, without other load."""
        self._cores, self._readings_at_full_speed = cores, network / stream
        self._jobs: tuple[list[tuple[float, int]], ...] = ([], [])
        self._service = [0.0, 0.0]
        self.now = 0.0

    def _speeds(self) -> tuple[float, float]:
        checks, readings = (len(jobs) for jobs in self._jobs)
        share = min(1.0, self._cores / max(1, checks + readings))
        return share, min(share, self._readings_at_full_speed / max(1, readings))

    def readings(self) -> int:
        """The number of readings in progress."""
        return len(self._jobs[self.READING])

    def add(self, kind: int, replica: int, seconds: float) -> None:
        """Begin a job now that takes ``seconds`` without other load."""
        heapq.heappush(self._jobs[kind], (self._service[kind] + seconds, replica))

    def next(self) -> tuple[float, int]:
        """The instant at which the next job ends if none is added, and its class; infinity if there is no job."""
        speeds = self._speeds()
        ends = [
            (self.now + max(0.0, jobs[0][0] - self._service[kind]) / speeds[kind], kind)
            for kind, jobs in enumerate(self._jobs)
            if jobs
        ]
        return min(ends, default=(math.inf, self.LOOK))

    def advance(self, now: float) -> None:
        """Advance the time to ``now``, which is not after `next`."""
        for kind, speed in enumerate(self._speeds()):
            self._service[kind] += speed * (now - self.now)
        self.now = now

    def finish(self, kind: int) -> int:
        """Remove the job that has ended. Returns the job's replica."""
        return heapq.heappop(self._jobs[kind])[1]


def one_change(fleet: Fleet, chance: random.Random) -> Outcome:
    """Simulate from a commit at the instant 0 until every replica has the change."""
    cost = fleet.cost
    commit = chance.uniform(0, fleet.interval)
    phases = [
        chance.uniform(0, TOGETHER_SECONDS) if fleet.together else number * fleet.interval / fleet.replicas
        for number in range(fleet.replicas)
    ]
    checks = sorted(((phase - commit) % fleet.interval, replica) for replica, phase in enumerate(phases))
    database = Sharing(fleet.cores, fleet.network, cost.octets / cost.read_seconds)
    begun = [0.0] * fleet.replicas
    fresh: list[float] = []
    readings: list[float] = []
    most = 0
    arrivals: Iterator[tuple[float, int]] = iter([*checks, (math.inf, -1)])
    due, who = next(arrivals)
    while len(fresh) < fleet.replicas:
        done, kind = database.next()
        if due <= done:
            database.advance(due)
            database.add(Sharing.LOOK, who, cost.look_cpu_seconds)
            due, who = next(arrivals)
            continue
        database.advance(done)
        replica = database.finish(kind)
        if kind == Sharing.LOOK:
            begun[replica] = done
            database.add(Sharing.READING, replica, cost.read_seconds)
            most = max(most, database.readings())
        else:
            readings.append(done - begun[replica])
            fresh.append(done + cost.build_seconds * chance.lognormvariate(0, BUILD_SPREAD))
    return Outcome(tuple(sorted(fresh)), tuple(sorted(readings)), most, max(fresh) - min(fresh))


def simulate(fleet: Fleet, *, changes: int = CHANGES, seed: int = SEED) -> Outcome:
    """The outcome of ``changes`` calls of `one_change`, counted together. The same seed gives the same outcome."""
    chance = random.Random(seed)
    every = [one_change(fleet, chance) for _ in range(changes)]
    return Outcome(
        tuple(sorted(value for each in every for value in each.staleness)),
        tuple(sorted(value for each in every for value in each.readings)),
        max(each.at_once for each in every),
        max(each.fan_out for each in every),
    )


def slowest_fetch(fleet: Fleet, outcome: Outcome) -> float:
    """Seconds that one FETCH of the slowest reading takes; STATEMENT_TIMEOUT_SECONDS must exceed it."""
    return outcome.readings[-1] / math.ceil(fleet.cost.definitions / BATCH_ROWS)


# -- the tables of docs/capacity.md ------------------------------------------------------------------------------


def tables(found: dict[int, Cost], source: str) -> str:
    """All tables, in Markdown. ``found``: definitions → cost; ``source``: the record that holds these costs."""
    small, large = found[min(found)], found[max(found)]
    cells = [f"Measured costs: `perf/results/{source}`. Seed {SEED}, {CHANGES} changes for each row.", ""]
    cells += _costs([small, large])
    base = Fleet(1000, 60.0, large)
    cells += ["", "While nothing changes:", "", *_rest_rows(base, small)]
    fleets = [
        ("10 replicas", replace(base, replicas=10)),
        ("100 replicas", replace(base, replicas=100)),
        ("1,000 replicas", base),
        ("1,000, in step", replace(base, together=True)),
        ("1,000, interval 10 s", replace(base, interval=10.0)),
        ("1,000, interval 300 s", replace(base, interval=300.0)),
        ("1,000, database with 16 cores", replace(base, cores=16)),
        ("1,000, 16 cores and 40 Gbit/s", replace(base, cores=16, network=5e9)),
        (f"1,000, {small.definitions:,} definitions", replace(base, cost=small)),
        (f"1,000, {small.definitions:,} definitions, in step", replace(base, cost=small, together=True)),
    ]
    title = (
        f"One change ({large.definitions:,} definitions, 60 s, spread, 4 cores and 10 Gbit/s unless stated otherwise):"
    )
    cells += ["", title, "", *_change_rows(fleets)]
    return "\n".join(cells)


def _costs(which: Sequence[Cost]) -> list[str]:
    lines = [
        "| definitions | a change check | octets of a check | a reading of all rows | octets of a reading "
        "| build and publish |"
    ]
    lines.append("|--:|--:|--:|--:|--:|--:|")
    lines += [
        f"| {cost.definitions:,} | {cost.look_cpu_seconds * 1000:.1f} ms | {cost.look_octets:,.0f} | "
        f"{cost.read_seconds:.2f} s | {cost.octets / 1e6:,.1f} MB | {cost.build_seconds:.2f} s |"
        for cost in which
    ]
    return lines


def _rest_rows(base: Fleet, small: Cost) -> list[str]:
    lines = [
        "| replicas | interval | definitions | checks/s | statements/s | busy cores of the database | sent by it |"
    ]
    lines.append("|--:|--:|--:|--:|--:|--:|--:|")
    for cost, replicas, interval in (
        (base.cost, 10, 60.0), (base.cost, 100, 60.0), (base.cost, 1000, 300.0), (base.cost, 1000, 60.0),
        (base.cost, 1000, 10.0), (small, 1000, 60.0), (small, 1000, 10.0),
    ):  # fmt: skip
        load = rest(replace(base, cost=cost, replicas=replicas, interval=interval))
        lines.append(
            f"| {replicas:,} | {interval:g} s | {cost.definitions:,} | {load.checks:.1f} | {load.statements:.0f} | "
            f"{load.cores:.2f} | {load.octets / 1000:.1f} kB/s |"
        )
    return lines


def _change_rows(fleets: Sequence[tuple[str, Fleet]]) -> list[str]:
    lines = [
        "| fleet | stale: P50 | P95 | P99 | longest | first to last | readings at once | slowest reading | its FETCH |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for title, fleet in fleets:
        outcome = simulate(fleet)
        stale = " | ".join(f"{outcome.percentile(share):,.0f} s" for share in (0.5, 0.95, 0.99, 1.0))
        lines.append(
            f"| {title} | {stale} | {outcome.fan_out:,.0f} s | {outcome.at_once:,} | {outcome.readings[-1]:,.1f} s | "
            f"{slowest_fetch(fleet, outcome):.2f} s |"
        )
    return lines


BLOCK = "simulation"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print, rewrite or check the tables. Returns 1 if the page is stale or a record is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m perf simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, help="page to rewrite")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    given: Any = parser.parse_args(arguments)
    try:
        content = tables(*costs())
        if given.docs is None:
            print(content)
            return 0
        page = given.docs.read_text(encoding="utf-8")
        made = replaced(page, BLOCK, f"{content}\n")
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        print(f"no tables: {given.docs or 'perf/results'}: {error}", file=sys.stderr)
        return 1
    if given.check and made != page:
        print(f"{given.docs} is stale: run `python -m perf simulate --docs {given.docs}`", file=sys.stderr)
        return 1
    if not given.check:
        given.docs.write_text(made, encoding="utf-8")
    return 0
