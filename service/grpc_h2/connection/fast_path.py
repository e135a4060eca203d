"""The fast path: calls of static methods whose answers are known, alone or in batches.

**Theory of operation.** Almost all traffic is a pair of frames, HEADERS and DATA with END_STREAM, for a static method.
The fast path parses each such pair with one precompiled `struct` format, finds the route by the block's octets and the
answer by the message's octets, and builds no object. If the DATA does not follow its HEADERS frame directly, only the
route waits in ``pending``: clients with many streams send all their HEADERS first, and C-core sends a WINDOW_UPDATE
between the two, which is also handled here.

Everything that is not exactly such a pair is left to ``inbound.py``, which processes single frames. A pair may be left
to that module at any point, because nothing changes before the answer is certain. The exception is a block that was
decoded, because decoding cannot be undone: then the outcome tells the caller how to continue with the stream.

**Cost.** Every request runs every line of the two methods, so both are flat and longer than functions should be. They
read the other parts' numbers into local variables, do not change those parts while a batch is processed, and pass the
sum of their work to each part in one call per batch. Single calls are summed up here, and the sums are passed to the
timers and to `Abuse` before either is read (`FastPath.settle`).

**Why it is sound.** `FastPath.answer_one` changes every number as ``receive_data`` would for the same octets; a test
compares two connections, one on each path, after each read. The reserved bit of a stream id is not masked, so the last
ids are left to ``inbound.py``.
"""

from __future__ import annotations

from math import inf
from typing import Final, NamedTuple, TypeAlias

from grpc_h2.connection.abuse import Abuse
from grpc_h2.connection.flow_control import FlowControl, grown
from grpc_h2.connection.headers import Headers
from grpc_h2.connection.input_buffer import InputBuffer
from grpc_h2.connection.limits import Limits
from grpc_h2.connection.outbound import Outbound
from grpc_h2.connection.state import ConnectionState, Lifecycle
from grpc_h2.connection.streams import Streams
from grpc_h2.connection.timers import Timers
from grpc_h2.static.routes import UNKNOWN_LENGTH, Route, Router
from grpc_h2.wire import frames
from grpc_h2.wire.errors import StreamFault
from grpc_h2.wire.frame_parsing import LAST_DATA, SHAPES

_LAST_ID: Final = frames.LARGEST_STREAM_ID - 2**16
_OPEN: Final = ConnectionState.OPEN
_WINDOW_UPDATE: Final = frames.head(frames.WINDOW_UPDATE, 0, 4)


class Opened(NamedTuple):
    """A stream that has been opened and could not be answered at once."""

    stream_id: int
    route: Route
    window: int = 0
    """The octets that WINDOW_UPDATEs have added to the stream's send window."""
    until: float = inf
    """The deadline of the call: an instant."""


class Refused(NamedTuple):
    """A stream whose header block was malformed."""

    stream_id: int
    fault: StreamFault


Batch: TypeAlias = tuple[int, bool, Opened | Refused | None]
"""The outcome of a batch: see `FastPath.answer_batch`."""


