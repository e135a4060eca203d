"""Gates: limits for figures of a server, judged from several runs. The head of ``sla.toml`` describes their keys.

**How a gate is judged.** Each round of a measurement gives one sample: a figure of one run, or, if the gate is ``over``
or ``minus`` another server, the quotient or the difference of two runs of the same round. The median of all rounds has
a confidence interval (`perf.harness.statistics`):

- the whole interval is on the right side of the limit: the gate is kept;
- the whole interval is on the wrong side: the gate is missed;
- the limit is within the interval: the gate is undecided. More rounds are measured up to a maximum; after the last one
  the median decides. If the median says kept but the interval reaches further beyond the limit than the gate's
  ``blur``, the gate is invalid.

**Independence from the machine's speed.** A gate with ``expected`` divides the CPU time that a call may cost on this
machine and this interpreter by the time that it costs: the figure is 1 on the calibrated server, and falls by a tenth
if the server becomes a tenth slower. A call may cost the sum of ``python`` × the reference work's ``python_us``,
``kernel`` × its ``kernel_us``, and ``other`` × the cost of a call to the server that the gate is ``over``.

**Runs without a figure.** A run in which the server failed makes its gate invalid regardless of other runs, and so does
a server that was not measured at all: both are defects. A run that the generator or the machine spoilt is left out and
measured again. If there are more such runs than good ones, or fewer good ones than an interval needs, the gate is
invalid because the measurement was ``disturbed``: such a result does not describe the server.
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
"""The value of ``server`` in place of the name of the compared server (`Gate.of`); the default of a comparison."""
FAULTS_OF_OTHERS = ("generator", "machine")
"""An invalid run is measured again if its fault is one of these."""

FEWEST_BURSTS = 10
"""Minimum number of bursts of reference work during a run; half a second usually has 30 or more."""

Run = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Expected:
    """Factors of the CPU times that are measured during the runs. The sum of the products is the cost that a call may
    have."""

    python: float = 0.0
    """Factor of ``python_us`` of `perf.harness.reference_work`."""
    kernel: float = 0.0
    """Factor of ``kernel_us`` of `perf.harness.reference_work`."""
    other: float = 0.0
    """Factor of the cost of a call to the server that the gate is ``over``."""


class SlaError(ValueError):
    """The file is not valid; the text names the place and a remedy."""


@dataclass(frozen=True, slots=True)
class Gate:
    """A limit for one figure of one scenario."""

    name: str
    scenario: str
    figure: str
    """Path of a figure in a run; ``latency.p95`` is ``run["latency"]["p95"]``."""
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
    """If set, a sample is the cost that a call may have ÷ its cost; ``figure`` is then a number of calls per second."""
    blur: float = inf
    """The distance by which the interval may reach beyond the limit if the median says kept. If the interval reaches
    further, noise could hide the change that the gate must find, so the gate is invalid."""

    @property
    def servers(self) -> tuple[str, ...]:
        """The servers that must be measured."""
        other = self.over or self.minus
        return (self.server, other) if other else (self.server,)

    def of(self, candidate: str) -> Gate:
        """The same gate with the server ``candidate`` in place of `CANDIDATE`."""
        return replace(self, server=candidate) if self.server == CANDIDATE else self

    @property
    def limit(self) -> float:
        """``least`` or ``most``, whichever is set."""
        return float(self.least if self.least is not None else self.most or 0.0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a gate."""

    gate: Gate
    verdict: str
    reason: str
    noise_model: str
    interval: Interval | None = None
    samples: tuple[float, ...] = ()
    decided: bool = True
    """False if more rounds could change the verdict: the limit is within the interval, or there are too few samples."""
    disturbed: bool = False
    """Whether the gate is invalid only because of the generator or the machine."""

    def as_dict(self) -> dict[str, Any]:
        """The verdict for the record; an infinite end of the interval becomes None, because JSON has no infinity."""
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
    """The content of the whole file."""

    gates: tuple[Gate, ...]
    """Gates for every release."""
    comparison: tuple[Gate, ...]
    """Gates for a candidate compared with its base."""
    noise: Mapping[str, str]
    """Name of a noise model → its text."""


_KEYS = {each.name for each in fields(Gate)}
_NEEDED = ("name", "scenario", "figure", "unit", "noise")


