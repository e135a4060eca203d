"""Database drills: no call fails, and fresh rows are served within a cycle."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from tests.chaos.conftest import MakeStage
from tests.chaos.drills.judge import explained, judge, verdict
from tests.chaos.drills.run import play_red, play_until_valid
from tests.chaos.drills.stage import Stage
from tests.chaos.faults_database import FAULTS
from tests.support.providers import DatabaseServer, provider_or_skip

BY_ID = {fault.id: fault for fault in FAULTS}

LARGE = "db-read-cancelled"
"""Needs half a minute and a core; on one transport only, because its fault is in the master's reading."""

STAGES: dict[str, dict[str, Any]] = {
    # The rows are three batches, so that most rows are not yet fetched when the table is emptied.
    "db-truncated-mid-read": {"rows": 2500, "size": 400, "STATEMENT_TIMEOUT_SECONDS": "4"},
    # 100 MB.
    LARGE: {"rows": 50_000, "size": 2000, "STATEMENT_TIMEOUT_SECONDS": "5"},
}
"""Arguments of a drill's stage that differ from the default."""

IN_CONTAINER = (
    "db-killed", "db-stopped", "db-paused", "db-restarting", "db-connection-limit", "db-wrong-password",
    "db-network-disconnected",
)  # fmt: skip
"""Drills that also run on a container, because signals, network and authentication depend on the Docker engine and the
image. The others use SQL or the proxy, which are the same there.
"""


@pytest.fixture
def frail(request: pytest.FixtureRequest) -> Iterator[DatabaseServer]:
    """A server for this drill only, of the provider that the test names."""
    server = provider_or_skip(request.param)
    yield server
    server.close()


def on_stage(make_stage: MakeStage, database: DatabaseServer, fault: str, **options: str) -> Stage:
    return make_stage(database, reader=True, **STAGES.get(fault, {}) | options)


EMBEDDED = [
    pytest.param(each, marks=(pytest.mark.transports(), pytest.mark.quiet) if each == LARGE else ())
    for each in BY_ID
    if each != "db-network-disconnected"
]
QUIET = {LARGE: pytest.mark.quiet}


@pytest.mark.parametrize("frail", ["embedded"], indirect=True)
@pytest.mark.parametrize("fault", EMBEDDED)
def test_no_promise_is_broken_by_a_fault_of_an_embedded_database(
    frail: DatabaseServer, make_stage: MakeStage, fault: str
) -> None:
    outcome = play_until_valid(BY_ID[fault], on_stage(make_stage, frail, fault))
    assert verdict(outcome) == "held", explained(outcome)


@pytest.mark.transports
@pytest.mark.parametrize("frail", ["container"], indirect=True)
@pytest.mark.parametrize("fault", IN_CONTAINER)
def test_no_promise_is_broken_by_a_fault_of_a_database_in_a_container(
    frail: DatabaseServer, make_stage: MakeStage, fault: str
) -> None:
    outcome = play_until_valid(BY_ID[fault], on_stage(make_stage, frail, fault))
    assert verdict(outcome) == "held", explained(outcome)


CALLS_FAILED = "calls (without a retry failed|failed in spite of the default retry)"
"""Which of the two sets of clients meets a defect that lasts a moment, is chance."""

BREAKS = {
    "db-killed": ("keeps_dead_connection", "fresh rows were not served"),
    "db-stopped": ("fails_closed", "calls failed in spite of the default retry"),
    "db-paused": ("dies_of_it", "calls failed in spite of the default retry"),
    "db-restarting": ("keeps_dead_connection", "fresh rows were not served"),
    "db-standby-behind": ("never_looks_again", "fresh rows were not served"),
    "db-connection-limit": ("dies_of_it", CALLS_FAILED),
    "db-wrong-password": ("forgets_rotation", "fresh rows were not served"),
    "db-role-revoked": ("fails_closed", CALLS_FAILED),
    "db-table-dropped": ("fails_closed", "answers were incomplete or of several versions"),
    "db-table-locked": ("leaks", "memory did not come back"),
    "db-truncated-mid-read": ("reads_by_page", "answers were incomplete or of several versions"),
    "db-read-cancelled": ("publishes_half", CALLS_FAILED),
    "db-slow": ("fails_closed", CALLS_FAILED),
    "db-half-open": ("dies_of_it", CALLS_FAILED),
    "db-black-hole": ("waits_for_ever", "fresh rows were not served"),
}
"""Drill → a server with one bug (`broken/database_variants.py`), and the promise that it breaks."""


def test_every_drill_on_an_embedded_database_has_a_server_with_a_defect() -> None:
    assert {*BREAKS, "db-network-disconnected"} == BY_ID.keys()


def assert_turns_red(make_stage: MakeStage, database: DatabaseServer, fault: str, bug: str, sentence: str) -> None:
    stage = on_stage(make_stage, database, fault, broken=bug)
    stage.job = replace(stage.default_job(), deadline_seconds=3)  # many of its calls are never answered
    outcome = play_red(BY_ID[fault], stage, bug, 1.0)
    assert verdict(outcome) == "BROKEN", explained(outcome)
    assert re.search(sentence, "\n".join(judge(outcome))), explained(outcome)


@pytest.mark.transports
@pytest.mark.parametrize("frail", ["embedded"], indirect=True)
@pytest.mark.parametrize("fault", [pytest.param(each, marks=QUIET.get(each, ())) for each in BREAKS])
def test_a_drill_detects_a_server_with_a_defect(frail: DatabaseServer, make_stage: MakeStage, fault: str) -> None:
    assert_turns_red(make_stage, frail, fault, *BREAKS[fault])


@pytest.mark.transports
@pytest.mark.parametrize("frail", ["embedded"], indirect=True)
def test_a_drill_detects_that_an_emptied_table_is_served(frail: DatabaseServer, make_stage: MakeStage) -> None:
    assert_turns_red(make_stage, frail, "db-truncated-mid-read", "accepts_empty", CALLS_FAILED)


@pytest.mark.transports
@pytest.mark.parametrize("frail", ["container"], indirect=True)
def test_a_drill_on_a_container_detects_a_server_with_a_defect(frail: DatabaseServer, make_stage: MakeStage) -> None:
    assert_turns_red(make_stage, frail, "db-network-disconnected", "fails_closed", CALLS_FAILED)
