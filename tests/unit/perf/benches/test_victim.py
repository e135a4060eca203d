"""What attacks make of a victim: looks in turn, and medians that are divided."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from perf.benches.victim import Looks
from perf.targets.target import TargetFailed

Measured = Callable[..., dict[str, Any]]


class Served:
    """A worker, as far as looks know one: this process."""

    def __init__(self) -> None:
        self.alive = True
        self.target = self
        self.pid = os.getpid()


def measured(**p99s: list[float]) -> Measured:
    """A measurement that finds these P99 one after another; ``calm`` without an attack."""
    left: dict[str, Iterator[float]] = {name: iter(values) for name, values in p99s.items()}
    return lambda attack: {"latency": {"p99": next(left[attack or "calm"])}}


def taken(measure: Measured, *turns: tuple[str, ...]) -> Looks:
    looks = Looks(Served(), measure, (TargetFailed,))  # type: ignore[arg-type]
    for names in turns:
        looks.take(names)
    return looks


def test_every_look_at_an_attack_lies_between_two_at_the_victim_alone() -> None:
    order = []

    def measure(attack: str) -> dict[str, Any]:
        order.append(attack)
        return {"latency": {"p99": 1.0}}

    taken(measure, ("flood", "bomb"), ("bomb",))
    assert order == ["", "flood", "", "bomb", "", "", "bomb", ""]


def test_medians_are_divided_of_the_neighbouring_looks_alone() -> None:
    looks = taken(
        measured(calm=[1, 3, 9, 1, 1, 9], flood=[6, 4], bomb=[90]),
        ("flood",), ("flood",), ("bomb",),
    )  # fmt: skip
    assert looks.ratio("flood") == 5 / 2  # 4 and 6, beside 1, 3, 9, 1
    assert looks.ratio("bomb") == 90 / 5  # its own neighbours, not all
    assert looks.calm()[0] == 2.0


def test_one_restless_moment_does_not_move_the_verdict() -> None:
    looks = taken(measured(calm=[1, 1, 1, 1, 40, 1], flood=[2, 2, 80]), *[("flood",)] * 3)
    assert looks.ratio("flood") == 2.0


def test_a_look_that_fails_is_left_out_and_told_where_there_is_none() -> None:
    def measure(attack: str) -> dict[str, Any]:
        if attack == "flood":
            raise TargetFailed("the generator was late")
        return {"latency": {"p99": 1.0}}

    looks = taken(measure, ("flood", "bomb"))
    assert not looks.seen("flood")
    assert looks.row("bomb")[0] == 1.0
    with pytest.raises(TargetFailed, match="the generator was late"):
        looks.row("flood")


def test_an_attack_beside_a_failed_look_alone_has_no_figure() -> None:
    fails = iter((False, True, False))

    def measure(attack: str) -> dict[str, Any]:
        if not attack and next(fails):
            raise TargetFailed("the generator was late")
        return {"latency": {"p99": 1.0}}

    looks = taken(measure, ("flood", "bomb"))
    assert not looks.seen("flood")
    assert not looks.seen("bomb")


def test_a_dead_worker_is_no_measurement() -> None:
    served = Served()
    looks = Looks(served, measured(calm=[1, 1], flood=[1]), (TargetFailed,))  # type: ignore[arg-type]
    served.alive = False
    looks.take(("flood",))
    with pytest.raises(TargetFailed, match="the worker is dead"):
        looks.row("flood")
    with pytest.raises(TargetFailed, match="the worker is dead"):
        looks.calm()


def test_memory_is_the_most_that_was_added_to_what_there_was_at_first() -> None:
    sizes = iter((64 << 20, 1))

    def measure(attack: str) -> dict[str, Any]:
        if attack == "bomb":
            bytearray(next(sizes))
        return {"latency": {"p99": 1.0}}

    looks = taken(measure, ("bomb", "flood"), ("bomb",))
    bomb, flood = looks.grown("bomb"), looks.grown("flood")
    assert bomb is not None
    assert flood is not None
    assert bomb > 60
    assert flood < 30  # the peak was forgotten in between
    assert looks.grown("unseen") is None
