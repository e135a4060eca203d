"""Pins and acceptances by command while the disk does not answer: they are kept in memory, and stored when the disk has
answered."""

from __future__ import annotations

from typing import Any, cast

import pytest

from definition_server.control_plane.operator_wishes import OperatorWishes
from definition_server.control_plane.wishes import Pin, Policy, Wishes

VERSION, OTHER = "ab" * 32, "cd" * 32
PIN = Pin(VERSION, None, "command")


class Disk:
    """A disk that notes its calls."""

    def __init__(self) -> None:
        self.saved: list[Wishes] = []
        self.steps: list[Any] = []

    async def save_wishes(self, wishes: Wishes, signer: object) -> str | None:
        self.saved.append(wishes)
        return None

    async def save_wishes_again(self, signer: object) -> None:
        self.steps.append("again")

    def note_pin_unsaved(self, *, unsaved: bool) -> None:
        self.steps.append(unsaved)


@pytest.fixture
def disk() -> Disk:
    return Disk()


@pytest.fixture
def wishes(disk: Disk) -> OperatorWishes:
    return OperatorWishes(cast(Any, disk), policy=Policy, signer=lambda: None, clock=lambda: 5.0)


async def test_before_the_disk_has_answered_no_file_on_it_is_overwritten(wishes: OperatorWishes, disk: Disk) -> None:
    wishes.accept(VERSION)
    assert await wishes.save() == "the disk has not answered yet; the change is stored when it has"
    assert disk.steps == [False], "no pin waits for the disk"
    wishes.pin(PIN)
    await wishes.save()
    assert disk.steps == [False, True]
    await wishes.save_again()
    assert not disk.saved
    wishes.recall(Wishes().accept(OTHER))
    await wishes.save_again()
    (stored,) = disk.saved
    assert set(stored.accepted) == {VERSION, OTHER}
    assert stored.pinned == PIN
    await wishes.save_again()
    assert len(disk.saved) == 1
    assert disk.steps == [False, True, "again"]


async def test_a_pin_that_was_reported_as_unsaved_is_saved_even_if_the_file_has_it_already(
    wishes: OperatorWishes, disk: Disk
) -> None:
    wishes.pin(PIN)
    await wishes.save()
    wishes.recall(Wishes().pin(PIN))
    await wishes.save_again()
    assert disk.saved == [Wishes().pin(PIN)], "this also ends the report"


async def test_the_wishes_on_disk_are_used_if_there_are_no_newer_ones(wishes: OperatorWishes, disk: Disk) -> None:
    wishes.recall(Wishes().pin(PIN).hold_rows(3, VERSION))
    assert wishes.now().pin == PIN
    assert wishes.rows_held_in(VERSION) == 3
    assert wishes.rows_held_in(OTHER) == 0
    await wishes.save_again()
    assert (disk.saved, disk.steps) == ([], ["again"])
    assert await wishes.save() is None
    assert len(disk.saved) == 1


async def test_a_pin_that_was_removed_before_the_disk_answers_is_not_restored(wishes: OperatorWishes) -> None:
    wishes.pin(None)
    wishes.recall(Wishes().pin(PIN))
    assert wishes.now().pin is None


async def test_an_acceptance_that_was_used_before_the_disk_answers_is_not_restored(
    wishes: OperatorWishes, disk: Disk
) -> None:
    await wishes.note_passed(VERSION, accepted=True, rows_held=2)
    wishes.recall(Wishes().accept(VERSION).hold_rows(9, OTHER))
    await wishes.save_again()
    (stored,) = disk.saved
    assert VERSION not in stored.accepted
    assert (stored.rows_held, stored.rows_held_in) == (2, VERSION)


async def test_only_a_smaller_count_of_held_rows_is_kept(wishes: OperatorWishes, disk: Disk) -> None:
    wishes.recall(Wishes())
    await wishes.note_passed(VERSION, accepted=False, rows_held=2)
    await wishes.note_passed(VERSION, accepted=False, rows_held=2)
    assert [(each.rows_held, each.rows_held_in) for each in disk.saved] == [(2, VERSION)]
    for held in (3, 2, 1):
        await wishes.note_fewer_held(VERSION, held)
    await wishes.note_fewer_held(OTHER, 0)
    assert [each.rows_held for each in disk.saved] == [2, 1]
    assert wishes.rows_held_in(VERSION) == 1
