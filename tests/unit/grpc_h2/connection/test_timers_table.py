"""Each deadline of a connection: when it begins, when it is due, and which event postpones it."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import pytest

from grpc_h2.connection.limits import Limits
from grpc_h2.connection.timers import Due, Timers

LIMITS = Limits(
    preface_timeout=1.0, header_timeout=2.0, keepalive_timeout=3.0, keepalive_time=50.0, max_connection_age=70.0,
    max_connection_idle=60.0, drain_timeout=4.0, age_grace=5.0, stall_timeout=6.0, age_jitter=0.1,
)  # fmt: skip
BEGUN = 100.0


def made(jitter: float = 0.0, limits: Limits = LIMITS) -> Timers:
    return Timers(limits, BEGUN, jitter)


def due_at(
    timers: Timers, *, introduced: bool = True, idle: bool = False, unsent: bool = False
) -> tuple[float, set[Due]]:
    """The next deadline, and the events that are due at that time."""
    asked = {"introduced": introduced, "idle": idle, "unsent": unsent}
    instant = timers.next_deadline(**asked)
    timers.advance(instant - 0.001)
    assert timers.due(**asked) == []
    timers.advance(instant)
    return instant, set(timers.due(**asked))


Step = Callable[[Timers], object]
CASES: dict[str, tuple[Step, dict[str, bool], float, Due]] = {
    "no preface": (lambda timers: None, {"introduced": False}, 101.0, Due.PREFACE),
    "an unfinished block": (lambda timers: timers.block_begun(), {}, 112.0, Due.HEADER_BLOCK),
    "a finished block": (lambda timers: (timers.block_begun(), timers.block_ended()), {}, 150.0, Due.KEEPALIVE),
    "silence": (lambda timers: None, {}, 150.0, Due.KEEPALIVE),
    "silence after input": (lambda timers: timers.read(115.0), {}, 165.0, Due.KEEPALIVE),
    "silence after a call": (lambda timers: timers.answered(115.0), {}, 165.0, Due.KEEPALIVE),
    "a PING": (lambda timers: timers.keepalive_sent(), {}, 113.0, Due.DEAD),
    "an answered PING": (lambda timers: (timers.keepalive_sent(), timers.read(111.0)), {}, 161.0, Due.KEEPALIVE),
    "a PING, and a call": (lambda timers: (timers.keepalive_sent(), timers.answered(111.0)), {}, 161.0, Due.KEEPALIVE),
    "age": (lambda timers: timers.read(140.0), {}, 170.0, Due.AGE),
    "a drain": (lambda timers: timers.drain_begun(), {}, 114.0, Due.FINAL_GOAWAY),
    "a drain that is announced": (
        lambda timers: (timers.drain_begun(), timers.drain_announced(), timers.read(140.0)), {}, 190.0, Due.KEEPALIVE,
    ),
    "the grace of age": (lambda timers: timers.grace_begun(), {}, 115.0, Due.GRACE),
    "output that waits": (lambda timers: timers.progressed(), {"unsent": True}, 116.0, Due.STALLED),
    "output from the beginning on": (lambda timers: None, {"unsent": True}, 106.0, Due.STALLED),
    "nothing that waits": (lambda timers: timers.progressed(), {}, 150.0, Due.KEEPALIVE),
    "idle from the beginning on": (lambda timers: timers.read(130.0), {"idle": True}, 160.0, Due.IDLE),
    "idle after a stream": (
        lambda timers: (timers.stream_ended(), timers.drain_begun(), timers.drain_announced(), timers.read(130.0)),
        {"idle": True}, 170.0, Due.IDLE,
    ),
    "idle after a call": (
        lambda timers: (timers.drain_begun(), timers.drain_announced(), timers.answered(125.0), timers.read(150.0)),
        {"idle": True}, 185.0, Due.IDLE,
    ),
    "idle, and noted": (
        lambda timers: (timers.idleness_noted(), timers.read(115.0)), {"idle": True}, 165.0, Due.KEEPALIVE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_next_deadline_and_its_event_follow_the_state_of_the_connection(case: str) -> None:
    step, asked, instant, due = CASES[case]
    timers = made()
    if case != "output from the beginning on":
        timers.advance(BEGUN if not asked.get("introduced", True) else BEGUN + 10)
    step(timers)
    assert due_at(timers, **asked) == (instant, {due})


def test_keepalive_is_not_due_before_the_preface() -> None:
    timers = made(limits=Limits(preface_timeout=100.0, keepalive_time=1.0))
    assert timers.next_deadline(introduced=False, idle=False, unsent=False) == BEGUN + 100.0


@pytest.mark.parametrize(("jitter", "age"), [(-1.0, 63.0), (0.0, 70.0), (0.5, 73.5), (1.0, 77.0)])
def test_the_maximum_age_varies_by_a_tenth(jitter: float, age: float) -> None:
    timers = made(jitter)
    timers.read(BEGUN + 40)
    assert due_at(timers) == (pytest.approx(BEGUN + age), {Due.AGE})


@pytest.mark.parametrize("jitter", [-1.1, 1.1])
def test_a_jitter_outside_minus_one_to_one_raises_an_assertion_error(jitter: float) -> None:
    with pytest.raises(AssertionError):
        made(jitter)


def test_several_deadlines_may_be_due_at_once_and_unlimited_timers_are_never_due() -> None:
    timers = made()
    timers.block_begun()
    timers.drain_begun()
    timers.advance(BEGUN + 1000)
    found = timers.due(introduced=True, idle=True, unsent=True)
    assert found == [Due.HEADER_BLOCK, Due.KEEPALIVE, Due.IDLE, Due.FINAL_GOAWAY, Due.STALLED]
    timers = made(limits=Limits(keepalive_time=inf))
    assert timers.next_deadline(introduced=True, idle=True, unsent=False) == inf
