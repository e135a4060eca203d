"""Octets that have arrived and have not been processed."""

from __future__ import annotations

from grpc_h2.wire import frames
from grpc_h2.wire.errors import ConnectionFault, ErrorCode


class InputBuffer:
    """The octets of ``held`` from ``position`` on have not been processed."""

    __slots__ = ("backlog", "held", "position")

    def __init__(self) -> None:
        self.held = b""
        self.position = 0
        self.backlog = False
        """Whether the held octets can be processed without further input."""

    def add(self, data: bytes) -> None:
        """``data`` has arrived."""
        self.held = self.held[self.position :] + data if self.held else data
        self.position = 0
        self.backlog = True

    def keep(self, data: bytes, position: int, *, backlog: bool) -> None:
        """Hold only the octets of ``data`` from ``position`` on. ``backlog``: whether these octets can be processed
        without further input; otherwise they are an incomplete frame."""
        self.backlog = backlog
        if position == len(data):
            self.held, self.position = b"", 0
        elif backlog:
            self.held, self.position = data, position
        else:
            self.held, self.position = data[position:], 0

    def clear(self) -> None:
        """Drop all octets."""
        self.held, self.position, self.backlog = b"", 0, False

    def take_preface(self) -> bool:
        """Take the connection preface (RFC 9113 section 3.4). Returns False if the preface is not whole yet.

        Raises:
            ConnectionFault: PROTOCOL_ERROR if the octets are not a preface.
        """
        wanted = frames.PREFACE
        if not wanted.startswith(self.held[: len(wanted)]):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "no HTTP/2 preface")
        if len(self.held) < len(wanted):
            self.backlog = False
            return False
        self.held = self.held[len(wanted) :]
        return True

    def check_invariants(self) -> None:
        """Assert that the position lies within the held octets."""
        assert 0 <= self.position <= len(self.held)
        assert self.held or not self.position
