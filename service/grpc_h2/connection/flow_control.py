"""Flow-control arithmetic (RFC 9113 sections 5.2 and 6.9) of what a connection receives."""

from __future__ import annotations

from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frames import LARGEST_WINDOW


class ReceiveWindow:
    """The connection's receive window: what the peer may still send, and what is owed to it.

    Credit is given back in halves of the window, so that a WINDOW_UPDATE answers many requests rather than one.
    """

    __slots__ = ("_credit", "_left", "_size")

    def __init__(self, size: int) -> None:
        self._size = size
        self._left = size
        self._credit = 0

    def take(self, octets: int) -> None:
        """The peer has sent ``octets`` of DATA, padding included.

        Raises:
            ConnectionFault: FLOW_CONTROL_ERROR where it had no window for them.
        """
        self._left -= octets
        if self._left < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the connection's window")

    def give_back(self, octets: int) -> int:
        """``octets`` need not be held any more. Returns the increment to announce now, or 0."""
        self._credit += octets
        if self._credit * 2 < self._size:
            return 0
        increment, self._credit = self._credit, 0
        self._left += increment
        return increment

    def pass_by(self, octets: int) -> bool:
        """Take ``octets`` and give them back. False, and nothing is done, where that is a fault or to be announced."""
        if octets > self._left or (self._credit + octets) * 2 >= self._size:
            return False
        self._left -= octets
        self._credit += octets
        return True


def grown(window: int, increment: int) -> int | None:
    """A send window after WINDOW_UPDATE, or None where it would pass 2^31 - 1 (section 6.9.1)."""
    window += increment
    return None if window > LARGEST_WINDOW else window
