"""Client drills: misbehaving clients cost other clients no call."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.chaos.conftest import MakeStage
from tests.chaos.drills.judge import explained, judge, verdict
from tests.chaos.drills.model import Allowance, Fault, Outcome
from tests.chaos.drills.run import DESCRIPTORS, PLAYED, play, play_red
from tests.chaos.drills.stage import Stage
from tests.chaos.faults_client import BEYOND_GRPCIO, FAULTS, on_transport

BY_ID = {fault.id: fault for fault in FAULTS}
TRIES = 3
BROKEN = Path(__file__).parent / "broken_client"

QUIET = pytest.mark.quiet
EVERY_FAULT = [pytest.param(each, marks=() if each.endswith("-gentle") else QUIET) for each in BY_ID]
"""Drills of full strength need the machine to themselves."""


def stage_for(fault: str, make_stage: MakeStage, **settings: str) -> Stage:
    """A stage. The catalogue for slow readers is so large that 32 answers exceed the kernel's buffers."""
    size = {"rows": 500, "size": 1000} if fault.startswith("client-slow-readers") else {}
    # This is the default. On a busy machine, a crowd may block a worker for longer than the usual 2 s of a drill.
    return make_stage(**size, **{"HEARTBEAT_TIMEOUT_SECONDS": "10"} | settings)


def played(fault: Fault, stage: Stage) -> Outcome:
    """Run a drill; repeat it if it was invalid or, as in `play_until_valid`, the machine was too busy for the load."""
    for _ in range(TRIES - 1):
        outcome = play(fault, stage)
        if verdict(outcome) != "invalid" and not outcome.load.too_late:
            return outcome
        PLAYED.remove(outcome)
    return play(fault, stage)


def left_behind(outcome: Outcome) -> int:
    """Number of descriptors above the number before."""
    assert outcome.before is not None
    assert outcome.after is not None
    return outcome.after.descriptors - outcome.before.descriptors


@pytest.mark.parametrize("fault", EVERY_FAULT)
def test_no_promise_is_broken_by_a_fault_of_clients(fault: str, make_stage: MakeStage, transport: str) -> None:
    if transport == "grpcio" and fault == "client-attacks":
        pytest.skip("the known attacks cost calls on grpcio: judged by the test below")
    outcome = played(on_transport(BY_ID[fault], transport), stage_for(fault, make_stage))
    assert verdict(outcome) == "held", explained(outcome)
    assert left_behind(outcome) <= DESCRIPTORS, "also on grpcio, where memory is not judged"


@QUIET
@pytest.mark.transports("grpcio")
@pytest.mark.parametrize("fault", BEYOND_GRPCIO)
def test_a_flood_on_grpcio_fails_calls_and_ends_no_worker(fault: str, make_stage: MakeStage) -> None:
    """C-core cancels calls of any client (for the reason, see `on_transport`). There must be no other effect, and no
    lasting one.
    """
    stage = stage_for(fault, make_stage)
    assert stage.server is not None
    workers = stage.server.worker_pids()
    outcome = play(replace(BY_ID[fault], allows=Allowance(memory=False)), stage)
    PLAYED.remove(outcome)  # the tests above check the promises
    assert outcome.trouble is None, explained(outcome)
    assert {*outcome.load.plain.failed, *outcome.load.retrying.failed} <= {"CANCELLED"}, explained(outcome)
    assert not outcome.load.wrong, explained(outcome)
    assert outcome.fresh_seconds is not None, explained(outcome)
    assert stage.server.worker_pids() == workers
    assert left_behind(outcome) <= DESCRIPTORS
    after = played(replace(BY_ID["client-crowd-gentle"], allows=Allowance(memory=False)), stage)
    assert verdict(after) == "held", explained(after)


@QUIET
@pytest.mark.transports("native")
@pytest.mark.parametrize(
    ("fault", "variant", "tells"),
    [
        ("client-crowd", "evicts-the-oldest", "calls without a retry failed|clients at once were answered"),
        ("client-crowd", "keeps-every-connection", "memory did not come back"),
        ("client-slow-readers", "waits-for-slow-readers", "calls without a retry failed|fresh rows took"),
        ("client-resets", "dies-of-a-reset", "calls without a retry failed"),
        ("client-attacks", "dies-of-an-attack", "calls without a retry failed"),
        ("client-wrong-keys", "makes-all-wait-for-wrong-keys", "calls without a retry failed|fresh rows took"),
        ("client-wrong-keys", "lets-wrong-keys-in", "wrong keys were not all answered with UNAUTHENTICATED"),
    ],
)
def test_a_server_with_a_defect_breaks_its_drill(fault: str, variant: str, tells: str, make_stage: MakeStage) -> None:
    """On the native transport only: on grpcio the code that accepts, reads and writes belongs to C-core."""
    settings = {"PYTHONPATH": str(BROKEN), "PYTHON_DRILL_BROKEN": variant}
    outcome = play_red(BY_ID[fault], stage_for(fault, make_stage, **settings), variant)
    assert any(re.search(tells, sentence) for sentence in judge(outcome)), explained(outcome)
