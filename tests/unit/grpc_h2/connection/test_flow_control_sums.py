"""The windows of a connection as sums: window, credit and held octets always add up to the size; nothing passes a
window, and no window overflows."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grpc_h2.connection.flow_control import FlowControl, grown
from grpc_h2.wire.errors import ConnectionFault, ErrorCode

SIZE, LARGEST = 100_000, 2**31 - 1
STEPS = st.lists(st.tuples(st.sampled_from(["receive", "release", "commit", "exchange"]), st.integers(0, 60_000)))


@given(STEPS)
def test_window_credit_and_held_octets_always_add_up_to_the_size(steps: list[tuple[str, int]]) -> None:
    flow, held, announced, received = FlowControl(SIZE), 0, 0, 0
    flow.grow(LARGEST - flow.send_window)
    for step, octets in steps:
        left = SIZE + announced - received
        if step == "receive":
            if octets > left:
                continue
            flow.receive(octets)
            held, received = held + octets, received + octets
        elif step == "release":
            octets = min(octets, held)
            announced += flow.give_back(octets)
            held -= octets
        elif step == "commit":
            if octets > left:
                continue
            announced += flow.commit(octets, 1)
            received += octets
        elif flow.exchange(octets, 1):
            assert octets <= left
            received += octets
        flow.check_invariants(held)


@pytest.mark.parametrize(("octets", "fits"), [(SIZE - 1, True), (SIZE, True), (SIZE + 1, False)])
def test_one_octet_beyond_the_connection_window_is_a_flow_control_error(octets: int, fits: bool) -> None:
    for receive in (lambda flow: flow.receive(octets), lambda flow: flow.commit(octets, 0)):
        flow = FlowControl(SIZE)
        if fits:
            receive(flow)
            continue
        with pytest.raises(ConnectionFault, match="DATA beyond the connection's window") as fault:
            receive(flow)
        assert fault.value.code is ErrorCode.FLOW_CONTROL_ERROR


@pytest.mark.parametrize(("octets", "announced"), [(SIZE // 2 - 1, 0), (SIZE // 2, SIZE // 2), (SIZE, SIZE)])
def test_credit_of_half_the_window_is_announced_at_once_and_smaller_credit_is_kept(octets: int, announced: int) -> None:
    flow = FlowControl(SIZE)
    flow.receive(octets)
    assert flow.give_back(octets) == announced
    assert FlowControl(SIZE).commit(octets, 0) == announced
    if not announced:
        flow.receive(1)
        assert flow.give_back(1) == octets + 1, "with what was given back before"


@pytest.mark.parametrize(
    ("received", "sent", "initial", "possible"),
    [
        (10, 10, 10, True),
        (10, 11, 10, False),
        (10, 65_535, 65_535, True),
        (10, 65_536, 65_536, False),
        (SIZE // 2 - 1, 0, 10, True),
        (SIZE // 2, 0, 10, False),
    ],
    ids=["fits", "the stream's window", "all of it", "the connection's window", "little", "an increment is due"],
)
def test_an_exchange_changes_both_windows_or_neither(received: int, sent: int, initial: int, possible: bool) -> None:
    flow = FlowControl(SIZE)
    flow.change_initial(initial)
    assert flow.exchange(received, sent) is possible
    assert flow.send_window == 65_535 - (sent if possible else 0)
    flow.check_invariants(0)
    left = SIZE - (received if possible else 0)
    flow.receive(left)
    with pytest.raises(ConnectionFault):
        flow.receive(1)


@pytest.mark.parametrize(
    ("window", "increment", "found"),
    [(0, 1, 1), (-5, 3, -2), (LARGEST - 1, 1, LARGEST), (LARGEST, 1, None), (1, LARGEST, None), (0, LARGEST, LARGEST)],
)
def test_a_send_window_grows_up_to_the_maximum_of_rfc_9113(window: int, increment: int, found: int | None) -> None:
    assert grown(window, increment) == found


def test_an_increment_beyond_the_largest_window_ends_the_connection() -> None:
    flow = FlowControl(SIZE)
    flow.grow(LARGEST - 65_535)
    assert flow.send_window == LARGEST
    with pytest.raises(ConnectionFault, match="passes 2\\^31 - 1") as fault:
        flow.grow(1)
    assert fault.value.code is ErrorCode.FLOW_CONTROL_ERROR
    assert flow.send_window == LARGEST


def test_another_initial_window_shifts_each_stream_by_the_difference() -> None:
    flow = FlowControl(SIZE)
    assert [flow.change_initial(size) for size in (65_535, 100_000, 0, 7)] == [0, 34_465, -100_000, 7]
    assert flow.initial_send_window == 7


def test_sending_beyond_the_connection_window_raises_an_assertion_error() -> None:
    flow = FlowControl(SIZE)
    flow.spend(65_000)
    flow.spend(535)
    assert flow.send_window == 0
    with pytest.raises(AssertionError, match="beyond the connection's window"):
        flow.spend(1)
    with pytest.raises(AssertionError, match="beyond the connection's window"):
        FlowControl(SIZE).commit(0, 65_536)
