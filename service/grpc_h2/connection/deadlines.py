"""Deadlines for the progress of calls: a request must be complete in time, and an answer must be read in time.

**Requests.** A request of one message must be whole within `Limits.body_timeout`, or within its ``grpc-timeout`` if
that is shorter. While the connection drains, the limit is `Limits.drain_body_timeout`, so that a stream without its
body does not lengthen a shutdown. Streams that wait on the fast path have no object and no time of their own. For these
streams a *mark* is made from time to time: the instant, and the last stream id that was used until then. Once the time
for a request has passed since a mark, every stream up to the mark's id is overdue. So these deadlines are exact to one
part in `_MARKS`, and a call needs no work for them.

**Rests.** A call may be answered before its request is whole: HEADERS alone show a wrong key, for example. By RFC 9113
section 8.1, the server may ask the client not to send the rest, by RST_STREAM with NO_ERROR. But clients and proxies
lose an answer if they read its RST_STREAM before they have sent their body (curl: error 92) or passed the answer on
(Envoy issue 30149). So RST_STREAM waits for `Limits.rest_timeout`, and is left out if the rest of the request arrives
meanwhile, as from every client that sends its request at once. Only the ids of such streams are kept, `_RESTS` at most.

**Answers.** A client must read its waiting answers at `Limits.min_read_rate`, after `Limits.read_grace`. Octets that a
handler adds later prolong this time at the same rate; a complete answer must be read within `Limits.max_read_time` in
all.

This module reads no clock: the present instant is that of `Timers`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from math import inf
from typing import Final

from grpc_h2.connection.fast_path import FastPath
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.state import ConnectionState, Lifecycle
from grpc_h2.connection.stream import Stream
from grpc_h2.connection.streams import Streams
from grpc_h2.connection.timers import Timers

_MARKS: Final = 8
"""The number of marks that are made in the time `Limits.body_timeout`."""
ENDED_AT_ONCE: Final = 8
"""The most calls that are ended at a time because their deadline has passed, in some 100 µs."""
_RESTS: Final = 256
"""The number of streams of a connection whose rest is awaited; if one more is added, the first is reset."""
_REST_OCTETS: Final = 64 * 1024
"""The server stops waiting for a rest that has more octets than this."""


class RequestDeadlines:
    """The deadlines of the requests of one connection."""

    __slots__ = ("_expected", "_fast_path", "_lifecycle", "_limits", "_marks", "_rests", "_streams", "_timers")

    def __init__(
        self, limits: Limits, lifecycle: Lifecycle, timers: Timers, streams: Streams, fast_path: FastPath
    ) -> None:
        self._limits = limits
        self._lifecycle = lifecycle
        self._timers = timers
        self._streams = streams
        self._fast_path = fast_path
        self._expected: dict[Stream, float] = {}
        self._marks: list[tuple[float, int]] = []
        """Pairs of an instant and a stream id: at that instant, streams of the fast path up to that id are overdue."""
        self._rests: dict[int, tuple[float, int]] = {}
        """Answered streams whose request may still have a rest → the instant until which the server waits for the rest,
        and the number of its octets that have arrived. The stream that has waited longest is first."""

    @property
    def _allowance(self) -> float:
        draining = self._lifecycle.state in (ConnectionState.DRAINING, ConnectionState.LEAVING)
        return self._limits.drain_body_timeout if draining else self._limits.body_timeout

    def expect(self, stream: Stream, until: float = inf) -> None:
        """The request of ``stream`` is one message, which has not arrived yet; ``until``: the deadline of the call."""
        self._expected[stream] = min(self._timers.now + self._allowance, until)

    def settle(self, stream: Stream) -> None:
        """The request of ``stream`` is whole, or is not needed any more."""
        self._expected.pop(stream, None)

    def hasten(self) -> None:
        """The connection drains: shorten the time for requests that are not whole."""
        latest = self._timers.now + self._limits.drain_body_timeout
        for stream, instant in self._expected.items():
            self._expected[stream] = min(instant, latest)
        if self._fast_path.pending:
            self._marks.append((latest, self._streams.last_id))

    def await_rest(self, stream_id: int) -> int | None:
        """A call was answered before its request was whole. If too many streams wait for their rest, the stream that
        has waited longest is removed and returned."""
        self._rests[stream_id] = self._timers.now + self._limits.rest_timeout, 0
        return self.give_up_rest() if len(self._rests) > _RESTS else None

    def rest_received(self, stream_id: int, octets: int, *, end_stream: bool) -> bool:
        """A frame arrived on a stream that is answered. Returns whether to stop waiting for the rest, although it has
        not ended."""
        rest = self._rests.get(stream_id)
        if rest is None:
            return False
        until, before = rest
        too_long = before + octets > _REST_OCTETS
        if end_stream or too_long:
            del self._rests[stream_id]
        else:
            self._rests[stream_id] = until, before + octets
        return too_long and not end_stream

    def give_up_rest(self) -> int | None:
        """Remove and return the stream whose rest has been awaited longest. None if there is none."""
        first = next(iter(self._rests), None)
        if first is not None:
            del self._rests[first]
        return first

    def overdue_rests(self) -> list[int]:
        """Remove and return a few of the streams whose request's rest has not arrived in time."""
        now = self._timers.now
        oldest = islice(self._rests.items(), ENDED_AT_ONCE)
        late = [stream_id for stream_id, (until, _) in oldest if until <= now]
        for stream_id in late:
            del self._rests[stream_id]
        return late

    def drop_all(self) -> None:
        """Stop waiting for all requests."""
        self._expected.clear()
        self._rests.clear()
        self._marks.clear()

    def next_deadline(self) -> float:
        """The first instant at which a request may be overdue; ``inf`` if none is awaited."""
        self._mark()
        due = min(self._expected.values(), default=inf)
        if self._rests:
            due = min(due, next(iter(self._rests.values()))[0])
        if self._fast_path.pending:
            due = min(due, min((instant for instant, _ in self._marks), default=inf), self._fast_path.next_timeout())
        return due

    def overdue(self) -> list[Stream | int]:
        """A few of the overdue requests: streams, and ids of streams that wait on the fast path."""
        self._mark()
        now = self._timers.now
        late: list[Stream | int] = [stream for stream, instant in self._expected.items() if instant <= now]
        if self._fast_path.pending:
            last = max((last_id for instant, last_id in self._marks if instant <= now), default=-1)
            late += [stream_id for stream_id in self._fast_path.pending if stream_id <= last]
            late += [stream_id for stream_id in self._fast_path.timed_out(now) if stream_id > last]
            if len(late) <= ENDED_AT_ONCE:
                self._marks = [mark for mark in self._marks if mark[0] > now]
        return late[:ENDED_AT_ONCE]

    def _mark(self) -> None:
        """Make a mark, unless the last mark is recent or already covers every stream."""
        if not self._fast_path.pending:
            self._marks.clear()
            return
        instant, last_id = self._timers.now + self._allowance, self._streams.last_id
        if self._marks:
            latest, known = self._marks[-1]
            if known == last_id or instant - latest < self._limits.body_timeout / _MARKS:
                return
        self._marks.append((instant, last_id))

    def check_invariants(self, open_streams: dict[int, Stream]) -> None:
        """Assert that only open streams are awaited."""
        for stream in self._expected:
            assert open_streams.get(stream.id) is stream, "a closed stream is waited for"
        assert len(self._marks) <= 2 * _MARKS + 4
        assert len(self._rests) <= _RESTS
        ends = [until for until, _ in self._rests.values()]
        assert ends == sorted(ends), "the rest that has waited longest does not come first"
        assert not self._rests.keys() & open_streams.keys(), "the rest of an open stream is waited for"


