"""States the limits and times of the code that master and workers share. Other tests import them, so they would accept
any value.

The module of each value gives the reason for it. A changed value must be changed here, too.
"""

from __future__ import annotations

from tests.support.stated import deviations

KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "channel": {"_MAX_FROM_MASTER": 64 * KIB, "_MAX_FROM_WORKER": 4 * KIB, "MAX_DESCRIPTORS": 3, "_DESCRIPTOR_SIZE": 4},
    "handover": {"PREPARATION_SECONDS": 1.0, "RELEASE_SECONDS": 0.5, "HOLD_SECONDS": 2.0},
    "memory": {"_BATCH_PIECES": 1024, "_BATCH_OCTETS": MIB},
    "messages": {
        "_MOST_INTEGER": 2**64 - 1,
        "_MOST_TEXT": 4 * KIB,
        "_MOST_ITEMS": 256,
        "_SHOWN": 120,
        "Configure.max_connections": 0,
        "Configure.max_connections_per_peer": 0,
        "Configure.max_connection_idle_seconds": 0.0,
        "Configure.keepalive_time_seconds": 7200.0,
        "Configure.keepalive_timeout_seconds": 20.0,
        "Configure.keepalive_min_time_seconds": 10.0,
        "Configure.version_metadata": True,
        "Configure.trace_one_call_in": 0,
    },
    "stats": {
        "LATENCY_BOUNDS": (5e-05, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0),
        "BUCKETS": 14,
        "_HASH_WORDS": 4,
        "_WORD": 8,
        "_F_SEAL_FUTURE_WRITE": 16,
        "Word.PID": 0,
        "Word.HEARTBEAT": 1,
        "Word.GENERATION": 2,
        "Word.ENTRIES": 3,
        "Word.ACCEPTING": 4,
        "Word.CONNECTIONS": 5,
        "Word.OPENED": 6,
        "Word.VERSION_HASH": 7,
        "Word.REFUSED": 48,
        "Word.END": 53,
        "_BOUNDS_NS": (
            50_000,
            100_000,
            250_000,
            500_000,
            1_000_000,
            2_500_000,
            5_000_000,
            10_000_000,
            25_000_000,
            50_000_000,
            100_000_000,
            250_000_000,
            1_000_000_000,
        ),
        "Room.FREE": 0,
        "Room.FULL": 1,
        "Room.TAKEN": 2,
        "SlotReading.lines_dropped": 0,
    },
}
"""Module → name → value."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("definition_server.ipc", STATED) == []
