"""Process drills: only calls in flight on a killed worker may fail, and none with the client's default retry."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.chaos import promises
from tests.chaos.conftest import MakeStage
from tests.chaos.drills.judge import explained, verdict
from tests.chaos.drills.run import play_red, play_until_valid
from tests.chaos.faults_process import FAULTS, NEEDS, on_transport
from tests.chaos.machine import have
from tests.chaos.promises import patient
from tests.chaos.variants import broken
from tests.support.server import KEY

import definition_server

BY_ID = {fault.id: fault for fault in FAULTS}


def settings_for(fault: str, directory: Path) -> dict[str, str]:
    """Settings of the drill's server: a file of keys, or for a bad build a copy of the package to be damaged."""
    if fault == "keys-rotated":
        keys = directory / "keys"
        keys.write_text(f"load:{KEY}\n", encoding="ascii")
        return {"API_KEY": "", "API_KEYS_FILE": str(keys)}
    if fault != "bad-build":
        return {}
    build = directory / "build"
    shutil.copytree(Path(definition_server.__file__).parent, build / "definition_server")
    return {"PYTHONPATH": str(build)}


@pytest.mark.parametrize("fault", BY_ID)
def test_a_fault_of_a_process_fails_no_more_calls_than_its_allowance(
    fault: str, make_stage: MakeStage, transport: str, tmp_path: Path
) -> None:
    have(NEEDS.get(fault))
    stage = patient(make_stage(**settings_for(fault, tmp_path)))
    outcome = play_until_valid(on_transport(BY_ID[fault], transport), stage)
    assert verdict(outcome) == "held", explained(outcome)


@pytest.mark.transports
@pytest.mark.parametrize(
    ("fault", "variant"),
    [
        ("worker-killed", "never-replaces-workers"),
        ("workers-all-killed", "replaces-workers-late"),
        ("worker-stopped", "never-kills-hung-workers"),
        ("worker-oom-killed", "forgets-to-hand-over"),
        ("bad-build", "rolls-before-the-successor-is-ready"),
        ("bad-build", "starts-again-at-once"),
        ("workers-rolled", "rolls-by-killing"),
        ("server-restarted", "leaves-without-draining"),
        ("master-killed", "workers-outlive-their-master"),
        ("server-killed", "leaves-a-lock-behind"),
    ],
)
def test_a_server_with_a_defect_breaks_its_drill(
    fault: str, variant: str, make_stage: MakeStage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(NEEDS.get(fault))
    monkeypatch.setattr(promises, "PROMISED_SECONDS", 8.0)  # the default would be waited for in full
    outcome = play_red(BY_ID[fault], make_stage(**broken(variant, settings_for(fault, tmp_path))), variant)
    assert verdict(outcome) == "BROKEN", explained(outcome)
