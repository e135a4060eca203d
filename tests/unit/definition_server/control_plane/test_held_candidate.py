"""A held catalogue: the facts that the server shows about it, the time since which it is held, and the reasons for the
end of the hold.
"""

from __future__ import annotations

import pytest
from tests.support.logs import LogLines, logged
from tests.support.snapshots import opened

from definition_server.catalog.guard import Concern, Judgement
from definition_server.control_plane.held_candidate import Held, HeldCandidate
from definition_server.control_plane.sync_state import HeldCatalogue, SyncState
from definition_server.observability.reasons import Reason

ONE, OTHER = opened("if", "else"), opened("if")
SHRUNK = Judgement(Concern.SHRUNK, "too many would vanish", ("a", "b"))


class Bench:
    def __init__(self) -> None:
        self.state = SyncState()
        self.now = 1000.0
        self.candidate = HeldCandidate(self.state, lambda: self.now)


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_a_held_catalogue_is_kept_and_shown_with_its_reason(bench: Bench) -> None:
    with pytest.raises(Held, match="too many would vanish") as raised:
        bench.candidate.hold(ONE, SHRUNK, 9, 3)
    assert bench.state.held == HeldCatalogue(
        ONE.version_hash, Reason.CATALOGUE_SHRUNK, "too many would vanish", ("a", "b"), 2, 1000.0
    )
    assert raised.value.held is bench.state.held
    assert (bench.candidate.snapshot, bench.candidate.rows_held) == (ONE, 3)


def test_a_version_is_held_since_the_first_of_its_readings_in_a_row(bench: Bench) -> None:
    found = []
    for snapshot in (ONE, ONE, OTHER, ONE):
        with pytest.raises(Held) as raised:
            bench.candidate.hold(snapshot, SHRUNK, 9, 0)
        found.append(raised.value.held.since)
        bench.now += 10.0
    assert found == [1000.0, 1000.0, 1020.0, 1030.0]


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (0, "obex_dapl_functions: it is empty"),
        (1, "obex_dapl_functions: none of its 1 rows can be served"),
        (7, "obex_dapl_functions: none of its 7 rows can be served"),
    ],
)
def test_the_message_about_an_empty_catalogue_distinguishes_an_empty_table_from_unservable_rows(
    bench: Bench, rows: int, text: str
) -> None:
    with pytest.raises(Held) as raised:
        bench.candidate.hold(opened(), Judgement(Concern.EMPTIED, "nothing in it can be served"), rows, 0)
    assert str(raised.value) == text
    assert (raised.value.held.reason, raised.value.held.definitions) == (Reason.TABLE_EMPTY, 0)


def test_a_check_raises_held_until_the_catalogue_is_released(bench: Bench, logs: LogLines) -> None:
    bench.candidate.check()
    bench.candidate.release("nothing is held")
    assert logs == []
    with pytest.raises(Held):
        bench.candidate.hold(ONE, SHRUNK, 9, 0)
    with pytest.raises(Held, match="too many would vanish"):
        bench.candidate.check()
    bench.candidate.release("it was accepted")
    (line,) = logged(logs, "Catalogue no longer held", log_level="info")
    assert (line["version_hash"], line["reason"]) == (ONE.version_hash, "it was accepted")
    bench.candidate.check()
    assert bench.candidate.snapshot is None
    assert bench.state.held is None


def test_closing_releases_the_held_catalogue(bench: Bench) -> None:
    with pytest.raises(Held):
        bench.candidate.hold(ONE, SHRUNK, 9, 0)
    bench.candidate.close()
    assert bench.candidate.snapshot is None
