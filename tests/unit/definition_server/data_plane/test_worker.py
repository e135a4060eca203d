"""One worker in the process of the test: the effect of each message, the order of start and end, and the intervals of
reports. `test_worker_alone.py` tests a worker process."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop
from tests.support.leftovers import descriptors_before, open_descriptors
from tests.support.logs import captured_logs, logged
from tests.support.snapshots import built, row

from definition_server.catalog.builder import BuiltSnapshot
from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane import worker as module
from definition_server.data_plane.balance import Balancer
from definition_server.data_plane.call_sampling import CallSampling
from definition_server.data_plane.swap import Swap
from definition_server.data_plane.transports import CannotListen
from definition_server.data_plane.worker import Worker
from definition_server.ipc import messages
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.memory import create_sealed
from definition_server.ipc.stats import Slot, StatsPage, unshared_slot
from definition_server.ipc.tls_files import TlsFiles
from definition_server.jail.confinement import Extent

CONFIG = messages.Configure("127.0.0.1", 0, "native", False, 0.0, 4, "production", "INFO", 5.0)
TLS = (b"certificate", b"key")
KEY_DIGEST = "ab" * 32


class Transport:
    """A transport that notes its calls."""

    def __init__(self, begin_swap: Callable[[Snapshot], Swap]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.begin_swap = begin_swap
        self.cannot_listen = False

    async def start(self, tls: TlsFiles | None) -> int:
        if self.cannot_listen:
            raise CannotListen("the port is taken")
        self.calls.append(("start", tls))
        return 1

    async def set_serving(self, serving: bool) -> None:
        self.calls.append(("serving", serving))

    async def set_fresh(self, fresh: bool) -> None:
        self.calls.append(("fresh", fresh))

    async def replace_certificate(self, tls: TlsFiles) -> None:
        self.calls.append(("certificate", tls.octets()[0]))

    async def stop(self, grace_seconds: float) -> None:
        self.calls.append(("stop", grace_seconds))


class Alone:
    """A `Worker` and the master's end of its channel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **parts: Any) -> None:
        self.master, theirs = Channel.pair()
        self.slot: Slot = unshared_slot()
        self.steps: list[str] = []
        self.channel = Channel.of_worker(theirs)
        given: dict[str, Any] = {"freed": None, "tls": None, "sampled": None} | parts
        self.worker = Worker(
            self.channel, self.slot, CONFIG, None, Balancer(self.slot),
            cast(Any, SimpleNamespace(extent=Extent.FULL, start_is_over=lambda: self.steps.append("start is over"))),
            cast(Any, SimpleNamespace(run=self._warm_up)), given["freed"], given["tls"], given["sampled"],
        )  # fmt: skip
        self.transport = Transport(self.worker._begin_swap)
        monkeypatch.setattr(module, "create_transport", self._transport)

    async def _warm_up(self) -> None:
        self.steps.append("warm-up")

    def _transport(self, *_: object) -> Transport:
        self.steps.append("transport")
        return self.transport

    def publish(self, snapshot: BuiltSnapshot, *, announced: str | None = None) -> None:
        descriptor = create_sealed("test", snapshot.pieces)
        version = announced or snapshot.footer.version_hash.hex()
        assert self.master.send(messages.Publish(snapshot.footer.generation, version), descriptor)
        os.close(descriptor)

    def received(self) -> list[messages.Message]:
        """The messages that the worker has sent."""
        found = []
        while (each := self.master.receive()) is not None:
            found.append(each[0])
        return found


