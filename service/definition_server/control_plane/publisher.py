"""The current publication: one snapshot in sealed memory, which the supervisor sends to the workers."""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial

from definition_server.catalog.assembly import chunks
from definition_server.catalog.builder import BuiltSnapshot, SnapshotBuilder, rows_of
from definition_server.catalog.layout import FOOTER_SIZE, Footer
from definition_server.catalog.signing import UNSIGNED, Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import create_sealed, map_sealed

RECENT = 10

_SHORT_OCTETS = 4 << 20
"""A catalogue of fewer octets is hashed before it is written, and not in a thread meanwhile, because starting the
thread would take longer than hashing.
"""

_RELEASED_CHUNKS = 16
"""The most chunks of the previous snapshot that are resident at one time while its commands are copied."""


@dataclass(frozen=True, slots=True)
class PublishedVersion:
    """The record of one publication. A version may be published several times."""

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
        """When the current publication was made, seconds since the epoch."""
        self._recent: deque[PublishedVersion] = deque(maxlen=RECENT)
        self._listeners: list[Callable[[Publication], None]] = []

    def on_publish(self, listener: Callable[[Publication], None]) -> None:
        """Call ``listener`` with every new publication."""
        self._listeners.append(listener)

    @property
    def recent(self) -> tuple[PublishedVersion, ...]:
        """The last `RECENT` publications, the newest first. A publication that only signs the served catalogue again is
        not recorded.
        """
        return tuple(reversed(self._recent.copy()))

    @property
    def next_generation(self) -> int:
        """The generation of the next snapshot."""
        return 1 if self.current is None else self.current.snapshot.generation + 1

    def publish(self, publication: Publication) -> None:
        """Make ``publication`` the current one. Takes over its descriptor, and closes that of the previous
        publication.
        """
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
        """Close the descriptor of the current publication. The mappings of the workers stay valid."""
        if self.current is not None:
            os.close(self.current.descriptor)
            self.current = None


def to_shared_memory(built: BuiltSnapshot) -> Publication:
    """Write ``built`` into sealed memory, to be published.

    Raises:
        OSError: if memory or descriptors are exhausted.
    """
    return _in_shared_memory(built.pieces)


def prepare(
    builder: SnapshotBuilder, newest: Footer | None, *, generation: int, created_at_ns: int
) -> Callable[[], Publication] | None:
    """Build the snapshot of ``builder``.

    The returned function writes the snapshot to sealed memory. A large catalogue is hashed in another thread while it
    is written. Each message is freed once it is written.

    Args:
        builder: Has the rows.
        newest: The footer of the catalogue that was published last.
        generation: See `SnapshotBuilder.build`.
        created_at_ns: See there.

    Returns:
        The function, or None if ``newest`` has the same octets. The function raises `OSError` if memory or descriptors
        are exhausted.

    Raises:
        CatalogTooLarge: if the body would exceed 2 GiB.
    """
    unsealed = builder.arrange()
    seal = partial(builder.seal, unsealed, generation=generation, created_at_ns=created_at_ns)
    # If names, hashes and key are the same, probably all octets are the same. This is checked before anything is
    # written.
    likely = newest is not None and (newest.version_hash, newest.key_id) == (unsealed.version_hash, builder.key_id)
    if likely or unsealed.body_length <= _SHORT_OCTETS:
        digest = hashlib.sha256()
        for chunk in chunks(list(unsealed.pieces)):
            digest.update(chunk)
        footer = seal(digest.digest())
        if newest is not None and newest.same_octets(footer):
            return None
        return partial(_in_shared_memory, (*unsealed.pieces, footer.pack()))
    return partial(_hashed_and_written, unsealed.pieces, seal, builder.copies_from)


def _hashed_and_written(
    parts: list[bytes | memoryview], seal: Callable[[bytes], Footer], source: Snapshot | None
) -> Publication:
    """The publication of ``parts`` and of the footer that ``seal`` makes from their hash. Some parts are slices of
    ``source``.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1, "hash") as hasher:

        def pieces() -> Iterator[bytes | memoryview]:
            for number, chunk in enumerate(chunks(parts)):
                if source is not None and number % _RELEASED_CHUNKS == 0:
                    source.release_pages()
                hashing = hasher.submit(digest.update, chunk)
                yield chunk
                hashing.result()
            if source is not None:
                source.release_pages()
            yield seal(digest.digest()).pack()

        return _in_shared_memory(pieces())


def _in_shared_memory(pieces: Iterable[bytes | memoryview]) -> Publication:
    descriptor = create_sealed("avap-snapshot", pieces)
    try:
        return Publication(Snapshot(map_sealed(descriptor)), descriptor)
    except BaseException:
        os.close(descriptor)
        raise


def key_id_of(signer: Signer | None) -> bytes:
    """The key id of a snapshot that is signed by ``signer``."""
    return UNSIGNED if signer is None else signer.key_id


def published_again(snapshot: Snapshot, signer: Signer | None, generation: int) -> Publication:
    """A new publication in its own sealed memory: the definitions of ``snapshot``, signed by ``signer``, with the
    number ``generation``.

    The time of building is kept. O(size).

    Raises:
        SignatureError: if a package in ``snapshot`` does not have a known version.
        OSError: if memory or descriptors are exhausted.
    """
    footer = replace(snapshot.footer, generation=generation)
    if footer.key_id == key_id_of(signer):
        return _in_shared_memory((snapshot.buffer[:-FOOTER_SIZE], footer.pack()))
    builder = SnapshotBuilder(signer)
    builder.add(rows_of(snapshot))
    return to_shared_memory(builder.build(generation=generation, created_at_ns=footer.created_at_ns))
