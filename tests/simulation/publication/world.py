"""One run of the simulation: its events, and the master that lives in it. A seed decides everything."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.simulation.publication.database import BAD, Faults, SimulatedSource, Table
from tests.simulation.publication.operators import SOON, Operators
from tests.simulation.publication.promises import SMALL_GROWTH, Broken, Promises, content_of
from tests.simulation.publication.surroundings import (
    DiskFaults,
    Fleet,
    InlineBackground,
    SimulatedChecker,
    SimulatedDisk,
    SimulatedWorker,
)
from tests.simulation.publication.virtual_time import VirtualLoop

from definition_server.catalog import guard
from definition_server.catalog.content_check import Flaw
from definition_server.catalog.gate import Gate
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane import delayed_release, supervisor
from definition_server.control_plane.checker import CannotCheck, Judgement
from definition_server.control_plane.history import History
from definition_server.control_plane.publications import Publications
from definition_server.control_plane.publisher import Publication, Publisher
from definition_server.control_plane.row_gate import RowGate
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.supervisor import Supervisor
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_loop import SyncLoop
from definition_server.control_plane.wishes import WishesFile
from definition_server.ipc.messages import Configure, Keys

HOURS = 24
_CONFIGURE = Configure(
    host="", port=0, transport="native", reflection=False, max_connection_age_seconds=0.0, threadpool_size=1,
    app_env="production", log_level="INFO", drain_timeout_seconds=5.0,
)  # fmt: skip
EPOCH = 1_800_000_000.0
_TICK_SECONDS = 60.0
_WORKERS = 2
_SIGNED = 0.5
"""The share of runs with a signing key."""
_RESTORED_SECONDS = 30.0
"""Seconds after a start without a database until which a sound stored catalogue must be served."""
_SETTLED_SECONDS = 600.0
"""Seconds after the end of the faults. By then work that hung has failed, workers are replaced, and back-off delays
have passed."""


class Failure(AssertionError):
    """A seed failed. The text has the command that replays it."""


@dataclass(frozen=True, slots=True)
class Ran:
    """The events of a run, counted by kind."""

    hours: float
    cycles: int
    publications: int
    checks: int
    lives: int


def signer_of(seed: int) -> Signer | None:
    """The signing key of a run. Its random numbers come from another sequence, so that it does not change the other
    events."""
    return Signer("simulated") if Random(f"signer {seed}").random() < _SIGNED else None


def run_seed(seed: int, trace: Callable[[str], None] | None = None) -> Ran:
    """Run a day.

    Raises:
        Failure: a promise is broken, or the code under test fails.
    """
    directory = Path(tempfile.mkdtemp(prefix="simulation-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)
    world = World(seed, directory, loop, trace)
    try:
        with _surroundings():
            loop.run_until_complete(world.run())
            return world.ran()
    except Exception as raised:  # noqa: BLE001 - passed on
        error = world.promises.first_broken or raised
        raise Failure(
            f"seed {seed}: {type(error).__name__}: {error}\n"
            f"replay: python -m tests.simulation.publication --start {seed} --seeds 1 --trace"
        ) from error
    finally:
        _end_tasks(loop)
        asyncio.set_event_loop(None)
        loop.close()
        shutil.rmtree(directory, ignore_errors=True)


def _end_tasks(loop: VirtualLoop) -> None:
    """End the tasks that a failed run has left."""
    for _ in range(3):
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))


@contextmanager
def _surroundings() -> Iterator[None]:
    """Replace values that the master does not accept as arguments: the class of its workers, and sizes and periods."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "WorkerProcess", SimulatedWorker)
        patch.setattr(supervisor, "TICK_SECONDS", _TICK_SECONDS)
        patch.setattr(guard, "SMALL_GROWTH", SMALL_GROWTH)
        patch.setattr(delayed_release, "gc", _NoCollector)
        patch.setattr(SimulatedWorker, "fleet", None, raising=False)  # set by each master; removed at the end
        for name, module in list(sys.modules.items()):
            if name.startswith("definition_server.") and hasattr(module, "log"):
                patch.setattr(module, "log", _Silence())
        yield


class _NoCollector:
    @staticmethod
    def collect() -> None:
        """A real thread would take most of the time of a run."""


