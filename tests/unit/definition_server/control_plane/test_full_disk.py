"""A full disk, at each step of each file: published catalogues are served, one log line names the file that is not
stored, and once there is room again every file is stored without a change of the table.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.logs import LogLines
from tests.unit.definition_server.control_plane.publication_server import Server, change

from definition_server.control_plane import store
from definition_server.control_plane.source import SourceError
from definition_server.observability.reasons import Reason

pytestmark = pytest.mark.usefixtures("nothing_is_left")

FILES: dict[str, Callable[[str], bool]] = {
    "last-known-good": lambda path: "last-known-good" in path,
    "history": lambda path: "/history/" in path,
    "wishes": lambda path: "/wishes." in path,
    "all": lambda path: "/fd/" not in path,
}
LINES = {
    "last-known-good": "Last-known-good snapshot not stored",
    "history": "History of catalogues not usable in part",
    "wishes": "Pins and accepted catalogues not stored",
}
STEPS = ("create", "write", "rename")
FULL = "No space left on device"


@contextmanager
def full_disk(monkeypatch: pytest.MonkeyPatch, step: str, concerns: Callable[[str], bool]) -> Iterator[None]:
    """Make the disk full at ``step``, for the files that have this step."""

    def check(path: object) -> None:
        if concerns(str(path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    make, sync, rename = store.mkstemp, os.fsync, Path.replace

    def mkstemp(suffix: str, prefix: str, directory: Path) -> tuple[int, str]:
        check(directory / prefix)
        return make(suffix, prefix, directory)

    def fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if not path.is_dir():
            check(path)
        sync(descriptor)

    def replace(self: Path, target: Any) -> Path:
        check(target)
        return rename(self, target)

    with monkeypatch.context() as patch:
        if step == "create":
            patch.setattr(store, "mkstemp", mkstemp)
        elif step == "write":
            patch.setattr(os, "fsync", fsync)
        else:
            patch.setattr(Path, "replace", replace)
        yield


def lines_of(logs: LogLines) -> set[str]:
    return {str(line["event"]) for line in logs if FULL in str(line.get("error"))}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("file", FILES)
async def test_a_full_disk_loses_neither_a_served_catalogue_nor_an_operators_wish(
    server: Server, logs: LogLines, monkeypatch: pytest.MonkeyPatch, file: str, step: str
) -> None:
    await server.cycle()
    old = server.version
    with full_disk(monkeypatch, step, FILES[file]):
        new = await change(server, "new")
        assert server.version == new
        problem = await server.publications.pin(old, None)
        assert server.version == old
        assert (problem is not None and FULL in problem) == (file in {"wishes", "all"})
        await server.written()
        for _ in range(2):
            await server.cycle()
        assert lines_of(logs) == (set(LINES.values()) if file == "all" else {LINES[file]})
        assert server.directory is not None
        assert not list(server.directory.rglob("*.tmp"))
    await server.cycle()
    assert not server.synchronizer.state.pin_unsaved
    assert server.synchronizer.state.store_error is None
    for _ in range(3):
        server.source.fail(SourceError("away", Reason.DATABASE_UNREACHABLE))
    server.restart()
    assert await server.synchronizer.restore()
    assert server.version == old, "the pin is kept"
    assert {entry.version_hash for entry in server.synchronizer.catalogue.disk.entries} == {old, new}
    await server.publications.unpin()
    assert server.version == new, "the last-known-good snapshot is kept"
