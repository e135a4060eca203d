"""Whole runs of the generator: figures if the server answered correctly, otherwise a reason in words."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from perf.generator import run as generator
from perf.generator.answers import WrongAnswer
from perf.generator.histogram import share_above
from perf.generator.job import Job
from perf.generator.loops import Load
from perf.generator.scenarios import Scenario
from perf.targets.catalogue import Catalogue
from perf.targets.processes import children
from perf.targets.target import KEY, Target, Worker, free_port, self_signed, worker
from tests.support.families import sample
from tests.support.hdr import HdrHistogram

from definition_server.catalog.snapshot import Snapshot
from definition_server.ipc.memory import map_sealed

SCENARIO = Scenario("test", "", "", "closed", connections=4, streams=8, seconds=0.3)
SHORT = {"warmup": 0.1, "patience": 5.0}
Run = dict[str, Any]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="server and generator need a CPU each"),
]


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    made = Catalogue(300, 500)
    yield made
    made.close()


@pytest.fixture(scope="module")
def served(catalogue: Catalogue) -> Iterator[Target]:
    with worker("native", catalogue.descriptor, catalogue.built) as made:
        yield made.target


@pytest.fixture
def mortal(catalogue: Catalogue) -> Iterator[Worker]:
    with worker("native", catalogue.descriptor, catalogue.built) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(children(os.getpid()))
    yield
    assert set(children(os.getpid())) <= before


def run(target: Target, catalogue: Catalogue, **more: Any) -> Run:
    return generator.run(target, SCENARIO, catalogue, **SHORT | more)


def good(made: Run) -> Run:
    """Returns ``made``, which must have all figures: the run is valid, or invalid only because the machine was busy
    with other work."""
    assert made["valid"] or made["fault"] == "machine", made["reason"]
    assert made["fault"] != "machine" or "answered" in made, made["reason"]
    return made


def test_a_closed_loop_reports_answers_and_their_cost(served: Target, catalogue: Catalogue) -> None:
    made = good(run(served, catalogue))
    assert (made["scenario"], made["server"], made["kind"]) == ("test", "native", "closed")
    assert made["offered_rate"] is None
    assert made["rate"] == pytest.approx(made["answered"] / made["seconds"], rel=1e-6)
    assert made["per_server_cpu_second"] == pytest.approx(made["answered"] / made["server_cpu_seconds"], rel=1e-6)
    parts = [made[f"server_{part}_seconds"] for part in ("user", "system", "softirq")]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(made["server_cpu_seconds"])
    assert made["seconds"] > 0.2
    assert 10 < made["resident_mb"] <= made["peak_resident_mb"] < 500
    assert 0 < made["client_us_per_call"] < 500


def test_the_histogram_holds_every_answer_that_was_measured(served: Target, catalogue: Catalogue) -> None:
    made = good(run(served, catalogue))
    counted = HdrHistogram.decode(made["histogram"])
    # The histogram contains the calls in flight at the end, but not those in flight at the start.
    assert counted.get_total_count() == pytest.approx(made["answered"], abs=2 * 4 * 8)
    assert counted.get_value_at_percentile(95) / 1e6 == pytest.approx(made["latency"]["p95"], rel=0.01)


def test_an_open_loop_offers_its_rate(served: Target, catalogue: Catalogue) -> None:
    made = run(served, catalogue, kind="open", rate=2000.0, names="zipf", unknown=0.2, bad_key=0.1)
    assert made["offered_rate"] == pytest.approx(2000, rel=0.2)
    assert made["fault"] in ("", "machine"), made["reason"]
    assert made["late"] <= generator.LATE_SHARE or not made["valid"]


@pytest.mark.thorough  # takes seconds
def test_the_latency_of_calls_includes_the_full_wait_for_a_stopped_server(mortal: Worker, catalogue: Catalogue) -> None:
    pid = mortal.target.pid

    def stand_still() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.15)  # the server stands still for this time
        os.kill(pid, signal.SIGCONT)

    made = run(mortal.target, catalogue, kind="open", rate=1000.0, measuring=stand_still)
    # The calls of the first 125 of 300 ms wait for 25 ms or more; a closed loop would have sent only 32 calls.
    assert share_above(made["histogram"], made["histogram_unit"], 25.0) > 0.3
    assert made["latency"]["max"] > 120


@pytest.mark.parametrize("stamped", [False, True])
def test_the_latency_includes_a_delay_of_the_generator_unless_calls_are_stamped(
    served: Target, catalogue: Catalogue, stamped: bool
) -> None:
    job = Job("open", served.port, key=KEY, stamped=stamped, connections=1)
    load = Load(job, Snapshot(map_sealed(catalogue.descriptor)))
    try:
        (connection,), delay = load.connections, 0.05
        while select.select([connection], [], [], 0.2)[0]:  # read the server's SETTINGS, so that the answer comes next
            load.turn(0.0)
        began = time.monotonic()
        connection.send([(load.calls[0], began)])
        assert select.select([connection], [], [], 5)[0]
        delayed = time.monotonic() - began + delay  # from the arrival, so the server's time is not included
        while time.monotonic() < began + delayed:
            pass
        assert load.turn(1.0)
        (latency,) = load.latencies
        assert latency > 0
        assert (latency < delayed) is stamped
    finally:
        load.close()


@pytest.mark.thorough  # takes seconds
def test_a_stamped_schedule_counts_every_call(served: Target, catalogue: Catalogue) -> None:
    made = good(run(served, catalogue, kind="open", rate=1000.0, stamped=True))
    assert made["answered"] == pytest.approx(made["rate"] * made["seconds"], rel=0.2)
    counted = HdrHistogram.decode(made["histogram"]).get_total_count()
    assert counted > 0
    # If other work delayed the generator, calls that were due before the measurement are answered during it.
    assert counted == pytest.approx(made["answered"], rel=0.1) or not made["valid"]


@pytest.mark.thorough  # takes seconds
def test_processes_share_connections_and_rate_and_their_figures_are_added(served: Target, catalogue: Catalogue) -> None:
    made = run(served, catalogue, kind="open", rate=1500.0, processes=3)
    assert made["fault"] in ("", "machine"), made["reason"]
    assert made["processes"] == 3
    assert made["offered_rate"] == pytest.approx(1500, rel=0.25)
    assert HdrHistogram.decode(made["histogram"]).get_total_count() == pytest.approx(450, rel=0.3)


@pytest.mark.parametrize(
    "more",
    sample([
        {"unknown": 0.2, "bad_key": 0.1, "names": "zipf"}, {"deadlines": True, "acknowledge": True}, {"unknown": 1.0},
        {"bad_key": 1.0}, {"deadlines": True}, {"connections": 50, "streams": 1},
    ], 2),
    ids=str,
)  # fmt: skip
def test_every_kind_of_call_is_answered_correctly(served: Target, catalogue: Catalogue, more: Run) -> None:
    assert good(run(served, catalogue, **more))["answered"] > 100


def test_sync_compares_whole_catalogues(served: Target, catalogue: Catalogue) -> None:
    made = good(run(served, catalogue, kind="sync"))
    assert made["answered"] > 5
    assert made["latency"]["p50"] > 0
    assert made["octets_per_server_cpu_second"] > 1e6


@pytest.mark.thorough  # takes seconds
def test_idle_connections_are_held_during_the_load(served: Target, catalogue: Catalogue) -> None:
    made = good(run(served, catalogue, kind="idle", idle=50))
    assert (made["idle"]["held"], made["idle"]["alive"]) == (50, 50)


@pytest.mark.thorough  # takes seconds
def test_slow_readers_read_during_the_load(served: Target, catalogue: Catalogue) -> None:
    made = run(served, catalogue, kind="slow-reader", rate=500.0)
    assert made["fault"] in ("", "machine"), made["reason"]
    assert made["slow_readers"]["connections"] == generator.SLOW_READERS
    assert made["slow_readers"]["octets_read"] > 0


@pytest.mark.thorough  # starts a server
@pytest.mark.parametrize("kind", sample(["closed", "sync"]))
def test_calls_over_tls_are_answered(catalogue: Catalogue, tmp_path: Path, kind: str) -> None:
    with worker("native", catalogue.descriptor, catalogue.built, **self_signed(tmp_path)) as made:
        assert good(run(made.target, catalogue, kind=kind, tls=True))["answered"] > 5
        plain = run(made.target, catalogue, kind=kind, patience=0.5)
        assert (plain["valid"], plain["fault"]) == (False, "server")


@pytest.mark.thorough  # starts a server
def test_the_grpcio_transport_can_be_measured(catalogue: Catalogue) -> None:
    with worker("grpcio", catalogue.descriptor, catalogue.built) as made:
        assert good(run(made.target, catalogue, unknown=0.2, bad_key=0.1))["answered"] > 100


def test_measuring_is_called_once_when_the_measurement_begins(served: Target, catalogue: Catalogue) -> None:
    told: list[str] = []
    run(served, catalogue, measuring=lambda: told.append("now"))
    assert told == ["now"]


# -- runs without figures ----------------------------------------------------------------------------------------------


def spoilt(made: Run, *, fault: str = "server") -> str:
    assert (made["valid"], made["fault"]) == (False, fault), made["reason"]
    return str(made["reason"])


@pytest.mark.parametrize("kind", ["closed", "sync"])
def test_one_wrong_octet_in_the_catalogue_is_a_wrong_answer(served: Target, kind: str) -> None:
    other = Catalogue(300, 500, variant=1)
    try:
        told = spoilt(run(served, other, kind=kind))
    finally:
        other.close()
    assert "other content" in told or "differs near octet" in told


def test_a_server_that_refuses_every_key_answers_wrongly(served: Target, catalogue: Catalogue) -> None:
    assert "gRPC status '16' 'Invalid Credentials', expected 0" in spoilt(run(served, catalogue, key="another key"))


@pytest.mark.parametrize("kind", ["closed", "sync"])
def test_a_port_without_a_server_makes_the_run_invalid(catalogue: Catalogue, kind: str) -> None:
    port = free_port()
    closed = Target("closed", port, os.getpid())
    assert f"no process listens on port {port}" in spoilt(run(closed, catalogue, kind=kind))


@pytest.mark.parametrize("kind", ["closed", "sync"])
def test_a_server_that_sends_nothing_makes_the_run_invalid(catalogue: Catalogue, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = Target("silent", silent.getsockname()[1], os.getpid())
        assert "within 0.3 s" in spoilt(run(target, catalogue, kind=kind, patience=0.3))


@pytest.mark.parametrize("kind", sample(["open", "closed", "sync"]))
def test_a_server_that_dies_during_the_run_makes_it_invalid(mortal: Worker, catalogue: Catalogue, kind: str) -> None:
    pid = mortal.target.pid
    made = run(mortal.target, catalogue, kind=kind, rate=1000.0, measuring=lambda: os.kill(pid, signal.SIGKILL))
    assert "native died" in spoilt(made)


@pytest.mark.parametrize("kind", sample(["closed", "open", "sync"]))
def test_a_server_that_stops_during_the_run_makes_it_invalid(mortal: Worker, catalogue: Catalogue, kind: str) -> None:
    pid = mortal.target.pid
    try:
        made = run(
            mortal.target, catalogue, kind=kind, rate=1000.0, patience=0.4,
            measuring=lambda: os.kill(pid, signal.SIGSTOP),
        )  # fmt: skip
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "0.4 s" in spoilt(made)


def test_a_process_that_has_ended_makes_the_run_invalid(catalogue: Catalogue) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert "is not running" in spoilt(run(Target("gone", 1, ended.pid), catalogue))


@pytest.mark.thorough  # takes seconds
def test_a_rate_beyond_the_generator_is_not_the_server_s_fault(served: Target, catalogue: Catalogue) -> None:
    made = run(served, catalogue, kind="open", rate=2e6)
    assert not made["valid"]
    assert made["fault"] in ("generator", "machine"), made["reason"]
    assert "generator" in made["reason"]


class Owing:
    """A load whose server answers one call in each iteration of 0.6 s until ``silent_at`` calls are left."""

    drain = Load.drain

    def __init__(self, unanswered: int, silent_at: int) -> None:
        self.unanswered, self.silent_at = unanswered, silent_at
        self.job, self.answered, self.now = Job("open", 1, patience=1.0), 0, 0.0

    def turn(self, _: float) -> None:
        self.now += 0.6
        if self.unanswered > self.silent_at:
            self.unanswered, self.answered = self.unanswered - 1, self.answered + 1


def test_a_run_waits_for_a_slow_server_while_it_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Owing(20, silent_at=0)
    monkeypatch.setattr("perf.generator.loops.monotonic", lambda: load.now)
    load.drain()
    assert load.now == pytest.approx(12.0)


def test_a_run_waits_for_a_silent_server_no_longer_than_the_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    load = Owing(20, silent_at=15)
    monkeypatch.setattr("perf.generator.loops.monotonic", lambda: load.now)
    with pytest.raises(WrongAnswer, match=r"no answer for 1 s, 15 calls in flight"):
        load.drain()
    assert load.now == pytest.approx(3.0 + 1.2)


def test_a_machine_with_one_cpu_is_refused(
    served: Target, catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert "at least 2 are needed" in spoilt(run(served, catalogue), fault="machine")


def test_more_connections_than_descriptors_are_refused(served: Target, catalogue: Catalogue) -> None:
    assert "raise the limit (ulimit -n)" in spoilt(run(served, catalogue, idle=10_000_000), fault="machine")


def test_a_load_that_cannot_be_generated_is_refused(served: Target, catalogue: Catalogue) -> None:
    with pytest.raises(ValueError, match="saturate"):
        run(served, catalogue, kind="open", rate="saturate")
    with pytest.raises(TypeError, match="colour"):
        run(served, catalogue, colour="green")


JOB = Job("open", 1)
FIGURES = {"answered": 1000, "seconds": 1.0, "rate": 1000.0, "offered_rate": 1000.0, "late": 0.0,
           "server_cpu_seconds": 0.1, "client_cpu_seconds": 0.1}  # fmt: skip
RESULT = {"due": 1000, "grown": 0, "spinning_seconds": 0.88}


def judged(made: Run, result: Run | None = None, job: Job = JOB) -> tuple[str, str]:
    try:
        generator.judge(FIGURES | made, [job], [RESULT | (result or {})])
    except generator.Spoilt as error:
        return error.fault, str(error)
    return "", ""


@pytest.mark.parametrize(
    ("made", "result", "fault", "words"),
    [
        ({}, {}, "", ""),
        ({"late": 0.0099}, {}, "", ""),
        ({"late": 0.02, "client_cpu_seconds": 0.95}, {"spinning_seconds": 0}, "generator", "too slow for this rate"),
        ({"late": 0.02, "client_cpu_seconds": 0.3}, {"spinning_seconds": 0.2}, "machine", "processes had that CPU"),
        ({"rate": 900.0}, {"grown": 100}, "machine", "900 of 1,000 calls a second"),
        ({"rate": 900.0, "server_cpu_seconds": 0.99}, {"grown": 100}, "", ""),  # beyond the knee, which is valid
        ({"answered": 0}, {}, "server", "no call was answered"),
        ({"answered": 0}, {"due": 0}, "generator", "no call was due during the measurement"),
        ({"idle": {"held": 9, "alive": 7}}, {}, "server", "of 9 idle connections the server closed 2"),
    ],
)  # fmt: skip
def test_a_run_is_invalid_if_its_figures_do_not_describe_the_server(
    made: Run, result: Run, fault: str, words: str
) -> None:
    found, reason = judged(made, result)
    assert found == fault
    assert words in reason


def test_a_closed_loop_is_never_late() -> None:
    assert judged({"late": None}, job=replace(JOB, kind="closed")) == ("", "")
