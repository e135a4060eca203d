"""The actions of operators in a run, and the checks of their effects: a pin, its end, and an accepted catalogue reach
every worker within `SOON`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from random import Random
from typing import Any

from tests.simulation.publication.promises import Broken, Promises

from definition_server.control_plane.publications import PublicationError

SOON = 1.0
"""Seconds within which a pin, its end and an accepted catalogue reach every worker."""
_STEPS = 10
"""The approximate number of steps of heavy work in a cycle with a changed table."""


class Operators:
    """The operators of one run, with each of its masters in turn."""

    def __init__(
        self,
        random: Random,
        promises: Promises,
        master: Callable[[], Any],
        clock: Callable[[], float],
        note: Callable[[str], None],
    ) -> None:
        """
        Args:
            random: Decides the actions.
            promises: Gets the versions that are accepted or pinned.
            master: The `world.Master` that lives now.
            clock: Seconds since the epoch.
            note: Writes a line of the trace.
        """
        self._random, self._promises, self._master, self._clock, self._note = random, promises, master, clock, note
        self._watches: list[asyncio.Task[None]] = []

    def check(self) -> None:
        """Raise the failure of a check that has ended."""
        for watch in [watch for watch in self._watches if watch.done()]:
            self._watches.remove(watch)
            if not watch.cancelled():
                watch.result()

    def _watch(self, task: Any) -> None:
        self._watches.append(asyncio.create_task(task))

    async def accept(self) -> None:
        """Accept the held catalogue."""
        held = self._master().synchronizer.state.held
        if held is None:
            return
        self._note(f"accept {held.version_hash[:8]}")
        self._promises.accepted.add(held.version_hash)
        with suppress(PublicationError):
            await self._master().publications.accept(held.version_hash)

    async def pin(self) -> None:
        """Pin a version of the history, for a while or without an end."""
        entries = await self._master().publications.history()
        if not entries:
            return
        version = self._random.choice(sorted(entry.version_hash for entry in entries))
        until = self._random.choice([None, self._clock() + self._random.uniform(10, 7200)])
        self._note(f"pin {version[:8]} until {until}")
        try:
            await self._master().publications.pin(version, until)
        except PublicationError:
            return
        # If the pinned catalogue was served already, nothing is published. The table may also return to that state
        # during the pin.
        self._promises.served_last = None
        if until is not None:
            self._watch(self._expect_end(version, until))
        if until is None or until - self._clock() > 2 * SOON:
            await self._expect_served(version)

    async def unpin(self) -> None:
        """Follow the table again."""
        with suppress(PublicationError):
            await self._master().publications.unpin()
            self._note("unpin")

    async def act_beside_a_cycle(self) -> None:
        """Pin a version, and begin a cycle that has something to publish. In the middle of its heavy work an operator
        ends the pin, accepts the held catalogue, or pins another version.

        Only this makes two publications coincide, which must not get the same generation.
        """
        await self.pin()
        master = self._master()
        action: Callable[[], Awaitable[None]] = self._random.choice([self.unpin, self.unpin, self.accept, self.pin])

        def act() -> None:
            self._note("an operator acts beside a cycle")
            self._watch(action())

        master.background.interrupt(self._random.randrange(_STEPS), act)
        master.loop.sync_soon()

    async def _expect_end(self, version: str, until: float) -> None:
        """A second after the pin has expired, it has no effect, and no worker serves ``version`` because of it."""
        await asyncio.sleep(until - self._clock() + SOON)
        catalogue = self._master().synchronizer.catalogue
        newest = catalogue.newest
        if catalogue.wishes().pin is None and newest is not None and newest.version_hash != version:
            self._expect_nobody_serves(version)

    def _expect_nobody_serves(self, version: str) -> None:
        for worker in self._master().fleet.living:
            if worker.draining or not worker.answers or worker.snapshot is None:
                continue
            if worker.snapshot.version_hash == version:
                raise Broken(f"the pin of {version[:8]} has ended, and a worker serves it {SOON:g} s later")

    async def _expect_served(self, version: str) -> None:
        """Every worker that answers serves ``version`` within a second."""
        await asyncio.sleep(SOON)
        pin = self._master().synchronizer.catalogue.wishes().pin
        if pin is None or not pin.names(version):
            return
        for worker in self._master().fleet.living:
            if worker.answers and worker.snapshot is not None and not worker.draining:
                found = worker.snapshot.version_hash
                if found != version:
                    raise Broken(f"{version[:8]} is pinned, and a worker serves {found[:8]} {SOON:g} s later")