Make = Callable[..., Alone]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Makes workers of given parts, and closes their channels in the end."""
    made: list[Alone] = []

    def make(**parts: Any) -> Alone:
        made.append(Alone(monkeypatch, **parts))
        return made[-1]

    yield make
    for each in made:
        each.master.close()
        each.channel.close()


@pytest.fixture
async def alone(make: Make) -> Alone:
    return make()


async def iterations(count: int = 20) -> None:
    """Let other tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_worker_receives_warms_up_listens_and_is_confined_before_it_reports_ready(alone: Alone) -> None:
    alone.master.send(messages.Keys((KEY_DIGEST,)))
    alone.publish(built(row("if", "x")))
    running = asyncio.create_task(alone.worker.run())
    await iterations()
    assert alone.steps == ["warm-up", "transport", "start is over"]
    assert alone.transport.calls == [("start", None), ("serving", True)]
    assert alone.received() == [messages.Ready(1, Extent.FULL)]
    assert alone.slot.read().heartbeat_ns > 0
    assert alone.slot.read().generation == 1
    alone.master.send(messages.Drain(False, 0.0, 3.0))
    assert await asyncio.wait_for(running, 5) == 0
    assert alone.transport.calls[2:] == [("stop", 3.0)]
    await iterations()
    assert len(asyncio.all_tasks()) == 1, "no report and no heartbeat continues after the end"
    alone.master.send(messages.Freshness(True))
    await iterations()
    assert not alone.worker._fresh, "the channel is not read any more"


async def test_a_port_that_is_taken_ends_the_worker_with_its_exit_code_and_its_heartbeat(alone: Alone) -> None:
    alone.transport.cannot_listen = True
    with captured_logs() as lines:
        assert await alone.worker.run() == 3
    assert logged(lines, "Worker cannot start", error="the port is taken", log_level="critical")
    assert alone.steps == ["warm-up", "transport"]
    await iterations()
    assert len(asyncio.all_tasks()) == 1


async def test_tls_files_that_arrive_before_the_start_are_used_by_it_and_closed(make: Make) -> None:
    files = TlsFiles.seal(*TLS)
    alone = make(tls=files)
    running = asyncio.create_task(alone.worker.run())
    await iterations()
    assert alone.transport.calls[0] == ("start", files)
    assert not files.descriptors, "closed"
    alone.master.close()
    with captured_logs():
        assert await asyncio.wait_for(running, 5) == 0
    assert alone.transport.calls[-1] == ("stop", 5.0), "the drain of a worker without a master has the usual time"


async def test_freshness_and_a_later_certificate_reach_the_transport(alone: Alone) -> None:
    running = asyncio.create_task(alone.worker.run())
    await iterations()
    for number in (1, 2):
        with TlsFiles.seal(b"certificate %d" % number, b"key") as files:
            alone.master.send(messages.Certificate(number), *files.descriptors)
        alone.master.send(messages.Freshness(number == 1))
        await iterations()
    later = alone.transport.calls[2:]
    assert [call for call in later if call[0] == "fresh"] == [("fresh", True), ("fresh", False)]
    assert [call[1] for call in later if call[0] == "certificate"] == [b"certificate 1", b"certificate 2"]
    alone.worker._certificate_replaced.set()
    await iterations()
    assert len(alone.transport.calls) == 6, "without a certificate nothing is replaced"
    assert not running.done()
    alone.master.send(messages.Drain(False, 0.0, 0.0))
    await asyncio.wait_for(running, 5)


async def test_tls_files_that_newer_ones_overtake_are_closed(alone: Alone) -> None:
    kept: list[TlsFiles] = []
    for _ in range(2):
        files = TlsFiles.seal(*TLS)
        alone.worker._act_on(messages.Certificate(1), tuple(map(os.dup, files.descriptors)))
        files.close()
        assert alone.worker._tls is not None
        kept.append(alone.worker._tls)
    assert not kept[0].descriptors, "closed"
    assert alone.worker._take_tls() is kept[1]
    assert alone.worker._take_tls() is None
    kept[1].close()


async def test_an_unexpected_message_closes_its_descriptors_and_is_logged(alone: Alone) -> None:
    first, second = os.pipe()
    with captured_logs() as lines:
        alone.worker._act_on(messages.Keys(()), (first, second))
    assert logged(lines, "Control message ignored", error="unexpected Keys with 2 descriptors", log_level="error")
    for descriptor in (first, second):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


