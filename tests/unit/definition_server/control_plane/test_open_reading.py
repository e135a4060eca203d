"""One reading of the table: its fingerprint, ranges, batches and limits. The test plays the connection."""

from __future__ import annotations

from collections.abc import Awaitable
from types import SimpleNamespace
from typing import Any, cast

import pytest
from psycopg import errors

from definition_server.catalog.definition import Row, Unserved
from definition_server.control_plane import postgres as module
from definition_server.control_plane.postgres import _Locks, _Reading
from definition_server.control_plane.source import Ranges, ReadLimits, SourceError
from definition_server.observability.reasons import Reason

CLASSES = 4
"""Classes of size where the largest definition has 4 MiB (`table_reading.classes`); rows above it are class 4."""


class Cursor:
    """A connection that answers each statement with the rows that the test sets for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._rows: list[Any] = []
        self.adapters = SimpleNamespace(register_loader=lambda *_: None)

    async def __aenter__(self) -> Cursor:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._connection.closed_cursors += 1

    async def execute(self, statement: str, **options: Any) -> None:
        self._connection.statements.append(statement)
        self._rows = list(self._connection.answers.get(statement, []))

    async def fetchall(self) -> list[Any]:
        return self._rows

    async def fetchone(self) -> Any:
        return self._rows[0] if self._rows else None

    async def fetchmany(self, size: int) -> list[Any]:
        self._connection.sizes.append(size)
        taken, self._rows = self._rows[:size], self._rows[size:]
        return taken


class Connection:
    def __init__(self) -> None:
        self.info = SimpleNamespace(server_version=150_000)
        self.answers: dict[str, list[Any]] = {}
        self.statements: list[str] = []
        self.refused: dict[str, list[Exception]] = {}
        self.sizes: list[int] = []
        self.closed_cursors = 0
        self.rolled_back = 0

    def cursor(self, **_: object) -> Cursor:
        return Cursor(self)

    async def execute(self, statement: str, **_: object) -> None:
        self.statements.append(statement)
        if errors := self.refused.get(statement):
            raise errors.pop(0)

    async def rollback(self) -> None:
        self.rolled_back += 1


class Plan:
    """Stand-ins for SQL statements. Each stand-in is the name of the data that the statement requests."""

    def __init__(self, blocks: int | None = 100, mistrust: str | None = None, *, by_range: bool = True) -> None:
        self.blocks, self.mistrust, self.versions_by_range = blocks, mistrust, by_range
        self.range_blocks: int | None = None
        self.widths: list[int | None] = []

    def width(self, before: int | None) -> int:
        self.widths.append(before)
        return 8

    def ranges_sql(self, width: int) -> str:
        return f"ranges of {width}"

    def sizes_sql(self, most: int) -> str:
        return f"sizes up to {most}"

    def sizes_of_ranges_sql(self, most: int, width: int, blocks: Any) -> str:
        return f"sizes of ranges {list(blocks)}"

    def ranges_and_sizes_sql(self, most: int, width: int) -> str:
        return f"ranges of {width} and sizes up to {most}"

    def rows_sql(self, number: int, most: int, blocks: Any) -> str:
        return f"rows of class {number} {list(blocks)}"

    def versions_sql(self) -> str:
        return "versions"

    def rows(self, results: list[Any], *, too_large: bool) -> list[Row]:
        return [
            Row(1, name, b"", b"", b"", fault=Unserved.TOO_LARGE if too_large else None)
            for (name,) in results
        ]  # fmt: skip


class Bench:
    def __init__(self, plan: Plan | None = None, *, catalogue: int = 1_000_000) -> None:
        self.connection = Connection()
        self.plan = plan or Plan()
        limits = ReadLimits(catalogue=catalogue)

        async def limited(work: Awaitable[Any]) -> Any:
            return await work

        self.reading = _Reading(cast(Any, self.connection), limited, limits, "prefix", 7)
        self.reading.plan = cast(Any, self.plan)
        self.reading._basis = "basis"

    async def batches(self, ranges: set[int] | None = None) -> list[list[tuple[bytes, Any]]]:
        return [[(row.name, row.fault) for row in batch] async for batch in self.reading.batches(ranges)]


@pytest.mark.parametrize("blocks", [100, 0, None], ids=["a heap", "an empty table", "a view"])
async def test_only_a_heap_has_ranges(blocks: int | None) -> None:
    bench = Bench(Plan(blocks))
    bench.connection.answers["ranges of 8"] = [(0, 3, "11"), (5, 1, "-7")]
    found = await bench.reading.ranges(Ranges("before", {}, 4))
    if blocks is None:
        assert found is None
        assert bench.connection.statements == []
        assert bench.plan.range_blocks is None
        return
    assert found == Ranges("basis/8", {0: "3:11", 5: "1:-7"}, 8)
    assert bench.plan.range_blocks == 8
    assert bench.plan.widths == [4]
    await bench.reading.ranges(None)
    assert bench.plan.widths == [4, None]


async def test_rows_are_read_by_size_class_and_rows_that_are_too_large_have_a_fault() -> None:
    bench = Bench()
    bench.connection.answers = {
        "sizes up to 4194304": [(4, 1, 9_000_000), (0, 1200, 5)],
        "rows of class 0 []": [(b"c%d" % number,) for number in range(1200)],
        "rows of class 4 []": [(b"large",)],
    }
    found = await bench.batches()
    assert [len(batch) for batch in found] == [1000, 200, 1]
    assert found[0][0] == (b"c0", None)
    assert found[2] == [(b"large", Unserved.TOO_LARGE)]
    assert bench.connection.statements == ["sizes up to 4194304", "rows of class 0 []", "rows of class 4 []"]
    assert bench.connection.closed_cursors == 2
    assert set(bench.connection.sizes) == {1000}


async def test_a_reading_of_ranges_reads_only_their_blocks_and_notes_their_sizes() -> None:
    bench = Bench()
    bench.connection.answers = {
        "ranges of 8": [(0, 3, "11"), (1, 1, "5"), (3, 1, "6")],
        "sizes of ranges [(8, 16), (24, 32)]": [(1, 0, 1, 100), (3, 2, 1, 200)],
        "rows of class 0 [(8, 16), (24, 32)]": [(b"a",)],
        "rows of class 2 [(8, 16), (24, 32)]": [(b"b",)],
    }
    before = Ranges("basis/8", {0: "3:11", 9: "1:1"}, 8, {0: {0: (3, 300)}, 9: {0: (1, 50)}})
    ranges = await bench.reading.ranges(before)
    assert ranges is not None
    assert await bench.batches({1, 3}) == [[(b"a", None)], [(b"b", None)]]
    assert ranges.sizes == {0: {0: (3, 300)}, 1: {0: (1, 100)}, 3: {2: (1, 200)}}, "range 9 is gone"


async def test_a_whole_reading_with_ranges_notes_the_sizes_of_all_ranges_and_forgets_earlier_ones() -> None:
    bench = Bench()
    bench.connection.answers = {
        "ranges of 8": [(0, 3, "11")],
        "sizes of ranges []": [(0, 1, 2, 50), (0, 0, 1, 10)],
        "rows of class 0 []": [(b"a",)],
        "rows of class 1 []": [(b"b",), (b"c",)],
    }
    ranges = await bench.reading.ranges(Ranges("basis/8", {0: "1:1"}, 8, {0: {0: (9, 999)}}))
    assert ranges is not None
    assert [len(batch) for batch in await bench.batches()] == [1, 2]
    assert ranges.sizes == {0: {1: (2, 50), 0: (1, 10)}}


@pytest.mark.parametrize(("catalogue", "fits"), [(100 + 300, True), (100 + 300 - 1, False)])
async def test_a_snapshot_has_150_octets_for_each_row_and_rows_that_are_too_large_are_not_counted(
    catalogue: int, fits: bool
) -> None:
    bench = Bench(catalogue=catalogue)
    sizes = [(0, 1, 60), (CLASSES - 1, 1, 40), (CLASSES, 5, 50_000_000)]
    if fits:
        bench.reading._check_size(sizes)
        return
    with pytest.raises(
        SourceError, match=r"its 2 rows would have 400 bytes, above MAX_CATALOG_BYTES \(399\)"
    ) as caught:
        bench.reading._check_size(sizes)
    assert caught.value.reason is Reason.CATALOGUE_TOO_LARGE


@pytest.mark.parametrize("mistrust", [None, "a view"])
async def test_the_fingerprint_is_made_of_the_row_versions_or_is_unique_to_this_reading(
    mistrust: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, relations = Bench(), []

    def parse(text: str | None) -> tuple[Any, Any]:
        relations.append(text)
        return "definitions", "bytecode"

    monkeypatch.setattr(module, "Relation", SimpleNamespace(parse=parse))
    monkeypatch.setattr(module, "bytecode_fault", lambda _: "no column")
    monkeypatch.setattr(
        module, "Plan", lambda *given, tid_ranges: relations.append((*given, tid_ranges)) or Plan(mistrust=mistrust)
    )
    bench.connection.answers = {module.SHAPE_SQL: [(b"shape", b"state")], "versions": [(b"12/34",)]}
    await bench.reading.begin()
    assert relations == ["shape", ("definitions", None, True)]
    assert bench.reading.bytecode_fault == "no column"
    if mistrust is None:
        assert bench.reading.fingerprint == "prefix/state/12/34"
        assert bench.reading._basis == "prefix/state/34"
        assert bench.connection.statements[-1] == "versions"
    else:
        assert bench.reading.fingerprint == "prefix/reading 7"
        assert bench.connection.statements[-1] == module.EXISTS_SQL
    await bench.reading.end()
    assert bench.connection.rolled_back == 1


@pytest.mark.parametrize(("version", "tid_ranges"), [(140_000, True), (139_999, False)])
async def test_postgresql_scans_ranges_of_tids_since_version_14(
    version: int, tid_ranges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, asked = Bench(), []
    bench.connection.info.server_version = version
    monkeypatch.setattr(module, "Plan", lambda *_, tid_ranges: asked.append(tid_ranges) or Plan())
    bench.connection.answers = {module.SHAPE_SQL: [(None, b"state")], "versions": [(b"12",)]}
    await bench.reading.begin()
    assert asked == [tid_ranges]


async def begun(bench: Bench, monkeypatch: pytest.MonkeyPatch, *, first: bool) -> None:
    """A reading of the test's plan, in a table that has three rows in two ranges and two classes."""
    monkeypatch.setattr(module, "Plan", lambda *_, **__: bench.plan)
    bench.connection.answers = {
        module.SHAPE_SQL: [(None, b"state")],
        "versions": [(b"4:-2",)],
        "ranges of 8": [(0, 3, "-9"), (5, 1, "7")],
        "ranges of 8 and sizes up to 4194304": [(0, 0, 2, 20, "-5"), (5, 0, 1, 10, "7"), (0, 3, 1, 4000, "-4")],
        "sizes of ranges []": [(0, 0, 2, 20), (5, 0, 1, 10), (0, 3, 1, 4000)],
        "rows of class 0 []": [(b"a",), (b"b",), (b"c",)],
        "rows of class 3 []": [(b"d",)],
    }
    await bench.reading.begin(first=first)


