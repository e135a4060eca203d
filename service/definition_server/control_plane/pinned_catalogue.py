"""The catalogue that a pin names. It is taken from memory or the history, shown in the state, and released when the pin
expires.

If the pinned version is not known, the served catalogue stays: a pin means that changes of the table must not be
served. But if the server started with such a pin, no operator chose the catalogue that it serves, and keeping that
catalogue is no better than serving the next one. Then the pin is *vain*: the server follows the table until the pinned
version is known.
"""

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
    """Keeps the pinned catalogue in memory while a pin is effective."""

    def __init__(
        self,
        wishes: OperatorWishes,
        disk: CatalogueDisk,
        state: SyncState,
        *,
        served: Callable[[], Snapshot | None],
        newest: Callable[[], Snapshot | None],
        signer: Callable[[], Signer | None],
        on_end: Callable[[], Awaitable[object]],
        clock: Callable[[], float],
    ) -> None:
        """
        Args:
            wishes: Have the pin that is in effect.
            disk: Has the history.
            state: Shows the pin.
            served: Returns the served catalogue.
            newest: Returns the newest catalogue that passed the guard.
            signer: The present key, which a file of the history must be signed with.
            on_end: Called when a pin has expired.
            clock: Seconds since the epoch.
        """
        self._wishes = wishes
        self._disk = disk
        self._state = state
        self._served = served
        self._newest = newest
        self._signer = signer
        self._on_end = on_end
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._missing: str | None = None
        self._vain: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._expiring: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Release the catalogue, and cancel the call at the end of the pin."""
        if self._timer is not None:
            self._timer.cancel()
        if self._expiring is not None and not self._expiring.done():
            self._expiring.cancel()
        self._snapshot = None

    @property
    def snapshot(self) -> Snapshot | None:
        """The catalogue that was loaded for the pin; None if there is none."""
        return self._snapshot

    def change(self, pin: Pin | None, snapshot: Snapshot | None) -> None:
        """Note that an operator's command pins ``snapshot``. If both arguments are None, the command takes the pin
        away.
        """
        if snapshot is not None:
            self._snapshot = snapshot
        if pin is None:
            log.warning("Pin taken away")
        else:
            log.warning("Catalogue pinned", version_hash=pin.version, until=pin.until_text)

    async def find(self) -> None:
        """Load the pinned catalogue into memory, if a pin is effective and the history has the catalogue."""
        pin = self._wishes.now().pin
        if pin is None or self.in_memory(pin) is not None:
            return
        problem = "it is not in the history of this server"
        for entry in self._disk.entries:
            if pin.names(entry.version_hash):
                try:
                    found = await self._disk.load_version(entry.version_hash, self._signer())
                except StoreError as error:
                    problem = str(error)
                    continue
                if self._wishes.now().pin != pin:  # an operator has pinned another version meanwhile
                    return
                if found is not None:
                    self._snapshot = found
                    return
        if self._missing != pin.version:
            self._missing = pin.version
            follows = self._served() is None or self.is_vain(pin)
            effect = "the table is followed" if follows else "the served catalogue stays,"
            log.error(
                "Pinned catalogue not served",
                version_hash=pin.version,
                source=pin.source,
                error=problem,
                effect=f"{effect} until the version is known or the pin ends",
                remedy="pin a version that `definition-server history` lists",
            )

    def in_memory(self, pin: Pin) -> Snapshot | None:
        """The catalogue that ``pin`` names, if it is in memory."""
        for snapshot in (self._snapshot, self._served(), self._newest()):
            if snapshot is not None and pin.names(snapshot.version_hash):
                return snapshot
        return None

    def is_vain(self, pin: Pin) -> bool:
        """Whether ``pin`` has no effect, because its version is not known and was not known before anything was
        served.
        """
        return self._vain == pin.version and self.in_memory(pin) is None

    def show(self) -> None:
        """Note the effective pin in the state, and log if a pin has ended. Called again when the pin expires."""
        pin = self._wishes.now().pin
        shown = self._state.pin
        if pin is None:
            self._state.pin, self._snapshot, self._missing, self._vain = None, None, None, None
            if shown is not None:
                log.warning("Pin has ended", version_hash=shown.version_hash, source=shown.source)
        else:
            missing = self.in_memory(pin) is None
            if not missing:
                self._missing = self._vain = None
            elif self._served() is None:
                self._vain = pin.version
            self._state.pin = PinState(pin.version, pin.until, pin.source, missing, self.is_vain(pin))
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
        except Exception:  # the next cycle tries again
            log.exception("Unexpected failure at the end of a pin")
