"""The settings of the server. This one declaration feeds parsing (`environment`), ``definition-server serve --help``,
``definition-server config`` and ``docs/settings.md``. The settings of the client commands are in `cli.client_settings`,
and the types of the values in `setting_types`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import AliasChoices, Field, SecretStr, ValidationInfo, field_validator

from definition_server.api_keys import DEFAULT_ID, parse_keys
from definition_server.cpus import granted_cpus
from definition_server.environment import EnvironmentSettings, advice
from definition_server.memory_limit import default_catalogue_bytes
from definition_server.setting_types import (
    MOST_WORKERS,
    SECONDS_REMEDY,
    SOCKET_REMEDY,
    ApiKey,
    CertificateFile,
    Growth,
    HttpUrl,
    IpAddress,
    Percent,
    Port,
    PostgresUrl,
    Seconds,
    SecondsOrZero,
    Workers,
)
from definition_server.tls_checks import Pem, check_pair, check_pem

DEFAULT_TRANSPORT: Literal["native", "grpcio"] = "native"

_OTLP_REMEDY = "Give a URL, for example http://127.0.0.1:4318, or leave it unset"
_NO_POOL = (
    "the server has no pool: its master keeps one connection, and workers use no database. For more calls a second add "
    "CPUs and WORKERS (definition-server capacity)"
)


class Settings(EnvironmentSettings):
    """The settings of ``definition-server serve``."""

    without_counterpart: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("DATABASE_POOL_SIZE", "DB_POOL_SIZE", "PG_POOL_SIZE", "POOL_SIZE"), _NO_POOL),
        "NODE_OPTIONS": "the server is not a Node.js program; docs/runtime-flags.md has the counterpart of each flag",
    }

    database_url: PostgresUrl = Field(
        validation_alias="DATABASE_URL",
        description="PostgreSQL connection URL of the database that holds `obex_dapl_functions`. "
        "The role needs SELECT on that table and nothing else.",
        json_schema_extra=advice(
            "Set it to postgresql://USER:PASSWORD@HOST:5432/DATABASE; percent-encode every character of user and "
            "password that is not a letter or digit (@ as %40, / as %2F, % as %25)",
            secret=True,
        ),
    )
    api_key: ApiKey | None = Field(
        None,
        validation_alias="API_KEY",
        description="Key that every call must carry as metadata `x-avap-auth`. Its id is `default`.",
        json_schema_extra=advice(
            "Set it to the key that clients send, printable ASCII, for example from `openssl rand -hex 24`",
            secret=True,
            unless="API_KEYS",
        ),
    )
    api_keys: SecretStr | None = Field(
        None,
        validation_alias="API_KEYS",
        description="Keys by id, one `id:key` a line: a call may carry any of them, and that of `API_KEY`. Lines that "
        "begin with `#` are skipped. `avap_key_last_used_timestamp_seconds` shows which keys are in use.",
        json_schema_extra=advice(
            "Write one id:key a line, at most 64, the key without white space, for example from `openssl rand -hex 24`",
            secret=True,
        ),
    )
    avap_internal_key: SecretStr | None = Field(
        None,
        validation_alias="AVAP_INTERNAL_KEY",
        description="Key of the HMAC that signs each definition's code. Unset: code is served unsigned, and the AVAP "
        "language server then accepts no command at all (it reports a wrong magic number).",
        json_schema_extra=advice("Set it to the key that language servers verify with", secret=True),
    )
    avap_internal_key_previous: SecretStr | None = Field(
        None,
        validation_alias="AVAP_INTERNAL_KEY_PREVIOUS",
        description="The previous `AVAP_INTERNAL_KEY`. At a start, files in SNAPSHOT_DIR with its MAC are valid, and "
        "get the MAC of the present key. Nothing is signed with the previous key.",
        json_schema_extra=advice(
            "Set it for the first start with another AVAP_INTERNAL_KEY, then remove it", secret=True
        ),
    )
    package_version: int = Field(
        1,
        ge=1,
        le=2,
        validation_alias="PACKAGE_VERSION",
        description="Version of the signed package. 1: every language server verifies it; its HMAC covers only the "
        "code. 2: the HMAC also covers name, type, interface and hash, for clients that know this version.",
        json_schema_extra=advice("Give 1, or 2 where every client verifies version 2"),
    )
    host: str = Field(
        "::",
        validation_alias="HOST",
        description="Address of the gRPC port, and of the metrics port unless `METRICS_HOST` is set. `::` is every "
        "address, IPv4 included; `0.0.0.0` is every IPv4 address.",
        json_schema_extra=advice("Give an IP address of this machine, :: or 0.0.0.0"),
    )
    port: Port = Field(
        50051,
        validation_alias="PORT",
        description="gRPC port. 0 takes a free one.",
        json_schema_extra=advice("Give a number from 0 to 65535"),
    )
    metrics_port: Port = Field(
        9464,
        validation_alias="METRICS_PORT",
        description="HTTP port of /metrics, /livez, /readyz and /statusz. 0 takes a free one.",
        json_schema_extra=advice("Give a number from 0 to 65535"),
    )
    metrics_host: IpAddress | None = Field(
        None,
        validation_alias="METRICS_HOST",
        description="Address of the metrics port. Unset: that of `HOST`.",
        json_schema_extra=advice("Give an IP address of this machine, 127.0.0.1, 0.0.0.0 or ::, or leave it unset"),
    )
    workers: Workers = Field(
        default_factory=lambda: min(MOST_WORKERS, granted_cpus()),
        validation_alias="WORKERS",
        description="Worker processes. Default: the CPUs granted (cgroup quota, then affinity).",
        json_schema_extra=advice("Give a whole number from 1 to 512, or leave it unset", computed="CPUs granted"),
    )
    sync_interval_seconds: Seconds = Field(
        60.0,
        validation_alias="SYNC_INTERVAL_SECONDS",
        description="Time between the starts of two sync cycles, each of which checks the table for changes.",
        json_schema_extra=advice(SECONDS_REMEDY.format("60 or 0.5")),
    )
    snapshot_dir: Path | None = Field(
        None,
        validation_alias="SNAPSHOT_DIR",
        description="Directory of the last-known-good snapshot (served if the database is down at the start), the "
        "history and the pins. Unset: nothing is stored, and after a restart the first catalogue is not compared with "
        "the previous one.",
        json_schema_extra=advice("Give a directory that the server may write to, or leave it unset"),
    )
    control_socket: Path | None = Field(
        None,
        validation_alias="CONTROL_SOCKET",
        description="Unix socket on which the server answers the operator's commands (`status`, `accept`, `pin` …). "
        "Unset: `control.sock` in `SNAPSHOT_DIR`; if that is unset too, there is no socket.",
        json_schema_extra=advice(SOCKET_REMEDY),
    )
    publication_policy: Path | None = Field(
        None,
        validation_alias="PUBLICATION_POLICY",
        description="TOML file that names the accepted catalogues and the pinned one, for many replicas alike. A "
        "change takes effect within about a second. Unset: none.",
        json_schema_extra=advice("Name a TOML file that the server may read, or leave it unset"),
    )
    allow_empty_catalog: bool = Field(
        False,
        validation_alias="ALLOW_EMPTY_CATALOG",
        description="Serve a catalogue without definitions. False: an empty catalogue is held, and the last good "
        "catalogue stays.",
        json_schema_extra=advice("Give true or false"),
    )
    gate_code: Literal["module", "function", "off"] = Field(
        "module",
        validation_alias="GATE_CODE",
        description="How clients compile code. A row whose code does not compile in this way does not replace a good "
        'version. module: `compile(code, name, "exec")`. function: the same, but a top-level `return` is allowed. '
        "off: code is not checked.",
        json_schema_extra=advice("Give module, function or off"),
    )
    gate_interface: Literal["on", "off"] = Field(
        "on",
        validation_alias="GATE_INTERFACE",
        description="on: a row whose interface is refused by Python's `json.loads`, or is not an array, does not "
        "replace a good version. off: interfaces are not checked.",
        json_schema_extra=advice("Give on or off"),
    )
    guard_max_changed_percent: Percent = Field(
        100.0,
        validation_alias="GUARD_MAX_CHANGED_PERCENT",
        description="A catalogue in which a larger share of the commands than this, and more than 5, would have "
        "another code, interface, type or bytecode is held until an operator accepts it. 100: never, because a "
        "release may change all commands.",
        json_schema_extra=advice("Give a percentage from 0 to 100"),
    )
    guard_max_removed_percent: Percent = Field(
        20.0,
        validation_alias="GUARD_MAX_REMOVED_PERCENT",
        description="A catalogue that lacks a larger share of the commands than this, and more than 5, is held until "
        "an operator accepts it. 100: never.",
        json_schema_extra=advice("Give a percentage from 0 to 100"),
    )
    guard_max_growth_percent: Growth = Field(
        100.0,
        validation_alias="GUARD_MAX_GROWTH_PERCENT",
        description="A catalogue that grows by a larger share of its octets than this, and by more than 1 MiB, is "
        "held until an operator accepts it. 100: it may double.",
        json_schema_extra=advice("Give a percentage from 0 to 1000000"),
    )
    guard_max_held_percent: Percent = Field(
        20.0,
        validation_alias="GUARD_MAX_HELD_PERCENT",
        description="A catalogue in which the gate holds a larger share of the commands than this, and at least 6 "
        "more than before, is held until an operator accepts it. 100: never.",
        json_schema_extra=advice("Give a percentage from 0 to 100"),
    )
    history_snapshots: int = Field(
        10,
        ge=0,
        le=1000,
        validation_alias="HISTORY_SNAPSHOTS",
        description="Number of the last published catalogues that are kept in `SNAPSHOT_DIR/history`, to be compared "
        "and pinned. The served and the pinned catalogue are kept in any case.",
        json_schema_extra=advice("Give a whole number from 0 to 1000"),
    )
    transport: Literal["native", "grpcio"] = Field(
        DEFAULT_TRANSPORT,
        validation_alias="TRANSPORT",
        description="gRPC implementation of the workers. native: our own engine, which is faster. grpcio: Google's "
        "C-core.",
        json_schema_extra=advice("Give native or grpcio"),
    )
    tls_cert_file: CertificateFile | None = Field(
        None,
        validation_alias="TLS_CERT_FILE",
        description="PEM file of the certificate chain: serve TLS. Unset: cleartext. Read again on SIGHUP.",
        json_schema_extra=advice("Name a PEM file and set TLS_KEY_FILE, or leave both unset"),
    )
    tls_key_file: Path | None = Field(
        None,
        validation_alias="TLS_KEY_FILE",
        description="PEM file of the certificate's private key. Read again on SIGHUP.",
        json_schema_extra=advice("Name the PEM file of the key that belongs to TLS_CERT_FILE, or leave both unset"),
    )
    tls_client_ca_file: Path | None = Field(
        None,
        validation_alias="TLS_CLIENT_CA_FILE",
        description="PEM file of the authorities that must have issued the clients' certificates. Unset: clients need "
        "no certificate. Read again on SIGHUP.",
        json_schema_extra=advice("Name a PEM file and set TLS_CERT_FILE and TLS_KEY_FILE, or leave it unset"),
    )
    version_metadata: Literal["auto", "on", "off"] = Field(
        "auto",
        validation_alias="VERSION_METADATA",
        description="Name the served catalogue in every answer: the initial metadata `avap-version` is the first 16 "
        "hex digits of its version hash. `auto`: only on the native transport, where it costs at most a few per cent "
        "of the CPU time per call. On grpcio it costs an eighth more.",
        json_schema_extra=advice("Give auto, on or off"),
    )
    reflection: bool = Field(
        False,
        validation_alias="REFLECTION",
        description="Offer gRPC server reflection, which needs no key.",
        json_schema_extra=advice("Give true or false"),
    )
    max_connection_age_seconds: SecondsOrZero = Field(
        3600.0,
        validation_alias="MAX_CONNECTION_AGE_SECONDS",
        description="Age (with jitter) of a connection at which the client is made to reconnect, so that connections "
        "spread over added replicas. 0: never.",
        json_schema_extra=advice(SECONDS_REMEDY.format("3600, or 0 for never")),
    )
    max_connection_idle_seconds: SecondsOrZero = Field(
        0.0,
        validation_alias="MAX_CONNECTION_IDLE_SECONDS",
        description="Time without a call after which a connection is closed gracefully. 0: never.",
        json_schema_extra=advice(SECONDS_REMEDY.format("900, or 0 for never")),
    )
    max_connections: int = Field(
        16_384,
        ge=0,
        le=1_000_000,
        validation_alias="MAX_CONNECTIONS",
        description="Most connections of a worker. At the limit, a new connection replaces the one without an "
        "authorized call that has been idle longest, or takes one of 64 reserved places (grpcio: it is closed). 0: "
        "only the limit of open files applies.",
        json_schema_extra=advice("Give a whole number from 0 to 1000000"),
    )
    max_connections_per_peer: int = Field(
        8_192,
        ge=0,
        le=1_000_000,
        validation_alias="MAX_CONNECTIONS_PER_PEER",
        description="Most connections of a worker from one IPv4 address or one IPv6 /64 network; further ones are "
        "closed (grpcio: no such limit). All clients behind a proxy or NAT count as one address. 0: no limit.",
        json_schema_extra=advice("Give a whole number from 0 to 1000000"),
    )
    keepalive_time_seconds: Seconds = Field(
        7200.0,
        validation_alias="KEEPALIVE_TIME_SECONDS",
        description="Time without data from a client after which the server sends it a ping.",
        json_schema_extra=advice(SECONDS_REMEDY.format("7200")),
    )
    keepalive_timeout_seconds: Seconds = Field(
        20.0,
        validation_alias="KEEPALIVE_TIMEOUT_SECONDS",
        description="Time for the answer to that ping. Without an answer the connection is closed.",
        json_schema_extra=advice(SECONDS_REMEDY.format("20")),
    )
    keepalive_min_time_seconds: Seconds = Field(
        10.0,
        validation_alias="KEEPALIVE_MIN_TIME_SECONDS",
        description="Shortest time between a client's pings, with or without calls. A client that pings faster on "
        "average is disconnected (too_many_pings).",
        json_schema_extra=advice(SECONDS_REMEDY.format("10")),
    )
    app_env: Literal["production", "development"] = Field(
        "production",
        validation_alias=AliasChoices("APP_ENV", "NODE_ENV"),
        description="production: JSON logs and no traceback. development: readable logs and tracebacks. "
        "Also read as NODE_ENV.",
        json_schema_extra=advice("Give production or development"),
    )
    log_level: Literal["DEBUG", "INFO", "WARN", "ERROR", "FATAL"] = Field(
        "INFO",
        validation_alias="LOG_LEVEL",
        description="Lowest level that is logged.",
        json_schema_extra=advice("Give DEBUG, INFO, WARN, ERROR or FATAL"),
    )
    jail: Literal["auto", "require", "off"] = Field(
        "auto",
        validation_alias="JAIL",
        description="Confinement of the workers by Landlock and seccomp. auto: as far as the kernel supports it; "
        "missing parts are logged. require: do not start without both. off: no confinement, for debuggers.",
        json_schema_extra=advice("Give auto, require or off"),
    )
    threadpool_size: int = Field(
        64,
        ge=1,
        le=1024,
        validation_alias=AliasChoices("THREADPOOL_SIZE", "UV_THREADPOOL_SIZE"),
        description="Most threads for blocking handlers in a worker (the server's own RPCs do not block). "
        "Also read as UV_THREADPOOL_SIZE.",
        json_schema_extra=advice("Give a whole number from 1 to 1024"),
    )
    connect_timeout_seconds: Seconds = Field(
        5.0,
        validation_alias="CONNECT_TIMEOUT_SECONDS",
        description="Longest time to connect to the database. A start waits as long for the database before it serves "
        "the last-known-good snapshot.",
        json_schema_extra=advice(SECONDS_REMEDY.format("5")),
    )
    statement_timeout_seconds: Seconds = Field(
        30.0,
        validation_alias="STATEMENT_TIMEOUT_SECONDS",
        description="Longest time of each database statement (the change check, and each batch of rows).",
        json_schema_extra=advice(SECONDS_REMEDY.format("30")),
    )
    full_read_interval_seconds: Seconds = Field(
        3600.0,
        validation_alias="FULL_READ_INTERVAL_SECONDS",
        description="Time after which the whole table is read although the change check has found no change.",
        json_schema_extra=advice(SECONDS_REMEDY.format("3600")),
    )
    max_definition_bytes: int = Field(
        4 * 1024 * 1024,
        ge=1,
        le=2**31 - 1,
        validation_alias="MAX_DEFINITION_BYTES",
        description="Most bytes of a row: name, type, interface, code and bytecode together. A larger row is not read; "
        "the last good version of its command stays.",
        json_schema_extra=advice("Give a whole number of bytes, for example 4194304"),
    )
    max_catalog_bytes: int = Field(
        default_factory=default_catalogue_bytes,
        ge=1,
        le=2**31 - 1,
        validation_alias="MAX_CATALOG_BYTES",
        description="Most bytes of the catalogue. A larger table is not read: the cycle fails before it uses the "
        "memory. Default: a quarter of the memory granted (cgroup limits, then the machine's), from 64 MiB to 2 GiB.",
        json_schema_extra=advice("Give a whole number of bytes, or leave it unset", computed="memory granted / 4"),
    )
    drain_wait_seconds: SecondsOrZero = Field(
        5.0,
        validation_alias="DRAIN_WAIT_SECONDS",
        description="On shutdown, time between reporting NOT_SERVING and closing the port, so that load balancers "
        "notice it.",
        json_schema_extra=advice(SECONDS_REMEDY.format("5")),
    )
    drain_timeout_seconds: Seconds = Field(
        25.0,
        validation_alias="DRAIN_TIMEOUT_SECONDS",
        description="On shutdown, total time, including DRAIN_WAIT_SECONDS, after which calls in flight are cut off.",
        json_schema_extra=advice("Give a number of seconds above DRAIN_WAIT_SECONDS"),
    )
    heartbeat_timeout_seconds: Seconds = Field(
        10.0,
        validation_alias="HEARTBEAT_TIMEOUT_SECONDS",
        description="A worker whose event loop has not run for this long is killed and replaced.",
        json_schema_extra=advice(SECONDS_REMEDY.format("10")),
    )
    start_timeout_seconds: Seconds = Field(
        60.0,
        validation_alias="START_TIMEOUT_SECONDS",
        description="A worker that is not READY within this time after its start is killed and replaced.",
        json_schema_extra=advice(SECONDS_REMEDY.format("60")),
    )
    otel_exporter_otlp_endpoint: HttpUrl | None = Field(
        None,
        validation_alias="OTEL_EXPORTER_OTLP_ENDPOINT",
        description="Base URL of an OpenTelemetry collector that takes OTLP over HTTP, for example "
        "`http://collector:4318`: the master exports traces and metrics to it. It needs the extra `otel`. Unset: "
        "nothing is exported.",
        json_schema_extra=advice(_OTLP_REMEDY),
    )
    otel_exporter_otlp_traces_endpoint: HttpUrl | None = Field(
        None,
        validation_alias="OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        description="Complete URL for traces. Unset: `OTEL_EXPORTER_OTLP_ENDPOINT` with `/v1/traces` appended.",
        json_schema_extra=advice(_OTLP_REMEDY),
    )
    otel_exporter_otlp_metrics_endpoint: HttpUrl | None = Field(
        None,
        validation_alias="OTEL_EXPORTER_OTLP_METRICS_ENDPOINT",
        description="Complete URL for metrics. Unset: `OTEL_EXPORTER_OTLP_ENDPOINT` with `/v1/metrics` appended.",
        json_schema_extra=advice(_OTLP_REMEDY),
    )
    otel_exporter_otlp_headers: SecretStr | None = Field(
        None,
        validation_alias="OTEL_EXPORTER_OTLP_HEADERS",
        description="Header fields of each export, `name=value` separated by commas, for example "
        "`authorization=Bearer …`.",
        json_schema_extra=advice("Give name=value pairs separated by commas, or leave it unset", secret=True),
    )
    otel_exporter_otlp_protocol: str = Field(
        "http/protobuf",
        validation_alias="OTEL_EXPORTER_OTLP_PROTOCOL",
        description="Only `http/protobuf` is supported. With another protocol nothing is exported, and a log line "
        "says so.",
        json_schema_extra=advice("Give http/protobuf"),
    )
    otel_traces_exporter: Literal["otlp", "none"] = Field(
        "otlp",
        validation_alias="OTEL_TRACES_EXPORTER",
        description="none: no traces are exported.",
        json_schema_extra=advice("Give otlp or none"),
    )
    otel_metrics_exporter: Literal["otlp", "none"] = Field(
        "otlp",
        validation_alias="OTEL_METRICS_EXPORTER",
        description="none: no metrics are exported; `/metrics` is not affected.",
        json_schema_extra=advice("Give otlp or none"),
    )
    otel_metric_export_interval: int = Field(
        60_000,
        ge=100,
        le=86_400_000,
        validation_alias="OTEL_METRIC_EXPORT_INTERVAL",
        description="Milliseconds between two exports of the metrics.",
        json_schema_extra=advice("Give a whole number of milliseconds, for example 60000"),
    )
    otel_sdk_disabled: bool = Field(
        False,
        validation_alias="OTEL_SDK_DISABLED",
        description="true: nothing is exported, whatever the other variables say.",
        json_schema_extra=advice("Give true or false"),
    )
    trace_one_call_in: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        validation_alias="TRACE_ONE_CALL_IN",
        description="If traces are exported, one of this many calls becomes a span, at most 50 per second and worker. "
        "0: none.",
        json_schema_extra=advice("Give a whole number, for example 10000, or 0 for none"),
    )

    @field_validator("api_keys")
    @classmethod
    def _check_api_keys(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is not None:
            keys = parse_keys(value.get_secret_value())
            single: SecretStr | None = info.data.get("api_key")
            if single is not None and DEFAULT_ID in keys:
                raise ValueError(f"the id {DEFAULT_ID} is that of API_KEY")
            if single is not None and single.get_secret_value() in keys.values():
                raise ValueError("it holds the key of API_KEY, under another id")
        return value

    @field_validator("tls_key_file")
    @classmethod
    def _check_key(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        check_pem(value, Pem.PRIVATE_KEY)
        if "tls_cert_file" in info.data:  # if the value is missing here, its fault was reported already
            check_pair(info.data["tls_cert_file"], value, "TLS_CERT_FILE and TLS_KEY_FILE")
        return value

    @field_validator("tls_client_ca_file")
    @classmethod
    def _check_client_authority(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None:
            if "tls_key_file" in info.data and info.data["tls_key_file"] is None:
                raise ValueError("it needs TLS_CERT_FILE and TLS_KEY_FILE")
            check_pem(value, Pem.CERTIFICATE)
        return value

    @field_validator("drain_timeout_seconds")
    @classmethod
    def _check_drain(cls, value: float, info: ValidationInfo) -> float:
        wait = info.data.get("drain_wait_seconds", 0.0)
        if value <= wait:
            raise ValueError(f"it must exceed DRAIN_WAIT_SECONDS ({wait:g})")
        return value

    def control_path(self) -> Path | None:
        """The path of the control socket; None: there is no control socket."""
        return control_path(self.control_socket, self.snapshot_dir)

    @property
    def otlp_endpoints(self) -> tuple[str | None, str | None]:
        """The URLs to which traces and metrics are exported; None: they are not exported."""
        base = self.otel_exporter_otlp_endpoint
        found = []
        for signal, exporter, own in (
            ("traces", self.otel_traces_exporter, self.otel_exporter_otlp_traces_endpoint),
            ("metrics", self.otel_metrics_exporter, self.otel_exporter_otlp_metrics_endpoint),
        ):
            url = own or (None if base is None else f"{base.rstrip('/')}/v1/{signal}")
            found.append(None if self.otel_sdk_disabled or exporter == "none" else url)
        return found[0], found[1]

    def keys_by_id(self) -> dict[str, str]:
        """The accepted API keys: id → key."""
        single = {} if self.api_key is None else {DEFAULT_ID: self.api_key.get_secret_value()}
        return single | ({} if self.api_keys is None else parse_keys(self.api_keys.get_secret_value()))


def control_path(socket: Path | None, snapshot_dir: Path | None) -> Path | None:
    """The path of the control socket, from ``CONTROL_SOCKET`` and ``SNAPSHOT_DIR``."""
    return socket or (None if snapshot_dir is None else snapshot_dir / "control.sock")
