"""One worker process: ``python -m definition_server.data_plane.worker CONTROL_FD STATS_FD [LISTENER_FD]``.

The master starts it with a control socket, a stats page of its own and, for a transport that can use it, the listening
socket. All other input arrives over the control socket. A worker receives its configuration, confines itself
(`confine`), warms up, opens the port, reports READY and serves, and swaps snapshots as they are published. It drains
and exits with 0 when the master sends `Drain` or is gone. Signals do not make it drain.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from time import monotonic_ns
from typing import TYPE_CHECKING

import uvloop

from definition_server.catalog.layout import SnapshotError
from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.allocator import CHECK_SECONDS, FreedMemory, freed_memory
from definition_server.data_plane.authentication import KeyRing
from definition_server.data_plane.balance import Balancer
from definition_server.data_plane.confine import CannotConfine, Confinement
from definition_server.data_plane.endpoint import Endpoint
from definition_server.data_plane.services import DefinitionEngine
from definition_server.data_plane.swap import Swap
from definition_server.data_plane.transports import CannotListen, Transport, create_transport
from definition_server.data_plane.warmup import WarmUp
from definition_server.inherited import leave_signals_to_the_master, reserve_standard_descriptors
from definition_server.ipc import messages
from definition_server.ipc.channel import Channel, ChannelClosed
from definition_server.ipc.handover import RELEASE_SECONDS
from definition_server.ipc.memory import NotSealedError, map_sealed
from definition_server.ipc.stats import Slot, map_own, map_peer
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import configure_logs, dropped_lines, get_logger, release_logs

if TYPE_CHECKING:
    from definition_server.data_plane.call_sampling import CallSampling

log = get_logger(__name__)

EXIT_CANNOT_START = 3
"""The exit code if the port could not be opened, or if the first message of the master was not the configuration."""

EXIT_ORPHANED = 4
"""The exit code if the master was gone and the worker did not drain in time."""

_BEAT_SECONDS = 0.25
_EXIT_MARGIN_SECONDS = 5.0

_KEYS_REPORT_SECONDS = 1.0
_CALLS_REPORT_SECONDS = 1.0
_KEYS_SEEN_AGAIN_SECONDS = 10.0
_CONNECTIONS_PER_SECOND = 100
"""The use of a key is noted when a call is authorized. The native transport remembers the authorization of each
connection, so that calls need no check. It drops these authorizations at the interval above, or at a longer interval if
there are more connections than this number times the interval. Each connection then decodes one header block again,
which takes some 50 µs."""


class Worker:
    """The process around one transport."""

    def __init__(
        self,
        channel: Channel,
        slot: Slot,
        config: messages.Configure,
        listener: socket.socket | None,
        balancer: Balancer,
        confinement: Confinement,
        warm_up: WarmUp,
        freed: FreedMemory | None,
        tls: TlsFiles | None,
        sampled: CallSampling | None,
    ) -> None:
        self._sampled = sampled
        """The object on which calls are counted in place of the slot, if calls are sampled."""
        self._freed = freed
        self._tls = tls
        """TLS files that were received and are not loaded yet."""
        self._confinement = confinement
        self._warm_up = warm_up
        self._channel = channel
        self._slot = slot
        self._config = config
        self._listener = listener
        self._balancer = balancer
        self._keys = KeyRing()
        self._engine = DefinitionEngine(names_version=config.version_metadata)
        self._drain: asyncio.Future[messages.Drain] = asyncio.get_running_loop().create_future()
        self._begin_swap: Callable[[Snapshot], Swap] = partial(Swap, self._engine)
        """Begins a swap: the method of the transport, once there is a transport."""
        self._status_changed = asyncio.Event()
        """Set when another snapshot is served, so that this is reported to health and to the master."""
        self._coming: Snapshot | None = None
        """The newest snapshot that was published and is not served yet."""
        self._published = asyncio.Event()
        self._certificate_replaced = asyncio.Event()
        self._fresh = False
        self._freshness_changed = asyncio.Event()

    async def run(self) -> int:
        """Serve until the drain is over. Returns the exit code."""
        heartbeat = asyncio.create_task(self._beat())
        try:
            self._receive()
            await self._warm_up.run()
            endpoint = Endpoint(self._engine, self._keys, self._slot if self._sampled is None else self._sampled)
            transport = create_transport(self._config, endpoint, self._listener, self._balancer)
            self._begin_swap = transport.begin_swap
            self._receive()  # the pages of the other workers, before the first connection is accepted
            try:
                with self._take_tls() or nullcontext() as tls:
                    await transport.start(tls)
                self._confinement.start_is_over()
            except CannotListen as error:
                log.critical("Worker cannot start", error=str(error))
                return EXIT_CANNOT_START
            await self._serve(transport)
            await self._leave(transport, self._drain.result())
        finally:
            heartbeat.cancel()
        return 0

    async def _serve(self, transport: Transport) -> None:
        loop = asyncio.get_running_loop()
        loop.add_reader(self._channel.fileno(), self._receive)
        works = (
            self._report(transport),
            self._replace_certificate(transport),
            self._report_freshness(transport),
            self._swap_published(),
            self._report_keys(),
            self._report_calls(),
            self._return_memory(),
        )
        tasks = [asyncio.create_task(work) for work in works]
        try:
            await self._drain
        finally:
            loop.remove_reader(self._channel.fileno())
            for task in tasks:
                task.cancel()

    async def _report(self, transport: Transport) -> None:
        """Report the start and every swap to health and to the master."""
        while True:
            self._status_changed.clear()
            snapshot = self._engine.snapshot
            await transport.set_serving(snapshot is not None)
            try:
                self._channel.send(
                    messages.Ready(0 if snapshot is None else snapshot.generation, self._confinement.extent)
                )
            except ChannelClosed:
                self._leave_soon(self._departure(announce=False))
            await self._status_changed.wait()

    async def _report_freshness(self, transport: Transport) -> None:
        """Report to health whether the served catalogue is up to date, according to the master."""
        while True:
            await self._freshness_changed.wait()
            self._freshness_changed.clear()
            await transport.set_fresh(self._fresh)

    async def _replace_certificate(self, transport: Transport) -> None:
        """Make the transport use each new certificate."""
        while True:
            await self._certificate_replaced.wait()
            self._certificate_replaced.clear()
            tls = self._take_tls()
            if tls is not None:
                with tls:
                    await transport.replace_certificate(tls)

    def _take_tls(self) -> TlsFiles | None:
        """The newest TLS files that are not loaded yet. The caller closes them."""
        tls, self._tls = self._tls, None
        return tls

    async def _leave(self, transport: Transport, drain: messages.Drain) -> None:
        if drain.announce:
            await transport.set_serving(False)
            await asyncio.sleep(drain.wait_seconds)
        await transport.stop(max(0.0, drain.timeout_seconds - drain.wait_seconds))

    def _receive(self) -> None:
        """Act on every waiting message."""
        try:
            while (received := self._channel.receive()) is not None:
                self._act_on(*received)
        except messages.MessageError as error:
            log.error("Control message ignored", error=str(error))
        except ChannelClosed:
            log.warning("The master is gone; leaving")
            self._leave_soon(self._departure(announce=False))

    def _act_on(self, message: messages.Message, descriptors: tuple[int, ...]) -> None:
        """Act on one message. Its ``descriptors`` are closed."""
        match message, descriptors:
            case messages.Keys(), ():
                self._keys.replace(message.digests)
            case messages.Freshness(), ():
                self._fresh = message.fresh
                self._freshness_changed.set()
            case messages.Publish(), (descriptor,):
                self._open(message, descriptor)
            case messages.Certificate(), (_, _, *_):
                self._keep_tls(descriptors)
            case messages.Peer(), (descriptor,):
                self._add_peer(message.number, descriptor)
            case messages.PeerGone(), ():
                self._balancer.remove(message.number)
            case messages.Drain(), ():
                self._leave_soon(message)
            case _:
                for descriptor in descriptors:
                    os.close(descriptor)
                shown = f"unexpected {type(message).__name__} with {len(descriptors)} descriptors"
                log.error("Control message ignored", error=shown)

    def _keep_tls(self, descriptors: tuple[int, ...]) -> None:
        try:
            coming = TlsFiles(descriptors)
        except NotSealedError as error:
            log.error("Control message ignored", error=str(error))
            return
        if overtaken := self._take_tls():
            overtaken.close()
        self._tls = coming
        self._certificate_replaced.set()

    def _add_peer(self, number: int, descriptor: int) -> None:
        try:
            self._balancer.add(number, map_peer(descriptor))
        except (OSError, ValueError) as error:  # the message has one effect: connections are left to fewer workers
            log.error("Control message ignored", error=f"a peer's page: {error}")

    def _open(self, message: messages.Publish, descriptor: int) -> None:
        """Have the published snapshot served, or log the reason why it is refused."""
        try:
            snapshot = Snapshot(map_sealed(descriptor))
            if snapshot.version_hash != message.version_hash:
                raise SnapshotError(f"version {snapshot.version_hash} found, {message.version_hash} announced")
        except (SnapshotError, NotSealedError, OSError) as error:
            log.error("Snapshot refused", generation=message.generation, error=str(error))
            return
        finally:
            os.close(descriptor)
        if self._engine.snapshot is None:  # no answers are remembered yet, and clients wait
            self._commit(self._begin_swap(snapshot))
            return
        if self._coming is not None:
            _release_soon([self._coming])
        self._coming = snapshot
        self._published.set()

    async def _swap_published(self) -> None:
        """Swap to each published snapshot. A snapshot that is replaced by a newer one while it waits is skipped."""
        while True:
            await self._published.wait()
            self._published.clear()
            snapshot, self._coming = self._coming, None
            if snapshot is None:
                continue
            swap = self._begin_swap(snapshot)
            try:
                await swap.prepare()
            except Exception as error:
                log.error("Answers could not be prepared; the first calls may be slow", exc_info=error)
            self._commit(swap)
            await swap.release()

    def _commit(self, swap: Swap) -> None:
        """Serve ``swap``'s snapshot from now on, report this, and release the previous snapshot."""
        # A call that already holds the old snapshot keeps its memory mapped.
        replaced = [swap.commit()]
        footer = swap.snapshot.footer
        self._slot.serve(footer.generation, footer.count, footer.version_hash)
        self._status_changed.set()
        _release_soon(replaced)

    def _departure(self, *, announce: bool) -> messages.Drain:
        return messages.Drain(announce, 0.0, self._config.drain_timeout_seconds)

    def _leave_soon(self, drain: messages.Drain) -> None:
        if not self._drain.done():
            self._drain.set_result(drain)

    async def _report_keys(self) -> None:
        """Report the keys that are in use to the master, at most once a second."""
        seen_again = time.monotonic()
        while True:
            await asyncio.sleep(_KEYS_REPORT_SECONDS)
            now = time.monotonic()
            if now - seen_again > max(_KEYS_SEEN_AGAIN_SECONDS, self._slot.load()[1] / _CONNECTIONS_PER_SECOND):
                seen_again = now
                self._keys.authorize_again()
            used = self._keys.take_used()
            if used:
                with suppress(ChannelClosed):  # the reader of the channel also notices it
                    self._channel.send(messages.KeysUsed(used))

    async def _report_calls(self) -> None:
        """Report the calls that were sampled to the master, at most once a second."""
        while self._sampled is not None:
            await asyncio.sleep(_CALLS_REPORT_SECONDS)
            calls = self._sampled.take()
            if calls is not None:
                with suppress(ChannelClosed):  # the reader of the channel also notices it
                    self._channel.send(calls)

    async def _return_memory(self) -> None:
        """Return freed memory to the kernel if there is much of it: see `allocator`."""
        while self._freed is not None:
            self._freed.check(time.monotonic(), time.process_time())
            await asyncio.sleep(CHECK_SECONDS)

    async def _beat(self) -> None:
        """Write the heartbeat. It comes from the loop that serves calls, so it stops if that loop hangs."""
        while True:
            self._slot.beat(monotonic_ns())
            self._slot.lines_dropped(dropped_lines())
            self._balancer.note_heartbeats()
            await asyncio.sleep(_BEAT_SECONDS)


