"""The states of stream, response and connection: only the transitions in the diagrams are legal."""

from __future__ import annotations

from enum import Enum
from itertools import product

import pytest

from grpc_h2.connection.state import INTRODUCED, ConnectionState, Lifecycle, ResponseState, StreamState

LEGAL: dict[type[Enum], set[tuple[str, str]]] = {
    StreamState: {
        ("IDLE", "OPEN"),
        ("OPEN", "HALF_CLOSED_REMOTE"),
        ("OPEN", "HALF_CLOSED_LOCAL"),
        ("OPEN", "CLOSED"),
        ("HALF_CLOSED_REMOTE", "CLOSED"),
        ("HALF_CLOSED_LOCAL", "CLOSED"),
    },
    ResponseState: {
        ("NOTHING_SENT", "HEADERS_SENT"),
        ("NOTHING_SENT", "TRAILERS_ONLY"),
        ("HEADERS_SENT", "END_QUEUED"),
        ("HEADERS_SENT", "END_SENT"),
        ("END_QUEUED", "END_SENT"),
    },
    ConnectionState: {
        ("AWAITS_PREFACE", "AWAITS_SETTINGS"),
        ("AWAITS_SETTINGS", "OPEN"),
        ("OPEN", "DRAINING"),
        ("DRAINING", "LEAVING"),
        *((state, "CLOSED") for state in ("AWAITS_PREFACE", "AWAITS_SETTINGS", "OPEN", "DRAINING", "LEAVING")),
    },
}


@pytest.mark.parametrize("states", LEGAL)
def test_only_the_transitions_in_the_diagram_are_legal(states: type[Enum]) -> None:
    found = {(one.name, other.name) for one, other in product(states, states) if other in one.following}
    assert found == LEGAL[states]


def test_a_connection_accepts_calls_only_while_it_is_open_or_drains() -> None:
    lifecycle = Lifecycle()
    flags = [(lifecycle.state.name, lifecycle.accepting, lifecycle.closed)]
    for state in list(ConnectionState)[1:]:
        lifecycle.enter(state)
        flags.append((lifecycle.state.name, lifecycle.accepting, lifecycle.closed))
    assert flags == [
        ("AWAITS_PREFACE", False, False), ("AWAITS_SETTINGS", False, False), ("OPEN", True, False),
        ("DRAINING", True, False), ("LEAVING", False, False), ("CLOSED", False, True),
    ]  # fmt: skip
    assert [state.name for state in INTRODUCED] == ["OPEN", "DRAINING", "LEAVING"]


def test_a_transition_that_is_not_in_the_diagram_raises_an_assertion_error() -> None:
    lifecycle = Lifecycle()
    with pytest.raises(AssertionError, match="AWAITS_PREFACE"):
        lifecycle.enter(ConnectionState.LEAVING)
    lifecycle.enter(ConnectionState.CLOSED)
    with pytest.raises(AssertionError):
        lifecycle.enter(ConnectionState.CLOSED)
