"""Gates: what a server must keep, judged from several runs. They are in ``sla.toml``, whose head describes the keys.

**How a gate is judged.** Each round of a measurement gives one sample: a figure of one run, or, where the gate is
``over`` or ``minus`` another server, the quotient or the difference of two runs that followed each other. The median
of all rounds has a confidence interval (`perf.harness.statistics`):

- the whole interval on the right side of the limit: kept;
- the whole interval on the wrong side: missed;
- the limit inside it: undecided. More rounds are measured while there are any; after the last one the median decides.
  It does not acquit where the interval reaches further beyond the limit than the gate's ``blur``: that is no verdict.

**The machine's speed is not the server's merit.** A gate with ``expected`` divides the CPU time that a call may cost on
this machine and this interpreter by what it costs: 1 is as calibrated, and a server that becomes a tenth slower falls
by a tenth. What a call may cost is the sum of ``python`` × the reference work's ``python_us``, ``kernel`` × its
``kernel_us``, and ``other`` × what a call costs the server that the gate is ``over``.

**What is no figure keeps no gate.** A run in which the server failed makes its gate invalid, however many others there
are, and so does what was not measured at all: there, something is broken. A run that the generator or the machine
spoilt is left out and measured again; more such runs than good ones, or fewer good ones than an interval needs, and the
gate is invalid because the measurement was ``disturbed``: there, nothing has been found out, neither good nor bad.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf, isfinite
from pathlib import Path
from typing import Any

from perf.harness.statistics import Interval, least_samples, median_interval

FILE = Path(__file__).parents[1] / "sla.toml"

KEPT, MISSED, INVALID = "kept", "missed", "invalid"
BASE = "base"
"""In ``over`` and ``minus``: the server that a candidate is compared with."""
CANDIDATE = "candidate"
"""In ``server``, and where that is left out: whichever is compared (`Gate.of`)."""
FAULTS_OF_OTHERS = ("generator", "machine")
"""Whose fault an invalid run may be to be measured again."""

FEWEST_BURSTS = 10
"""How often the reference work must have been done during a run; there are 30 or more of them in half a second."""

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """What a call may cost: a sum of these times microseconds of CPU time that are measured beside the runs."""

    python: float = 0.0
    """Times ``python_us`` of `perf.harness.reference_work`."""
    kernel: float = 0.0
    """Times ``kernel_us``."""
    other: float = 0.0
    """Times what a call costs the server that the gate is ``over``."""


class SlaError(ValueError):
    """The file is not valid; the text says where, and what to write instead."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit for one figure of one scenario."""

    name: str
    scenario: str
    figure: str
    """Of a run; ``latency.p95`` is ``run["latency"]["p95"]``."""
    unit: str
    noise: str
    """Name of the noise model."""
    server: str = CANDIDATE
    over: str = ""
    """The server in the quotient's denominator."""
    minus: str = ""
    """The server whose figure is subtracted."""
    least: float | None = None
    most: float | None = None
    expected: Expected | None = None
    """Divide what a call may cost by what it costs; the figure is then one of calls per second."""
    blur: float = inf
    """How far the interval may reach beyond the limit where the median says kept. Where it reaches further, noise could
    hide what the gate is there to find, and there is no verdict."""

    @property
    def servers(self) -> tuple[str, ...]:
        """Which have to be measured."""
        other = self.over or self.minus
        return (self.server, other) if other else (self.server,)

    def of(self, candidate: str) -> Gate:
        """The same for the server ``candidate``, in place of `CANDIDATE`."""
        return replace(self, server=candidate) if self.server == CANDIDATE else self

    @property
    def limit(self) -> float:
        """The one that is set."""
        return float(self.least if self.least is not None else self.most or 0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of a gate."""

    gate: Gate
    verdict: str
    reason: str
    noise_model: str
    interval: Interval | None = None
    samples: tuple[float, ...] = ()
    decided: bool = True
    """False: more rounds could change the verdict. The limit lies within the interval, or samples are lacking."""
    disturbed: bool = False
    """It is invalid because of the generator or the machine, and for no other reason."""

    def as_dict(self) -> dict[str, Any]:
        """For the record; a limit of an interval that is infinite is None, which JSON can say."""
        middle, low, high = self.interval or (None, None, None)
        return {
            "gate": self.gate.name, "scenario": self.gate.scenario, "server": self.gate.server,
            "value": middle, "low": _finite(low), "high": _finite(high), "limit": self.gate.limit,
            "bound": "least" if self.gate.least is not None else "most", "unit": self.gate.unit,
            "noise_model": self.noise_model, "verdict": self.verdict, "reason": self.reason,
            "disturbed": self.disturbed,
            "samples": [round(sample, 6) for sample in self.samples],
        }  # fmt: skip


def _finite(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Sla:
    """The whole file."""

    gates: tuple[Gate, ...]
    """For every release."""
    comparison: tuple[Gate, ...]
    """For a candidate beside its base."""
    noise: Mapping[str, str]
    """Name of a noise model → what it says."""


_KEYS = {each.name for each in fields(Gate)}
_NEEDED = ("name", "scenario", "figure", "unit", "noise")


def load(path: Path = FILE, scenarios: Iterable[str] | None = None) -> Sla:
    """The gates of ``path``; with ``scenarios``, each gate's scenario must be one of them.

    Raises:
        SlaError: where the file cannot be read or says something that is not understood.
    """
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SlaError(f"{path.name}: {error}") from error
    if unknown := sorted(set(told) - {"gate", "comparison", "noise"}):
        wanted = "[[gate]], [[comparison]] and [noise] are"
        raise SlaError(f"{path.name}: unknown table {', '.join(unknown)}; {wanted} known")
    noise = {name: " ".join(text.split()) for name, text in told.get("noise", {}).items()}
    known = None if scenarios is None else set(scenarios)
    gates = tuple(_gate(table, path.name, noise, known) for table in told.get("gate", []))
    comparison = tuple(_gate(table, path.name, noise, known) for table in told.get("comparison", []))
    for name in {gate.name for gate in gates + comparison}:
        if sum(gate.name == name for gate in gates + comparison) > 1:
            raise SlaError(f"{path.name}: gate {name!r} stands there twice")
    return Sla(gates, comparison, noise)


def _gate(table: dict[str, Any], file: str, noise: Mapping[str, str], scenarios: set[str] | None) -> Gate:
    where = f"{file}: gate {table.get('name', '?')!r}"
    if unknown := sorted(set(table) - _KEYS):
        raise SlaError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if missing := [key for key in _NEEDED if key not in table]:
        raise SlaError(f"{where}: {', '.join(missing)} is missing")
    gate = Gate(**table | {"expected": _expected(table["expected"], where)} if "expected" in table else table)
    if (gate.least is None) is (gate.most is None):
        raise SlaError(f"{where}: it wants either least or most")
    if gate.over and gate.minus:
        raise SlaError(f"{where}: it wants over or minus, not both")
    if gate.expected and (gate.minus or bool(gate.expected.other) is not bool(gate.over)):
        raise SlaError(f"{where}: expected wants other where the gate is over another server, and only there")
    if gate.noise not in noise:
        raise SlaError(f"{where}: noise model {gate.noise!r} is not described in [noise]: {', '.join(noise)}")
    if scenarios is not None and gate.scenario not in scenarios:
        raise SlaError(f"{where}: there is no scenario {gate.scenario!r}")
    return gate


def _expected(told: Any, where: str) -> Expected:
    keys = sorted(each.name for each in fields(Expected))
    if not isinstance(told, dict) or not told or not set(told) <= set(keys):
        raise SlaError(f"{where}: expected wants a table of {', '.join(keys)}")
    if not all(isinstance(value, int | float) and value > 0 for value in told.values()):
        raise SlaError(f"{where}: expected wants numbers above 0")
    return Expected(**told)


def figure(run: Run, path: str) -> float | None:
    """The figure at a dotted path; None where the run has none."""
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def is_failure(run: Run) -> bool:
    """Whether the server failed in it, so that no other run can make up for it."""
    return not run["valid"] and run.get("fault") not in FAULTS_OF_OTHERS


def judge(gate: Gate, runs: Sequence[Run], noise: Mapping[str, str]) -> Verdict:
    """Judge ``gate`` by those of ``runs`` that are of its scenario and servers.

    Runs of the same ``round`` are paired. ``noise``: `Sla.noise`.
    """
    model = noise.get(gate.noise, gate.noise)
    names = gate.servers
    mine = [run for run in runs if run["scenario"] == gate.scenario and run["server"] in names]
    if broken := [run for run in mine if is_failure(run)]:
        first = f"{broken[0]['server']}: {broken[0]['reason']}"
        return Verdict(gate, INVALID, first + (f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""), model)
    good = [run for run in mine if run["valid"] and figure(run, gate.figure) is not None]
    samples = _samples(gate, good, names)
    spoilt = [run for run in mine if not run["valid"]]
    least = least_samples()
    if len(samples) < least or len(spoilt) > len(good):
        reason = _why_too_few(gate, mine, good, len(samples), least)
        there = {run["server"] for run in mine} >= set(names)
        disturbed = there and (bool(spoilt) or bool(_starved_of(gate, good)))
        return Verdict(gate, INVALID, reason, model, decided=not disturbed, disturbed=disturbed)
    interval = median_interval(samples)
    values = tuple(samples)
    right, wrong = _sides(gate, interval)
    if right or wrong:
        reason = "" if right else f"the median lies beyond the limit, and so does all of its interval ({model})"
        return Verdict(gate, KEPT if right else MISSED, reason, model, interval, values)
    kept = interval.median >= gate.limit if gate.least is not None else interval.median <= gate.limit
    if kept and (beyond := _beyond(gate, interval)) > gate.blur:
        far = f"{beyond:.3g} {gate.unit} beyond the limit"
        reason = f"too noisy: after {len(samples)} rounds the median may still lie {far}"
        return Verdict(gate, INVALID, reason, model, interval, values, decided=False, disturbed=True)
    reason = f"the limit lies within the interval: the median of {len(samples)} rounds decides"
    return Verdict(gate, KEPT if kept else MISSED, reason, model, interval, values, decided=False)


def _samples(gate: Gate, good: Sequence[Run], names: Sequence[str]) -> list[float]:
    """One value for each round that has all that the gate needs."""
    by_server = {name: {run["round"]: run for run in good if run["server"] == name} for name in names}
    found = []
    for number, run in by_server[names[0]].items():
        other = by_server[names[-1]].get(number)
        value, second = figure(run, gate.figure), other and figure(other, gate.figure)
        if value is None or second is None or (gate.over and not second):
            continue
        if gate.expected is not None:
            may_cost = _may_cost(gate.expected, run, 1e6 / second if gate.over else 0.0)
            if may_cost is not None:
                found.append(may_cost * value / 1e6)
        else:
            found.append(value / second if gate.over else value - second if gate.minus else value)
    return found


def _may_cost(expected: Expected, run: Run, other_us: float) -> float | None:
    """Microseconds of CPU time that a call may cost; None if the speed of the machine was not measured."""
    speed = run.get("reference")
    if not speed or _starved(run):
        return None
    python, kernel = expected.python * speed["python_us"], expected.kernel * speed["kernel_us"]
    return float(python + kernel + expected.other * other_us)


def _starved(run: Run) -> bool:
    """Whether the reference work had too little of the CPU during the run."""
    return bool(run.get("reference")) and run["reference"]["bursts"] < FEWEST_BURSTS


def _starved_of(gate: Gate, runs: Sequence[Run]) -> list[Run]:
    """Those that give the gate no sample because of that."""
    return [run for run in runs if gate.expected and run["server"] == gate.server and _starved(run)]


def _sides(gate: Gate, interval: Interval) -> tuple[bool, bool]:
    """Whether all of the interval is on the right side, and whether all of it is on the wrong one."""
    if gate.least is not None:
        return interval.low >= gate.least, interval.high < gate.least
    return interval.high <= gate.limit, interval.low > gate.limit


def _beyond(gate: Gate, interval: Interval) -> float:
    """How far the interval reaches beyond the limit."""
    return gate.limit - interval.low if gate.least is not None else interval.high - gate.limit


def _why_too_few(gate: Gate, mine: Sequence[Run], good: Sequence[Run], count: int, least: int) -> str:
    spoilt = [run for run in mine if not run["valid"]]
    for name in gate.servers:
        if not any(run["server"] == name for run in mine):
            return f"{name} was not measured in {gate.scenario}"
    if spoilt:
        return f"{len(spoilt)} of {len(mine)} runs are invalid: {spoilt[0]['server']}: {spoilt[0]['reason']}"
    if starved := _starved_of(gate, good):
        told = f"in {len(starved)} runs of {gate.server} the reference work was done fewer than {FEWEST_BURSTS} times"
        return f"{told}; {count} rounds are left, and a median with 95 % confidence needs {least}"
    if count == 0:
        return f"no run of {gate.scenario} has the figure {gate.figure}"
    return f"{count} rounds; a median with 95 % confidence needs {least}"
