"""Reads the records of ``python -m perf measure``; the runs of one scenario on one server become a `Cell`.

A record is not trusted: files of other programs, old files and damaged files are refused with a text that names the
fault and its place.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tests.support.hdr import UNDECODABLE, HdrHistogram
from tests.support.results import RESULTS, SCHEMA

from perf.generator.scenarios import SERVERS
from perf.harness.statistics import Interval, median_interval

_UNITS_PER_MS = {"ns": 1e6, "µs": 1e3, "us": 1e3, "ms": 1.0}
_SAME_LOAD = 1.01
_UNDECODABLE = (
    ValueError, TypeError, LookupError, RuntimeError, zlib.error, *UNDECODABLE,
)  # fmt: skip

Figure = Annotated[float, Field(allow_inf_nan=False)] | None


class RecordError(ValueError):
    """A file is not a valid record; the text names the file, the fault and the remedy."""


class _Part(BaseModel):
    """A part of a record. It may have further keys, for other readers."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Run(_Part):
    """One measurement. Times in seconds, memory in MB, latencies in milliseconds by percentile (``p50`` … ``max``)."""

    scenario: str
    server: str
    kind: str
    valid: bool
    reason: str = ""
    offered_rate: Figure = None
    answered: int = 0
    seconds: Figure = None
    rate: Figure = None
    per_server_cpu_second: Figure = None
    server_cpu_seconds: Figure = None
    server_user_seconds: Figure = None
    server_system_seconds: Figure = None
    server_softirq_seconds: Figure = None
    client_us_per_call: Figure = None
    latency: dict[str, Figure] | None = None
    histogram: str | None = None
    histogram_unit: str = "ns"
    resident_mb: Figure = None
    peak_resident_mb: Figure = None
    late: Figure = None


class Gate(_Part):
    """A verdict, as `perf.harness.sla.Verdict.as_dict` writes it."""

    gate: str
    verdict: str
    scenario: str = ""
    value: Figure = None
    low: Figure = None
    high: Figure = None
    limit: Figure = None
    bound: str = "least"
    unit: str = ""
    noise_model: str = ""
    reason: str = ""
    samples: list[Figure] = []


class KneePoint(_Part):
    """The answered rate and the latencies (ms) while ``offered_rate`` calls a second were offered."""

    offered_rate: float
    valid: bool
    server: str = "native"
    rate: Figure = None
    p50: Figure = None
    p95: Figure = None
    p99: Figure = None
    reason: str = ""


class MemoryPoint(_Part):
    """A whole server at rest, as `perf.harness.memory.measure` writes it; MB."""

    definitions: int
    workers: int
    shared_mb: float
    private_mb_per_worker: float
    master_mb: float
    peak_mb: Figure = None

    @property
    def total_mb(self) -> float:
        """Memory that a pod is charged for."""
        return self.shared_mb + self.workers * self.private_mb_per_worker + self.master_mb


class Scenario(_Part):
    """The load that was measured."""

    title: str = ""
    why: str = ""


class Skipped(_Part):
    """A part that was not measured, and the reason."""

    what: str
    why: str


class Case(_Part):
    """One kind of worker of the self-test, and whether it raised an alarm in each run."""

    name: str
    alarm_expected: bool
    alarms: list[bool]
    what: str = ""
    limit: int | None = None

    @property
    def kept(self) -> bool:
        """Whether the number of alarms reaches its minimum or stays below its maximum."""
        raised, limit = sum(self.alarms), self.limit
        if self.alarm_expected:
            return raised >= (len(self.alarms) if limit is None else limit)
        return raised <= (0 if limit is None else limit)


class SelfTest(_Part):
    """The self-test: whether the gates detect a slower server."""

    cases: list[Case]


class Witness(_Part):
    """A comparison with an independent generator, as `perf.benches.witness` writes it."""

    witness: str
    verdict: str
    what: str = ""
    unit: str = ""
    ours: Figure = None
    theirs: Figure = None
    allowed: Figure = None
    difference: Figure = None
    reason: str = ""


