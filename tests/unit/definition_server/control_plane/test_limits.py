"""The values of a master's limits and times. Other tests import these limits, and would follow any value.

Each was chosen for a reason, which its module gives. A change of a limit must be made here, too.
"""

from __future__ import annotations

from importlib import import_module

import pytest

KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "admin_http": {
        "REQUEST_LINE_OCTETS": 8 * KIB,
        "HEADER_OCTETS": 16 * KIB,
        "HEADER_FIELDS": 100,
        "_MOST_UNDECIDED": 16,
    },
    "admin_port": {
        "MOST_CONNECTIONS": 64,
        "DESCRIPTOR_SHARE": 8,
        "REQUEST_SECONDS": 5.0,
        "ANSWER_SECONDS": 10.0,
        "LINGER_SECONDS": 1.0,
        "BACKLOG": KIB,
        "_ACCEPTED_AT_ONCE": 16,
        "_CHUNK": 16 * KIB,
        "_PAUSE_SECONDS": 0.1,
    },
    "admin_share": {"SHARE": 0.25, "BURST_SECONDS": 1.0, "_NETWORKS": KIB},
    "background": {"_NICENESS": 5},
    "catalogue_disk": {"RECALL_PATIENCE_SECONDS": 2.0, "LOAD_PATIENCE_SECONDS": 5.0},
    "catalogue_guard": {"WINDOW_SECONDS": 3600.0, "_ALL_PERCENT": 100.0},
    "certificates": {"_SEQUENCE": 48, "_VERSION": 160, "_UTC_TIME": 23, "_GENERALIZED_TIME": 24},
    "checker": {
        "START_SECONDS": 15.0,
        "IDLE_SECONDS": 300.0,
        "_WALL_PER_CPU_SECOND": 10,
        "_MOST_OCTETS": 256 * MIB,
        "_NICENESS": 10,
        "_LOWEST": 19,
        "POLL_SECONDS": 0.02,
        "WINDOW_ROWS": 64,
        "WINDOW_OCTETS": MIB,
    },
    "checker_process": {"MEMORY": 512 * MIB, "_DESCRIPTORS": 16, "_SPARE_FRAMES": 150},
    "control_server": {
        "MAX_REQUEST": 16 * KIB,
        "MAX_CONNECTIONS": 32,
        "MAX_CALLS": 16,
        "_MAX_HELD": 4 * MIB,
        "_CHECK_SECONDS": 5.0,
        "_DISK_SECONDS": 10.0,
        "_STOP_SECONDS": 0.2,
    },
    "control_service": {"_PROPAGATION_SECONDS": 10.0, "_POLL_SECONDS": 0.002, "_EXPORT_OCTETS": 256 * KIB},
    "control_socket": {
        "LONGEST_PATH": 107,
        "_MODE": 0o600,
        "_PROBE_SECONDS": 1.0,
        "_LOCK_SECONDS": 2.0,
        "_LOCK_PAUSE_SECONDS": 0.02,
    },
    "database_address": {"_SHORT_SECRET": 6},
    "descriptors": {"RESERVED": 24, "_HELD": 24, "_PER_WORKER": 8, "_ADMIN_SHARE": 8},
    "eager_reading": {"_STEPS": 64},
    "events": {"REMEMBERED": 50},
    "freshness": {"INTERVALS": 2.0},
    "history": {"_ABANDONED_SECONDS": 3600.0},
    "last_known_good": {"PATIENCE_SECONDS": 5.0},
    "listener": {"WANTED_DESCRIPTORS": 64 * KIB, "_RETRY_SECONDS": 2.0, "_RETRY_EVERY": 0.1},
    "loop_watch": {"_STUCK_SECONDS": 30.0},
    "master": {
        "EX_UNAVAILABLE": 69,
        "_ANNOUNCE_SECONDS": 0.01,
        "_POLICY_SECONDS": 1.0,
        "_CONTROL_SECONDS": 2.0,
        "_EXIT_MARGIN_SECONDS": 5.0,
        "_DEMONSTRATION_DESCRIPTORS": KIB,
    },
    "orphans": {"PAUSE_SECONDS": 1.0},
    "pinned_catalogue": {"_LONGEST_TIMER_SECONDS": 3600.0},
    "postgres": {"_CLIENT_MARGIN_SECONDS": 1.0, "_LOCK_SHARE": 0.8, "_TID_RANGE_SCANS": 140_000, "_NEW_CONNECTIONS": 2},
    "process_limits": {"_OWN_TASKS": 5, "_WORKER_TASKS": 3, "_SMALL_STACK": 64 * KIB},
    "propagation": {
        "BOUNDS": (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 45.0, 60.0, 90.0, 120.0, 300.0, 900.0, 3600.0),
        "_MOST_WAITING": 64,
    },
    "publication_log": {"_NAMES_LOGGED": 10},
    "publication_policy": {"READ_SECONDS": 0.4, "_DISK_SECONDS": 10.0, "_MOST_OCTETS": 256 * KIB, "_MOST_PARTS": 100},
    "publications": {"_SHOWN_DIGITS": 16, "_SHOWN": 10},
    "publisher": {"RECENT": 10, "_SHORT_OCTETS": 4 * MIB, "_RELEASED_CHUNKS": 16},
    "reload": {"_READ_SECONDS": 10.0},
    "resident_memory": {"NOTABLE_OCTETS": 16 * MIB},
    "row_gate": {
        "FIRST_SECONDS": 0.2,
        "FIRST_ROWS": 500,
        "_BATCH_ROWS": 64,
        "_BATCH_OCTETS": MIB,
        "_NAMES_LOGGED": 10,
        "_PAUSES": 3.0,
        "_LONGEST_PAUSE": 1.0,
    },
    "served_catalogue": {"_VERSIONS_REMEMBERED": 1000},
    "status": {"MOST_HELD_COMMANDS": 20, "_NAME_LENGTH": 64},
    "store": {"_MAC_SIZE": 40, "_OTHERS_MAY_WRITE": 0o022, "_ABANDONED_SECONDS": 3600.0},
    "stored_catalogue": {"_HISTORY_TRIED": 3},
    "supervisor": {
        "TICK_SECONDS": 0.25,
        "_FIRST_DELAY": 0.1,
        "_MOST_DELAY": 30.0,
        "_STABLE_SECONDS": 30.0,
        "_LOOP_ENDS": 5,
        "_KILL_MARGIN_SECONDS": 2.0,
    },
    "sync": {"_NAMES_SHOWN": 10},
    "sync_loop": {"RESTORE_AGAIN_SECONDS": 5.0},
    "sync_state": {"MOST_CHANGES": 100},
    "table_reader": {"_PART": 4},
    "table_reading": {
        "BATCH_OCTETS": 8 * MIB,
        "_CLASSES": (1000, 100, 10, 1),
        "ROW_OVERHEAD": 150,
        "_RANGES": KIB,
        "_MOST_RANGES": 8 * KIB,
        "_LEAST_BLOCKS": 8,
        "_LAST_BLOCK": 2**32 - 1,
        "_RUNS": 64,
        "_LONGEST_NAME": 4 * KIB,
    },
    "telemetry": {"LAST_EXPORT_SECONDS": 2.0, "_TICK_SECONDS": 1.0},
    "wishes": {
        "PREFIX_DIGITS": 8,
        "_MOST_ACCEPTED": 100,
        "_MOST_OCTETS": MIB,
        "_MOST_ROWS": 2**31,
        "LATEST_SECONDS": 253_402_300_799,
    },
    "worker_process": {
        "_SEND_AGAIN_SECONDS": 10.0,
        "_DEAF_SECONDS": 5.0,
        "_BURST_MESSAGES": 1000.0,
        "_MESSAGES_PER_SECOND": 50.0,
        "_MESSAGES_PER_ITERATION": 64,
    },
    "worker_stats": {
        "MOST_REQUESTS_PER_SECOND": 20_000_000,
        "MOST_CONNECTIONS": 2_000_000,
        "_MOST_SECONDS_PER_REQUEST": 86_400,
        "_TOLERANCE_SECONDS": 1.0,
    },
}
"""Module → name → value."""


@pytest.mark.parametrize("module", STATED)
def test_the_limits_and_times_of_a_module_have_the_stated_values(module: str) -> None:
    found = vars(import_module(f"definition_server.control_plane.{module}"))
    assert {name: found[name] for name in STATED[module]} == STATED[module]
