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
from collections.abc import Callable, Coroutine, Mapping
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
from definition_server.control_plane.control_server import ControlServer
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
from definition_server.control_plane.orphans import reap_orphans
from definition_server.control_plane.postgres import PostgresSource, url_fault
from definition_server.control_plane.process_limits import raise_process_limits
from definition_server.control_plane.proof import Proof
from definition_server.control_plane.publication_policy import PublicationPolicy
from definition_server.control_plane.publications import Publications
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.reload import Reloadable, Reloader
from definition_server.control_plane.row_gate import RowGate
from definition_server.control_plane.source import ReadLimits
from definition_server.control_plane.status import StatusReader
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.supervisor import TICK_SECONDS, Supervisor
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_loop import SyncLoop
from definition_server.control_plane.tls_reader import read_tls_files
from definition_server.control_plane.wishes import Policy, WishesFile
from definition_server.environment import EX_CONFIG, SettingsError, notices
from definition_server.inherited import MASTERS, early_signals
from definition_server.ipc.messages import CallsSampled, Configure
from definition_server.ipc.tls_files import TlsFiles
from definition_server.observability.logs import configure_logs, flush_logs, get_logger
from definition_server.observability.status import DatabaseStatus
from definition_server.settings import Settings
from grpc_h2 import MethodHandler

if TYPE_CHECKING:
    from definition_server.control_plane.telemetry import Telemetry

log = get_logger(__name__)

EX_UNAVAILABLE = 69
"""Exit code where a port is taken (sysexits.h EX_UNAVAILABLE)."""

_LOOP_STUCK_SECONDS = 30.0
_ANNOUNCE_SECONDS = 0.01
_POLICY_SECONDS = 1.0
"""How long a start waits for the policy file: it may be on a disk that hangs."""
_CONTROL_SECONDS = 2.0
"""The control socket opens after this time, whether the workers serve or not."""
_EXIT_MARGIN_SECONDS = 5.0
_DEMONSTRATION_DESCRIPTORS = 1024
"""What every Linux grants by default."""


_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


