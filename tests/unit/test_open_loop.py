"""The schedule that every open-loop load of tests and ``perf`` follows."""

from __future__ import annotations

import time

from tests.support.open_loop import open_loop


async def test_calls_are_due_at_even_distances_and_never_early() -> None:
    seen: list[tuple[int, float]] = []
    async for due in open_loop(1000, lambda: len(seen) == 5):
        assert time.monotonic() >= due.instant
        seen.append((due.number, due.instant))
    first = seen[0][1]
    assert [number for number, _ in seen] == [0, 1, 2, 3, 4]
    assert all(abs(instant - first - number / 1000) < 1e-9 for number, instant in seen)


async def test_calls_that_were_due_during_a_stall_follow_at_once_with_their_own_instants() -> None:
    stall, rate = 0.05, 1000
    seen = []
    async for due in open_loop(rate, lambda: len(seen) == 20):
        seen.append(due)
        if due.number == 0:
            time.sleep(stall)  # noqa: ASYNC251 -- the stall itself
    assert all(each.behind > 0 for each in seen[1:])
    assert seen[1].behind >= stall - 2 / rate
    assert abs(seen[19].instant - seen[0].instant - 19 / rate) < 1e-9


async def test_a_load_that_was_stopped_while_it_waited_offers_no_further_call() -> None:
    stopped_while_asleep = iter([False, False, True])
    seen = [due.number async for due in open_loop(50, lambda: next(stopped_while_asleep))]
    assert seen == [0]
