"""The octets that all connections hold: their sum equals that of the shares; above the limit, the heaviest connection
ends."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.connection.budget import Budget, Share

LIMIT = 1000


class Connections:
    """Connections that end when the budget evicts them; each end is noted."""

    def __init__(self, count: int, limit: int = LIMIT, *, unread: int = 0) -> None:
        """``unread``: the octets that the transport of an ended connection still holds."""
        self.budget = Budget(limit)
        self.ended: list[int] = []
        self.unread = unread
        self.shares = [self._join(number) for number in range(count)]

    def _join(self, number: int) -> Share:
        def evict() -> None:
            self.ended.append(number)
            share = self.shares[number]
            if self.unread:
                share.hold(min(share.octets, self.unread))
            else:
                share.leave()

        return self.budget.join(evict)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=60))
def test_the_sum_of_all_shares_is_exact_and_never_above_the_limit(moves: list[tuple[int, int]]) -> None:
    connections = Connections(6)
    for number, octets in moves:
        if number in connections.ended:
            continue
        connections.shares[number].hold(octets)
        connections.budget.check_invariants()
        assert connections.budget.held == sum(share.octets for share in connections.shares) <= LIMIT
    assert connections.budget.evictions == len(connections.ended)


@pytest.mark.parametrize(("octets", "ends"), [(LIMIT, []), (LIMIT + 1, [0])])
def test_a_connection_may_hold_the_limit_and_ends_one_octet_above_it(octets: int, ends: list[int]) -> None:
    connections = Connections(1)
    connections.shares[0].hold(octets)
    assert connections.ended == ends
    assert connections.budget.evictions == len(ends)


def test_the_connection_that_holds_most_ends_even_if_another_one_passes_the_limit() -> None:
    connections = Connections(4)
    for number, octets in enumerate((260, 300, 270, 1)):
        connections.shares[number].hold(octets)
    connections.shares[3].hold(200)
    assert connections.ended == [1]
    assert connections.budget.held == 260 + 270 + 200


def test_a_connection_in_the_highest_size_class_ends_before_those_of_a_lower_class() -> None:
    connections = Connections(4)
    for number, octets in enumerate((255, 255, 255, 256)):
        connections.shares[number].hold(octets)
    assert connections.ended == [3]


def test_a_connection_that_reduces_its_share_evicts_no_connection() -> None:
    connections = Connections(2)
    connections.shares[0].hold(600)
    connections.budget.limit = 500
    connections.shares[0].hold(550)
    connections.shares[0].hold(550)
    assert connections.ended == []
    connections.shares[1].hold(1)
    assert connections.ended == [0]


def test_a_connection_that_has_left_holds_nothing_and_is_not_evicted() -> None:
    connections = Connections(1)
    connections.shares[0].hold(10)
    connections.shares[0].leave()
    connections.shares[0].evict()
    assert connections.ended == []
    assert connections.budget.held == 0
    connections.budget.check_invariants()


def test_only_the_first_256_connections_are_compared() -> None:
    connections = Connections(300, limit=300 * 600)
    for number, share in enumerate(connections.shares):
        share.hold(520 if number < 299 else 1000)
    connections.shares[100].hold(600)
    connections.budget.limit = 1
    connections.shares[0].hold(521)
    assert connections.ended == [100], "the last one is heavier, and not looked at"


def test_a_connection_whose_transport_still_holds_octets_after_its_end_is_not_chosen_again() -> None:
    connections = Connections(4, unread=500)
    for number, octets in enumerate((500, 400, 90, 0)):
        connections.shares[number].hold(octets)
    connections.shares[3].hold(11)
    assert connections.ended == [0]
    assert connections.budget.held == 1001, "the octets are included until they are released"
    connections.shares[3].hold(12)
    assert connections.ended == [0, 1], "the next largest one ends"
    connections.budget.check_invariants()
    for number in (0, 1):
        connections.shares[number].leave()
    assert connections.budget.held == 90 + 12
    connections.budget.check_invariants()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 700)), max_size=60), st.integers(1, 400))
def test_each_addition_above_the_limit_ends_one_more_connection(moves: list[tuple[int, int]], unread: int) -> None:
    connections = Connections(6, unread=unread)
    budget, ended = connections.budget, connections.ended
    for number, octets in moves:
        if number in ended:
            continue
        share, before = connections.shares[number], len(ended)
        above = octets > share.octets and budget.held - share.octets + octets > LIMIT
        share.hold(octets)
        assert len(ended) == len(set(ended)) == before + above
        assert budget.held == sum(each.octets for each in connections.shares)
        budget.check_invariants()
