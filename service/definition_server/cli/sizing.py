"""The resources that a load needs: arithmetic on measured figures.

The figures are in ``capacity_figures.json`` next to this module. ``python -m perf capacity`` writes that file from a
record of measurements; the file is never edited by hand. ``docs/capacity.md`` derives the formulas used here.
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
"""The memory limit of a pod, as a multiple of its peak use. The deployment guide has the same factor."""
LEAST_WORKERS = 2
"""The fewest workers: if there were only one, none would answer during its crash or replacement."""
_LIMIT_STEP_MB = 16
_CORE_STEP = 0.1


class FiguresError(Exception):
    """The measured figures are missing or invalid. The message names them."""


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """One measurement of a whole server. Sizes in MB (2²⁰ octets); ``peak_mb`` is measured during a publication."""

    workers: int
    snapshot_mb: float
    private_mb_per_worker: float
    resident_mb: float
    peak_mb: float
    publication_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class MemoryModel:
    """``base + workers × worker + per_snapshot × snapshot``, with coefficients that no measured point exceeds."""

    base_mb: float
    worker_mb: float
    per_snapshot: float

    @classmethod
    def over(cls, points: Sequence[MemoryPoint], peak: bool) -> MemoryModel:
        """The model over ``peak_mb`` or ``resident_mb`` of ``points``.

        ``worker_mb`` is the largest value of all points. ``per_snapshot`` is the steepest slope between the smallest
        and the largest catalogue. ``base_mb`` is the smallest base with which no point lies above the model.
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
        """The memory of a server, in MB."""
        return self.base_mb + workers * self.worker_mb + self.per_snapshot * snapshot_mb


@dataclass(frozen=True, slots=True)
class Figures:
    """The measured figures, and their origin."""

    source: str
    measured: str
    machine: str
    per_core: Mapping[str, float]
    """Scenario → answers a second of one core's time."""
    knee: Mapping[str, float] | None
    """``rate``: the highest rate that one worker answered with a P95 below ``p95_limit_ms``. None: the knee was not
    measured."""
    points: tuple[MemoryPoint, ...]
    kb_per_connection: float
    remembered_answers: int
    """Most ready answers that a worker remembers, in all generations."""

    @property
    def planning(self) -> tuple[str, float]:
        """The most expensive scenario: its name, and the answers per second of one core in it."""
        name = min(self.per_core, key=lambda each: self.per_core[each])
        return name, self.per_core[name]

    @property
    def worker_rate(self) -> float:
        """Answers per second of one worker: the rate of its core, limited to the rate at the knee."""
        rate = self.planning[1]
        return rate if self.knee is None else min(rate, self.knee["rate"])


def figures_from(data: Any) -> Figures:
    """The content of `FILE`.

    Raises:
        FiguresError: if a figure is missing, or no measurement could yield it.
    """
    try:
        figures = Figures(
            source=str(data["source"]),
            measured=str(data["measured"]),
            machine=str(data["machine"]),
            per_core={str(name): float(rate) for name, rate in data["per_core"].items()},
            knee=None if data["knee"] is None else {name: float(value) for name, value in data["knee"].items()},
            points=tuple(MemoryPoint(**point) for point in data["memory"]),
            kb_per_connection=float(data["kb_per_connection"]),
            remembered_answers=int(data["remembered_answers"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FiguresError(f"{FILE}: {type(error).__name__}: {error}") from error
    if not figures.per_core or not all(rate > 0 for rate in figures.per_core.values()):
        raise FiguresError(f"{FILE}: per_core must have at least one scenario, and rates above 0")
    if figures.knee is not None and not figures.knee.get("rate", 0) > 0:
        raise FiguresError(f"{FILE}: knee must have a rate above 0")
    if len({point.snapshot_mb for point in figures.points}) < 2:
        raise FiguresError(f"{FILE}: memory must have measurements of at least two catalogue sizes")
    return figures


def load_figures() -> Figures:
    """The figures that come with this package.

    Raises:
        FiguresError: if the figures cannot be used.
    """
    try:
        text = resources.files(__package__).joinpath(FILE).read_text(encoding="utf-8")
        return figures_from(json.loads(text))
    except (OSError, ValueError) as error:
        raise FiguresError(f"{FILE}: {error}") from error


@dataclass(frozen=True, slots=True)
class Demand:
    """The load: calls per second of all replicas together, and the catalogue that they serve."""

    rps: float
    definitions: int
    definition_octets: int
    replicas: int
    connections: int
    """Client connections, of all replicas together."""
    margin: float
    """Share of a core's time that stays free, for bursts and for other processes on the machine."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The resources that each replica needs. Memory in MB (2²⁰ octets)."""

    rps_per_replica: float
    """Calls per second of one replica while another is down, if there are several."""
    worker_rps: float
    """The planned rate of one worker: its rate minus the margin."""
    workers: int
    busy_cores: float
    cpu_request: float
    cpu_limit: int
    snapshot_mb: float
    resident_mb: float
    peak_mb: float
    memory_limit_mb: int
    publication_cpu_seconds: float
    """CPU time of the master for each publication."""
    utilisation: float
    """Share of the workers' time that is used at the given load."""


def snapshot_octets(definitions: int, octets: int) -> int:
    """Octets of a snapshot of ``definitions`` whose serialized ``CommandResponse`` has ``octets`` on average.

    A tag and a length (two to five octets) precede each response: see docs/architecture.md, "Snapshot layout".
    """
    framing = 1 + max(1, math.ceil(octets.bit_length() / 7))
    return definitions * (octets + framing) + slot_count(definitions) * SLOT.size + FOOTER_SIZE


def answer(demand: Demand, figures: Figures) -> Answer:
    """The resources that ``demand`` needs, by ``figures``.

    One replica may be down (a rollout, a lost node), so the others share its load. A worker may be replaced at any
    time, so memory is counted for one more worker.
    """
    share = demand.rps / max(1, demand.replicas - 1)
    worker_rps = figures.worker_rate * (1 - demand.margin)
    # 1e-9 is subtracted because of rounding errors: 60,000 ÷ (100,000 × 0.6) must give one worker.
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
