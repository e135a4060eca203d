"""Measuring in rounds, with simulated servers and a simulated generator."""

from __future__ import annotations

import io
import json
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from perf.generator import scenarios
from perf.generator.histogram import UNIT, counted, encode
from perf.generator.scenarios import Scenario
from perf.harness import compare, outcome, reference, run, selftest, sla
from perf.harness import measure as cli
from perf.harness.run import Effort, Plan, Session
from perf.harness.servers import Servers, Starter
from perf.peers import PeerMissing
from perf.targets.target import Target, TargetFailed
from tests.support import machine
from tests.support.results import keep

HOT = Scenario("hot", "t", "w", "closed", definitions=1, answer_octets=300, seconds=0.1)
GATE = sla.Gate("g", "hot", "per_server_cpu_second", "x", "n", server="ours", over="theirs", least=1.0)
NOISE = {"n": "noise"}


class Machine:
    """Servers of several speeds; notes which were started, and the order in which they were measured."""

    def __init__(self, **speeds: float | Exception) -> None:
        self.speeds = speeds
        self.started: list[str] = []
        self.running: set[str] = set()
        self.measured: list[str] = []
        self.script: dict[int, dict[str, Any]] = {}
        """Number of a run → the values that differ in it."""

    def starters(self) -> dict[str, Starter]:
        """Name → function that starts the server, for all servers."""
        return {name: self._starter(name) for name in self.speeds}

    def _starter(self, name: str) -> Starter:
        @contextmanager
        def start(servers: Servers) -> Iterator[Target]:
            self.started.append(name)
            speed = self.speeds[name]
            if isinstance(speed, Exception):
                raise speed
            self.running.add(name)
            yield Target(name, 1, 1)
            self.running.discard(name)

        return start

    def generate(self, target: Target, scenario: Scenario, catalogue: Any, **overrides: Any) -> dict[str, Any]:
        """A run whose figures state the speed of the server."""
        assert target.name in self.running
        number = len(self.measured)
        self.measured.append(target.name)
        speed = self.speeds[target.name]
        rate = min(float(scenario.rate), 1000.0) if scenario.kind == "open" else 1000.0
        made = {"valid": True, "reason": "", "fault": "", "rate": rate, "per_server_cpu_second": speed, "latency": {}}
        different = self.script.get(number, {})
        if "raises" in different:
            raise different["raises"]
        return made | different


def session(machine_: Machine, **more: Any) -> Session:
    """A session on that machine."""
    return Session(machine_.generate, NOISE, others=machine_.starters(), **more)


def plan(
    *servers: str, rounds: int = 6, other_rounds: int = 2, extra: int = 4, gates: tuple[sla.Gate, ...] = (), **more: Any
) -> Plan:
    """A plan of the scenario `HOT`."""
    return Plan(HOT, servers, rounds, other_rounds, extra, gates, **more)


def test_the_order_of_servers_changes_from_round_to_round() -> None:
    there = Machine(ours=200.0, theirs=100.0, other=1.0)
    done = session(there)
    done.measure([plan("ours", "theirs", "other", gates=(GATE,))])
    assert there.measured[:6] == ["ours", "theirs", "other", "theirs", "other", "ours"]
    assert there.measured.count("ours") == there.measured.count("theirs") == 6
    assert there.measured.count("other") == 2, "no gate judges this server, so it has fewer rounds"
    assert there.measured[6:] == ["ours", "theirs", "theirs", "ours"] * 2
    assert sorted(there.started) == ["other", "ours", "theirs"], "each server is started once"
    assert not there.running
    assert [(each.gate.name, each.verdict) for each in done.verdicts] == [("g", sla.KEPT)]


def test_the_compiled_form_is_measured_as_often_as_the_pure_one_that_a_gate_judges() -> None:
    gate = replace(GATE, server=scenarios.PURE, over=None)
    there = Machine(native=200.0, compiled=400.0, other=1.0)
    session(there).measure([plan("native", "compiled", "other", gates=(gate,))])
    assert [there.measured.count(name) for name in ("native", "compiled", "other")] == [6, 6, 2]
    there.measured.clear()
    session(there).measure([plan("native", "compiled")])
    assert [there.measured.count(name) for name in ("native", "compiled")] == [2, 2], "no gate judges either"


def test_a_plan_with_fresh_starts_new_processes_in_every_round() -> None:
    there = Machine(ours=200.0, theirs=100.0)
    session(there).measure([plan("ours", "theirs", gates=(GATE,), fresh=True)])
    assert there.started.count("ours") == there.started.count("theirs") == 6
    assert not there.running