async def read(bench: Bench) -> tuple[str, Ranges | None, list[Any]]:
    """All rows of a reading that has begun, with its fingerprint and ranges."""
    ranges = await bench.reading.ranges(None)
    rows = await bench.batches()
    return bench.reading.fingerprint, ranges, rows


async def test_the_first_reading_of_a_connection_gets_fingerprint_ranges_and_sizes_in_one_scan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first reading gets the same values as the scans of a later reading for the same rows."""
    first, later = Bench(), Bench()
    await begun(first, monkeypatch, first=True)
    assert first.reading.fingerprint == "prefix/reading 7", "it differs from every other fingerprint until it is known"
    await begun(later, monkeypatch, first=False)
    assert later.reading.fingerprint == "prefix/state/4:-2"
    assert await read(first) == await read(later)
    asked = [statement for statement in first.connection.statements if not statement.startswith("rows of")]
    assert asked[2:] == ["ranges of 8 and sizes up to 4194304"]
    assert later.connection.statements[2:5] == ["versions", "ranges of 8", "sizes of ranges []"]


async def test_an_empty_table_has_the_fingerprint_of_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    await begun(bench, monkeypatch, first=True)
    bench.connection.answers["ranges of 8 and sizes up to 4194304"] = []
    assert await read(bench) == ("prefix/state/0:0", Ranges("prefix/state//8", {}, 8), [])


async def test_a_first_reading_that_would_be_too_large_fetches_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(catalogue=4030 + 4 * 150 - 1)
    await begun(bench, monkeypatch, first=True)
    with pytest.raises(SourceError, match="above MAX_CATALOG_BYTES"):
        await read(bench)
    assert not any(statement.startswith("rows of") for statement in bench.connection.statements)


async def test_the_first_reading_requests_the_fingerprint_if_the_ranges_do_not_give_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench(Plan(by_range=False))
    await begun(bench, monkeypatch, first=True)
    assert bench.reading.fingerprint == "prefix/state/4:-2"
    assert (await read(bench))[0] == "prefix/state/4:-2"


# -- locks before the snapshot -----------------------------------------------------------------------------------------

ONE = "times; LOCK TABLE obex_dapl_functions IN ACCESS SHARE MODE"
BOTH = "times; LOCK TABLE obex_dapl_functions, avap_bytecode IN ACCESS SHARE MODE"
TABLES = ("obex_dapl_functions", "avap_bytecode")


async def limited(work: Awaitable[Any]) -> Any:
    return await work


async def taken(locks: _Locks, connection: Connection) -> list[str]:
    """The statements of one `take`."""
    connection.statements.clear()
    await locks.take(cast(Any, connection))
    return list(connection.statements)


async def test_all_tables_that_are_read_are_locked_from_the_second_transaction_on() -> None:
    locks, connection = _Locks(limited, "times"), Connection()
    assert await taken(locks, connection) == [ONE]
    assert locks.suffice(TABLES[:1])
    assert not locks.suffice(TABLES), "the table of bytecode was not locked before the snapshot"
    assert await taken(locks, connection) == [BOTH]
    assert locks.suffice(TABLES)
    assert locks.suffice(TABLES[:1]), "the table of bytecode was dropped"
    assert await taken(locks, connection) == [ONE]
    assert connection.rolled_back == 0


async def test_a_table_that_was_dropped_is_locked_when_it_is_there_again() -> None:
    locks, connection = _Locks(limited, "times"), Connection()
    locks.suffice(TABLES)
    connection.refused[BOTH] = [errors.UndefinedTable()]
    assert await taken(locks, connection) == [BOTH, ONE]
    assert connection.rolled_back == 1, "the failed transaction has ended"
    assert not locks.suffice(TABLES)
    assert await taken(locks, connection) == [BOTH]


@pytest.mark.parametrize("refusal", [errors.InsufficientPrivilege, errors.WrongObjectType])
async def test_a_table_whose_lock_is_refused_is_waited_for_and_its_lock_not_tried_again_on_this_connection(
    refusal: type[Exception],
) -> None:
    locks, connection = _Locks(limited, "times"), Connection()
    locks.suffice(TABLES)
    connection.refused[BOTH] = [refusal()]
    wait = "times; SELECT FROM avap_bytecode LIMIT 0"
    assert await taken(locks, connection) == [BOTH, ONE, wait, ONE]
    assert connection.rolled_back == 3, "the failed transaction, the one with too few locks, and the one that waits"
    assert locks.suffice(TABLES), "it cannot be better"
    assert await taken(locks, connection) == [wait, ONE]
    connection.refused[ONE] = [refusal()]
    assert (await taken(locks, connection))[-2:] == [f"{wait}; SELECT FROM obex_dapl_functions LIMIT 0", "times; "]
    assert locks.suffice(TABLES)
    locks.forget()
    assert await taken(locks, connection) == [ONE], "another connection"


async def test_a_table_whose_lock_is_refused_is_waited_for_although_another_can_be_locked() -> None:
    locks, connection = _Locks(limited, "times"), Connection()
    connection.refused[ONE] = [errors.WrongObjectType()]
    wait = "times; SELECT FROM obex_dapl_functions LIMIT 0"
    assert await taken(locks, connection) == [ONE, "times; ", wait, "times; "]
    assert not locks.suffice(TABLES)
    assert await taken(locks, connection) == [wait, "times; LOCK TABLE avap_bytecode IN ACCESS SHARE MODE"]
    assert locks.suffice(TABLES)


@pytest.mark.parametrize("refusal", [errors.UndefinedTable, errors.InsufficientPrivilege])
async def test_a_table_that_can_no_longer_be_waited_for_does_not_fail_the_reading(refusal: type[Exception]) -> None:
    locks, connection = _Locks(limited, "times"), Connection()
    locks.suffice(TABLES)
    connection.refused[BOTH] = [errors.WrongObjectType()]
    wait, *_ = (await taken(locks, connection))[2:]
    connection.refused[wait] = [refusal()]
    assert await taken(locks, connection) == [wait, "times; ", ONE]
    assert locks.suffice(TABLES), "it cannot be better: the reading would be begun again for ever"


async def test_any_other_failure_to_lock_fails_the_reading() -> None:
    connection = Connection()
    connection.refused[ONE] = [errors.LockNotAvailable()]
    with pytest.raises(errors.LockNotAvailable):
        await taken(_Locks(limited, "times"), connection)