def _release_soon(replaced: list[Snapshot | None]) -> None:
    """Release the snapshot in ``replaced``, which holds the last reference to it, in a thread of its own.

    Releasing it unmaps its memory. If the master has closed its descriptor, this frees hundreds of megabytes of pages,
    which takes ten milliseconds and more (measured: 13.5 ms for 200 MB). No call should wait for the release. The
    interpreter lock is not held during the release.
    """
    # If no thread can be started (a limit of processes), the memory is released when the caller returns. Calls then
    # wait for the release, which is better than a failure.
    with suppress(RuntimeError):
        threading.Thread(target=_release, args=(replaced,), name="snapshot-release", daemon=True).start()


def _release(replaced: list[Snapshot | None]) -> None:
    time.sleep(RELEASE_SECONDS)
    replaced.clear()


def _leave_at_the_latest(control: int, seconds: float) -> None:
    """End the process ``seconds`` after the master is gone, even if the event loop hangs and does not notice.

    Such a worker would hold the port for ever, and no process would be left to kill it.
    """

    def watch() -> None:
        poll = select.poll()
        poll.register(control, 0)  # no event is requested, because POLLHUP is always reported
        poll.poll()
        time.sleep(seconds)
        os._exit(EXIT_ORPHANED)

    threading.Thread(target=watch, name="master-watch", daemon=True).start()


