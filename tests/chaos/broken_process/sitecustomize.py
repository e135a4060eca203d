"""Servers with a deliberate defect, to show that a process or machine drill can fail; and a settable clock.

Only tests put this on ``PYTHONPATH``; Python imports it when a process starts. ``PYTHON_DRILL_BROKEN`` names the
variant, ``PYTHON_DRILL_CLOCK`` the file that the clock is read from; workers inherit ``PYTHON…``.
"""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

# -- the clock ---------------------------------------------------------------------------------------------------------


def run_under_clock(file: str, library: str) -> None:
    """Restart this interpreter under libfaketime, whose variables are missing in a worker's scrubbed environment."""
    if os.environ.get("FAKETIME_TIMESTAMP_FILE") == file:
        del os.environ["LD_PRELOAD"]  # not for child processes: each child restarts itself
        # From Python 3.11 on, `sleep` uses clock_nanosleep until a monotonic instant, which fails under libfaketime
        # (0.9.10).
        time.sleep = lambda seconds: select.select((), (), (), float(seconds))
        return
    os.environ.update(
        LD_PRELOAD=library,
        FAKETIME_TIMESTAMP_FILE=file,
        FAKETIME_CACHE_DURATION="1",
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        DONT_FAKE_MONOTONIC="1",  # the name of the attribute in older versions
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def of(module: str) -> Any:
    """A module of the server, which a variant changes."""
    return import_module(f"definition_server.{module}")


# -- broken processes --------------------------------------------------------------------------------------------------


def never_replaces_workers() -> None:
    """A slot whose worker has ended stays empty."""
    supervisor = of("control_plane.supervisor").Supervisor

    async def pause(self: Any, slot: Any) -> None:
        await self._leaving.wait()

    supervisor._pause = pause


def replaces_workers_late() -> None:
    """Waits twenty seconds before it starts the next worker."""
    supervisor = of("control_plane.supervisor")
    supervisor._FIRST_DELAY = 20.0


def never_kills_hung_workers() -> None:
    """Never kills a worker whose heartbeat stands still."""
    heartbeat = of("control_plane.schedule").Heartbeat
    heartbeat.hangs = lambda self, beat, now: False


def forgets_to_hand_over() -> None:
    """A successor gets keys, but no catalogue."""
    process = of("control_plane.worker_process").WorkerProcess
    level = process.reconcile
    seen: dict[int, Any] = {}

    def reconcile(self: Any, *levels: Any) -> None:
        first = seen.setdefault(self.number, self) is self
        level(self, *(None if type(each).__name__ == "Publication" and not first else each for each in levels))

    process.reconcile = reconcile


def rolls_before_the_successor_is_ready() -> None:
    """Stops the old worker before it starts the new one."""
    supervisor = of("control_plane.supervisor").Supervisor
    roll = supervisor._roll

    async def roll_at_once(self: Any, slot: Any, old: Any) -> None:
        old.kill()
        await roll(self, slot, old)

    supervisor._roll = roll_at_once


def starts_again_at_once() -> None:
    """Never increases the delay after repeated failures of a worker."""
    backoff = of("control_plane.schedule").Backoff
    backoff.next = lambda self: 0.0


def rolls_by_killing() -> None:
    """Does not wait for calls in flight. It also delays calls, because they take less than a millisecond otherwise."""
    process = of("control_plane.worker_process").WorkerProcess

    def stop_and_kill(self: Any, drain: Any) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        asyncio.get_running_loop().call_later(0.1, self.kill)

    process.drain = stop_and_kill


def leaves_without_draining() -> None:
    """SIGTERM ends the master immediately."""
    master = of("control_plane.master")
    master._Master._on_stop = lambda self, number: os._exit(1)


def workers_outlive_their_master() -> None:
    """Workers also hold the port, for much longer than any client waits."""
    worker = of("data_plane.worker")
    watch = worker._leave_at_the_latest

    def stay(self: Any, drain: Any) -> None:
        asyncio.get_running_loop().remove_reader(self._channel.fileno())

    worker.Worker._leave_soon = stay
    worker._leave_at_the_latest = lambda control, seconds: watch(control, 12.0)


def leaves_a_lock_behind() -> None:
    """Assumes that a killed server still runs, because of a lock file."""
    master = of("control_plane.master")
    listen = master.listen

    def listen_alone(host: str, port: int) -> Any:
        try:
            Path(f"{os.environ['DATABASE_URL_FILE']}.lock").touch(exist_ok=False)
        except FileExistsError:
            raise master.PortInUse("there is a lock file") from None
        return listen(host, port)

    master.listen = listen_alone


# -- broken by the machine ---------------------------------------------------------------------------------------------


def dies_of_a_failed_cycle() -> None:
    """Ends when a cycle fails."""
    outcomes = of("control_plane.sync_state").Outcome
    synchronizer = of("control_plane.sync").Synchronizer
    cycle = synchronizer.cycle

    async def cycle_or_die(self: Any, *args: Any, **how: Any) -> Any:
        outcome = await cycle(self, *args, **how)
        if outcome is outcomes.FAILED:
            raise RuntimeError("a cycle failed")
        return outcome

    synchronizer.cycle = cycle_or_die


def workers_die_of_trouble() -> None:
    """A worker that logs an error exits."""
    worker = of("data_plane.worker")
    log = worker.log

    class Fatal:
        warning, info = log.warning, log.info

        def error(self, *args: Any, **fields: Any) -> None:
            log.error(*args, **fields)
            os._exit(1)

    worker.log = Fatal()


def needs_a_thread_to_swap() -> None:
    """A worker swaps catalogues in a thread, and does not swap if it cannot start one."""
    worker = of("data_plane.worker")
    take = worker.Worker._open

    def take_aside(self: Any, message: Any, descriptor: int) -> None:
        try:
            thread = threading.Thread(target=lambda: None)
            thread.start()
        except RuntimeError:
            os.close(descriptor)
            return
        thread.join()
        take(self, message, descriptor)

    worker.Worker._open = take_aside


def stores_before_it_publishes() -> None:
    """Does not serve a catalogue that cannot be stored."""
    catalogue = of("control_plane.served_catalogue").ServedCatalogue
    offer = catalogue.offer

    async def store_and_offer(self: Any, *args: Any, **options: Any) -> bool:
        probe = self.disk._store.path.with_suffix(".probe")
        with probe.open("wb") as file:
            file.write(b"\0" * 65_536)
        probe.unlink()
        return bool(await offer(self, *args, **options))

    catalogue.offer = store_and_offer


def trusts_the_disk() -> None:
    """Serves the last-known-good file without verification."""
    snapshot = of("catalog.snapshot").Snapshot
    snapshot.verify = lambda self: None


def goes_by_the_wall_clock() -> None:
    """The master measures all its waits with the wall clock."""
    loop: Any = asyncio.BaseEventLoop
    loop.time = lambda self: time.time()


def workers_end_when_late() -> None:
    """A worker whose event loop is late by a twentieth of a second exits."""
    worker = of("data_plane.worker")

    async def beat(self: Any) -> None:
        while True:
            self._slot.beat(time.monotonic_ns())
            began = time.monotonic()
            await asyncio.sleep(0.25)  # as the worker does
            if time.monotonic() - began > 0.30:
                os._exit(1)

    worker.Worker._beat = beat


def shares_its_port() -> None:
    """Lets other processes listen on its port."""
    master = of("control_plane.master")

    def listen(host: str, port: int) -> socket.socket:
        return socket.create_server((host, port), backlog=4096, reuse_port=True)

    master.listen = listen


def takes_another_port() -> None:
    """Takes another port if its own is in use."""
    master = of("control_plane.master")
    listen = master.listen

    def listen_somewhere(host: str, port: int) -> Any:
        try:
            return listen(host, port)
        except master.PortInUse:
            return listen(host, 0)

    master.listen = listen_somewhere


VARIANTS: dict[str, Callable[[], None]] = {
    variant.__name__.replace("_", "-"): variant
    for variant in (
        never_replaces_workers, replaces_workers_late, never_kills_hung_workers, forgets_to_hand_over,
        rolls_before_the_successor_is_ready, starts_again_at_once, rolls_by_killing, leaves_without_draining,
        workers_outlive_their_master, leaves_a_lock_behind, dies_of_a_failed_cycle, workers_die_of_trouble,
        needs_a_thread_to_swap, stores_before_it_publishes, trusts_the_disk, goes_by_the_wall_clock,
        workers_end_when_late, shares_its_port, takes_another_port,
    )
}  # fmt: skip

if __name__ == "sitecustomize":
    if clock := os.environ.get("PYTHON_DRILL_CLOCK"):
        run_under_clock(clock, os.environ["PYTHON_DRILL_CLOCK_LIBRARY"])
    if broken := os.environ.get("PYTHON_DRILL_BROKEN"):
        VARIANTS[broken]()
