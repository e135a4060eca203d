"""Machine drills: no descriptors, no disk, no CPU, a wrong clock, another server on the port; no call may fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from tests.chaos import promises
from tests.chaos.conftest import MakeStage
from tests.chaos.drills.judge import explained, verdict
from tests.chaos.drills.run import play_red, play_until_valid
from tests.chaos.faults_machine import FAULTS, NEEDS, on_transport
from tests.chaos.machine import Clock, have
from tests.chaos.promises import patient
from tests.chaos.variants import broken

BY_ID = {fault.id: fault for fault in FAULTS}

QUIET = pytest.mark.quiet

SettingsFor = Callable[[str], dict[str, str]]


@pytest.fixture
def settings_for(tmp_path: Path) -> Iterator[SettingsFor]:
    """Settings of the drill's server."""
    with ExitStack() as stack:

        def made(fault: str) -> dict[str, str]:
            if fault.startswith("clock-"):
                return stack.enter_context(Clock(tmp_path / "clock")).settings
            if fault.startswith(("disk-", "snapshot-")):
                (tmp_path / "snapshots").mkdir()
                # A start must not wait long for a database that does not answer, because clients wait during the start.
                return {"SNAPSHOT_DIR": str(tmp_path / "snapshots"), "CONNECT_TIMEOUT_SECONDS": "0.5"}
            return {}

        yield made


@pytest.mark.parametrize("fault", [pytest.param(each, marks=QUIET if each == "cpu-halved" else ()) for each in BY_ID])
def test_no_promise_is_broken_by_a_fault_of_the_machine(
    fault: str, make_stage: MakeStage, transport: str, settings_for: SettingsFor
) -> None:
    have(NEEDS.get(fault))
    outcome = play_until_valid(on_transport(BY_ID[fault], transport), patient(make_stage(**settings_for(fault))))
    assert verdict(outcome) == "held", explained(outcome)


@pytest.mark.transports
@pytest.mark.parametrize(
    ("fault", "variant"),
    [
        ("no-descriptors", "dies-of-a-failed-cycle"),
        ("workers-no-descriptors", "workers-die-of-trouble"),
        ("no-threads", "needs-a-thread-to-swap"),
        ("disk-full", "stores-before-it-publishes"),
        ("disk-read-only", "stores-before-it-publishes"),
        ("snapshot-damaged", "trusts-the-disk"),
        ("clock-forward", "goes-by-the-wall-clock"),
        ("clock-back", "goes-by-the-wall-clock"),
        pytest.param("cpu-halved", "workers-end-when-late", marks=QUIET),
        ("second-server", "shares-its-port"),
        ("port-taken", "takes-another-port"),
    ],
)
def test_a_server_with_a_defect_breaks_its_drill(
    fault: str, variant: str, make_stage: MakeStage, settings_for: SettingsFor, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(NEEDS.get(fault))
    monkeypatch.setattr(promises, "PROMISED_SECONDS", 8.0)  # a missing effect costs the whole waiting time
    outcome = play_red(BY_ID[fault], make_stage(**broken(variant, settings_for(fault))), variant)
    assert verdict(outcome) == "BROKEN", explained(outcome)
