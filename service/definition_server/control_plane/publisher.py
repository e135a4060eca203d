"""The current publication: one snapshot in sealed memory, which the supervisor sends to the workers."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder, rows_of
from definition_server.catalog.layout import FOOTER_SIZE
from definition_server.catalog.signing import UNSIGNED, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import create_sealed, map_sealed

RECENT = 10


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """That a version was published, which it may be several times."""

    at: float
    """Seconds since the epoch."""
    version_hash: str
    definitions: int
    generation: int


@dataclass(frozen=True, slots=True)
class Publication:
    """A published snapshot and the descriptor of its sealed memory (valid until the next publication)."""

    snapshot: Snapshot
    descriptor: int


class Publisher:
    """Holds the current publication and calls the listeners of `on_publish` with each new one."""

    def __init__(self) -> None:
        self.current: Publication | None = None
        self.published_at: float | None = None
        """When the current one was published, seconds since the epoch."""
        self._recent: deque[PublishedVersion] = deque(maxlen=RECENT)
        self._listeners: list[Callable[[Publication], None]] = []

    def on_publish(self, listener: Callable[[Publication], None]) -> None:
        """Call ``listener`` with every new publication."""
        self._listeners.append(listener)

    @property
    def recent(self) -> tuple[PublishedVersion, ...]:
        """The last `RECENT` publications, the newest first. Signing the served catalogue again adds none."""
        return tuple(reversed(self._recent.copy()))

    @property
    def next_generation(self) -> int:
        """The number of the next snapshot."""
        return 1 if self.current is None else self.current.snapshot.generation + 1

    def publish(self, publication: Publication) -> None:
        """Make ``publication`` the current one. Owns its descriptor from now on, and closes that of the one before."""
        previous, self.current = self.current, publication
        self.published_at = time.time()
        snapshot = publication.snapshot
        if previous is None or previous.snapshot.version_hash != snapshot.version_hash:
            self._recent.append(
                PublishedVersion(self.published_at, snapshot.version_hash, snapshot.count, snapshot.generation)
            )
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
    return _in_shared_memory(built.pieces)


def _in_shared_memory(pieces: Iterable[bytes | memoryview]) -> Publication:
    descriptor = create_sealed("avap-snapshot", pieces)
    try:
        return Publication(Snapshot(map_sealed(descriptor)), descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def key_id_of(signer: Signer | None) -> bytes:
    """The key id that a snapshot signed by ``signer`` has."""
    return UNSIGNED if signer is None else signer.key_id


def published_again(snapshot: Snapshot, signer: Signer | None, generation: int) -> Publication:
    """The definitions of ``snapshot`` under ``generation``, signed by ``signer``, in sealed memory of their own.

    The time of building stays. O(size).

    Raises:
        SignatureError: where a package in ``snapshot`` is none of a known version.
        OSError: where memory or descriptors are exhausted.
    """
    footer = replace(snapshot.footer, generation=generation)
    if footer.key_id == key_id_of(signer):
        return _in_shared_memory((snapshot.buffer[:-FOOTER_SIZE], footer.pack()))
    builder = SnapshotBuilder(signer)
    builder.add(rows_of(snapshot))
    return to_shared_memory(builder.build(generation=generation, created_at_ns=footer.created_at_ns))
