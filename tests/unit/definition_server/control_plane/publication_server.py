"""A synchronizer with a disk and the operator's commands, for the tests of publication."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tests.support.fakes import FakeClock, FakeSource
from tests.support.loop import eventually, promptly
from tests.support.snapshots import row

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.definition import Row
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.disk import on_disk
from definition_server.control_plane.history import History
from definition_server.control_plane.publications import (
    Publications,
)
from definition_server.control_plane.publisher import Publisher
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync import Synchronizer
from definition_server.control_plane.sync_state import Outcome
from definition_server.control_plane.wishes import Policy, WishesFile

T = TypeVar("T")

HELD = "Catalogue held"
ALL = tuple(row(f"c{number:02}") for number in range(40))
FEW = ALL[:4]


class Disk:
    """A disk that hangs until `works` is set."""

    def __init__(self) -> None:
        self.works = threading.Event()
        self.works.set()

    def __call__(self, work: Callable[[], T]) -> asyncio.Future[T]:
        def when_it_works() -> T:
            assert self.works.wait(60)
            return work()

        return on_disk(when_it_works)


class Server:
    """A synchronizer that uses SNAPSHOT_DIR. `restart` replaces it by a new synchronizer, as a new process would."""

    def __init__(self, directory: Path | None, source: FakeSource) -> None:
        self.directory = directory
        self.source = source
        self.clock = FakeClock()
        self.disk = Disk()
        self.policy = Policy()
        self.signer: Signer | None = None
        self.keep = 10
        self.options: dict[str, Any] = {}
        self.generations: list[int] = []
        self.versions: list[str] = []
        self._start()

    def _start(self) -> None:
        directory = self.directory
        self.publisher = Publisher()
        self.publisher.on_publish(lambda publication: self.generations.append(publication.snapshot.generation))
        self.publisher.on_publish(lambda publication: self.versions.append(publication.snapshot.version_hash))
        self.synchronizer = Synchronizer(
            self.source,
            self.publisher,
            signer=self.signer,
            store=None if directory is None else SnapshotStore(directory),
            history=None if directory is None else History(directory, self.keep, self.clock),
            wishes=None if directory is None else WishesFile(directory),
            policy=lambda: self.policy,
            clock=self.clock,
            disk=self.disk,
            **self.options,
        )
        self.syncs = 0
        self.publications = Publications(
            self.synchronizer.catalogue, signer=lambda: self.signer, sync_soon=self._sync_soon, clock=self.clock
        )

    def _sync_soon(self) -> None:
        self.syncs += 1

    def restart(self) -> None:
        self.close()
        self.generations, self.versions = [], []
        self._start()

    def close(self) -> None:
        self.synchronizer.close()
        self.publisher.close()

    async def written(self) -> None:
        """Wait until no thread works on the disk."""
        await eventually(lambda: not any(thread.name == "disk" for thread in threading.enumerate()), "the disk is idle")
        await asyncio.sleep(0)

    async def cycle(self, *rows: Row) -> Outcome:
        """Run a cycle a second after the previous one. If there are ``rows``, they replace the table first."""
        self.clock.advance(1)
        if rows:
            self.source.replace(*rows)
        outcome = await promptly(self.synchronizer.cycle(lambda _: 60.0))
        await self.written()
        return outcome

    @property
    def served(self) -> Snapshot:
        assert self.publisher.current is not None
        return self.publisher.current.snapshot

    @property
    def version(self) -> str:
        return self.served.version_hash

    @property
    def held(self) -> str:
        assert self.synchronizer.state.held is not None
        return self.synchronizer.state.held.version_hash


async def change(server: Server, code: str) -> str:
    """Publish the table with other code in one row. Returns the published version."""
    assert await server.cycle(row("c00", code), *ALL[1:]) is Outcome.PUBLISHED
    return server.version


class HoldingGate:
    """A gate that holds the rows of ``names``."""

    unsure = False

    def __init__(self) -> None:
        self.served: dict[bytes, bytes] = {}
        self.names: frozenset[bytes] = frozenset()
        self.last_good: list[str | None] = []
        self.rows: list[Row] = []
        """All rows that the gate got while the table was read."""

    async def apply(self, builder: SnapshotBuilder, last_good: Snapshot | None) -> frozenset[bytes]:
        self.last_good.append(None if last_good is None else last_good.version_hash)
        return self.names

    def prepare(self) -> None: ...

    def rows_read(self, rows: Sequence[Row]) -> None:
        self.rows += rows

    def cycle_ended(self, newest: Snapshot | None) -> None: ...
