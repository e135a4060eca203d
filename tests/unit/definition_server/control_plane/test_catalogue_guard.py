"""The catalogue that the guard compares a candidate with, the time for which it does so, and the candidates that pass
without a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from tests.support.snapshots import opened, row

from definition_server.catalog.builder import SnapshotBuilder
from definition_server.catalog.guard import Concern, Judgement, Thresholds
from definition_server.catalog.snapshot import Snapshot
from definition_server.control_plane.catalogue_guard import CatalogueGuard


class Background:
    """Runs all work at once, and counts the catalogues that were read."""

    def __init__(self) -> None:
        self.works = 0

    async def run(self, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.works += 1
        return work(*args, **kwargs)


class Bench:
    def __init__(self, **options: Any) -> None:
        self.background = Background()
        self.guard = CatalogueGuard(cast(Any, self.background), **options)

    async def judge(self, candidate: Snapshot, before: Snapshot | None, **given: Any) -> Judgement | None:
        asked: dict[str, Any] = {"held": frozenset(), "held_before": 0, "now": 0.0, "excused": lambda _: False}
        return await self.guard.judge(candidate, before, **asked | given)

    async def publish(self, candidate: Snapshot, before: Snapshot | None, now: float, *, excused: bool = False) -> None:
        """Judge ``candidate``, which must pass, and make it the newest catalogue."""
        assert await self.judge(candidate, before, now=now, excused=lambda _: excused) is None
        await self.guard.passed(candidate, before, now, excused=excused)


def catalogue(count: int, code: str = "pass") -> Snapshot:
    return opened(*(row(f"c{number:03}", code) for number in range(count)))


# Each step loses less than a fifth of the commands; from FIRST to THIRD, a quarter is lost.
FIRST, SECOND, THIRD = catalogue(200), catalogue(170), catalogue(150)
FEW = catalogue(100)


async def test_a_catalogue_that_lost_half_is_held_and_one_that_lost_less_than_a_fifth_passes() -> None:
    bench = Bench()
    judgement = await bench.judge(FEW, FIRST)
    assert judgement is not None
    assert judgement.concern is Concern.SHRUNK
    assert "100 of 200 commands that are served" in judgement.text
    assert await bench.judge(SECOND, FIRST) is None


@pytest.mark.parametrize(
    ("before", "excused"), [(None, False), (catalogue(100), False), (FIRST, True)],
    ids=["the first one", "the same version", "accepted or published before"],
)  # fmt: skip
async def test_a_first_unchanged_or_excused_catalogue_passes_without_being_read(
    before: Snapshot | None, excused: bool
) -> None:
    bench = Bench()
    assert await bench.judge(FEW, before, excused=lambda version: excused and version == FEW.version_hash) is None
    assert bench.background.works == 0


@pytest.mark.parametrize("before", [FIRST, None], ids=["after another", "at a start"])
@pytest.mark.parametrize("allowed", [True, False])
async def test_an_empty_catalogue_passes_only_if_empty_ones_are_allowed(before: Snapshot | None, allowed: bool) -> None:
    judgement = await Bench(allow_empty=allowed).judge(opened(), before)
    if allowed:
        assert judgement is None
        return
    assert judgement is not None
    assert judgement.concern is Concern.EMPTIED
    assert judgement.names == (() if before is None else tuple(f"c{number:03}" for number in range(10)))


@pytest.mark.parametrize(("now", "held"), [(0.0, True), (3600.0, True), (3600.1, False)])
async def test_losses_of_the_last_hour_add_up(now: float, held: bool) -> None:
    bench = Bench()
    await bench.publish(SECOND, FIRST, 0.0)
    judgement = await bench.judge(THIRD, SECOND, now=now)
    assert (judgement is not None) is held
    if judgement is not None:
        assert "50 of 200 commands that were served at the guard's baseline" in judgement.text


async def test_the_hour_begins_with_the_first_change_and_the_next_hour_with_the_first_change_after_it() -> None:
    bench = Bench()
    await bench.publish(SECOND, FIRST, 0.0)
    await bench.publish(catalogue(165), SECOND, 3000.0)
    assert await bench.judge(THIRD, catalogue(165), now=3600.0) is not None, "the second change does not put it off"
    await bench.publish(THIRD, catalogue(165), 4000.0)
    await bench.publish(catalogue(135), THIRD, 4001.0)
    assert await bench.judge(catalogue(125), catalogue(135), now=7600.0) is not None, "40 of 165"
    assert await bench.judge(catalogue(125), catalogue(135), now=7600.1) is None


async def test_after_an_excused_catalogue_later_catalogues_are_compared_only_with_it() -> None:
    bench = Bench()
    await bench.publish(SECOND, FIRST, 0.0)
    await bench.publish(catalogue(165), SECOND, 1.0, excused=True)
    assert await bench.judge(THIRD, catalogue(165), now=2.0) is None


@pytest.mark.parametrize("before", [None, SECOND], ids=["the first one", "the same version"])
async def test_a_first_or_unchanged_catalogue_neither_begins_nor_ends_the_hour(before: Snapshot | None) -> None:
    bench = Bench()
    await bench.publish(SECOND, FIRST, 0.0)
    await bench.guard.passed(SECOND, before, 10.0, excused=True)
    assert await bench.judge(THIRD, SECOND, now=3600.0) is not None
    fresh = Bench()
    await fresh.guard.passed(SECOND, before, 10.0, excused=False)
    assert fresh.background.works == 0


async def test_each_catalogue_is_read_once_for_any_number_of_comparisons() -> None:
    bench = Bench()
    await bench.guard.prepare(FIRST)
    await bench.guard.prepare(FIRST)
    assert bench.background.works == 1
    await bench.publish(SECOND, FIRST, 0.0)
    assert bench.background.works == 2, "the candidate alone"
    await bench.publish(catalogue(165), SECOND, 1.0)
    assert bench.background.works == 3
    await bench.guard.prepare(catalogue(165))
    assert bench.background.works == 3
    await bench.guard.prepare(FIRST)
    assert bench.background.works == 4, "a catalogue that is not the newest is read again"


async def test_a_catalogue_whose_builder_is_known_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    builder = SnapshotBuilder()
    builder.add(row(f"c{number:03}", "pass") for number in range(100))
    few = Snapshot(builder.build(generation=1, created_at_ns=0).to_bytes())
    bench, judged = Bench(), Bench()
    expected = await judged.judge(few, FIRST)
    await bench.guard.prepare(FIRST)
    monkeypatch.setattr(Snapshot, "messages", unread)
    assert await bench.judge(few, FIRST, builder=builder) == expected
    assert expected is not None
    later = Bench()
    await later.guard.prepare(few, builder)
    assert await later.judge(few, None) is None


async def test_a_held_catalogue_that_is_accepted_is_not_read_again() -> None:
    bench = Bench()
    assert await bench.judge(FEW, FIRST) is not None
    works = bench.background.works
    await bench.guard.passed(FEW, FIRST, 1.0, excused=True)
    await bench.guard.prepare(FEW)
    assert bench.background.works == works


def unread(_: Snapshot) -> None:
    raise AssertionError("the catalogue was read")


@pytest.mark.parametrize("lost", [7, 20])
async def test_known_changed_names_do_not_change_the_judgement(lost: int) -> None:
    left = catalogue(30 - lost)
    names = [b"c%03d" % number for number in range(30 - lost, 30)]
    whole, known = Bench(), Bench()
    expected = await whole.judge(left, catalogue(30))
    assert await known.judge(left, catalogue(30), changed=names) == expected
    assert expected is not None


@pytest.mark.parametrize(("percent", "held"), [(100.0, False), (99.9, True), (50.0, True)])
@pytest.mark.parametrize("known", [True, False], ids=["names known", "all compared"])
async def test_changed_content_is_limited_if_the_threshold_is_below_100_percent(
    percent: float, held: bool, known: bool
) -> None:
    bench = Bench(limits=Thresholds(changed_percent=percent))
    names = [b"c%03d" % number for number in range(20)] if known else None
    judgement = await bench.judge(catalogue(20, "new"), catalogue(20), changed=names)
    assert (None if judgement is None else judgement.concern) == (Concern.CHANGED if held else None)


@pytest.mark.parametrize(("before", "held"), [(0, True), (6, True), (7, False), (12, False)])
async def test_rows_that_were_held_before_are_not_counted_as_newly_held(before: int, held: bool) -> None:
    names = frozenset(b"c%03d" % number for number in range(12))
    judgement = await Bench().judge(catalogue(40, "new"), catalogue(40), held=names, held_before=before)
    assert (None if judgement is None else judgement.concern) == (Concern.ROWS_HELD if held else None)
