"""One worker process: ``python -m definition_server.data_plane.worker CONTROL_FD STATS_FD SLOT [LISTENER_FD]``.

Started by the master with a control socket, the stats page, a slot number and, for a transport that can adopt it, the
listening socket; everything else it is told over the control socket. Life: told its configuration → warmed up → port
open → READY → serves, swapping snapshots as they are published → drains when told to, on SIGTERM, or when the master is
gone → exits 0.
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
from contextlib import suppress
from time import monotonic_ns

import uvloop

from definition_server.catalog.layout import SnapshotError
from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.balance import Gate
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.transports import CannotListen, Transport, create_transport
from definition_server.data_plane.warmup import warm_up
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.memory import NotSealedError, map_sealed
from definition_server.ipc.messages import Certificate, Configure, Drain, Keys, MessageError, Publish, Ready
from definition_server.ipc.stats import Slot, StatsPage
from definition_server.observability.logs import configure_logs, get_logger

log = get_logger(__name__)

EXIT_CANNOT_START = 3
"""The port could not be opened, or the master spoke no language this worker knows."""

EXIT_ORPHANED = 4
"""The master was gone and the worker did not manage to leave in order."""

_BEAT_SECONDS = 0.25
_LET_GO_SECONDS = 0.5
"""What calls in flight hold by then is let go by them."""
_EXIT_MARGIN_SECONDS = 5.0


class Worker:
    """The process around one transport."""

    def __init__(
        self, channel: Channel, slot: Slot, config: Configure, listener: socket.socket | None, gate: Gate
    ) -> None:
        self._channel = channel
        self._slot = slot
        self._config = config
        self._listener = listener
        self._gate = gate
        self._keys = KeyRing()
        self._engine = DefinitionEngine()
        self._drain: asyncio.Future[Drain] = asyncio.get_running_loop().create_future()
        self._swapped = asyncio.Event()
        self._coming: Snapshot | None = None
        """The newest that was published and is not served yet."""
        self._published = asyncio.Event()
        self._certificate_replaced = asyncio.Event()

    async def run(self) -> int:
        """Serve until told to leave. Returns the exit code."""
        heart = asyncio.create_task(self._beat())
        try:
            self._receive()
            await warm_up(self._config)
            endpoint = Endpoint(self._engine, self._keys, self._slot)
            transport = create_transport(self._config, endpoint, self._listener, self._gate)
            try:
                await transport.start()
            except CannotListen as error:
                log.critical("Worker cannot start", error=str(error))
                return EXIT_CANNOT_START
            await self._serve(transport)
            await self._leave(transport, self._drain.result())
        finally:
            heart.cancel()
        return 0

    async def _serve(self, transport: Transport) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._receive)
        loop.add_signal_handler(signal.SIGTERM, self._leave_soon, self._departure(announce=True))
        works = (self._report(transport), self._reload(transport), self._take_over(transport))
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await self._drain
        finally:
            loop.remove_reader(self._channel.fileno())
            for task in tasks:
                task.cancel()

    async def _report(self, transport: Transport) -> None:
        """Tell health and the master of every swap, and of the start."""
        while True:
            self._swapped.clear()
            snapshot = self._engine.snapshot
            await transport.set_serving(snapshot is not None)
            try:
                self._channel.send(Ready(0 if snapshot is None else snapshot.generation))
            except ChannelClosed:
                self._leave_soon(self._departure(announce=False))
            await self._swapped.wait()

    async def _reload(self, transport: Transport) -> None:
        """Have the certificate read again whenever it was replaced."""
        while True:
            await self._certificate_replaced.wait()
            self._certificate_replaced.clear()
            await transport.reload_certificate()

    async def _leave(self, transport: Transport, drain: Drain) -> None:
        if drain.announce:
            await transport.set_serving(False)
            await asyncio.sleep(drain.wait_seconds)
        await transport.stop(max(0.0, drain.timeout_seconds - drain.wait_seconds))

    def _receive(self) -> None:
        """Act on every message that waits."""
        try:
            while (received := self._channel.receive()) is not None:
                message, descriptor = received
                if isinstance(message, Keys):
                    self._keys.replace(message.digests)
                elif isinstance(message, Publish) and descriptor is not None:
                    self._open(message, descriptor)
                elif isinstance(message, Certificate):
                    self._certificate_replaced.set()
                elif isinstance(message, Drain):
                    self._leave_soon(message)
                else:
                    log.error("Control message ignored", error=f"unexpected {type(message).__name__}")
        except MessageError as error:
            log.error("Control message ignored", error=str(error))
        except ChannelClosed:
            log.warning("The master is gone; leaving")
            self._leave_soon(self._departure(announce=False))

    def _open(self, message: Publish, descriptor: int) -> None:
        """Have the published snapshot served, or keep the one that is served and say why."""
        try:
            snapshot = Snapshot(map_sealed(descriptor))
            if snapshot.version_hash != message.version_hash:
                raise SnapshotError(f"version {snapshot.version_hash} found, {message.version_hash} announced")
        except (SnapshotError, NotSealedError, OSError) as error:
            log.error("Snapshot refused", generation=message.generation, error=str(error))
            return
        finally:
            os.close(descriptor)
        if self._engine.snapshot is None:  # nothing to prepare for, and clients wait
            self._swap(snapshot)
        else:
            if self._coming is not None:
                _let_go_soon([self._coming])
            self._coming = snapshot
            self._published.set()

    async def _take_over(self, transport: Transport) -> None:
        """Serve what was published, once the transport is prepared for it. What is overtaken meanwhile is left out."""
        while True:
            await self._published.wait()
            self._published.clear()
            snapshot, self._coming = self._coming, None
            if snapshot is None:
                continue
            try:
                await transport.prepare(snapshot)
            except Exception as error:
                log.error("Answers could not be prepared; the first calls may be slow", exc_info=error)
            self._swap(snapshot)
            await transport.tidy()

    def _swap(self, snapshot: Snapshot) -> None:
        # One reference changes; a call that already holds the old snapshot keeps its memory mapped.
        old, self._engine.snapshot = [self._engine.snapshot], snapshot
        self._slot.serve(snapshot.generation, snapshot.count, snapshot.footer.version_hash)
        self._swapped.set()
        _let_go_soon(old)

    def _departure(self, *, announce: bool) -> Drain:
        return Drain(announce, 0.0, self._config.drain_timeout_seconds)

    def _leave_soon(self, drain: Drain) -> None:
        if not self._drain.done():
            self._drain.set_result(drain)

    async def _beat(self) -> None:
        """The heartbeat comes from the loop that serves: where that stands still, so does the heart."""
        while True:
            self._slot.beat(monotonic_ns())
            await asyncio.sleep(_BEAT_SECONDS)


def _let_go_soon(old: list[Snapshot | None]) -> None:
    """Have the last reference to a snapshot, the one in ``old``, dropped in a thread of its own.

    Whoever drops it unmaps it and, where the master has closed its descriptor, frees hundreds of megabytes of pages:
    ten milliseconds and more (measured: 13.5 ms for 200 MB), which no call should wait for. The interpreter lock is not
    held meanwhile.
    """
    # Where no thread is to be had (a limit of processes), the caller's end unmaps it: better late answers than none.
    with suppress(RuntimeError):
        threading.Thread(target=_let_go, args=(old,), name="let-go", daemon=True).start()


def _let_go(old: list[Snapshot | None]) -> None:
    time.sleep(_LET_GO_SECONDS)
    old.clear()


def _leave_at_the_latest(control: int, seconds: float) -> None:
    """End the process ``seconds`` after the master is gone, even if the event loop hangs and never hears of it.

    Such a worker would hold the port for ever, with nobody left to kill it.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(control, 0)  # no event asked for: POLLHUP comes anyway
        poll.poll()
        time.sleep(seconds)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="master-watch", daemon=True).start()