EXPECTED = sla.Gate(
    "g", "hot", "per_server_cpu_second", "x", "n", server="ours", least=0.8, expected=sla.Expected(1.0, kernel=1.0)
)


class Meter(reference.Meter):
    """Reports this speed of the interpreter, in this number of bursts."""

    python_us, count = 510.0, 40

    def __enter__(self) -> Meter:
        self.began = time.monotonic()
        return self

    def stop(self) -> list[reference.Burst]:
        """All bursts have the instant of the start, which lies within the simulated runs, since they take a minute."""
        return [(self.began, self.python_us, 500.0)] * self.count

    def __exit__(self, *_: object) -> None:
        """No process was started."""


def test_the_reference_work_runs_during_each_run_of_a_normalised_scenario() -> None:
    there = Machine(ours=1000.0, theirs=1.0)
    there.script = {number: {"seconds": 60.0} for number in range(40)}
    done = session(there, meter=Meter)
    done.measure([plan("ours", "theirs", gates=(EXPECTED,))])
    assert [each["reference"] for each in done.runs] == [{"python_us": 510.0, "kernel_us": 500.0, "bursts": 40}] * len(
        done.runs
    )
    (verdict,) = done.verdicts
    assert verdict.verdict == sla.KEPT
    assert verdict.samples == pytest.approx((1.01,) * 6)


def test_a_scenario_without_a_normalised_gate_runs_without_reference_work() -> None:
    def meter() -> reference.Meter:
        raise AssertionError("no gate needs the reference work")

    done = session(Machine(ours=200.0, theirs=100.0), meter=meter)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert not any("reference" in each for each in done.runs)


def test_failed_reference_work_is_not_reported_as_disturbed() -> None:
    class Failing(Meter):
        def stop(self) -> list[reference.Burst]:
            raise TargetFailed("the reference work fails: no loopback")

    done = session(Machine(ours=1000.0), meter=Failing)
    done.measure([plan("ours", gates=(EXPECTED,))])
    assert (done.verdicts[0].verdict, done.verdicts[0].disturbed) == (sla.INVALID, False)
    assert "no loopback" in done.verdicts[0].reason


def test_starved_reference_work_makes_the_gate_invalid_and_disturbed() -> None:
    class Starved(Meter):
        count = sla.FEWEST_BURSTS - 1

    there = Machine(ours=1000.0)
    there.script = {number: {"seconds": 60.0} for number in range(40)}
    done = session(there, meter=Starved)
    done.measure([plan("ours", gates=(EXPECTED,))])
    assert len(done.runs) == 10, "the maximum number of rounds"
    (verdict,) = done.verdicts
    assert (verdict.verdict, verdict.disturbed) == (sla.INVALID, True)
    assert "in 10 runs of ours the reference work made fewer than 10 bursts" in verdict.reason


def test_a_normalised_server_that_does_not_start_gives_an_invalid_run() -> None:
    done = session(Machine(ours=TargetFailed("the port is in use")), meter=Meter)
    done.measure([plan("ours", gates=(EXPECTED,))])
    assert (done.verdicts[0].verdict, done.verdicts[0].disturbed) == (sla.INVALID, False)
    assert "the port is in use" in done.verdicts[0].reason


