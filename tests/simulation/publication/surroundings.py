"""The surroundings of the master: the thread for heavy work, the disk, the process that judges rows, the workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

from tests.simulation.publication.database import BAD

from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.publisher import Publication
from definition_server.control_plane.store import StoreError
from definition_server.ipc.memory import map_sealed
from definition_server.observability.reasons import Reason

T = TypeVar("T")


class InlineBackground:
    """A `Background` without a thread. It does work at once, or after a while."""

    def __init__(self, random: Random) -> None:
        self._random = random
        self._steps = 0
        self._action: Callable[[], None] | None = None

    async def run(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """The result of ``work``."""
        delay = self._random.choice([0.0, 0.0, 0.0, 0.05])
        if self._action is not None:
            delay = 0.05
            self._steps -= 1
            if self._steps < 0:
                action, self._action = self._action, None
                action()
        await asyncio.sleep(delay)
        return work(*arguments, **options)

    def interrupt(self, steps: int, action: Callable[[], None]) -> None:
        """After this many steps of work, each of which takes a while, call ``action``, so that it runs during the next
        step.
        """
        self._steps, self._action = steps, action

    def soon(self, work: Callable[[], object]) -> None:
        """Do ``work`` now."""
        work()

    def lower_priority(self) -> None:
        """There is no thread."""

    def close(self) -> None:
        """There is no thread."""


@dataclass(slots=True)
class DiskFaults:
    """The present faults of the disk."""

    slow: bool = False
    hangs: bool = False
    full: bool = False


class SimulatedDisk:
    """An `OnDisk` that works at once, late, with an error, or never."""

    def __init__(self, directory: Path, faults: DiskFaults, random: Random) -> None:
        self._directory, self._faults, self._random = directory, faults, random
        self._hanging: list[Callable[[], None]] = []
        self._under_way: dict[asyncio.Future[Any], Callable[[], object]] = {}

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """The result of ``work``."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def do() -> None:
            if future not in self._under_way:
                return
            if self._faults.hangs:
                self._hanging.append(do)
                return
            del self._under_way[future]
            if self._faults.full:
                self._fail(work)
                self._settle(future, None, StoreError("simulated: no space left", Reason.DISK_FAILED))
                return
            try:
                self._settle(future, work(), None)
            except Exception as error:  # noqa: BLE001 - passed on, as `on_disk` does
                self._settle(future, None, error)

        self._under_way[future] = work
        loop.call_later(self._random.uniform(0, 8) if self._faults.slow else 0.0, do)
        return future

    @staticmethod
    def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def lose(self) -> None:
        """The process was killed, so work in progress is never finished."""
        under_way, self._under_way = self._under_way, {}
        for work in under_way.values():
            self._fail(work)

    def _fail(self, work: Callable[[], object]) -> None:
        """Make ``work`` fail, so that it only closes its descriptors: a file replaces the directory during the work."""
        elsewhere = self._directory.with_suffix(".away")
        self._directory.rename(elsewhere)
        self._directory.touch()
        with suppress(Exception):
            work()
        self._directory.unlink()
        elsewhere.rename(self._directory)

    def recover(self) -> None:
        """Continue work that hung."""
        hanging, self._hanging = self._hanging, []
        for do in hanging:
            do()


class SimulatedChecker:
    """A `RowChecker` that recognises bad code by its beginning."""

    def __init__(self, random: Random, make_judgement: Callable[[bool], Any], cannot: Callable[[], Exception]) -> None:
        self._random, self._make, self._cannot = random, make_judgement, cannot
        self.unavailable = False
        self.failed = False
        """Whether rows were left unjudged since this was last set to False."""

    async def check(self, contents: Sequence[Any]) -> list[Any]:
        """The judgement of each row."""
        if self.unavailable:
            self.failed = True
            raise self._cannot()
        await asyncio.sleep(self._random.choice([0.0, 0.01, 0.5]))
        return [self._make(content.code.startswith(BAD)) for content in contents]

    async def prepare(self) -> None:
        """Nothing to start."""

    def lower_priority(self) -> None:
        """No process."""

    async def close(self) -> None:
        """No process."""


