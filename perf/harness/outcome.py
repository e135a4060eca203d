"""The outcome of a measurement: its record, and the lines printed during it and at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tests.support import machine
from tests.support.results import SCHEMA

from perf import peers
from perf.generator.scenarios import OURS, SERVERS, Scenario
from perf.harness import sla
from perf.harness.run import Plan, Session
from perf.peers import PeerMissing

Content = dict[str, Any]
"""A record as JSON; `perf.report.record.Record` reads it."""
PASSED, NOT_KEPT, CANNOT_MEASURE, DISTURBED = range(4)
"""Exit codes: every gate is kept; a gate is missed or the server failed; nothing can be measured; the run is
invalid."""
_LOG_WIDTH = 150
_COLOURS = {sla.KEPT: "green", sla.MISSED: "bold red", sla.INVALID: "bold magenta"}


def console() -> Console:
    """The console to print on; lines are not wrapped if the output is a file."""
    made = Console()
    return made if made.is_terminal else Console(width=_LOG_WIDTH)


class Line:
    """Prints a line for each run when it has ended."""

    def __init__(self, console: Console, began: float) -> None:
        self._console, self._began = console, began

    def __call__(self, run: Mapping[str, Any]) -> None:
        passed = time.monotonic() - self._began
        what = f"{passed:6.1f} s  {run['scenario']:<20} {run['server']:<12} round {run['round'] + 1:<3}"
        if not run["valid"]:
            self._console.print(f"{what} [bold magenta]invalid[/]: {escape(run['reason'])}", highlight=False)
            return
        latency = run.get("latency") or {}
        p95 = f"P95 {latency['p95']:8.3f} ms" if latency.get("p95") is not None else ""
        figures = f"{run['per_server_cpu_second']:12,.0f} per core  {run['rate']:10,.0f} / s  {p95}"
        self._console.print(f"{what} {figures}", highlight=False)


class SelfTestLine:
    """Prints a line for each run of the self-test when it has ended."""

    def __init__(self, console: Console, began: float) -> None:
        self._console, self._began = console, began

    def __call__(self, number: int, run: Mapping[str, Any]) -> None:
        passed = time.monotonic() - self._began
        verdicts = "  ".join(f"{name}: {_gates_in_words(each['gates'])}" for name, each in run.items())
        self._console.print(f"{passed:6.1f} s  self-test {number}: {escape(verdicts)}", highlight=False)


def _gates_in_words(gates: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(
        gate["verdict"] + (f" ({gate['value']:.4g})" if gate["value"] is not None else f" ({gate['reason']})")
        for gate in gates
    )


def record(
    session: Session,
    arguments: Mapping[str, Any],
    before: Mapping[str, Any],
    seconds: float,
    proof: Mapping[str, Any] | None,
    memory: Sequence[Mapping[str, Any]],
    scenarios: Mapping[str, Scenario],
) -> Content:
    """The record of a measurement."""
    measured = {run["scenario"] for run in session.runs}
    return {
        "schema": SCHEMA,
        "title": "Performance",
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "duration_seconds": round(seconds, 1),
        "arguments": dict(arguments),
        "commit": machine.commit(),
        "machine": {**before, **machine.after()},
        "versions": machine.versions() | _peer_versions(session),
        "scenarios": {
            name: {"title": each.title, "why": each.why} for name, each in scenarios.items() if name in measured
        },
        "runs": session.runs,
        "gates": [verdict.as_dict() for verdict in session.verdicts],
        "knee": session.knee,
        "memory": list(memory),
        "selftest": proof,
        "skipped": session.skipped,
        "witnesses": [],
    }


def _peer_versions(session: Session) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in sorted({run["server"] for run in session.runs} & (set(SERVERS) - set(OURS))):
        try:
            found |= {f"{name}: {what}": version for what, version in peers.versions(name).items()}
        except PeerMissing:
            continue
    return found


def memory(session: Session) -> list[dict[str, Any]]:
    """Memory by catalogue size and number of workers; without PostgreSQL, an entry in ``skipped``."""
    try:
        from perf.harness.memory import DEFINITIONS, WORKERS, grid

        return grid(DEFINITIONS, WORKERS)
    except (pytest.skip.Exception, AssertionError, OSError, RuntimeError) as error:
        session.skipped.append({"what": "memory", "why": " ".join(str(error).split())[:300] or type(error).__name__})
        return []


def passed(kept: Content) -> bool:
    """Whether the measurement permits a release: runs exist, every gate is kept, and the self-test has passed."""
    gates, proof = kept["gates"], proof_passed(kept)
    judged = bool(gates) or proof is not None or bool(kept["runs"])
    return judged and all(gate["verdict"] == sla.KEPT for gate in gates) and proof is not False


def disturbed(kept: Content) -> bool:
    """Whether the measurement fails only because the machine or the generator disturbed runs of gates without a
    verdict.

    False if a gate is invalid because the server failed or because something is missing, and if the self-test failed
    for any reason.
    """
    rest = [gate for gate in kept["gates"] if gate["verdict"] != sla.KEPT]
    return bool(rest) and all(gate["disturbed"] for gate in rest) and proof_passed(kept) is not False


def exit_code(kept: Content) -> int:
    """`PASSED`, `NOT_KEPT` or `DISTURBED`."""
    return PASSED if passed(kept) else DISTURBED if disturbed(kept) else NOT_KEPT


def proof_passed(kept: Content) -> bool | None:
    """Whether the self-test has passed; None if it was not run."""
    return None if kept["selftest"] is None else bool(kept["selftest"]["passed"])


def show(console: Console, kept: Content) -> None:
    """Print the verdicts, and the parts that were not measured."""
    if kept["gates"]:
        console.print(_gate_table(kept["gates"]))
    for gate in kept["gates"]:
        if gate["reason"]:
            where = f"{gate['gate']} ({gate['server']})"
            console.print(f"{escape(where)}: {gate['verdict']}: {escape(gate['reason'])}", highlight=False)
    for each in kept["skipped"]:
        console.print(f"not measured: {escape(each['what'])}: {escape(each['why'])}", highlight=False)
    for case in (kept["selftest"] or {}).get("cases", ()):
        alarms = f"{sum(case['alarms'])} alarms in {len(case['alarms'])} runs"
        required = f"{'at least' if case['alarm_expected'] else 'at most'} {case['limit']} required"
        verdict = "kept" if case["kept"] else "missed"
        console.print(f"self-test, {case['name']} ({case['what']}): {alarms}, {required}: {verdict}", highlight=False)
    console.print(f"{kept['duration_seconds']:.0f} s; {conclusion(kept)}", highlight=False, markup=False)


def conclusion(kept: Content) -> str:
    """The verdict on the whole measurement, in one line."""
    if passed(kept):
        return "all gates are kept"
    if not disturbed(kept):
        return "NOT KEPT: see above"
    gates = [gate for gate in kept["gates"] if gate["verdict"] == sla.INVALID]
    return (
        f"INVALID: the measurement was disturbed, and {len(gates)} of {len(kept['gates'])} gates have no verdict: "
        f"{gates[0]['gate']}: {gates[0]['reason']}"
    )


def _gate_table(gates: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("gate", "server", "median", "95 % of it lie in", "limit", "verdict")
    for gate in gates:
        value = "–" if gate["value"] is None else f"{_number(gate['value'])} {gate['unit']}"
        low, high = (("∞" if end is None else _number(end)) for end in (gate["low"], gate["high"]))
        limit = f"{'≥' if gate['bound'] == 'least' else '≤'} {_number(gate['limit'])}"
        colour = _COLOURS[gate["verdict"]]
        between = "–" if gate["value"] is None else f"{low} … {high}"
        table.add_row(gate["gate"], gate["server"], value, between, limit, f"[{colour}]{gate['verdict']}[/]")
    return table


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def show_plans(plans: Sequence[Plan]) -> None:
    """Print the plans, and the least time that they take."""
    table = Table("scenario", "servers", "rounds", "gates", "seconds")
    for plan in plans:
        seconds, gates = f"{plan.seconds_at_least:.0f}", "\n".join(gate.name for gate in plan.gates)
        rounds = f"{plan.rounds} / {plan.other_rounds}" if plan.gates else str(plan.other_rounds)
        table.add_row(plan.scenario.name, ", ".join(plan.servers), rounds, gates, seconds)
    to = console()
    to.print(table)
    to.print(f"about {sum(plan.seconds_at_least for plan in plans) / 60:.1f} min, unless rounds are repeated")
