"""The operator's actions on catalogues: list, compare, accept, pin and export them. They do not need the database.

An action that has begun is completed even if its client disconnects: a partial action, such as a pin that is in effect
and not stored, would be worse than a complete one or none.

Versions are named by their hash, or by a unique beginning of it of at least `PREFIX_DIGITS` digits.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Difference, Snapshot, diff
from definition_server.control_plane.history import HistoryEntry
from definition_server.control_plane.served_catalogue import ServedCatalogue
from definition_server.control_plane.store import StoreError
from definition_server.control_plane.wishes import LATEST_SECONDS, PREFIX_DIGITS, Pin
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

T = TypeVar("T")

_DIGITS = re.compile(r"[0-9a-f]+")
_SHOWN_DIGITS = 16
_SHOWN = 10


class PublicationError(Exception):
    """A request that cannot be fulfilled. The message names the fault and the remedy for the operator."""


class InvalidRequest(PublicationError):
    """The request itself is invalid."""


class UnknownVersion(PublicationError):
    """No catalogue has that hash, or several hashes begin with it. The message lists the catalogues that exist."""


class Publications:
    """The operator's actions on the catalogues of one server."""

    def __init__(
        self,
        catalogue: ServedCatalogue,
        *,
        signer: Callable[[], Signer | None],
        sync_soon: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            catalogue: The served and the held catalogue.
            signer: The present key: a file of the history must have its MAC.
            sync_soon: Starts a cycle, which checks whether the table agrees with the accepted catalogue.
            clock: Seconds since the epoch.
        """
        self._catalogue = catalogue
        self._signer = signer
        self._sync_soon = sync_soon
        self._clock = clock
        self._orders: set[asyncio.Task[Any]] = set()

    async def _to_its_end(self, order: Coroutine[Any, Any, T]) -> T:
        """The result of ``order``. If the caller is cancelled, ``order`` continues."""
        task = asyncio.create_task(order)
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(_log_failure)
            raise

    async def history(self) -> Sequence[HistoryEntry]:
        """The catalogues in the history that are known so far, the newest first. Does not wait for a disk."""
        return self._catalogue.disk.entries

    async def diff(self, old: str, new: str) -> tuple[str, str, Difference]:
        """Both complete hashes, and the commands by which ``new`` differs from ``old``. A held catalogue can be
        compared too.

        Raises:
            PublicationError: if a version is not known, or cannot be read.
        """
        before, after = await self._snapshot(old, held=True), await self._snapshot(new, held=True)
        return before.version_hash, after.version_hash, await self._catalogue.in_background(diff, before, after)

    async def accept(self, version: str) -> None:
        """Publish the catalogue that the guard holds.

        Raises:
            PublicationError: if another catalogue is held, or none is.
        """
        _check(version)
        candidate = self._catalogue.candidate
        if candidate is None or not candidate.version_hash.startswith(version):
            known = any(name.startswith(version) for name in self._known(held=False))
            what = "this version was published before" if known else "no such version is held"
            serve = f" To serve it again: `definition-server pin {version}`, with --for or --until." if known else ""
            held = (
                "No catalogue is held now." if candidate is None else f"The held version is {candidate.version_hash}."
            )
            raise UnknownVersion(f"{version}: {what}. {held}{serve}")
        await self._to_its_end(self._accept(candidate.version_hash))

    async def _accept(self, version: str) -> None:
        await self._catalogue.accept(version)
        self._sync_soon()

    async def pin(self, version: str, until: float | None) -> str | None:
        """Serve ``version`` from now on, whatever the table holds.

        Args:
            version: A version of the history, or the served one.
            until: Seconds since the epoch; None if the pin lasts until `unpin`.

        Returns:
            The reason why the pin would not survive a restart; None if it would.

        Raises:
            PublicationError: if the version is not known, or cannot be read.
        """
        if until is not None and until <= self._clock():
            raise InvalidRequest("the pin would end in the past")
        if until is not None and until > LATEST_SECONDS:
            raise InvalidRequest("the pin would end after the year 9999")
        self._refuse_held(version)
        snapshot = await self._snapshot(version, held=False)
        return await self._to_its_end(self._catalogue.pin(Pin(snapshot.version_hash, until), snapshot))

    def _refuse_held(self, version: str) -> None:
        """Raise `UnknownVersion` if ``version`` names the held catalogue, because a pin would serve it although it
        never passed the guard.
        """
        held = self._catalogue.candidate
        if held is None or not held.version_hash.startswith(version):
            return
        if not any(name.startswith(version) for name in self._known(held=False)):
            raise UnknownVersion(
                f"{version}: this version is held and was never published, so it cannot be pinned. If it is intended, "
                f"`definition-server accept {held.version_hash[:_SHOWN_DIGITS]}` publishes it"
            )

    async def unpin(self) -> str | None:
        """Follow the table again: the newest catalogue that passed the guard is served at once.

        Returns:
            The reason why the end of the pin would not survive a restart; None if it would.

        Raises:
            PublicationError: if nothing is pinned, or the policy file pins a version.
        """
        pin = self._catalogue.wishes().pin
        if pin is None:
            raise PublicationError("nothing is pinned")
        note = await self._to_its_end(self._catalogue.pin(None, None)) if pin.source == "command" else None
        left = self._catalogue.wishes().pin
        if left is not None:
            raise PublicationError(f"PUBLICATION_POLICY pins {left.version}: take it out of that file")
        return note

    async def export(self, version: str | None) -> Snapshot:
        """The catalogue ``version``, or the served one if ``version`` is None.

        Raises:
            PublicationError: if the version is not known or cannot be read, or if nothing is served.
        """
        if version is not None:
            return await self._snapshot(version, held=True)
        served = self._catalogue.served
        if served is None:
            raise PublicationError("nothing is served yet")
        return served

    def _known(self, *, held: bool) -> dict[str, Snapshot | None]:
        """Version → its snapshot, for the catalogues in memory."""
        catalogue = self._catalogue
        found: dict[str, Snapshot | None] = {entry.version_hash: None for entry in catalogue.disk.entries}
        candidate = catalogue.candidate if held else None
        for snapshot in (candidate, catalogue.newest, catalogue.served):
            if snapshot is not None:
                found[snapshot.version_hash] = snapshot
        return found

    async def _snapshot(self, version: str, *, held: bool) -> Snapshot:
        _check(version)
        known = self._known(held=held)
        matches = [name for name in known if name.startswith(version)]
        if len(matches) != 1:
            which = f"{len(matches)} versions begin with {version}" if matches else f"{version}: no such version"
            raise UnknownVersion(f"{which}. {_listed(matches or list(known))}")
        snapshot = known[matches[0]]
        if snapshot is not None:
            return snapshot
        try:
            loaded = await self._catalogue.disk.load_version(matches[0], self._signer())
        except StoreError as error:
            raise PublicationError(f"{matches[0]} cannot be read: {error}") from None
        if loaded is None:
            raise UnknownVersion(f"{matches[0]} is not in the history any more. {_listed(list(known))}")
        return loaded


def _log_failure(order: asyncio.Task[Any]) -> None:
    """Log the failure of ``order``, whose client has disconnected."""
    if not order.cancelled() and (error := order.exception()) is not None:
        log.error("Unexpected failure of an operator's order", exc_info=error)


def _check(version: str) -> None:
    if not _DIGITS.fullmatch(version) or not PREFIX_DIGITS <= len(version) <= 64:
        raise InvalidRequest(
            f"{version[:80]!r} names no version: give {PREFIX_DIGITS} to 64 digits of its hash (0-9, a-f)"
        )


def _listed(versions: list[str]) -> str:
    if not versions:
        return "The history is empty."
    names = ", ".join(version[:_SHOWN_DIGITS] for version in versions[:_SHOWN])
    return f"There are: {names}{' and more' if len(versions) > _SHOWN else ''}."
