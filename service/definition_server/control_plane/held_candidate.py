"""The catalogue that the guard holds: the rows were read, the catalogue did not pass, and an operator must accept
it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from definition_server.catalog.guard import Judgement
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.catalogue_guard import REASONS
from definition_server.control_plane.sync_state import HeldCatalogue, SyncState
from definition_server.observability.logs import get_logger

log = get_logger(__name__)


class Held(Exception):
    """The rows were read, but publishing them may do harm: an operator must accept them first."""

    def __init__(self, held: HeldCatalogue) -> None:
        super().__init__(held.text)
        self.held = held


class HeldCandidate:
    """Holds at most one catalogue: the last one that was read and did not pass the guard."""

    def __init__(self, state: SyncState, clock: Callable[[], float]) -> None:
        """
        Args:
            state: Shows the held catalogue.
            clock: Seconds since the epoch.
        """
        self._state = state
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._rows_held = 0

    @property
    def snapshot(self) -> Snapshot | None:
        """The held catalogue; None if there is none."""
        return self._snapshot

    @property
    def rows_held(self) -> int:
        """The number of rows of the held catalogue that the gate holds."""
        return self._rows_held

    def close(self) -> None:
        """Release the snapshot of the held catalogue."""
        self._snapshot = None

    def hold(self, candidate: Snapshot, judgement: Judgement, rows: int, rows_held: int) -> NoReturn:
        """Hold ``candidate``, which was built from ``rows`` rows, in place of the previous one.

        Raises:
            Held: always.
        """
        text = judgement.text
        if not candidate.count:
            text = f"obex_dapl_functions: {f'none of its {rows} rows can be served' if rows else 'it is empty'}"
        earlier = self._state.held
        version = candidate.version_hash
        since = earlier.since if earlier is not None and earlier.version_hash == version else self._clock()
        reason = REASONS[judgement.concern]
        self._snapshot, self._rows_held = candidate, rows_held
        self._state.held = HeldCatalogue(version, reason, text, judgement.names, candidate.count, since)
        raise Held(self._state.held)

    def check(self) -> None:
        """Raise `Held` if a catalogue is held. Called in a cycle in which the table has not changed."""
        if self._state.held is not None:
            raise Held(self._state.held)

    def release(self, why: str) -> None:
        """Release the held catalogue, and log ``why``."""
        if self._state.held is not None:
            log.info("Catalogue no longer held", version_hash=self._state.held.version_hash, reason=why)
        self._snapshot, self._state.held = None, None
