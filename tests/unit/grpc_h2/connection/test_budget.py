"""The budget of all connections together: the memory that is included, and the connection that ends when the budget is
exceeded."""

from __future__ import annotations

from math import inf

import pytest
from tests.support.h2_peer import HANDLED, Peer, some_router
from tests.support.h2_wire import (
    ENHANCE_YOUR_CALM,
    HELLO,
    INITIAL_WINDOW_SIZE,
    SETTINGS_ACK,
    continuation,
    data,
    grpc_message,
    headers,
    request_block,
    settings,
)

from grpc_h2 import Budget, Connection, Limits, StaticAnswer

KIB = 1024
QUIET = Limits(keepalive_time=inf)


def sharing(budget: Budget, evicted: list[Connection] | None = None) -> Peer:
    """A client of one of the connections that share ``budget``."""
    peer = Peer(limits=QUIET, hello=None)
    peer.connection = connection = Connection(
        some_router(),
        QUIET,
        peer.now,
        budget=budget,
        on_eviction=None if evicted is None else lambda: evicted.append(connection),
    )
    return peer.send(HELLO, SETTINGS_ACK)


def partly(stream: int, octets: int) -> bytes:
    """A call with a handler, and ``octets`` of an incomplete message."""
    body = grpc_message(bytes(2 * octets))[:octets]
    cut = [body[at : at + 16_384] for at in range(0, octets, 16_384)]
    return headers(stream, request_block(HANDLED)) + b"".join(data(stream, piece) for piece in cut)


@pytest.mark.requirement("B-held-octets")
def test_an_idle_connection_and_calls_that_were_answered_hold_nothing():
    budget = Budget(1024 * KIB)
    peer = sharing(budget)
    for _ in range(3):
        peer.assert_alive()
    assert budget.held == 0
    budget.check_invariants()


@pytest.mark.requirement("B-held-octets")
@pytest.mark.parametrize(
    ("octets", "least"),
    [
        (partly(1, 50 * KIB), 50 * KIB),
        (headers(1, request_block(HANDLED)) + data(1, grpc_message(bytes(10 * KIB))), 10 * KIB),
        (headers(1, bytes(16_000), end_headers=False) + continuation(1, bytes(10_000)), 26_000),
        (b"".join(headers(stream, request_block(HANDLED)) for stream in range(1, 41, 2)), 20 * KIB),
        (b"".join(headers(stream, request_block()) for stream in range(1, 41, 2)) + bytes(3), 10 * KIB),
        (headers(1, request_block(HANDLED, x_long=b"v" * 8000)), 8000),
        (data(1, bytes(9 * KIB))[: 8 * KIB], 8 * KIB),
    ],
    ids=["partial message", "unread message", "header block", "streams", "waiting", "long fields", "part of a frame"],
)
def test_memory_of_a_connection_is_reported_and_given_back_at_its_end(octets: bytes, least: int):
    budget = Budget(1024 * KIB)
    peer = sharing(budget)
    peer._consumes = False
    peer.send(octets)
    assert least <= budget.held <= 8 * least
    assert budget.held == peer.connection.held
    budget.check_invariants()
    peer.connection.connection_lost()
    assert budget.held == 0
    budget.check_invariants()


@pytest.mark.requirement("B-held-octets")
def test_waiting_output_is_included_unless_it_is_a_view_of_the_application_s_memory():
    budget = Budget(1024 * KIB)
    for made, least, most in (
        (bytes(100 * KIB), 100 * KIB, 110 * KIB),
        (memoryview(bytearray(100 * KIB)), 0, 10 * KIB),
    ):
        peer = sharing(budget)
        answer = StaticAnswer.unary(made)
        _ = peer.connection._calls
        router = some_router()
        router.add_static_unary("/t.S/Large", lambda message, answer=answer: answer)
        peer.connection = Connection(router, QUIET, peer.now, budget=budget)
        peer.send(HELLO, settings((INITIAL_WINDOW_SIZE, 10_000)))
        peer.send(headers(1, request_block(b"/t.S/Large")), data(1, grpc_message(b"world"), end_stream=True))
        assert least - 10_000 <= budget.held <= most
        peer.connection.check_invariants()
        peer.connection.connection_lost()
        assert budget.held == 0


@pytest.mark.requirement("B-held-octets")
def test_unsent_octets_of_the_transport_are_included_while_it_is_paused():
    budget = Budget(1024 * KIB)
    peer = sharing(budget)
    peer.connection.pause_writing(peer.now, 70_000)
    assert budget.held == 70_000
    peer.connection.resume_writing(peer.now)
    assert budget.held == 0


@pytest.mark.requirement("B-held-octets")
def test_beyond_the_budget_the_connection_that_holds_most_ends_and_the_others_continue():
    evicted: list[Connection] = []
    budget = Budget(340 * KIB)
    small = [sharing(budget, evicted) for _ in range(5)]
    heavy = sharing(budget, evicted)
    heavy.send(partly(1, 200 * KIB))
    for peer in small:
        peer.send(partly(1, 15 * KIB))
    assert heavy.code is None
    small[0].send(partly(3, 25 * KIB), partly(5, 25 * KIB))
    heavy.read()
    assert evicted == [heavy.connection], "the protocol of the ended connection is notified once"
    assert heavy.code == ENHANCE_YOUR_CALM
    assert heavy.replies.goaways[-1][2] == b"the server is short of memory, and this connection holds most"
    heavy._take_events(heavy.connection.take_events())
    assert heavy.closing is not None
    assert heavy.cancelled == {1: 8}
    for peer in small:
        peer.assert_alive()
    assert budget.evictions == 1
    assert budget.held < 340 * KIB
    budget.check_invariants()


@pytest.mark.requirement("B-held-octets")
def test_a_connection_that_exceeds_the_budget_alone_ends_itself():
    budget = Budget(64 * KIB)
    peer = sharing(budget).send(partly(1, 100 * KIB))
    peer.assert_closed(ENHANCE_YOUR_CALM)
    assert budget.held == 0


@pytest.mark.requirement("B-held-octets")
def test_many_connections_of_equal_weight_stay_within_the_budget():
    budget = Budget(1024 * KIB)
    peers = [sharing(budget) for _ in range(600)]
    for stream in (1, 3, 5):
        for peer in peers:
            if not peer.connection.terminated:
                peer.send(partly(stream, KIB))
            assert budget.held <= 1024 * KIB
    budget.check_invariants()
    assert 0 < sum(not peer.connection.terminated for peer in peers) < 600


@pytest.mark.requirement("B-held-octets")
def test_a_connection_that_changes_its_budget_is_included_only_in_the_new_one():
    strangers, clients = Budget(64 * KIB), Budget(1024 * KIB)
    peer = sharing(strangers).send(partly(1, 40 * KIB))
    held = strangers.held
    assert held >= 40 * KIB
    peer.connection.count_in(clients)
    assert (strangers.held, clients.held) == (0, held)
    peer.send(partly(3, 60 * KIB)).assert_alive()
    peer.connection.connection_lost()
    assert clients.held == 0
    for each in (strangers, clients):
        each.check_invariants()


def test_a_connection_that_is_drained_before_its_preface_is_whole_holds_no_memory_afterwards():
    budget = Budget(1024 * KIB)
    connection = Connection(some_router(), QUIET, 0.0, budget=budget)
    connection.receive_data(HELLO[:20], 0.0)
    held = budget.held
    connection.drain(1.0)
    assert budget.held == connection.held < held
