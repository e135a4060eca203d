"""The catalogue that a pin names: found in memory or in the history, shown in the state, left when the pin expires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.catalogue_disk import CatalogueDisk
from definition_server.control_plane.operator_wishes import OperatorWishes
from definition_server.control_plane.store import StoreError
from definition_server.control_plane.sync_state import PinState, SyncState
from definition_server.control_plane.wishes import Pin
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

_LONGEST_TIMER_SECONDS = 3600.0


class PinnedCatalogue:
    """Has the pinned catalogue in memory for as long as a pin counts."""

    def __init__(
        self,
        wishes: OperatorWishes,
        disk: CatalogueDisk,
        state: SyncState,
        *,
        others: Callable[[], tuple[Snapshot | None, ...]],
        signer: Callable[[], Signer | None],
        on_end: Callable[[], Awaitable[object]],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            wishes: Tell which pin counts.
            disk: Has the history.
            state: Shows the pin.
            others: The catalogues that are in memory for another reason.
            signer: The present key, which a file of the history must be signed with.
            on_end: Is called when a pin has expired.
            clock: Seconds since the epoch.
        """
        self._wishes = wishes
        self._disk = disk
        self._state = state
        self._others = others
        self._signer = signer
        self._on_end = on_end
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._missing: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Release the catalogue. The end of a pin has no effect any more."""
        if self._timer is not None:
            self._timer.cancel()
        if self._expiring is not None and not self._expiring.done():
            self._expiring.cancel()
        self._snapshot = None

    @property
    def snapshot(self) -> Snapshot | None:
        """What was loaded for the pin."""
        return self._snapshot

    def change(self, pin: Pin | None, snapshot: Snapshot | None) -> None:
        """An operator's command pins ``snapshot``, or takes the pin away (None and None)."""
        if snapshot is not None:
            self._snapshot = snapshot
        if pin is None:
            log.warning("Pin taken away")
        else:
            log.warning("Catalogue pinned", version_hash=pin.version, until=pin.until)

    async def find(self) -> None:
        """Have the pinned catalogue in memory, where a pin counts and the history has it."""
        pin = self._wishes.now().pin
        if pin is None or self.in_memory(pin) is not None:
            return
        problem = "it is not in the history of this server"
        for entry in self._disk.entries:
            if pin.names(entry.version_hash):
                try:
                    self._snapshot = await self._disk.load_version(entry.version_hash, self._signer())
                    return
                except StoreError as error:
                    problem = str(error)
        if self._missing != pin.version:
            self._missing = pin.version
            log.error(
                "Pinned catalogue not served",
                version_hash=pin.version,
                source=pin.source,
                error=problem,
                effect="what is served stays, until the version is known or the pin ends",
                remedy="pin a version that `definition-server history` lists",
            )

    def in_memory(self, pin: Pin) -> Snapshot | None:
        """The catalogue that ``pin`` names, where it is in memory."""
        for snapshot in (self._snapshot, *self._others()):
            if snapshot is not None and pin.names(snapshot.version_hash):
                return snapshot
        return None

    def show(self) -> None:
        """Note the pin that counts in the state, log its end, and come back when it expires."""
        pin = self._wishes.now().pin
        shown = self._state.pin
        if pin is None:
            self._state.pin, self._snapshot, self._missing = None, None, None
            if shown is not None:
                log.warning("Pin has ended", version_hash=shown.version_hash, source=shown.source)
        else:
            missing = self.in_memory(pin) is None
            self._state.pin = PinState(pin.version, pin.until, pin.source, missing)
            if not missing:
                self._missing = None
        self._arm(pin)

    def _arm(self, pin: Pin | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if pin is None or pin.until is None:
            return
        seconds = min(_LONGEST_TIMER_SECONDS, max(0.0, pin.until - self._clock()) + 0.001)
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._expiring = asyncio.get_running_loop().create_task(self._expire())

    async def _expire(self) -> None:
        try:
            await self._on_end()
        except Exception:  # the next cycle does it
            log.exception("Unexpected failure at the end of a pin")
