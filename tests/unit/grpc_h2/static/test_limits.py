"""States the limits of ready answers. Other tests import them, so they would accept any value.

The module of each value gives the reason for it. A changed value must be changed here, too.
"""

from __future__ import annotations

from tests.support.stated import deviations

KIB = 1024

STATED: dict[str, dict[str, object]] = {
    "answer_cache": {
        "REMEMBERED_ANSWERS": 4 * KIB,
        "REMEMBERED_FAILURES": 256,
        "RELEASED_AT_ONCE": 8,
        "_LARGEST_REMEMBERED_REQUEST": 256,
    },
    "answers": {
        "LARGEST_FRAMED": 320 * KIB,
        "_SHORT_MESSAGE": 400,
        "_MOST_METADATA": 2048,
        "StaticAnswer.__init__(lasting)": True,
        "StaticAnswer.unary(answer_id)": 0,
        "StaticAnswer.failure(answer_id)": 0,
        "StaticAnswer.failure(lasting)": True,
    },
    "routes": {
        "_REMEMBERED_ROUTES": 256,
        "_LARGEST_REMEMBERED_FIELDS": 1024,
        "UNKNOWN_LENGTH": -1,
        "Route.__init__(weight)": 0,
    },
}
"""Module → name → value."""


def test_the_numbers_of_each_module_equal_the_stated_ones() -> None:
    assert deviations("grpc_h2.static", STATED) == []
