"""The effect of attacks on a victim: interleaved measurements, and the ratio of their medians."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from perf.benches.victim import VictimMeasurements
from perf.targets.target import TargetFailed

Measured = Callable[..., dict[str, Any]]


class Served:
    """A stand-in for a worker; its process id is that of this process."""

    def __init__(self) -> None:
        self.alive = True
        self.target = self
        self.pid = os.getpid()


def measured(**p99s: list[float]) -> Measured:
    """A measurement that returns these P99 one after another; ``calm`` are those without an attack."""
    left: dict[str, Iterator[float]] = {name: iter(values) for name, values in p99s.items()}
    return lambda attack: {"latency": {"p99": next(left[attack or "calm"])}}


def taken(measure: Measured, *turns: tuple[str, ...]) -> VictimMeasurements:
    victim = VictimMeasurements(Served(), measure, (TargetFailed,))
    for names in turns:
        victim.take(names)
    return victim


def test_each_measurement_during_an_attack_lies_between_two_of_the_victim_alone() -> None:
    order = []

    def measure(attack: str) -> dict[str, Any]:
        order.append(attack)
        return {"latency": {"p99": 1.0}}

    taken(measure, ("flood", "bomb"), ("bomb",))
    assert order == ["", "flood", "", "bomb", "", "", "bomb", ""]


def test_the_ratio_uses_only_the_measurements_before_and_after_the_attack() -> None:
    victim = taken(
        measured(calm=[1, 3, 9, 1, 1, 9], flood=[6, 4], bomb=[90]),
        ("flood",), ("flood",), ("bomb",),
    )  # fmt: skip
    assert victim.ratio("flood") == 5 / 2  # the medians of 6, 4 and of 1, 3, 9, 1
    assert victim.ratio("bomb") == 90 / 5  # only the measurements next to the attack, not all
    assert victim.calm()[0] == 2.0


def test_one_slow_measurement_does_not_change_the_ratio() -> None:
    victim = taken(measured(calm=[1, 1, 1, 1, 40, 1], flood=[2, 2, 80]), *[("flood",)] * 3)
    assert victim.ratio("flood") == 2.0


def test_a_failed_measurement_is_left_out_and_its_reason_reported_if_none_is_left() -> None:
    def measure(attack: str) -> dict[str, Any]:
        if attack == "flood":
            raise TargetFailed("the generator was late")
        return {"latency": {"p99": 1.0}}

    victim = taken(measure, ("flood", "bomb"))
    assert not victim.seen("flood")
    assert victim.row("bomb")[0] == 1.0
    with pytest.raises(TargetFailed, match="the generator was late"):
        victim.row("flood")


def test_an_attack_next_to_a_failed_measurement_of_the_victim_alone_has_no_figure() -> None:
    fails = iter((False, True, False))

    def measure(attack: str) -> dict[str, Any]:
        if not attack and next(fails):
            raise TargetFailed("the generator was late")
        return {"latency": {"p99": 1.0}}

    victim = taken(measure, ("flood", "bomb"))
    assert not victim.seen("flood")
    assert not victim.seen("bomb")


def test_a_dead_worker_gives_no_figure() -> None:
    served = Served()
    victim = VictimMeasurements(served, measured(calm=[1, 1], flood=[1]), (TargetFailed,))
    served.alive = False
    victim.take(("flood",))
    with pytest.raises(TargetFailed, match="the worker is dead"):
        victim.row("flood")
    with pytest.raises(TargetFailed, match="the worker is dead"):
        victim.calm()


def test_memory_growth_is_the_peak_during_the_attack_minus_the_first_size() -> None:
    sizes = iter((64 << 20, 1))

    def measure(attack: str) -> dict[str, Any]:
        if attack == "bomb":
            bytearray(next(sizes))
        return {"latency": {"p99": 1.0}}

    victim = taken(measure, ("bomb", "flood"), ("bomb",))
    bomb, flood = victim.grown("bomb"), victim.grown("flood")
    assert bomb is not None
    assert flood is not None
    assert bomb > 60
    assert flood < 30  # the peak is reset before each measurement
    assert victim.grown("unseen") is None
