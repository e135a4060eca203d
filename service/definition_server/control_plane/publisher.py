"""The current publication: one snapshot in sealed memory, which the supervisor sends to the workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from definition_server.catalog.builder import BuiltSnapshot
from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import create_sealed, map_sealed


@dataclass(frozen=True, slots=True)
class Publication:
    """A published snapshot and the descriptor of its sealed memory (valid until the next publication)."""

    snapshot: Snapshot
    descriptor: int


class Publisher:
    """Holds the current publication and calls the listeners of `on_publish` with each new one."""

    def __init__(self) -> None:
        self.current: Publication | None = None
        self._listeners: list[Callable[[Publication], None]] = []

    def on_publish(self, listener: Callable[[Publication], None]) -> None:
        """Call ``listener`` with every new publication."""
        self._listeners.append(listener)

    @property
    def next_generation(self) -> int:
        """The number of the next snapshot."""
        return 1 if self.current is None else self.current.snapshot.generation + 1

    def publish(self, publication: Publication) -> None:
        """Make ``publication`` the current one. Owns its descriptor from now on, and closes that of the one before."""
        previous, self.current = self.current, publication
        for listener in self._listeners:
            listener(publication)
        if previous is not None:
            os.close(previous.descriptor)

    def close(self) -> None:
        """Close the descriptor. The mappings of the workers stay valid."""
        if self.current is not None:
            os.close(self.current.descriptor)
            self.current = None


def to_shared_memory(built: BuiltSnapshot) -> Publication:
    """Write ``built`` into sealed memory, to be published.

    Raises:
        OSError: where memory or descriptors are exhausted.
    """
    descriptor = create_sealed("avap-snapshot", built.pieces)
    try:
        return Publication(Snapshot(map_sealed(descriptor)), descriptor)
    except BaseException:
        os.close(descriptor)
        raise
