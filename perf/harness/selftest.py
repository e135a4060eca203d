"""Proof that the harness can fail: workers made slower on purpose are judged as a candidate is, many times over.

One run of the self-test starts four workers: the base, one without an injection, and one for each injection of
`perf.harness.slowed`. They are measured and judged by the same code and gates (``[[comparison]]`` in ``sla.toml``) as
``--against`` uses. An injection is caught where a gate is missed. A clean worker whose gate is anything but kept is a
false alarm: an invalid run is no excuse, for it would stop a release as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import ceil, floor
from typing import Any

from perf.generator.scenarios import Scenario
from perf.harness import sla
from perf.harness.compare import plans
from perf.harness.run import Effort, Generate, Session
from perf.harness.servers import Servers, Starter
from perf.harness.slowed import BUSY_SHARE, DELAY_SECONDS, ONE_IN
from perf.targets.target import Target

CLEAN, BUSY, DELAY = "clean", "busy", "delay"
INJECTED = {
    CLEAN: "nothing",
    BUSY: f"{BUSY_SHARE:.0%} more CPU time in the hot path",
    DELAY: f"a delay of {DELAY_SECONDS * 1000:g} ms in one batch of {ONE_IN}",
}
CANDIDATES = {"one-by-one": (CLEAN, BUSY), "rated": (CLEAN, DELAY)}
"""Scenario → who is judged in it: an injection is looked for where it shows, false alarms everywhere."""
EFFORT = Effort(seconds=0.5, rounds=6, looks=0, extra=14, fresh=True)
CAUGHT_SHARE, FALSE_SHARE = 0.95, 0.05

Result = dict[str, Any]


def starters() -> dict[str, Starter]:
    """Name → how to start that worker, the base among them. All by the same program."""
    kinds = {sla.BASE: "none", CLEAN: "none", BUSY: "busy", DELAY: "delay"}
    return {name: _starter(name, kind) for name, kind in kinds.items()}


def _starter(name: str, injection: str) -> Starter:
    @contextmanager
    def start(servers: Servers) -> Iterator[Target]:
        program = (sys.executable, "-m", "perf.harness.slowed", injection)
        with servers.worker("native", program=program, name=name) as served:
            yield served.target

    return start


def once(scenarios: Mapping[str, Scenario], rules: sla.Sla, generate: Generate, effort: Effort = EFFORT) -> Result:
    """One run: candidate → whether it raised an alarm, and its verdicts."""
    session = Session(generate, rules.noise, others=starters())
    session.measure(plans(scenarios, rules.comparison, CANDIDATES, effort))
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
    told = verdict.as_dict()
    return {key: told[key] for key in ("gate", "value", "low", "high", "limit", "verdict", "reason")} | {
        "rounds": len(verdict.samples)
    }


def summary(runs: list[Result]) -> Result:
    """What ``runs`` of `once` prove: by kind of worker, the alarms of every run and how many are wanted, at least
    (``alarm_expected``) or at most; ``passed``: 19 of 20 injections caught, 1 of 20 clean workers blamed, or as many of
    another number of runs."""
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
    """``count`` runs and their `summary`; ``say`` is told each one when it is there."""
    runs = []
    for number in range(1, count + 1):
        runs.append(once(scenarios, rules, generate))
        say(number, runs[-1])
    return summary(runs)
