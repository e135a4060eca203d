"""A synchronizer with the operator's commands, with and without a directory; a publisher; the log."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from tests.support.fakes import FakeSource
from tests.support.logs import LogLines, captured_logs
from tests.support.polling import DEADLINE_SECONDS
from tests.unit.definition_server.control_plane.publication_server import (
    ALL,
    Server,
)

from definition_server.control_plane import catalogue_disk, last_known_good, stored_catalogue
from definition_server.control_plane.publisher import Publisher


@pytest.fixture
def publisher() -> Iterator[Publisher]:
    publisher = Publisher()
    yield publisher
    publisher.close()


@pytest.fixture
async def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Server]:
    """A synchronizer whose disk hangs if a test makes it hang. A real disk may also take seconds while other tests
    write."""
    for module, name in (
        (stored_catalogue, "RECALL_PATIENCE_SECONDS"),
        (last_known_good, "PATIENCE_SECONDS"),
        (catalogue_disk, "LOAD_PATIENCE_SECONDS"),
    ):
        monkeypatch.setattr(module, name, DEADLINE_SECONDS)
    server = Server(tmp_path, FakeSource(*ALL))
    yield server
    server.disk.works.set()
    await server.written()
    server.close()


@pytest.fixture
async def diskless() -> AsyncIterator[Server]:
    server = Server(None, FakeSource(*ALL))
    yield server
    server.close()


@pytest.fixture
def logs() -> Iterator[LogLines]:
    with captured_logs() as lines:
        yield lines


@pytest.fixture
def disk_acts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Each fsync and each rename of a file from now on, in order; a file is named by the end of its name."""
    acts: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noting_fsync(descriptor: int) -> None:
        acts.append(f"fsync {Path(f'/proc/self/fd/{descriptor}').readlink().suffix or 'directory'}")
        fsync(descriptor)

    def noting_replace(path: Path, target: Path) -> Path:
        acts.append(f"rename {path.suffix} to {target.suffix}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(Path, "replace", noting_replace)
    return acts
