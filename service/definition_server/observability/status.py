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
    """The time when the snapshot was built, in seconds since the epoch."""
    published_at: float | None = None
    """The time when the snapshot was published, since which it is served, in seconds since the epoch."""


@dataclass(frozen=True, slots=True)
class PublicationStatus:
    """One of the last publications. Before the start, only the last publication of each version is known."""

    at: float
    """Seconds since the epoch."""
    version_hash: str
    definitions: int
    added: int | None = None
    """The number of added commands. This field and the next two are None for publications that were not compared:
    before the start, or by a pin or its end.
    """
    removed: int | None = None
    changed: int | None = None
    examples: tuple[str, ...] = ()
    """Up to ten commands of each kind, each after ``+ ``, ``- `` or ``~ ``, cut at 64 characters."""


@dataclass(frozen=True, slots=True)
class HeldCommandStatus:
    """A command that is served in its last good version, because its row is bad."""

    name: str
    """The name of the command, cut at 64 characters."""
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
    """Time since the table and the served catalogue last agreed."""
    restored_age_seconds: float | None
    store_error: Reason | None
    source_rows: int
    unserved: dict[str, int]
    suspect: dict[str, int]
    rows_held: dict[str, int] = field(default_factory=dict)
    """Reason → number of commands that are served in their last good version, because their row is bad."""
    rows_unchecked: int = 0
    """Rows that are served although their content was not judged yet."""
    held_reason: Reason | None = None
    """The reason why the guard holds a catalogue; None if it holds none."""
    held_since: float | None = None
    held_version: str | None = None
    """The hash of the held catalogue."""
    held_definitions: int | None = None
    """The number of definitions of the held catalogue."""
    held_names: tuple[str, ...] = ()
    """Up to ten of the commands to which ``held_reason`` refers, cut at 64 characters."""
    pinned: str | None = None
    """The origin of the pin that is in effect: ``command`` or ``policy``; None if there is none."""
    pinned_version: str | None = None
    """The pinned hash, or the beginning of the hash that the operator gave."""
    pinned_until: float | None = None
    pinned_missing: bool = False
    """Whether the pinned version is not known here, so that another version is served."""
    history_entries: int = 0
    next_attempt: float | None = None
    """The time when the next cycle is due, in seconds since the epoch."""
    last_failure: float | None = None
    """The time when cycles last began to fail, in seconds since the epoch. The value is kept after the recovery."""
    last_failure_reason: Reason | None = None
    store: str = "off"
    """``off``: there is no SNAPSHOT_DIR; ``stored``: the snapshot is stored; ``failing``: it cannot be stored."""


@dataclass(frozen=True, slots=True)
class DatabaseStatus:
    """The database from which the table is read."""

    hosts: tuple[str, ...]
    """The hosts, each as ``host:port``, in the order in which they are tried."""
    name: str
    role: str
    connected_to: str | None
    """The host that last accepted our connection; None: no host has accepted one so far."""


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
    """None if the transport does not count connections."""
    room: str | None = None
    """``free``, ``full`` (idle connections without an authorized call are closed for new ones) or ``taken`` (all belong
    to clients); None if the transport does not count connections."""
    jail: str = "none"
    """The worker's confinement: ``full``, ``landlock``, ``seccomp``, ``none``; ``off`` with ``JAIL=off``."""


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """Requests of all workers, including those that have ended."""

    by_status: dict[str, int]
    bounds_seconds: tuple[float, ...]
    latency: dict[str, tuple[int, ...]]
    """Method → requests per bucket, not cumulated; one bucket more than there are bounds."""
    latency_sum_seconds: dict[str, float]
    refused_connections: dict[str, int] = field(default_factory=dict)
    """Reason → connections that were refused or closed although their clients made no mistake."""


@dataclass(frozen=True, slots=True)
class LogStatus:
    """Log lines that were not written."""

    waiting_lines: int
    """Lines of the master that stdout has not taken yet."""
    dropped_lines: int
    """Lines of the master and all workers, including ended ones, that were dropped since the master's start."""


@dataclass(frozen=True, slots=True)
class FreshnessStatus:
    """Whether the served catalogue is up to date. Independent of readiness."""

    fresh: bool
    reason: str | None
    """The reason why the catalogue is stale; None if it is fresh."""


@dataclass(frozen=True, slots=True)
class RestartStatus:
    """Whether the server would serve the same catalogue after a restart."""

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
    """At the end of a state: the seconds that it lasted."""


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
    """The host name of the machine, container or pod."""
    engine: str = ""
    """The engine that serves the clients: ``pure`` or ``compiled``, which are the forms of the native engine, or
    ``grpcio``."""
    freshness: FreshnessStatus = FreshnessStatus(True, None)
    restart: RestartStatus = RestartStatus(True, "stored")
    propagation: PropagationStatus = PropagationStatus((), (0,), 0.0, None)
    events: tuple[EventStatus, ...] = ()
    """The last fifty events, the newest first."""
    publications: tuple[PublicationStatus, ...] = ()
    """The last ten publications, the newest first."""
    held_commands: tuple[HeldCommandStatus, ...] = ()
    """The first twenty held commands, in the order of their names; ``sync.rows_held`` counts all."""
    control_socket: str = "off"
    """``open``: the socket is open; ``unavailable``: it cannot be opened, see the log; ``off``: none is configured."""
    full: bool = False
    """Whether no worker has room for another client."""
    logs: LogStatus = LogStatus(0, 0)
    keys_last_used: dict[str, float] = field(default_factory=dict)
    """Key id → the time of its last use, seconds since the epoch; 0: no use since the master's start."""
    database: DatabaseStatus | None = None
    """None if ``DATABASE_URL`` cannot be used."""
    certificates_expire: dict[str, float] = field(default_factory=dict)
    """``server`` and ``client_authorities``, if they are used → the earliest expiry in the file that was last read
    without a fault, seconds since the epoch."""
