"""The streams of a connection by their ids: which are open, which were, which never were (RFC 9113 section 5.1)."""

from __future__ import annotations

from collections.abc import ItemsView, ValuesView
from enum import Enum, auto

from grpc_h2.connection.stream import Stream
from grpc_h2.static.routes import Route
from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frames import LARGEST_STREAM_ID

_REMEMBERED_RESETS = 1024
_REMEMBERED_GAPS = 64


class StreamStatus(Enum):
    """What a stream id stands for when a frame names it and no open stream has it."""

    IDLE = auto()
    """Higher than any the client has used."""
    SKIPPED = auto()
    """Passed over by a higher one: closed without ever having been open (section 5.1.1)."""
    RESET = auto()
    """Reset or left by us a short while ago: what was in flight is still arriving, and is dropped."""
    CLOSED = auto()


class Streams:
    """Open streams, and what must be remembered of the others. Memory is bounded: see the constants."""

    __slots__ = ("_gaps", "_resets", "last_id", "open", "pending", "pending_windows")

    def __init__(self) -> None:
        self.open: dict[int, Stream] = {}
        self.pending: dict[int, Route] = {}
        """Streams of static methods whose DATA is not in yet: all there is to know of one is its route."""
        self.pending_windows: dict[int, int] = {}
        """What WINDOW_UPDATE has added to those of them that had one (C-core sends it between HEADERS and DATA)."""
        self.last_id = -1
        """The highest id that the client has used; -1: none, so that the next in line is always two above."""
        self._gaps: list[range] = []
        self._resets: dict[int, None] = {}

    def __len__(self) -> int:
        return len(self.open) + len(self.pending)

    def forget(self) -> dict[int, Stream]:
        """Nothing is open any more. What was: to free hundreds at once takes as long as hundreds of answers."""
        forgotten, self.open = self.open, {}
        self.pending.clear()
        self.pending_windows.clear()
        return forgotten

    def values(self) -> ValuesView[Stream]:
        """The open streams."""
        return self.open.values()

    def items(self) -> ItemsView[int, Stream]:
        """The open streams by id."""
        return self.open.items()

    def standing(self, stream_id: int) -> StreamStatus:
        """What ``stream_id`` stands for, given that it is not open."""
        if stream_id > self.last_id or not stream_id & 1:
            return StreamStatus.IDLE
        if stream_id in self._resets:
            return StreamStatus.RESET
        if any(stream_id in gap for gap in self._gaps):
            return StreamStatus.SKIPPED
        return StreamStatus.CLOSED

    def use(self, stream_id: int) -> None:
        """The client opens a stream.

        Raises:
            ConnectionFault: PROTOCOL_ERROR where the id is even (section 5.1.1).
        """
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"the client opens stream {stream_id}")
        if stream_id > self.last_id + 2:
            if len(self._gaps) >= _REMEMBERED_GAPS:
                del self._gaps[0]  # ids in it then count as closed: another code, the same end
            self._gaps.append(range(self.last_id + 2, stream_id, 2))
        self.last_id = stream_id

    def note_reset(self, stream_id: int) -> None:
        """We have ended a stream that the client may still be sending on."""
        if len(self._resets) >= _REMEMBERED_RESETS:
            del self._resets[next(iter(self._resets))]
        self._resets[stream_id] = None

    @property
    def last_told(self) -> int:
        """The last stream id for GOAWAY."""
        return min(max(self.last_id, 0), LARGEST_STREAM_ID)
