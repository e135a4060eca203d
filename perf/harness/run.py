"""Measuring: scenarios × servers, in rounds, until the gates are decided.

**Why rounds.** A round measures every server once, in an order that changes from round to round. A disturbance of the
machine that lasts longer than a round then affects all servers, and short ones affect them at random. A run that the
generator or the machine has spoilt stays in the record, and its round is measured again.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

from tests.support import machine

from perf.generator.histogram import UNIT, share_above
from perf.generator.scenarios import COMPILED, PURE, SATURATE, Scenario
from perf.harness import reference, sla
from perf.harness.servers import Servers, Starter
from perf.harness.yardstick import by_h2load
from perf.peers import PeerMissing
from perf.targets.catalogue import Catalogue
from perf.targets.target import TargetFailed

Run = dict[str, Any]
Generate = Callable[..., Run]
"""`perf.generator.run`: target, scenario, catalogue, overrides → run."""
Say = Callable[[Run], None]
FAILURES = (TargetFailed, OSError, subprocess.SubprocessError)
TICKS = os.sysconf("SC_CLK_TCK")
STOLEN_SHARE = 0.03
"""The share of a CPU that the hypervisor may take. While it runs another machine, no call is answered; P95 ignores 5 %
of calls."""
SLOW_MS = 2.0
"""A call that takes longer counts as slow (``slow_share``): ten times the usual latency at the rated load."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The measurement of one scenario."""

    scenario: Scenario
    servers: tuple[str, ...]
    rounds: int
    """Rounds for servers that a gate judges, and for the other form of our engine if a gate judges one form."""
    other_rounds: int
    """Rounds for the other servers."""
    extra: int = 0
    """Rounds that may be added for undecided gates and spoilt runs."""
    gates: tuple[sla.Gate, ...] = ()
    fresh: bool = False
    """Whether every round has a new process. Two processes of the same code differ in speed by some per cent for their
    lifetime (memory layout, hash seeds), so only several processes distinguish that difference from a change of the
    code."""

    @property
    def gated(self) -> frozenset[str]:
        """Servers that a gate judges or compares with."""
        return frozenset(name for gate in self.gates for name in gate.servers)

    def rounds_of(self, server: str) -> int:
        """Rounds for ``server``. The two forms of our engine are shown side by side, so they get the same number."""
        often = server in self.gated or (server == COMPILED and PURE in self.gated)
        return self.rounds if often else self.other_rounds

    @property
    def normalised(self) -> bool:
        """Whether a gate is normalised by the speed of interpreter and kernel."""
        return any(gate.expected for gate in self.gates)

    @property
    def seconds_at_least(self) -> float:
        """Estimated duration without added rounds; each run also starts a process and warms up."""
        runs = sum(map(self.rounds_of, self.servers))
        return (runs if self.scenario.rate != SATURATE else KNEE_STEPS) * (self.scenario.seconds + OVERHEAD_SECONDS)

    def next_round(self, number: int, runs: Sequence[Run], noise: Mapping[str, str]) -> list[str]:
        """The servers to measure in the round ``number``, after ``runs``; empty if the measurement is complete.

        A server that has failed is not measured again, because its gates are invalid in any case.
        """
        failed = {run["server"] for run in runs if sla.is_failure(run)}
        left = [name for name in self.servers if name not in failed]
        if number < max(self.rounds if self.gates else 0, self.other_rounds):
            return [name for name in left if number < self.rounds_of(name)]
        if number >= max(self.rounds, self.other_rounds) + self.extra:
            return []
        good = {name: sum(run["valid"] for run in runs if run["server"] == name) for name in left}
        lacking = {name for name in left if good[name] < self.rounds_of(name)}
        judged = [gate for gate in self.gates if set(gate.servers) <= set(left)]
        undecided = any(not sla.judge(gate, runs, noise).decided for gate in judged)
        # A pair needs both of its servers in the same round.
        again = self.gated if undecided or lacking & self.gated else frozenset()
        return [name for name in left if name in lacking or name in again]


@dataclass(frozen=True, slots=True)
class Effort:
    """Duration of runs and number of rounds, for all scenarios."""

    seconds: float
    """Maximum duration of one run."""
    rounds: int
    other_rounds: int
    extra: int
    fresh: bool = False
    """See `Plan`."""

    def plan(self, scenario: Scenario, servers: Sequence[str], gates: Sequence[sla.Gate]) -> Plan:
        """The plan of ``scenario`` with this effort."""
        short = replace(scenario, seconds=min(self.seconds, scenario.seconds))
        return Plan(short, tuple(servers), self.rounds, self.other_rounds, self.extra, tuple(gates), self.fresh)


