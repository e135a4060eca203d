"""Flow control of a connection (RFC 9113 sections 5.2 and 6.9): the octets that either side may still send.

A stream's own windows are in ``stream.py``. Credit for received octets is given back once it reaches half the window,
so one WINDOW_UPDATE is enough for many requests.
"""

from __future__ import annotations

from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frames import DEFAULT_WINDOW, LARGEST_WINDOW


class FlowControl:
    """Both windows of a connection.

    Of the octets received, ``window + credit + held = size``: octets that the peer may still send, octets to be given
    back, and octets that are held until they are processed. `check_invariants` asserts it.
    """

    __slots__ = ("_credit", "_size", "_window", "initial_send_window", "send_window")

    def __init__(self, size: int) -> None:
        """``size``: the octets that the peer may send before the server gives any back."""
        self._size = size
        self._window = size
        self._credit = 0
        self.send_window = DEFAULT_WINDOW
        """Octets of DATA that we may still send."""
        self.initial_send_window = DEFAULT_WINDOW
        """The octets that we may send on a new stream: the peer's SETTINGS_INITIAL_WINDOW_SIZE."""

    # -- receiving ------------------------------------------------------------------------------------------------

    def receive(self, octets: int) -> None:
        """The peer has sent ``octets`` of DATA, padding included.

        Raises:
            ConnectionFault: FLOW_CONTROL_ERROR if the peer's window is too small for these octets.
        """
        self._window -= octets
        if self._window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "DATA beyond the connection's window")

    def give_back(self, octets: int) -> int:
        """``octets`` may be given back to the window. Returns the increment to announce now, or 0."""
        self._credit += octets
        if self._credit * 2 < self._size:
            return 0
        increment, self._credit = self._credit, 0
        self._window += increment
        return increment

    # -- sending --------------------------------------------------------------------------------------------------

    def grow(self, increment: int) -> None:
        """Apply WINDOW_UPDATE of the connection.

        Raises:
            ConnectionFault: FLOW_CONTROL_ERROR if the window exceeds 2^31 - 1.
        """
        window = grown(self.send_window, increment)
        if window is None:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window passes 2^31 - 1")
        self.send_window = window

    def change_initial(self, size: int) -> int:
        """Apply SETTINGS_INITIAL_WINDOW_SIZE. Returns the number of octets by which the window of every stream changes
        (section 6.9.2)."""
        shift = size - self.initial_send_window
        self.initial_send_window = size
        return shift

    def spend(self, octets: int) -> None:
        """``octets`` of DATA were sent."""
        self.send_window -= octets
        assert self.send_window >= 0, "sent beyond the connection's window"

    # -- receiving and sending at once: the fast path -------------------------------------------------------------

    def exchange(self, received: int, sent: int) -> bool:
        """Count ``received`` octets as received and given back, and ``sent`` octets as sent. Returns False, and changes
        nothing, if this would be a fault, exceed a window, or make an increment due."""
        if (
            sent > self.send_window
            or sent > self.initial_send_window
            or received > self._window
            or (self._credit + received) * 2 >= self._size
        ):
            return False
        self._window -= received
        self._credit += received
        self.send_window -= sent
        return True

    def commit(self, received: int, sent: int) -> int:
        """``received`` octets have arrived and need not be held; ``sent`` octets were sent. Returns the same as
        `give_back`.

        Raises:
            ConnectionFault: for the same reasons as `receive`.
        """
        self.send_window -= sent
        assert self.send_window >= 0, "sent beyond the connection's window"
        if received > self._window or (self._credit + received) * 2 >= self._size:
            self.receive(received)
            return self.give_back(received)
        self._window -= received
        self._credit += received
        return 0

    def check_invariants(self, held: int) -> None:
        """Assert the sums; ``held``: octets of messages that no handler has taken yet."""
        assert self._window + self._credit + held == self._size
        assert self._window >= 0
        assert 0 <= self._credit * 2 < self._size
        assert 0 <= self.send_window <= LARGEST_WINDOW
        assert 0 <= self.initial_send_window <= LARGEST_WINDOW


def grown(window: int, increment: int) -> int | None:
    """A send window after WINDOW_UPDATE, or None if the window would exceed 2^31 - 1 (section 6.9.1)."""
    window += increment
    return None if window > LARGEST_WINDOW else window
