"""The end of a connection: it is flushed, half-closed, and read for a second; a flood is read for less."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from grpc_h2.aio.lingering_close import LingeringClose


class Timer:
    def __init__(self, seconds: float, callback: Callable[[], object]) -> None:
        self.seconds, self.callback, self.cancelled = seconds, callback, False

    def cancel(self) -> None:
        self.cancelled = True


class Loop:
    """A loop whose timers the test runs one by one."""

    def __init__(self) -> None:
        self.timers: list[Timer] = []

    def call_later(self, seconds: float, callback: Callable[[], object], *given: Any) -> Timer:
        self.timers.append(Timer(seconds, lambda: callback(*given)))
        return self.timers[-1]

    def waiting(self) -> list[float]:
        """The seconds of the timers that were not cancelled and have not run."""
        return [timer.seconds for timer in self.timers if not timer.cancelled]

    def run(self, seconds: float) -> None:
        """Run the first timer that was set for ``seconds``."""
        timer = next(each for each in self.timers if each.seconds == seconds and not each.cancelled)
        timer.cancelled = True
        timer.callback()


class Transport:
    """A transport that notes the calls of its methods."""

    def __init__(self) -> None:
        self.unsent = 0
        self.steps: list[Any] = []
        self.closing = False
        self.half_closes = True

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def get_extra_info(self, name: str) -> None:
        return None

    def can_write_eof(self) -> bool:
        return self.half_closes

    def is_closing(self) -> bool:
        return self.closing

    def set_write_buffer_limits(self, high: int) -> None:
        self.steps.append(("limits", high))

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.steps.append((name, *given) if given else name)


class Bench:
    def __init__(self, *, flood: bool = False) -> None:
        self.loop, self.transport = Loop(), Transport()
        self.deferred: list[Callable[[], object]] = []
        self.close = LingeringClose(
            cast(asyncio.Transport, self.transport), cast(Any, self.loop), self.deferred.append, flood=flood
        )

    def proceed(self, *, writable: bool = True) -> None:
        self.close.proceed(writable=writable, stall_timeout=60.0)

    def read(self, size: int) -> None:
        """End the pause, run the deferred read, and receive ``size`` octets."""
        self.loop.run(0.01)
        while self.deferred:
            self.deferred.pop(0)()
        self.close.data_received(size)


@pytest.mark.parametrize(("unsent", "writable"), [(1, True), (0, False), (1, False)])
def test_the_close_waits_for_unsent_octets_up_to_the_stall_timeout(unsent: int, writable: bool) -> None:
    bench = Bench()
    bench.transport.unsent = unsent
    for _ in range(2):
        bench.proceed(writable=writable)
    assert bench.loop.waiting() == [60.0]
    assert bench.transport.steps == [("limits", 0), "resume_reading"] * 2
    bench.transport.unsent = 0
    bench.proceed()
    assert sorted(bench.loop.waiting()) == [0.01, 1.0], "the stall is over"
    bench.proceed()
    assert sorted(bench.loop.waiting()) == [0.01, 1.0], "it has begun"


def test_a_connection_that_is_not_flushed_within_the_stall_timeout_is_aborted() -> None:
    bench = Bench()
    bench.transport.unsent = 1
    bench.proceed()
    bench.loop.run(60.0)
    assert bench.transport.steps[-1] == "abort"


def test_an_honest_client_is_half_closed_at_once_and_read_for_a_second() -> None:
    bench = Bench()
    bench.proceed()
    assert "write_eof" in bench.transport.steps
    for _ in range(3):
        bench.read(1000)
    assert bench.close.octets == 3000
    assert "abort" not in bench.transport.steps
    bench.loop.run(1.0)
    assert bench.transport.steps[-1] == "close"


@pytest.mark.parametrize(("flood", "most"), [(False, 2 * 1024 * 1024), (True, 64 * 1024)])
def test_reading_ends_after_as_many_octets_as_can_be_in_transit(flood: bool, most: int) -> None:
    bench = Bench(flood=flood)
    bench.proceed()
    bench.read(most)
    bench.loop.run(0.01)
    while bench.deferred:
        bench.deferred.pop(0)()
    assert "abort" not in bench.transport.steps
    bench.close.data_received(1)
    bench.loop.run(0.01)
    while bench.deferred:
        bench.deferred.pop(0)()
    assert "abort" in bench.transport.steps


def test_a_flood_that_ends_during_the_pause_is_half_closed_after_it() -> None:
    bench = Bench(flood=True)
    bench.proceed()
    assert "write_eof" not in bench.transport.steps
    for _ in range(3):
        bench.read(100)
        assert bench.transport.steps.count("write_eof") == 1


def test_a_flood_that_continues_during_the_pause_is_not_half_closed() -> None:
    bench = Bench(flood=True)
    bench.proceed()
    bench.close.data_received(100)
    bench.read(100)
    assert "write_eof" not in bench.transport.steps


@pytest.mark.parametrize("half_closes", [True, False])
def test_a_failed_half_close_aborts_the_connection_and_tls_is_not_half_closed(half_closes: bool) -> None:
    bench = Bench()
    bench.transport.half_closes = half_closes

    def write_eof() -> None:
        raise OSError("not connected")

    bench.transport.write_eof = write_eof  # type: ignore[attr-defined]
    bench.proceed()
    assert ("abort" in bench.transport.steps) is half_closes


def test_a_closing_transport_is_no_longer_read() -> None:
    bench = Bench()
    bench.proceed()
    bench.transport.steps.clear()
    assert bench.close.read_on() is True
    assert bench.transport.steps == ["resume_reading"]
    bench.transport.closing = True
    assert bench.close.read_on() is False
    assert bench.transport.steps == ["resume_reading"]


def test_a_cancelled_close_has_no_timer() -> None:
    bench = Bench()
    bench.proceed()
    bench.close.cancel()
    bench.close.cancel()
    assert 1.0 not in bench.loop.waiting()
