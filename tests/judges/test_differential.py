"""Our engine and grpcio get the same octets, frame by frame, and every difference between their answers is intended.

A row (``rows_framing.py``, ``rows_calls.py``) states the demanded answer. Our engine must give it, from a handler and
from a static method; grpcio must give it or the answer that ``deviations.py`` records, so that the list of differences
is true and complete for the version of grpcio that is installed.
"""

from __future__ import annotations

import pytest
from tests.judges.deviations import GRPCIO
from tests.judges.outcome import outcome
from tests.judges.rows_calls import CALLS
from tests.judges.rows_framing import FRAMING, UNARY, Row
from tests.support.requirements import PAGE, rows

ROWS = FRAMING + CALLS
READY = b"/judges.Rows/Ready"
every_row = pytest.mark.parametrize("row", ROWS, ids=str)


def ask(port: int, row: Row, octets: bytes, expected: tuple[str, ...]) -> str:
    silence = any("open" in line for line in expected)
    got = outcome(port, octets, streams=row.streams, hello=row.hello, body=row.body, silence=silence)
    # An RST_STREAM after an early status depends on how much of the request arrives, and when (requirement A45).
    return got.replace("+S:NO_ERROR", "")


@every_row
def test_a_handler_on_our_engine_gives_the_demanded_answer(native: int, row: Row) -> None:
    assert ask(native, row, row.octets, row.demanded) in row.demanded


@pytest.mark.parametrize("row", [row for row in ROWS if UNARY in row.octets], ids=str)
def test_a_static_method_of_our_engine_gives_the_demanded_answer(native: int, row: Row) -> None:
    # The paths have the same length, so nothing else changes.
    assert ask(native, row, row.octets.replace(UNARY, READY), row.demanded) in row.demanded


@every_row
def test_grpcio_gives_the_demanded_answer_or_the_recorded_one(grpcio: int, row: Row) -> None:
    expected = (GRPCIO[str(row)],) if str(row) in GRPCIO else row.demanded
    if any(line.startswith("C:") for line in expected):
        # C-core mostly closes without GOAWAY, or the TCP reset overtakes it, so only the end of the connection is
        # compared.
        expected += ("closed",)
    assert ask(grpcio, row, row.octets, expected) in expected


def test_rows_have_unique_names_and_deviations_belong_to_rows() -> None:
    names = [str(row) for row in ROWS]
    assert len(set(names)) == len(names)
    assert set(GRPCIO) <= set(names)


def test_rows_name_requirements_that_exist() -> None:
    assert {row.row for row in ROWS} <= rows(PAGE.read_text()).keys()
