"""How much machine a load takes: arithmetic on figures that were measured.

The figures are ``capacity_figures.json`` beside this module. ``python -m perf capacity`` writes that file from
a record of measurements; nobody types a number into it. ``docs/capacity.md`` derives the formulas used here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from definition_server.catalog.layout import FOOTER_SIZE, SLOT, slot_count

FILE = "capacity_figures.json"
MB = 1 << 20
LIMIT_OVER_PEAK = 1.2
"""The guide's memory math: the limit of a pod exceeds what it holds by 20 %."""
LEAST_WORKERS = 2
"""With a single one, its crash or its replacement would leave nobody who answers."""
_LIMIT_STEP_MB = 16
_CORE_STEP = 0.1


class FiguresError(Exception):
    """The measured figures are missing or make no sense; the text tells which."""


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """One measurement of a whole server. Sizes in MB (2²⁰ octets); ``peak_mb`` while it publishes."""

    workers: int
    snapshot_mb: float
    private_mb_per_worker: float
    resident_mb: float
    peak_mb: float
    publication_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """``base + workers × worker + per_snapshot × snapshot``, so chosen that no measured point lies above it."""

    base_mb: float
    worker_mb: float
    per_snapshot: float

    @classmethod
    def over(cls, points: Sequence[MemoryPoint], peak: bool) -> MemoryModel:
        """The model over ``peak_mb`` or ``resident_mb`` of ``points``.

        The worker's part is the largest seen, the slope the steepest between the smallest and the largest catalogue;
        the base is then what the highest point leaves.
        """
        worker = max(point.private_mb_per_worker for point in points)
        rest = [
            (each.snapshot_mb, (each.peak_mb if peak else each.resident_mb) - each.workers * worker) for each in points
        ]
        least, most = min(size for size, _ in rest), max(size for size, _ in rest)
        low, high = min(left for size, left in rest if size == least), max(left for size, left in rest if size == most)
        slope = max(0.0, (high - low) / (most - least))
        return cls(max(left - slope * size for size, left in rest), worker, slope)

    def held_mb(self, workers: int, snapshot_mb: float) -> float:
        """What a server holds, in MB."""
        return self.base_mb + workers * self.worker_mb + self.per_snapshot * snapshot_mb


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured, and where."""

    source: str
    measured: str
    machine: str
    per_core: Mapping[str, float]
    """Scenario → answers a second of one core's time."""
    knee: Mapping[str, float] | None
    """``rate``: the most that one worker answered with a P95 below ``p95_limit_ms``; None: not measured."""
    points: tuple[MemoryPoint, ...]
    kb_per_connection: float
    remembered_answers: int
    """Ready answers that a worker keeps of its own, at most."""

    @property
    def planning(self) -> tuple[str, float]:
        """The dearest of the scenarios: its name, answers a second of a core."""
        name = min(self.per_core, key=lambda each: self.per_core[each])
        return name, self.per_core[name]

    @property
    def worker_rate(self) -> float:
        """Answers a second that one worker can give: what its core's time is worth, and never above the knee."""
        rate = self.planning[1]
        return rate if self.knee is None else min(rate, self.knee["rate"])


