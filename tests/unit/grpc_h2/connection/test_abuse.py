"""The budgets for a peer's abuse: each one at its limit and one beyond it, and the events that refill it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from grpc_h2.connection.abuse import STREAM_WORK, Abuse, LeakyBucket
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.timers import Timers
from grpc_h2.wire.errors import ConnectionFault, ErrorCode

LIMITS = Limits(
    glitches=5, glitches_per_second=2.0, free_window_updates=3, late_frames_per_stream=2, min_ping_interval=10.0,
    max_ping_strikes=2,
)  # fmt: skip


class Bench:
    def __init__(self, limits: Limits = LIMITS) -> None:
        self.timers = Timers(limits, 100.0, 0.0)
        self.abuse = Abuse(limits, self.timers)

    def advance(self, seconds: float) -> None:
        self.timers.advance(self.timers.now + seconds)

    def endured(self, act: Callable[[], None], most: int = 200) -> int:
        """How often ``act`` may be done before the connection ends."""
        codes: list[ErrorCode] = []
        number = 0
        while number < most and not codes:
            try:
                act()
                number += 1
            except ConnectionFault as fault:
                codes.append(fault.code)
        assert codes in ([], [ErrorCode.ENHANCE_YOUR_CALM])
        return number

    def ping(self, after: float) -> None:
        self.advance(after)
        self.abuse.ping()


@pytest.fixture
def bench() -> Bench:
    return Bench()


# -- the bucket --------------------------------------------------------------------------------------------------------


def test_a_bucket_overflows_above_its_capacity_and_leaks_at_its_rate() -> None:
    bucket = LeakyBucket(5, 2.0, 100.0)
    assert [bucket.add(100.0) for _ in range(6)] == [False] * 5 + [True]
    assert not bucket.add(101.0), "6 - 2 + 1"
    assert bucket.add(101.25), "5 - 0.5 + 1"
    assert not bucket.add(200.0, 5.0), "it is empty, and no more than that"
    assert bucket.add(200.0, 0.5)


def test_a_bucket_does_not_leak_while_no_time_passes() -> None:
    bucket = LeakyBucket(1, 1000.0, 100.0)
    assert not bucket.add(100.0, 1.0)
    assert bucket.add(100.0, 0.001)


def test_glitches_above_the_limit_end_the_connection_and_the_budget_refills_with_time(bench: Bench) -> None:
    assert bench.endured(lambda: bench.abuse.glitch("odd frames")) == 5
    bench.advance(1.5)
    assert bench.endured(lambda: bench.abuse.glitch("odd frames")) == 2
    bench.advance(100.0)
    assert bench.endured(lambda: bench.abuse.glitch("odd frames", 2.0)) == 2
    with pytest.raises(ConnectionFault, match="too many odd frames"):
        bench.abuse.glitch("odd frames", 2.0)


# -- WINDOW_UPDATE -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earn", "more"),
    [
        (lambda _: None, 0),
        (lambda abuse: abuse.stream_opened(), 2),
        (lambda abuse: abuse.data_sent(2), 40),
        (lambda abuse: abuse.answered(streams=3, data_frames=2, updates=0), 46),
        (lambda abuse: abuse.answered(streams=3, data_frames=2, updates=4), 42),
        (lambda abuse: abuse.answered(streams=0, data_frames=0, updates=1), -1),
        (lambda abuse: abuse.headers_sent(), 0),
    ],
    ids=["nothing", "a stream", "two DATA frames", "answers", "answers and updates", "an update", "HEADERS"],
)
def test_each_stream_and_each_data_frame_allows_more_window_updates(
    bench: Bench, earn: Callable[[Abuse], None], more: int
) -> None:
    earn(bench.abuse)
    assert bench.endured(bench.abuse.window_update) == 3 + more


# -- late frames -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [0, 1, 3])
def test_a_late_frame_beyond_the_free_ones_of_each_stream_is_a_quarter_of_a_glitch(bench: Bench, streams: int) -> None:
    assert bench.endured(lambda: bench.abuse.late_frame(streams)) == 2 * streams + 4 * 5
    with pytest.raises(ConnectionFault, match="too many frames on streams that have ended"):
        bench.abuse.late_frame(streams)


# -- PING --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "endured"),
    [(0.0, 3), (4.0, 5), (7.0, 17), (8.0, 200), (10.0, 200), (100.0, 200)],
)
def test_pings_in_less_than_four_fifths_of_the_interval_are_strikes(
    bench: Bench, interval: float, endured: int
) -> None:
    assert bench.endured(lambda: bench.ping(interval)) == endured


def test_a_long_pause_does_not_allow_more_pings_afterwards(bench: Bench) -> None:
    bench.ping(0.0)
    bench.ping(1000.0)
    assert bench.endured(lambda: bench.ping(0.0)) == 2
    with pytest.raises(ConnectionFault, match="too_many_pings"):
        bench.ping(0.0)


@pytest.mark.parametrize(
    ("sent", "forgives"),
    [
        (lambda abuse: abuse.headers_sent(), True),
        (lambda abuse: abuse.data_sent(1), True),
        (lambda abuse: abuse.answered(streams=1, data_frames=1, updates=0), True),
        (lambda abuse: abuse.answered(streams=1, data_frames=0, updates=0), False),
        (lambda abuse: abuse.stream_opened(), False),
    ],
    ids=["HEADERS", "DATA", "an answer", "no answer", "a stream"],
)
def test_sent_headers_or_data_reset_the_ping_strikes(
    bench: Bench, sent: Callable[[Abuse], None], forgives: bool
) -> None:
    for _ in range(3):
        bench.ping(0.0)
    sent(bench.abuse)
    assert bench.endured(lambda: bench.ping(0.0)) == (3 if forgives else 0)


def test_a_server_without_an_interval_counts_no_pings() -> None:
    bench = Bench(Limits(min_ping_interval=0.0, max_ping_strikes=0))
    assert bench.endured(lambda: bench.ping(0.0)) == 200


# -- work --------------------------------------------------------------------------------------------------------------


def test_the_budgets_of_work_and_calls_are_spent_in_a_turn_and_full_in_the_next(bench: Bench) -> None:
    whole = (bench.abuse.work_left, bench.abuse.calls_left)
    assert whole == (LIMITS.work_per_turn, LIMITS.calls_per_turn)
    bench.abuse.spend(7)
    bench.abuse.stream_begun(handled=False)
    assert (bench.abuse.work_left, bench.abuse.calls_left) == (whole[0] - 7 - STREAM_WORK, whole[1])
    bench.abuse.stream_begun(handled=True)
    assert (bench.abuse.work_left, bench.abuse.calls_left) == (whole[0] - 7 - 2 * STREAM_WORK, whole[1] - 1)
    bench.abuse.begin_turn()
    assert (bench.abuse.work_left, bench.abuse.calls_left) == whole
