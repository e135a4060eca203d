"""A server that starts with a damaged file in SNAPSHOT_DIR serves, loses no descriptor, and stores snapshots again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.conftest import StartServer
from tests.support.families import sample
from tests.support.leftovers import open_descriptors
from tests.support.polling import until
from tests.support.server import ServerProcess
from tests.support.table import Table

from definition_server.catalog.signing import Signer
from definition_server.control_plane.wishes import Wishes, WishesFile

pytestmark = [pytest.mark.transports("native"), pytest.mark.slow]

NOWHERE = "postgresql://nobody@127.0.0.1:1/none"
SPARSE_OCTETS = 1 << 40


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def fault(path: Path) -> None:
        path.unlink()
        make(path)

    return fault


def sparse(path: Path) -> None:
    with path.open("ab") as file:
        file.truncate(SPARSE_OCTETS)


def swapped(path: Path) -> None:
    """Replace the file by another file of the server, which has a valid MAC."""
    others = [each for each in path.parents[path.parent.name == "history"].rglob("*") if each.is_file()]
    shutil.copyfile(next(each for each in others if each.name != path.name), path)


FAULTS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "sparse": sparse,
    "swapped": swapped,
    "link": replaced_by(lambda path: path.symlink_to("/etc/passwd")),
    "link to itself": replaced_by(lambda path: path.symlink_to(path.name)),
    "fifo": replaced_by(os.mkfifo),
    "directory": replaced_by(lambda path: (path / "content").mkdir(parents=True)),
    "writable by all": lambda path: path.chmod(0o666),
    "unreadable": lambda path: path.chmod(0),
}
FILES = {
    "last-known-good": lambda directory: directory / "last-known-good.avapsnap",
    "history": lambda directory: max((directory / "history").iterdir(), key=lambda path: path.stat().st_mtime),
    "wishes": lambda directory: directory / "wishes.json",
}


def stored(directory: Path) -> set[str]:
    return {path.name for path in (directory / "history").iterdir()}


def versions(server: ServerProcess) -> set[str]:
    return {worker["version_hash"] for worker in server.statusz()["workers"]}


def publish(server: ServerProcess, table: Table, code: str, directory: Path) -> str:
    [before] = versions(server)
    table.run("UPDATE obex_dapl_functions SET code = %s WHERE name = 'command1'", (code,))
    until(lambda: versions(server).isdisjoint({before}), server.tail)
    [after] = versions(server)
    until(lambda: f"{after}.avapsnap" in stored(directory), server.tail)
    return after


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("fault", sample(FAULTS, 3))
def test_a_server_that_finds_one_damaged_file_serves_publishes_and_stores(
    start_server: StartServer, table: Table, tmp_path: Path, file: str, fault: str
) -> None:
    directory = tmp_path / "snapshots"
    settings = {"SNAPSHOT_DIR": str(directory), "WORKERS": "1", "AVAP_INTERNAL_KEY": "a key", "HISTORY_SNAPSHOTS": "5"}
    table.add_commands(4)
    first = start_server(table.url, **settings).wait_ready()
    publish(first, table, "x = 1", directory)
    first.end()
    WishesFile(directory).write(Wishes(("ab" * 32,)), Signer("a key"))
    FAULTS[fault](FILES[file](directory))

    second = start_server(table.url, **settings).wait_ready()
    published = publish(second, table, "x = 2", directory)
    descriptors = len(open_descriptors(second.pid))
    newest = publish(second, table, "x = 3", directory)
    assert published != newest
    until(lambda: len(open_descriptors(second.pid)) <= descriptors, lambda: str(open_descriptors(second.pid)))
    assert not second.other_output
    assert second.statusz()["restart"]["safe"], second.tail()
    second.end()

    away = start_server(NOWHERE, **settings, CONNECT_TIMEOUT_SECONDS="0.5").wait_ready()
    assert versions(away) == {newest}
    assert not away.other_output
