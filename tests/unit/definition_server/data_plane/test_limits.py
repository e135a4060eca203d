"""States the limits and times of a worker. Other tests import them, so they would accept any value.

The module of each value gives the reason for it. A changed value must be changed here, too.
"""

from __future__ import annotations

from tests.support.stated import deviations

KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "allocator": {
        "NOTABLE_GROWTH": 16 * MIB,
        "INTERVAL_SECONDS": 5.0,
        "LONGEST_INTERVAL_SECONDS": 600.0,
        "_LITTLE": 4 * MIB,
        "CHECK_SECONDS": 1.0,
        "_IDLE_SHARE": 0.5,
        "_STILL": MIB,
        "_STATM_OCTETS": 128,
    },
    "balance": {
        "FRESH_SECONDS": 1.0,
        "PATIENCE_SECONDS": 0.05,
        "MOST_PATIENCE_SECONDS": 1.0,
        "DOUBT_SECONDS": 1.0,
        "STORM_SECONDS": 0.01,
        "_LENIENCE": 16,
        "_RETRY_SECONDS": 0.001,
        "FULL_LOGGED_SECONDS": 10.0,
        "_BREAK_SECONDS": 0.02,
        "Balancer.__init__(limit)": 0,
    },
    "call_sampling": {"MOST_NOTED": 50},
    "health": {
        "_SERVING": 1,
        "_NOT_SERVING": 2,
        "_UNKNOWN": 3,
        "_STATUS": 1,
        "_STATUSES": 1,
        "_KEY": 1,
        "_VALUE": 2,
        "_LAST_WRITE_SECONDS": 1.0,
        "_WOKEN_AT_ONCE": 2,
    },
    "reflection": {"_NOT_FOUND": 5},
    "requests": {
        "_TEXT": 1,
        "_FIXED64": 1,
        "_GROUP": 3,
        "_GROUP_END": 4,
        "_FIXED32": 5,
        "_FIXED_SIZES": {1: 8, 5: 4},
        "_SHORT_OCTETS": 5,
        "_LARGEST_TAG": 2**32 - 1,
        "_DEEPEST": 100,
    },
    "services": {
        "MAX_REQUEST": 4 * KIB,
        "_VERSION_DIGITS": 16,
        "_NAME_TAG": 10,
        "_LONGEST_NAME_SHOWN": 200,
        "DefinitionEngine.__init__(names_version)": True,
    },
    "swap": {"OLD_SNAPSHOTS": 4},
    "transports.first_calls": {"_FIRST_CALLS_SECONDS": 10.0},
    "transports.grpcio": {"_PING_TOLERANCE": 0.8},
    "transports.native": {"_MOST_UNFINISHED": 512 * KIB, "_MOST_UNREAD": MIB, "_FIRST_CALL_SECONDS": 30.0},
    "warmup": {"_YOUNG_OBJECTS": 5000, "_YOUNG_COLLECTIONS": 2, "_MIDDLE_COLLECTIONS": 40},
    "worker": {
        "EXIT_CANNOT_START": 3,
        "EXIT_ORPHANED": 4,
        "_BEAT_SECONDS": 0.25,
        "_EXIT_MARGIN_SECONDS": 5.0,
        "_KEYS_REPORT_SECONDS": 1.0,
        "_CALLS_REPORT_SECONDS": 1.0,
        "_KEYS_SEEN_AGAIN_SECONDS": 10.0,
        "_CONNECTIONS_PER_SECOND": 100,
    },
}
"""Module → name → value."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("definition_server.data_plane", STATED) == []
