"""Which ranges of a source are read: the changed ranges, or all ranges if reading the changed ones is not enough."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager

import pytest
from tests.support.snapshots import row

from definition_server.catalog.definition import Row
from definition_server.catalog.signing import Signer
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.background import Background
from definition_server.control_plane.source import Ranges, SourceError
from definition_server.control_plane.table_reader import TableReader

RANGES = 10


class RangedSource:
    """A source of ten ranges with two rows each; it is also its own reading."""

    def __init__(self) -> None:
        self.rows = {number: [f"{number}a", f"{number}b"] for number in range(RANGES)}
        self.codes = dict.fromkeys((name for names in self.rows.values() for name in names), "old = 1")
        self.versions = dict.fromkeys(range(RANGES), "1")
        self.basis = "basis"
        self.error: SourceError | None = None
        self.read_ranges: Collection[int] | None = ()
        """The ranges of the last reading; None if it read all rows."""

    def change(self, number: int) -> None:
        self.versions[number] += "1"
        self.codes[f"{number}a"] = f"new = {self.versions[number]}"

    @property
    def fingerprint(self) -> str:
        return self.basis + "/".join(self.versions.values())

    @asynccontextmanager
    async def read(self) -> AsyncIterator[RangedSource]:
        yield self

    async def ranges(self, before: Ranges | None) -> Ranges:
        return Ranges(self.basis, dict(self.versions))

    async def batches(self, ranges: Collection[int] | None = None) -> AsyncIterator[list[Row]]:
        self.read_ranges = ranges
        for number in self.rows if ranges is None else ranges:
            yield [row(name, self.codes[name])._replace(range=number) for name in self.rows[number]]
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """No reading is open."""


class Bench:
    """A reader of this source, which also builds catalogues from its readings."""

    def __init__(self) -> None:
        self.source, self.background, self.signer = RangedSource(), Background(), Signer("key")
        self.reader = TableReader(self.source, self.background)
        self.snapshot: Snapshot | None = None

    async def read(self, *, unconditional: bool = False) -> Collection[int] | None:
        """Read and build. Returns the ranges that were read; None if all rows were read. The build must hold every row
        in its present state.
        """
        found = await self.reader.read(self.signer, serving=True, unconditional=unconditional)
        assert found is not None
        self.snapshot = Snapshot(found.builder.build(generation=1, created_at_ns=1).to_bytes())
        await self.reader.remember(found, [self.snapshot])
        return self.source.read_ranges

    def answer(self, name: bytes) -> bytes | None:
        assert self.snapshot is not None
        return self.snapshot.answer(name)


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    made = Bench()
    assert await made.read() is None
    yield made
    made.background.close()


async def test_only_the_range_of_a_change_is_read(bench: Bench) -> None:
    bench.source.change(3)
    assert await bench.read() == {3}
    bench.source.change(4)
    assert await bench.read() == {4}


def another_basis(bench: Bench) -> None:
    bench.source.basis = "another"


def another_key(bench: Bench) -> None:
    bench.signer = Signer("another key")


def another_version_of_packages(bench: Bench) -> None:
    bench.signer = Signer("key", 2)


def no_memory_of_it(bench: Bench) -> None:
    bench.reader.forget()


def a_third_of_the_ranges(bench: Bench) -> None:
    for number in (5, 6):
        bench.source.change(number)


@pytest.mark.parametrize(
    "event", [another_basis, another_key, another_version_of_packages, no_memory_of_it, a_third_of_the_ranges]
)
async def test_all_rows_are_read_after_an_event_that_invalidates_ranges(
    bench: Bench, event: Callable[[Bench], None]
) -> None:
    bench.source.change(3)
    event(bench)
    assert await bench.read() is None


async def test_an_unconditional_reading_reads_all_rows(bench: Bench) -> None:
    assert await bench.read(unconditional=True) is None


async def test_a_reading_of_ranges_does_not_postpone_the_next_full_reading() -> None:
    bench = Bench()
    bench.reader = TableReader(bench.source, bench.background, full_read_interval=1000)
    assert await bench.read() is None
    bench.reader._read_at -= 900
    bench.source.change(3)
    assert await bench.read() == {3}
    bench.reader._read_at -= 200
    assert await bench.read() is None
    bench.background.close()


async def test_the_reading_after_a_failure_reads_all_rows(bench: Bench) -> None:
    bench.source.change(3)
    bench.source.error = SourceError("gone")
    with pytest.raises(SourceError):
        await bench.reader.read(bench.signer, serving=True)
    bench.source.error = None
    assert await bench.read() is None


async def test_a_catalogue_that_was_signed_with_another_key_is_signed_again(bench: Bench) -> None:
    before = bench.answer(b"7a")
    bench.signer = Signer("another key")
    bench.source.change(3)
    await bench.read()
    assert bench.answer(b"7a") != before


async def test_all_rows_are_read_if_more_than_a_quarter_of_the_ranges_changed(bench: Bench) -> None:
    bench.source.rows |= {number: [f"{number}a", f"{number}b"] for number in (10, 11)}
    bench.source.codes |= dict.fromkeys(("10a", "10b", "11a", "11b"), "old = 1")
    bench.source.versions |= {10: "1", 11: "1"}
    assert await bench.read() == {10, 11}, "ranges that were not there"
    for number in (3, 4, 5):
        bench.source.change(number)
    assert await bench.read() == {3, 4, 5}, "of twelve"
    for number in (3, 4, 5, 6):
        bench.source.change(number)
    assert await bench.read() is None


async def test_a_change_is_reported_before_the_reading_and_only_once(bench: Bench) -> None:
    changes: list[str] = []
    reader = TableReader(
        bench.source, bench.background, on_change=lambda: changes.append("change"), known=lambda: {b"if": b"hash"}
    )
    found = await reader.read(None, serving=False)
    assert found is not None
    assert (changes, found.ranges_read, found.fingerprint) == (["change"], None, bench.source.fingerprint)
    assert found.ranges == Ranges(bench.source.basis, bench.source.versions)
    await reader.remember(found, [None])
    assert await reader.read(None, serving=False) is None
    assert changes == ["change"]


@pytest.mark.parametrize(("seconds", "reads"), [(59.0, False), (60.0, True)])
async def test_an_unchanged_table_is_read_completely_at_its_interval(
    bench: Bench, seconds: float, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    reader = TableReader(bench.source, bench.background, full_read_interval=60.0)
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now[0])
    found = await reader.read(None, serving=False)
    assert found is not None
    assert found.begun == 100.0
    await reader.remember(found, [])
    now[0] += seconds
    assert (await reader.read(None, serving=False) is not None) is reads
