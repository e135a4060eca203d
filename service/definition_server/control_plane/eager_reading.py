"""Reads the octets that a socket already holds, without going through the event loop for each piece.

libpq reads at most 16 kB from its socket in one call, unless a single message is longer. Psycopg waits in the event
loop before each call, which costs more than reading 16 kB.
"""

from __future__ import annotations

import select
from collections.abc import Generator
from typing import TypeVar

R = TypeVar("R")

_STEPS = 64
"""After so many calls the event loop continues. They read a mebibyte, which takes one or two milliseconds."""


def eager(steps: Generator[int, int, R], descriptor: int, *, to_read: int, readable: int) -> Generator[int, int, R]:
    """Run ``steps``, a generator that yields the event that it waits for. If it waits for octets and the socket holds
    some, it continues at once.

    Args:
        steps: The generator; the event for which its socket is ready is sent to it.
        descriptor: The descriptor of the socket.
        to_read: The value that ``steps`` yields to wait for octets.
        readable: The value that is sent to ``steps`` when there are octets.
    """
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    at_once = 0
    try:
        wanted = next(steps)
        while True:
            if wanted == to_read and at_once < _STEPS and poll.poll(0):
                at_once += 1
                wanted = steps.send(readable)
            else:
                at_once = 0
                wanted = steps.send((yield wanted))
    except StopIteration as end:
        result: R = end.value
        return result
