"""Frame by frame, our engine and grpcio are asked the same things, and every difference is one that is wanted.

A row (``rows_framing.py``, ``rows_calls.py``) says what is demanded. Our engine must do that, by way of a handler and
by way of a static-unary door; grpcio must do the same or what ``deviations.py`` records of it, so that the list of
differences is true and complete for the version of grpcio that is installed.
"""

from __future__ import annotations

import pytest
from tests.judges.deviations import GRPCIO
from tests.judges.outcome import outcome
from tests.judges.rows_calls import CALLS
from tests.judges.rows_framing import FRAMING, UNARY, Row

ROWS = FRAMING + CALLS
DOOR = b"/judges.Rows/Ready"
RESET_AFTER_STATUS = 45
"""The row about the RST_STREAM behind an early status. In other rows it depends on how far the server has read."""

every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def ask(port: int, row: Row, octets: bytes, expected: tuple[str, ...]) -> str:
    silence = any("open" in line for line in expected)
    got = outcome(port, octets, streams=row.streams, hello=row.hello, body=row.body, silence=silence)
    return got if row.row == RESET_AFTER_STATUS else got.replace("+S:NO_ERROR", "")


@every_row
def test_a_handler_on_our_engine_does_what_is_demanded(native: int, row: Row) -> None:
    assert ask(native, row, row.octets, row.demanded) in row.demanded


@pytest.mark.parametrize("row", [row for row in ROWS if UNARY in row.octets], ids=str)
def test_a_static_door_of_our_engine_does_what_is_demanded(native: int, row: Row) -> None:
    # The paths are of one length, so nothing else changes.
    assert ask(native, row, row.octets.replace(UNARY, DOOR), row.demanded) in row.demanded


@every_row
def test_grpcio_does_the_same_or_what_is_recorded(grpcio: int, row: Row) -> None:
    expected = (GRPCIO[str(row)],) if str(row) in GRPCIO else row.demanded
    if any(line.startswith("C:") for line in expected):
        # C-core mostly closes without GOAWAY, or the TCP reset overtakes it: that the connection ends is what counts.
        expected += ("closed",)
    assert ask(grpcio, row, row.octets, expected) in expected


def test_rows_are_told_apart_and_deviations_belong_to_rows() -> None:
    names = [str(row) for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(GRPCIO) <= set(names)
