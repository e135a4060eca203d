"""The present wishes of operators: those given by command, which are kept on disk, and those in the policy file.

A command takes effect at once, in memory. It is written afterwards, because the disk may hang. The file of an earlier
run is replaced only after it was read. It does not undo a wish that was given before it was read.
"""

from __future__ import annotations

from collections.abc import Callable

from definition_server.catalog.signing import Signer
from definition_server.control_plane.catalogue_disk import CatalogueDisk
from definition_server.control_plane.wishes import Merged, Pin, Policy, Wishes


class OperatorWishes:
    """The wishes of one server."""

    def __init__(
        self,
        disk: CatalogueDisk,
        policy: Callable[[], Policy],
        clock: Callable[[], float],
        signer: Callable[[], Signer | None],
    ) -> None:
        """
        Args:
            disk: Keeps the wishes given by command.
            policy: Returns the present declarations of the policy file.
            clock: Seconds since the epoch.
            signer: The present key, with which the MAC of the file is made.
        """
        self._disk = disk
        self._policy = policy
        self._clock = clock
        self._signer = signer
        self._by_command = Wishes()
        self._known = False
        self._waits = False
        self._pin_is_newer = self._count_is_newer = False
        self._used_up: set[str] = set()

    def now(self) -> Merged:
        """The effective wishes."""
        return self._by_command.merge(self._policy(), self._clock())

    def rows_held_in(self, version: str) -> int:
        """The number of rows that the gate held in the catalogue ``version``; 0 if the newest catalogue that passed is
        another one.
        """
        return self._by_command.rows_held if self._by_command.rows_held_in == version else 0

    def recall(self, stored: Wishes) -> None:
        """Note ``stored``, the wishes of an earlier run, when the disk has answered. If there are newer wishes,
        `save_again` stores them.
        """
        # A late answer of the disk must not undo a wish that was given meanwhile.
        mine = self._by_command
        merged = stored.hold_rows(mine.rows_held, mine.rows_held_in) if self._count_is_newer else stored
        for version in self._used_up:
            merged = merged.use_up(version)
        for version in mine.accepted:
            merged = merged.accept(version)
        self._by_command = merged.pin(mine.pinned) if self._pin_is_newer else merged
        self._known = True
        self._waits |= self._by_command != stored

    def accept(self, version: str) -> None:
        """Note that the catalogue with the hash ``version`` may be published. `save` stores this."""
        self._by_command = self._by_command.accept(version)

    def pin(self, pin: Pin | None) -> None:
        """Make ``pin`` the pin by command; None for no such pin. It takes effect at once. `save` stores it."""
        self._pin_is_newer = True
        self._by_command = self._by_command.pin(pin)

    async def save(self) -> str | None:
        """Store the wishes given by command.

        Returns:
            The reason why they would not survive a restart; None if they would.
        """
        if not self._known:
            # A file that an earlier run wrote must not be replaced before it was read.
            self._waits = True
            self._disk.note_pin_unsaved(unsaved=self._pin_is_newer)
            return "the disk has not answered yet; the change is stored when it has"
        self._waits = False
        return await self._disk.save_wishes(self._by_command, self._signer())

    async def save_again(self) -> None:
        """Store the wishes that could not be stored before."""
        if self._known and self._waits:
            await self.save()
        elif self._known:
            await self._disk.save_wishes_again(self._signer())

    async def note_passed(self, version: str, *, accepted: bool, rows_held: int) -> None:
        """Note that the catalogue ``version`` is the newest. Its acceptance is used up. The number of rows that the
        gate held in it is kept.
        """
        wishes = self._by_command.hold_rows(rows_held, version)
        self._count_is_newer = True
        if accepted:
            self._used_up.add(version)
            wishes = wishes.use_up(version)
        if wishes != self._by_command:
            self._by_command = wishes
            await self.save()

    async def note_fewer_held(self, version: str, rows_held: int) -> None:
        """Note that the gate now holds ``rows_held`` rows of ``version``, which is still the newest. Only a smaller
        count is kept: with a larger one, the next change would pass the guard although too many rows are held.
        """
        if rows_held < self.rows_held_in(version):
            self._by_command = self._by_command.hold_rows(rows_held, version)
            await self.save()