async def test_pages_of_other_workers_are_added_and_removed_and_an_invalid_one_is_logged(alone: Alone) -> None:
    page = StatsPage()
    alone.worker._act_on(messages.Peer(4), (os.dup(page.descriptor),))
    assert list(alone.worker._balancer._others) == [4]
    alone.worker._act_on(messages.PeerGone(4), ())
    assert not alone.worker._balancer._others
    reading, writing = os.pipe()
    with captured_logs() as lines:
        alone.worker._act_on(messages.Peer(5), (reading,))
    os.close(writing)
    page.close()
    assert [line["error"][:15] for line in logged(lines, "Control message ignored", log_level="error")] == [
        "a peer's page: "
    ]
    assert not alone.worker._balancer._others


async def test_a_snapshot_of_another_version_than_announced_is_refused_and_its_descriptor_closed(alone: Alone) -> None:
    before = descriptors_before()
    with captured_logs() as lines:
        alone.publish(built(row("if", "x")), announced="00" * 32)
        alone.worker._receive()
    (refused,) = logged(lines, "Snapshot refused", generation=1, log_level="error")
    assert f"{'00' * 32} announced" in refused["error"]
    assert alone.worker._engine.snapshot is None
    assert open_descriptors() == before


async def test_the_first_snapshot_is_served_at_once_and_later_ones_by_a_swap(
    alone: Alone, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[list[int | None]] = []
    monkeypatch.setattr(
        module, "_release_soon",
        lambda snapshots: released.append([each and each.generation for each in snapshots]),
    )  # fmt: skip
    alone.publish(built(row("if", "1"), generation=1))
    alone.worker._receive()
    assert alone.slot.read().generation == 1
    assert alone.worker._status_changed.is_set()
    for generation in (2, 3):
        alone.publish(built(row("if", str(generation)), generation=generation))
        alone.worker._receive()
    assert alone.slot.read().generation == 1, "calls are answered while the next one is prepared"
    assert released == [[None], [2]], "the second snapshot was overtaken while it waited"
    alone.worker._status_changed.clear()
    swapping = asyncio.create_task(alone.worker._swap_published())
    await iterations()
    assert (alone.slot.read().generation, alone.slot.read().entries) == (3, 1)
    assert alone.worker._engine.snapshot is not None
    assert alone.slot.read().version_hash == alone.worker._engine.snapshot.version_hash
    assert released[2:] == [[1]]
    assert alone.worker._status_changed.is_set()
    alone.worker._published.set()
    await iterations()
    assert not swapping.done(), "a wake-up without a snapshot has no effect"
    swapping.cancel()


async def test_a_preparation_that_fails_is_logged_and_the_swap_is_made_and_released(alone: Alone) -> None:
    made: list[Swap] = []

    class Failing(Swap):
        async def prepare(self) -> None:
            made.append(self)
            raise RuntimeError("a bug")

    alone.publish(built(row("if", "1"), generation=1))
    alone.worker._receive()
    alone.worker._begin_swap = lambda snapshot: Failing(alone.worker._engine, snapshot)
    with captured_logs() as lines:
        alone.publish(built(row("if", "2"), generation=2))
        alone.worker._receive()
        swapping = asyncio.create_task(alone.worker._swap_published())
        await iterations()
        swapping.cancel()
    assert len(logged(lines, "Answers could not be prepared; the first calls may be slow", log_level="error")) == 1
    assert alone.slot.read().generation == 2
    assert made[0].state.name == "RELEASED"


@pytest.mark.parametrize(
    ("drain", "calls"),
    [
        (messages.Drain(False, 1.0, 5.0), [("stop", 4.0)]),
        (messages.Drain(True, 1.5, 5.0), [("serving", False), ("sleep", 1.5), ("stop", 3.5)]),
        (messages.Drain(True, 6.0, 5.0), [("serving", False), ("sleep", 6.0), ("stop", 0.0)]),
    ],
)
async def test_an_announced_drain_waits_and_the_wait_is_part_of_its_time(
    alone: Alone, drain: messages.Drain, calls: list[tuple[object, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(seconds: float) -> None:
        alone.transport.calls.append(("sleep", seconds))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    await alone.worker._leave(cast(Any, alone.transport), drain)
    assert alone.transport.calls == calls


async def test_only_the_first_order_to_drain_has_an_effect_and_the_end_of_the_master_begins_a_drain(
    alone: Alone,
) -> None:
    alone.worker._leave_soon(messages.Drain(True, 1.0, 2.0))
    alone.worker._leave_soon(messages.Drain(False, 0.0, 0.0))
    assert alone.worker._drain.result() == messages.Drain(True, 1.0, 2.0)
    alone.worker._drain = asyncio.get_running_loop().create_future()
    alone.master.close()
    with captured_logs() as lines:
        alone.worker._receive()
    assert logged(lines, "The master is gone; leaving", log_level="warning")
    assert alone.worker._drain.result() == messages.Drain(False, 0.0, 5.0)


async def test_a_report_to_a_master_that_has_ended_begins_the_drain(alone: Alone) -> None:
    alone.master.close()
    reporting = asyncio.create_task(alone.worker._report(cast(Any, alone.transport)))
    await iterations()
    reporting.cancel()
    assert alone.transport.calls == [("serving", False)]
    assert alone.worker._drain.result() == messages.Drain(False, 0.0, 5.0)


async def test_every_waiting_message_is_acted_on_and_an_invalid_one_is_logged(alone: Alone) -> None:
    for fresh in (True, False, True):
        alone.master.send(messages.Freshness(fresh))
    alone.master._socket.send(b"no message")
    with captured_logs() as lines:
        alone.worker._receive()
    assert alone.worker._fresh
    assert alone.worker._freshness_changed.is_set()
    assert len(logged(lines, "Control message ignored", log_level="error")) == 1


class Slept(Exception):
    """Raised when the test is over."""


def sleeping(monkeypatch: pytest.MonkeyPatch, times: int) -> tuple[list[float], list[float]]:
    """Make ``asyncio.sleep`` return at once, ``times`` times. Returns its seconds, and the clock that it advances."""
    slept: list[float] = []
    clock = [1000.0]

    async def sleep(seconds: float) -> None:
        if len(slept) == times:
            raise Slept
        slept.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], process_time=lambda: 7.5))
    return slept, clock


@pytest.mark.parametrize(("connections", "seconds"), [(0, 11), (1000, 11), (1100, 12), (2000, 21)])
async def test_connections_authorize_again_after_ten_seconds_and_later_if_there_are_many(
    alone: Alone, connections: int, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept, clock = sleeping(monkeypatch, 2 * seconds)
    alone.slot.connected(connections, 0)
    again: list[float] = []
    monkeypatch.setattr(alone.worker._keys, "authorize_again", lambda: again.append(clock[0] - 1000.0))
    with pytest.raises(Slept):
        await alone.worker._report_keys()
    assert again == [seconds, 2 * seconds], "more than the interval has passed, by a clock of whole seconds"
    assert set(slept) == {1.0}


async def test_used_keys_are_sent_to_the_master_if_there_are_any(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeping(monkeypatch, 3)
    taken = iter([(), (KEY_DIGEST,), ()])
    monkeypatch.setattr(alone.worker._keys, "take_used", lambda: next(taken))
    with pytest.raises(Slept):
        await alone.worker._report_keys()
    assert alone.received() == [messages.KeysUsed((KEY_DIGEST,))]


async def test_sampled_calls_are_reported_every_second(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = make(sampled=CallSampling(unshared_slot(), 1))
    slept, _ = sleeping(monkeypatch, 2)
    assert alone.worker._sampled is not None
    alone.worker._sampled.count(0, 0, 5)
    with pytest.raises(Slept):
        await alone.worker._report_calls()
    assert slept == [1.0, 1.0]
    (sent,) = alone.received()
    assert isinstance(sent, messages.CallsSampled)
    assert sent.elapsed_ns == (5,)


async def test_the_end_of_the_master_does_not_end_the_reports(alone: Alone, monkeypatch: pytest.MonkeyPatch) -> None:
    def send(_: messages.Message) -> bool:
        raise ChannelClosed

    monkeypatch.setattr(alone.worker._channel, "send", send)
    monkeypatch.setattr(alone.worker._keys, "take_used", lambda: (KEY_DIGEST,))
    alone.worker._sampled = cast(Any, SimpleNamespace(take=lambda: "the calls"))
    for report in (alone.worker._report_keys, alone.worker._report_calls):
        slept, _ = sleeping(monkeypatch, 3)
        with pytest.raises(Slept):
            await report()
        assert len(slept) == 3


async def test_without_sampling_or_memory_to_return_nothing_is_awaited(alone: Alone) -> None:
    await alone.worker._report_calls()
    await alone.worker._return_memory()


async def test_memory_is_examined_and_the_heartbeat_is_set_at_intervals_of_a_second_and_a_quarter(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    checks: list[tuple[float, float]] = []
    alone = make(freed=SimpleNamespace(check=lambda now, cpu: checks.append((now, cpu))))
    slept, _ = sleeping(monkeypatch, 2)
    with pytest.raises(Slept):
        await alone.worker._return_memory()
    assert (checks, slept) == ([(1000.0, 7.5), (1001.0, 7.5), (1002.0, 7.5)], [1.0, 1.0])
    slept, _ = sleeping(monkeypatch, 2)
    monkeypatch.setattr(module, "dropped_lines", lambda: 3)
    with pytest.raises(Slept):
        await alone.worker._beat()
    assert slept == [0.25, 0.25]
    assert alone.slot.read().lines_dropped == 3


class Thread:
    """A thread that notes its arguments, and runs when the test wants it."""

    made: list[Thread]
    refused = False

    def __init__(self, target: Callable[..., None], name: str, daemon: bool, args: tuple[Any, ...] = ()) -> None:
        self.target, self.name, self.daemon, self.args = target, name, daemon, args

    def start(self) -> None:
        if self.refused:
            raise RuntimeError("can't start new thread")
        self.made.append(self)


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[Thread]:
    """The processes that would have been started."""
    Thread.made, Thread.refused = [], False
    monkeypatch.setattr(threading, "Thread", Thread)
    return Thread.made


def test_a_replaced_snapshot_is_released_in_a_thread_that_does_not_hold_up_the_end(
    threads: list[Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=slept.append))
    replaced: list[Snapshot | None] = [None]
    module._release_soon(replaced)
    (thread,) = threads
    assert (thread.name, thread.daemon) == ("snapshot-release", True)
    thread.target(*thread.args)
    assert replaced == []
    assert slept == [module.RELEASE_SECONDS]
    Thread.refused = True
    module._release_soon([None])


def test_a_worker_whose_master_has_ended_exits_with_its_code_when_its_time_is_over(
    threads: list[Thread], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[object] = []
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=steps.append))
    monkeypatch.setattr(os, "_exit", steps.append)
    module._leave_at_the_latest(theirs.fileno(), 10.0)
    (thread,) = threads
    assert (thread.name, thread.daemon) == ("master-watch", True)
    ours.close()
    thread.target()
    theirs.close()
    assert steps == [10.0, 4]


def test_the_configuration_is_the_first_message_with_or_without_tls_files() -> None:
    master, theirs = Channel.pair()
    channel = Channel.of_worker(theirs)
    master.send(CONFIG)
    assert module._configuration(channel) == (CONFIG, None)
    with TlsFiles.seal(*TLS) as files:
        master.send(CONFIG, *files.descriptors)
    config, came = module._configuration(channel) or (None, None)
    assert config == CONFIG
    assert came is not None
    came.close()
    with captured_logs() as lines:
        assert module._configuration(channel) is None
        master.send(messages.Freshness(True))
        assert module._configuration(channel) is None
        master._socket.send(b"no message")
        assert module._configuration(channel) is None
    assert len(logged(lines, "Worker cannot start", log_level="critical")) == 3
    master.close()
    channel.close()


def test_only_the_native_transport_runs_on_uvloop_and_calls_are_sampled_if_that_is_configured() -> None:
    assert module._loop_factory(CONFIG) is uvloop.new_event_loop
    assert module._loop_factory(messages.Configure("", 0, "grpcio", False, 0.0, 1, "", "", 1.0)) is (
        asyncio.new_event_loop
    )
    slot = unshared_slot()
    assert module._sampling(slot, CONFIG) is None
    sampled = module._sampling(
        slot, messages.Configure("", 0, "native", False, 0.0, 1, "", "", 1.0, trace_one_call_in=2)
    )
    assert sampled is not None
    assert sampled._every == 2
