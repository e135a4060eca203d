"""The stored catalogue of an earlier run is read once, and used until there is a newer one; the disk may hang."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from tests.support.logs import LogLines, logged

from definition_server.catalog.signing import Signer
from definition_server.control_plane.store import StoreError
from definition_server.control_plane.stored_catalogue import StoredCatalogue

LATE = "Stored catalogue and pins not known in time"


class Disk:
    """A disk that answers when the test allows it, with the content that the test has set. It is also a stand-in for
    the operators' wishes.
    """

    def __init__(self) -> None:
        self.answers = asyncio.Event()
        self.answers.set()
        self.stored: Any = None
        self.history: dict[str, Any] = {}
        """Version → its catalogue; None if the file is missing; an error if the file is damaged."""
        self.steps: list[Any] = []

    @property
    def entries(self) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(version_hash=version) for version in self.history)

    async def read_wishes(self, signer: Signer | None) -> str:
        self.steps.append(("read wishes", signer))
        return "wishes"

    async def load(self, signer: Signer | None) -> Any:
        await self.answers.wait()
        self.steps.append(("load", signer))
        return self.stored

    async def list_history(self) -> None:
        self.steps.append("list history")

    def report_missing(self) -> None:
        self.steps.append("report missing")

    async def load_version(self, version: str, signer: Signer | None) -> Any:
        self.steps.append(("load version", version, signer))
        found = self.history[version]
        if isinstance(found, StoreError):
            raise found
        return found

    def rotate(self, old: Signer | None, new: Signer | None) -> None:
        self.steps.append(("rotate", old, new))

    def recall(self, wishes: str) -> None:
        self.steps.append(("recall", wishes))

    async def save_again(self) -> None:
        self.steps.append("save wishes again")


class Bench:
    def __init__(self) -> None:
        self.disk = Disk()
        self.signer: Signer | None = None
        self.catalogue = StoredCatalogue(cast(Any, self.disk), cast(Any, self.disk), lambda: self.signer)


@pytest.fixture
async def bench() -> Any:
    made = Bench()
    yield made
    made.catalogue.close()


async def test_two_recalls_read_the_disk_once(bench: Bench) -> None:
    bench.disk.stored = object()
    assert bench.catalogue.snapshot is None
    first = bench.catalogue.recall()
    assert bench.catalogue.recall() is first
    await first
    assert bench.catalogue.snapshot is bench.disk.stored
    assert bench.disk.steps == [
        ("read wishes", None), ("load", None), "list history", "report missing", ("recall", "wishes"),
        "save wishes again",
    ]  # fmt: skip
    assert bench.catalogue.recall() is first


async def test_files_signed_with_the_previous_key_get_the_mac_of_the_present_key(bench: Bench) -> None:
    before = Signer("the key of before")
    bench.signer = Signer("key", previous=before)
    await bench.catalogue.recall()
    assert bench.disk.steps[0] == ("read wishes", bench.signer)
    assert bench.disk.steps[-1] == ("rotate", before, bench.signer)


@pytest.mark.parametrize(
    ("history", "tried", "found"),
    [
        ({}, [], None),
        ({"a": "A", "b": "B"}, ["a"], "A"),
        ({"a": StoreError("a is damaged"), "b": None, "c": "C"}, ["a", "b", "c"], "C"),
        ({"a": None, "b": None, "c": None, "d": "D"}, ["a", "b", "c"], None),
    ],
    ids=["no history", "the newest", "the third", "the fourth is not tried"],
)
async def test_a_missing_file_is_replaced_by_the_newest_usable_of_three_catalogues_in_the_history(
    bench: Bench, history: dict[str, Any], tried: list[str], found: str | None, logs: LogLines
) -> None:
    bench.disk.history = history
    await bench.catalogue.recall()
    assert bench.catalogue.snapshot == found
    assert [step[1] for step in bench.disk.steps if step[0] == "load version"] == tried
    damaged = [str(each) for each in history.values() if isinstance(each, StoreError)]
    assert [line["error"] for line in logged(logs, "History of catalogues not usable in part")] == damaged


async def test_only_the_wishes_are_used_if_the_disk_answers_after_a_newer_catalogue(
    bench: Bench,
) -> None:
    bench.disk.stored = object()
    bench.disk.answers.clear()
    recalling = bench.catalogue.recall()
    await asyncio.sleep(0)
    bench.catalogue.forget()
    bench.disk.answers.set()
    await recalling
    assert bench.catalogue.snapshot is None
    assert ("recall", "wishes") in bench.disk.steps


async def test_the_stored_catalogue_is_released_when_it_is_forgotten_or_closed(bench: Bench) -> None:
    bench.disk.stored = object()
    await bench.catalogue.recall()
    bench.catalogue.forget()
    assert bench.catalogue.snapshot is None
    other = Bench()
    other.disk.stored = object()
    await other.catalogue.recall()
    other.catalogue.close()
    assert other.catalogue.snapshot is None


@pytest.mark.parametrize("hangs", [True, False])
async def test_a_disk_that_has_not_answered_after_two_seconds_is_logged(
    bench: Bench, hangs: bool, logs: LogLines, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits: list[float] = []
    wait = asyncio.wait

    async def briefly(tasks: Any, timeout: float) -> Any:
        limits.append(timeout)
        return await wait(tasks, timeout=0.01 if hangs else None)

    monkeypatch.setattr(asyncio, "wait", briefly)
    if hangs:
        bench.disk.answers.clear()
    await bench.catalogue.recalled()
    assert limits == [2.0]
    late = logged(logs, LATE, log_level="error", waited_seconds=2.0)
    assert len(late) == hangs


async def test_closing_cancels_the_wait_for_the_disk(bench: Bench) -> None:
    bench.disk.answers.clear()
    recalling = bench.catalogue.recall()
    await asyncio.sleep(0)
    bench.catalogue.close()
    await asyncio.wait((recalling,))
    assert recalling.cancelled()
