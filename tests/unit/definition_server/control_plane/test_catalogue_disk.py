"""The catalogues that are known to be on disk, their form, and the effects of a disk that hangs or for which no thread
can be started.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.logs import LogLines, logged
from tests.support.loop import eventually
from tests.support.snapshots import published

from definition_server.catalog.signing import Signer
from definition_server.control_plane import last_known_good
from definition_server.control_plane.background import Background
from definition_server.control_plane.catalogue_disk import CatalogueDisk
from definition_server.control_plane.disk import on_disk
from definition_server.control_plane.history import History
from definition_server.control_plane.publisher import Publication
from definition_server.control_plane.store import SnapshotStore
from definition_server.control_plane.sync_state import SyncState

pytestmark = pytest.mark.usefixtures("nothing_is_left")

KEY, OTHER = Signer("key"), Signer("other key")


class Bench:
    """The disk of a server with SNAPSHOT_DIR at ``directory``, or without one if ``directory`` is None."""

    def __init__(self, directory: Path | None, *, keep: int = 10) -> None:
        self.background = Background()
        self.state = SyncState()
        self.works: Callable[[Any], Any] = on_disk
        self.generation = 1
        self.disk = CatalogueDisk(
            self.background, self.state, store=None if directory is None else SnapshotStore(directory),
            history=None if directory is None else History(directory, keep, lambda: 1000.0), wishes=None,
            latest_generation=lambda: self.generation, disk=lambda work: self.works(work),
        )  # fmt: skip
        self.descriptors: list[int] = []

    def made(self, *names: str, **given: Any) -> Publication:
        publication = published(*names, **given)
        self.descriptors.append(publication.descriptor)
        return publication

    def close(self) -> None:
        self.disk.close()
        self.background.close()
        for descriptor in self.descriptors:
            os.close(descriptor)


@pytest.fixture
async def bench(tmp_path: Path) -> Any:
    made = Bench(tmp_path)
    yield made
    made.close()


async def test_a_server_without_a_disk_reports_everything_as_stored_and_loads_nothing() -> None:
    bench = Bench(None)
    publication = bench.made("if")
    assert bench.disk.has_stored(publication.snapshot)
    await bench.disk.save(publication, None)
    assert await bench.disk.load(None) is None
    assert not bench.disk.keeps_history
    assert not bench.disk.lacks(publication.snapshot.version_hash)
    bench.disk.rotate(KEY, OTHER)
    assert not bench.disk._rotations
    bench.close()


async def test_a_catalogue_is_reported_as_stored_if_content_and_key_equal_those_of_the_file(bench: Bench) -> None:
    one, other = bench.made("if", signer=KEY), bench.made("else", signer=KEY)
    newer, signed_otherwise = bench.made("if", generation=9, signer=KEY), bench.made("if", signer=OTHER)
    assert not bench.disk.has_stored(one.snapshot)
    await bench.disk.save(one, KEY)
    assert bench.disk.has_stored(one.snapshot)
    assert bench.disk.has_stored(newer.snapshot), "the generation does not matter"
    assert not bench.disk.has_stored(other.snapshot)
    assert not bench.disk.has_stored(signed_otherwise.snapshot)
    await bench.disk.save(other, KEY)
    assert bench.disk.has_stored(other.snapshot)
    assert not bench.disk.has_stored(one.snapshot)


@pytest.mark.parametrize("same_key", [True, False])
async def test_a_catalogue_loaded_under_the_present_key_is_reported_as_stored_and_not_signed_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same_key: bool
) -> None:
    await bench.disk.save(bench.made("if", signer=KEY), KEY)
    again = last_known_good.published_again
    signed: list[Signer | None] = []

    def noted(snapshot: Any, signer: Signer | None, generation: int) -> Publication:
        signed.append(signer)
        return again(snapshot, signer, generation)

    monkeypatch.setattr(last_known_good, "published_again", noted)
    second = Bench(tmp_path)
    present = KEY if same_key else Signer("new key", previous=KEY)
    loaded = await second.disk.load(present)
    assert loaded is not None
    assert loaded.footer.key_id == present.key_id
    assert second.disk.has_stored(loaded) is same_key
    assert signed == ([] if same_key else [present])
    second.close()


async def test_a_disk_without_threads_fails_the_write_and_the_history_and_leaves_no_descriptor(
    bench: Bench, logs: LogLines
) -> None:
    def no_thread(_: object) -> Any:
        raise RuntimeError("can't start new thread")

    bench.works = no_thread
    publication = bench.made("if")
    bench.disk.add(publication, None, frozenset())
    (line,) = logged(logs, "History of catalogues not usable in part", log_level="error")
    assert line["error"] == "no thread can be started: can't start new thread"
    await bench.disk.save(publication, None)
    assert bench.state.store_error == "no thread can be started: can't start new thread"
    assert logged(logs, "Last-known-good snapshot not stored", log_level="error")
    bench.works = on_disk
    bench.disk.add(publication, None, frozenset())
    await eventually(lambda: bench.disk.entries, "the history has it")
    await bench.disk.save(publication, None)
    assert bench.state.store_error is None
    assert logged(logs, "Last-known-good snapshot stored again", generation=1)


async def test_a_problem_of_the_history_is_logged_once_for_as_long_as_it_lasts(
    bench: Bench, logs: LogLines, tmp_path: Path
) -> None:
    odd = tmp_path / "history" / ("ab" * 32 + ".avapsnap")
    odd.parent.mkdir()
    for times in (1, 2):
        odd.write_text("damaged")
        for _ in range(3):
            await bench.disk.list_history()
        assert len(logged(logs, "History of catalogues not usable in part", log_level="error")) == times
        odd.unlink()
        await bench.disk.list_history()


async def test_while_the_history_is_written_the_newest_catalogue_waits_and_others_are_dropped(bench: Bench) -> None:
    works: list[tuple[Any, asyncio.Future[Any]]] = []

    def held(work: Any) -> Any:
        works.append((work, asyncio.get_running_loop().create_future()))
        return works[-1][1]

    bench.works = held
    publications = [bench.made(name) for name in ("a", "b", "c")]
    for publication in publications:
        bench.disk.add(publication, None, frozenset())
    assert len(works) == 1
    assert not bench.disk.lacks("ab" * 32), "something is being written"
    works[0][1].set_result(works[0][0]())
    await eventually(lambda: len(works) == 2, "the newest is written next")
    works[1][1].set_result(works[1][0]())
    await asyncio.sleep(0)
    versions = [entry.version_hash for entry in bench.disk.entries]
    assert sorted(versions) == sorted(publications[number].snapshot.version_hash for number in (0, 2))
    assert bench.state.history_entries == 2
    assert bench.disk.lacks("ab" * 32)
    assert not bench.disk.lacks(versions[0])


async def test_a_catalogue_that_waits_for_the_disk_is_dropped_at_the_end(bench: Bench) -> None:
    first: list[Any] = []

    def held(work: Any) -> Any:
        first.append((work, asyncio.get_running_loop().create_future()))
        return first[-1][1]

    bench.works = held
    for name in ("a", "b"):
        bench.disk.add(bench.made(name), None, frozenset())
    bench.disk.close()
    ((work, future),) = first
    future.set_result(work())
    await asyncio.sleep(0)
    assert len(first) == 1, "the second is not written any more"
    assert len(bench.disk.entries) == 1


async def test_a_history_of_zero_catalogues_keeps_nothing_and_is_complete(tmp_path: Path) -> None:
    bench = Bench(tmp_path, keep=0)
    bench.works = pytest.fail
    bench.disk.add(bench.made("if"), None, frozenset())
    assert not bench.disk.keeps_history
    assert not bench.disk.lacks("ab" * 32)
    bench.close()


@pytest.mark.parametrize(("old", "new", "rotates"), [(KEY, OTHER, 1), (None, KEY, 0), (KEY, None, 0)])
async def test_the_history_is_signed_again_if_one_key_replaces_another(
    bench: Bench, old: Signer | None, new: Signer | None, rotates: int
) -> None:
    bench.disk.rotate(old, new)
    assert len(bench.disk._rotations) == rotates
    await eventually(lambda: not bench.disk._rotations, "its end")