def run_master(settings: Settings, *, demonstration: bool = False) -> int:
    """Serve until a signal stops the server.

    Args:
        settings: The valid settings.
        demonstration: For a program that lives no longer than its terminal: SIGHUP stops the server, and what only a
            server for others needs (a key to sign with, thousands of open files) is not warned of.

    Returns:
        The exit code: 0 (also where a signal asked for the end before the start), 1 after a bug, 69 where a port is
        taken, 78 where ``JAIL`` requires what the kernel lacks, or a limit of the process is too low.
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
    _log_notices(settings, lasting=not demonstration)
    wanted = _DEMONSTRATION_DESCRIPTORS if demonstration else WANTED_DESCRIPTORS
    problem = too_few(raise_descriptor_limit(wanted), settings.workers) or raise_process_limits()
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


_NOT_STORED = "a start needs the database, there is no history to pin a version of, and a pin ends with the server"


def _log_notices(settings: Settings, *, lasting: bool) -> None:
    """Log once what is allowed, and probably not meant; with ``lasting``, also what a server for others needs."""
    for notice in notices(Settings):
        log.warning("A variable of the environment may not be meant so", variable=notice.variable, reason=notice.text)
    if lasting and settings.avap_internal_key is None:
        log.warning(
            "Code is served unsigned: AVAP_INTERNAL_KEY is not set",
            effect='the AVAP language server accepts no command at all; it reports a "wrong magic number"',
            remedy="set AVAP_INTERNAL_KEY to the key that language servers verify with",
        )
    if lasting and settings.snapshot_dir is None:
        log.warning(
            "Nothing is stored: SNAPSHOT_DIR is not set",
            effect=_NOT_STORED,
            remedy="set SNAPSHOT_DIR to a directory that outlives a restart",
        )


class _Master:
    """The parts of the master, connected."""

    def __init__(self, settings: Settings, holder: socket.socket, tls: TlsFiles | None, *, hangup_stops: bool) -> None:
        """Opens the metrics port, and starts nothing yet. ``holder`` has the gRPC port.

        Raises:
            PortInUse: where the metrics port cannot be opened.
        """
        self._settings = settings
        self._hangup_stops = hangup_stops
        self._port = int(holder.getsockname()[1])
        self._holder = holder
        self._started = self._loop_ran_at = time.monotonic()
        self._stop = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()
        self._reserve = DescriptorReserve()
        self._publisher = Publisher()
        self._source = PostgresSource(
            settings.database_url.get_secret_value(),
            connect_timeout=settings.connect_timeout_seconds,
            statement_timeout=settings.statement_timeout_seconds,
            limits=ReadLimits(settings.max_definition_bytes, settings.max_catalog_bytes),
        )
        background = Background()
        self._gate = RowGate(
            Gate(settings.gate_code, settings.gate_interface), Checker(settings.jail), background=background
        )
        self._policy = (
            None
            if settings.publication_policy is None
            else PublicationPolicy(settings.publication_policy, lambda: self._spawn(self._follow_policy))
        )
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
        self._status = StatusReader(
            self._publisher,
            self._synchronizer.state,
            self._supervisor,
            self._proof,
            keys=self._key_usage.last_used,
            certificates=lambda: self._certificates_expire,
            control_socket=lambda: "off" if self._control is None else self._control.state,
            database=lambda: _database(self._source),
            held_commands=lambda: self._gate.held,
            history=lambda: self._synchronizer.catalogue.disk.entries,
        )
        self._telemetry = self._make_telemetry()
        self._control = self._make_control_server()
        self._admin = AdminServer(
            settings.metrics_host or settings.host,
            settings.metrics_port,
            read=self._status.read,
            alive=self._problem,
        )

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
            _worker_config(settings, self._port),
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

    def _make_telemetry(self) -> Telemetry | None:
        settings = self._settings
        if settings.otlp_endpoints == (None, None):
            return None
        from definition_server.control_plane.telemetry import create_telemetry  # only where it is asked for

        return create_telemetry(settings, self._status.read)

    def _on_calls_sampled(self, worker: int, calls: CallsSampled) -> None:
        if self._telemetry is not None:
            self._telemetry.calls_sampled(worker, calls)

    def _make_control_server(self) -> ControlServer | None:
        path = self._settings.control_path()
        if path is None:
            return None
        return ControlServer(path, self._control_handlers, workers=lambda: self._supervisor.worker_pids)

    async def run(self) -> int:
        """Start everything, wait for a signal, stop everything. Returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in MASTERS:
            loop.add_signal_handler(number, self._on_signal, number)
        for number in early_signals.take():
            loop.call_soon(self._on_signal, number)
        settings = self._settings
        log.info(
            "Starting",
            version=__version__,
            address=f"[{settings.host}]:{self._port}" if ":" in settings.host else f"{settings.host}:{self._port}",
            metrics_port=self._admin.port,
            workers=settings.workers,
            transport=settings.transport,
            signed=settings.avap_internal_key is not None,
            database="" if (database := self._source.address) is None else str(database),
            role="" if database is None else database.role,
        )
        self._admin.start()
        self._supervisor.start()
        if self._policy is not None:
            # Before the first catalogue: a pin counts from the start.
            with suppress(TimeoutError):
                await asyncio.wait_for(self._policy.read(at_once=True), _POLICY_SECONDS)
        forever = [
            asyncio.create_task(work)
            for work in (
                self._sync_loop.run(),
                self._supervisor.watch(),
                self._note_loop_runs(),
                self._announce(),
                self._prove(),
            )
        ]
        if self._control is not None:
            forever.append(asyncio.create_task(self._serve_control(self._control)))
        if self._telemetry is not None:
            forever.append(asyncio.create_task(self._export(self._telemetry)))
        if self._policy is not None:
            forever.append(asyncio.create_task(self._policy.run()))
        if os.getpid() == 1:
            forever.append(asyncio.create_task(reap_orphans()))
        stopped = asyncio.create_task(self._stop.wait())
        ended, _ = await asyncio.wait((stopped, *forever), return_when=asyncio.FIRST_COMPLETED)
        code = 0
        for task in ended - {stopped}:
            # None of these tasks returns, so an exception in one is a bug of ours. Drain, and exit with a crash's code.
            log.critical("The master failed; leaving", exc_info=task.exception())
            code = 1
        _exit_at_the_latest(settings.drain_timeout_seconds + _EXIT_MARGIN_SECONDS, code)
        await self._leave(forever)
        return code

    async def _leave(self, forever: list[asyncio.Task[None]]) -> None:
        settings = self._settings
        self._status.stopping = True
        self._reserve.close()
        log.info(
            "Draining",
            wait_seconds=settings.drain_wait_seconds,
            timeout_seconds=settings.drain_timeout_seconds,
        )
        # From now on the port is open only for as long as a worker has it open.
        self._holder.close()
        forever[0].cancel()
        await self._supervisor.drain(wait=settings.drain_wait_seconds, timeout=settings.drain_timeout_seconds)
        for task in (*forever, *self._background):
            task.cancel()
        await asyncio.gather(*forever, *self._background, return_exceptions=True)
        await self._gate.close()
        if self._control is not None:
            await self._control.close()
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
        """Run ``work`` in a task, with a reference to the task until it ends."""
        task = asyncio.create_task(work())
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _roll(self) -> None:
        log.info("Rolling the workers")
        await self._supervisor.roll()

    def _read_again(self) -> None:
        """Rows that are served turned out to be bad: the next publication is without them."""
        self._synchronizer.read_again()
        self._sync_loop.sync_soon()

    async def _reload(self) -> None:
        """Read rotated secrets from their files, then sync at once."""
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

    async def _serve_control(self, control: ControlServer) -> None:
        """Serve the operator's commands, once the workers serve: what that imports must not delay them.

        Never returns.
        """
        await self._workers_serve()
        await control.run()

    async def _export(self, telemetry: Telemetry) -> None:
        """Export traces and metrics, once the workers serve, for the same reason. Never returns."""
        await self._workers_serve()
        telemetry.start()
        await asyncio.Event().wait()

    async def _workers_serve(self) -> None:
        """Wait until every worker serves, and not for long."""
        deadline = time.monotonic() + _CONTROL_SECONDS
        while self._supervisor.serving < self._settings.workers:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_ANNOUNCE_SECONDS)

    async def _follow_policy(self) -> None:
        """Serve what the policy file asks for now."""
        catalogue, started = self._synchronizer.catalogue, time.monotonic()
        if catalogue.served is not None:
            await catalogue.follow()
            await catalogue.release(lambda: time.monotonic() - started)

    def _control_handlers(self) -> Mapping[str, MethodHandler]:
        from definition_server.control_plane.control_service import ControlService  # protobuf is large

        publications = Publications(
            self._synchronizer.catalogue,
            signer=lambda: _signer(self._reloader.settings),
            sync_soon=self._sync_loop.sync_soon,
        )
        service = ControlService(
            publications,
            self._publisher,
            self._supervisor,
            self._synchronizer.state,
            status=self._status.read,
            notices=self._notices,
            sync=self._sync_loop.sync_now,
            seconds_to_next=lambda: self._sync_loop.seconds_to_next,
            held_commands=lambda: self._gate.held,
        )
        return service.handlers()

    def _notices(self) -> list[str]:
        """What an operator should know, for ``status``."""
        error = self._synchronizer.state.store_error
        notices = [] if error is None else [f"the last-known-good snapshot is not stored: {error}"]
        if self._settings.snapshot_dir is None:
            notices.append(f"nothing is stored, because SNAPSHOT_DIR is not set: {_NOT_STORED}")
        if self._policy is not None and self._policy.problem is not None:
            notices.append(f"PUBLICATION_POLICY does not count as it is; the one before does: {self._policy.problem}")
        return notices

    async def _announce(self) -> None:
        """Log once that every worker serves. Never returns."""
        while self._supervisor.serving < self._settings.workers:  # noqa: ASYNC110 - a level, not an edge
            await asyncio.sleep(_ANNOUNCE_SECONDS)
        log.info("Serving", seconds=round(time.monotonic() - self._started, 3), workers=self._settings.workers)
        await asyncio.Event().wait()

    async def _prove(self) -> None:
        """Judge what is served, and have the workers say so. Never returns."""
        while True:
            fresh = self._proof.tick(
                published=self._publisher.current is not None, serving=self._supervisor.serving > 0
            )
            self._supervisor.report_freshness(fresh)
            await asyncio.sleep(TICK_SECONDS)

    async def _note_loop_runs(self) -> None:
        """Note for /livez that the event loop runs. Never returns."""
        while True:
            self._loop_ran_at = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)

    def _problem(self) -> str | None:
        silent = time.monotonic() - self._loop_ran_at
        return None if silent < _LOOP_STUCK_SECONDS else f"the master's event loop has stood still for {silent:.0f} s"


