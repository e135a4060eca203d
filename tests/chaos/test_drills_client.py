"""Client drills: whatever some clients do, the others lose nothing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from tests.chaos.conftest import MakeStage
from tests.chaos.drills.judge import judge, told, verdict
from tests.chaos.drills.model import Allowance, Fault, Outcome
from tests.chaos.drills.run import DESCRIPTORS, PLAYED, play, play_red
from tests.chaos.drills.stage import Stage
from tests.chaos.faults_client import BEYOND_GRPCIO, FAULTS, on_transport

BY_ID = {fault.id: fault for fault in FAULTS}
TRIES = 3
BROKEN = Path(__file__).parent / "broken_client"

pytestmark = pytest.mark.quiet


def stage_for(fault: str, make_stage: MakeStage, **settings: str) -> Stage:
    """A stage. For slow readers, with a catalogue that does not fit into the kernel's buffers 32 times over; for a
    crowd, one that has seen a crowd before.

    Python keeps what 10,000 connections took for the next 10,000 (some 5 kB each), so the first crowd makes the
    workers larger and no further one may.
    """
    size = {"rows": 500, "size": 1000} if fault.startswith("client-slow-readers") else {}
    # As by default; a drill's other 2 s are less than a crowd may hold up a worker on a busy machine.
    stage = make_stage(**size, **{"HEARTBEAT_TIMEOUT_SECONDS": "10"} | settings)
    if fault == "client-crowd":
        with BY_ID[fault].inject(stage):
            pass
    return stage


def played(fault: Fault, stage: Stage) -> Outcome:
    """Play it; again where the machine was too busy for the load, which says nothing of the server."""
    for _ in range(TRIES - 1):
        outcome = play(fault, stage)
        if verdict(outcome) != "invalid":
            return outcome
        PLAYED.remove(outcome)
    return play(fault, stage)


def left_behind(outcome: Outcome) -> int:
    """Descriptors more than before."""
    assert outcome.before is not None
    assert outcome.after is not None
    return outcome.after.descriptors - outcome.before.descriptors


@pytest.mark.parametrize("fault", BY_ID)
def test_misbehaving_clients_cost_the_others_nothing(fault: str, make_stage: MakeStage, transport: str) -> None:
    if transport == "grpcio" and fault == "client-attacks":
        pytest.skip("the attack table costs calls on grpcio: judged by the test below")
    outcome = played(on_transport(BY_ID[fault], transport), stage_for(fault, make_stage))
    assert verdict(outcome) == "held", told(outcome)
    assert left_behind(outcome) <= DESCRIPTORS, "also on grpcio, where memory is not judged"


@pytest.mark.transports("grpcio")
@pytest.mark.parametrize("fault", BEYOND_GRPCIO)
def test_a_flood_on_grpcio_costs_calls_but_no_worker(fault: str, make_stage: MakeStage) -> None:
    """C-core sheds calls of anybody (`on_transport` argues it). Nothing else may come of it, and nothing may stay."""
    stage = stage_for(fault, make_stage)
    assert stage.server is not None
    workers = stage.server.worker_pids()
    outcome = play(replace(BY_ID[fault], allows=Allowance(memory=False)), stage)
    PLAYED.remove(outcome)  # what is promised is played above
    assert outcome.trouble is None, told(outcome)
    assert {*outcome.load.plain.failed, *outcome.load.retrying.failed} <= {"CANCELLED"}, told(outcome)
    assert not outcome.load.wrong, told(outcome)
    assert outcome.fresh_seconds is not None, told(outcome)
    assert stage.server.worker_pids() == workers
    assert left_behind(outcome) <= DESCRIPTORS
    after = played(replace(BY_ID["client-crowd-gentle"], allows=Allowance(memory=False)), stage)
    assert verdict(after) == "held", told(after)


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
def test_a_server_that_is_broken_on_purpose_breaks_its_drill(
    fault: str, variant: str, tells: str, make_stage: MakeStage
) -> None:
    """On the native transport: what accepts, reads and writes on grpcio is not ours to break."""
    settings = {"PYTHONPATH": str(BROKEN), "PYTHON_DRILL_BROKEN": variant}
    outcome = play_red(BY_ID[fault], stage_for(fault, make_stage, **settings), variant)
    assert any(re.search(tells, sentence) for sentence in judge(outcome)), told(outcome)
