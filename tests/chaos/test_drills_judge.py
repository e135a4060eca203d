"""Tests of the judge. For each promise there is an outcome that breaks only this promise, and for each doubt an outcome
that has it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
from tests.chaos.drills import run
from tests.chaos.drills.judge import doubts, explained, judge, verdict
from tests.chaos.drills.model import NOTHING, Allowance, Failure, LoadReport, Loss, Outcome, SetReport, Sighting, Usage
from tests.chaos.drills.table import text_table, to_json
from tests.chaos.faults_client import all_answered

BEFORE = Usage(100 << 20, 200 << 20, 80, 9, 1, 3)


def failure(sent: float, ended: float, answered: float | None = None) -> Failure:
    """A call that failed. On its connection, an earlier call was answered; it was sent just before this call, or at
    ``answered``."""
    last = sent - 0.01 if answered is None else answered
    return Failure("GetCommand", 4, "UNAVAILABLE", "Socket closed", sent, ended, last)


def offered(count: int, *failures: Failure, worst_ms: float = 12.4) -> SetReport:
    failed = {"UNAVAILABLE": len(failures)} if failures else {}
    return SetReport(count, count - len(failures), failed, list(failures), worst_ms)


def sound(allows: Allowance = NOTHING) -> Outcome:
    """An outcome without a broken promise or a doubt."""
    seen = {tag: Sighting(1.0, 2.0, 500, 1.5) for tag in ("1", "2")}
    load = LoadReport(offered(1000), offered(1000, worst_ms=15.6), versions=seen, seconds=20.0, rate=100.0)
    return Outcome(
        "db-killed", "PostgreSQL killed", "database", "native", "embedded", allows, load=load, written=["1", "2", "3"],
        fault_seconds=3.0, fresh_seconds=0.6, fresh_cycles=2, fresh_limit_seconds=4.0, before=BEFORE, after=BEFORE,
    )  # fmt: skip


def test_an_outcome_without_faults_is_held() -> None:
    assert judge(sound()) == doubts(sound()) == []
    assert verdict(sound()) == explained(sound()) == "held"


def plain_fails(outcome: Outcome) -> None:
    outcome.load.plain = offered(1000, failure(1.0, 1.1))


def retrying_fails(outcome: Outcome) -> None:
    outcome.load.retrying = offered(1000, failure(1.0, 1.1))


def half_a_catalogue(outcome: Outcome) -> None:
    outcome.load.wrong, outcome.load.wrong_count = ["one catalogue with rows of the versions 1, 2"], 1


def unknown_version(outcome: Outcome) -> None:
    outcome.load.versions["7"] = Sighting(1.0, 1.0, 1)


def goes_back(outcome: Outcome) -> None:
    outcome.load.went_back = ["version 1 on connection 3 after 2 everywhere"]


def never_fresh(outcome: Outcome) -> None:
    outcome.fresh_seconds = outcome.fresh_cycles = None


def late_fresh(outcome: Outcome) -> None:
    outcome.fresh_seconds = 4.1


def fresh_after_many_cycles(outcome: Outcome) -> None:
    outcome.fresh_cycles = 4


def more_memory(outcome: Outcome) -> None:
    outcome.after = replace(BEFORE, memory_bytes=119 << 20)


def more_descriptors(outcome: Outcome) -> None:
    outcome.after = replace(BEFORE, descriptors=85)


def more_threads(outcome: Outcome) -> None:
    outcome.after = replace(BEFORE, threads=12)


def one_more_snapshot(outcome: Outcome) -> None:
    outcome.after = replace(BEFORE, memfds=2)


def more_memory_of_a_first_time(outcome: Outcome) -> None:
    outcome.first_time_mib, outcome.fresh_server = 32, replace(BEFORE, memory_bytes=67 << 20)


def descriptors_of_a_first_time(outcome: Outcome) -> None:
    outcome.first_time_mib, outcome.fresh_server = 32, replace(BEFORE, descriptors=75)


BREACHES: dict[Callable[[Outcome], None], str] = {
    plain_fails: "1 calls without a retry failed: GetCommand on connection 4: UNAVAILABLE (Socket closed)",
    retrying_fails: "1 calls failed in spite of the default retry",
    half_a_catalogue: "1 answers were incomplete or of several versions: one catalogue with rows",
    unknown_version: "versions were served that were never written: 7",
    goes_back: "an older version was served after a newer one: version 1 on connection 3",
    never_fresh: "fresh rows were not served 6.0 s after the fault's end",
    late_fresh: "fresh rows took 4.1 s, one cycle is 4.0 s at the most",
    fresh_after_many_cycles: "fresh rows took 4 cycles",
    more_memory: "memory did not come back: 100 → 119 MiB",
    more_descriptors: "descriptors 80 → 85",
    more_threads: "threads 9 → 12",
    one_more_snapshot: "snapshots 1 → 2",
    more_memory_of_a_first_time: "the first time kept memory or descriptors: 67 → 100 MiB",
    descriptors_of_a_first_time: "descriptors 75 → 80",
}


@pytest.mark.parametrize("breach", BREACHES, ids=lambda breach: breach.__name__)
def test_a_broken_promise_is_reported(breach: Callable[[Outcome], None]) -> None:
    outcome = sound()
    breach(outcome)
    (sentence,) = judge(outcome)
    assert BREACHES[breach] in sentence
    assert verdict(outcome) == "BROKEN"
    assert doubts(outcome) == []


@pytest.mark.parametrize(
    ("allows", "breach"),
    [
        (Allowance(fresh=False), never_fresh),
        (Allowance(fresh=False), late_fresh),
        (Allowance(memory=False), more_memory),
        (Allowance(may_go_back=True), goes_back),
        (Allowance(grace_seconds=1.0), fresh_after_many_cycles),
    ],
)
def test_an_allowed_loss_breaks_no_promise(allows: Allowance, breach: Callable[[Outcome], None]) -> None:
    outcome = sound(allows)
    breach(outcome)
    assert verdict(outcome) == "held", explained(outcome)


IN_FLIGHT = Allowance(plain=Loss.IN_FLIGHT)


@pytest.mark.parametrize(
    ("sent", "ended", "allowed"),
    [(0.9, 1.1, True), (1.1, 1.2, True), (0.5, 5.0, True), (0.5, 0.9, False), (2.1, 2.2, False)],
)
def test_an_allowance_permits_only_calls_in_flight_during_a_wound_to_fail(
    sent: float, ended: float, allowed: bool
) -> None:
    outcome = sound(IN_FLIGHT)
    outcome.wounds = [(1.0, 2.0)]
    outcome.load.plain = offered(1000, failure(sent, ended))
    assert (verdict(outcome) == "held") is allowed, explained(outcome)


@pytest.mark.parametrize(
    ("sent", "answered", "allowed"),
    [(2.3, 0.9, True), (2.3, 1.5, True), (2.3, 0.0, True), (6.9, 0.9, True), (2.3, 2.1, False), (7.1, 0.9, False)],
)
def test_a_call_sent_before_the_client_noticed_the_lost_connection_may_fail(
    sent: float, answered: float, allowed: bool
) -> None:
    outcome = sound(IN_FLIGHT)
    outcome.wounds = [(1.0, 2.0)]
    outcome.load.plain = offered(1000, failure(sent, sent + 0.1, answered))
    assert (verdict(outcome) == "held") is allowed, explained(outcome)


@pytest.mark.parametrize(("details", "sent"), [("Socket closed", 2.3), ("Failed to connect to all addresses", 2.15)])
def test_a_call_sent_after_the_client_noticed_the_lost_connection_may_not_fail(details: str, sent: float) -> None:
    outcome = sound(IN_FLIGHT)
    outcome.wounds = [(1.0, 2.0)]
    first = failure(2.1, 2.2, 0.9)
    outcome.load.plain = offered(1000, first)
    assert verdict(outcome) == "held"
    outcome.load.plain = offered(1000, first, replace(failure(sent, sent + 0.1, 0.9), details=details))
    assert verdict(outcome) == "BROKEN"


@pytest.mark.parametrize(("kind", "held"), [("late", True), ("thrown out", False), ("not connected", False)])
def test_only_late_clients_of_a_crowd_may_get_no_answer(kind: str, held: bool) -> None:
    assert (all_answered(10, {"grpc-status 0": 9, kind: 1}) is None) is held


def test_with_the_default_retry_not_even_a_call_in_flight_may_fail() -> None:
    outcome = sound(IN_FLIGHT)
    outcome.wounds = [(1.0, 2.0)]
    outcome.load.retrying = offered(1000, failure(1.0, 1.1))
    assert verdict(outcome) == "BROKEN"


@pytest.mark.parametrize(("sent", "ended", "allowed"), [(1.0, 1.1, True), (0.5, 0.9, False)])
def test_with_the_default_retry_calls_may_fail_if_the_fault_allows_it(sent: float, ended: float, allowed: bool) -> None:
    outcome = sound(Allowance(plain=Loss.IN_FLIGHT, retried=Loss.IN_FLIGHT))
    outcome.wounds = [(1.0, 2.0)]
    outcome.load.retrying = offered(1000, failure(sent, ended))
    assert (verdict(outcome) == "held") is allowed, explained(outcome)


def test_failures_without_details_are_not_considered_allowed() -> None:
    outcome = sound(IN_FLIGHT)
    outcome.wounds = [(1.0, 2.0)]
    outcome.load.plain = offered(1000, failure(1.0, 1.1))
    outcome.load.plain.failed, outcome.load.plain.answered = {"UNAVAILABLE": 2}, 998
    assert "too many to judge each" in "\n".join(judge(outcome))


def nothing_offered(outcome: Outcome) -> None:
    outcome.load = LoadReport()


def too_little_offered(outcome: Outcome) -> None:
    outcome.load.retrying = offered(970)


def unaccounted(outcome: Outcome) -> None:
    outcome.load.plain.answered -= 1


def left_late(outcome: Outcome) -> None:
    outcome.load.late = 41


def not_felt(outcome: Outcome) -> None:
    outcome.felt = False


def trouble(outcome: Outcome) -> None:
    outcome.trouble = "PostgreSQL did not come back"


DOUBTS: dict[Callable[[Outcome], None], str] = {
    nothing_offered: "0 calls without a retry were offered of 0",
    too_little_offered: "970 calls with a retry were offered of 1000",
    unaccounted: "1 calls without a retry are unaccounted for",
    left_late: "41 of 2000 calls were sent late",
    not_felt: "the fault had no effect",
    trouble: "PostgreSQL did not come back",
}


@pytest.mark.parametrize("doubt", DOUBTS, ids=lambda doubt: doubt.__name__)
def test_a_drill_without_its_load_or_fault_is_invalid(doubt: Callable[[Outcome], None]) -> None:
    outcome = sound()
    doubt(outcome)
    assert DOUBTS[doubt] in "\n".join(doubts(outcome))
    assert verdict(outcome) == "invalid"


def test_a_broken_promise_in_a_doubtful_drill_is_broken() -> None:
    outcome = sound()
    not_felt(outcome)
    plain_fails(outcome)
    assert verdict(outcome) == "BROKEN"


NO_STATUS = (TimeoutError("timed out"), ConnectionRefusedError("refused"), json.JSONDecodeError("no status", "", 0))


@pytest.mark.parametrize("error", NO_STATUS, ids=lambda error: type(error).__name__)
def test_stale_rows_are_a_broken_promise_even_if_the_status_page_does_not_answer(error: Exception) -> None:
    outcome = sound()
    outcome.fresh_seconds = outcome.fresh_cycles = None
    stage: Any = Mock(cycle_seconds=4.0, **{"cycles.side_effect": error})
    load: Any = Mock(**{"wait_everywhere.side_effect": AssertionError("not everywhere")})
    run._see_fresh(stage, load, outcome)
    assert "fresh rows were not served" in "\n".join(judge(outcome))


@pytest.mark.parametrize("cycles", [[NO_STATUS[0], 4], [3, NO_STATUS[0]]], ids=["before", "after"])
def test_a_drill_is_not_finished_if_only_the_status_page_does_not_answer(cycles: list[Any]) -> None:
    stage: Any = Mock(cycle_seconds=4.0, **{"cycles.side_effect": cycles})
    load: Any = Mock(**{"wait_everywhere.return_value": time.monotonic()})
    with pytest.raises(TimeoutError):
        run._see_fresh(stage, load, sound())


def test_values_that_were_not_measured_are_not_judged() -> None:
    outcome = sound()
    outcome.written, outcome.before, outcome.after = [], None, None
    outcome.fresh_seconds = outcome.fresh_cycles = outcome.fresh_limit_seconds = None
    assert verdict(outcome) == "held", explained(outcome)


def test_the_table_shows_every_drill_and_its_broken_promises() -> None:
    red = sound()
    retrying_fails(red)
    lines = text_table([sound(), red]).splitlines()
    assert lines[2].split() == [
        *("PostgreSQL", "killed", "native", "embedded", "2000", "0", "0", "16", "0.6", "100", "→", "100", "held"),
    ]
    assert lines[3].endswith("BROKEN")
    assert lines[4] == "2 drills, 4000 calls offered, 1 failed"
    assert lines[5].startswith("db-killed (native, embedded): 1 calls failed in spite of the default retry")


def test_an_outcome_is_json_with_its_verdict() -> None:
    found = json.loads(json.dumps(to_json(sound(IN_FLIGHT))))
    assert (found["verdict"], found["broken"], found["doubts"]) == ("held", [], [])
    assert found["load"]["plain"]["offered"] == 1000
    assert found["allows"]["plain"] == "in flight"
