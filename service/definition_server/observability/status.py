"""The status of the service at one moment: the only source of ``/statusz`` and ``/metrics``."""

from __future__ import annotations

from dataclasses import dataclass, field

from definition_server.observability.reasons import Reason


@dataclass(frozen=True, slots=True)
class CatalogStatus:
    """The published snapshot."""

    generation: int
    version_hash: str
    definitions: int
    bytes: int
    created_at: float
    """When it was built, seconds since the epoch."""
    published_at: float | None = None
    """When it was published, seconds since the epoch: it is served since then."""


@dataclass(frozen=True, slots=True)
class PublicationStatus:
    """One of the last publications. Of those before the start only the last of each version is known."""

    at: float
    """Seconds since the epoch."""
    version_hash: str
    definitions: int
    added: int | None = None
    """Commands; None, as for the next two, where it was not compared: before the start, or by a pin or its end."""
    removed: int | None = None
    changed: int | None = None
    examples: tuple[str, ...] = ()
    """Up to ten commands of each kind, each after ``+ ``, ``- `` or ``~ ``, cut at 64 characters."""


@dataclass(frozen=True, slots=True)
class HeldCommandStatus:
    """A command that is served in its last good version, because its row is bad."""

    name: str
    """Cut at 64 characters."""
    reason: str
    since: float
    """Seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class SyncStatus:
    """The sync cycles so far. Times are seconds since the epoch; None before the first cycle."""

    cycles: dict[str, int]
    last_outcome: str | None
    last_attempt: float | None
    last_success: float | None
    last_error: Reason | None
    last_duration_seconds: float
    age_seconds: float | None
    """Since the table and the served catalogue last agreed."""
    restored_age_seconds: float | None
    store_error: Reason | None
    source_rows: int
    unserved: dict[str, int]
    suspect: dict[str, int]
    rows_held: dict[str, int] = field(default_factory=dict)
    """By reason: commands that are served in their last good version, because their row is bad."""
    rows_unchecked: int = 0
    """Rows that are served although their content was not judged yet."""
    held_reason: Reason | None = None
    """Why the guard holds a catalogue; None where it holds none."""
    held_since: float | None = None
    held_version: str | None = None
    """The hash of that catalogue."""
    held_definitions: int | None = None
    """How many it has."""
    held_names: tuple[str, ...] = ()
    """Up to ten of the commands that ``held_reason`` is about, cut at 64 characters."""
    pinned: str | None = None
    """The origin of the pin that is in force: ``command`` or ``policy``; None if no pin is."""
    pinned_version: str | None = None
    """Its hash, or the beginning of it that was given."""
    pinned_until: float | None = None
    pinned_missing: bool = False
    """Whether the pinned version is not known here, so that another one is served."""
    history_entries: int = 0
    next_attempt: float | None = None
    """When the next cycle is due, seconds since the epoch."""
    last_failure: float | None = None
    """When cycles last began to fail, seconds since the epoch; remembered after the recovery."""
    last_failure_reason: Reason | None = None
    store: str = "off"
    """``off``: there is no SNAPSHOT_DIR; ``stored``; ``failing``."""


@dataclass(frozen=True, slots=True)
class DatabaseStatus:
    """Which database the table is read from."""

    hosts: tuple[str, ...]
    """``host:port`` each, in the order in which they are tried."""
    name: str
    role: str
    connected_to: str | None
    """The one of the hosts that let us connect last; None: none has yet."""


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker number."""

    worker: int
    pid: int | None
    state: str
    """``starting``, ``serving``, ``waiting`` (no snapshot yet), ``draining``, ``down``."""
    generation: int
    version_hash: str
    definitions: int
    heartbeat_age_seconds: float | None
    restarts: int
    crash_loop: bool
    connections: int | None = None
    """None where the transport does not count connections."""
    room: str | None = None
    """``free``, ``full`` (idle connections without an authorized call give way) or ``taken`` (all are clients'); None
    where the transport does not count connections."""
    jail: str = "none"
    """How far it is confined: ``full``, ``landlock``, ``seccomp``, ``none``; ``off`` where it is not to be."""


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """Requests of all workers, including those that have ended."""

    by_status: dict[str, int]
    bounds_seconds: tuple[float, ...]
    latency: dict[str, tuple[int, ...]]
    """Method → requests per bucket, not cumulated; one bucket more than there are bounds."""
    latency_sum_seconds: dict[str, float]
    refused_connections: dict[str, int] = field(default_factory=dict)
    """Reason → connections that were refused or closed with nothing wrong in what they sent."""


@dataclass(frozen=True, slots=True)
class LogStatus:
    """Log lines that were not written."""

    waiting_lines: int
    """Of the master: logged, and not taken by stdout yet."""
    dropped_lines: int
    """Of the master and all workers, ended ones included: logged, and never written, since the master's start."""


@dataclass(frozen=True, slots=True)
class FreshnessStatus:
    """Whether what is served is up to date. Apart from readiness."""

    fresh: bool
    reason: str | None
    """Why it is stale; None where it is fresh."""


@dataclass(frozen=True, slots=True)
class RestartStatus:
    """Whether a restart now would serve the same."""

    safe: bool
    reason: str


@dataclass(frozen=True, slots=True)
class PropagationStatus:
    """How long published changes took from the table to the last worker, as an upper bound."""

    bounds_seconds: tuple[float, ...]
    counts: tuple[int, ...]
    """Samples per bucket, not cumulated; one bucket more than there are bounds."""
    sum_seconds: float
    last_seconds: float | None


@dataclass(frozen=True, slots=True)
class EventStatus:
    """A failure, a refusal or a recovery."""

    at: float
    """Seconds since the epoch."""
    kind: str
    reason: Reason | None
    after_seconds: float | None
    """For the end of a state: how long it lasted."""


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """The whole status."""

    version: str
    started_at: float
    ready: bool
    stopping: bool
    catalog: CatalogStatus | None
    sync: SyncStatus
    workers: tuple[WorkerStatus, ...]
    requests: RequestStatus
    hostname: str = ""
    """Of the machine, container or pod."""
    engine: str = ""
    """The engine that serves the clients: ``pure`` or ``compiled``, which are the forms of the native engine, or
    ``grpcio``."""
    freshness: FreshnessStatus = FreshnessStatus(True, None)
    restart: RestartStatus = RestartStatus(True, "stored")
    propagation: PropagationStatus = PropagationStatus((), (0,), 0.0, None)
    events: tuple[EventStatus, ...] = ()
    """The last fifty, the newest first."""
    publications: tuple[PublicationStatus, ...] = ()
    """The last ten, the newest first."""
    held_commands: tuple[HeldCommandStatus, ...] = ()
    """The first twenty, in name order; ``sync.rows_held`` counts all."""
    control_socket: str = "off"
    """``open``; ``unavailable``: it cannot be opened, see the log; ``off``: there is to be none."""
    full: bool = False
    """Whether no worker has room for another client."""
    logs: LogStatus = LogStatus(0, 0)
    keys_last_used: dict[str, float] = field(default_factory=dict)
    """Key id → when it was last presented, seconds since the epoch; 0: not since the master's start."""
    database: DatabaseStatus | None = None
    """None where ``DATABASE_URL`` cannot be used."""
    certificates_expire: dict[str, float] = field(default_factory=dict)
    """``server`` and ``client_authorities``, as far as they are used → the earliest end of validity in the file that
    was last read without a fault, seconds since the epoch."""