@pytest.mark.parametrize(("kind", "ticks", "valid"), [("open", 10, False), ("open", 1, True), ("closed", 50, True)])
def test_stolen_cpu_time_spoils_a_run_of_latency(kind: str, ticks: int, valid: bool) -> None:
    found = {"valid": True} | run.stolen({"valid": True}, kind, ticks * run.TICKS // 100, 1.0)
    assert found["valid"] is valid
    assert found["stolen"] == ticks / 100
    if not valid:
        assert (found["fault"], found["reason"]) == (
            "machine", "the hypervisor gave 10.0% of a CPU to other machines (allowed: at most 3%)"
        )  # fmt: skip
        assert run.stolen({"valid": False}, kind, ticks, 1.0).keys() == {"stolen"}, "the first reason is kept"


def test_an_undecided_gate_gets_more_rounds_up_to_the_maximum() -> None:
    there = Machine(ours=100.0, theirs=100.0)
    there.script = {number: {"per_server_cpu_second": 90.0} for number in range(0, 40, 3)}
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert len(there.measured) == 2 * (6 + 4)
    assert not done.verdicts[0].decided


def test_a_spoilt_run_stays_in_the_record_and_its_round_is_measured_again() -> None:
    there = Machine(ours=200.0, theirs=100.0)
    there.script = {3: {"valid": False, "reason": "late", "fault": "generator"}}
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert len(done.runs) == 2 * 7
    assert sum(not each["valid"] for each in done.runs) == 1
    assert done.verdicts[0].verdict == sla.KEPT
    assert len(done.verdicts[0].samples) == 6


def test_a_server_that_fails_is_not_measured_again_and_its_gate_is_invalid() -> None:
    there = Machine(ours=200.0, theirs=100.0)
    there.script = {2: {"raises": TargetFailed("it answered\n wrongly")}}
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    failed = [each for each in done.runs if not each["valid"]]
    assert [(each["server"], each["reason"], each["fault"]) for each in failed] == [
        ("theirs", "it answered wrongly", "server")
    ]
    assert there.measured.count("theirs") == 2
    assert done.verdicts[0].verdict == sla.INVALID
    assert "theirs: it answered wrongly" in done.verdicts[0].reason


def test_a_server_that_does_not_start_gives_an_invalid_run() -> None:
    there = Machine(ours=TargetFailed("the port is in use"), theirs=100.0)
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert there.started.count("ours") == 1
    assert done.verdicts[0].verdict == sla.INVALID
    assert "the port is in use" in done.verdicts[0].reason


def test_in_ci_a_gate_with_a_missing_peer_is_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    done = session(Machine(ours=200.0, theirs=PeerMissing("theirs: no toolchain")))
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert [each.verdict for each in done.verdicts] == [sla.INVALID]


def test_a_gate_with_a_missing_peer_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    there = Machine(ours=200.0, theirs=PeerMissing("theirs: no toolchain"))
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert {each["server"] for each in done.runs} == {"ours"}
    assert not done.verdicts
    assert done.skipped == [
        {"what": "theirs", "why": "theirs: no toolchain"},
        {"what": "gate: g", "why": "theirs: no toolchain"},
    ]


def test_a_gate_whose_own_server_is_missing_is_invalid() -> None:
    there = Machine(ours=PeerMissing("gone"), theirs=100.0)
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert done.verdicts[0].verdict == sla.INVALID
    assert not outcome.passed(record(done))


def test_the_rate_is_raised_until_the_server_does_not_keep_up() -> None:
    there = Machine(ours=100.0)
    scenario = Scenario("up", "t", "w", "open", rate="saturate", definitions=1, answer_octets=300)
    done = session(there)
    done.measure([Plan(scenario, ("ours",), 6, 2)])
    offered = [point["offered_rate"] for point in done.knee]
    assert offered[0] == 250.0
    assert offered == sorted(offered)
    assert done.knee[-2]["rate"] >= 0.97 * offered[-2]
    assert done.knee[-1]["rate"] < 0.97 * offered[-1]


def test_slow_calls_are_counted_from_the_histogram() -> None:
    encoded = encode(counted([0.001] * 97 + [0.003] * 3))
    share = run.slow_share({"histogram": encoded, "histogram_unit": UNIT})["slow_share"]
    assert share == pytest.approx(0.03)
    assert run.slow_share({}) == {}


# -- the record and the command line -----------------------------------------------------------------------------------


def record(done: Session, proof: dict[str, Any] | None = None) -> dict[str, Any]:
    """The record of ``done``."""
    return outcome.record(done, {}, machine.facts(), 1.0, proof, [], {"hot": HOT})


def test_a_record_is_stored_without_loss(tmp_path: Path) -> None:
    there = Machine(ours=200.0, theirs=100.0)
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    path = keep(record(done), "here", tmp_path)
    kept = json.loads(path.read_text())
    assert path.name.endswith("-here.json")
    assert kept["schema"] == outcome.SCHEMA
    assert len(kept["runs"]) == 12
    assert {"cpu", "cpus", "kernel", "governor", "load_before", "load_after", "steal_ticks_after"} <= set(
        kept["machine"]
    )
    assert kept["gates"][0]["verdict"] == sla.KEPT
    assert outcome.passed(kept)


@pytest.mark.parametrize("verdict", [sla.MISSED, sla.INVALID])
def test_a_measurement_passes_only_if_every_gate_is_kept(verdict: str) -> None:
    kept: dict[str, Any] = {"selftest": None, "runs": [{}], "gates": [{"verdict": sla.KEPT}, {"verdict": verdict}]}
    assert not outcome.passed(kept)
    assert not outcome.passed({"selftest": {"passed": False}, "runs": [{}], "gates": [{"verdict": sla.KEPT}]})
    assert not outcome.passed({"selftest": None, "runs": [], "gates": []}), "nothing was measured"


def test_a_machine_with_one_cpu_is_refused_with_its_reason() -> None:
    with pytest.raises(machine.TooFewCpus, match="may use 1 CPU: server and generator would share it"):
        machine.need_cpus(1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "cold"], "no scenario is called cold"),
        (["--servers", "apache"], "there is no server apache; there are native"),
        (["--against", "no-such-revision"], "'no-such-revision' is not a revision of this repository"),
    ],
)
def test_an_option_that_cannot_be_measured_is_refused_in_one_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "need_cpus", lambda: None)
    assert cli.main(arguments) == outcome.CANNOT_MEASURE
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


