"""Protection from peers that cause much work at little cost to themselves: counters and budgets of one connection. This
module is pure arithmetic.

- *Glitches* are cheap misdeeds: each is legal or harmless alone, and an attack in numbers. All of them are drawn from
  one leaky bucket, so that no attack is below every threshold at once.
- *WINDOW_UPDATEs* have a balance that grows with each frame that an honest client may answer with one.
- *Late frames* name a stream that has ended. A client may send a few of them for each stream that it has opened,
  because it may send RST_STREAM before it has read the answer; further ones count as glitches.
- *PINGs* follow gRPC proposal A8, with one bucket that leaks in place of its clock, so that a client that pings in the
  allowed interval is safe from jitter. The bucket is emptied whenever we send HEADERS or DATA. So grpc-go, which sends
  a PING after every reply to measure the bandwidth-delay product, gets no strike.
- *Work* is budgeted for each call of ``receive_data``, in units of about a microsecond. The budget limits the time for
  which other connections wait while a peer sends the most expensive input.
"""

from __future__ import annotations

from typing import Final

from grpc_h2.connection.limits import Limits
from grpc_h2.connection.timers import Timers
from grpc_h2.wire.errors import ConnectionFault, ErrorCode

FRAME_WORK: Final = 4
BLOCK_WORK: Final = 3
STREAM_WORK: Final = 12
OCTETS_OF_BLOCK_PER_WORK: Final = 8
OCTETS_OF_MESSAGE_PER_WORK: Final = 256

_FORGIVEN: Final = 1.25
"""The number of PINGs that are forgiven for each PING that `Limits.min_ping_interval` allows."""
_LATE_GLITCH: Final = 0.25
"""Glitches counted for each frame on a reset stream beyond the number that an honest client may have in flight at the
reset. This is the number of frames that fits into a window."""
_UPDATES_PER_STREAM: Final = 2
"""WINDOW_UPDATEs that a client may send for each stream: C-core sends two for every call."""
_UPDATES_PER_FRAME: Final = 20
"""WINDOW_UPDATEs that a client may send for each DATA frame of ours (Envoy: 10)."""


class LeakyBucket:
    """Counts misdeeds, and forgets them at a constant rate. The caller passes the time."""

    __slots__ = ("_capacity", "_level", "_rate", "_then")

    def __init__(self, capacity: float, rate: float, now: float) -> None:
        self._capacity = capacity
        self._rate = rate
        self._level = 0.0
        self._then = now

    def add(self, now: float, amount: float = 1.0) -> bool:
        """Pour in ``amount``. Returns whether the bucket overflows."""
        self._level = max(0.0, self._level - (now - self._then) * self._rate) + amount
        self._then = now
        return self._level > self._capacity


class Abuse:
    """The buckets and budgets of one connection's peer."""

    __slots__ = (
        "_bucket",
        "_last_ping",
        "_late_frames",
        "_limits",
        "_strikes",
        "_timers",
        "_window_updates",
        "calls_left",
        "work_left",
    )

    def __init__(self, limits: Limits, timers: Timers) -> None:
        self._limits = limits
        self._timers = timers
        self._bucket = LeakyBucket(limits.glitches, limits.glitches_per_second, timers.now)
        self._window_updates = limits.free_window_updates
        self._last_ping: float | None = None
        """Time of the last PING; None if none has arrived since we last sent HEADERS or DATA."""
        self._strikes = 0.0
        self._late_frames = 0
        self.work_left = limits.work_per_turn
        self.calls_left = limits.calls_per_turn

    # -- budgets --------------------------------------------------------------------------------------------------

    def begin_turn(self) -> None:
        """Refill the budgets."""
        self.work_left = self._limits.work_per_turn
        self.calls_left = self._limits.calls_per_turn

    def spend(self, work: int) -> None:
        """Subtract ``work``, which was done, from the budget."""
        self.work_left -= work

    def stream_begun(self, *, handled: bool) -> None:
        """A stream that was not answered at once has been opened; ``handled``: whether a handler will be started for
        it."""
        self.work_left -= STREAM_WORK
        if handled:
            self.calls_left -= 1

    # -- misdeeds -------------------------------------------------------------------------------------------------

    def glitch(self, what: str, amount: float = 1.0) -> None:
        """Count a misdeed.

        Raises:
            ConnectionFault: ENHANCE_YOUR_CALM if it exceeds the limit.
        """
        if self._bucket.add(self._timers.now, amount):
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"too many {what}")

    def window_update(self) -> None:
        """WINDOW_UPDATE was received.

        Raises:
            ConnectionFault: ENHANCE_YOUR_CALM if it exceeds the limit.
        """
        self._window_updates -= 1
        if self._window_updates < 0:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too many WINDOW_UPDATE frames")

    def late_frame(self, streams: int) -> None:
        """A frame on a stream that has ended was received; the client has opened ``streams`` streams so far.

        Raises:
            ConnectionFault: ENHANCE_YOUR_CALM if there are too many such frames.
        """
        if self._late_frames < self._limits.late_frames_per_stream * streams:
            self._late_frames += 1
        else:
            self.glitch("frames on streams that have ended", _LATE_GLITCH)

    def ping(self) -> None:
        """PING was received.

        Raises:
            ConnectionFault: ENHANCE_YOUR_CALM if PINGs arrived too soon too often.
        """
        limits, now = self._limits, self._timers.now
        if self._last_ping is not None:
            forgiven = (now - self._last_ping) * _FORGIVEN / limits.min_ping_interval if limits.min_ping_interval else 1
            self._strikes = max(0.0, self._strikes + 1 - forgiven)
        self._last_ping = now
        if self._strikes > limits.max_ping_strikes:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "too_many_pings")

    # -- events that allow the peer more ---------------------------------------------------------------------------

    def stream_opened(self) -> None:
        """The client has opened a stream, even if it is refused."""
        self._window_updates += _UPDATES_PER_STREAM

    def headers_sent(self) -> None:
        """We have sent HEADERS."""
        self._last_ping = None
        self._strikes = 0.0

    def data_sent(self, data_frames: int) -> None:
        """We have sent DATA frames."""
        self._window_updates += _UPDATES_PER_FRAME * data_frames
        self._last_ping = None
        self._strikes = 0.0

    def answered(self, streams: int, data_frames: int, updates: int) -> None:
        """The fast path has served calls: the client has opened ``streams`` streams and sent WINDOW_UPDATE on
        ``updates`` of them, and the server has sent ``data_frames`` DATA frames. An answer without a message counts as
        one DATA frame."""
        self._window_updates += _UPDATES_PER_STREAM * streams + _UPDATES_PER_FRAME * data_frames - updates
        if data_frames:
            self._last_ping = None
            self._strikes = 0.0
