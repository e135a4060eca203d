"""``python -m perf measure``, which ``nox -s perf`` runs: measure, judge, store the record, print the verdicts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from tests.support import machine
from tests.support.results import keep

from perf.generator import scenarios
from perf.generator.run import run as generate
from perf.generator.scenarios import OURS, Scenario, ScenarioError
from perf.harness import compare, outcome, selftest, sla
from perf.harness.run import Effort, Plan, Session
from perf.harness.servers import Starter
from perf.targets.target import keep_to_client_cpu, raise_descriptor_limit

EFFORTS = {
    "quick": Effort(seconds=0.5, rounds=6, other_rounds=0, extra=2),
    "standard": Effort(seconds=1.0, rounds=6, other_rounds=3, extra=4),
    "full": Effort(seconds=2.0, rounds=6, other_rounds=2, extra=6),
}
EXIT_CODES = """\
exit codes:
  0  every gate is kept, and the self-test, if it was run, has passed
  1  NOT KEPT: a gate is missed, a server failed, or the self-test has not passed
  2  nothing can be measured: wrong options or files, or fewer than two CPUs
  3  INVALID: no gate is missed, but one or more have no verdict: the machine or the generator disturbed their runs

`nox -s perf` shows the code and itself exits with 1 for each of 1 to 3.
"""


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(
        prog="python -m perf measure", epilog=EXIT_CODES,
        description="Measure the server and judge it by perf/sla.toml.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument("--quick", action="store_true", help="only the gates for every change: under a minute")
    made.add_argument("--full", action="store_true", help="every scenario on every server (the README's table): 25 min")
    made.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="SCENARIO",
        help="only scenarios whose name contains this word; may be repeated",
    )
    made.add_argument(
        "--servers",
        metavar="NAMES",
        help="measure these servers, separated by commas, instead of the usual ones: " + ",".join(scenarios.SERVERS),
    )
    made.add_argument("--against", metavar="REV", help="compare the working tree with this revision, pairwise")
    made.add_argument(
        "--selftest",
        type=int,
        metavar="N",
        help="slow the server down deliberately N times, and check that the gates detect it",
    )
    made.add_argument(
        "--attempts", type=int, default=1, metavar="N",
        help="measure up to N times, while the result is INVALID (exit code 3)",
    )  # fmt: skip
    made.add_argument("--name", default="", help="name of the record's file, after the date")
    made.add_argument("--no-record", action="store_true", help="do not store a record")
    made.add_argument("--list", action="store_true", help="print what would be measured and how long it takes")
    return made


def usual_servers(scenario: Scenario, which: str, gates: Sequence[sla.Gate]) -> list[str]:
    """The servers to measure. Quick: the servers that a gate judges; standard: also our own two; full: all servers that
    the scenario names."""
    gated = {name for gate in gates for name in gate.servers}
    if which == "quick":
        return [name for name in scenario.servers if name in gated]
    return [name for name in scenario.servers if which == "full" or name in gated or name in OURS]


def plans(arguments: argparse.Namespace, rules: sla.Sla, known: dict[str, Scenario]) -> list[Plan]:
    """The plans that the options select.

    Raises:
        ScenarioError: if an option names an unknown scenario or server.
    """
    which = _which(arguments)
    effort = EFFORTS[which]
    wanted = scenarios.chosen(known, which, arguments.only)
    if arguments.against:
        names = {each.name for each in wanted}
        return compare.plans(
            known, rules.comparison, dict.fromkeys(names, (compare.CANDIDATE,)), replace(effort, fresh=True)
        )
    named = arguments.servers.split(",") if arguments.servers else None
    if named and (unknown := sorted(set(named) - set(scenarios.SERVERS))):
        raise ScenarioError(f"there is no server {', '.join(unknown)}; there are {', '.join(scenarios.SERVERS)}")
    made = []
    for scenario in wanted:
        gates = [gate for gate in rules.gates if gate.scenario == scenario.name]
        if named:
            gates = [gate for gate in gates if set(gate.servers) <= set(named)]
        servers = [name for name in scenario.servers if name in named] if named else None
        made.append(effort.plan(scenario, usual_servers(scenario, which, gates) if servers is None else servers, gates))
    return [plan for plan in made if plan.servers]


def _which(arguments: argparse.Namespace) -> str:
    return "quick" if arguments.quick else "full" if arguments.full else "standard"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns one of the `EXIT_CODES`."""
    options = parser()
    arguments = options.parse_args(argv)
    if arguments.quick and arguments.full:
        options.error("--quick and --full exclude each other")
    if arguments.attempts < 1:
        options.error("--attempts takes a number, at least 1")
    if arguments.selftest is not None and arguments.selftest < 1:
        options.error("--selftest takes a number of runs, at least 1")
    try:
        machine.need_cpus()
        known = scenarios.load()
        rules = sla.load(scenarios=known)
        planned = plans(arguments, rules, known)
        if arguments.list:
            outcome.show_plans(planned)
            return 0
        with ExitStack() as stack:
            others: dict[str, Starter] = {}
            if arguments.against:
                others = compare.starters(stack.enter_context(compare.worktree(arguments.against)))
            for attempt in range(1, arguments.attempts + 1):
                kept = measured(arguments, rules, known, planned, others)
                if not outcome.disturbed(kept):
                    break
                if attempt < arguments.attempts:
                    print(f"INVALID, no gate is missed: attempt {attempt + 1} of {arguments.attempts} begins")
            return outcome.exit_code(kept)
    except (ScenarioError, sla.SlaError, machine.TooFewCpus, compare.NoRevision) as error:
        print(f"perf: {error}", file=sys.stderr)
        return outcome.CANNOT_MEASURE


@contextmanager
def on_the_clients_cpu() -> Iterator[None]:
    """Keep this process off the server's CPU, and raise its limit of descriptors to the maximum."""
    allowed = os.sched_getaffinity(0)
    keep_to_client_cpu()
    raise_descriptor_limit()
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


def measured(
    arguments: argparse.Namespace,
    rules: sla.Sla,
    known: dict[str, Scenario],
    planned: list[Plan],
    others: dict[str, Starter],
) -> outcome.Content:
    """Measure the plans. Returns the record, which is also stored unless ``--no-record`` is given."""
    began, before = time.monotonic(), machine.facts()
    console = outcome.console()
    session = Session(generate, rules.noise, others=others, say=outcome.Line(console, began))
    proof = None
    with on_the_clients_cpu():
        # With --selftest alone, only the self-test runs.
        if arguments.selftest is None or arguments.quick or arguments.full or arguments.only or arguments.against:
            session.measure(planned)
        if arguments.selftest:
            say = outcome.SelfTestLine(console, began)
            proof = selftest.prove(arguments.selftest, known, rules, generate, say)
    whole = arguments.full and not (arguments.only or arguments.servers or arguments.against)
    memory = outcome.memory(session) if whole else []
    record = outcome.record(session, _options(arguments), before, time.monotonic() - began, proof, memory, known)
    outcome.show(console, record)
    if not arguments.no_record:
        print(f"stored in {keep(record, arguments.name or _name(arguments))}")
    return record


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if value not in (None, False, "", [])}


def _name(arguments: argparse.Namespace) -> str:
    """For example ``xeon-2cpu-quick``: a short run must not replace a long one of the same day."""
    kind = ["against"] if arguments.against else []
    kind += ["selftest"] if arguments.selftest else []
    kind += ["only"] if arguments.only or arguments.servers else []
    return "-".join([machine.label(), *([_which(arguments)] if _which(arguments) != "standard" else []), *kind])
