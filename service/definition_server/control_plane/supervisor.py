"""Keeps the configured number of workers running: starts, watches, kills, reaps, replaces and drains them.

Each worker number is a `WorkerSlot` with a task that keeps the slot occupied: the task starts a process, waits for its
end, and starts the next. In a roll, the roll itself puts a successor into the slot, and the task then waits for the end
of the successor. In addition, a tick several times a second compares the state of every worker with the desired state
(keys, snapshot, heartbeat, READY in time), and sends messages to the worker or kills it. The tick compares states and
does not depend on events, so a missed event has no lasting effect.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field

from definition_server.control_plane.listener import listen_again, listens
from definition_server.control_plane.propagation import Propagation
from definition_server.control_plane.publisher import Publication, Publisher
from definition_server.control_plane.schedule import Backoff, CrashLoop, Heartbeat
from definition_server.control_plane.worker_process import WorkerProcess
from definition_server.control_plane.worker_stats import FleetStats
from definition_server.ipc.messages import CallsSampled, Certificate, Configure, Drain, Freshness, Keys
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import get_logger
from definition_server.observability.tracing import Step, begin

log = get_logger(__name__)

TICK_SECONDS = 0.25
_FIRST_DELAY, _MOST_DELAY = 0.1, 30.0
_STABLE_SECONDS = 30.0
"""If a worker has run for so many seconds, the next back-off begins with the shortest delay again."""
_LOOP_ENDS = 5
_KILL_MARGIN_SECONDS = 2.0


@dataclass(slots=True)
class WorkerSlot:
    """One worker number and the process that occupies it."""

    number: int
    worker: WorkerProcess | None = None
    restarts: int = 0
    backoff: Backoff = field(default_factory=lambda: Backoff(_FIRST_DELAY, _MOST_DELAY))
    crash_loop: CrashLoop = field(default_factory=lambda: CrashLoop(_LOOP_ENDS, _STABLE_SECONDS))


class Supervisor:
    """Keeps ``workers`` workers running, and sends them keys and publications."""

    def __init__(
        self,
        config: Configure,
        publisher: Publisher,
        keys: Keys,
        tls: TlsFiles | None = None,
        *,
        workers: int,
        heartbeat_timeout: float,
        start_timeout: float,
        listener: socket.socket | None = None,
        on_keys_used: Callable[[tuple[str, ...]], None] = lambda _: None,
        on_calls_sampled: Callable[[int, CallsSampled], None] = lambda *_: None,
        propagation: Propagation | None = None,
        lend: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """
        Args:
            propagation: Measures how long publications take to reach the workers.
            lend: Returns a context in which descriptors are free for the start of a process.
        """
        self._propagation = propagation
        self._config = config
        self._lend = lend
        self._listener = listener
        self._address = None if listener is None else listener.getsockname()
        self._port_lost = False
        self._roll_after_repair: asyncio.Task[str | None] | None = None
        self._roll_for_certificate: asyncio.Task[str | None] | None = None
        self._rolled_for = Certificate(0)
        """The newest certificate for which workers were replaced because they could not load it."""
        self._on_keys_used = on_keys_used
        self._on_calls_sampled = on_calls_sampled
        self._publisher = publisher
        self._keys = keys
        self._freshness = Freshness(False)
        self._certificate = Certificate(0)
        self._tls = tls
        self._heartbeat_timeout = heartbeat_timeout
        self._start_timeout = start_timeout
        self.slots = [WorkerSlot(number) for number in range(workers)]
        self.stats = FleetStats()
        self._workers: dict[WorkerProcess, Heartbeat] = {}
        self._leaving = asyncio.Event()
        self._rolling = asyncio.Lock()
        self._keepers: list[asyncio.Task[None]] = []
        self._arrived: tuple[int, float] | None = None
        self._hand_over: Step | None = None
        """The tracing step of the present publication."""
        publisher.on_publish(self._on_publish)

    def start(self) -> None:
        """Start a worker in every slot."""
        self._keepers = [asyncio.create_task(self._keep_occupied(slot)) for slot in self.slots]

    @property
    def serving(self) -> int:
        """Number of workers that are READY with a snapshot."""
        # Iterates over a copy, because other threads (of the admin server) call this while the loop adds and removes
        # workers.
        return sum(1 for worker in tuple(self._workers) if worker.generation > 0 and not worker.draining)

    @property
    def all_serve_since(self) -> float | None:
        """The time at which the last worker received the present publication, seconds since the epoch; None while a
        worker lacks it.
        """
        current = self._publisher.current
        if current is None or self._arrived is None or self._arrived[0] != current.snapshot.generation:
            return None
        return self._arrived[1]

    def _note_arrival(self) -> None:
        """Remember the first moment at which every slot has a worker with the present publication."""
        current = self._publisher.current
        if current is None:
            return
        generation = current.snapshot.generation
        if self._arrived is not None and self._arrived[0] == generation:
            return
        workers = [slot.worker for slot in self.slots]
        if all(worker is not None and worker.generation >= generation for worker in workers):
            self._arrived = generation, time.time()
            if self._hand_over is not None:
                self._hand_over.end()

    @property
    def worker_pids(self) -> frozenset[int]:
        """The processes of all workers, including those that drain."""
        return frozenset(worker.pid for worker in tuple(self._workers))

    def use_keys(self, keys: Keys) -> None:
        """From now on, make every worker accept ``keys`` and no other keys."""
        self._keys = keys
        self._reconcile()

    def report_freshness(self, fresh: bool) -> None:
        """Make the health service of every worker report whether the served catalogue is up to date."""
        if fresh != self._freshness.fresh:
            self._freshness = Freshness(fresh)
            self._reconcile()

    def use_certificate(self, tls: TlsFiles) -> None:
        """Make every worker use ``tls`` for new connections. The previous files may be closed."""
        self._tls = tls
        self._certificate = Certificate(self._certificate.revision + 1)
        self._reconcile()

    @property
    def counts_connections(self) -> bool:
        """Whether workers count their connections. They do if they accept from a shared socket."""
        return self._listener is not None

    @property
    def confines_workers(self) -> bool:
        """Whether workers should be confined. They should unless ``JAIL=off``."""
        return self._config.jail != "off"

    async def watch(self) -> None:
        """Run the tick. Never returns."""
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._repair_listener()
            self._reconcile()
            self._replace_outdated()
            now = asyncio.get_running_loop().time()
            for worker, heartbeat in self._workers.items():
                self._judge(worker, heartbeat, now)
            for slot in self.slots:
                if slot.worker is not None and slot.crash_loop.looping:
                    slot.crash_loop.runs(now - slot.worker.started)

    def _repair_listener(self) -> None:
        """If a worker has shut the shared socket down, open the port again and replace all workers, because it is
        unknown which worker is broken.
        """
        if self._listener is None or listens(self._listener):
            return
        try:
            listen_again(self._listener, self._address)
        except OSError as error:
            if not self._port_lost:
                log.error("The port was shut down by a worker and cannot be opened; tried again", error=error.strerror)
            self._port_lost = True
            return
        self._port_lost = False
        if self._roll_after_repair is None or self._roll_after_repair.done():
            log.error("The port was shut down by a worker; it is open again, and the workers are replaced")
            self._roll_after_repair = asyncio.create_task(self.roll())

    def _replace_outdated(self) -> None:
        """Replace the workers if one of them cannot load the newest certificate. This is done once for each
        certificate, so that a failing roll is not repeated four times a second.
        """
        if self._rolled_for == self._certificate or self._rolling.locked() or self._leaving.is_set():
            return
        if any(slot.worker is not None and slot.worker.outdated for slot in self.slots):
            self._rolled_for = self._certificate
            log.info("The workers are replaced: they cannot load another certificate")
            self._roll_for_certificate = asyncio.create_task(self.roll())

    async def roll(self, replaced: Callable[[int], None] = lambda _: None) -> str | None:
        """Replace every worker, one by one. Each successor is READY before its predecessor drains.

        If a successor does not become READY, the roll stops, and the predecessor continues to serve.

        Args:
            replaced: Called after each worker, with the number of those that were replaced.

        Returns:
            The reason why not all were replaced; None if they were.
        """
        if self._rolling.locked():
            log.warning("Roll ignored: one is under way")
            return "another roll is under way"
        async with self._rolling:
            log.info("Rolling the workers")
            for done, slot in enumerate(self.slots, 1):
                if self._leaving.is_set():
                    return "the server is stopping"
                if slot.worker is not None:
                    try:
                        await self._roll(slot, slot.worker)
                    except (OSError, TimeoutError) as error:
                        log.error("Roll stopped", worker=slot.number, error=str(error))
                        return f"worker {slot.number}: {error}"
                replaced(done)
        return None

    async def drain(self, *, wait: float, timeout: float) -> None:
        """Make every worker report NOT_SERVING, wait ``wait`` seconds, and finish its calls within ``timeout``."""
        self._leaving.set()
        for worker in self._workers:
            worker.drain(Drain(True, wait, timeout))
            self._leaves(worker)
        if not await self._all_ended(timeout + _KILL_MARGIN_SECONDS):
            log.warning("Workers did not leave in time; killed", count=len(self._workers))
            self.cut_short()
            await self._all_ended(None)

    def cut_short(self) -> None:
        """End a drain that is under way by killing the workers."""
        for worker in self._workers:
            worker.kill()

    async def _all_ended(self, timeout: float | None) -> bool:
        waited: set[asyncio.Task[None] | asyncio.Task[int]] = {*self._keepers}
        waited |= {worker.ended for worker in self._workers}
        if not waited:
            return True
        _, late = await asyncio.wait(waited, timeout=timeout)
        return not late

    async def _keep_occupied(self, slot: WorkerSlot) -> None:
        """Keep a worker running in ``slot`` until the supervisor drains."""
        while not self._leaving.is_set():
            worker = slot.worker
            if worker is None:
                try:
                    slot.worker = await self._spawn(slot.number)
                except OSError as error:
                    log.error("Worker cannot be started", worker=slot.number, error=str(error))
                    await self._pause(slot)
                continue
            await asyncio.wait((worker.ended,))
            if slot.worker is worker and not self._leaving.is_set():
                slot.worker = None
                self._on_exit(slot, worker)
                await self._pause(slot)

    async def _pause(self, slot: WorkerSlot) -> None:
        slot.restarts += 1
        with suppress(TimeoutError):
            await asyncio.wait_for(self._leaving.wait(), slot.backoff.next())

    def _on_exit(self, slot: WorkerSlot, worker: WorkerProcess) -> None:
        """A worker ended by itself: log it, and decide whether this is a crash loop."""
        lived = asyncio.get_running_loop().time() - worker.started
        if lived > _STABLE_SECONDS:
            slot.backoff.reset()
        slot.crash_loop.ended(lived)
        code = worker.ended.result()
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        log.error("Worker ended; starting another", worker=slot.number, worker_pid=worker.pid, how=how)
        if slot.crash_loop.looping:
            log.error(
                "Worker crash loop",
                worker=slot.number,
                ends=_LOOP_ENDS,
                lived_less_than_seconds=_STABLE_SECONDS,
                remedy="read the worker's last log lines; undo the last change of build or environment",
            )

    async def _spawn(self, number: int) -> WorkerProcess:
        """Start a process for worker ``number`` and send it keys, certificate and snapshot.

        Raises:
            OSError: if no process can be started.
        """
        with self._lend():
            stats = self.stats.open()
            try:
                worker = await WorkerProcess.start(
                    number,
                    stats,
                    self._config,
                    self._certificate,
                    self._tls,
                    self._listener,
                    on_mapped=self._reconcile,
                    on_keys_used=self._on_keys_used,
                    on_calls_sampled=self._on_calls_sampled,
                    on_ready=self._on_ready,
                )
            except BaseException:
                self.stats.retire(stats)
                raise

        def release(_: asyncio.Task[int]) -> None:
            del self._workers[worker]
            self._leaves(worker)
            self.stats.retire(stats)
            self._reconcile()  # the other workers must not leave connections to a worker that has ended

        self._workers[worker] = Heartbeat(self._heartbeat_timeout)
        worker.ended.add_done_callback(release)
        self._reconcile()
        if self._leaving.is_set():
            worker.kill()
        return worker

    async def _roll(self, slot: WorkerSlot, old: WorkerProcess) -> None:
        successor = await self._spawn(slot.number)
        ready = asyncio.create_task(successor.ready.wait())
        await asyncio.wait((ready, successor.ended), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        if not successor.ready.is_set() or (self._publisher.current and not successor.generation):
            successor.kill()
            await asyncio.wait((successor.ended,))
            raise TimeoutError("the new worker did not become READY with the catalogue; the old one stays")
        leave = Drain(False, 0.0, self._config.drain_timeout_seconds)
        # Otherwise the old worker has ended meanwhile, its slot already has another worker, and the successor is not
        # needed.
        replaced = slot.worker is old
        if replaced:
            slot.worker = successor
        leaver = old if replaced else successor
        leaver.drain(leave)
        self._leaves(leaver)
        await asyncio.wait((leaver.ended,), timeout=leave.timeout_seconds + _KILL_MARGIN_SECONDS)
        leaver.kill()
        await asyncio.wait((leaver.ended,))
        if replaced:
            log.info("Worker rolled", worker=slot.number, old_pid=old.pid, new_pid=successor.pid)

    def _judge(self, worker: WorkerProcess, heartbeat: Heartbeat, now: float) -> None:
        """Kill a worker that misbehaves, is not READY in time, or hangs; its slot then gets another."""
        problem = worker.problem(now)
        if problem is not None:
            worker.kill()
            log.error("Worker misbehaves; killed", worker=worker.number, worker_pid=worker.pid, problem=problem)
        elif not worker.ready.is_set():
            if now - worker.started > self._start_timeout:
                log.error(
                    "Worker is not READY in time; killed",
                    worker=worker.number,
                    worker_pid=worker.pid,
                    remedy="read the worker's own log lines; if it is only slow (a busy machine; PYTHONTRACEMALLOC "
                    "makes a start ten times as long), raise START_TIMEOUT_SECONDS",
                )
                worker.kill()
        elif not worker.draining and heartbeat.hangs(worker.stats.read().heartbeat_ns, now):
            log.error(
                "Worker hangs; killed",
                worker=worker.number,
                worker_pid=worker.pid,
                silent_seconds=self._heartbeat_timeout,
            )
            worker.kill()

    def _on_publish(self, publication: Publication) -> None:
        if self._hand_over is not None:
            self._hand_over.end()  # if not every worker has this publication, a newer one has replaced it
        self._hand_over = begin("hand over", generation=publication.snapshot.generation, workers=len(self.slots))
        if self._propagation is not None:
            serving = [worker.pid for worker in self._workers if worker.knows_a_catalogue and not worker.draining]
            self._propagation.published(publication.snapshot.generation, serving)
        self._reconcile()

    def _on_ready(self, worker: WorkerProcess) -> None:
        if self._propagation is not None:
            self._propagation.acknowledged(worker.pid, worker.generation)
        self._note_arrival()

    def _leaves(self, worker: WorkerProcess) -> None:
        if self._propagation is not None:
            self._propagation.gone(worker.pid)

    def _reconcile(self) -> None:
        # Workers that accept from one shared socket read the connection counts of each other.
        peers = {worker.pid: worker for worker in self._workers if worker.mapped and not worker.ended.done()}
        if self._listener is None:
            peers = {}
        for worker in self._workers:
            if not worker.draining:
                worker.reconcile(
                    self._keys, self._freshness, self._certificate, self._tls, self._publisher.current, peers
                )
