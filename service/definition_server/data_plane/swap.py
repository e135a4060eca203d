"""The steps by which a worker changes the snapshot that it serves: `Swap.prepare`, `Swap.commit`, `Swap.release`, in
this order.

``prepare`` and ``release`` take some time, and calls are answered meanwhile; ``commit`` is one step of the event loop,
after which every answer is from the new snapshot. Only ``commit`` is required: without ``prepare`` the first calls
after it are slower, and without ``release`` the memory of replaced answers is freed later.
"""

from __future__ import annotations

import asyncio
from collections import deque
from enum import Enum, auto

from definition_server.catalog.snapshot import Snapshot
from definition_server.data_plane.services import DefinitionEngine

OLD_SNAPSHOTS = 4
"""The most replaced snapshots that may stay in memory because clients still read answers from them. A catalogue that is
sent to a slow client is a view of its snapshot's memory, and the machine may lack the memory for more than a few
snapshots."""


class SwapTimes:
    """The times of the last replacements of snapshots, by the loop's clock."""

    def __init__(self) -> None:
        self._instants: deque[float] = deque(maxlen=OLD_SNAPSHOTS + 1)

    def note(self) -> None:
        """Note that a snapshot is replaced now."""
        self._instants.append(asyncio.get_running_loop().time())

    @property
    def oldest_allowed(self) -> float | None:
        """Answers that were made before this time are from snapshots that must be released; None: there are none."""
        return self._instants[0] if len(self._instants) > OLD_SNAPSHOTS else None


class SwapState(Enum):
    """The state of a swap: NEW → (PREPARING →) COMMITTED → RELEASED."""

    NEW = auto()
    PREPARING = auto()
    """`Swap.prepare` has begun. It may end early; the answers that it has prepared are used."""
    COMMITTED = auto()
    RELEASED = auto()


class Swap:
    """The swap of a transport that remembers no answers. Other transports extend the three steps."""

    def __init__(self, engine: DefinitionEngine, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        """The snapshot that is to be served."""
        self.state = SwapState.NEW
        self._engine = engine

    async def prepare(self) -> None:
        """Make answers from the snapshot before it is served. If this raises an exception, `commit` must be called
        nevertheless.
        """
        assert self.state is SwapState.NEW
        self.state = SwapState.PREPARING

    def commit(self) -> Snapshot | None:
        """Serve the snapshot from now on. Returns the snapshot that it replaces."""
        assert self.state in (SwapState.NEW, SwapState.PREPARING)
        self.state = SwapState.COMMITTED
        replaced, self._engine.snapshot = self._engine.snapshot, self.snapshot
        return replaced

    async def release(self) -> None:
        """Free the memory that only the replaced snapshot needed."""
        assert self.state is SwapState.COMMITTED
        self.state = SwapState.RELEASED