class Record(_Part):
    """A whole record file."""

    path: Path = Field(exclude=True)
    title: str = "Performance"
    measured: str
    duration_seconds: Figure = None
    arguments: dict[str, Any] = {}
    commit: str = ""
    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}
    scenarios: dict[str, Scenario] = {}
    runs: list[Run]
    gates: list[Gate] = []
    knee: list[KneePoint] = []
    memory: list[MemoryPoint] = []
    selftest: SelfTest | None = None
    skipped: list[Skipped] = []
    witnesses: list[Witness] = []

    @cached_property
    def cells(self) -> dict[tuple[str, str], Cell]:
        """The runs grouped by scenario and server."""
        found: dict[tuple[str, str], list[Run]] = {}
        for run in self.runs:
            found.setdefault((run.scenario, run.server), []).append(run)
        return {key: Cell(runs, self.path.name) for key, runs in found.items()}

    @cached_property
    def measured_scenarios(self) -> list[str]:
        """Measured scenarios in the order of ``scenarios``, which is that of the file; unlisted ones are last."""
        ranks = {name: rank for rank, name in enumerate(self.scenarios)}
        return sorted(dict.fromkeys(run.scenario for run in self.runs), key=lambda name: ranks.get(name, len(ranks)))

    def title_of(self, scenario: str) -> str:
        """The title of the scenario; empty if the record has none."""
        return self.scenarios[scenario].title if scenario in self.scenarios else ""

    @cached_property
    def servers(self) -> list[str]:
        """Measured servers in the order of `SERVERS`."""
        return in_order(run.server for run in self.runs)

    def times(self, scenario: str, other: str) -> float | None:
        """Calls per core of the native server, divided by those of ``other``.

        This is the quotient that a gate judges (the median of the rounds' quotients) or, if no gate judges it, the
        quotient of the medians.
        """
        judged = [
            gate for gate in self.gates if gate.scenario == scenario and gate.gate.startswith(f"native ÷ {other},")
        ]
        if judged and judged[0].value is not None:
            return judged[0].value
        ours, theirs = (self.cells.get((scenario, server)) for server in ("native", other))
        if not (ours and theirs and ours.per_core and theirs.per_core):
            return None
        return ours.per_core.median / theirs.per_core.median

    @property
    def valid(self) -> bool:
        """Whether no gate is invalid. An invalid gate means that the machine was disturbed."""
        return all(gate.verdict != "invalid" for gate in self.gates)

    @property
    def machine_name(self) -> str:
        """CPU and number of CPUs: figures of different machines are not compared."""
        return f"{self.machine.get('cpu', 'unknown CPU')}, {self.machine.get('cpus', '?')} CPUs"

    @property
    def partial(self) -> bool:
        """Whether the record is not a whole measurement but a quick run, a selection, a comparison, or a self-test
        alone."""
        return not self.runs or any(self.arguments.get(name) for name in ("quick", "only", "servers", "against"))