class AnswerDeadlines:
    """The deadlines of answers that wait to be read."""

    __slots__ = ("_limits", "_timers", "_waiting")

    def __init__(self, limits: Limits, timers: Timers) -> None:
        self._limits = limits
        self._timers = timers
        self._waiting: dict[Stream, tuple[float, float]] = {}
        """Stream → the instant since which its answer waits, and the instant by which the answer must have been
        read."""

    def queued(self, stream: Stream, octets: int) -> None:
        """``octets`` additional octets wait to be read on ``stream``."""
        now, limits = self._timers.now, self._limits
        since, until = self._waiting.get(stream) or (now, now + limits.read_grace)
        self._waiting[stream] = since, until + octets / limits.min_read_rate

    def completed(self, stream: Stream) -> None:
        """The answer on ``stream`` is complete: its end is queued behind the octets."""
        since, until = self._waiting[stream]
        self._waiting[stream] = since, min(until, self._timers.now + self._limits.max_read_time)

    def settle(self, stream: Stream) -> None:
        """Nothing waits to be read on ``stream`` any more."""
        self._waiting.pop(stream, None)

    def drop_all(self) -> None:
        """Remove all deadlines of answers."""
        self._waiting.clear()

    def next_deadline(self) -> float:
        """The first instant at which an answer is overdue; ``inf`` if no answer waits."""
        return min((until for _, until in self._waiting.values()), default=inf)

    def overdue(self) -> list[Stream]:
        """Some of the streams whose answers were not read in time."""
        now = self._timers.now
        return [stream for stream, (_, until) in self._waiting.items() if until <= now][:ENDED_AT_ONCE]

    def since(self, instant: float) -> Iterator[Stream]:
        """The streams that have waited since ``instant``, or longer."""
        return iter([stream for stream, (since, _) in self._waiting.items() if since <= instant])

    def check_invariants(self, open_streams: dict[int, Stream]) -> None:
        """Assert that exactly the streams with unsent octets have an entry."""
        assert {stream for stream in open_streams.values() if stream.unsent} == self._waiting.keys()
