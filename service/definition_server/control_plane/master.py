"""The master process: creates and connects source, sync cycle, publisher and supervisor, and handles signals.

Signals: SIGTERM, SIGINT and SIGQUIT drain and exit 0; a second one cuts the drain short. SIGHUP reads secrets and
certificates from their files again and syncs at once. SIGUSR2 replaces the workers. Handlers only set events or start
tasks, which do the work. A signal that arrives during the start is recorded, and acted on as soon as the master runs.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from definition_server import __version__
from definition_server.catalog.gate import Gate
from definition_server.catalog.guard import Thresholds
from definition_server.catalog.signing import Signer
from definition_server.control_plane.admin import AdminServer
from definition_server.control_plane.background import Background
from definition_server.control_plane.certificates import earliest_expiry
from definition_server.control_plane.checker import Checker
from definition_server.control_plane.confinement import confine_master
from definition_server.control_plane.descriptors import DescriptorReserve, too_few
from definition_server.control_plane.history import History
from definition_server.control_plane.key_usage import KeyUsage
from definition_server.control_plane.listener import (
    WANTED_DESCRIPTORS,
    PortInUse,
    listen,
    raise_descriptor_limit,
    reserve_port,
)
from definition_server.control_plane.loop_watch import LoopWatch
from definition_server.control_plane.operator_access import OperatorAccess
from definition_server.control_plane.orphans import reap_orphans
from definition_server.control_plane.postgres import PostgresSource, url_fault
from definition_server.control_plane.process_limits import raise_process_limits
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publication_policy import PublicationPolicy
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.reload import Reloadable, Reloader
from definition_server.control_plane.row_gate import RowGate
from definition_server.control_plane.source import ReadLimits
from definition_server.control_plane.start_notices import log_notices
from definition_server.control_plane.status import StatusReader
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.supervisor import TICK_SECONDS, Supervisor
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_loop import SyncLoop
from definition_server.control_plane.tls_reader import read_tls_files
from definition_server.control_plane.wishes import Policy, WishesFile
from definition_server.control_plane.worker_config import worker_config
from definition_server.environment import EX_CONFIG, SettingsError
from definition_server.inherited import MASTERS, early_signals
from definition_server.ipc.messages import CallsSampled
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import configure_logs, flush_logs, get_logger
from definition_server.observability.status import DatabaseStatus
from definition_server.settings import Settings
from grpc_h2 import ENGINE

if TYPE_CHECKING:
    from definition_server.control_plane.telemetry import Telemetry

log = get_logger(__name__)

EX_UNAVAILABLE = 69
"""The exit code if a port is taken (EX_UNAVAILABLE in sysexits.h)."""

_ANNOUNCE_SECONDS = 0.01
_POLICY_SECONDS = 1.0
"""Seconds for which a start waits for the policy file, which may be on a disk that hangs."""
_CONTROL_SECONDS = 2.0
"""The control socket opens after this time even if the workers do not serve yet."""
_EXIT_MARGIN_SECONDS = 5.0
_RANDOM = "/dev/urandom"
_DEMONSTRATION_DESCRIPTORS = 1024
"""The limit that every Linux grants by default."""


_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


def run_master(settings: Settings, *, demonstration: bool = False) -> int:
    """Serve until a signal stops the server.

    Args:
        settings: The valid settings.
        demonstration: Whether the server is a demonstration that ends with its terminal. Then SIGHUP stops it, and
            there are no warnings about the needs of production (a signing key, thousands of open files).

    Returns:
        The exit code: 0 if a signal stopped the server (even before the start), 1 after a bug, 69 if a port is taken,
        78 if the kernel lacks a feature that ``JAIL`` requires or a limit of the process is too low.
    """
    early_signals.install()
    configure_logs(settings.app_env, settings.log_level)
    stopping = _STOPPING | {signal.SIGHUP} if demonstration else _STOPPING
    for number in early_signals.received:
        if number in stopping:
            log.info("Stopping", signal=number.name)
            log.info("Stopped")
            return 0
    if not confine_master(settings.jail):
        return EX_CONFIG
    log_notices(settings, lasting=not demonstration)
    wanted = _DEMONSTRATION_DESCRIPTORS if demonstration else WANTED_DESCRIPTORS
    problem = (
        too_few(raise_descriptor_limit(wanted), settings.workers)
        or raise_process_limits(settings.workers)
        or _missing_device(settings.transport)
    )
    if problem is not None:
        log.critical("Cannot start", error=problem)
        return EX_CONFIG
    try:
        tls = read_tls_files(settings)
    except SettingsError as error:
        log.critical("Cannot start", error=str(error))
        return EX_CONFIG
    try:
        holder = (listen if settings.transport == "native" else reserve_port)(settings.host, settings.port)
    except PortInUse as error:
        log.critical("Cannot start", error=str(error))
        return EX_UNAVAILABLE
    with holder:
        try:
            master = _Master(settings, holder, tls, hangup_stops=demonstration)
        except PortInUse as error:
            log.critical("Cannot start", error=str(error))
            return EX_UNAVAILABLE
        return asyncio.run(master.run())


def _missing_device(transport: str) -> str | None:
    """The reason why ``transport`` cannot start on this machine; None if it can."""
    if transport == "grpcio" and not os.access(_RANDOM, os.R_OK):
        return f"TRANSPORT=grpcio cannot run without {_RANDOM}: mount a /dev that has it, or set TRANSPORT=native"
    return None


class _Master:
    """The parts of the master, connected."""

    def __init__(self, settings: Settings, holder: socket.socket, tls: TlsFiles | None, *, hangup_stops: bool) -> None:
        """Opens the metrics port, but starts nothing yet. ``holder`` has the gRPC port.

        Raises:
            PortInUse: if the metrics port cannot be opened.
        """
        self._settings = settings
        self._hangup_stops = hangup_stops
        self._port = int(holder.getsockname()[1])
        self._holder = holder
        self._started = time.monotonic()
        self._loop_watch = LoopWatch()
        self._stop = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._reserve = DescriptorReserve()
        self._publisher = Publisher()
        self._source = _source(settings)
        background = Background()
        self._gate = RowGate(
            Gate(settings.gate_code, settings.gate_interface),
            Checker(settings.jail),
            patient=Checker(settings.jail, patient=True),
            background=background,
        )
        self._policy = self._make_policy()
        self._synchronizer = self._make_synchronizer(background)
        self._proof = self._synchronizer.observer = Proof(
            self._synchronizer.state,
            interval=settings.sync_interval_seconds,
            stores=settings.snapshot_dir is not None,
        )
        self._gate.on_bad_rows_served(self._read_again)
        self._sync_loop = SyncLoop(
            self._synchronizer,
            self._publisher,
            interval=settings.sync_interval_seconds,
            patience=settings.connect_timeout_seconds,
            lend=self._reserve.lent,
        )
        self._reloader = Reloader(settings, {"DATABASE_URL": url_fault}, tls)
        self._key_usage = KeyUsage(settings.keys_by_id())
        self._certificates_expire = _expiries(tls)
        self._supervisor = self._make_supervisor(tls)
        self._status = self._make_status_reader()
        self._telemetry = self._make_telemetry()
        self._operators = self._make_operator_access()
        self._admin = AdminServer(
            settings.metrics_host or settings.host,
            settings.metrics_port,
            read=self._status.read,
            alive=self._loop_watch.problem,
        )

    def _make_policy(self) -> PublicationPolicy | None:
        path = self._settings.publication_policy
        return None if path is None else PublicationPolicy(path, lambda: self._spawn(self._follow_policy))

    def _make_synchronizer(self, background: Background) -> Synchronizer:
        settings = self._settings
        return Synchronizer(
            self._source,
            self._publisher,
            signer=_signer(settings),
            store=None if (directory := settings.snapshot_dir) is None else SnapshotStore(directory),
            history=None if directory is None else History(directory, settings.history_snapshots),
            wishes=None if directory is None else WishesFile(directory),
            limits=Thresholds(
                removed_percent=settings.guard_max_removed_percent,
                growth_percent=settings.guard_max_growth_percent,
                held_percent=settings.guard_max_held_percent,
                changed_percent=settings.guard_max_changed_percent,
            ),
            gate=self._gate,
            allow_empty=settings.allow_empty_catalog,
            background=background,
            policy=lambda: Policy() if self._policy is None else self._policy.current,
            full_read_interval=settings.full_read_interval_seconds,
        )

    def _make_supervisor(self, tls: TlsFiles | None) -> Supervisor:
        settings = self._settings
        return Supervisor(
            worker_config(settings, self._port),
            self._publisher,
            self._key_usage.message,
            tls,
            workers=settings.workers,
            heartbeat_timeout=settings.heartbeat_timeout_seconds,
            start_timeout=settings.start_timeout_seconds,
            listener=self._holder if settings.transport == "native" else None,
            on_keys_used=self._key_usage.used,
            on_calls_sampled=self._on_calls_sampled,
            propagation=self._proof.propagation,
            lend=self._reserve.lent,
        )

    def _make_status_reader(self) -> StatusReader:
        return StatusReader(
            self._publisher,
            self._synchronizer.state,
            self._supervisor,
            self._proof,
            engine=_engine(self._settings),
            keys=self._key_usage.last_used,
            certificates=lambda: self._certificates_expire,
            control_socket=lambda: self._operators.state,
            database=lambda: _database(self._source),
            held_commands=lambda: self._gate.held,
            history=lambda: self._synchronizer.catalogue.disk.entries,
        )

    def _make_operator_access(self) -> OperatorAccess:
        return OperatorAccess(
            self._settings,
            self._synchronizer,
            self._sync_loop,
            self._publisher,
            self._supervisor,
            policy=self._policy,
            signer=lambda: _signer(self._reloader.settings),
            status=self._status.read,
            held_commands=lambda: self._gate.held,
        )

    def _make_telemetry(self) -> Telemetry | None:
        settings = self._settings
        if settings.otlp_endpoints == (None, None):
            return None
        from definition_server.control_plane.telemetry import create_telemetry  # imported only if it is needed

        return create_telemetry(settings, self._status.read)

    def _on_calls_sampled(self, worker: int, calls: CallsSampled) -> None:
        if self._telemetry is not None:
            self._telemetry.calls_sampled(worker, calls)

    async def run(self) -> int:
        """Start everything, wait for a signal, stop everything. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in MASTERS:
            loop.add_signal_handler(number, self._on_signal, number)
        for number in early_signals.take():
            loop.call_soon(self._on_signal, number)
        self._log_start()
        self._admin.start()
        self._supervisor.start()
        if self._policy is not None:
            # This must precede the first catalogue, so that a pin is in effect from the start.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._policy.read(at_once=True), _POLICY_SECONDS)
        forever = [asyncio.create_task(work) for work in self._forever()]
        stopped = asyncio.create_task(self._stop.wait())
        ended, _ = await asyncio.wait((stopped, *forever), return_when=asyncio.FIRST_COMPLETED)
        code = 0
        for task in ended - {stopped}:
            # None of these tasks returns by itself, so one that has ended failed because of a bug of ours. Drain, and
            # exit with the code for a bug.
            log.critical("The master failed; leaving", exc_info=task.exception())
            code = 1
        _exit_at_the_latest(self._settings.drain_timeout_seconds + _EXIT_MARGIN_SECONDS, code)
        await self._leave(forever)
        return code

    def _log_start(self) -> None:
        settings = self._settings
        log.info(
            "Starting",
            version=__version__,
            address=f"[{settings.host}]:{self._port}" if ":" in settings.host else f"{settings.host}:{self._port}",
            metrics_port=self._admin.port,
            workers=settings.workers,
            transport=settings.transport,
            engine=_engine(settings),
            signed=settings.avap_internal_key is not None,
            database="" if (database := self._source.address) is None else str(database),
            role="" if database is None else database.role,
        )

    def _forever(self) -> Iterator[Coroutine[Any, Any, None]]:
        """The tasks of the master until it stops. The sync loop comes first."""
        yield self._sync_loop.run()
        yield self._supervisor.watch()
        yield self._loop_watch.run()
        yield self._announce()
        yield self._prove()
        if self._operators.offered:
            yield self._serve_operators()
        if self._telemetry is not None:
            yield self._export(self._telemetry)
        if self._policy is not None:
            yield self._policy.run()
        if os.getpid() == 1:
            yield reap_orphans()

    async def _leave(self, forever: list[asyncio.Task[None]]) -> None:
        settings = self._settings
        self._status.stopping = True
        self._reserve.close()
        log.info(
            "Draining",
            wait_seconds=settings.drain_wait_seconds,
            timeout_seconds=settings.drain_timeout_seconds,
        )
        # From now on the port is open only while a worker has it open.
        self._holder.close()
        forever[0].cancel()
        await self._supervisor.drain(wait=settings.drain_wait_seconds, timeout=settings.drain_timeout_seconds)
        for task in (*forever, *self._background):
            task.cancel()
        await asyncio.gather(*forever, *self._background, return_exceptions=True)
        await self._gate.close()
        await self._operators.close()
        if self._telemetry is not None:
            await self._telemetry.stop()
        self._synchronizer.close()
        await self._source.close()
        self._admin.close()
        self._publisher.close()
        log.info("Stopped")

    def _on_signal(self, number: signal.Signals) -> None:
        if number == signal.SIGUSR2:
            self._spawn(self._roll)
        elif number == signal.SIGHUP and not self._hangup_stops:
            self._spawn(self._reload)
        else:
            self._on_stop(number)

    def _on_stop(self, number: signal.Signals) -> None:
        if self._stop.is_set():
            log.warning("Second signal: calls in flight are cut", signal=signal.Signals(number).name)
            self._supervisor.cut_short()
        else:
            log.info("Stopping", signal=signal.Signals(number).name)
            self._stop.set()

    def _spawn(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``work`` in a task. A reference to the task is kept until it ends."""
        task = asyncio.create_task(work())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _roll(self) -> None:
        await self._supervisor.roll()

    def _read_again(self) -> None:
        """Read the table again, because rows that are served were found bad: the next publication does not serve these
        rows.
        """
        self._synchronizer.read_again()
        self._sync_loop.sync_soon()

    async def _reload(self) -> None:
        """Read the secrets again from their files, which may have been rotated, and run a sync cycle at once."""
        with self._reserve.lent():
            await self._reloader.read_again(self._apply)
        log.info("Syncing at once")
        self._sync_loop.sync_soon()

    async def _apply(self, what: Reloadable, settings: Settings) -> None:
        """Use the part of ``settings`` that was read again."""
        if what is Reloadable.DATABASE_URL:
            await self._source.use_url(settings.database_url.get_secret_value())
        elif what is Reloadable.SIGNING_KEY:
            self._synchronizer.use_signer(_signer(settings))
        elif what is Reloadable.API_KEYS:
            self._key_usage.replace(settings.keys_by_id())
            self._supervisor.use_keys(self._key_usage.message)
        elif (tls := self._reloader.tls) is not None:
            self._certificates_expire = _expiries(tls)
            self._supervisor.use_certificate(tls)

    async def _serve_operators(self) -> None:
        """Serve the operator's commands. Begins once the workers serve, so that the imports do not delay the workers.

        Never returns.
        """
        await self._workers_serve()
        await self._operators.run()

    async def _export(self, telemetry: Telemetry) -> None:
        """Export traces and metrics. This begins once the workers serve, so that its imports do not delay the workers.
        Never returns.
        """
        await self._workers_serve()
        telemetry.start()
        await asyncio.Event().wait()

    async def _workers_serve(self) -> None:
        """Wait until every worker serves, for a limited time."""
        deadline = time.monotonic() + _CONTROL_SECONDS
        while self._supervisor.serving < self._settings.workers:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_ANNOUNCE_SECONDS)

    async def _follow_policy(self) -> None:
        """Make the wishes in the present policy file take effect."""
        catalogue, started = self._synchronizer.catalogue, time.monotonic()
        if catalogue.served is not None:
            await catalogue.follow()
            await catalogue.release(lambda: time.monotonic() - started)

    async def _announce(self) -> None:
        """Log once that every worker serves. Never returns."""
        while self._supervisor.serving < self._settings.workers:  # noqa: ASYNC110 - a level, not an edge
            await asyncio.sleep(_ANNOUNCE_SECONDS)
        log.info("Serving", seconds=round(time.monotonic() - self._started, 3), workers=self._settings.workers)
        await asyncio.Event().wait()

    async def _prove(self) -> None:
        """Judge the freshness of the served catalogue, and send it to the workers. Never returns."""
        while True:
            fresh = self._proof.tick(
                published=self._publisher.current is not None, serving=self._supervisor.serving > 0
            )
            self._supervisor.report_freshness(fresh)
            await asyncio.sleep(TICK_SECONDS)


def _exit_at_the_latest(seconds: float, code: int) -> None:
    """End the process with ``code`` after ``seconds``, because a thread may hang for ever on a disk or a resolver."""

    def end() -> None:
        log.warning("A thread did not end in time; leaving without it")
        flush_logs()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _source(settings: Settings) -> PostgresSource:
    return PostgresSource(
        settings.database_url.get_secret_value(),
        connect_timeout=settings.connect_timeout_seconds,
        statement_timeout=settings.statement_timeout_seconds,
        limits=ReadLimits(settings.max_definition_bytes, settings.max_catalog_bytes),
    )


def _database(source: PostgresSource) -> DatabaseStatus | None:
    address = source.address
    return None if address is None else DatabaseStatus(address.hosts, address.name, address.role, source.connected_to)


def _engine(settings: Settings) -> str:
    """See `ServiceStatus.engine`."""
    return ENGINE if settings.transport == "native" else "grpcio"


def _signer(settings: Settings) -> Signer | None:
    key, before = settings.avap_internal_key, settings.avap_internal_key_previous
    if key is None:
        return None
    previous = None if before is None else Signer(before.get_secret_value(), settings.package_version)
    return Signer(key.get_secret_value(), settings.package_version, previous=previous)


def _expiries(tls: TlsFiles | None) -> dict[str, float]:
    files = {} if tls is None else {"server": tls.certificate, "client_authorities": tls.client_authorities}
    found = {name: earliest_expiry(Path(path)) for name, path in files.items() if path is not None}
    return {name: expiry for name, expiry in found.items() if expiry is not None}