def _exit_at_the_latest(seconds: float, code: int) -> None:
    """End the process with ``code`` after ``seconds``: a thread may hang for ever, on a disk or a resolver."""

    def end() -> None:
        log.warning("A thread did not end in time; leaving without it")
        flush_logs()
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


def _database(source: PostgresSource) -> DatabaseStatus | None:
    address = source.address
    return None if address is None else DatabaseStatus(address.hosts, address.name, address.role, source.connected_to)


def _signer(settings: Settings) -> Signer | None:
    key = settings.avap_internal_key
    return None if key is None else Signer(key.get_secret_value(), settings.package_version)


def _expiries(tls: TlsFiles | None) -> dict[str, float]:
    files = {} if tls is None else {"server": tls.certificate, "client_authorities": tls.client_authorities}
    found = {name: earliest_expiry(Path(path)) for name, path in files.items() if path is not None}
    return {name: expiry for name, expiry in found.items() if expiry is not None}


def _worker_config(settings: Settings, port: int) -> Configure:
    return Configure(
        host=settings.host,
        port=port,
        transport=settings.transport,
        reflection=settings.reflection,
        max_connection_age_seconds=settings.max_connection_age_seconds,
        threadpool_size=settings.threadpool_size,
        app_env=settings.app_env,
        log_level=settings.log_level,
        drain_timeout_seconds=settings.drain_timeout_seconds,
        max_connections=settings.max_connections,
        max_connections_per_peer=settings.max_connections_per_peer,
        max_connection_idle_seconds=settings.max_connection_idle_seconds,
        keepalive_time_seconds=settings.keepalive_time_seconds,
        keepalive_timeout_seconds=settings.keepalive_timeout_seconds,
        keepalive_min_time_seconds=settings.keepalive_min_time_seconds,
        jail=settings.jail,
        version_metadata=settings.version_metadata == "on"
        or (settings.version_metadata == "auto" and settings.transport == "native"),
        trace_one_call_in=0 if settings.otlp_endpoints[0] is None else settings.trace_one_call_in,
    )
