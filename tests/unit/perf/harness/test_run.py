"""Measuring in rounds, with servers and a generator that are not real."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from perf.generator import scenarios
from perf.generator.histogram import UNIT, counted, encode
from perf.generator.scenarios import Scenario
from perf.harness import compare, outcome, run, selftest, sla
from perf.harness import measure as cli
from perf.harness.run import Effort, Plan, Session
from perf.harness.servers import Servers, Starter
from perf.peers import PeerMissing
from perf.targets.target import Target, TargetFailed
from tests.support import machine

HOT = Scenario("hot", "t", "w", "closed", definitions=1, answer_octets=300, seconds=0.1)
GATE = sla.Gate("g", "hot", "per_server_cpu_second", "x", "n", server="ours", over="theirs", least=1.0)
NOISE = {"n": "noise"}


class Machine:
    """Servers of several speeds: what was started, and in which order it was measured."""

    def __init__(self, **speeds: float | Exception) -> None:
        self.speeds = speeds
        self.started: list[str] = []
        self.running: set[str] = set()
        self.measured: list[str] = []
        self.script: dict[int, dict[str, Any]] = {}
        """Number of a run → what differs in it."""

    def starters(self) -> dict[str, Starter]:
        """All of them."""
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
        """A run, all of which say what the speed is."""
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


def plan(*servers: str, rounds: int = 6, looks: int = 2, extra: int = 4, gates: tuple[sla.Gate, ...] = (), **more: Any):  # type: ignore[no-untyped-def]
    """A plan of the scenario `HOT`."""
    return Plan(HOT, servers, rounds, looks, extra, gates, **more)


def test_servers_are_measured_in_turns_whose_order_changes() -> None:
    there = Machine(ours=200.0, theirs=100.0, other=1.0)
    done = session(there)
    done.measure([plan("ours", "theirs", "other", gates=(GATE,))])
    assert there.measured[:6] == ["ours", "theirs", "other", "theirs", "other", "ours"]
    assert there.measured.count("ours") == there.measured.count("theirs") == 6
    assert there.measured.count("other") == 2, "no gate is about it: it is only looked at"
    assert there.measured[6:] == ["ours", "theirs", "theirs", "ours"] * 2
    assert sorted(there.started) == ["other", "ours", "theirs"], "each is started once"
    assert not there.running
    assert [(each.gate.name, each.verdict) for each in done.verdicts] == [("g", sla.KEPT)]


def test_every_round_has_new_processes_where_that_is_asked() -> None:
    there = Machine(ours=200.0, theirs=100.0)
    session(there).measure([plan("ours", "theirs", gates=(GATE,), fresh=True)])
    assert there.started.count("ours") == there.started.count("theirs") == 6
    assert not there.running


def test_an_undecided_gate_gets_more_rounds_but_not_without_end() -> None:
    there = Machine(ours=100.0, theirs=100.0)
    there.script = {number: {"per_server_cpu_second": 90.0} for number in range(0, 40, 3)}
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert len(there.measured) == 2 * (6 + 4)
    assert not done.verdicts[0].decided


def test_a_spoilt_run_is_kept_and_its_round_measured_again() -> None:
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


def test_a_server_that_does_not_start_is_an_invalid_run() -> None:
    there = Machine(ours=TargetFailed("the port is in use"), theirs=100.0)
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert there.started.count("ours") == 1
    assert done.verdicts[0].verdict == sla.INVALID
    assert "the port is in use" in done.verdicts[0].reason


def test_in_ci_what_is_missing_is_no_pardon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    done = session(Machine(ours=200.0, theirs=PeerMissing("theirs: no toolchain")))
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert [each.verdict for each in done.verdicts] == [sla.INVALID]


def test_a_peer_that_this_machine_has_not_got_is_a_line_and_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_our_own_server_is_never_pardoned() -> None:
    there = Machine(ours=PeerMissing("gone"), theirs=100.0)
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    assert done.verdicts[0].verdict == sla.INVALID
    assert not outcome.passed(record(done))


def test_the_knee_is_looked_for_until_the_server_does_not_follow() -> None:
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
    """What is kept of ``done``."""
    return outcome.record(done, {}, machine.facts(), 1.0, proof, [], {"hot": HOT})


def test_a_record_is_kept_whole(tmp_path: Path) -> None:
    there = Machine(ours=200.0, theirs=100.0)
    done = session(there)
    done.measure([plan("ours", "theirs", gates=(GATE,))])
    path = outcome.save(record(done), "here", tmp_path)
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
def test_a_release_passes_with_every_gate_kept_only(verdict: str) -> None:
    kept: dict[str, Any] = {"selftest": None, "runs": [{}], "gates": [{"verdict": sla.KEPT}, {"verdict": verdict}]}
    assert not outcome.passed(kept)
    assert not outcome.passed({"selftest": {"passed": False}, "runs": [{}], "gates": [{"verdict": sla.KEPT}]})
    assert not outcome.passed({"selftest": None, "runs": [], "gates": []}), "nothing was measured"


def test_one_cpu_is_refused_in_words() -> None:
    with pytest.raises(machine.TooFewCpus, match="may use 1 CPU: server and generator would share it"):
        machine.need_cpus(1)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--only", "cold"], "no scenario is called cold"),
        (["--servers", "apache"], "there is no server apache; there are native"),
        (["--against", "no-such-revision"], "'no-such-revision' is no revision of this repository"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "need_cpus", lambda: None)
    assert cli.main(arguments) == cli.OPTION_ERROR
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("told", "attempts", "code"),
    [
        ([[sla.KEPT]], 1, 0),
        ([[sla.INVALID, sla.KEPT], [sla.KEPT]], 2, 0),
        ([[sla.INVALID], [sla.INVALID], [sla.INVALID], [sla.KEPT]], 3, 1),
        ([[sla.MISSED, sla.INVALID], [sla.KEPT]], 1, 1),
        ([[sla.MISSED], [sla.KEPT]], 1, 1),
    ],
)
def test_only_what_proves_nothing_is_measured_again(
    told: list[list[str]], attempts: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [{"selftest": None, "runs": [{}], "gates": [{"verdict": each} for each in one]} for one in told]
    coming = iter(records)
    monkeypatch.setattr(machine, "need_cpus", lambda: None)
    monkeypatch.setattr(cli, "measured", lambda *_: next(coming))
    assert cli.main(["--quick", "--attempts", "3"]) == code
    assert len(records) - len(list(coming)) == attempts


def test_what_is_measured_quickly_takes_less_than_a_minute() -> None:
    arguments = cli.parser().parse_args(["--quick"])
    known = scenarios.load()
    planned = cli.plans(arguments, sla.load(), known)
    assert sum(each.seconds_at_least for each in planned) < 60
    assert {name for each in planned for name in each.servers} == {"native", "grpcio", "nghttpd"}
    arguments.quick, arguments.full = False, True
    whole = cli.plans(arguments, sla.load(), known)
    assert {name for each in whole for name in each.servers} == set(scenarios.SERVERS)
    assert len(whole) == len(known)


def test_a_comparison_measures_candidate_and_base_alone() -> None:
    arguments = cli.parser().parse_args(["--quick", "--against", "HEAD"])
    planned = cli.plans(arguments, sla.load(), scenarios.load())
    assert planned
    assert all(each.servers == (sla.BASE, compare.CANDIDATE) and each.fresh for each in planned)
    assert all(gate.server == compare.CANDIDATE for each in planned for gate in each.gates)


# -- the self-test -----------------------------------------------------------------------------------------------------


def judged(**verdicts: str) -> dict[str, Any]:
    """One run of the self-test with these verdicts."""
    return {
        name: {"missed": verdicts.get(name) == sla.MISSED, "kept": verdicts.get(name) == sla.KEPT, "gates": []}
        for name in selftest.INJECTED
    }


def test_nineteen_of_twenty_caught_and_one_false_alarm_will_do() -> None:
    good = judged(clean=sla.KEPT, busy=sla.MISSED, delay=sla.MISSED)
    bad = judged(clean=sla.MISSED, busy=sla.KEPT, delay=sla.KEPT)
    assert selftest.summary([good] * 20)["passed"]
    assert selftest.summary([good] * 19 + [bad])["passed"]
    assert not selftest.summary([good] * 18 + [bad] * 2)["passed"]
    assert not selftest.summary([])["passed"]


@pytest.mark.parametrize("name", list(selftest.INJECTED))
def test_no_verdict_is_neither_a_catch_nor_an_acquittal(name: str) -> None:
    good = {"clean": sla.KEPT, "busy": sla.MISSED, "delay": sla.MISSED}
    runs = [judged(**good | {name: sla.INVALID})] * 2 + [judged(**good)] * 18
    assert not selftest.summary(runs)["passed"]


def test_the_self_test_goes_the_way_that_against_goes() -> None:
    rules, known = sla.load(), scenarios.load()
    planned = compare.plans(known, rules.comparison, selftest.CANDIDATES, Effort(1.0, 6, 0, 0, fresh=True))
    assert {(each.scenario.name, each.servers) for each in planned} == {
        ("one-by-one", (sla.BASE, "clean", "busy")),
        ("rated", (sla.BASE, "clean", "delay")),
    }
    assert set(selftest.starters()) == {sla.BASE, *selftest.INJECTED}


def test_no_thread_is_left() -> None:
    assert not [each for each in threading.enumerate() if each.name in ("publisher", "generator")]
