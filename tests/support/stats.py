"""Stats pages that tests write and read in one process."""

from __future__ import annotations

from definition_server.ipc.stats import Slot, unshared_slot


class Pages:
    """Pages of several workers, without shared memory."""

    def __init__(self, count: int) -> None:
        self._slots = [unshared_slot() for _ in range(count)]

    def slot(self, number: int) -> Slot:
        """The page of worker ``number``, from 0."""
        return self._slots[number]