class SimulatedWorker:
    """A `WorkerProcess` that takes keys and publications a little later than they are sent, and may crash or hang."""

    fleet: Fleet
    """Set by `World`. It has the random numbers, and judges each snapshot that a worker begins to serve."""

    def __init__(self, number: int) -> None:
        fleet = self.fleet
        loop = asyncio.get_running_loop()
        self.number, self.pid = number, fleet.next_pid()
        self.started = loop.time()
        self.mapped = True
        self.ready = asyncio.Event()
        self.generation = 0
        self.jail = "full"
        self.draining = False
        self.hung = False
        self.snapshot: Snapshot | None = None
        self._exited: asyncio.Future[int] = loop.create_future()
        self.ended: asyncio.Task[int] = loop.create_task(self._reap())
        self._sent = 0
        self._beats = 0
        self.stats = SimpleNamespace(read=self._read)
        fleet.workers.append(self)

    @classmethod
    async def start(cls, number: int, *_: object, **__: object) -> SimulatedWorker:
        """Start a process, which takes some time or fails."""
        fleet = cls.fleet
        await asyncio.sleep(fleet.random.uniform(0.05, 0.5))
        if fleet.random.random() < fleet.start_failures:
            raise OSError("simulated: no process can be started")
        return cls(number)

    async def _reap(self) -> int:
        return await asyncio.shield(self._exited)

    def _read(self) -> SimpleNamespace:
        if not self.hung:
            self._beats += 1
        return SimpleNamespace(heartbeat_ns=self._beats)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return not self._exited.done()

    @property
    def answers(self) -> bool:
        """Whether the worker answers calls now."""
        return self.alive and not self.hung and self.snapshot is not None

    def exit(self, code: int = 1) -> None:
        """The process ends."""
        if self.alive:
            self._exited.set_result(code)

    def kill(self) -> None:
        """SIGKILL."""
        self.exit(-9)

    def drain(self, _: object) -> None:
        """Drain and exit."""
        self.draining = True
        asyncio.get_running_loop().call_later(0.1, self.exit, 0)

    def problem(self, _: float) -> str | None:
        """No effect, because the worker keeps to the protocol."""
        return None

    def reconcile(self, *levels: object) -> None:
        """Send each of ``levels`` that was not sent yet; the publication is one of them."""
        publication = next((level for level in levels if isinstance(level, Publication)), None)
        if publication is None or publication.snapshot.generation == self._sent or not self.alive:
            return
        self._sent = publication.snapshot.generation
        delay = self.fleet.random.choice([0.0, 0.001, 0.05, 0.2])
        # The message holds the descriptor, as a message in a socket does.
        descriptor = os.dup(publication.descriptor)
        asyncio.get_running_loop().call_later(
            delay, self._receive, descriptor, self._sent, publication.snapshot.version_hash
        )

    def _receive(self, descriptor: int, generation: int, version: str) -> None:
        try:
            if not self.alive or self.hung:
                return
            snapshot = Snapshot(map_sealed(descriptor))
        finally:
            os.close(descriptor)
        if self.snapshot is not None and generation <= self.snapshot.generation:
            return  # two messages arrived in the wrong order: a worker keeps the newer one
        self.fleet.served(self, snapshot, version)
        self.snapshot = snapshot
        self.generation = generation
        self.ready.set()


class Fleet:
    """The worker processes of one master."""

    def __init__(self, random: Random, served: Callable[[SimulatedWorker, Snapshot, str], None]) -> None:
        """``served`` is called when a worker begins to serve a snapshot that was announced under a version."""
        self.random, self.served = random, served
        self.workers: list[SimulatedWorker] = []
        self.start_failures = 0.0
        self._pid = 1000

    def next_pid(self) -> int:
        """The next process id."""
        self._pid += 1
        return self._pid

    @property
    def living(self) -> list[SimulatedWorker]:
        """The processes that have not ended; the others are forgotten."""
        self.workers = [worker for worker in self.workers if worker.alive]
        return self.workers
