"""The time limit for reading an answer: a grace, the time for its octets, and a limit for a complete answer."""

from __future__ import annotations

from math import inf

import pytest
from tests.unit.grpc_h2.connection.test_stream_parts import stream

from grpc_h2.connection.deadlines import AnswerDeadlines
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.timers import Timers

LIMITS = Limits(read_grace=30.0, min_read_rate=100.0, max_read_time=60.0)


class Bench:
    def __init__(self) -> None:
        self.timers = Timers(LIMITS, 1000.0, 0.0)
        self.answers = AnswerDeadlines(LIMITS, self.timers)

    def advance(self, seconds: float) -> None:
        self.timers.advance(self.timers.now + seconds)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_the_deadline_of_queued_octets_is_a_grace_and_a_time_for_their_number(bench: Bench) -> None:
    answer = stream()
    assert bench.answers.next_deadline() == inf
    bench.answers.queued(answer, 500)
    assert bench.answers.next_deadline() == 1035.0
    bench.advance(10.0)
    bench.answers.queued(answer, 200)
    assert bench.answers.next_deadline() == 1037.0, "later ones prolong it by their own time alone"
    bench.advance(26.9)
    assert bench.answers.overdue() == []
    bench.advance(0.1)
    assert bench.answers.overdue() == [answer]


@pytest.mark.parametrize(("octets", "until"), [(100, 1031.0), (2_900, 1059.0), (3_000, 1060.0), (10**9, 1060.0)])
def test_the_deadline_of_a_complete_answer_is_a_minute_at_most(bench: Bench, octets: int, until: float) -> None:
    answer = stream()
    bench.answers.queued(answer, octets)
    bench.answers.completed(answer)
    assert bench.answers.next_deadline() == until


def test_the_minute_begins_when_the_answer_is_complete(bench: Bench) -> None:
    answer = stream()
    bench.answers.queued(answer, 10**6)
    bench.advance(50.0)
    bench.answers.completed(answer)
    assert bench.answers.next_deadline() == 1110.0


def test_an_answer_that_was_read_has_no_deadline_until_more_is_queued(bench: Bench) -> None:
    answer = stream()
    bench.answers.queued(answer, 500)
    bench.advance(20.0)
    bench.answers.settle(answer)
    bench.answers.settle(answer)
    assert bench.answers.next_deadline() == inf
    bench.answers.queued(answer, 500)
    assert bench.answers.next_deadline() == 1055.0
    bench.answers.drop_all()
    assert bench.answers.next_deadline() == inf


def test_eight_overdue_answers_are_returned_at_a_time(bench: Bench) -> None:
    late = [stream() for _ in range(9)]
    for answer in late:
        bench.answers.queued(answer, 0)
    bench.advance(30.0)
    assert bench.answers.overdue() == late[:8]


def test_since_returns_the_answers_that_began_at_the_instant_or_earlier(bench: Bench) -> None:
    first, second = stream(), stream()
    bench.answers.queued(first, 1)
    bench.advance(10.0)
    bench.answers.queued(second, 1)
    bench.answers.queued(first, 1)
    assert [list(bench.answers.since(instant)) for instant in (999.9, 1000.0, 1009.9, 1010.0)] == [
        [], [first], [first], [first, second],
    ]  # fmt: skip


def test_the_next_deadline_is_the_earliest_one(bench: Bench) -> None:
    bench.answers.queued(stream(), 500)
    bench.answers.queued(stream(), 100)
    bench.answers.queued(stream(), 300)
    assert bench.answers.next_deadline() == 1031.0
