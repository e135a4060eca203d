"""The facts that the master reports about the served catalogue: its freshness, the delay of changes, past events, and
whether a restart is safe. `Proof` composes the parts, each of which owns its numbers.

The sync cycle reports to `Proof` (`CycleObserver`). In addition, a tick compares the present state with the remembered
one, so that a change that nothing reported is noticed too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from definition_server.control_plane.events import EventKind, Events
from definition_server.control_plane.freshness import Restart, Stale, restart_safety, staleness
from definition_server.control_plane.propagation import Propagation
from definition_server.control_plane.sync_state import Outcome, SyncState
from definition_server.observability.logs import get_logger
from definition_server.observability.reasons import Reason

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement at one moment."""

    stale: Stale | None
    restart: Restart


class Proof:
    """Judges the state of one master. Only the event loop's thread writes; `verdict` may be called from any thread."""

    def __init__(
        self,
        state: SyncState,
        *,
        interval: float,
        stores: bool,
        clock: Callable[[], float] = time.time,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            state: The result of the sync cycles.
            interval: ``SYNC_INTERVAL_SECONDS``.
            stores: Whether the server has a directory for snapshots.
            clock: Seconds since the epoch.
            now: Returns seconds of the clock by which cycles are timed.
        """
        self._state = state
        self._interval = interval
        self._stores = stores
        self._clock = clock
        self._now = now
        self.events = Events(clock, now)
        self.propagation = Propagation(now)
        self.next_attempt: float | None = None
        """The time of the next scheduled cycle, seconds since the epoch. A requested cycle starts earlier."""
        self._read_at: float | None = None
        self._reachable = False
        self._published = False
        self._served_once = False
        self._stale: Stale | None = None

    # -- reported by the sync cycle --------------------------------------------------------------------------------

    def check_begins(self) -> None:
        """See `CycleObserver`."""
        self.propagation.check_begins()

    def change_read(self) -> None:
        """See `CycleObserver`."""
        self.propagation.change_read()

    def cycle_ended(self, outcome: Outcome, reason: Reason | None, next_attempt_in: float) -> None:
        """See `CycleObserver`."""
        read = outcome is not Outcome.FAILED
        self._reachable = read
        if read:
            self._read_at = self._now()
        self.propagation.check_ends(read=read)
        self.events.sync_ended(reason, read=read)
        self.next_attempt = self._clock() + next_attempt_in
        self._note_states()

    # -- the tick --------------------------------------------------------------------------------------------------

    def tick(self, *, published: bool, serving: bool) -> bool:
        """Compare the state with the remembered one.

        Args:
            published: Whether a catalogue is published.
            serving: Whether a worker serves one.

        Returns:
            Whether the served catalogue is fresh.
        """
        self._published = published
        self.events.serving(serving, before=self._served_once)
        self._served_once = self._served_once or serving
        self._note_states()
        stale = self._staleness()
        if stale is not self._stale:
            if stale is not None and stale is not Stale.NOTHING_SERVED:
                log.warning("The served catalogue may be out of date", reason=stale)
            elif stale is None:
                log.info("The served catalogue is up to date")
            self._stale = stale
        return stale is None

    @property
    def store(self) -> str:
        """Whether the served catalogue is on disk: ``off`` (there is no directory), ``stored`` or ``failing``."""
        if not self._stores:
            return "off"
        return "stored" if self._state.store_reason is None else "failing"

    def verdict(self) -> Verdict:
        """The present judgement."""
        state, pin = self._state, self._state.pin
        restart = restart_safety(
            serves=self._published,
            stored=self.store == "stored",
            pinned=pin is not None and not pin.vain,
            held=state.held is not None,
            rows_held=bool(state.findings.held.total()),
            database_reachable=self._reachable,
            pin_lost=state.pin_unsaved or (pin is not None and pin.missing and not pin.vain),
        )
        return Verdict(self._staleness(), restart)

    def _staleness(self) -> Stale | None:
        state = self._state
        return staleness(
            serves=self._published,
            held=state.held is not None,
            restored=state.restored_age_seconds is not None,
            since_check=None if self._read_at is None else self._now() - self._read_at,
            interval=self._interval,
        )

    def _note_states(self) -> None:
        state, level = self._state, self.events.level
        held, store = state.held, state.store_reason
        level(
            EventKind.CATALOGUE_HELD,
            EventKind.CATALOGUE_RELEASED,
            on=held is not None,
            reason=None if held is None else held.reason,
        )
        level(EventKind.STORE_FAILED, EventKind.STORED_AGAIN, on=store is not None, reason=store)
        level(EventKind.PINNED, EventKind.PIN_ENDED, on=state.pin is not None)
        level(EventKind.RESTORED, EventKind.TABLE_READ, on=state.restored_age_seconds is not None)
