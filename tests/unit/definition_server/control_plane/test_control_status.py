"""The texts in the answers on the control socket."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from definition_server.catalog.definition import Unserved
from definition_server.control_plane.control_status import held_message, shortfalls
from definition_server.control_plane.sync_state import PinState, SyncState


@dataclass(frozen=True)
class Held:
    name: str
    reason: str
    since: float
    hash_served: str | None
    hash_refused: str | None


def state(*, pinned: bool = False, missing: bool = False, vain: bool = False, left_out: int = 0) -> SyncState:
    made = SyncState()
    if pinned:
        made.pin = PinState("ab" * 32, until=None, source="command", missing=missing, vain=vain)
    made.findings.unserved[Unserved.CODE_INVALID] = left_out
    return made


@pytest.mark.parametrize(
    ("made", "held", "texts"),
    [
        (state(pinned=True), 0, ["a pin counts"]),
        (state(pinned=True, missing=True), 0, ["a pin counts, and its version is not known here"]),
        (state(), 2, ["commands held at an earlier version: 2"]),
        (state(left_out=1), 0, ["rows not served: 1"]),
        (
            state(pinned=True, left_out=1),
            2,
            ["a pin counts", "commands held at an earlier version: 2", "rows not served: 1"],
        ),
    ],
    ids=["pinned", "pin of an unknown version", "held", "left-out", "all"],
)
def test_a_cycle_that_succeeded_says_why_the_table_is_not_served(made: SyncState, held: int, texts: list[str]) -> None:
    said = shortfalls(made, held)
    assert all(text in said for text in texts)
    assert "definition-server status" in said


def test_a_table_that_is_served_needs_no_word() -> None:
    assert shortfalls(state(), 0) == ""
    assert shortfalls(state(pinned=True, missing=True, vain=True), 0) == ""


@pytest.mark.parametrize(("served", "refused"), [("ab" * 32, "cd" * 32), (None, None)], ids=["hashes", "no hashes"])
def test_a_held_command_has_its_name_reason_time_and_hashes(served: str | None, refused: str | None) -> None:
    held = Held("if", "code-invalid: unexpected end", 1_800_000_000.25, served, refused)
    message = held_message(held)
    assert (message.name, message.hash_served, message.hash_refused) == ("if", served or "", refused or "")
    assert message.reason == held.reason
    assert message.since.ToNanoseconds() == 1_800_000_000_250_000_000