DISTURBED = "invalid, disturbed"


def recorded(*verdicts: str, proof: bool | None = None) -> dict[str, Any]:
    """A record with these verdicts of its gates; `DISTURBED`: one that is invalid because of the machine."""
    gates = [
        {
            "gate": "speed [1]", "server": "native", "value": None, "low": None, "high": None, "limit": 1, "unit": "x",
            "bound": "least", "verdict": each.partition(",")[0], "disturbed": each == DISTURBED,
            "reason": "" if each == sla.KEPT else "why",
        }
        for each in verdicts
    ]  # fmt: skip
    passed = None if proof is None else {"passed": proof, "cases": []}
    return {"selftest": passed, "runs": [{}], "gates": gates, "skipped": [], "duration_seconds": 1.0}


@pytest.mark.parametrize(
    ("kept", "code", "told"),
    [
        (recorded(sla.KEPT), 0, "all gates are kept"),
        (recorded(sla.KEPT, sla.MISSED), 1, "NOT KEPT"),
        (recorded(sla.INVALID, DISTURBED), 1, "NOT KEPT"),
        (
            recorded(sla.KEPT, DISTURBED),
            3,
            "INVALID: the measurement was disturbed, and 1 of 2 gates have no verdict: ",
        ),
        (recorded(sla.KEPT, DISTURBED), 3, "speed [1]: why"),
        (recorded(DISTURBED, proof=False), 1, "NOT KEPT"),
        (recorded(DISTURBED, proof=True), 3, "INVALID"),
        (recorded(sla.KEPT, proof=False), 1, "NOT KEPT"),
        (recorded() | {"runs": []}, 1, "NOT KEPT"),
    ],
)
def test_kept_missed_and_invalid_have_different_exit_codes_and_conclusions(
    kept: dict[str, Any], code: int, told: str
) -> None:
    assert outcome.exit_code(kept) == code
    assert told in outcome.conclusion(kept)
    console = outcome.Console(width=150, record=True, file=io.StringIO())
    outcome.show(console, kept)
    shown = console.export_text()
    assert outcome.conclusion(kept) in " ".join(shown.split())
    assert ("all gates are kept" in shown) is (code == 0)


def test_help_lists_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    told = capsys.readouterr().out
    for code in (outcome.PASSED, outcome.NOT_KEPT, outcome.CANNOT_MEASURE, outcome.DISTURBED):
        assert f"\n  {code}  " in told


CI_RUN = Path(__file__).parents[4] / ".ci" / "run"


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (1, 1), (2, 2), (3, 0)])
def test_ci_fails_on_exit_codes_1_and_2_and_only_reports_3(tmp_path: Path, code: int, ends: int) -> None:
    stage = CI_RUN.read_text().partition('say "The quick gate"')[2]
    assert "--attempts 3" in stage
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail\nsay() {{ :; }}\nenvironment={tmp_path}/venv\n{stage}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ends, done.stderr
    assert ("INVALID" in done.stdout) is (code == 3)


