"""Gates: when they are kept, missed and invalid."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from perf.generator import scenarios
from perf.harness import sla
from perf.harness.sla import INVALID, KEPT, MISSED, Expected, Gate, SlaError, judge

NOISE = {"cpu-time": "why it can be believed"}


def gate(**values: Any) -> Gate:
    """A gate on ``figure`` of ``hot``, at least 100 unless ``values`` override it."""
    given = {"name": "g", "scenario": "hot", "figure": "figure", "unit": "x", "noise": "cpu-time", "server": "ours"}
    limit = {} if "most" in values else {"least": 100.0}
    return Gate(**given | limit | values)


def runs(server: str, figures: Sequence[float], **more: Any) -> list[dict[str, Any]]:
    """One run for each figure, in rounds from 0 on."""
    run = {"scenario": "hot", "server": server, "valid": True, "reason": ""}
    return [run | {"round": number, "figure": value} | more for number, value in enumerate(figures)]


def spoilt(server: str, number: int, fault: str = "generator", reason: str = "late") -> dict[str, Any]:
    """An invalid run."""
    told = {"valid": False, "reason": reason, "fault": fault}
    return {"scenario": "hot", "server": server, "round": number, "figure": 1e9} | told


def test_a_gate_is_kept_or_missed_if_the_whole_interval_is_on_one_side() -> None:
    assert judge(gate(), runs("ours", [110, 120, 130, 140, 150, 160]), NOISE).verdict == KEPT
    missed = judge(gate(), runs("ours", [90, 80, 70, 95, 85, 99]), NOISE)
    assert missed.verdict == MISSED
    assert missed.decided
    assert missed.interval == (87.5, 70, 99)
    assert "why it can be believed" in missed.reason


def test_a_gate_with_most_is_kept_below_its_limit() -> None:
    assert judge(gate(most=100), runs("ours", [90, 80, 70, 95, 85, 99]), NOISE).verdict == KEPT
    assert judge(gate(most=100), runs("ours", [110, 120, 130, 140, 150, 160]), NOISE).verdict == MISSED


@pytest.mark.parametrize("count", range(6))
def test_fewer_than_six_runs_give_no_verdict(count: int) -> None:
    verdict = judge(gate(), runs("ours", [200.0] * count), NOISE)
    assert verdict.verdict == INVALID
    assert verdict.reason


def test_a_limit_within_the_interval_needs_more_rounds_and_then_the_median_decides() -> None:
    for figures, verdict in (([90, 95, 101, 102, 103, 104], KEPT), ([90, 95, 96, 98, 103, 104], MISSED)):
        found = judge(gate(), runs("ours", figures), NOISE)
        assert (found.verdict, found.decided) == (verdict, False)
        assert "the median of 6 rounds decides" in found.reason


def test_an_interval_beyond_the_limit_by_more_than_the_blur_gives_no_verdict() -> None:
    figures = [60.0, 105, 106, 107, 108, 109]
    assert judge(gate(blur=50.0), runs("ours", figures), NOISE).verdict == KEPT
    found = judge(gate(blur=10.0), runs("ours", figures), NOISE)
    assert (found.verdict, found.decided) == (INVALID, False)
    assert "too noisy" in found.reason
    found = judge(gate(most=100.0, blur=10.0), runs("ours", [90.0, 90, 90, 90, 90, 140]), NOISE)
    assert found.verdict == INVALID
    guilty = [60.0, 60, 60, 60, 60, 109]
    assert judge(gate(blur=10.0), runs("ours", guilty), NOISE).verdict == MISSED, "blur does not change a missed gate"


def test_one_failure_of_the_server_makes_the_gate_invalid() -> None:
    good = runs("ours", [200.0] * 50)
    for fault in ("server", "", "anything new"):
        found = judge(gate(), [*good, spoilt("ours", 50, fault, "a wrong answer")], NOISE)
        assert found.verdict == INVALID
        assert found.reason == "ours: a wrong answer"


def test_an_invalid_run_gives_no_sample() -> None:
    found = judge(gate(), [*runs("ours", [50.0] * 6), spoilt("ours", 6)], NOISE)
    assert found.verdict == MISSED
    assert found.samples == (50.0,) * 6


def test_more_spoilt_runs_than_good_ones_make_the_gate_invalid() -> None:
    many = [spoilt("ours", number) for number in range(6, 13)]
    found = judge(gate(), runs("ours", [200.0] * 6) + many, NOISE)
    assert found.verdict == INVALID
    assert "7 of 13 runs are invalid: ours: late" in found.reason


def test_a_ratio_divides_runs_of_the_same_round() -> None:
    chance = random.Random(1)
    speeds = [chance.uniform(0.2, 5) for _ in range(8)]
    both = runs("ours", [110 * speed for speed in speeds]) + runs("theirs", [100 * speed for speed in speeds])
    found = judge(gate(over="theirs", least=1.05), both, NOISE)
    assert found.verdict == KEPT
    assert found.interval == pytest.approx((1.1, 1.1, 1.1))
    assert judge(gate(over="theirs", least=1.15), both, NOISE).verdict == MISSED


def test_a_round_without_the_other_server_gives_no_sample() -> None:
    both = runs("ours", [200.0] * 8) + runs("theirs", [100.0] * 5) + [spoilt("theirs", 5)]
    assert judge(gate(over="theirs", least=1), both, NOISE).verdict == INVALID


def test_a_gate_with_minus_judges_the_difference_within_a_round() -> None:
    both = runs("ours", [0.012] * 6) + runs("base", [0.001] * 6)
    found = judge(gate(minus="base", most=0.005), both, NOISE)
    assert found.verdict == MISSED
    assert found.interval is not None
    assert found.interval.median == pytest.approx(0.011)


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([], "ours was not measured in hot"),
        (runs("ours", [1.0] * 6), "theirs was not measured in hot"),
        (runs("ours", [1.0] * 6) + runs("theirs", [0.0] * 6), "no run of hot has the figure figure"),
        (runs("ours", [float("nan")] * 6) + runs("theirs", [1.0] * 6), "no run of hot has the figure figure"),
    ],
)
def test_a_missing_run_or_figure_is_the_reason_of_an_invalid_gate(found: list[dict[str, Any]], told: str) -> None:
    verdict = judge(gate(over="theirs"), found, NOISE)
    assert verdict.verdict == INVALID
    assert told in verdict.reason


def measured(
    figures: Sequence[float], python_us: float, kernel_us: float = 0.0, bursts: int = 30
) -> list[dict[str, Any]]:
    """Runs of our server, with the reference work during each run."""
    return runs("ours", figures, reference={"python_us": python_us, "kernel_us": kernel_us, "bursts": bursts})


def test_a_normalised_figure_depends_on_the_server_and_not_on_the_interpreter() -> None:
    normal = gate(least=0.95, expected=Expected(python=2.0, kernel=3.0))
    for python_us in (1.0, 1.5):  # the speeds of interpreters with and without profile-guided optimization
        cost = 2.0 * python_us + 3.0 * 4.0
        clean = judge(normal, measured([1e6 / cost] * 6, python_us, 4.0), NOISE)
        assert (clean.verdict, clean.samples) == (KEPT, pytest.approx((1.0,) * 6))
        slower = judge(normal, measured([1e6 / (1.1 * cost)] * 6, python_us, 4.0), NOISE)
        assert (slower.verdict, slower.samples) == (MISSED, pytest.approx((1 / 1.1,) * 6))


def test_a_normalised_figure_over_a_server_in_c_does_not_depend_on_the_interpreter() -> None:
    normal = gate(least=0.95, over="theirs", expected=Expected(python=2.0, other=0.5))
    theirs = runs("theirs", [1e6 / 3.0] * 6)
    for python_us in (1.0, 1.5):
        cost = 2.0 * python_us + 0.5 * 3.0
        assert judge(normal, measured([1e6 / cost] * 6, python_us) + theirs, NOISE).verdict == KEPT
        assert judge(normal, measured([1e6 / (1.1 * cost)] * 6, python_us) + theirs, NOISE).verdict == MISSED


def test_a_run_whose_reference_work_was_starved_gives_no_sample() -> None:
    normal = gate(least=0.95, expected=Expected(python=1.0))
    steady, starved = measured([1e6] * 6, 1.0), measured([1.0] * 9, 1.0, bursts=sla.FEWEST_BURSTS - 1)
    for number, run in enumerate(starved):
        run["round"] = 6 + number
    assert judge(normal, steady + starved, NOISE).samples == (1.0,) * 6
    found = judge(normal, steady[1:] + starved, NOISE)
    assert (found.verdict, found.decided, found.disturbed) == (INVALID, False, True)
    assert "in 9 runs of ours the reference work made fewer than 10 bursts; 5 rounds are left" in found.reason


def test_runs_without_reference_work_make_the_gate_invalid_but_not_disturbed() -> None:
    found = judge(gate(least=0.95, expected=Expected(python=1.0)), runs("ours", [1e6] * 6), NOISE)
    assert (found.verdict, found.disturbed) == (INVALID, False)


def test_only_faults_of_machine_and_generator_are_reported_as_disturbed() -> None:
    good = runs("ours", [200.0] * 3)
    late = [spoilt("ours", number) for number in range(3, 9)]
    for more, disturbed in ((late, True), ([*late, spoilt("ours", 9, "server")], False), ([], False)):
        found = judge(gate(), [*good, *more], NOISE)
        assert (found.verdict, found.disturbed) == (INVALID, disturbed)
        assert found.as_dict()["disturbed"] is disturbed
    noisy = judge(gate(blur=10.0), runs("ours", [60.0, 105, 106, 107, 108, 109]), NOISE)
    assert (noisy.verdict, noisy.disturbed) == (INVALID, True)
    absent = judge(gate(over="theirs"), late, NOISE)
    assert (absent.verdict, absent.reason) == (INVALID, "theirs was not measured in hot")
    assert not absent.disturbed, "a missing run is not a disturbance"


def test_a_record_can_hold_every_verdict() -> None:
    for found in (runs("ours", [200.0] * 6), runs("ours", [200.0]), []):
        told = judge(gate(), found, NOISE).as_dict()
        assert json.loads(json.dumps(told, allow_nan=False))["noise_model"] == "why it can be believed"


def test_the_projects_gates_name_existing_scenarios_and_their_servers() -> None:
    known = scenarios.load()
    rules = sla.load(scenarios=known)
    assert rules.gates
    assert rules.comparison
    for each in rules.gates:
        assert set(each.servers) <= set(known[each.scenario].servers), each.name
        assert not each.expected or known[each.scenario].kind == "closed", f"{each.name}: bursts would add to latency"
    for each in rules.comparison:
        assert each.server == sla.CANDIDATE
        assert sla.BASE in (each.over, each.minus), each.name
        assert each.blur < 1, f"{each.name}: noise could hide a regression"
    in_ci = {name for name, scenario in known.items() if "quick" in scenario.sets}
    assert {each.scenario for each in rules.comparison} <= in_ci
    assert in_ci <= {each.scenario for each in rules.gates}, "CI measures a scenario without a gate"


GATE = '[noise]\nn = "x"\n[[gate]]\nname = "g"\nscenario = "get-hot"\nfigure = "f"\nunit = "u"\n'


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GATE + 'noise = "n"\nleast = 1\nworst = 2\n', "gate 'g': unknown key worst; known are"),
        (GATE + 'noise = "n"\n', "gate 'g': it takes either least or most"),
        (GATE + 'noise = "n"\nleast = 1\nmost = 2\n', "gate 'g': it takes either least or most"),
        (GATE + 'noise = "m"\nleast = 1\n', "noise model 'm' is not described in [noise]: n"),
        (GATE + "least = 1\n", "gate 'g': noise is missing"),
        (GATE + 'noise = "n"\nleast = 1\nover = "a"\nminus = "b"\n', "it takes over or minus, not both"),
        (GATE + 'noise = "n"\nleast = 1\nexpected = { c = 1 }\n', "expected takes a table of kernel, other, python"),
        (GATE + 'noise = "n"\nleast = 1\nexpected = {}\n', "expected takes a table of"),
        (GATE + 'noise = "n"\nleast = 1\nexpected = { python = 0 }\n', "expected takes numbers above 0"),
        (GATE + 'noise = "n"\nleast = 1\nexpected = { python = 1, other = 1 }\n', "expected takes other if"),
        (GATE + 'noise = "n"\nleast = 1\nover = "a"\nexpected = { python = 1 }\n', "expected takes other if"),
        (GATE.replace("get-hot", "get-cold") + 'noise = "n"\nleast = 1\n', "there is no scenario 'get-cold'"),
        ("[[window]]\n", "unknown table window"),
        ("[[gate", "sla.toml: "),
    ],
)
def test_a_wrong_gate_or_table_is_refused_with_its_reason(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "sla.toml"
    file.write_text(text)
    with pytest.raises(SlaError) as caught:
        sla.load(file, ["get-hot"])
    assert told in str(caught.value)


def test_a_gate_demands_the_guides_objective_at_the_rate_of_one_worker() -> None:
    """P95 below 1 ms at 35,000 calls a second on four cores: on each core, and on each worker of the overlay, which
    leaves a core to the master.
    """
    overlay = (sla.FILE.parents[1] / "deploy/kubernetes/overlays/guide/kustomization.yaml").read_text()
    workers = re.search(r"- WORKERS=(\d+)", overlay)
    assert workers
    rates = {"rated": 4, "rated-share": int(workers[1])}
    known = scenarios.load()
    gates = {each.scenario: each.most for each in sla.load().gates if each.figure == "latency.p95"}
    for name, divisor in rates.items():
        assert known[name].rate == math.ceil(35_000 / divisor)
        assert gates[name] == 1.0
