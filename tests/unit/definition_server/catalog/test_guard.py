"""The guard holds a catalogue that looks like an accident. A change of a few rows passes, even if the table has no
other rows.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.support.snapshots import opened, published, row

from definition_server.catalog.definition import Row
from definition_server.catalog.guard import (
    FEW_COMMANDS,
    SMALL_GROWTH,
    Concern,
    Contents,
    Judgement,
    Thresholds,
    judge,
)
from definition_server.catalog.signing import OVERHEAD, Signer


def names(*numbers: int) -> frozenset[bytes]:
    return frozenset(b"c%03d" % number for number in numbers)


def contents(count: int, octets: int = 1000, *, version: str = "", first: int = 0) -> Contents:
    return Contents(version or f"{first} to {count}", names(*range(first, first + count)), octets)


def concern(judgement: Judgement | None) -> Concern | None:
    return None if judgement is None else judgement.concern


@pytest.mark.parametrize(
    ("before", "left", "held"),
    [
        (189, 189, False),
        (189, 152, False),  # 37 of 189: 19.6 %
        (189, 151, True),  # 38: 20.1 %
        (189, 1, True),
        (10, 5, False),  # half of the commands, but only five
        (6, 1, False),
        (7, 1, True),
        (30, 24, False),  # 6 of 30: exactly 20 %
        (29, 23, True),
    ],
)
def test_a_loss_of_more_than_a_fifth_and_more_than_five_commands_is_held(before: int, left: int, held: bool) -> None:
    judgement = judge(contents(left), contents(before))
    assert concern(judgement) == (Concern.SHRUNK if held else None)


def test_a_held_catalogue_names_up_to_ten_commands_and_the_threshold() -> None:
    judgement = judge(contents(1), contents(189))
    assert judgement is not None
    assert judgement.names == tuple(f"c{number:03}" for number in range(1, 11))
    assert "188 of 189" in judgement.text
    assert "GUARD_MAX_REMOVED_PERCENT" in judgement.text


def test_a_rename_of_everything_is_held_because_the_old_names_vanish() -> None:
    assert concern(judge(contents(100, first=500), contents(100))) is Concern.SHRUNK


@pytest.mark.parametrize(
    ("before", "after", "held"),
    [
        (1000, 1000 + SMALL_GROWTH, False),
        (1000, 1001 + SMALL_GROWTH, True),
        (4 << 20, 8 << 20, False),
        (4 << 20, (8 << 20) + 1, True),
        (8 << 20, 1000, False),
    ],
)
def test_a_catalogue_may_double_its_octets_and_may_always_grow_by_a_mebibyte(
    before: int, after: int, held: bool
) -> None:
    judgement = judge(contents(10, after, version="b"), contents(10, before, version="a"))
    assert concern(judgement) == (Concern.GROWN if held else None)


@pytest.mark.parametrize(
    ("rows_held", "before", "held"),
    [(20, 0, False), (21, 0, True), (21, 16, False), (21, 15, True), (90, 90, False)],
)
def test_rows_that_were_held_before_do_not_cause_the_next_change_to_be_held(
    rows_held: int, before: int, held: bool
) -> None:
    judgement = judge(
        contents(100, version="b"), contents(100, version="a"), held=names(*range(rows_held)), held_before=before
    )
    assert concern(judgement) == (Concern.ROWS_HELD if held else None)


def test_few_held_rows_of_a_small_table_do_not_cause_the_catalogue_to_be_held() -> None:
    small = contents(6, version="b")
    assert judge(small, contents(6, version="a"), held=names(*range(FEW_COMMANDS))) is None


def test_the_same_content_passes_with_any_held_rows_and_any_size() -> None:
    same = Contents("v", names(1), 1)
    assert judge(Contents("v", names(1), 100 << 20), same, held=names(*range(100))) is None


def test_the_first_catalogue_passes_and_an_empty_catalogue_is_held() -> None:
    assert judge(contents(5), None) is None
    assert concern(judge(contents(0), None)) is Concern.EMPTIED
    assert concern(judge(contents(0), contents(1))) is Concern.EMPTIED


def test_losses_in_small_steps_add_up_against_the_baseline_except_for_a_few_rows() -> None:
    start, second = contents(100), contents(82)
    assert judge(contents(67), second) is None
    assert concern(judge(contents(67), second, start)) is Concern.SHRUNK
    assert judge(contents(77), second, start) is None, "five rows"


def test_growth_in_steps_adds_up_against_the_baseline() -> None:
    start, second = contents(10, 4 << 20, version="a"), contents(10, 7 << 20, version="b")
    third = contents(10, 9 << 20, version="c")
    assert judge(third, second) is None
    assert concern(judge(third, second, start)) is Concern.GROWN


def test_a_threshold_is_a_setting_and_100_percent_allows_every_loss() -> None:
    assert judge(contents(1), contents(189), limits=Thresholds(removed_percent=100)) is None
    assert concern(judge(contents(88), contents(100), limits=Thresholds(removed_percent=10))) is Concern.SHRUNK


def test_a_change_of_signatures_is_not_a_change_of_content() -> None:
    rows = [row(f"c{number}", "x") for number in range(20)]
    plain, signed = opened(*rows), published(*rows, signer=Signer("key"))
    os.close(signed.descriptor)
    bare, with_packages = Contents.of(plain), Contents.of(signed.snapshot)
    assert (bare.version, bare.names) == (with_packages.version, with_packages.names)
    assert len(signed.snapshot.body) - len(plain.body) > 20 * OVERHEAD // 2
    assert with_packages.octets - bare.octets <= 20 * 2, "only the length fields are longer"


@pytest.mark.parametrize("signer", [None, Signer("key")], ids=["unsigned", "signed"])
@pytest.mark.parametrize("blank", ["", " \n\t\n"], ids=["empty", "white space"])
@pytest.mark.parametrize(("emptied", "held"), [(37, False), (38, True), (189, True)])
def test_commands_whose_code_becomes_blank_are_counted_as_vanished(
    signer: Signer | None, blank: str, emptied: int, held: bool
) -> None:
    rows = [row(f"c{number:03}", "x = 1") for number in range(189)]
    before = _contents_of(*rows, signer=signer)
    after = _contents_of(*(row(f"c{n:03}", blank) for n in range(emptied)), *rows[emptied:], signer=signer)
    judgement = judge(after, before)
    assert concern(judgement) == (Concern.SHRUNK if held else None)
    if judgement is not None:
        assert f"({emptied} of them by blank code)" in judgement.text
    assert judge(before, after) is None
    more = _contents_of(*(row(f"c{n:03}", blank) for n in range(emptied)), *rows[emptied:-1], signer=signer)
    assert judge(more, after) is None, "commands that were blank before do not count"


@pytest.mark.parametrize("signer", [None, Signer("key")], ids=["unsigned", "signed"])
def test_code_of_up_to_1024_octets_of_white_space_is_blank(signer: Signer | None) -> None:
    rows = [row("a", " " * 1024), row("b", " " * 1025), row("c", " " * 1023 + "x")]
    assert _contents_of(*rows, signer=signer).blank == {b"a"}


def _contents_of(*rows: Row, signer: Signer | None) -> Contents:
    publication = published(*rows, signer=signer)
    os.close(publication.descriptor)
    return Contents.of(publication.snapshot)


# -- changes of the contents under the same names ----------------------------------------------------------------------

RELEASES = {
    "another type": lambda rows: [each._replace(type=b"class") for each in rows],
    "another interface": lambda rows: [each._replace(interface=b'[{"item": "x", "type": "var"}]') for each in rows],
    "another code": lambda rows: [each._replace(code=b"x = 1") for each in rows],
    "codes exchanged among the names": lambda rows: [
        each._replace(code=other.code) for each, other in zip(rows, [*rows[1:], rows[0]], strict=True)
    ],
}


def catalogue(rows: list[Row]) -> Contents:
    return Contents.of(opened(*rows), with_hashes=True)


@pytest.mark.parametrize("release", RELEASES.values(), ids=RELEASES)
@pytest.mark.parametrize("baseline", [False, True], ids=["", "in steps"])
def test_a_catalogue_with_most_contents_changed_is_held_if_a_limit_is_set(
    release: Callable[[list[Row]], list[Row]], baseline: bool
) -> None:
    rows = [row(f"c{number:03}", f"n = {number}") for number in range(40)]
    after = release(rows)
    served = catalogue([*after[:-8], *rows[-8:]] if baseline else rows)
    before = catalogue(rows) if baseline else None
    assert judge(catalogue(after), served, before) is None
    judgement = judge(catalogue(after), served, before, limits=Thresholds(changed_percent=50))
    assert concern(judgement) == Concern.CHANGED
    assert judgement is not None
    assert "GUARD_MAX_CHANGED_PERCENT" in judgement.text
    assert len(judgement.names) == 10


def test_a_change_of_a_few_commands_always_passes() -> None:
    rows = [row(f"c{number}", "pass") for number in range(6)]
    changed = [each._replace(code=b"x = 1") for each in rows]
    limits = Thresholds(changed_percent=0)
    assert judge(catalogue([*changed[:5], rows[5]]), catalogue(rows), limits=limits) is None
    assert concern(judge(catalogue(changed), catalogue(rows), limits=limits)) == Concern.CHANGED
