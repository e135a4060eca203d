"""The soak: a short soak holds, the seed determines the plan, and the leak check can fail."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
from tests.chaos.drills.catalogue import every_fault
from tests.chaos.drills.judge import explained, judge
from tests.chaos.drills.model import Usage
from tests.chaos.soak import AIM, Options, Played, Soak, soak, summary
from tests.chaos.soak_plan import LEFT_OUT, LEFT_OUT_ON_GRPCIO, eligible, plan
from tests.chaos.test_drills_client import BROKEN
from tests.conftest import TRANSPORTS
from tests.support.providers import need_provider

ROOT = Path(__file__).parents[2]
FAULTS = ("db-killed", "worker-killed", "client-resets")


@pytest.fixture
def embedded() -> None:
    """A PostgreSQL that a soak can start for itself."""
    need_provider("embedded")


@pytest.mark.quiet
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("embedded")
def test_a_soak_of_a_minute_loses_nothing_and_leaks_nothing(tmp_path: Path) -> None:
    record = tmp_path / "soak.json"
    arguments = ("--minutes", "1", "--seed", "5", "--json", str(record))
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.soak", *arguments],
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    assert "seed 5" in done.stdout.splitlines()[0]
    assert "verdict: held; repeat with --seed 5" in done.stdout
    played = [each["fault"] for each in found["played"]]
    assert len(played) >= 3
    assert played == [step.fault for step in islice(plan(5, list(eligible("native"))), len(played))]
    assert found["availability"]["retrying"] >= AIM
    assert found["outcome"]["load"]["retrying"]["failed"] == {}
    for before, after in (found["master"], found["workers"]):
        assert after["threads"] <= before["threads"] + 2
        assert after["memfds"] == before["memfds"] == 1
        assert after["descriptors"] <= before["descriptors"] + 4


@pytest.mark.quiet
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("embedded")
@pytest.mark.parametrize(
    ("fault", "variant", "tells"),
    [
        ("client-resets", "keeps-every-connection", "memory did not come back"),
        ("client-resets", "dies-of-a-reset", "failed that were not in flight"),
    ],
)
def test_a_soak_of_a_server_with_a_defect_fails(fault: str, variant: str, tells: str) -> None:
    settings = {"PYTHONPATH": str(BROKEN), "PYTHON_DRILL_BROKEN": variant}
    found = soak(Options(0.1, 1, faults=(fault,), settings=settings), lambda line: None)
    assert any(tells in sentence for sentence in judge(found.outcome)), explained(found.outcome)
    assert "verdict: BROKEN" in summary(found)


def test_only_the_seed_determines_the_plan() -> None:
    first, second = ([*islice(plan(7, faults), 12)] for faults in (FAULTS, FAULTS[::-1]))
    assert first == second
    assert first != [*islice(plan(8, FAULTS), 12)]
    assert {step.fault for step in first[:3]} == {step.fault for step in first[3:6]} == set(FAULTS)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_fault_is_included_or_left_out_for_a_reason(transport: str) -> None:
    assert set(LEFT_OUT) | set(LEFT_OUT_ON_GRPCIO) <= set(every_fault())
    left_out = set(LEFT_OUT) | (set(LEFT_OUT_ON_GRPCIO) if transport == "grpcio" else set())
    assert not left_out & set(eligible(transport))


def test_the_summary_has_availability_and_the_usage_before_and_after() -> None:
    """The figures come from the load's report, not from the plan."""
    from tests.chaos.drills.model import Allowance, LoadReport, Outcome, SetReport

    load = LoadReport(plain=SetReport(500, 499, {"UNAVAILABLE": 1}), retrying=SetReport(500, 500), seconds=10, rate=100)
    outcome = Outcome("soak", "soak", "process", "native", "embedded", Allowance(), load=load)
    looks = [Usage(10 << 20, 20 << 20, 5, 3, 1, 1), Usage(11 << 20, 22 << 20, 6, 4, 2, 1)]
    found = Soak(Options(1, 3), outcome, [Played(1.0, "db-killed", 1.0)], master=looks, workers=looks)
    assert found.availability == {"retrying": 1.0, "plain": 0.998, "all": 0.999}
    shares = "with the default retry 100.00000% (target 99.999%), without a retry 99.80000%, of all calls 99.90000%"
    assert f"availability {shares}" in summary(found)
    assert "descriptors 5 → 6, threads 3 → 4, memfds 1 → 2" in summary(found)
    assert "verdict: BROKEN" in summary(found), "a call without a retry failed, and nothing allowed that"


def test_a_record_keeps_some_failures_and_the_judge_gets_all() -> None:
    from tests.chaos.drills.model import Allowance, Failure, LoadReport, Loss, Outcome, SetReport

    failures = [Failure("GetCommand", 1, "UNAVAILABLE", "", sent=1.0, ended=2.0, answered=0.9) for _ in range(7000)]
    plain = SetReport(500_000, 493_000, {"UNAVAILABLE": 7000}, failures)
    load = LoadReport(plain=plain, retrying=SetReport(500_000, 500_000), seconds=100, rate=10_000)
    allowed = Allowance(plain=Loss.IN_FLIGHT)
    outcome = Outcome("soak", "soak", "process", "native", "embedded", allowed, load=load, wounds=[(1.5, 3.0)])
    found = Soak(Options(1, 3), outcome)
    assert judge(outcome) == []
    assert len(found.to_json()["outcome"]["load"]["plain"]["failures"]) == 20
    assert len(outcome.load.plain.failures) == 7000


def test_the_command_lists_its_faults_and_refuses_others() -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "tests.chaos.soak", *arguments]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)

    listed = run("--list")
    assert listed.returncode == 0
    assert "db-killed" in listed.stdout
    assert "master-killed" in listed.stdout
    refused = run("--fault", "master-killed")
    assert refused.returncode == 2
    assert "no such fault in a soak: master-killed" in refused.stderr