class _Silence:
    """A log whose lines are discarded, except those of bugs: each call of `exception` is one."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return self._fail if name == "exception" else _ignore

    @staticmethod
    def _fail(event: str, **_: object) -> None:
        raise Broken(f"the master logs a bug: {event}: {traceback.format_exc(limit=-4)}")


def _ignore(*_: object, **__: object) -> None:
    return None


class Master:
    """One life of a master: its parts, connected as `control_plane.master` connects them."""

    def __init__(self, world: World, directory: Path) -> None:
        random, clock = world.random, world.clock
        self.disk = SimulatedDisk(directory, world.disk_faults, random)
        self.checker = SimulatedChecker(
            random,
            lambda bad: Judgement(Flaw.CODE if bad else Flaw.NONE),
            lambda: CannotCheck("simulated: no process can be started"),
        )
        self.checker.unavailable = world.checker_unavailable
        self.publisher = Publisher()
        self.background: Any = InlineBackground(random)
        self.gate = RowGate(Gate(), self.checker, clock=clock, logs=False)
        self.synchronizer = Synchronizer(
            SimulatedSource(world.table, world.faults, random),
            self.publisher,
            signer=world.signer,
            store=SnapshotStore(directory),
            history=History(directory, 10, clock),
            wishes=WishesFile(directory),
            gate=self.gate,
            clock=clock,
            background=self.background,
            disk=self.disk,
        )
        self.loop = SyncLoop(
            self.synchronizer, self.publisher, interval=world.interval, patience=5.0, share=random.random
        )
        self.gate.on_bad_rows_served(self._read_again)
        self.publications = Publications(
            self.synchronizer.catalogue, signer=lambda: world.signer, sync_soon=self.loop.sync_soon, clock=clock
        )
        SimulatedWorker.fleet = self.fleet = Fleet(random, world.on_worker)
        self.supervisor = Supervisor(
            _CONFIGURE,
            self.publisher,
            Keys(()),
            workers=_WORKERS,
            heartbeat_timeout=10.0,
            start_timeout=60.0,
        )
        self._tasks: list[asyncio.Task[None]] = []

    def _read_again(self) -> None:
        self.synchronizer.read_again()
        self.loop.sync_soon()

    def start(self) -> None:
        """Start everything."""
        self.supervisor.start()
        self._tasks = [asyncio.create_task(self.loop.run()), asyncio.create_task(self.supervisor.watch())]

    def failure(self) -> BaseException | None:
        """The exception that ended a task of the master; None while all tasks run, as they must."""
        for task in self._tasks:
            if task.done() and not task.cancelled():
                return task.exception()
        return None

    async def crash(self) -> None:
        """End the master at the await that it has reached."""
        for worker in self.fleet.living:
            worker.exit(0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        # In the order in which they began, because the order of a set differs from process to process.
        tasks = sorted(others, key=lambda task: int(task.get_name().removeprefix("Task-")))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.synchronizer.close()
        self.publisher.close()
        self.disk.lose()


class World:
    """Table, faults, operators and masters of one run."""

    def __init__(self, seed: int, directory: Path, loop: VirtualLoop, trace: Callable[[str], None] | None) -> None:
        self.random = Random(seed)
        self._directory, self._loop, self._trace = directory, loop, trace
        self.table = Table(self.random)
        self.faults, self.disk_faults = Faults(), DiskFaults()
        self.checker_unavailable = False
        self.interval = self.random.choice([60.0, 300.0, 900.0])
        self.signer = signer_of(seed)
        self.promises = Promises(self.table, loop.time)
        self._ever_good: dict[bytes, set[bytes]] = {}
        self._generation = 0
        self._cycles = self._publications = self._lives = 0
        self._unhandled: list[BaseException] = []
        loop.set_exception_handler(self._on_unhandled)
        self.master: Master
        self.operators = Operators(self.random, self.promises, lambda: self.master, self.clock, self.note)

    def clock(self) -> float:
        """Seconds since the epoch."""
        return EPOCH + self._loop.time()

    def note(self, text: str) -> None:
        """A line of the trace."""
        if self._trace is not None:
            self._trace(f"{self._loop.time():12.3f} {text}")

    def ran(self) -> Ran:
        """The totals."""
        hours = self._loop.time() / 3600
        return Ran(hours, self._cycles, self._publications, self.promises.checks, self._lives)

    async def run(self) -> None:
        """Run for `HOURS`, then end the faults and expect everything to be fresh."""
        self._note_good_rows()
        self._begin()
        while self._loop.time() < HOURS * 3600:
            await self._pass(self.random.expovariate(1 / 900))
            await self._happen()
            if self.random.random() < 0.1:
                await self._recover()
        await self._recover()
        await self.master.crash()

    def _on_unhandled(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """An exception in a callback, or one of a task that was not awaited."""
        self._unhandled.append(context.get("exception") or Broken(context["message"]))

    async def _pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        if self.promises.first_broken is not None:
            raise self.promises.first_broken
        if self._unhandled:
            raise self._unhandled[0]
        failure = self.master.failure()
        if failure is not None:
            raise failure
        self.operators.check()
        self.promises.unjudged = self.master.checker.failed or self.master.gate.pending > 0

    # -- the master ------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.note("a master starts")
        self._lives += 1
        self._generation = 0
        self.promises.comparable = self.promises.served_last = None
        self.master = Master(self, self._directory)
        self._observe(self.master)
        self.master.start()

    def _observe(self, master: Master) -> None:
        catalogue = master.synchronizer.catalogue
        add, guard_judge = catalogue.disk.add, catalogue._guard.judge

        def passed(publication: Publication, *arguments: Any) -> None:
            self.note(f"passed {publication.snapshot.version_hash[:8]}")
            self._note_passed(publication.snapshot)
            add(publication, *arguments)

        async def judge(candidate: Snapshot, before: Snapshot | None, **options: Any) -> Any:
            # The guard compares with a catalogue that this master knows. A disk that hung may have held back a newer
            # one.
            self.promises.comparable = None if before is None else self.promises.passed.get(before.version_hash)
            self._note_excuses(candidate)
            return await guard_judge(candidate, before, **options)

        catalogue.disk.add = passed
        catalogue._guard.judge = judge
        master.publisher.on_publish(self._on_publish)

    def _note_passed(self, snapshot: Snapshot) -> None:
        self._note_excuses(snapshot)
        self.promises.on_passed(snapshot)

    def _note_excuses(self, snapshot: Snapshot) -> None:
        """Code that no checker could judge, or that passed the first review because there was much bad code."""
        gate = self.master.gate
        self.promises.unjudged |= self.master.checker.failed or gate.pending > 0
        for name in gate._gate.tolerated:
            code = content_of(snapshot).get(name)
            if code is not None:
                self.promises.tolerated.add(code)

    def _on_publish(self, publication: Publication) -> None:
        snapshot = publication.snapshot
        # the pin that was in effect when this catalogue was chosen; it may have expired since
        pinned = self.master.synchronizer.state.pin is not None
        self.note(f"published {snapshot.version_hash[:8]} as {snapshot.generation}{' pinned' if pinned else ''}")
        self._publications += 1
        # A catalogue is published before it is stored, so it passes now.
        if snapshot.version_hash not in self.promises.passed:
            self._note_passed(snapshot)
        self.promises.on_published(snapshot, self._generation, pinned=pinned)
        self._generation = snapshot.generation

    def on_worker(self, worker: SimulatedWorker, snapshot: Snapshot, announced: str) -> None:
        """A worker begins to serve."""
        self.promises.on_worker(snapshot, announced, worker.generation)

    async def _crash(self) -> None:
        await self._end()
        if self.random.random() < 0.3:
            self._damage()
        await asyncio.sleep(self.random.uniform(0, 300))
        self._begin()

    async def _end(self) -> None:
        self.note("the master crashes")
        self._cycles += sum(self.master.synchronizer.state.cycles.values())
        await self.master.crash()

    async def _start_without_database(self) -> None:
        """A start that can serve only the stored catalogue, which is damaged in a way that only its digest shows."""
        await self._end()
        first = SnapshotStore(self._directory).path
        for path in sorted(self._directory.rglob("*.avapsnap")):
            if path == first or self.random.random() < 0.5:
                self._change_code(path)
        refused, hung = self.faults.refuses, self.disk_faults.hangs
        self.faults.refuses, self.disk_faults.hangs = True, False
        self._begin()
        await self._pass(_RESTORED_SECONDS)
        self.faults.refuses, self.disk_faults.hangs = refused, hung

    def _change_code(self, path: Path) -> None:
        """Change one digit of the code of a command in the stored snapshot ``path``."""
        octets = bytearray(path.read_bytes())
        digits = [found.end() - 1 for found in re.finditer(rb"x = \d", octets)]
        if digits:
            self.note(f"{path.name[:20]}: another digit")
            octets[self.random.choice(digits)] ^= 1
            path.write_bytes(bytes(octets))

    def _damage(self) -> None:
        """Damage a file that no master has open."""
        files = [path for path in self._directory.rglob("*") if path.is_file()]
        if not files:
            return
        first = SnapshotStore(self._directory).path  # in half of the cases, the file that a start reads first
        path = first if first in files and self.random.random() < 0.5 else self.random.choice(sorted(files))
        octets = bytearray(path.read_bytes())
        kind = self.random.choice(["flip", "flip", "cut", "remove", "empty"])
        self.note(f"{path.name[:20]}: {kind}")
        if kind == "remove":
            path.unlink()
            return
        if kind == "flip" and octets:
            octets[self.random.randrange(len(octets))] ^= 1 << self.random.randrange(8)
        elif kind == "cut":
            del octets[self.random.randrange(len(octets) + 1) :]
        else:
            octets.clear()
        path.write_bytes(bytes(octets))

    # -- events ----------------------------------------------------------------------------------------------------

    async def _happen(self) -> None:
        events: dict[Callable[[], Any], float] = {
            self._change_table: 50,
            self._fault_of_database: 12,
            self._fault_of_disk: 6,
            self._fault_of_checker: 4,
            self._worker_fails: 8,
            self.operators.pin: 4,
            self.operators.unpin: 4,
            self.operators.accept: 10,
            self._crash: 2,
            self._ask_for_a_cycle: 4,
            self._operator_beside_a_cycle: 5,
            self._start_without_database: 3,
        }
        chosen = self.random.choices(list(events), list(events.values()))[0]
        result = chosen()
        if asyncio.iscoroutine(result):
            await result

    def _change_table(self) -> None:
        for _ in range(self.random.choice([1, 1, 1, 2, 3])):
            self.note(f"table: {self.table.change()}")
            self._note_good_rows()

    async def _operator_beside_a_cycle(self) -> None:
        self._change_table()
        await self.operators.act_beside_a_cycle()

    def _note_good_rows(self) -> None:
        for name, code in self.table.rows.items():
            if not code.startswith(BAD):
                self._ever_good.setdefault(name, set()).add(code)

    def _fault_of_database(self) -> None:
        name = self.random.choice(["refuses", "hangs", "breaks", "slow"])
        setattr(self.faults, name, not getattr(self.faults, name))
        self.note(f"database: {self.faults}")

    def _fault_of_disk(self) -> None:
        name = self.random.choice(["slow", "hangs", "full"])
        setattr(self.disk_faults, name, not getattr(self.disk_faults, name))
        self.note(f"disk: {self.disk_faults}")
        if not self.disk_faults.hangs:
            self.master.disk.recover()

    def _fault_of_checker(self) -> None:
        self.checker_unavailable = self.master.checker.unavailable = not self.checker_unavailable
        self.note(f"checker unavailable: {self.checker_unavailable}")

    def _worker_fails(self) -> None:
        self.master.fleet.start_failures = self.random.choice([0.0, 0.0, 0.5])
        for worker in self.master.fleet.living:
            if self.random.random() < 0.5:
                worker.hung = self.random.random() < 0.5
                self.note(f"worker {worker.number} {'hangs' if worker.hung else 'crashes'}")
                if not worker.hung:
                    worker.exit()

    def _ask_for_a_cycle(self) -> None:
        self.master.loop.sync_soon()

    # -- the end of the faults -------------------------------------------------------------------------------------

    async def _recover(self) -> None:
        """End all faults. Within one cycle everything must be fresh."""
        self.note("all faults end")
        for name in ("refuses", "hangs", "breaks", "slow"):
            setattr(self.faults, name, False)
        self.disk_faults.slow = self.disk_faults.hangs = self.disk_faults.full = False
        self.checker_unavailable = self.master.checker.unavailable = False
        self.master.fleet.start_failures = 0.0
        self.master.disk.recover()
        await self.operators.unpin()
        # A worker that hangs is noticed after a while, and a reading that hangs ends after its time limit.
        await self._pass(_SETTLED_SECONDS + SimulatedSource.STATEMENT_SECONDS)
        self.master.checker.failed = False
        await self._pass(self.interval + SOON)
        while self.master.synchronizer.state.held is not None:
            await self.operators.accept()
            await self._pass(self.interval + SOON)
        await self.operators.unpin()
        await self._pass(2 * SOON)
        self.promises.unjudged = False
        self._expect_fresh()

    def _expect_fresh(self) -> None:
        serving = [worker for worker in self.master.fleet.living if worker.answers and not worker.draining]
        if len(serving) != _WORKERS:
            raise Broken(f"{len(serving)} of {_WORKERS} workers serve after the faults have ended")
        for worker in serving:
            assert worker.snapshot is not None
            self._note_excuses(worker.snapshot)
            self.promises.expect_fresh(worker.snapshot, self._ever_good)