def _configuration(channel: Channel) -> Configure | None:
    """What the master sent before this process existed; None, and said so, where it is something else."""
    received = channel.receive()
    if received is None or not isinstance(received[0], Configure):
        log.critical("Worker cannot start", error=f"no configuration came first, but {received!r}")
        return None
    return received[0]


def _loop_factory(config: Configure) -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop carries the native transport; grpcio brings its own I/O and is tested on asyncio's loop."""
    return uvloop.new_event_loop if config.transport == "native" else asyncio.new_event_loop


def _inherited_listener(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


async def _run(channel: Channel, slot: Slot, config: Configure, listener: socket.socket | None, gate: Gate) -> int:
    return await Worker(channel, slot, config, listener, gate).run()


def main(arguments: list[str]) -> int:
    """Run one worker. Returns the exit code."""
    # A terminal's Ctrl-C reaches the whole process group; the master alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control, stats, number, *listeners = (int(argument) for argument in arguments)
    configure_logs("production", "INFO")
    channel = Channel.inherited(control)
    page = StatsPage(stats)
    os.set_inheritable(stats, False)
    slot = page.slot(number)
    slot.start(os.getpid(), monotonic_ns())
    listener = _inherited_listener(listeners[0]) if listeners else None
    try:
        config = _configuration(channel)
        if config is None:
            return EXIT_CANNOT_START
        configure_logs(config.app_env, config.log_level)
        _leave_at_the_latest(channel.fileno(), config.drain_timeout_seconds + _EXIT_MARGIN_SECONDS)
        gate = Gate(page, number, limit=config.max_connections)
        with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
            return runner.run(_run(channel, slot, config, listener, gate))
    except Exception as error:
        log.critical("Worker failed", exc_info=error)
        return 1
    finally:
        channel.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
