"""States the limits of gRPC's messages and fields. Other tests import them, so they would accept any value.

The module of each value gives the reason for it. A changed value must be changed here, too.
"""

from __future__ import annotations

from tests.support.stated import deviations

KIB, MIB = 1024, 1024 * 1024

STATED: dict[str, dict[str, object]] = {
    "messages": {
        "DEFAULT_LIMIT": 4 * MIB,
        "MESSAGES_AT_ONCE": 64,
        "INFLATIONS_AT_ONCE": 8,
        "INFLATED_AT_ONCE": 16 * KIB,
        "PREFIX_SIZE": 5,
        "_WINDOW_BITS": {"gzip": 31, "deflate": 15},
        "_LEVEL": 3,
        "MessageReader.__init__(unary)": False,
        "message_prefix(compressed)": False,
        "frame_message(compress)": False,
    },
    "requests": {
        "_MULTIPLES": {72: 3600, 77: 60, 83: 1},
        "_FRACTIONS": {109: 1000, 117: 1_000_000, 110: 1_000_000_000},
        "_MOST_LENGTH_DIGITS": 18,
        "_MOST_BINARY_VALUES": 100,
        "_MOST_VERDICTS": 1024,
        "_LONGEST_REMEMBERED": 512,
        "_LONGEST_LOGGED": 64,
    },
    "responses": {"MAX_TRAILERS": 8 * KIB, "_SURELY_FITS": 500},
    "status": {
        "StatusCode.OK": 0,
        "StatusCode.CANCELLED": 1,
        "StatusCode.UNKNOWN": 2,
        "StatusCode.INVALID_ARGUMENT": 3,
        "StatusCode.DEADLINE_EXCEEDED": 4,
        "StatusCode.NOT_FOUND": 5,
        "StatusCode.ALREADY_EXISTS": 6,
        "StatusCode.PERMISSION_DENIED": 7,
        "StatusCode.RESOURCE_EXHAUSTED": 8,
        "StatusCode.FAILED_PRECONDITION": 9,
        "StatusCode.ABORTED": 10,
        "StatusCode.OUT_OF_RANGE": 11,
        "StatusCode.UNIMPLEMENTED": 12,
        "StatusCode.INTERNAL": 13,
        "StatusCode.UNAVAILABLE": 14,
        "StatusCode.DATA_LOSS": 15,
        "StatusCode.UNAUTHENTICATED": 16,
    },
}
"""Module → name → value."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("grpc_h2.rpc", STATED) == []
