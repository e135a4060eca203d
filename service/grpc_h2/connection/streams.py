"""The streams of a connection by their ids: streams that are open, that were open, and that never were (RFC 9113
section 5.1)."""

from __future__ import annotations

from typing import Final

from grpc_h2.connection.state import StreamStatus
from grpc_h2.connection.stream import Stream
from grpc_h2.wire.errors import ConnectionFault, ErrorCode
from grpc_h2.wire.frames import LARGEST_STREAM_ID

_REMEMBERED_RESETS: Final = 1024
_REMEMBERED_GAPS: Final = 64


class Streams:
    """Open streams, counts, and the facts about other ids that must be remembered. The constants bound the memory.

    A handler whose stream has closed before it has ended (a *zombie*) counts as a stream, so that a reset frees nothing
    before the work has really ended (CVE-2023-44487).
    """

    __slots__ = ("_gaps", "_named", "_resets", "_skipped", "last_id", "open", "open_calls", "weight", "zombies")

    def __init__(self) -> None:
        self.open: dict[int, Stream] = {}
        self.open_calls = 0
        """The number of handlers at work, including zombies."""
        self.zombies = 0
        self.last_id = -1
        """The highest id that the client has used; -1 before the first stream, so that the next id is always higher by
        two."""
        self.weight = 0
        """Octets that the requests of open streams are estimated to hold (`Stream.weight`)."""
        self._skipped = 0
        self._gaps: list[range] = []
        self._resets: dict[int, None] = {}
        self._named: int | None = None

    # -- open streams ---------------------------------------------------------------------------------------------

    def add(self, stream: Stream) -> None:
        """Add an open stream; if it has a handler, the handler is counted from now on."""
        self.open[stream.id] = stream
        self.weight += stream.weight
        if stream.handled:
            self.open_calls += 1

    def remove(self, stream: Stream) -> bool:
        """Remove a stream that is not open any more. Returns whether it was open before."""
        if self.open.pop(stream.id, None) is None:
            return False
        self.weight -= stream.weight
        if not stream.finished:
            self.zombies += 1
        return True

    def finish(self, stream: Stream) -> None:
        """Note that the stream's handler has really ended."""
        if stream.finished:
            return
        stream.finish()
        self.open_calls -= 1
        if stream.id not in self.open:
            self.zombies -= 1

    def release(self) -> dict[int, Stream]:
        """Remove all open streams and return them. The caller frees them a few at a time, because freeing hundreds at
        once takes as long as hundreds of answers."""
        released, self.open = self.open, {}
        self.weight = 0
        return released

    # -- ids ------------------------------------------------------------------------------------------------------

    def status(self, stream_id: int) -> StreamStatus:
        """The status of ``stream_id``, which belongs to no open stream."""
        if stream_id > self.last_id or not stream_id & 1:
            return StreamStatus.IDLE
        if stream_id in self._resets:
            return StreamStatus.RESET
        if any(stream_id in gap for gap in self._gaps):
            return StreamStatus.SKIPPED
        return StreamStatus.CLOSED

    @property
    def opened(self) -> int:
        """The number of streams that the client has opened so far."""
        return (self.last_id + 1) // 2 - self._skipped

    def use(self, stream_id: int) -> None:
        """The client opens a stream.

        Raises:
            ConnectionFault: PROTOCOL_ERROR if the id is even (section 5.1.1).
        """
        if not stream_id & 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"the client opens stream {stream_id}")
        if stream_id > self.last_id + 2:
            if len(self._gaps) >= _REMEMBERED_GAPS:
                del self._gaps[0]  # ids in that range then count as closed, and frames on them end the connection too
            gap = range(self.last_id + 2, stream_id, 2)
            self._gaps.append(gap)
            self._skipped += len(gap)
        self.last_id = stream_id

    def use_up_to(self, stream_id: int) -> None:
        """The fast path: the client has opened every odd id up to ``stream_id``."""
        self.last_id = stream_id

    def note_reset(self, stream_id: int) -> None:
        """Note that we have ended a stream on which the client may still be sending."""
        if len(self._resets) >= _REMEMBERED_RESETS:
            del self._resets[next(iter(self._resets))]
        self._resets[stream_id] = None

    def name_last(self) -> None:
        """The last GOAWAY is sent: the last id does not change any more, and streams with higher ids are not served."""
        self._named = self.last_for_goaway

    @property
    def last_for_goaway(self) -> int:
        """The last stream id for GOAWAY."""
        return min(max(self.last_id, 0), LARGEST_STREAM_ID) if self._named is None else self._named

    def check_invariants(self) -> None:
        """Assert the counts."""
        at_work = sum(not stream.finished for stream in self.open.values())
        assert self.open_calls == at_work + self.zombies, "a handler is lost or counted twice"
        assert self.zombies >= 0
        assert len(self._resets) <= _REMEMBERED_RESETS
        assert len(self._gaps) <= _REMEMBERED_GAPS
        assert self.weight == sum(stream.weight for stream in self.open.values())
        assert 0 <= self.opened <= (self.last_id + 1) // 2
        for stream_id, stream in self.open.items():
            assert stream_id == stream.id <= max(self.last_id, 0)
            stream.check_invariants()
