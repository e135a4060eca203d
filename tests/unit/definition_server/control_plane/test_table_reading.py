"""Batches by size, and which columns are taken for what: the arithmetic of a reading, without a database."""

from __future__ import annotations

import pytest

from definition_server.control_plane.table_reading import BATCH_OCTETS, Column, classes, rows_of_batch

MB = 1024 * 1024


@pytest.mark.parametrize("most", [1, 8 * 1024, MB, 8 * MB, 64 * MB])
def test_a_batch_of_the_largest_rows_of_its_class_stays_within_the_size_of_a_batch_unless_it_is_one_row(
    most: int,
) -> None:
    for rows, largest in classes(most):
        assert rows >= 1
        assert rows * largest <= BATCH_OCTETS or rows == 1


def test_small_rows_are_read_by_the_thousand_and_large_ones_alone() -> None:
    assert BATCH_OCTETS == 8 * MB
    assert classes(64 * MB) == [(1000, 8388), (100, 83886), (10, 838860), (1, 8 * MB), (1, 64 * MB)]
    assert classes(MB) == [(1000, 8388), (100, 83886), (10, 838860), (8, MB)]


def test_a_batch_has_as_many_rows_as_its_class_and_names_alone_come_by_the_thousand() -> None:
    assert [rows_of_batch(number, MB) for number in range(4)] == [1000, 100, 10, 8]
    assert rows_of_batch(4, MB) == 1000, "rows that are too large: only their names are read"


@pytest.mark.parametrize(
    ("type_", "ours", "octets", "whole"),
    [
        ("bytea", True, True, False),
        ("bytea", False, False, False),
        ("int8", True, False, True),
        ("int8", False, False, False),
        ("text", True, False, False),
    ],
    ids=["bytea", "another bytea", "int8", "another int8", "text"],
)
def test_only_types_of_postgresql_count_as_octets_or_whole_numbers(
    type_: str, ours: bool, octets: bool, whole: bool
) -> None:
    column = Column(type_, "b", ours, False, "", True)
    assert column.octets is octets
    assert column.whole_number is whole