@pytest.mark.parametrize(
    ("told", "attempts", "code"),
    [
        ([[sla.KEPT]], 1, 0),
        ([[DISTURBED, sla.KEPT], [sla.KEPT]], 2, 0),
        ([[DISTURBED], [DISTURBED], [DISTURBED], [sla.KEPT]], 3, 3),
        ([[DISTURBED], [sla.MISSED], [sla.KEPT]], 2, 1),
        ([[sla.INVALID], [sla.KEPT]], 1, 1),
        ([[sla.INVALID, DISTURBED], [sla.KEPT]], 1, 1),
        ([[sla.MISSED, DISTURBED], [sla.KEPT]], 1, 1),
        ([[sla.MISSED], [sla.KEPT]], 1, 1),
        ([[]], 1, 0),
    ],
)
def test_only_a_disturbed_measurement_is_repeated_and_has_its_own_exit_code(
    told: list[list[str]], attempts: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [recorded(*one) for one in told]
    coming = iter(records)
    monkeypatch.setattr(machine, "need_cpus", lambda: None)
    monkeypatch.setattr(cli, "measured", lambda *_: next(coming))
    assert cli.main(["--quick", "--attempts", "3"]) == code
    assert len(records) - len(list(coming)) == attempts


def test_the_quick_measurement_takes_less_than_a_minute() -> None:
    arguments = cli.parser().parse_args(["--quick"])
    known = scenarios.load()
    planned = cli.plans(arguments, sla.load(), known)
    assert sum(each.seconds_at_least for each in planned) < 60
    assert {name for each in planned for name in each.servers} == {"native", "grpcio", "nghttpd"}
    arguments.quick = False
    usual = cli.plans(arguments, sla.load(), known)
    assert {name for each in usual for name in each.servers} == {"native", "grpcio", "nghttpd"}
    arguments.full = True
    whole = cli.plans(arguments, sla.load(), known)
    assert {name for each in whole for name in each.servers} == set(scenarios.SERVERS)
    assert len(whole) == len(known)


def test_a_comparison_measures_only_candidate_and_base() -> None:
    arguments = cli.parser().parse_args(["--quick", "--against", "HEAD"])
    planned = cli.plans(arguments, sla.load(), scenarios.load())
    assert planned
    assert all(each.servers == (sla.BASE, compare.CANDIDATE) and each.fresh for each in planned)
    assert all(gate.server == compare.CANDIDATE for each in planned for gate in each.gates)


def test_a_comparison_without_a_gate_is_refused_and_the_scenarios_with_gates_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["--against", "HEAD", "--only", "tls", "--list"]) == outcome.CANNOT_MEASURE
    assert capsys.readouterr().err.endswith(
        "a comparison judges only one-by-one, get-hot, rated; none of them was chosen, but tls\n"
    )


# -- the self-test -----------------------------------------------------------------------------------------------------


def judged(**verdicts: str) -> dict[str, Any]:
    """One run of the self-test with these verdicts."""
    return {
        name: {"missed": verdicts.get(name) == sla.MISSED, "kept": verdicts.get(name) == sla.KEPT, "gates": []}
        for name in selftest.INJECTED
    }


def test_the_self_test_passes_with_19_of_20_caught_and_one_false_alarm() -> None:
    good = judged(clean=sla.KEPT, busy=sla.MISSED, twice=sla.MISSED, delay=sla.MISSED)
    bad = judged(clean=sla.MISSED, busy=sla.KEPT, twice=sla.KEPT, delay=sla.KEPT)
    assert selftest.summary([good] * 20)["passed"]
    assert selftest.summary([good] * 19 + [bad])["passed"]
    assert not selftest.summary([good] * 18 + [bad] * 2)["passed"]
    assert not selftest.summary([])["passed"]


@pytest.mark.parametrize("name", list(selftest.INJECTED))
def test_an_invalid_gate_is_counted_neither_as_caught_nor_as_kept(name: str) -> None:
    good = {"clean": sla.KEPT, "busy": sla.MISSED, "twice": sla.MISSED, "delay": sla.MISSED}
    runs = [judged(**good | {name: sla.INVALID})] * 2 + [judged(**good)] * 18
    assert not selftest.summary(runs)["passed"]


def test_the_self_test_measures_like_against() -> None:
    rules, known = sla.load(), scenarios.load()
    planned = selftest.planned(known, rules, Effort(1.0, 6, 0, 0, fresh=True))
    assert {(each.scenario.name, each.servers) for each in planned} == {
        ("one-by-one", (sla.BASE, "clean", "busy", "twice")),
        ("rated", (sla.BASE, "clean", "delay")),
        ("yardstick", ("clean", "nghttpd", "twice")),
    }
    judged_by = {
        (gate.scenario, gate.server, gate.over, gate.expected is not None) for p in planned for gate in p.gates
    }
    assert judged_by == {
        ("one-by-one", "clean", sla.BASE, False), ("one-by-one", "busy", sla.BASE, False),
        ("one-by-one", "clean", "", True), ("one-by-one", "twice", "", True),
        ("rated", "clean", "", False), ("rated", "delay", "", False),
        ("yardstick", "clean", "nghttpd", True), ("yardstick", "twice", "nghttpd", True),
    }  # fmt: skip
    assert set(selftest.starters()) == {sla.BASE, *selftest.INJECTED}


def test_no_thread_is_left_behind() -> None:
    assert not [each for each in threading.enumerate() if each.name in ("publisher", "generator")]
