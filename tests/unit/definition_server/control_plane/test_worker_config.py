"""The settings that are sent to a worker."""

from __future__ import annotations

import pytest
from tests.support.environments import load

from definition_server.control_plane.worker_config import worker_config

COLLECTOR = "http://collector:4318"


@pytest.mark.parametrize(
    ("variables", "one_call_in"),
    [
        ({}, 0),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": COLLECTOR}, 7),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": COLLECTOR}, 7),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": COLLECTOR}, 0),
    ],
    ids=["no collector", "collector", "of traces", "of metrics"],
)
def test_calls_are_sampled_if_traces_are_exported(variables: dict[str, str], one_call_in: int) -> None:
    assert worker_config(load(TRACE_ONE_CALL_IN="7", **variables), 5).trace_one_call_in == one_call_in


@pytest.mark.parametrize(
    ("setting", "transport", "named"),
    [
        ("on", "native", True), ("on", "grpcio", True), ("off", "native", False), ("off", "grpcio", False),
        ("auto", "native", True), ("auto", "grpcio", False),
    ],
)  # fmt: skip
def test_answers_name_the_catalogue_if_the_setting_says_so_and_by_default_on_the_native_transport(
    setting: str, transport: str, named: bool
) -> None:
    assert worker_config(load(VERSION_METADATA=setting, TRANSPORT=transport), 5).version_metadata is named


def test_every_limit_reaches_the_worker() -> None:
    config = worker_config(
        load(
            HOST="::1", MAX_CONNECTIONS="11", MAX_CONNECTIONS_PER_PEER="12", MAX_CONNECTION_IDLE_SECONDS="13",
            MAX_CONNECTION_AGE_SECONDS="14", KEEPALIVE_TIME_SECONDS="15", KEEPALIVE_TIMEOUT_SECONDS="16",
            KEEPALIVE_MIN_TIME_SECONDS="17", DRAIN_TIMEOUT_SECONDS="18", THREADPOOL_SIZE="19",
        ),
        5,
    )  # fmt: skip
    assert (config.host, config.port, config.threadpool_size, config.drain_timeout_seconds) == ("::1", 5, 19, 18.0)
    assert (config.max_connections, config.max_connections_per_peer) == (11, 12)
    assert (config.max_connection_idle_seconds, config.max_connection_age_seconds) == (13.0, 14.0)
    assert (config.keepalive_time_seconds, config.keepalive_timeout_seconds) == (15.0, 16.0)
    assert config.keepalive_min_time_seconds == 17.0
