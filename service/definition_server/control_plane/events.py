"""The last failures, refusals and recoveries, with their times. A failure is still shown after the recovery.

An event is a change of state, so a database that is down for a night causes two events, however many cycles fail. An
event has a kind and a reason from fixed lists, but no free text, because the pages that show it are open to everybody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)

REMEMBERED = 50


class EventKind(StrEnum):
    """What happened."""

    SYNC_FAILED = "sync_failed"
    TABLE_READ_AGAIN = "table_read_again"
    CATALOGUE_HELD = "catalogue_held"
    CATALOGUE_RELEASED = "catalogue_released"
    RESTORED = "restored"
    TABLE_READ = "table_read"
    STORE_FAILED = "store_failed"
    STORED_AGAIN = "stored_again"
    PINNED = "pinned"
    PIN_ENDED = "pin_ended"
    SERVES_NOTHING = "serves_nothing"
    SERVES_AGAIN = "serves_again"


@dataclass(frozen=True, slots=True)
class Event:
    """One change of state."""

    at: float
    """Seconds since the epoch."""
    kind: EventKind
    reason: Reason | None = None
    after_seconds: float | None = None
    """If the event is the end of a state: the seconds that the state lasted."""


@dataclass(slots=True)
class _State:
    kind: EventKind
    since: float
    reason: Reason | None


class Events:
    """Remembers the last `REMEMBERED` events. One thread writes; `last` may be called from any thread."""

    def __init__(self, clock: Callable[[], float], now: Callable[[], float]) -> None:
        """``clock``: seconds since the epoch. ``now``: seconds of a monotonic clock, for durations."""
        self._clock = clock
        self._now = now
        self._events: deque[Event] = deque(maxlen=REMEMBERED)
        self._states: dict[EventKind, _State] = {}

    def last(self) -> tuple[Event, ...]:
        """The remembered events, the newest first."""
        return tuple(reversed(self._events.copy()))

    def latest(self, kind: EventKind) -> Event | None:
        """The newest remembered event of ``kind``."""
        return next((event for event in self.last() if event.kind is kind), None)

    def level(self, begins: EventKind, ends: EventKind, *, on: bool, reason: Reason | None = None) -> float | None:
        """Note whether the state that ``begins`` names is present (``on``). Its beginning, its end and a change of its
        reason are remembered as events.

        Returns:
            The seconds that the state lasted, if it ends now; otherwise None.
        """
        state = self._states.get(begins)
        if on and (state is None or state.reason != reason):
            self._states[begins] = _State(begins, self._now() if state is None else state.since, reason)
            self._events.append(Event(self._clock(), begins, reason))
        if on or state is None:
            return None
        del self._states[begins]
        lasted = self._now() - state.since
        self._events.append(Event(self._clock(), ends, state.reason, round(lasted, 3)))
        return lasted

    def sync_ended(self, failure: Reason | None, *, read: bool) -> None:
        """Note the end of a cycle. ``read``: whether the table could be read, even if nothing was published; if not,
        ``failure`` is the reason.
        """
        kinds = EventKind.SYNC_FAILED, EventKind.TABLE_READ_AGAIN
        lasted = self.level(*kinds, on=not read, reason=failure)
        if lasted is not None:
            log.info("Table read again", after=duration(lasted), after_seconds=round(lasted, 1))

    def serving(self, serves: bool, *, before: bool) -> None:
        """Note whether a worker serves a catalogue now. ``before``: whether a worker has served since the start."""
        lasted = self.level(EventKind.SERVES_NOTHING, EventKind.SERVES_AGAIN, on=before and not serves)
        if lasted is not None:
            log.info("Serves again", after=duration(lasted), after_seconds=round(lasted, 1))


def duration(seconds: float) -> str:
    """``seconds`` as text: 4 s, 3 min, 2 h, 5 days."""
    for unit, size, most in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600)):
        if seconds < most:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} days"