def _configuration(channel: Channel) -> tuple[messages.Configure, TlsFiles | None] | None:
    """The configuration that the master sent before this process existed, and the TLS files that came with it. If there
    is none, this is logged, and the result is None.
    """
    try:
        received = channel.receive()
        if received is not None and isinstance(received[0], messages.Configure):
            return received[0], TlsFiles(received[1]) if received[1] else None
    except (messages.MessageError, NotSealedError) as error:
        log.critical("Worker cannot start", error=str(error))
        return None
    log.critical("Worker cannot start", error=f"no configuration came first, but {received!r}")
    return None


def _loop_factory(config: messages.Configure) -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop for the native transport. grpcio does its own I/O, and is tested on asyncio's loop."""
    return uvloop.new_event_loop if config.transport == "native" else asyncio.new_event_loop


def _inherited_listener(descriptor: int) -> socket.socket:
    os.set_inheritable(descriptor, False)
    return socket.socket(fileno=descriptor)


async def _run(make: Callable[[], Worker]) -> int:
    """Run the worker that ``make`` returns. It is made here because its futures belong to the running loop."""
    return await make().run()


def _sampling(slot: Slot, config: messages.Configure) -> CallSampling | None:
    if not config.trace_one_call_in:
        return None
    from definition_server.data_plane.call_sampling import CallSampling  # imported only if it is needed

    return CallSampling(slot, config.trace_one_call_in)


