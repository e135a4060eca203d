"""The part of the settings that a worker gets. It contains no secret."""

from __future__ import annotations

from definition_server.ipc.messages import Configure
from definition_server.settings import Settings


def worker_config(settings: Settings, port: int) -> Configure:
    """The configuration of each worker of a server on ``port``."""
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
