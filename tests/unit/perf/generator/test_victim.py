"""The victim makes two kinds of honest calls on a schedule, and counts failures."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from perf.generator.answers import WrongAnswer
from perf.generator.victim import Phase, Victim, VictimJob, _wait, main
from perf.targets.catalogue import Catalogue, name_of
from perf.targets.target import KEY, self_signed, worker
from tests.support.polling import until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def catalogue() -> Iterator[Catalogue]:
    made = Catalogue(10, 500)
    yield made
    made.close()


@pytest.fixture(scope="module", params=["cleartext", "tls"])
def job(
    request: pytest.FixtureRequest, catalogue: Catalogue, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VictimJob]:
    """The job of a victim of a running worker."""
    tls = self_signed(tmp_path_factory.mktemp("tls")) if request.param == "tls" else {}
    content = catalogue.snapshot.answer(name_of(0).encode())
    assert content is not None
    with worker("native", catalogue.descriptor, catalogue.built, **tls) as served:
        yield VictimJob(served.target.port, KEY, name_of(0), content.hex(), tls=bool(tls))


@contextmanager
def running(job: VictimJob) -> Iterator[Victim]:
    victim = Victim(job)
    victim.start()
    try:
        yield victim
    finally:
        victim.stop()


def test_both_kinds_of_calls_are_measured_in_the_present_phase(job: VictimJob) -> None:
    with running(job) as victim:
        first = victim.phase
        until(lambda: len(first.steady) > 10 and len(first.connect) > 4, lambda: "calls of the first phase")
        second = victim.phase = Phase()
        until(lambda: len(second.steady) > 10 and len(second.connect) > 4, lambda: "calls of the second phase")
    for phase in (first.result(), second.result()):
        assert phase["steady"]["failed"] == phase["connect"]["failed"] == 0
        assert 0 < phase["connect"]["p50"] <= phase["connect"]["max"]


def test_a_wrong_answer_is_counted_as_a_failure_of_the_full_time_limit(job: VictimJob) -> None:
    with running(job) as victim:
        victim._newcomers = ((b"octets that are no HTTP/2" * 9, victim._call.expected),) * 2
        phase = victim.phase = Phase()
        until(lambda: phase.failed["connect"] > 2, lambda: "failures")
    found = phase.result()["connect"]
    assert found["failed"] > 2
    assert found["max"] >= 1000 * job.patience
    assert phase.reasons


def test_a_victim_whose_first_call_fails_does_not_start(job: VictimJob) -> None:
    with pytest.raises(WrongAnswer, match="Invalid Credentials"):
        Victim(replace(job, key="wrong"))


def test_the_process_reports_that_there_is_no_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(VictimJob(1, KEY, "a", "").to_json() + "\n"))
    assert main() == 1
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert "ConnectionRefused" in told["error"]


def test_instants_of_the_schedule_that_have_passed_are_skipped() -> None:
    assert _wait(0.0, 1.0) > 1.0
