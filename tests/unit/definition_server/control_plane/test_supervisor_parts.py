"""The supervisor's decisions, with stand-ins for workers: no process is started."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged
from tests.support.snapshots import published

from definition_server.control_plane import supervisor as module
from definition_server.control_plane.propagation import Propagation
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.supervisor import Supervisor
from definition_server.ipc.messages import Certificate, Configure, Drain, Freshness, Keys

CONFIG = Configure("127.0.0.1", 0, "native", False, 0.0, 2, "production", "ERROR", 5.0)


class Worker:
    """A stand-in for a worker process."""

    def __init__(self, pid: int) -> None:
        self.pid = self.number = pid
        self.generation = 1
        self.knows_a_catalogue = True
        self.draining = self.outdated = False
        self.mapped = True
        self.started = 0.0
        self.calls: list[Any] = []
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ready = asyncio.Event()
        self.ready.set()
        self.fault: str | None = None
        self.stats = SimpleNamespace(read=lambda: SimpleNamespace(heartbeat_ns=1))

    def reconcile(self, *parts: Any) -> None:
        self.calls.append(parts)

    def drain(self, drain: Drain) -> None:
        self.calls.append(drain)
        self.draining = True

    def kill(self) -> None:
        self.calls.append("kill")
        if not self.ended.done():
            self.ended.set_result(-9)

    def problem(self, _: float) -> str | None:
        return self.fault


class Beats:
    hung = False

    def hangs(self, *_: object) -> bool:
        return self.hung


class Fleet:
    """A supervisor with two stand-ins for workers."""

    def __init__(self, **given: Any) -> None:
        self.publisher = Publisher()
        self.gone: list[int] = []
        self.acknowledged: list[tuple[int, int]] = []
        self.published: list[tuple[int, list[int]]] = []
        propagation = SimpleNamespace(
            gone=self.gone.append,
            acknowledged=lambda *each: self.acknowledged.append(each),
            published=lambda *each: self.published.append(each),
        )
        arguments: dict[str, Any] = {"workers": 2, "heartbeat_timeout": 3.0, "start_timeout": 10.0} | given
        self.supervisor = Supervisor(
            CONFIG, self.publisher, Keys(()), propagation=cast(Propagation, propagation), **arguments
        )
        self.workers = [Worker(11), Worker(12)]
        self.beats = [Beats(), Beats()]
        for slot, worker, beats in zip(self.supervisor.slots, self.workers, self.beats, strict=True):
            slot.worker = cast(Any, worker)
            self.supervisor._workers[cast(Any, worker)] = cast(Any, beats)
        self.rolls = 0

    def count_rolls(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def roll() -> None:
            self.rolls += 1

        monkeypatch.setattr(self.supervisor, "roll", roll)

    def take(self) -> list[list[Any]]:
        """The calls of the workers since this was last read."""
        taken = [worker.calls for worker in self.workers]
        for worker in self.workers:
            worker.calls = []
        return taken

    def close(self) -> None:
        self.publisher.close()


@pytest.fixture
async def fleet() -> Any:
    made = Fleet()
    yield made
    made.close()


async def test_keys_freshness_and_certificates_are_handed_to_every_worker_when_they_change(fleet: Fleet) -> None:
    supervisor = fleet.supervisor
    keys = Keys(("ab" * 32,))
    supervisor.use_keys(keys)
    assert [calls[0][0] for calls in fleet.take()] == [keys, keys]
    supervisor.report_freshness(False)
    assert fleet.take() == [[], []], "nothing has changed"
    supervisor.report_freshness(True)
    assert [calls[0][1] for calls in fleet.take()] == [Freshness(True)] * 2
    files = cast(Any, object())
    for revision in (1, 2):
        supervisor.use_certificate(files)
        assert [calls[0][2:4] for calls in fleet.take()] == [(Certificate(revision), files)] * 2
    fleet.workers[0].draining = True
    supervisor.use_keys(keys)
    assert [len(calls) for calls in fleet.take()] == [0, 1], "a worker that drains needs nothing"


async def test_workers_get_the_pages_of_others_only_if_they_share_a_socket(fleet: Fleet) -> None:
    fleet.supervisor._reconcile()
    assert [calls[0][5] for calls in fleet.take()] == [{}, {}]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        sharing = Fleet(listener=listener)
        assert sharing.supervisor.counts_connections
        assert not fleet.supervisor.counts_connections
        sharing.supervisor._reconcile()
        assert [sorted(calls[0][5]) for calls in sharing.take()] == [[11, 12]] * 2
        sharing.workers[0].mapped = False
        sharing.supervisor._reconcile()
        assert [sorted(calls[0][5]) for calls in sharing.take()] == [[12]] * 2
        sharing.workers[1].ended.set_result(0)
        sharing.supervisor._reconcile()
        assert [sorted(calls[0][5]) for calls in sharing.take()] == [[]] * 2
        sharing.close()


async def test_the_serving_workers_are_counted(fleet: Fleet) -> None:
    supervisor = fleet.supervisor
    assert supervisor.worker_pids == {11, 12}
    assert supervisor.serving == 2
    fleet.workers[0].generation = 0
    assert supervisor.serving == 1
    fleet.workers[1].draining = True
    assert supervisor.serving == 0
    assert not supervisor.confines_workers
    config = Configure("127.0.0.1", 0, "native", False, 0.0, 2, "production", "ERROR", 5.0, jail="auto")
    other = Supervisor(config, fleet.publisher, Keys(()), workers=1, heartbeat_timeout=1, start_timeout=1)
    assert other.confines_workers


async def test_a_publication_is_measured_at_the_workers_that_serve(fleet: Fleet) -> None:
    fleet.publisher.publish(published("if", generation=4))
    assert fleet.published == [(4, [11, 12])]
    assert [calls[0][4] for calls in fleet.take()] == [fleet.publisher.current] * 2
    fleet.workers[0].knows_a_catalogue = False
    fleet.publisher.publish(published("else", generation=5))
    fleet.workers[1].draining = True
    fleet.publisher.publish(published("if", generation=6))
    assert fleet.published[1:] == [(5, [12]), (6, [])]
    fleet.workers[0].generation = 6
    fleet.supervisor._on_ready(cast(Any, fleet.workers[0]))
    assert fleet.acknowledged == [(11, 6)]
    fleet.supervisor._leaves(cast(Any, fleet.workers[1]))
    assert fleet.gone == [12]


async def test_the_span_of_a_hand_over_ends_with_the_last_worker_or_the_next_publication(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []

    def begin(name: str, **attributes: Any) -> Any:
        number = len(steps)
        steps.append((name, attributes))
        return SimpleNamespace(end=lambda: steps.append(f"end {number}"))

    monkeypatch.setattr(module, "begin", begin)
    fleet.publisher.publish(published("if", generation=1))
    fleet.publisher.publish(published("else", generation=2))
    assert steps == [
        ("hand over", {"generation": 1, "workers": 2}), "end 0", ("hand over", {"generation": 2, "workers": 2}),
    ]  # fmt: skip
    for worker in fleet.workers:
        worker.generation = 2
        fleet.supervisor._on_ready(cast(Any, worker))
    assert steps[3:] == ["end 2"]


@pytest.mark.parametrize(
    ("change", "message", "killed"),
    [
        ({}, None, False),
        ({"fault": "it lies"}, "Worker misbehaves; killed", True),
        ({"hung": True}, "Worker hangs; killed", True),
        ({"hung": True, "draining": True}, None, False),
        ({"starting": 10.0}, None, False),
        ({"starting": 10.1}, "Worker is not READY in time; killed", True),
        ({"starting": 5.0, "hung": True}, None, False),
    ],
    ids=["well", "misbehaves", "hangs", "drains", "starts", "starts too long", "starts, no heartbeat"],
)
async def test_only_a_worker_that_misbehaves_hangs_or_does_not_start_is_killed(
    fleet: Fleet, change: dict[str, Any], message: str | None, killed: bool, logs: LogLines
) -> None:
    worker, beats = fleet.workers[0], fleet.beats[0]
    worker.fault, worker.draining, beats.hung = (
        change.get("fault"), change.get("draining", False), change.get("hung", False),
    )  # fmt: skip
    if "starting" in change:
        worker.ready.clear()
    fleet.supervisor._judge(cast(Any, worker), cast(Any, beats), change.get("starting", 100.0))
    assert worker.calls == ["kill"] * killed
    assert [line["event"] for line in logs] == ([] if message is None else [message])
    if message is not None:
        assert logged(logs, message, worker=11, worker_pid=11, log_level="error")


async def test_outdated_workers_are_replaced_once_for_each_certificate(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    fleet.count_rolls(monkeypatch)
    supervisor = fleet.supervisor

    async def rolls() -> int:
        supervisor._replace_outdated()
        await asyncio.sleep(0)
        return fleet.rolls

    fleet.workers[1].outdated = True
    assert await rolls() == 0, "no certificate came"
    supervisor.use_certificate(cast(Any, object()))
    await supervisor._rolling.acquire()
    assert await rolls() == 0, "another roll is under way"
    supervisor._rolling.release()
    assert [await rolls(), await rolls()] == [1, 1]
    assert len(logged(logs, "The workers are replaced: they cannot load another certificate")) == 1
    supervisor.use_certificate(cast(Any, object()))
    fleet.workers[1].outdated = False
    assert await rolls() == 1
    fleet.workers[0].outdated = True
    supervisor._leaving.set()
    assert await rolls() == 1, "the server is stopping"
    supervisor._leaving.clear()
    supervisor.slots[1].worker = None
    assert await rolls() == 2


async def test_a_port_that_a_worker_shut_down_is_opened_again_and_the_workers_are_replaced_once(
    monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fleet = Fleet(listener=listener)
        fleet.count_rolls(monkeypatch)
        listening, opened, refused = [True], list[Any](), [False]

        def listen_again(*socket_and_address: Any) -> None:
            if refused[0]:
                raise OSError(98, "Address already in use")
            opened.append(socket_and_address)

        monkeypatch.setattr(module, "listens", lambda _: listening[0])
        monkeypatch.setattr(module, "listen_again", listen_again)
        fleet.supervisor._repair_listener()
        assert not opened
        listening[0], refused[0] = False, True
        for _ in range(3):
            fleet.supervisor._repair_listener()
        cannot = "The port was shut down by a worker and cannot be opened; tried again"
        assert len(logged(logs, cannot, error="Address already in use")) == 1
        refused[0] = False
        fleet.supervisor._repair_listener()
        fleet.supervisor._repair_listener()
        assert opened == [(listener, listener.getsockname())] * 2
        message = "The port was shut down by a worker; it is open again, and the workers are replaced"
        assert len(logged(logs, message)) == 1, "the first roll has not ended"
        await asyncio.sleep(0)
        assert fleet.rolls == 1
        refused[0] = True
        fleet.supervisor._repair_listener()
        assert len(logged(logs, cannot)) == 2, "the port was open meanwhile"
        refused[0] = False
        await asyncio.sleep(0)
        fleet.supervisor._repair_listener()
        await asyncio.sleep(0)
        assert fleet.rolls == 2
        fleet.close()


async def test_a_supervisor_without_its_own_socket_does_not_reopen_a_port(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "listens", lambda _: False)
    fleet.supervisor._repair_listener()
    assert fleet.supervisor._roll_after_repair is None


@pytest.mark.parametrize(("lived", "resets"), [(30.0, False), (30.125, True)])
async def test_the_delay_before_a_restart_is_short_again_after_a_worker_ran_long_enough(
    fleet: Fleet, lived: float, resets: bool, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    slot, worker = fleet.supervisor.slots[0], fleet.workers[0]
    worker.started = 1000.0
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: SimpleNamespace(time=lambda: 1000.0 + lived))
    first = slot.backoff.next()
    second = slot.backoff.next()
    worker.ended.set_result(-9)
    fleet.supervisor._on_exit(slot, cast(Any, worker))
    monkeypatch.undo()
    assert (slot.backoff.next() <= first) is resets
    assert second > first
    assert logged(logs, "Worker ended; starting another", worker=slot.number, how="signal 9", log_level="error")


class Pages:
    """Stands in for the stats pages of the workers."""

    def __init__(self) -> None:
        self.opened: list[object] = []
        self.retired: list[object] = []

    def open(self) -> object:
        self.opened.append(object())
        return self.opened[-1]

    def retire(self, page: object) -> None:
        self.retired.append(page)


async def test_a_process_that_cannot_be_started_gives_its_stats_page_back(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(*_: object, **__: object) -> Worker:
        raise OSError(11, "Resource temporarily unavailable")

    pages = Pages()
    monkeypatch.setattr(module.WorkerProcess, "start", start)
    monkeypatch.setattr(fleet.supervisor, "stats", pages)
    with pytest.raises(OSError, match="unavailable"):
        await fleet.supervisor._spawn(0)
    assert pages.retired == pages.opened
    assert len(pages.opened) == 1


@pytest.mark.parametrize("stops", [False, True])
async def test_a_new_worker_gets_the_state_and_other_workers_are_notified_of_its_end(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    started, pages = Worker(13), Pages()

    async def start(*given: object, **_: object) -> Worker:
        assert given[:2] == (7, pages.opened[-1])
        if stops:
            fleet.supervisor._leaving.set()
        return started

    monkeypatch.setattr(module.WorkerProcess, "start", start)
    monkeypatch.setattr(fleet.supervisor, "stats", pages)
    assert await fleet.supervisor._spawn(7) is cast(Any, started)
    assert (len(started.calls), started.calls[-1] == "kill") == (2 if stops else 1, stops)
    assert fleet.supervisor.worker_pids == {11, 12, 13}
    fleet.take()
    if not stops:
        started.ended.set_result(0)
    await asyncio.sleep(0)
    assert fleet.supervisor.worker_pids == {11, 12}
    assert fleet.gone == [13]
    assert pages.retired == pages.opened
    assert [len(calls) for calls in fleet.take()] == [1, 1], "other workers do not read its counts any more"


async def test_how_a_worker_ended_is_logged_by_its_exit_code(fleet: Fleet, logs: LogLines) -> None:
    worker = fleet.workers[0]
    worker.ended.set_result(0)
    fleet.supervisor._on_exit(fleet.supervisor.slots[0], cast(Any, worker))
    assert logged(logs, "Worker ended; starting another", how="exit code 0")


async def test_a_drain_informs_every_worker_and_kills_those_that_are_late(fleet: Fleet, logs: LogLines) -> None:
    waited: list[float | None] = []

    async def all_ended(timeout: float | None) -> bool:
        waited.append(timeout)
        return timeout is None

    fleet.supervisor._all_ended = all_ended
    await fleet.supervisor.drain(wait=1.0, timeout=4.0)
    assert [worker.calls for worker in fleet.workers] == [[Drain(True, 1.0, 4.0), "kill"]] * 2
    assert fleet.gone == [11, 12]
    assert waited == [6.0, None]
    assert logged(logs, "Workers did not leave in time; killed", count=2, log_level="warning")


class Rolling:
    """One roll of the first slot: the successor that the test makes, and how long the roll waited for the
    predecessor."""

    def __init__(self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
        self.supervisor, self.old = fleet.supervisor, fleet.workers[0]
        self.slot = fleet.supervisor.slots[0]
        self.successor = Worker(13)
        self.timeouts: list[float | None] = []
        self.leaves = True
        """Whether a worker ends when it is drained."""

        async def spawn(number: int) -> Worker:
            assert number == self.slot.number
            return self.successor

        wait = asyncio.wait

        async def noting(waited: Any, **given: Any) -> Any:
            if "return_when" not in given:
                self.timeouts.append(given.get("timeout"))
            for worker in (self.old, self.successor):
                if self.leaves and worker.draining and not worker.ended.done():
                    worker.ended.set_result(0)
            return await wait(waited, **(given | ({"timeout": 0.001} if given.get("timeout") else {})))

        monkeypatch.setattr(self.supervisor, "_spawn", spawn)
        monkeypatch.setattr(asyncio, "wait", noting)

    async def run(self) -> None:
        await self.supervisor._roll(self.slot, cast(Any, self.old))


@pytest.mark.parametrize("leaves", [True, False])
async def test_a_roll_replaces_a_worker_once_its_successor_is_ready(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logs: LogLines, leaves: bool
) -> None:
    roll = Rolling(fleet, monkeypatch)
    roll.leaves = leaves
    await roll.run()
    assert roll.slot.worker is cast(Any, roll.successor)
    assert roll.old.calls[0] == Drain(False, 0.0, 5.0)
    assert roll.old.calls[-1] == "kill", "a call on a worker that has ended has no effect"
    assert roll.successor.calls == []
    assert roll.timeouts == [7.0, None]
    assert fleet.gone == [11]
    assert logged(logs, "Worker rolled", worker=0, old_pid=11, new_pid=13)
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_successor_drains_if_its_slot_has_got_another_worker(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, logs: LogLines
) -> None:
    roll = Rolling(fleet, monkeypatch)
    roll.slot.worker = other = cast(Any, Worker(14))
    await roll.run()
    assert roll.slot.worker is other
    assert roll.successor.calls == [Drain(False, 0.0, 5.0), "kill"]
    assert roll.old.calls == []
    assert fleet.gone == [13]
    assert not logged(logs, "Worker rolled")


@pytest.mark.parametrize(
    ("ready", "published_before", "generation", "stays"),
    [(False, False, 0, True), (True, True, 0, True), (True, True, 1, False), (True, False, 0, False)],
    ids=["it ends", "without the catalogue", "with it", "there is none"],
)
async def test_a_successor_that_is_not_ready_with_the_catalogue_replaces_no_worker(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch, ready: bool, published_before: bool, generation: int, stays: bool
) -> None:
    if published_before:
        fleet.publisher.publish(published("if", generation=1))
    roll = Rolling(fleet, monkeypatch)
    roll.successor.generation = generation
    if not ready:
        roll.successor.ready.clear()
        roll.successor.ended.set_result(1)
    if not stays:
        await roll.run()
        assert roll.slot.worker is cast(Any, roll.successor)
        return
    with pytest.raises(TimeoutError, match="the old one stays"):
        await roll.run()
    assert roll.slot.worker is cast(Any, roll.old)
    assert roll.successor.calls == ["kill"]
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_roll_skips_empty_slots_and_ends_when_the_server_stops(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    rolled: list[int] = []
    replaced: list[int] = []

    async def roll(slot: Any, _: Any) -> None:
        rolled.append(slot.number)

    monkeypatch.setattr(fleet.supervisor, "_roll", roll)
    fleet.supervisor.slots[0].worker = None
    assert await fleet.supervisor.roll(replaced.append) is None
    assert (rolled, replaced) == ([fleet.supervisor.slots[1].number], [1, 2])
    fleet.supervisor._leaving.set()
    assert await fleet.supervisor.roll(replaced.append) == "the server is stopping"
    assert replaced == [1, 2]


async def test_a_tick_repairs_the_port_sends_state_kills_hung_workers_and_ends_crash_loops(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        if slept:
            raise asyncio.CancelledError
        slept.append(seconds)

    supervisor = fleet.supervisor
    done: list[str] = []
    for name in ("_repair_listener", "_reconcile", "_replace_outdated"):
        monkeypatch.setattr(supervisor, name, lambda name=name: done.append(name))
    monkeypatch.setattr(supervisor, "_judge", lambda worker, beats, now: done.append(f"judge {worker.pid}"))
    now = asyncio.get_running_loop().time()
    ran: list[float] = []
    fleet.workers[0].started = now - 100
    supervisor.slots[0].crash_loop = cast(Any, SimpleNamespace(looping=True, runs=ran.append))
    supervisor.slots[1].crash_loop = cast(Any, SimpleNamespace(looping=False, runs=ran.append))
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await supervisor.watch()
    assert slept == [0.25]
    assert done == ["_repair_listener", "_reconcile", "_replace_outdated", "judge 11", "judge 12"]
    assert ran == [pytest.approx(100, abs=1)]
    supervisor.slots[0].worker = None
    slept.clear()
    with pytest.raises(asyncio.CancelledError):
        await supervisor.watch()
    assert len(ran) == 1, "there is no worker that could run long enough"
