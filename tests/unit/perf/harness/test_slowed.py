"""Slowing a worker down deliberately."""

from __future__ import annotations

from typing import Any, cast

import pytest
from perf.harness import slowed
from perf.harness.slowed import ONE_IN, busy, delayed, held

from grpc_h2 import Http2Protocol


class Cpu:
    """A clock of CPU time that advances with each piece of work and each reading of the clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-7
        return self.now


@pytest.mark.parametrize("share", [slowed.BUSY_SHARE, 1.0])
def test_busy_burns_its_share_of_the_used_cpu_time(share: float) -> None:
    cpu = Cpu()
    worked = 0.0

    def receive(protocol: Any, data: bytes) -> None:
        nonlocal worked
        worked += 50e-6
        cpu.now += 50e-6

    slow = busy(receive, share, cpu)
    for _ in range(1600):
        slow(cast(Http2Protocol, None), b"")
    assert (cpu.now - worked) / worked == pytest.approx(share, rel=0.05)


class Loop:
    """The method of the event loop that a delayed connection uses."""

    def __init__(self) -> None:
        self.later: list[tuple[Any, ...]] = []

    def call_later(self, seconds: float, what: Any, *arguments: Any) -> None:
        """Note it."""
        self.later.append((seconds, what, *arguments))


class Connection:
    """A connection that records its octets."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.closing = False
        self.octets = b""


def receive(protocol: Any, data: bytes) -> None:
    """Record the octets."""
    protocol.octets += data


def test_one_batch_in_a_hundred_is_delayed_and_the_order_is_kept() -> None:
    loop = Loop()
    first, second = Connection(loop), Connection(loop)
    slow = cast(Any, delayed(receive))
    for number in range(ONE_IN - 1):
        slow(first, b"%d" % (number % 10))
    before = first.octets
    assert len(before) == ONE_IN - 1
    slow(first, b"late")
    slow(first, b", then this")
    slow(second, b"not me")
    assert (first.octets, second.octets) == (before, b"not me")
    ((seconds, release, argument),) = loop.later
    assert seconds == slowed.DELAY_SECONDS
    release(argument)
    assert first.octets == before + b"late, then this"
    slow(first, b"!")
    assert first.octets.endswith(b"this!")


def test_a_connection_that_closes_during_the_delay_receives_nothing() -> None:
    loop = Loop()
    only = Connection(loop)
    slow = cast(Any, delayed(receive, one_in=1))
    slow(only, b"late")
    only.closing = True
    ((_, release, argument),) = loop.later
    release(argument)
    assert only.octets == b""


def test_held_batches_wait_equally_long_and_keep_their_order_with_any_order_of_timers() -> None:
    loop = Loop()
    first, second = Connection(loop), Connection(loop)
    slow = cast(Any, held(receive))
    slow(first, b"one, ")
    slow(second, b"another")
    slow(first, b"two")
    assert [seconds for seconds, *_ in loop.later] == [slowed.HELD_SECONDS] * 3
    assert first.octets == second.octets == b""
    loop.later[2][1]()
    assert (first.octets, second.octets) == (b"one, ", b"")
    second.closing = True
    loop.later[0][1]()
    loop.later[1][1]()
    assert (first.octets, second.octets) == (b"one, two", b"")


def test_an_unknown_injection_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert slowed.main(["sabotage"]) == 2
    assert "busy, twice, delay, held, none" in capsys.readouterr().err
