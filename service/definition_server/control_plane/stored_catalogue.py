"""The catalogue that an earlier run has stored in SNAPSHOT_DIR. It is read once, in a task separate from the cycles,
because a disk may hang.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.catalogue_disk import RECALL_PATIENCE_SECONDS, CatalogueDisk
from definition_server.control_plane.operator_wishes import OperatorWishes
from definition_server.control_plane.store import StoreError
from definition_server.observability.logs import get_logger

log = get_logger(__name__)

_HISTORY_TRIED = 3


class StoredCatalogue:
    """The last catalogue that an earlier run has published. It is kept in memory until a newer catalogue has passed the
    guard.
    """

    def __init__(self, disk: CatalogueDisk, wishes: OperatorWishes, signer: Callable[[], Signer | None]) -> None:
        """
        Args:
            disk: Reads the catalogue.
            wishes: Receive the wishes that were stored on the same disk.
            signer: The present key, which a stored file must be signed with.
        """
        self._disk = disk
        self._wishes = wishes
        self._signer = signer
        self._recalling: asyncio.Task[None] | None = None
        self._snapshot: Snapshot | None = None
        self._of_use = True

    @property
    def snapshot(self) -> Snapshot | None:
        """The stored catalogue, verified. None if the disk has none or has not answered, or if there is a newer
        catalogue.
        """
        return self._snapshot

    def close(self) -> None:
        """Stop waiting for the disk, and release the catalogue."""
        if self._recalling is not None:
            self._recalling.cancel()
        self._snapshot = None

    def forget(self) -> None:
        """Release the catalogue, because there is a newer one."""
        self._snapshot = None
        self._of_use = False

    def recall(self) -> asyncio.Task[None]:
        """Read the files of an earlier run, once. The task ends when the disk has answered."""
        if self._recalling is None:
            self._recalling = asyncio.create_task(self._recall())
        return self._recalling

    async def _recall(self) -> None:
        wishes, stored, _ = await asyncio.gather(
            self._disk.read_wishes(self._signer()), self._disk.load(self._signer()), self._disk.list_history()
        )
        self._disk.report_missing()
        self._wishes.recall(wishes)
        if stored is None:
            stored = await self._newest_of_history()
        if self._of_use:
            self._snapshot = stored
        await self._wishes.save_again()
        if (signer := self._signer()) is not None:
            self._disk.rotate(signer.previous, signer)

    async def _newest_of_history(self) -> Snapshot | None:
        """The catalogue in the history that was published last. It is used if the last-known-good file is not
        usable.
        """
        for entry in self._disk.entries[:_HISTORY_TRIED]:
            try:
                found = await self._disk.load_version(entry.version_hash, self._signer())
            except StoreError as error:
                log.error(
                    "History of catalogues not usable in part",
                    error=str(error),
                    remedy="check space, permissions and mount of SNAPSHOT_DIR/history",
                )
                continue
            if found is not None:
                return found
        return None

    async def recalled(self) -> None:
        """Wait until the files of an earlier run are read, for a limited time, because a disk may hang."""
        done, _ = await asyncio.wait((self.recall(),), timeout=RECALL_PATIENCE_SECONDS)
        if not done:
            log.error(
                "Stored catalogue and pins not known in time",
                waited_seconds=RECALL_PATIENCE_SECONDS,
                effect="the table is published without a comparison; a pin takes effect once the disk answers",
                remedy="check the disk of SNAPSHOT_DIR",
            )
