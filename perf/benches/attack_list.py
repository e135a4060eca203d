"""The attacks and their limits: ``perf/attacks.toml``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "attacks.toml"
VARIANTS = ("cleartext", "tls")
ACTIONS = ("", "publish", "drain", "shutdown")
SHORT_SECONDS = 2.5
STRETCH = "worker_stretch"
"""The name of the figure (CPU time of the worker during the attack + time that the worker waited for its CPU) ÷ CPU
time. It is 1 on a machine without other work."""
CALM = "calm_"
"""The prefix of a figure of the undisturbed victim."""


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit of one figure."""

    figure: str
    most: float | None = None
    least: float | None = None
    ratio: float | None = None
    """The figure may be this many times the undisturbed figure, if this product is more than ``most``."""
    stretched: bool = False
    """``most`` holds for a worker that has its CPU to itself. If other processes had its CPU, ``most`` is multiplied
    by the figure `STRETCH`."""
    why: str = ""

    def __post_init__(self) -> None:
        if (self.most is None) == (self.least is None):
            raise ValueError(f"{self.figure}: give either most or least")
        if self.stretched and self.most is None:
            raise ValueError(f"{self.figure}: only most can be stretched")
        if self.ratio is not None and self.most is None:
            raise ValueError(f"{self.figure}: a ratio needs most")

    def kept(self, figures: Mapping[str, float]) -> bool:
        """Whether the figures of a run keep this limit. A missing figure does not keep it."""
        value = figures.get(self.figure)
        if value is None:
            return False
        if self.least is not None:
            return value >= self.least
        return value <= self.bound(figures)

    def bound(self, figures: Mapping[str, float]) -> float:
        """The limit in this run."""
        if self.least is not None:
            return self.least
        assert self.most is not None
        most = self.most * figures.get(STRETCH, 1.0) if self.stretched else self.most
        calm = figures.get(CALM + self.figure)
        return most if self.ratio is None or calm is None else max(most, self.ratio * calm)


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack: its actions, its duration, and the limits of its effects."""

    name: str
    title: str
    before: str
    job: dict[str, Any]
    seconds: float = 0.0
    limits: tuple[Limit, ...] = ()
    short: tuple[str, ...] = ()
    """The variants in which the attack is part of the short measurement."""
    transports: tuple[str, ...] = ("native", "grpcio")
    why_not: str = ""
    variants: tuple[str, ...] = VARIANTS
    settings: dict[str, str] = field(default_factory=dict)
    action: str = ""

    def made_in(self, variant: str, *, short: bool) -> bool:
        """Whether the attack is made in that variant."""
        return variant in (self.short if short else self.variants)

    def duration(self, usual: float, *, short: bool) -> float:
        """The attack's duration in seconds. In the short measurement, an attack of the usual duration takes
        `SHORT_SECONDS`."""
        return min(self.seconds, SHORT_SECONDS) if short and self.seconds <= usual else self.seconds


@dataclass(frozen=True, slots=True)
class AttackList:
    """The content of the whole file. Times are in seconds."""

    victim: str
    seconds: float
    calm_seconds: float
    settle_seconds: float
    """How long the memory of an attack may stay in use after the attack has ended."""
    attacks: tuple[Attack, ...]


def load(file: Path = FILE) -> AttackList:
    """Read the file.

    Raises:
        ValueError: for a key or a value that the classes above do not allow.
    """
    content = tomllib.loads(file.read_text(encoding="utf-8"))
    always = tuple(Limit(**each) for each in content.pop("limit"))
    try:
        attacks = tuple(_attack(each, always, content["seconds"]) for each in content.pop("attack"))
        return AttackList(**content, attacks=attacks)
    except TypeError as error:
        raise ValueError(f"{file.name}: {error}") from error


def _attack(entry: dict[str, Any], always: tuple[Limit, ...], seconds: float) -> Attack:
    limits = tuple(Limit(**each) for each in entry.pop("limits", ()))
    lists: dict[str, Any] = {key: tuple(entry.pop(key)) for key in ("transports", "variants", "short") if key in entry}
    made = Attack(**{"seconds": seconds} | entry, **lists, limits=limits + always)
    if made.action not in ACTIONS:
        raise ValueError(f"{made.name}: the action {made.action!r} is not one of {ACTIONS}")
    if ("grpcio" not in made.transports) != bool(made.why_not):
        raise ValueError(f"{made.name}: why_not says why the limits are not judged on a transport")
    return made
