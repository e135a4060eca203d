"""Octets that a socket holds already are read without the event loop; for later octets, the event loop waits."""

from __future__ import annotations

import socket
from collections.abc import Generator, Iterator

import pytest

from definition_server.control_plane.eager_reading import _STEPS, eager

READ, WRITE, READABLE = 1, 2, 1


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def operation(ours: socket.socket, pieces: int, sent: list[object]) -> Generator[int, int, str]:
    """An operation that writes, and then reads ``pieces`` of one octet. Notes the octets that are ``sent`` to it."""
    sent.append((yield WRITE))
    for _ in range(pieces):
        sent.append((yield READ))
        ours.recv(1)
    return "done"


def test_available_octets_are_read_at_once_and_the_loop_waits_for_the_rest(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    sent: list[object] = []
    steps = eager(operation(ours, 4, sent), ours.fileno(), to_read=READ, readable=READABLE)
    theirs.send(b"abc")
    assert next(steps) == WRITE  # the socket is readable, but the operation does not wait for that
    assert steps.send(7) == READ  # three pieces are read; the fourth has not arrived
    assert sent == [7, READABLE, READABLE, READABLE]
    theirs.send(b"d")
    with pytest.raises(StopIteration) as end:
        steps.send(9)
    assert (end.value.value, sent[-1]) == ("done", 9)


def test_the_event_loop_runs_other_tasks_after_a_number_of_steps(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.send(bytes(3 * _STEPS))
    turns = eager(operation(ours, 3 * _STEPS, []), ours.fileno(), to_read=READ, readable=READABLE)
    # each turn of the loop is followed by one step, and then by this many steps at once
    assert [next(turns), *turns] == [WRITE, READ, READ]


def test_eager_reading_does_not_change_errors_or_cancellation_of_an_operation(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = ends
    steps = operation(ours, 1, [])
    wrapped = eager(steps, ours.fileno(), to_read=READ, readable=READABLE)
    next(wrapped)
    theirs.send(b"a")
    ours.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        wrapped.send(0)
    given_up = operation(theirs, 1, [])
    wrapped = eager(given_up, theirs.fileno(), to_read=READ, readable=READABLE)
    next(wrapped)
    wrapped.close()