def main(arguments: list[str]) -> int:
    """Run one worker. Returns the exit code."""
    reserve_standard_descriptors()
    leave_signals_to_the_master()
    control, stats, *listeners = (int(argument) for argument in arguments)
    # Log lines are held back until the process is confined, because a thread writes them.
    configure_logs("production", "INFO", hold=True)
    channel = Channel.inherited(control)
    slot = map_own(stats)
    slot.start(os.getpid(), monotonic_ns())
    listener = _inherited_listener(listeners[0]) if listeners else None
    try:
        configuration = _configuration(channel)
        if configuration is None:
            return EXIT_CANNOT_START
        config, tls = configuration
        channel.send(messages.Mapped())
        configure_logs(config.app_env, config.log_level)
        # The order matters: first all files and sockets are opened, then the process is confined, then threads and the
        # event loop start.
        warm_up, freed, sampled = WarmUp(config), freed_memory(), _sampling(slot, config)
        confinement = Confinement(config, tls=tls is not None)
        confinement.enter()
        release_logs()
        _leave_at_the_latest(channel.fileno(), config.drain_timeout_seconds + _EXIT_MARGIN_SECONDS)
        balancer = Balancer(slot, limit=config.max_connections)
        with asyncio.Runner(loop_factory=_loop_factory(config)) as runner:
            return runner.run(
                _run(
                    lambda: Worker(channel, slot, config, listener, balancer, confinement, warm_up, freed, tls, sampled)
                )
            )
    except CannotConfine as error:
        log.critical("Worker cannot start", error=str(error))
        return EXIT_CANNOT_START
    except Exception as error:
        log.critical("Worker failed", exc_info=error)
        return 1
    finally:
        channel.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
