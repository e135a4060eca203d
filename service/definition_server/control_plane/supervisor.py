"""Keeps the wanted number of workers alive: spawn, watch, murder, reap, roll, drain.

Each worker number is a `WorkerSlot` with a task that keeps it filled: start a process, wait for its end, start the
next. A roll puts a successor into the slot itself; the task then waits for that one. Beside it, a tick several times
a second compares what every worker has with what it should have (keys, snapshot, heartbeat, READY in time) and sends
or kills accordingly: level rather than edge, so nothing that is missed once is missed for good.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from dataclasses import dataclass, field

from definition_server.control_plane.publisher import Publication, Publisher
from definition_server.control_plane.schedule import Backoff, CrashLoop, Heartbeat
from definition_server.control_plane.worker_process import WorkerProcess
from definition_server.ipc.messages import Certificate, Configure, Drain, Keys
from definition_server.ipc.stats import StatsPage
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

TICK_SECONDS = 0.25
_FIRST_DELAY, _MOST_DELAY = 0.1, 30.0
_STABLE_SECONDS = 30.0
"""A worker that lived this long has shown itself sound: its end begins a new series of delays."""
_LOOP_ENDS = 5
_KILL_MARGIN_SECONDS = 2.0


@dataclass(slots=True)
class WorkerSlot:
    """One worker number and who fills it."""

    number: int
    worker: WorkerProcess | None = None
    restarts: int = 0
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_DELAY, _MOST_DELAY))
    crash_loop: CrashLoop = field(default_factory=lambda: CrashLoop(_LOOP_ENDS, _STABLE_SECONDS))


class Supervisor:
    """Starts and keeps ``workers`` workers, and hands them keys and publications."""

    def __init__(
        self,
        config: Configure,
        publisher: Publisher,
        keys: Keys,
        *,
        workers: int,
        heartbeat_timeout: float,
        start_timeout: float,
        listener: socket.socket | None = None,
    ) -> None:
        self._config = config
        self._listener = listener
        self._publisher = publisher
        self._keys = keys
        self._certificate = Certificate(0)
        self._heartbeat_timeout = heartbeat_timeout
        self._start_timeout = start_timeout
        self.posts = [WorkerSlot(number) for number in range(workers)]
        # A rolling worker runs beside its successor, so there are slots for both.
        self.page = StatsPage.create(2 * workers)
        self._free_slots = list(range(2 * workers))
        self._living: dict[WorkerProcess, Heartbeat] = {}
        self._leaving = asyncio.Event()
        self._rolling = asyncio.Lock()
        self._fillers: list[asyncio.Task[None]] = []
        publisher.on_publish(self._on_publish)

    def start(self) -> None:
        """Begin filling every post."""
        self._fillers = [asyncio.create_task(self._fill(post)) for post in self.posts]

    @property
    def serving(self) -> int:
        """Workers that are READY with a snapshot."""
        # A copy: the admin server's threads ask too, while the loop adds and removes workers.
        return sum(1 for worker in tuple(self._living) if worker.generation > 0 and not worker.draining)

    def use_keys(self, keys: Keys) -> None:
        """Accept other keys from now on."""
        self._keys = keys
        self._bring_level()

    def certificate_replaced(self) -> None:
        """Have the workers read the TLS files again."""
        self._certificate = Certificate(self._certificate.revision + 1)
        self._bring_level()

    @property
    def counts_connections(self) -> bool:
        """Whether workers keep count of their connections: they do where they accept from a shared socket."""
        return self._listener is not None

    async def watch(self) -> None:
        """The tick. Never returns."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._bring_level()
            now = asyncio.get_running_loop().time()
            for worker, heartbeat in self._living.items():
                self._judge(worker, heartbeat, now)
            for post in self.posts:
                if post.worker is not None and post.crash_loop.looping:
                    post.crash_loop.lives(now - post.worker.started)

    async def roll(self) -> None:
        """Replace every worker, one by one; the new one is READY before the old one drains.

        Stops where a successor does not become READY; its predecessor then stays.
        """
        if self._rolling.locked():
            log.warning("Roll ignored: one is under way")
            return
        async with self._rolling:
            for post in self.posts:
                if post.worker is not None and not self._leaving.is_set():
                    try:
                        await self._roll(post, post.worker)
                    except (OSError, TimeoutError) as error:
                        log.error("Roll stopped", worker=post.number, error=str(error))
                        return

    async def drain(self, *, wait: float, timeout: float) -> None:
        """Make every worker leave: NOT_SERVING, ``wait`` seconds, calls in flight finish within ``timeout`` in all."""
        self._leaving.set()
        for worker in self._living:
            worker.drain(Drain(True, wait, timeout))
        if not await self._all_ended(timeout + _KILL_MARGIN_SECONDS):
            log.warning("Workers did not leave in time; killed", count=len(self._living))
            self.cut_short()
            await self._all_ended(None)
        self.page.close()

    def cut_short(self) -> None:
        """Make a drain under way end at once."""
        for worker in self._living:
            worker.kill()

    async def _all_ended(self, timeout: float | None) -> bool:
        waited: set[asyncio.Task[None] | asyncio.Task[int]] = {*self._fillers}
        waited |= {worker.ended for worker in self._living}
        if not waited:
            return True
        _, late = await asyncio.wait(waited, timeout=timeout)
        return not late

    async def _fill(self, post: WorkerSlot) -> None:
        """Keep ``post`` filled until the supervisor leaves."""
        while not self._leaving.is_set():
            worker = post.worker
            if worker is None:
                try:
                    post.worker = await self._spawn(post.number)
                except OSError as error:
                    log.error("Worker cannot be started", worker=post.number, error=str(error))
                    await self._pause(post)
                continue
            await asyncio.wait((worker.ended,))
            if post.worker is worker and not self._leaving.is_set():
                post.worker = None
                self._on_exit(post, worker)
                await self._pause(post)

    async def _pause(self, post: WorkerSlot) -> None:
        post.restarts += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), post.backoff.next())

    def _on_exit(self, post: WorkerSlot, worker: WorkerProcess) -> None:
        """A worker ended unasked: say so, and judge whether this is a crash loop."""
        lived = asyncio.get_running_loop().time() - worker.started
        if lived > _STABLE_SECONDS:
            post.backoff.reset()
        post.crash_loop.ended(lived)
        code = worker.ended.result()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.error("Worker ended; starting another", worker=post.number, worker_pid=worker.pid, how=how)
        if post.crash_loop.looping:
            log.error(
                "Worker crash loop",
                worker=post.number,
                ends=_LOOP_ENDS,
                lived_less_than_seconds=_STABLE_SECONDS,
                remedy="read the worker's last log lines; undo the last change of build or environment",
            )

    async def _spawn(self, number: int) -> WorkerProcess:
        """Start a process for post ``number`` and send it all it should have.

        Raises:
            OSError: where none can be started.
        """
        slot = self._free_slots.pop(0)
        try:
            worker = await WorkerProcess.start(number, slot, self.page, self._config, self._listener)
        except BaseException:
            self._free_slots.append(slot)
            raise

        def release(_: asyncio.Task[int]) -> None:
            del self._living[worker]
            self._free_slots.append(slot)

        self._living[worker] = Heartbeat(self._heartbeat_timeout)
        worker.ended.add_done_callback(release)
        worker.reconcile(self._keys, self._certificate, self._publisher.current)
        if self._leaving.is_set():
            worker.kill()
        return worker

    async def _roll(self, post: WorkerSlot, old: WorkerProcess) -> None:
        successor = await self._spawn(post.number)
        ready = asyncio.create_task(successor.ready.wait())
        await asyncio.wait((ready, successor.ended), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not successor.ready.is_set() or (self._publisher.current and not successor.generation):
            successor.kill()
            await asyncio.wait((successor.ended,))
            raise TimeoutError("the new worker did not become READY with the catalogue; the old one stays")
        leave = Drain(False, 0.0, self._config.drain_timeout_seconds)
        # Else it died meanwhile, its post is filled again, and the successor is one too many.
        replaced = post.worker is old
        if replaced:
            post.worker = successor
        leaver = old if replaced else successor
        leaver.drain(leave)
        await asyncio.wait((leaver.ended,), timeout=leave.timeout_seconds + _KILL_MARGIN_SECONDS)
        leaver.kill()
        await asyncio.wait((leaver.ended,))  # its slot is free from then on; the next roll needs it
        if replaced:
            log.info("Worker rolled", worker=post.number, old_pid=old.pid, new_pid=successor.pid)

    def _judge(self, worker: WorkerProcess, heartbeat: Heartbeat, now: float) -> None:
        """Kill a worker that is not READY in time, or that hangs; its post then gets another."""
        if not worker.ready.is_set():
            if now - worker.started > self._start_timeout:
                log.error("Worker is not READY in time; killed", worker=worker.number, worker_pid=worker.pid)
                worker.kill()
        elif not worker.draining and heartbeat.hangs(worker.slot.read().heartbeat_ns, now):
            log.error(
                "Worker hangs; killed",
                worker=worker.number,
                worker_pid=worker.pid,
                silent_seconds=self._heartbeat_timeout,
            )
            worker.kill()

    def _on_publish(self, _: Publication) -> None:
        self._bring_level()

    def _bring_level(self) -> None:
        for worker in self._living:
            if not worker.draining:
                worker.reconcile(self._keys, self._certificate, self._publisher.current)
