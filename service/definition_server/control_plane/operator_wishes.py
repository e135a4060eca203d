"""What operators ask for now: by command, which is kept on disk, and by the policy file.

A command counts at once, in memory. The disk comes afterwards, because it may hang; and what an earlier run has written
there is neither replaced before it was read, nor does it undo what was asked for meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

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
            disk: Keeps what was asked for by command.
            policy: What the policy file declares now.
            clock: Seconds since the epoch.
            signer: The present key, which gives the kept file its MAC.
        """
        self._disk = disk
        self._policy = policy
        self._clock = clock
        self._signer = signer
        self._by_command = Wishes()
        self._known = False
        self._commanded = False

    def now(self) -> Merged:
        """What counts now."""
        return self._by_command.merge(self._policy(), self._clock())

    @property
    def rows_held(self) -> int:
        """How many rows the gate held in the newest catalogue that passed the guard."""
        return self._by_command.rows_held

    def recall(self, stored: Wishes) -> None:
        """The disk has answered: ``stored`` was asked for in an earlier run."""
        # A disk that answered late must not undo what was asked for meanwhile.
        if self._commanded:
            self._by_command = replace(self._by_command, accepted=(*stored.accepted, *self._by_command.accepted))
        else:
            self._by_command = stored
        self._known = True

    def accept(self, version: str) -> None:
        """The catalogue with the hash ``version`` may be published. `save` keeps that."""
        self._commanded = True
        self._by_command = self._by_command.accept(version)

    def pin(self, pin: Pin | None) -> None:
        """``pin`` counts, or none by command. `save` keeps that."""
        self._commanded = True
        self._by_command = self._by_command.pin(pin)

    async def save(self) -> str | None:
        """Keep what was asked for by command.

        Returns:
            Why that would not survive a restart; None where it does.
        """
        return await self._disk.save_wishes(self._by_command, self._signer())

    async def note_passed(self, version: str, *, accepted: bool, rows_held: int) -> None:
        """The catalogue ``version`` is the newest: use its acceptance up, and keep how many rows the gate held."""
        wishes = self._by_command.use_up(version) if accepted else self._by_command
        wishes = replace(wishes, rows_held=rows_held)
        # What an earlier run wrote must not be replaced before it was read.
        if wishes != self._by_command and self._known:
            self._by_command = wishes
            await self.save()