OVERHEAD_SECONDS = 1.0
KNEE_STEPS = 12
_KNEE_FIRST, _KNEE_FACTOR = 0.25, 1.5
"""The first rate of a knee, as a share of the server's rate in a closed loop, and the factor between two steps."""


@dataclass
class Session:
    """A measurement: its settings, and its results so far."""

    generate: Generate
    noise: Mapping[str, str]
    say: Say = lambda run: None
    others: Mapping[str, Starter] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    verdicts: list[sla.Verdict] = field(default_factory=list)
    meter: Callable[[], reference.Meter] = reference.Meter
    knee: list[Run] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)

    def measure(self, plans: Sequence[Plan]) -> None:
        """Measure ``plans``, plans with the same catalogue one after the other, so that the catalogue is built once."""
        for (count, octets, tls), group in groupby(sorted(plans, key=_catalogue), _catalogue):
            with ExitStack() as stack:
                catalogue = Catalogue(count, octets)
                stack.callback(catalogue.close)
                try:
                    servers = stack.enter_context(Servers(catalogue, tls=tls, others=self.others))
                except FAILURES as error:
                    self._skip_all(list(group), f"no certificate for TLS: {error}")
                    continue
                for plan in group:
                    if plan.scenario.rate == SATURATE:
                        self._knee(plan, servers)
                    else:
                        self._plan(plan, servers)

    def _skip_all(self, plans: Sequence[Plan], why: str) -> None:
        for plan in plans:
            self.skipped.append({"what": plan.scenario.name, "why": why})
            self.verdicts += [sla.judge(gate, [], self.noise) for gate in plan.gates]

    def _plan(self, plan: Plan, servers: Servers) -> None:
        names = [name for name in plan.servers if self._is_there(plan.scenario, name, servers)]
        plan = replace(plan, servers=tuple(names))
        mine: list[Run] = []
        number = 0
        while wanted := plan.next_round(number, mine, self.noise):
            turn = number % len(wanted)
            if plan.fresh and number:
                self._renew(wanted, servers)
            mine += [self._measured(plan, name, servers, number) for name in wanted[turn:] + wanted[:turn]]
            number += 1
        self.runs += mine
        self.verdicts += [sla.judge(gate, mine, self.noise) for gate in plan.gates if not self._pardoned(gate)]

    def _measured(self, plan: Plan, name: str, servers: Servers, number: int) -> Run:
        """Make one run. If a gate needs the reference work, it runs together with every server, so that all runs are
        comparable."""
        once = partial(self._run, plan.scenario, name, servers, number)
        if not plan.normalised:
            return once()
        with suppress(*FAILURES):  # this starts the server; if it does not start, its run reports the failure
            servers.target(name)
        return reference.beside(lambda measuring: once(measuring=measuring), self.meter)

    def _renew(self, names: Sequence[str], servers: Servers) -> None:
        """Replace the server processes. A process that has ended already is reported by its last run or its next
        one."""
        for name in names:
            with suppress(TargetFailed):
                servers.stop(name)

    def _is_there(self, scenario: Scenario, name: str, servers: Servers) -> bool:
        """Whether the server ``name`` is installed. If it is installed but does not start, its runs are invalid."""
        try:
            servers.target(name)
        except PeerMissing as error:
            if not any(each["what"] == name for each in self.skipped):
                self.skipped.append({"what": name, "why": str(error)})
            return False
        except FAILURES:
            return True
        return True

    def _pardoned(self, gate: sla.Gate) -> bool:
        """Whether ``gate`` is not judged, because it compares with a peer that is not installed; noted in ``skipped``.

        If the environment variable ``CI`` is set, every peer must be installed, and each gate is judged.
        """
        if os.environ.get("CI"):
            return False
        missing = [each for each in self.skipped if each["what"] in gate.servers[1:]]
        self.skipped += [{"what": f"gate: {gate.name}", "why": each["why"]} for each in missing]
        return bool(missing)

    def _run(self, scenario: Scenario, name: str, servers: Servers, number: int, **overrides: Any) -> Run:
        """Make one run. If it fails, the result is an invalid run with the reason."""
        began, before = time.monotonic(), machine.steal_ticks()
        try:
            run = self._generated(scenario, name, servers, overrides)
        except FAILURES as error:
            reason = " ".join(str(error).split())[:500] or type(error).__name__
            run = {"valid": False, "reason": reason, "fault": "server"}
        run |= stolen(run, scenario.kind, machine.steal_ticks() - before, time.monotonic() - began)
        run = {"kind": scenario.kind, "fault": ""} | run | {"scenario": scenario.name, "server": name, "round": number}
        self.say(run)
        return run

    def _generated(self, scenario: Scenario, name: str, servers: Servers, overrides: Mapping[str, Any]) -> Run:
        target = servers.target(name)
        if scenario.generator == "h2load":
            return by_h2load(target, scenario)
        if scenario.kind != "publish":
            run = self.generate(target, scenario, servers.catalogue, **overrides)
        else:
            run = self._publishing(scenario, name, servers, overrides)
        return run | slow_share(run)

    def _publishing(self, scenario: Scenario, name: str, servers: Servers, overrides: Mapping[str, Any]) -> Run:
        """A run during which catalogues are published at equal intervals, from the beginning of the measurement on."""
        count, failures = scenario.publications, list[Exception]()
        published, over = 0, threading.Event()

        def publishing() -> None:
            nonlocal published
            while published < count and not over.wait(scenario.seconds / (count + 1)):
                try:
                    publish()
                except FAILURES as error:
                    failures.append(error)
                    return
                published += 1

        target = servers.target(name)
        with servers.publications(name, count) as publish:
            thread = threading.Thread(target=publishing, name="publisher")
            try:
                run = self.generate(target, scenario, servers.catalogue, measuring=thread.start, **overrides)
            finally:
                over.set()
                if thread.ident is not None:
                    thread.join()
        if failures:
            raise failures[0]
        if run["valid"] and published < count:
            reason = f"only {published} of {count} catalogues were published before the end"
            run |= {"valid": False, "reason": reason, "fault": "machine"}
        return run | {"publications": published}

    def _knee(self, plan: Plan, servers: Servers) -> None:
        """Raise the offered rate, from far below the server's rate in a closed loop until the server cannot follow."""
        scenario = plan.scenario
        for name in plan.servers:
            if not self._is_there(scenario, name, servers):
                continue
            closed = replace(scenario, kind="closed", rate=0.0, streams=1)
            most = self._run(closed, name, servers, 0)
            self.runs.append(most)
            if not most["valid"]:
                continue
            rate = _KNEE_FIRST * most["rate"]
            for step in range(KNEE_STEPS):
                run = self._run(replace(scenario, rate=rate), name, servers, step)
                self.runs.append(run)
                self.knee.append(knee_point(run, rate))
                if not run["valid"] or run["rate"] < 0.97 * rate:
                    break
                rate *= _KNEE_FACTOR if rate < 0.6 * most["rate"] else 1.2


