"""Tests the gates: deliberately slowed workers are judged like a candidate, many times.

One run of the self-test starts five workers: the base, one without an injection, and one for each injection of
`perf.harness.slowed`. They are measured and judged by the code and the gates that judge a release. An injection is
caught if a gate is missed. Any verdict but kept on a clean worker is a false alarm, even if its runs are invalid.

The kinds of gates must find different injections:

- ``[[comparison]]``, the gates of ``--against``: a tenth more CPU time in the hot path, and a rare delay. Base and
  candidate are measured on one machine in the same seconds, so these gates can detect both.
- ``[[gate]]`` with ``expected``, including the one over nghttpd: a call that costs twice as much. If the server becomes
  a tenth slower, the figure falls by a tenth, but the limit is further below the usual figure, because the ratio of the
  server's speed to the reference work's differs by more than a tenth between processors. So only a comparison detects a
  server that is a tenth slower.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from math import ceil, floor
from typing import Any

from perf.generator.scenarios import Scenario
from perf.harness import sla
from perf.harness.compare import plans
from perf.harness.run import Effort, Generate, Plan, Session
from perf.harness.servers import Servers, Starter
from perf.harness.slowed import BUSY_SHARE, DELAY_SECONDS, ONE_IN
from perf.targets.target import Target

CLEAN, BUSY, TWICE, DELAY = "clean", "busy", "twice", "delay"
INJECTED = {
    CLEAN: "nothing",
    BUSY: f"{BUSY_SHARE:.0%} more CPU time in the hot path",
    TWICE: "twice the CPU time in the hot path",
    DELAY: f"a delay of {DELAY_SECONDS * 1000:g} ms in one batch of {ONE_IN}",
}
CANDIDATES = {"one-by-one": (CLEAN, BUSY), "rated": (CLEAN, DELAY)}
"""Scenario → the workers compared with the base in it: each injection if it has an effect, the clean one in all."""
NORMALISED = {"one-by-one": (CLEAN, TWICE), "yardstick": (CLEAN, TWICE)}
"""Scenario → the workers judged by its gates with ``expected``, including those with the kernel's share and nghttpd."""
EFFORT = Effort(seconds=0.5, rounds=6, other_rounds=0, extra=14, fresh=True)
CAUGHT_SHARE, FALSE_SHARE = 0.95, 0.05

Result = dict[str, Any]


def starters() -> dict[str, Starter]:
    """Name → function that starts that worker. All workers, including the base, are started by the same program."""
    kinds = {sla.BASE: "none", CLEAN: "none", BUSY: "busy", TWICE: "twice", DELAY: "delay"}
    return {name: _starter(name, kind) for name, kind in kinds.items()}


def _starter(name: str, injection: str) -> Starter:
    @contextmanager
    def start(servers: Servers) -> Iterator[Target]:
        program = (sys.executable, "-m", "perf.harness.slowed", injection)
        with servers.worker("native", program=program, name=name) as served:
            yield served.target

    return start


def planned(scenarios: Mapping[str, Scenario], rules: sla.Sla, effort: Effort) -> list[Plan]:
    """The plans of one run."""
    made = {plan.scenario.name: plan for plan in plans(scenarios, rules.comparison, CANDIDATES, effort)}
    for name, workers in NORMALISED.items():
        wanted = [gate for gate in rules.gates if gate.scenario == name and gate.expected]
        gates = tuple(replace(gate, server=each) for gate in wanted for each in workers)
        plan = made.get(name) or effort.plan(scenarios[name], (), ())
        servers = dict.fromkeys((*plan.servers, *(each for gate in gates for each in gate.servers)))
        made[name] = replace(plan, servers=tuple(servers), gates=plan.gates + gates)
    return list(made.values())


def once(scenarios: Mapping[str, Scenario], rules: sla.Sla, generate: Generate, effort: Effort = EFFORT) -> Result:
    """Make one run. Returns candidate → whether it raised an alarm, and its verdicts."""
    session = Session(generate, rules.noise, others=starters())
    session.measure(planned(scenarios, rules, effort))
    found: Result = {}
    for name in INJECTED:
        verdicts = [verdict for verdict in session.verdicts if verdict.gate.server == name]
        found[name] = {
            "missed": any(verdict.verdict == sla.MISSED for verdict in verdicts),
            "kept": bool(verdicts) and all(verdict.verdict == sla.KEPT for verdict in verdicts),
            "gates": [_short(verdict) for verdict in verdicts],
        }
    return found


def _short(verdict: sla.Verdict) -> Result:
    whole = verdict.as_dict()
    return {key: whole[key] for key in ("gate", "value", "low", "high", "limit", "verdict", "reason")} | {
        "rounds": len(verdict.samples)
    }


def summary(runs: list[Result]) -> Result:
    """The result of ``runs`` of `once`: by kind of worker, the alarms of every run and their limit, a minimum if
    ``alarm_expected``, otherwise a maximum. ``passed``: at least 19 of 20 injections are caught and at most 1 of 20
    clean workers raises an alarm, in proportion for another number of runs."""
    cases = [_case(name, runs) for name in INJECTED]
    return {"passed": bool(runs) and all(case["kept"] for case in cases), "cases": cases, "runs": runs}


def _case(name: str, runs: list[Result]) -> Result:
    expected = name != CLEAN
    alarms = [run[name]["missed"] if expected else not run[name]["kept"] for run in runs]
    share = (CAUGHT_SHARE if expected else FALSE_SHARE) * len(runs)
    limit = ceil(round(share, 9)) if expected else floor(round(share, 9))
    kept = sum(alarms) >= limit if expected else sum(alarms) <= limit
    return {
        "name": name, "what": INJECTED[name], "alarm_expected": expected, "alarms": alarms, "limit": limit,
        "kept": kept,
    }  # fmt: skip


def prove(
    count: int,
    scenarios: Mapping[str, Scenario],
    rules: sla.Sla,
    generate: Generate,
    say: Callable[[int, Result], None] = lambda number, run: None,
) -> Result:
    """Make ``count`` runs and return their `summary`; ``say`` is called after each run."""
    runs = []
    for number in range(1, count + 1):
        runs.append(once(scenarios, rules, generate))
        say(number, runs[-1])
    return summary(runs)