def figures_from(told: Any) -> Figures:
    """The content of `FILE`.

    Raises:
        FiguresError: where something is missing or no measurement could say so.
    """
    try:
        figures = Figures(
            source=str(told["source"]),
            measured=str(told["measured"]),
            machine=str(told["machine"]),
            per_core={str(name): float(rate) for name, rate in told["per_core"].items()},
            knee=None if told["knee"] is None else {name: float(value) for name, value in told["knee"].items()},
            points=tuple(MemoryPoint(**point) for point in told["memory"]),
            kb_per_connection=float(told["kb_per_connection"]),
            remembered_answers=int(told["remembered_answers"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FiguresError(f"{FILE}: {type(error).__name__}: {error}") from error
    if not figures.per_core or not all(rate > 0 for rate in figures.per_core.values()):
        raise FiguresError(f"{FILE}: per_core wants at least one scenario, and rates above 0")
    if figures.knee is not None and not figures.knee.get("rate", 0) > 0:
        raise FiguresError(f"{FILE}: knee wants a rate above 0")
    if len({point.snapshot_mb for point in figures.points}) < 2:
        raise FiguresError(f"{FILE}: memory wants measurements of at least two sizes of catalogues")
    return figures


def load_figures() -> Figures:
    """The figures that came with this package.

    Raises:
        FiguresError: where they cannot be used.
    """
    try:
        text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
        return figures_from(json.loads(text))
    except (OSError, ValueError) as error:
        raise FiguresError(f"{FILE}: {error}") from error


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked: calls a second of all replicas together, and the catalogue that they serve."""

    rps: float
    definitions: int
    definition_octets: int
    replicas: int
    connections: int
    """Client connections, of all replicas together."""
    margin: float
    """Share of a core's time that stays free: for bursts, and for a neighbour that takes more than its part."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What each replica takes. Memory in MB (2²⁰ octets)."""

    rps_per_replica: float
    """With one replica away, where there are several."""
    worker_rps: float
    """What is planned for one worker: what it can, less the margin."""
    workers: int
    busy_cores: float
    cpu_request: float
    cpu_limit: int
    snapshot_mb: float
    resident_mb: float
    peak_mb: float
    memory_limit_mb: int
    publication_cpu_seconds: float
    """The master's, each time the table has changed."""
    utilisation: float
    """Share of the workers' time that is used at the load asked for."""


def snapshot_octets(definitions: int, octets: int) -> int:
    """Octets of a snapshot of ``definitions`` whose serialized ``CommandResponse`` has ``octets`` on the average.

    Each has a tag and a length (two to five octets) in front of it: docs/architecture.md, "Snapshot layout".
    """
    framing = 1 + max(1, math.ceil(octets.bit_length() / 7))
    return definitions * (octets + framing) + slot_count(definitions) * SLOT.size + FOOTER_SIZE


def answer(demand: Demand, figures: Figures) -> Answer:
    """What ``demand`` takes, by ``figures``.

    One replica may be away (a rollout, a lost node), so the others share what it would have had; a worker may be
    replaced, so memory is counted for one more than there are.
    """
    share = demand.rps / max(1, demand.replicas - 1)
    worker_rps = figures.worker_rate * (1 - demand.margin)
    # A hair less than the quotient: 60,000 ÷ (100,000 × 0.6) is one worker, whatever the last binary digit says.
    workers = max(LEAST_WORKERS, math.ceil(share / worker_rps - 1e-9))
    busy = share / figures.planning[1]
    snapshot_mb = snapshot_octets(demand.definitions, demand.definition_octets) / MB
    clients = demand.connections / max(1, demand.replicas - 1) * figures.kb_per_connection * 1000 / MB
    remembered = min(demand.definitions, figures.remembered_answers) * demand.definition_octets / MB
    held = clients + remembered * (workers + 1)
    resident, peak = (MemoryModel.over(figures.points, peak=moment) for moment in (False, True))
    peak_mb = peak.held_mb(workers + 1, snapshot_mb) + held
    largest = max(figures.points, key=lambda point: (point.snapshot_mb, point.publication_cpu_seconds))
    return Answer(
        rps_per_replica=share,
        worker_rps=worker_rps,
        workers=workers,
        busy_cores=busy,
        cpu_request=math.ceil(busy / (1 - demand.margin) / _CORE_STEP - 1e-9) * _CORE_STEP,
        cpu_limit=workers + 1,
        snapshot_mb=snapshot_mb,
        resident_mb=resident.held_mb(workers, snapshot_mb) + clients + remembered * workers,
        peak_mb=peak_mb,
        memory_limit_mb=math.ceil(peak_mb * LIMIT_OVER_PEAK / _LIMIT_STEP_MB) * _LIMIT_STEP_MB,
        publication_cpu_seconds=largest.publication_cpu_seconds * snapshot_mb / largest.snapshot_mb,
        utilisation=share / (workers * figures.worker_rate),
    )