class Cell:
    """All runs of one scenario on one server. Figures are medians of the valid runs; None if there is none."""

    def __init__(self, runs: Sequence[Run], file: str) -> None:
        self.runs, self._file = runs, file
        self.in_steps = _in_steps([run for run in runs if run.valid])
        """Whether the load was raised from run to run."""
        self.valid = _alike([run for run in runs if run.valid])
        self.invalid = [run for run in runs if not run.valid]

    @property
    def kind(self) -> str:
        """The kind of the scenario."""
        return (self.valid or self.runs)[0].kind

    @property
    def reason(self) -> str:
        """The reason why there is no figure; empty if there is a figure."""
        return "" if self.valid else (self.invalid[0].reason or "no reason was given")

    def figure(self, name: str) -> float | None:
        """The median of the attribute ``name``."""
        return _middle(getattr(run, name) for run in self.valid)

    def latency(self, percentile: str) -> float | None:
        """The median of the runs' ``p50``, ``p95`` …, in milliseconds."""
        return _middle((run.latency or {}).get(percentile) for run in self.valid)

    @property
    def per_core(self) -> Interval | None:
        """Answers for each second of the server's CPU time, with its interval (infinite below six runs)."""
        samples = [run.per_server_cpu_second for run in self.valid if run.per_server_cpu_second]
        return median_interval(samples) if samples else None

    def us_per_answer(self, name: str) -> float | None:
        """Microseconds of one kind of the server's time (``server_user_seconds`` …) for each answer."""
        spent = [(getattr(run, name), run.answered) for run in self.valid]
        return _middle(None if seconds is None or not count else seconds / count * 1e6 for seconds, count in spent)

    @property
    def kernel_share(self) -> float | None:
        """The share of the server's CPU time that is not user time, of all valid runs together, because user time is
        counted in coarse steps."""
        counted = [(run.server_user_seconds, run.server_cpu_seconds) for run in self.valid]
        known = [(user, whole) for user, whole in counted if user is not None and whole]
        return 1 - sum(user for user, _ in known) / sum(whole for _, whole in known) if known else None

    def curve(self, percentiles: Sequence[float]) -> list[tuple[float, float]]:
        """Pairs (percentile, milliseconds) of all valid runs together, for those of ``percentiles`` for which there are
        enough answers; empty if the record has no histogram.

        Raises:
            RecordError: if a histogram cannot be read.
        """
        whole, per_ms = None, 1.0
        for run in self.valid:
            if not run.histogram:
                continue
            per_ms = _UNITS_PER_MS.get(run.histogram_unit, 0.0)
            if not per_ms:
                raise RecordError(f"{self._where}: histogram_unit {run.histogram_unit!r} is not one of ns, µs, ms")
            try:
                one = HdrHistogram.decode(run.histogram)
                if whole is None:
                    whole = one
                else:
                    whole.add(one)
            except _UNDECODABLE as error:
                raise RecordError(f"{self._where}: a histogram cannot be decoded: {error!r}") from error
        if whole is None or not (count := whole.get_total_count()):
            return []
        last = 100 * (1 - 1 / count)
        wanted = [each for each in percentiles if each < last] + [last]
        values = whole.get_percentile_to_value_dict(wanted)
        return [(each, values[each] / per_ms) for each in wanted]

    @property
    def _where(self) -> str:
        return f"{self._file}: {self.runs[0].scenario}, {self.runs[0].server}"


def _in_steps(runs: Sequence[Run]) -> bool:
    """Whether the runs were offered different loads. The offered load is measured, so equal loads differ a little."""
    offered = [run.offered_rate for run in runs if run.offered_rate]
    return 0 < len(offered) < len(runs) or (bool(offered) and max(offered) > _SAME_LOAD * min(offered))


def _alike(runs: list[Run]) -> list[Run]:
    """The runs that may be combined. If the load is raised in steps, these are the closed-loop runs, which show the
    server's limit; the steps belong to the knee."""
    if not _in_steps(runs):
        return runs
    return [run for run in runs if not run.offered_rate] or [max(runs, key=lambda run: run.rate or 0.0)]


def _middle(values: Iterable[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return median(there) if there else None


def in_order(servers: Iterable[str]) -> list[str]:
    """``servers`` without repetition, in the order of `SERVERS`; unknown ones last, by name."""
    ranks = {name: rank for rank, name in enumerate(SERVERS)}
    return sorted(set(servers), key=lambda name: (ranks.get(name, len(ranks)), name))


def load(path: Path) -> Record:
    """Read a record file.

    Raises:
        RecordError: if the file is not a valid record.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        found = "none" if schema is None else f"{schema!r}"
        raise RecordError(f"{path}: not a record of `python -m perf measure`: schema {SCHEMA} expected, {found} found")
    try:
        return Record(**content | {"path": path})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise RecordError(f"{path}: {where}: {first['msg']}{more}; measure again, or repair the file") from error


def kept(folder: Path = RESULTS) -> list[Record]:
    """All records of ``folder``, oldest first. Files of other measurements, which have no ``schema``, are left out.

    Raises:
        RecordError: if one of the records is damaged.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RecordError(f"{path}: cannot be read: {error}") from error
        if isinstance(content, dict) and "schema" in content:
            found.append(load(path))
    return sorted(found, key=lambda record: record.measured)
