"""The changes of publications: remembered for the last hundred versions, with the newest publication last."""

from __future__ import annotations

from definition_server.control_plane.sync_state import ChangeCounts, SyncState


def counts(number: int) -> ChangeCounts:
    return ChangeCounts(number, 0, 0, (), number)


def test_the_changes_of_the_last_hundred_versions_are_remembered() -> None:
    state = SyncState()
    for number in range(100):
        state.note_changes(f"v{number}", counts(number))
    assert list(state.changes) == [f"v{number}" for number in range(100)]
    state.note_changes("v100", counts(100))
    assert list(state.changes) == [f"v{number}" for number in range(1, 101)]


def test_a_version_that_is_published_again_becomes_the_newest_and_gets_its_new_changes() -> None:
    state = SyncState()
    for number, version in enumerate(("a", "b", "a")):
        state.note_changes(version, counts(number))
    assert list(state.changes.items()) == [("b", counts(1)), ("a", counts(2))]