def knee_point(run: Run, offered: float) -> Run:
    """A point of the knee curve."""
    latency = run.get("latency") or {}
    return {
        "server": run["server"], "offered_rate": offered, "rate": run.get("rate"), "valid": run["valid"],
        "reason": run.get("reason", ""), **{name: latency.get(name) for name in ("p50", "p95", "p99")},
    }  # fmt: skip


def stolen(run: Run, kind: str, ticks: int, seconds: float) -> Run:
    """``stolen``: the share of a CPU that the hypervisor gave to other machines. If it is too large, a run that
    measures latency is spoilt."""
    share = ticks / TICKS / seconds if seconds else 0.0
    reason = f"the hypervisor gave {share:.1%} of a CPU to other machines (allowed: at most {STOLEN_SHARE:.0%})"
    spoilt = run["valid"] and kind in ("open", "publish") and share > STOLEN_SHARE
    return {"stolen": round(share, 4)} | ({"valid": False, "reason": reason, "fault": "machine"} if spoilt else {})


def slow_share(run: Run) -> Run:
    """The share of calls slower than `SLOW_MS`, if the run has a histogram."""
    if not run.get("histogram"):
        return {}
    return {"slow_share": share_above(run["histogram"], run.get("histogram_unit", UNIT), SLOW_MS)}


def _catalogue(plan: Plan) -> tuple[int, int, bool]:
    """The key of a plan. Plans with equal keys are measured on the same servers."""
    return plan.scenario.definitions, plan.scenario.answer_octets, plan.scenario.tls
