"""The current publication: sealed memory and what is known of it. One at a time; the supervisor hands it out."""

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
    """Holds the current publication and tells ``on_publish`` of each new one."""

    def __init__(self) -> None:
        self.current: Publication | None = None
        self._listeners: list[Callable[[Publication], None]] = []

    def on_publish(self, listener: Callable[[Publication], None]) -> None:
        """Call ``listener`` with every new publication."""
        self._listeners.append(listener)

    @property
    def next_generation(self) -> int:
        """Number for the next snapshot."""
        return 1 if self.current is None else self.current.snapshot.generation + 1

    def publish(self, publication: Publication) -> None:
        """Make ``publication`` the current one. Takes over its descriptor and closes the one before."""
        previous, self.current = self.current, publication
        for listener in self._listeners:
            listener(publication)
        if previous is not None:
            os.close(previous.descriptor)

    def close(self) -> None:
        """Close the descriptor; the workers' mappings live on."""
        if self.current is not None:
            os.close(self.current.descriptor)
            self.current = None


def to_shared_memory(built: BuiltSnapshot) -> Publication:
    """Write ``built`` into sealed memory, to be published.

    Raises:
        OSError: no memory or no descriptor left.
    """
    descriptor = create_sealed("avap-snapshot", built.pieces)
    try:
        return Publication(Snapshot(map_sealed(descriptor)), descriptor)
    except BaseException:
        os.close(descriptor)
        raise
