"""A memory of two generations: used entries stay, unused entries are dropped, and no more than two generations are
held."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.wire.generations import TwoGenerations


class Squares(TwoGenerations[int, int]):
    """Number → its square. Notes the numbers that it had to compute, and the generations that it drops."""

    def __init__(self, generation: int) -> None:
        super().__init__(generation)
        self.computed: list[int] = []
        self.dropped: list[set[int]] = []

    def __missing__(self, key: int) -> int:
        value = self.recall(key)
        if value is None:
            self.computed.append(key)
            value = key * key
        self.remember(key, value)
        return value

    def drop(self, generation: dict[int, int]) -> None:
        self.dropped.append(set(generation))


@pytest.mark.interpreted
@given(st.integers(1, 5), st.lists(st.integers(0, 12), max_size=60))
def test_a_memory_answers_correctly_and_holds_two_generations_at_most(generation: int, keys: list[int]) -> None:
    squares = Squares(generation)
    for key in keys:
        assert squares[key] == key * key
        assert squares.held == len(squares) + len(squares.old) <= 2 * generation
    assert sorted({*squares, *squares.old, *(key for old in squares.dropped for key in old)}) == sorted(set(keys))


@pytest.mark.interpreted
def test_a_full_generation_becomes_the_old_one_and_the_old_one_is_dropped() -> None:
    squares = Squares(2)
    for key in (1, 2, 3):
        squares[key]
    assert (set(squares), set(squares.old), squares.dropped) == ({3}, {1, 2}, [set()])
    assert squares.recall(1) == 1
    assert squares.recall(3) is None, "it is young"
    squares[1]
    assert squares.computed == [1, 2, 3], "it was recalled"
    assert set(squares) == {3, 1}
    squares[4]
    assert (set(squares), set(squares.old), squares.dropped) == ({4}, {3, 1}, [set(), {1, 2}])
    squares.replace_old({9: 81})
    assert (squares.old, squares.dropped[-1]) == ({9: 81}, {3, 1})