def load(path: Path = FILE, scenarios: Iterable[str] | None = None) -> Sla:
    """The gates of ``path``; with ``scenarios``, each gate's scenario must be one of them.

    Raises:
        SlaError: if the file cannot be read, or is not valid.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SlaError(f"{path.name}: {error}") from error
    if unknown := sorted(set(content) - {"gate", "comparison", "noise"}):
        known_tables = "[[gate]], [[comparison]] and [noise]"
        raise SlaError(f"{path.name}: unknown table {', '.join(unknown)}; the tables are {known_tables}")
    noise = {name: " ".join(text.split()) for name, text in content.get("noise", {}).items()}
    known = None if scenarios is None else set(scenarios)
    gates = tuple(_gate(table, path.name, noise, known) for table in content.get("gate", []))
    comparison = tuple(_gate(table, path.name, noise, known) for table in content.get("comparison", []))
    for name in {gate.name for gate in gates + comparison}:
        if sum(gate.name == name for gate in gates + comparison) > 1:
            raise SlaError(f"{path.name}: gate {name!r} is defined twice")
    return Sla(gates, comparison, noise)


def _gate(table: dict[str, Any], file: str, noise: Mapping[str, str], scenarios: set[str] | None) -> Gate:
    where = f"{file}: gate {table.get('name', '?')!r}"
    if unknown := sorted(set(table) - _KEYS):
        raise SlaError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(_KEYS))}")
    if missing := [key for key in _NEEDED if key not in table]:
        raise SlaError(f"{where}: {', '.join(missing)} is missing")
    gate = Gate(**table | {"expected": _expected(table["expected"], where)} if "expected" in table else table)
    if (gate.least is None) is (gate.most is None):
        raise SlaError(f"{where}: it takes either least or most")
    if gate.over and gate.minus:
        raise SlaError(f"{where}: it takes over or minus, not both")
    if gate.expected and (gate.minus or bool(gate.expected.other) is not bool(gate.over)):
        raise SlaError(f"{where}: expected takes other if, and only if, the gate is over another server")
    if gate.noise not in noise:
        raise SlaError(f"{where}: noise model {gate.noise!r} is not described in [noise]: {', '.join(noise)}")
    if scenarios is not None and gate.scenario not in scenarios:
        raise SlaError(f"{where}: there is no scenario {gate.scenario!r}")
    return gate


def _expected(table: Any, where: str) -> Expected:
    keys = sorted(each.name for each in fields(Expected))
    if not isinstance(table, dict) or not table or not set(table) <= set(keys):
        raise SlaError(f"{where}: expected takes a table of {', '.join(keys)}")
    if not all(isinstance(value, int | float) and value > 0 for value in table.values()):
        raise SlaError(f"{where}: expected takes numbers above 0")
    return Expected(**table)


def figure(run: Run, path: str) -> float | None:
    """The figure at a dotted path; None if the run does not have it."""
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and isfinite(value) else None


def is_failure(run: Run) -> bool:
    """Whether the server failed in the run, so that its gates are invalid even if other runs are valid."""
    return not run["valid"] and run.get("fault") not in FAULTS_OF_OTHERS


def judge(gate: Gate, runs: Sequence[Run], noise: Mapping[str, str]) -> Verdict:
    """Judge ``gate`` by those of ``runs`` that belong to its scenario and servers.

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
        reason = "" if right else f"the median and its whole interval lie beyond the limit ({model})"
        return Verdict(gate, KEPT if right else MISSED, reason, model, interval, values)
    kept = interval.median >= gate.limit if gate.least is not None else interval.median <= gate.limit
    if kept and (beyond := _beyond(gate, interval)) > gate.blur:
        far = f"{beyond:.3g} {gate.unit} beyond the limit"
        reason = f"too noisy: after {len(samples)} rounds the median may still lie {far}"
        return Verdict(gate, INVALID, reason, model, interval, values, decided=False, disturbed=True)
    reason = f"the limit lies within the interval: the median of {len(samples)} rounds decides"
    return Verdict(gate, KEPT if kept else MISSED, reason, model, interval, values, decided=False)


def _samples(gate: Gate, good: Sequence[Run], names: Sequence[str]) -> list[float]:
    """One value for each round that has all runs and figures that the gate needs."""
    by_server = {name: {run["round"]: run for run in good if run["server"] == name} for name in names}
    found = []
    for number, run in by_server[names[0]].items():
        other = by_server[names[-1]].get(number)
        value, second = figure(run, gate.figure), None if other is None else figure(other, gate.figure)
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
    """The runs that give the gate no sample because the reference work had too little of the CPU."""
    return [run for run in runs if gate.expected and run["server"] == gate.server and _starved(run)]


def _sides(gate: Gate, interval: Interval) -> tuple[bool, bool]:
    """Whether the whole interval is on the right side of the limit, and whether it is on the wrong side."""
    if gate.least is not None:
        return interval.low >= gate.least, interval.high < gate.least
    return interval.high <= gate.limit, interval.low > gate.limit


def _beyond(gate: Gate, interval: Interval) -> float:
    """The distance by which the interval reaches beyond the limit."""
    return gate.limit - interval.low if gate.least is not None else interval.high - gate.limit


def _why_too_few(gate: Gate, mine: Sequence[Run], good: Sequence[Run], count: int, least: int) -> str:
    spoilt = [run for run in mine if not run["valid"]]
    for name in gate.servers:
        if not any(run["server"] == name for run in mine):
            return f"{name} was not measured in {gate.scenario}"
    if spoilt:
        return f"{len(spoilt)} of {len(mine)} runs are invalid: {spoilt[0]['server']}: {spoilt[0]['reason']}"
    if starved := _starved_of(gate, good):
        starving = f"in {len(starved)} runs of {gate.server} the reference work made fewer than {FEWEST_BURSTS} bursts"
        return f"{starving}; {count} rounds are left, and a median with 95 % confidence needs {least}"
    if count == 0:
        return f"no run of {gate.scenario} has the figure {gate.figure}"
    return f"{count} rounds; a median with 95 % confidence needs {least}"
