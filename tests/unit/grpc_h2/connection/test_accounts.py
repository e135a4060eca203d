"""A connection gives back the octets that it holds for a call with each message that is taken, and when the call ends.
The limits here are small, and the messages of a test add up to many times each limit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tests.support.h2_peer import HANDLED, Peer
from tests.support.h2_wire import data, grpc_message, headers, request_block, rst_stream, window_update

from grpc_h2.connection.limits import Limits

SMALL = Limits(max_message=1_000, max_unread=2_000, max_buffered=2_000, glitches=100_000)
"""A message of 100 octets counts as 228 unread octets."""
MESSAGE = grpc_message(bytes(100))


def opened(peer: Peer, stream: int) -> None:
    """Begin a call that has a handler."""
    peer.send(headers(stream, request_block(HANDLED), end_stream=False))


@pytest.mark.parametrize("size", [0, 1, 100, 900])
@pytest.mark.parametrize("together", [1, 3])
def test_messages_that_a_handler_takes_leave_nothing_unread(size: int, together: int) -> None:
    messages = together if size < 500 else 1
    peer = Peer(limits=SMALL).send(window_update(0, 2**28))
    opened(peer, 1)
    for _ in range(100):
        peer.send(data(1, grpc_message(bytes(size)) * messages))
    assert len(peer.received[1]) == 100 * messages
    assert peer.result(1).status is None
    peer.send(data(1, b"", end_stream=True))
    peer.answer(1, b"all")
    peer.assert_answered(1, b"all")


@pytest.mark.parametrize(
    "end",
    [
        lambda peer, stream: peer.send(rst_stream(stream, 8)),
        lambda peer, stream: peer.answer(stream, status=9),
        lambda peer, stream: peer.send(data(stream, b"", end_stream=True)),
    ],
    ids=["reset by the client", "answered early", "cut within a message"],
)
def test_a_call_that_ends_leaves_none_of_its_messages_unread(end: Callable[[Peer, int], object]) -> None:
    peer = Peer(limits=SMALL, consumes=False).send(window_update(0, 2**28))
    for stream in range(1, 201, 2):
        opened(peer, stream)
        peer.send(data(stream, MESSAGE * 4), data(stream, MESSAGE[:-1]))
        assert len(peer.received[stream]) == 4
        assert peer.result(stream).status is None, f"refused after {stream // 2} calls"
        end(peer, stream)
    peer.assert_alive()


def test_only_the_call_whose_unread_messages_pass_the_limit_fails() -> None:
    peer = Peer(limits=SMALL, consumes=False)
    opened(peer, 1)
    peer.send(data(1, MESSAGE * 8))
    assert peer.result(1).status is None, "1,824 octets"
    opened(peer, 3)
    peer.send(data(3, MESSAGE))
    assert peer.result(3).status == 8, "2,052 octets"
    assert peer.result(1).status is None
    peer.answer(1, b"x")
    assert (peer.result(1).status, peer.result(1).messages) == (0, [b"x"])
    opened(peer, 5)
    peer.send(data(5, MESSAGE * 8))
    assert peer.result(5).status is None