class FastPath:
    """Answers known calls of one connection."""

    __slots__ = (
        "_abuse",
        "_alone_at",
        "_answered",
        "_buffer",
        "_flow",
        "_headers",
        "_lifecycle",
        "_limits",
        "_outbound",
        "_pending_timeouts",
        "_pending_windows",
        "_router",
        "_streams",
        "_timers",
        "alone",
        "pending",
    )

    def __init__(
        self,
        limits: Limits,
        router: Router,
        lifecycle: Lifecycle,
        buffer: InputBuffer,
        timers: Timers,
        abuse: Abuse,
        flow: FlowControl,
        streams: Streams,
        outbound: Outbound,
        headers: Headers,
        answered: list[int],
    ) -> None:
        """``answered``: the list to which the ids of the answers are appended."""
        self._limits = limits
        self._router = router
        self._lifecycle = lifecycle
        self._buffer = buffer
        self._timers = timers
        self._abuse = abuse
        self._flow = flow
        self._streams = streams
        self._outbound = outbound
        self._headers = headers
        self._answered = answered
        self.alone = 0
        """The number of calls that `answer_one` has answered since the last `settle`. The last of these calls was
        answered at ``_alone_at``."""
        self._alone_at = 0.0
        self.pending: dict[int, Route] = {}
        """Streams of static methods whose DATA has not arrived; only their routes need to be kept."""
        self._pending_windows: dict[int, int] = {}
        """The octets that WINDOW_UPDATE has added to the windows of the ``pending`` streams (C-core sends it between
        HEADERS and DATA)."""
        self._pending_timeouts: dict[int, float] = {}
        """The deadlines of the ``pending`` calls that have one, and of some calls that have been answered."""

    # -- answers --------------------------------------------------------------------------------------------------

    def answer_one(self, data: bytes, now: float) -> bytes | None:
        """The answer to ``data`` if ``data`` is one call of a static method and no other work waits; otherwise None.

        If a client waits for each answer, every read brings one call, and `receive_data` would do the work of a whole
        batch for each call. If the result is None, nothing has changed: call `receive_data` with the same octets then.
        """
        shape = SHAPES.get(data[:5])
        if shape is None or self._buffer.held or self._lifecycle.state is not _OPEN:
            return None
        take_apart, body = shape
        outbound, streams, headers, size = self._outbound, self._streams, self._headers, len(data)
        if (
            size < body
            or outbound.out
            or outbound.unsent
            or outbound.paused
            or outbound.size_update_due
            or self.pending
            or len(streams.open) + streams.zombies >= self._limits.max_concurrent_streams
            or headers.assembly is not None
        ):
            return None
        stream_id, block, data_head, data_stream = take_apart(data, 0)
        length = LAST_DATA.get(data_head)
        if length is None or body + length != size:
            return None
        if not stream_id == data_stream == streams.last_id + 2 <= _LAST_ID:
            return None
        route = headers.memo.get(block)
        if route is None or route.answer_payload is None:
            return None
        if route.content_length != UNKNOWN_LENGTH and route.content_length != length:
            return None
        answer = route.answer_payload(data[body:])
        if answer is None or answer.pieces is None or headers.router_epoch != self._router.epoch:
            return None
        if not self._flow.exchange(length, answer.size):
            return None
        streams.use_up_to(stream_id)
        self.alone += 1
        self._alone_at = now
        self._answered.append(answer.answer_id)
        return data[body - 4 : body].join(answer.pieces)

    def settle(self) -> None:
        """Pass the counts of single calls to the timers and to `Abuse`. To be called before either of them is read."""
        if self.alone:
            self._abuse.answered(self.alone, self.alone, 0)
            self._timers.answered(self._alone_at)
            self.alone = 0

    def answer_batch(self, data: bytes, position: int, end: int, most: int) -> Batch:
        """Answer at most ``most`` calls (a WINDOW_UPDATE counts as one) that lie whole in ``data`` from ``position`` to
        ``end``.

        To be called while calls are accepted and no header block is unfinished.

        Returns:
            The position of the first octet that is left; whether the turn's budget is used up, so that the rest is
            backlog; and the stream that could not be answered and ended the batch, if there is one.

        Raises:
            ConnectionFault: if a header block is wrong, or DATA exceeds the connection's window.
        """
        limits, flow, streams, headers, abuse = self._limits, self._flow, self._streams, self._headers, self._abuse
        memo, pending = headers.memo, self.pending
        room = limits.max_concurrent_streams - len(streams.open) - streams.zombies
        replies: list[bytes] = []
        answered, pending_windows, timeouts = self._answered, self._pending_windows, headers.timeouts
        updates = more_frames = 0
        uncopied = False
        window = first_window = flow.send_window
        floor = window - limits.octets_per_turn + self._outbound.ready
        largest = flow.initial_send_window
        first = expected = streams.last_id + 2
        received = 0
        if expected > _LAST_ID or self._outbound.size_update_due:
            return position, False, None
        try:
            while position < end and len(replies) < most and window >= floor:
                head = data[position : position + 5]
                shape = SHAPES.get(head)
                if shape is not None:
                    take_apart, size = shape
                    body = position + size
                    if body > end or len(pending) >= room:
                        return position, False, None
                    stream_id, block, data_head, data_stream = take_apart(data, position)
                    if stream_id != expected:
                        return position, False, None
                    route = memo.get(block)
                    if route is None:
                        if abuse.work_left <= 0:
                            break
                        expected += 2
                        try:
                            route = headers.learn(block)
                        except StreamFault as fault:
                            return body - frames.HEADER_LENGTH, False, Refused(stream_id, fault)
                        if route.answer_payload is None:
                            return body - frames.HEADER_LENGTH, False, Opened(stream_id, route)
                    else:
                        expected += 2
                    length = LAST_DATA.get(data_head)
                    if length is None or data_stream != stream_id or body + length > end:
                        pending[stream_id] = route
                        if timeouts:
                            self._note_timeout(stream_id, timeouts.get(block))
                        position = body - frames.HEADER_LENGTH
                        if data_head == _WINDOW_UPDATE and data_stream == stream_id and body + 4 <= end:
                            increment = frames.LONG.unpack_from(data, body)[0] & frames.LARGEST_WINDOW
                            if self.grow_window(stream_id, increment):
                                updates += 1
                                most -= 1  # so that this stream does not lengthen the turn
                                position = body + 4
                        continue
                else:
                    length = LAST_DATA.get(head)
                    body = position + frames.HEADER_LENGTH
                    if length is None or body + length > end:
                        return position, False, None
                    stream_id = frames.LONG.unpack_from(data, position + 5)[0]
                    pended = pending.pop(stream_id, None)
                    if pended is None:
                        return position, False, None
                    route = pended
                answer_payload, content_length = route.answer_payload, route.content_length
                position = body + length
                answer = None
                if content_length != UNKNOWN_LENGTH and content_length != length:
                    answer_payload = None
                if answer_payload is not None:
                    answer = answer_payload(data[body:position])
                if answer is None or answer.pieces is None or answer.size > window or answer.size > largest:
                    # A large answer takes its turn behind streams that wait to send. If it overtook them, they might
                    # wait for ever while the connection's window is small.
                    if (
                        answer is None
                        or answer.framed is None
                        or answer.size > window
                        or answer.size > largest
                        or self._outbound.waiting
                    ):
                        added = pending_windows.pop(stream_id, 0)
                        return body - frames.HEADER_LENGTH, False, Opened(stream_id, route, added)
                    # The pieces are queued without a copy: if they were joined here, each peer that reads slowly would
                    # keep a copy.
                    large = [data[body - 4 : body]] * (2 * len(answer.framed) - 1)
                    large[::2] = answer.framed
                    replies += large
                    most += len(large) - 1
                    more_frames += answer.data_frames - len(large)
                    uncopied = True
                else:
                    replies.append(data[body - 4 : body].join(answer.pieces))
                if pending_windows:
                    pending_windows.pop(stream_id, None)
                answered.append(answer.answer_id)
                window -= answer.size
                received += length
            return position, position < end, None
        finally:
            if expected != first or replies:
                streams.use_up_to(expected - 2)
                abuse.answered((expected - first) // 2, len(replies) + more_frames, updates)
            if replies:
                self._outbound.commit(replies, first_window - window, uncopied=uncopied)
                self._timers.stream_ended()
                increment = flow.commit(received, first_window - window)
                if increment:
                    self._outbound.control(frames.window_update(0, increment))

    # -- streams that wait for their DATA -------------------------------------------------------------------------

    def release(self, stream_id: int) -> Opened:
        """Release a stream that is ``pending``, so that it becomes a `Stream`."""
        window, until = self._pending_windows.pop(stream_id, 0), self._pending_timeouts.pop(stream_id, inf)
        return Opened(stream_id, self.pending.pop(stream_id), window, until)

    def _note_timeout(self, stream_id: int, seconds: float | None) -> None:
        """The call of ``stream_id``, which waits for its DATA, has ``seconds``."""
        if seconds is not None:
            if len(self._pending_timeouts) >= 2 * self._limits.max_concurrent_streams:
                self._drop_old_timeouts()
            self._pending_timeouts[stream_id] = self._timers.now + seconds

    def _drop_old_timeouts(self) -> None:
        pending = self.pending
        self._pending_timeouts = {
            stream_id: instant for stream_id, instant in self._pending_timeouts.items() if stream_id in pending
        }

    def next_timeout(self) -> float:
        """The first deadline of a call that waits; ``inf`` if there is none."""
        if self._pending_timeouts:
            self._drop_old_timeouts()
        return min(self._pending_timeouts.values(), default=inf)

    def timed_out(self, now: float) -> list[int]:
        """The calls that still wait for their DATA after their deadline."""
        return [
            stream_id
            for stream_id, instant in self._pending_timeouts.items()
            if instant <= now and stream_id in self.pending
        ]

    def refused(self) -> list[int]:
        """The calls that still wait for their DATA although their answer is known to be a refusal."""
        return [stream_id for stream_id, route in self.pending.items() if route.refusal is not None]

    def judge_anew(self) -> None:
        """The server's authorizations have changed. The change applies also to calls that wait, because the right to an
        answer is judged when the answer is given."""
        judged: dict[Route, Route] = {}
        for stream_id, route in self.pending.items():
            if route not in judged:
                judged[route] = self._router.judge_anew(route)
            self.pending[stream_id] = judged[route]

    def grow_window(self, stream_id: int, increment: int) -> bool:
        """Apply WINDOW_UPDATE. Returns False if the stream does not wait on the fast path, or if the frame is a fault
        (section 6.9)."""
        if stream_id not in self.pending or not increment:
            return False
        added = self._pending_windows.get(stream_id, 0) + increment
        if added + self._flow.initial_send_window > frames.LARGEST_WINDOW:
            return False
        self._pending_windows[stream_id] = added
        return True

    def windows_fit(self, initial: int) -> bool:
        """Whether the windows of all streams that wait stay within 2^31 - 1 with this ``initial`` window."""
        return all(grown(initial, added) is not None for added in self._pending_windows.values())

    def drop_all(self) -> None:
        """Remove all streams that wait."""
        self.pending.clear()
        self._pending_windows.clear()
        self._pending_timeouts.clear()

    def check_invariants(self) -> None:
        """Assert that waiting streams are not open, and that each added window belongs to a waiting stream."""
        assert self._pending_windows.keys() <= self.pending.keys()
        assert self.pending.keys().isdisjoint(self._streams.open.keys())
        in_use = len(self.pending) + len(self._streams.open)
        assert in_use <= self._limits.max_concurrent_streams
        assert all(stream_id <= self._streams.last_id for stream_id in self.pending)
